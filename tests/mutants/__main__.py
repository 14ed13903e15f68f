"""``python -m tests.mutants [NAME ...]``: plant the faults of the catalogue, and say which ones the tests notice."""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from tests.mutants.catalogue import MUTANTS, Mutant
from tests.mutants.parts import SUITES
from tests.mutants.runner import CAUGHT, Copy, Result, copy_tree, faults_of

ROOT = Path(__file__).resolve().parents[2]
LEAST_CAUGHT = 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants, areas or parts (default: all)")
    parser.add_argument(
        "--tree", type=Path, default=ROOT, metavar="DIR", help="a git clone, with its CPU kernels built"
    )
    parser.add_argument("--suite", choices=SUITES, default="new", help="how the tests of that tree are laid out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, as they come")
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="for each mutant (default: 240)")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="where to copy the tree; kept (default: temporary)")
    parser.add_argument("--check-clean", action="store_true", help="run each part once without a fault first")
    options = parser.parse_args(arguments)
    mutants = _chosen(options.names)
    faults = faults_of(mutants, options.tree)
    if faults:
        print(*faults, sep="\n")
        return 2
    if options.copy:
        options.copy.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.copy) if options.copy else tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve(), SUITES[options.suite], options.limit)
        copy_tree(options.tree, copy.folder)
        for part in dict.fromkeys(mutant.part for mutant in mutants) if options.check_clean else ():
            reason = copy.why_not_clean(part)
            print(f"without a fault, {part}: {reason or 'green'}", flush=True)
            if reason is not None:
                return 2
        results: list[Result] = []
        for result in copy.run(mutants):
            print(result, flush=True)
            results.append(result)
            if options.json:
                options.json.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
    return _total(results)


def _chosen(names: Sequence[str]) -> list[Mutant]:
    unknown = [name for name in names if not any(name in (m.name, m.area, m.part) for m in MUTANTS)]
    if unknown:
        sys.exit(f"expected names of mutants, areas or parts; got {', '.join(unknown)}")
    return [m for m in MUTANTS if not names or {m.name, m.area, m.part}.intersection(names)]


def _total(results: Sequence[Result]) -> int:
    """Print the totals; the exit status."""
    caught = Counter(result.area for result in results if result.outcome == CAUGHT)
    planted = Counter(result.area for result in results)
    print()
    for area, count in planted.items():
        print(f"{area:<10} {caught[area]} of {count} caught")
    print(f"{'all':<10} {caught.total()} of {planted.total()} caught")
    return 0 if caught.total() >= LEAST_CAUGHT * planted.total() else 1


if __name__ == "__main__":
    sys.exit(main())
