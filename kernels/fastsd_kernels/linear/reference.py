"""linear as its definition: plain PyTorch, in any floating-point dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], for geglu [2 N, K]: values, then gates
    bias: Tensor | None,  # [N] or [2 N]
    norm_weight: Tensor | None,  # [K]
    norm_bias: Tensor | None,  # [K]
    norm_eps: float | None,  # None: no normalisation
    activation: str,
    residual: Tensor | None,  # [..., N]
) -> Tensor:  # [..., N]
    u = x
    if norm_eps is not None:
        norm_weight, norm_bias = (None if p is None else p.to(x.dtype) for p in (norm_weight, norm_bias))
        u = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, norm_eps)
    y = F.linear(u, weight, None if bias is None else bias.to(x.dtype))
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    elif activation == "geglu":
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    return y if residual is None else y + residual


def unavailable() -> str | None:
    return None


def reject(*args: Any) -> str | None:
    return None


def run(*args: Any) -> Tensor:
    return linear(*args).contiguous()
