"""``python -m bench COMMAND``; see ``--help``."""

import argparse
import sys

from bench import blocks, compress, crossover, gri_fidelity, gri_scaling, op, plot, report, tune, unet
from fastsd.cli import run_safely


def parser() -> argparse.ArgumentParser:
    """The command line: the commands with their options."""
    top = argparse.ArgumentParser(prog="bench", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (unet, blocks, op, compress, crossover, gri_scaling, gri_fidelity, plot, tune, report):
        command.add_parser(commands).set_defaults(run=command.run)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 when a result broke the contract or a step failed, 2 for a request that cannot be served."""
    return run_safely(parser().parse_args(arguments), "bench")


if __name__ == "__main__":
    sys.exit(main())
