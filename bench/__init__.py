"""Benchmarks, run from the root of the repository: ``python -m bench --help``.

They also run in a checkout that is not installed.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fastsd_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
