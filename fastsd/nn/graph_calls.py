"""Calls of a model as its CUDA graphs see them: why none can serve one, which of them does, what they are given."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastsd.nn.frozen import PLAIN_VALUES, why_unknown
from fastsd.nn.plain import PLAIN, why_stock_everywhere


class NotServed(Exception):
    """A call that no graph can serve; the message says why."""


def takes_timestep(root: nn.Module) -> bool:
    """Whether graphs serve such a model, a U-Net or ControlNet: pipelines call its forward, once for each timestep.

    Not diffusers' transformers: they read which attention to call from a registry of the process.
    """
    parameters = _parameters(type(root).forward)
    return "timestep" in parameters and ("sample" in parameters or not _is_of_diffusers(root))


def why_not_now() -> str | None:
    """Why no call can be served just now, whatever the model, as a sentence, or ``None``."""
    if torch.jit.is_tracing():
        return "torch.jit traced it"
    from torch.utils._device import DeviceContext  # not loaded by `import torch`

    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    if modes or _get_current_dispatch_mode() is not None:
        return "a mode that sees every operation of torch was active"
    for name, function in _functional().items():
        if (reason := why_unknown(f"torch.nn.functional.{name}", function)) is not None:
            return reason
    return why_stock_everywhere()


def why_no_input(leaf: Any, device: torch.device) -> str | None:
    """Why no graph takes such an argument, as a sentence, or ``None``."""
    if not isinstance(leaf, Tensor):
        is_plain = isinstance(leaf, PLAIN_VALUES)
        return None if is_plain else f"an input was a {type(leaf).__qualname__}, expected tensors and plain values"
    if type(leaf) not in PLAIN or leaf.layout is not torch.strided:
        return f"an input was a {type(leaf).__qualname__} of layout {leaf.layout}, expected a plain tensor"
    return None if leaf.device == device else f"an input was on {leaf.device}, the model on {device}"


def key_of(leaf: Any) -> tuple[Any, ...]:
    """What a graph is for, of one of the arguments."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    return type(leaf), repr(leaf)


def laid_out_as(given: Tensor) -> Tensor:
    """A copy with the strides of ``given``, gaps and repeats included: a forward may take another way for others."""
    once = without_repeats(given)
    own = torch.empty_strided(once.shape, once.stride(), dtype=given.dtype, device=given.device)
    return own.copy_(once).expand(given.shape)


def without_repeats(x: Tensor) -> Tensor:
    """What an expanded tensor was before."""
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 and x.shape[dim] > 1 else x
    return x


def _functional() -> dict[str, Any]:
    """What diffusers calls by way of a module, where some put functions of their own."""
    names = (
        "scaled_dot_product_attention",
        "linear",
        "conv2d",
        "group_norm",
        "layer_norm",
        "silu",
        "gelu",
        "interpolate",
    )
    return {name: getattr(torch.nn.functional, name) for name in names}


def settings_of_torch(device_type: str) -> tuple[Any, ...]:
    """What else decides which kernels a forward calls."""
    backends: Any = torch.backends
    cuda, cudnn, matmul = backends.cuda, backends.cudnn, backends.cuda.matmul
    # not allow_tf32, which raises where somebody has set precisions by layer
    precisions = [each.fp32_precision for each in (backends, matmul, cudnn, cudnn.conv, cudnn.rnn)]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        *precisions,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        cuda.preferred_blas_library(),
        (cudnn.enabled, cudnn.deterministic, cudnn.benchmark),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        tuple(torch._C._get_sdp_priority_order()),
        os.environ.get("FASTSD_BACKEND"),
        *_functional().values(),
    )


def with_timestep_on(
    device: torch.device, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the timestep where a forward would copy it: a graph cannot copy from the CPU.

    Schedulers give it as a number or a tensor on the CPU too, and a number would take one graph for each value. Only of
    diffusers' own forwards it is known that a tensor of one element is the same to them.
    """
    if not _is_of_diffusers(root):
        return args, kwargs
    position = _parameters(type(root).forward).index("timestep") - 1
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[position] if position < len(args) else None
    if isinstance(timestep, float):
        raise NotServed("the timestep was a float, expected a tensor or an integer")
    if type(timestep) is int:
        timestep = torch.tensor([timestep], device=device)
    elif isinstance(timestep, Tensor) and timestep.dim() == 0:
        timestep = timestep.to(device)
    if "timestep" in kwargs:
        return args, kwargs | {"timestep": timestep}
    return (*args[:position], timestep, *args[position + 1 :]) if position < len(args) else args, kwargs


def _is_of_diffusers(root: nn.Module) -> bool:
    return type(root).forward.__module__.startswith("diffusers.")


@functools.lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)
