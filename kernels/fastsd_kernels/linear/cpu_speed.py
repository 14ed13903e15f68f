"""Whether this library multiplies matrices faster than torch on this processor: MKL is slow on other makers' ones.

Measured once in a process, when a model is patched, since no list of processors would be complete.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastsd_kernels import cpu_runtime
from fastsd_kernels.linear import linear

# by so much it has to be faster, so that noise does not decide
CLEARLY = 1.25
ROWS, CHANNELS = 256, 640
_ROUNDS = 7

_is_faster: bool | None = None


def measure() -> bool:
    """What :func:`is_faster` says from now on; takes some 30 ms the first time."""
    global _is_faster
    if _is_faster is None:
        _is_faster = cpu_runtime.unavailable() is None and _ratio() >= CLEARLY
    return _is_faster


def is_faster() -> bool:
    """Whether a linear layer runs clearly faster as the op; ``False`` where nobody has measured."""
    return bool(_is_faster)


def _ratio() -> float:
    """Torch's time for a linear layer over that of this library, on one thread.

    With several, what else runs on the machine would decide: each call waits for the thread that was held up most.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _ratio_on_one_thread()
    finally:
        torch.set_num_threads(threads)


def _ratio_on_one_thread() -> float:
    # a generator of its own: a patch may not move the random numbers that an image is drawn from
    like: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "generator": torch.Generator().manual_seed(0)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight = torch.randn(ROWS, CHANNELS, **like), torch.randn(CHANNELS, CHANNELS, **like)
        torchs: list[float] = []
        own: list[float] = []
        for _ in range(_ROUNDS):
            torchs.append(_seconds(lambda: F.linear(x, weight)))
            own.append(_seconds(lambda: linear(x, weight, backend="cpu")))
    return min(torchs) / min(own)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
