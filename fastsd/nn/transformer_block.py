"""diffusers' BasicTransformerBlock: norms in one op with the projections behind them, sums with those before them."""

from typing import Any

from diffusers.models import attention as stock
from torch import Tensor, nn

from fastsd.nn.attention import Attention, attend, full_attention, is_plain_end
from fastsd.nn.attention import is_fast as is_fast_attention
from fastsd.nn.feed_forward import FeedForward, feed
from fastsd.nn.feed_forward import is_fast as is_fast_feed_forward
from fastsd.nn.plain import why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings


def why_stock(block: stock.BasicTransformerBlock) -> str | None:
    """Why ``block`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    return why_another_kind(block) or why_stock_everywhere()


def why_another_kind(block: stock.BasicTransformerBlock) -> str | None:
    """Why ``block`` is none of the blocks of U-Nets, as a sentence, or ``None``."""
    if block.norm_type != "layer_norm":
        return f"its norms are {block.norm_type}, expected layer_norm"
    if block.pos_embed is not None:
        return "it embeds positions, expected a block that does not"
    return None


class BasicTransformerBlock(Replacement, stock.BasicTransformerBlock):
    """``x += attn1(norm1(x)); x += attn2(norm2(x), text); x += ff(norm3(x))``.

    Attentions and feed-forward layer are called, unless they are replaced too and nobody has put anything on them.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, C]
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,  # [B, M, C']
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # [B, N, C]
        told, x, text = cross_attention_kwargs, hidden_states, encoder_hidden_states
        # another thread may take the patch away meanwhile
        fast = type(self)
        if (
            args
            or kwargs
            or not issubclass(fast, BasicTransformerBlock)
            or active_settings(self) is None
            or (told or {}).get("scale") is not None  # which stock warns of
            or x.dim() != 3
            or fast._why_stock(self) is not None
        ):
            given: Any = (attention_mask, text, encoder_attention_mask, timestep, told, class_labels)
            return stock.BasicTransformerBlock.forward(self, x, *given, *args, **kwargs)
        more = dict(told or {})
        boxes = more.pop("gligen", None)
        x = fast._add_self_attention(self, x, text if self.only_cross_attention else None, attention_mask, more, told)
        if boxes is not None:
            x = self.fuser(x, boxes["objs"])
        if self.attn2 is not None:
            x = fast._add(self, "attn2", "norm2", x, text, encoder_attention_mask, more)
        return fast._add_feed_forward(self, x)

    def _why_stock(self) -> str | None:
        return why_stock(self)

    def _add_self_attention(
        self,
        x: Tensor,
        context: Tensor | None,
        attention_mask: Tensor | None,
        more: dict[str, Any],
        told: dict[str, Any] | None,  # cross_attention_kwargs as they came
    ) -> Tensor:
        return BasicTransformerBlock._add(self, "attn1", "norm1", x, context, attention_mask, more)

    def _add(
        self,
        name: str,
        norm: str,
        x: Tensor,
        context: Tensor | None,
        attention_mask: Tensor | None,
        more: dict[str, Any],
    ) -> Tensor:
        attn = getattr(self, name)
        if (
            attention_mask is None
            and not more
            and why_not_plain(self, name, Attention) is None
            and why_not_plain(self, norm, nn.LayerNorm) is None
            and attn.group_norm is None
            and is_plain_end(attn)
            and is_fast_attention(attn, x, context)
        ):
            return attend(attn, attn, full_attention, x, context, norm=getattr(self, norm), residual=x)
        given = {"encoder_hidden_states": context, "attention_mask": attention_mask}
        return attn(getattr(self, norm)(x), **given, **more) + x

    def _add_feed_forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm3
        if (
            self._chunk_size is None
            and why_not_plain(self, "norm3", nn.LayerNorm) is None
            and why_not_plain(self, "ff", FeedForward) is None
            and is_fast_feed_forward(self.ff)
        ):
            return feed(self.ff, x, norm, x)
        z = norm(x)
        if self._chunk_size is not None:
            return stock._chunked_feed_forward(self.ff, z, self._chunk_dim, self._chunk_size) + x
        return self.ff(z) + x
