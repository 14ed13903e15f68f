"""diffusers' Attention on the op of the same name, between projections."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

from fastsd.nn.convolution import normalise, wants_gradient
from fastsd.nn.linear import first_projection, is_fused, project
from fastsd.nn.plain import is_idle, is_overwritten, remember, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings, settings_of
from fastsd.nn.text import keys_and_values
from fastsd.nn.tokens import as_map, as_tokens
from fastsd_kernels import attention
from fastsd_kernels.checks import DTYPES

_PROCESSORS = (AttnProcessor2_0, AttnProcessor, FusedAttnProcessor2_0)
_CALLS = {cls: cls.__call__ for cls in _PROCESSORS if not is_overwritten(cls, "__call__")}

_STEPS = {
    name: getattr(stock.Attention, name)
    for name in ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim", "prepare_attention_mask")
}


def why_other_processor(attn: stock.Attention) -> str | None:
    """Why what ``attn``'s processor computes is not known here, as a sentence; ``None`` where it is full attention."""
    processor = attn.processor
    if type(processor) not in _CALLS:
        return f"its processor is a {type(processor).__qualname__}, expected diffusers' AttnProcessor2_0"
    if type(processor).__call__ is not _CALLS[type(processor)]:
        return f"{type(processor).__qualname__}.__call__ has been overwritten"
    if type(processor) is AttnProcessor:
        for name, method in _STEPS.items():
            if name in attn.__dict__ or getattr(stock.Attention, name) is not method:
                return f"Attention.{name}, which AttnProcessor calls, has been overwritten"
    return None


def is_plain_kind(attn: stock.Attention) -> bool:
    """Whether ``attn`` is attention of tokens, or of a map, to themselves or to a text, and nothing else."""
    return (
        attn.spatial_norm is None
        and attn.added_kv_proj_dim is None
        and not attn.only_cross_attention
        and attn.inner_kv_dim == attn.inner_dim
    )


def why_stock(attn: stock.Attention) -> str | None:
    """Why ``attn`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    if attn.group_norm is not None:
        reason = why_not_plain(attn, "group_norm", nn.GroupNorm)
        if reason is not None:
            return reason
    return why_other_processor(attn) or why_stock_everywhere()


class Attention(Replacement, stock.Attention):
    """``y = W_o concat_heads(softmax(q kᵀ / √d) v) + b_o`` with ``q = W_q x``, ``k, v = W_k c, W_v c``.

    In inference on a CPU, without a mask; else as stock. Of a map ``x`` may be normed, and added to the result.
    """

    def forward(
        self,
        hidden_states: Tensor,  # x, [B, N, C] or [B, C, H, W]
        encoder_hidden_states: Tensor | None = None,  # c, [B, M, C']; x where there is none
        attention_mask: Tensor | None = None,
        *args: Any,
        **cross_attention_kwargs: Any,
    ) -> Tensor:  # as x
        x = hidden_states
        is_map = x.dim() == 4
        if (
            attention_mask is not None
            or args
            or cross_attention_kwargs.keys() - {"temb"}  # which spatial norms alone read
            or not (is_map or (x.dim() == 3 and self.group_norm is None))
            or not is_fast(self, x, encoder_hidden_states)
        ):
            return stock.Attention.forward(
                self, x, encoder_hidden_states, attention_mask, *args, **cross_attention_kwargs
            )
        tokens = x if self.group_norm is None else normalise(self, x, self.group_norm)
        y = attend(self, self, full_attention, as_tokens(tokens) if is_map else tokens, encoder_hidden_states)
        if is_map:
            y = as_map(y, (x.shape[0], *x.shape[2:]))
        y = y + x if self.residual_connection else y
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor


remember(Attention)


def is_fast(attn: stock.Attention, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a replaced ``attn`` is to attend to ``x`` by the op, as far as it is seen from what goes into it."""
    return active_settings(attn) is not None and why_stock(attn) is None and _is_served(attn, x, *others)


Core = Callable[[Tensor, Tensor, Tensor, float | None, str | None], Tensor]


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None) -> Tensor:
    """The op, as :func:`attend` calls what stands between projections."""
    return attention(q, k, v, scale=scale, backend=backend)


def attend(
    owner: nn.Module,
    attn: Any,
    core: Core,
    x: Tensor,  # [B, N, C]
    encoder_hidden_states: Tensor | None = None,  # [B, M, C']
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,  # [B, N, C]
) -> Tensor:  # [B, N, C]
    """Projections, ``core`` between them on tokens in heads, and the sum with ``residual``.

    Args:
        owner: the replaced module whose settings apply.
        attn: what has the projections, those of q, k and v each by itself or, as its processor is, packed.
        core: of q, k and v, ``[B, heads, N, d]``, the scale, ``None`` for 1/√d, and the backend.
        norm: of x, a plain one.
    """
    settings = settings_of(owner)
    is_packed = type(attn.processor) is FusedAttnProcessor2_0  # after fuse_qkv_projections()
    own = ("to_q",) if encoder_hidden_states is not None else ("to_qkv",) if is_packed else ("to_q", "to_k", "to_v")
    if norm is not None and not all(is_fused(owner, attn, name, x, norm) for name in own):
        x, norm = norm(x), None
    if encoder_hidden_states is None:
        projected = [project(owner, attn, name, x, norm=norm) for name in own]
        q, k, v = projected[0].chunk(3, dim=-1) if is_packed else projected
    else:
        context = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
        q = project(owner, attn, "to_q", x, norm=norm)
        k, v = keys_and_values(owner, attn, context, is_packed)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    if type(attn.processor) is not AttnProcessor:  # which knows of no such norms
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
    # which know no other than 1/√d
    scale = None if type(attn.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0) else attn.scale
    y = core(q, k, v, scale, None if settings is None else settings.backend).transpose(1, 2).flatten(2).to(q.dtype)
    if is_idle(attn.to_out, "1"):
        return project(owner, attn.to_out, "0", y, residual=residual)
    y = attn.to_out[1](project(owner, attn.to_out, "0", y))
    return y if residual is None else y + residual


def is_plain_end(attn: stock.Attention) -> bool:
    """Whether ``attn`` gives what :func:`attend` does, and adds and scales nothing of its own."""
    return not attn.residual_connection and attn.rescale_output_factor == 1


def _is_served(attn: stock.Attention, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the op is to attend to the tokens ``x``, rather than torch.

    On a CPU it is, where no gradient is wanted: for that the op would compute the scores again. On a GPU nobody has
    measured it yet.
    """
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and all(t is None or (t.dim() == 3 and t.shape[0] == x.shape[0] and t.numel() > 0) for t in others)
        and all(t is None or t.dtype == torch.float32 for t in (x, *others, *attn.parameters()))
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and wants_gradient(x, *others, *attn.parameters()))
    )


def example_calls(attn: stock.Attention) -> dict[str, tuple[Any, ...]]:
    """The ops that the module calls in inference, with arguments of its dtype and device."""
    like = next((p for p in attn.parameters() if p.dtype in DTYPES), None)
    if like is None:
        return {}
    with torch.no_grad():
        if not _is_served(attn, like.new_empty((1, 8, attn.query_dim))):
            return {}
    q = like.new_empty((1, attn.heads, 64, attn.inner_dim // attn.heads))
    return {"attention": (q, q, q, None, None)} | first_projection(attn, "to_q", "to_k", "to_v")
