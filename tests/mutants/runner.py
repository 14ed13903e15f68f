"""Plants faults into a copy of a tree, one at a time, and runs the part of its tests that names what is faulty."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.catalogue import Mutant
from tests.mutants.parts import Parts

CAUGHT, SURVIVED, TIMED_OUT, INVALID = "caught", "SURVIVED", "TIMED OUT", "INVALID"
_PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short")
_BUILD = (sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build/cpu")
_BUILD_SECONDS = 900
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)
# of pytest: no test was selected, or there is no such file
_NOTHING_RAN = (4, 5)


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    Attributes:
        outcome: ``CAUGHT``, ``SURVIVED``, ``TIMED_OUT``, or ``INVALID`` where it says nothing of the tests.
        by: the first test that failed, or what else happened.
        seconds: that the tests took.
    """

    name: str
    area: str
    part: str
    outcome: str
    by: str
    seconds: float

    def __str__(self) -> str:
        how = f"caught by {self.by} in {self.seconds:.0f} s" if self.outcome == CAUGHT else self.outcome
        how += f" ({self.by})" if self.outcome != CAUGHT and self.by else ""
        return f"{self.name:<40} {how}"


def faults_of(mutants: Iterable[Mutant], tree: Path) -> list[str]:
    """Why mutants cannot be planted into ``tree``: the source has moved on."""
    faults, texts = [], {}
    for mutant in mutants:
        file = tree / mutant.file
        text = texts.setdefault(file, file.read_text("utf-8") if file.is_file() else "")
        if (count := text.count(mutant.old)) != 1:
            faults.append(f"{mutant.name}: expected its text once in {mutant.file}; found it {count} times")
    return faults


def copy_tree(tree: Path, copy: Path) -> None:
    """What git tracks of ``tree``, and the CPU kernels that are built there; what else is in ``copy`` stays."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=tree, capture_output=True, text=True, check=True).stdout
    built = (str(path.relative_to(tree)) for path in tree.glob("kernels/fastsd_kernels/_cpu*.so"))
    for name in (*filter(None, tracked.split("\0")), *built):
        if (tree / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, copy / name)
    sources = copy / "kernels/fastsd_kernels/cuda_sources"
    if (copy / "csrc/cuda").is_dir() and not sources.is_symlink():
        sources.symlink_to(copy / "csrc/cuda")


class Copy:
    """A tree to plant faults in.

    Args:
        folder: of the copy; ``build/`` in it is kept from mutant to mutant, as all there is named by its content.
        parts: of the tests, see :mod:`tests.mutants.parts`.
        limit: seconds for the tests of a mutant.
    """

    def __init__(self, folder: Path, parts: Parts, limit: float) -> None:
        self.folder, self.parts, self.limit = folder, parts, limit
        self._is_built = False

    def run(self, mutants: Iterable[Mutant]) -> Iterator[Result]:
        for mutant in mutants:
            file = self.folder / mutant.file
            text = file.read_text("utf-8")
            extensions = {path: path.read_bytes() for path in self._extensions()}
            is_cpu = mutant.file.startswith("csrc/cpu/")
            try:
                if is_cpu and not self._is_built:
                    self._is_built = self._build()
                file.write_text(text.replace(mutant.old, mutant.new), "utf-8")
                if is_cpu and not self._build():
                    yield Result(mutant.name, mutant.area, mutant.part, INVALID, "it does not compile", 0)
                    continue
                outcome = self._test(mutant.part)
            finally:
                file.write_text(text, "utf-8")
                # the next build makes the object anew: its source is younger
                for path, content in extensions.items() if is_cpu else ():
                    path.unlink(missing_ok=True)  # a process that has it loaded keeps the old file
                    path.write_bytes(content)
            yield Result(mutant.name, mutant.area, mutant.part, *outcome)

    def why_not_clean(self, part: str) -> str | None:
        """What fails of a part without any fault, or ``None``."""
        outcome, by, _ = self._test(part)
        return None if outcome == SURVIVED else f"{outcome}: {by}"

    def _test(self, part: str) -> tuple[str, str, float]:
        path = os.pathsep.join(map(str, (self.folder, self.folder / "kernels")))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        start = time.monotonic()
        status, output = _call([*_PYTEST, *self.parts[part]], self.folder, environment, self.limit)
        seconds = time.monotonic() - start
        if status is None:
            return TIMED_OUT, f"{self.limit:.0f} s", seconds
        if status == 0:
            return SURVIVED, "", seconds
        failed = _FAILED.search(output)
        if status in _NOTHING_RAN:
            return INVALID, "no tests ran", seconds
        if status == 1 and failed:
            return CAUGHT, failed[1], seconds
        return CAUGHT, f"{failed[1] if failed else 'no test'}, as pytest broke off with status {status}", seconds

    def _extensions(self) -> list[Path]:
        return sorted(self.folder.glob("kernels/fastsd_kernels/_cpu*.so"))

    def _build(self) -> bool:
        for path in self._extensions():
            path.unlink()
        _call(_BUILD, self.folder, dict(os.environ), _BUILD_SECONDS)
        return bool(self._extensions())


def _call(command: Sequence[str], folder: Path, environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Exit status, ``None`` where it took too long, and output; no process of its is left behind."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
