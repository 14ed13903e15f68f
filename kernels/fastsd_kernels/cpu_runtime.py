"""The CPU extension: whether it was built, and the instruction set that its kernels run with."""

import functools
import importlib
import os
from typing import Any

ISAS = ("baseline", "avx2", "avx512")
ENVIRONMENT_VARIABLE = "FASTSD_CPU_ISA"


@functools.cache
def extension() -> Any:
    """The extension; loading it registers ``torch.ops.fastsd_cpu``.

    Raises:
        ImportError: it was not built, or for another machine.
    """
    return importlib.import_module("fastsd_kernels._cpu")


@functools.cache
def unavailable() -> str | None:
    """Why the CPU kernels cannot run, or ``None``."""
    try:
        extension()
    except ImportError as error:
        return (
            f"the CPU extension is not there ({error}); install a C++17 compiler (g++ or clang++) and reinstall "
            "fastsd with `pip install --no-build-isolation`"
        )
    return None


@functools.cache
def isa() -> int:
    """Index into ``ISAS`` of what the kernels run with: this machine's widest, or ``$FASTSD_CPU_ISA``."""
    best = extension().best_isa()
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted is None:
        return best
    if wanted not in ISAS[: best + 1]:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(ISAS[: best + 1])}; got {wanted!r}")
    return ISAS.index(wanted)
