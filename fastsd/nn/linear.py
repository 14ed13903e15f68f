"""A linear layer of a replaced module, as a 1×1 convolution where that is faster."""

from typing import Any

import torch
from torch import Tensor, nn

from fastsd.nn.convolution import is_inference
from fastsd.nn.plain import is_transformed, why_not_plain
from fastsd.nn.replacement import settings_of
from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import cpu_impl, cpu_speed


def project(owner: nn.Module, holder: nn.Module, name: str, x: Tensor) -> Tensor:
    """``holder.<name>(x)``, a linear layer.

    Args:
        owner: the replaced module whose settings apply.
        holder: what has the layer as an attribute.
        x: ``[B, N, C]``.
    """
    settings, layer = settings_of(owner), getattr(holder, name)
    if settings is None or not is_fused(holder, name, x):
        return layer(x)
    # tokens are a channels-last map of one row
    y = conv2d(*_as_convolution(layer, x.contiguous()), backend=settings.backend)
    return y.squeeze(2).transpose(1, 2)


def is_fused(holder: nn.Module, name: str, x: Tensor) -> bool:
    """Whether ``holder.<name>`` on ``x`` is computed by the op."""
    layer = getattr(holder, name)
    return (
        x.device.type == "cpu"
        and cpu_speed.is_faster()
        and why_not_plain(holder, name, nn.Linear) is None
        and x.dim() == 3
        and x.dtype == torch.float32
        and x.shape[2] == layer.in_features
        and x.numel() > 0
        and is_inference(layer, x)
        and not is_transformed()
        # torch has instructions for less precision that the op does not use
        and (torch.compiler.is_compiling() or cpu_impl.is_plain_float32())
    )


def _as_convolution(layer: nn.Linear, x: Tensor) -> tuple[Any, ...]:
    return x.transpose(1, 2).unsqueeze(2), layer.weight[:, :, None, None], layer.bias


def example_projection(holder: nn.Module, name: str) -> dict[str, tuple[Any, ...]]:
    """For :func:`fastsd.patching.rule.Rule.op_calls`: the call that :func:`project` makes, if it makes one."""
    layer = getattr(holder, name)
    if not isinstance(layer, nn.Linear):
        return {}
    x = layer.weight.new_empty((1, 8, layer.in_features))
    if x.device.type == "cpu":
        cpu_speed.measure()
    with torch.no_grad():
        if not is_fused(holder, name, x):
            return {}
        rest = (1, [0] * 4, None, 0, None, None, 1e-5, None, None, "none", None, None, None, 1.0, None)
        return {"conv2d": (*_as_convolution(layer, x), *rest)}
