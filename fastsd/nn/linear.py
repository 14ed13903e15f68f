"""A linear layer of a replaced module with what surrounds it: as one op where that is faster, else part by part."""

from typing import Any

import torch
from torch import Tensor, nn

from fastsd.nn.convolution import is_inference
from fastsd.nn.plain import why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import settings_of
from fastsd_kernels import linear
from fastsd_kernels.conv2d import cpu_impl
from fastsd_kernels.linear import cpu_speed


def project(
    owner: nn.Module,
    holder: nn.Module,
    name: str,
    x: Tensor,
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``holder.<name>(norm(x)) + residual``, a linear layer, and what may be left out.

    Args:
        owner: the replaced module whose settings apply.
        holder: what has the layer as an attribute.
        x: ``[B, N, C]``.
        norm: a plain one.
        residual: ``[B, N, C']``.
    """
    if not is_fused(owner, holder, name, x, norm, residual):
        y = getattr(holder, name)(x if norm is None else norm(x))
        return y if residual is None else y + residual
    return fused(owner, getattr(holder, name), x, norm, residual=residual)


def fused(
    owner: nn.Module, layer: nn.Linear, x: Tensor, norm: nn.LayerNorm | None = None, **surroundings: Any
) -> Tensor:
    """The op, for what :func:`is_fused`."""
    settings = settings_of(owner)  # which another thread may have taken away meanwhile
    backend = None if settings is None else settings.backend
    return linear(x, layer.weight, layer.bias, **norm_arguments(norm), **surroundings, backend=backend)


def norm_arguments(norm: nn.LayerNorm | None) -> dict[str, Any]:
    """The op's arguments for a norm, or for none."""
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


def is_fused(
    owner: nn.Module,
    holder: nn.Module,
    name: str,
    x: Tensor,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
) -> bool:
    """Whether ``holder.<name>`` on ``x``, with norm and residual, is computed by the op."""
    return settings_of(owner) is not None and _is_served(holder, name, x, norm, residual)


def _is_served(
    holder: nn.Module, name: str, x: Tensor, norm: nn.LayerNorm | None = None, residual: Tensor | None = None
) -> bool:
    layer = getattr(holder, name)
    parameters = () if norm is None else (norm.weight, norm.bias)
    return (
        x.device.type == "cpu"
        and cpu_speed.is_faster()
        and why_not_plain(holder, name, nn.Linear) is None
        and x.dim() == 3
        and x.dtype == torch.float32
        and x.shape[2] == layer.in_features
        and x.numel() > 0
        and (norm is None or norm.normalized_shape == (layer.in_features,))
        and (residual is None or (residual.dtype == x.dtype and residual.shape == (*x.shape[:2], layer.out_features)))
        and is_inference(layer, x, *parameters, residual)
        and why_stock_everywhere() is None
        # torch has instructions for less precision that the op does not use
        and (torch.compiler.is_compiling() or cpu_impl.is_plain_float32())
    )


def first_projection(holder: nn.Module, *names: str) -> dict[str, tuple[Any, ...]]:
    """:func:`example_projection` of the first of some layers that runs by the op."""
    return next(filter(None, (example_projection(holder, name) for name in names)), {})


def example_projection(holder: nn.Module, name: str, activation: str = "none") -> dict[str, tuple[Any, ...]]:
    """For :func:`fastsd.patching.rule.Rule.op_calls`: the call that :func:`project` makes, if it makes one."""
    layer = getattr(holder, name)
    if not isinstance(layer, nn.Linear):
        return {}
    x = layer.weight.new_empty((1, 8, layer.in_features))
    if x.device.type == "cpu":
        cpu_speed.measure()
    with torch.no_grad():
        if not _is_served(holder, name, x):
            return {}
        return {"linear": (x, layer.weight, layer.bias, None, None, None, activation, None)}
