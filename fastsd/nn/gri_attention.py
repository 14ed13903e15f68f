"""Self-attention of diffusers' transformers on gri_attention: in a replaced block, and as a processor."""

import math
from typing import Any

import torch
from diffusers.models import attention as stock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from fastsd.gri import GRI, check_size
from fastsd.nn import transformer_block
from fastsd.nn.attention import Attention as FastAttention
from fastsd.nn.attention import Core, attend, is_plain_end, why_other_processor
from fastsd.nn.plain import is_transformed, remember, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import active_settings, settings_of
from fastsd.nn.transformer_block import why_another_kind
from fastsd_kernels import gri_attention
from fastsd_kernels.checks import DTYPES
from fastsd_kernels.gri_attention import INTERACTIONS
from fastsd_kernels.gri_attention.reference import gri_attention as plain_gri_attention

remember(Attention)


class ToldKwargs(dict[str, Any]):
    """The ``cross_attention_kwargs`` of a transformer's blocks, which tell them the size of the map on the way.

    So it goes where the tokens go, through checkpoints, compilers and threads, and nobody else sees it.
    """

    grid: tuple[int, int] | None = None


def why_stock(block: stock.BasicTransformerBlock) -> str | None:
    """Why ``block`` has to run the stock forward, full attention, as a sentence; ``None`` where GRI takes its place."""
    another = why_another_kind(block)
    if another is not None:
        return another
    attn = block.attn1
    is_fast = isinstance(attn, FastAttention)  # by an earlier patch
    why_not = why_not_plain(block, "attn1", FastAttention if is_fast else Attention)
    if why_not is not None:
        return why_not
    if is_fast and active_settings(attn) is None:
        return "Attention.forward has been overwritten"
    return why_other_processor(attn) or why_not_self_attention(attn)


def why_not_self_attention(attn: Attention) -> str | None:
    """Why ``attn`` is not the self-attention of a transformer's tokens, as a sentence, or ``None``."""
    if attn.is_cross_attention or attn.added_kv_proj_dim is not None or attn.only_cross_attention:
        return "its attention is no self-attention"
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "its attention norms a map, expected one that takes tokens"
    return None


class BasicTransformerBlock(transformer_block.BasicTransformerBlock):
    """``x += gri(norm1(x)); x += attn2(norm2(x), text); x += ff(norm3(x))``.

    A block that is not told the size of the map, or is given a mask, runs full attention.
    """

    def _why_stock(self) -> str | None:
        # a transform changes nothing: the definition runs
        return why_another_kind(self)

    def _add_self_attention(
        self,
        x: Tensor,
        context: Tensor | None,
        attention_mask: Tensor | None,
        more: dict[str, Any],
        told: dict[str, Any] | None,
    ) -> Tensor:
        # another thread may have patched it without GRI meanwhile
        gri = getattr(getattr(settings_of(self), "rule", None), "gri", None)
        grid = getattr(told, "grid", None)
        if gri is None or grid is None or attention_mask is not None or why_stock(self) is not None:
            plain = transformer_block.BasicTransformerBlock._add_self_attention
            return plain(self, x, context, attention_mask, more, told)
        norm: Any = self.norm1
        given = arguments(gri, grid)
        if (
            is_plain_end(self.attn1)
            and why_not_plain(self, "norm1", nn.LayerNorm) is None
            and why_stock_everywhere() is None
        ):
            return attend(self, self.attn1, _core(grid, **given), x, norm=norm, residual=x)
        return self_attention(self, self.attn1, norm(x), grid, **given) + x


def tell_grid(
    transformer_blocks: nn.ModuleList, x: Tensor, cross_attention_kwargs: dict[str, Any] | None
) -> dict[str, Any] | None:
    """``cross_attention_kwargs`` for the blocks of a transformer that gets the map ``x [B, C, H, W]``."""
    # compile() of a module puts a wrapper around it
    blocks = (getattr(block, "_orig_mod", block) for block in transformer_blocks)
    if not any(isinstance(block, BasicTransformerBlock) and settings_of(block) is not None for block in blocks):
        return cross_attention_kwargs
    told = ToldKwargs(cross_attention_kwargs or {})
    told.grid = x.shape[2], x.shape[3]
    return told


def arguments(gri: GRI, grid: tuple[int, int]) -> dict[str, Any]:
    """The op's arguments; cells are no larger than a map that is small."""
    return {
        "window": _pair(gri.window),
        "pool": _clamped(gri.pool, grid),
        "interaction": gri.interaction,
        "mask_own_window": gri.mask_own_window,
    }


