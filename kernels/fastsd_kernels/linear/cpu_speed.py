"""Whether this library runs linear layers faster than torch on this processor, with what stands around them.

MKL multiplies a little faster on its maker's processors and half as fast on others. Measured once in a process, when a
model is patched, since no list of processors would be complete.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastsd_kernels import cpu_runtime
from fastsd_kernels.linear import linear

# by so much it has to be faster, so that noise does not decide
CLEARLY = 1.15
ROWS, CHANNELS = 256, 320
_ROUNDS = 15

_measuring = threading.Lock()
_is_faster: bool | None = None


def measure() -> bool:
    """What :func:`is_faster` says from now on; takes a fifth of a second the first time.

    ``False``, and nothing is kept, where tensors are not what they seem: the next call measures.
    """
    global _is_faster
    with _measuring:
        if _is_faster is None and cpu_runtime.unavailable() is None and not is_dispatched_elsewhere():
            _is_faster = _ratio() >= CLEARLY
    return bool(_is_faster)


def is_faster() -> bool:
    """Whether a linear layer runs clearly faster as the op; measured where nobody has, but not for a compiler."""
    return bool(_is_faster) if _is_faster is not None or torch.compiler.is_compiling() else measure()


def is_dispatched_elsewhere() -> bool:
    """Whether a mode (fake tensors, a profiler of calls) takes what torch computes, or a transform."""
    return (
        _get_current_dispatch_mode() is not None
        or torch.overrides._get_current_function_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _ratio() -> float:
    """Torch's time for a feed-forward block over that of this library: of each its best call, of the threads there are.

    Such blocks are half of what the op computes in a U-Net. The number of threads is the process's, and what changes it
    for a moment changes it for good in a thread that starts meanwhile.
    """
    # a generator of its own: a patch may not move the random numbers that an image is drawn from
    like: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "generator": torch.Generator().manual_seed(0)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, scale = torch.randn(1, ROWS, CHANNELS, **like), torch.randn(CHANNELS, **like)
        first, second = torch.randn(8 * CHANNELS, CHANNELS, **like), torch.randn(CHANNELS, 4 * CHANNELS, **like)

        def of_torch() -> torch.Tensor:
            values, gates = F.linear(F.layer_norm(x, (CHANNELS,), scale), first).chunk(2, dim=-1)
            return x + F.linear(values * F.gelu(gates), second)

        def of_this_library() -> torch.Tensor:
            hidden = linear(x, first, norm_weight=scale, norm_eps=1e-5, activation="geglu", backend="cpu")
            return linear(hidden, second, residual=x, backend="cpu")

        torchs: list[float] = []
        own: list[float] = []
        for _ in range(_ROUNDS):
            torchs.append(_seconds(of_torch))
            own.append(_seconds(of_this_library))
    return min(torchs) / min(own)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
