"""Compiled things that tests share: each made once, by the first process that asks, and kept in ``build/artefacts``.

An artefact is named by a digest of all that it is made from, so it is never out of date: host libraries by their
preprocessed unit, flags and compiler; cubins by source, target and compiler. ``make clean`` removes them.
"""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/artefacts"


def digest(*parts: Any) -> str:
    """A name for what is made from ``parts``: values whose ``repr`` says all of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def artefact(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The file ``build/artefacts/<kind>/<name>``, made by ``make(path)`` unless it exists.

    Args:
        kind: the folder, such as ``"cubin"``.
        name: begins or ends with a :func:`digest` of everything that ``make`` reads.
        make: writes a file at the path that it is given. If it raises, nothing is left.
    """
    path = FOLDER / kind / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / name
                make(made)
                os.replace(made, path)
    path.with_name(f"{name}.lock").unlink(missing_ok=True)
    return path


def preprocessed(unit: str, flags: Sequence[str], compiler: str = "g++") -> str:
    """What a C++ compiler sees of ``unit``: macros expanded, headers included, no comments and no line numbers."""
    command = [compiler, "-E", "-P", "-x", "c++", *flags, "-"]
    return subprocess.run(command, input=unit, capture_output=True, text=True, check=True).stdout