def _clamped(pool: int | tuple[int, int] | None, grid: tuple[int, int]) -> tuple[int, int] | None:
    pair = _pair(pool)
    return None if pair is None else (min(pair[0], grid[0]), min(pair[1], grid[1]))


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def self_attention(
    owner: nn.Module,  # whose settings apply
    attn: Any,
    x: Tensor,  # [B, N, C]
    grid: tuple[int, int],
    **given: Any,
) -> Tensor:  # [B, N, C]
    """What diffusers' processors compute for tokens, with GRI in place of full attention."""
    y = attend(owner, attn, _core(grid, **given), x)
    y = y + x if attn.residual_connection else y
    return y / attn.rescale_output_factor


def _core(
    grid: tuple[int, int],
    *,
    window: tuple[int, int] | None,
    pool: tuple[int, int] | None,
    interaction: str,
    mask_own_window: bool,
    gate: Tensor | None = None,
) -> Core:
    def core(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None) -> Tensor:
        if is_transformed():
            return plain_gri_attention(q, k, v, grid, window, pool, interaction, mask_own_window, gate, scale)
        choice: dict[str, Any] = {"interaction": interaction, "mask_own_window": mask_own_window, "gate": gate}
        return gri_attention(q, k, v, grid=grid, window=window, pool=pool, **choice, scale=scale, backend=backend)

    return core


def example_calls(block: stock.BasicTransformerBlock, gri: GRI) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device."""
    attn = block.attn1
    # not the storage that a layer is cast from, nor a quantised one
    like = next((p for p in block.parameters() if p.dtype in DTYPES), None)
    if like is None or not isinstance(attn, Attention):
        return {}
    q = like.new_empty((1, attn.heads, 64, attn.inner_dim // attn.heads))
    window, pool = [gri.window] * 2, _clamped(gri.pool, (8, 8))
    return {"gri_attention": (q, q, q, (8, 8), window, pool, gri.interaction, gri.mask_own_window, None, None)}


class GRIAttnProcessor(nn.Module):
    """GRI attention as a diffusers attention processor, for models that are not patched or that train a gate::

        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(GRIAttnProcessor(window=16, pool=4))

    It takes any tokens that attend to each other for those of a map, so give it to the ``attn1`` of transformers alone:
    not to all attentions of a GLIGEN model, nor to motion modules. Cross-attention and masked attention run as
    ``AttnProcessor2_0`` does. Formula: :func:`fastsd_kernels.gri_attention`. Loading or unloading an IP-Adapter builds
    all processors anew, without arguments, which this class refuses: load first, and take it off before unloading.
    ``save_pretrained`` writes the gates of ``"gated"``; ``from_pretrained`` knows nothing of processors and drops them:
    keep them yourself, from ``unet.state_dict()``.

    Args:
        window: side of the windows, or height and width; ``None`` for none.
        pool: side of the cells, or height and width, at most the map's; ``None`` for none.
        interaction: ``"joint"``, ``"gated"`` or ``"agent"``.
        mask_own_window: leave out the cells inside a query's own window.
        heads: how many the layer has; for ``"gated"``, which has a parameter ``gate [heads]`` that starts at 0: both
            branches count half.
        grid: height and width of the map; ``None`` for a square. Give it for any other: 256 tokens are those of a map
            of 8 by 32 as well as of 16 by 16.

    Raises:
        ValueError: a size that is none, no such interaction, or ``"gated"`` without ``heads``; at a call, tokens that
            are no square where no grid is given.
    """

    def __init__(
        self,
        window: int | tuple[int, int] | None,
        pool: int | tuple[int, int] | None,
        interaction: str = "joint",
        mask_own_window: bool = False,
        heads: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_size("window", window)
        check_size("pool", pool)
        if isinstance(grid, int):
            raise ValueError(f"grid: expected (height, width), or None; got {grid}")
        check_size("grid", grid)
        if interaction not in INTERACTIONS:
            raise ValueError(f"interaction: expected one of {', '.join(INTERACTIONS)}; got {interaction!r}")
        self.window, self.pool, self.interaction, self.mask_own_window = window, pool, interaction, mask_own_window
        self.grid = grid
        if interaction == "gated" and heads is None:
            raise ValueError("heads: expected how many the layer has, for interaction='gated'; got None")
        self.gate = nn.Parameter(torch.zeros(heads)) if interaction == "gated" and heads is not None else None

    # not forward: diffusers looks at the arguments of __call__
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [B, N, C]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        is_self = encoder_hidden_states is None and attention_mask is None and hidden_states.dim() == 3
        if not is_self or why_not_self_attention(attn) is not None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        count = hidden_states.shape[1]
        side = math.isqrt(count)
        if self.grid is None and side * side != count:
            raise ValueError(f"grid: expected height and width of the map of {count} tokens, no square; got None")
        grid = self.grid or (side, side)
        return self_attention(
            attn,
            attn,
            hidden_states,
            grid,
            window=_pair(self.window),
            pool=_clamped(self.pool, grid),
            interaction=self.interaction,
            mask_own_window=self.mask_own_window,
            gate=self.gate,
        )
