"""The layers of transformers' CLIP encoders: norms and sums in one op with the projections beside them."""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, QuickGELUActivation
from transformers.models.clip import modeling_clip as stock

from fastsd.nn.linear import example_projection, first_projection, fused, is_fused, project
from fastsd.nn.plain import remember, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings

_ACTIVATIONS: dict[type[nn.Module], str] = {QuickGELUActivation: "quick_gelu", GELUActivation: "gelu"}
for _cls in _ACTIVATIONS:
    remember(_cls)


def takes_what_is_known(cls: type[nn.Module]) -> bool:
    """Whether the ``forward`` of a layer or of its attention takes what it does in transformers 5."""
    return list(inspect.signature(cls.forward).parameters) == ["self", "hidden_states", "attention_mask", "kwargs"]


_IS_KNOWN = (
    takes_what_is_known(stock.CLIPEncoderLayer)
    and takes_what_is_known(stock.CLIPAttention)
    and hasattr(stock.ALL_ATTENTION_FUNCTIONS, "get_interface")
)


def why_stock(module: stock.CLIPEncoderLayer | stock.CLIPAttention) -> str | None:
    """Why ``module`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    if not _IS_KNOWN:
        return "its forward is not that of transformers 5"
    return why_stock_everywhere()


def is_fast(module: stock.CLIPEncoderLayer | stock.CLIPAttention) -> bool:
    """Whether a replaced ``module`` is to run by the ops."""
    return active_settings(module) is not None and why_stock(module) is None


class CLIPAttention(Replacement, stock.CLIPAttention):
    """``y = W_o concat_heads(attention(q, k, v)) + b_o`` with the attention function that the model is set to."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, C]
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # [B, N, C], and the weights if that function gives them
        if not is_fast(self):
            return stock.CLIPAttention.forward(self, hidden_states, attention_mask, **kwargs)
        return attend(self, hidden_states, attention_mask, kwargs)


remember(CLIPAttention)


def attend(
    attn: stock.CLIPAttention,
    x: Tensor,  # [B, N, C]
    attention_mask: Tensor | None,
    told: dict[str, Any],  # for the attention function
    norm: nn.LayerNorm | None = None,  # of x, a plain one
    residual: Tensor | None = None,  # [B, N, C]
) -> tuple[Tensor, Tensor | None]:
    """Projections, the attention function between them, and the sum with ``residual``."""
    own = ("q_proj", "k_proj", "v_proj")
    if norm is not None and not all(is_fused(attn, attn, name, x, norm) for name in own):
        x, norm = norm(x), None
    q, k, v = (
        project(attn, attn, name, x, norm=norm).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for name in own
    )
    function = stock.ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, stock.eager_attention_forward
    )
    dropout = attn.dropout if attn.training else 0.0
    y, weights = function(attn, q, k, v, attention_mask, scaling=attn.scale, dropout=dropout, **told)
    y = y.reshape(*x.shape[:-1], -1).contiguous()
    return project(attn, attn, "out_proj", y, residual=residual), weights


class CLIPEncoderLayer(Replacement, stock.CLIPEncoderLayer):
    """``x += self_attn(layer_norm1(x)); x += W2 act(W1 layer_norm2(x) + b1) + b2``.

    The attention is called, unless it is replaced too and nobody has put anything on it.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:  # [B, N, C] to the same
        if not is_fast(self):
            return stock.CLIPEncoderLayer.forward(self, hidden_states, attention_mask, **kwargs)
        x = CLIPEncoderLayer._add_attention(self, hidden_states, attention_mask, kwargs)
        return CLIPEncoderLayer._add_mlp(self, x)

    def _add_attention(self, x: Tensor, attention_mask: Tensor | None, told: dict[str, Any]) -> Tensor:
        if (
            why_not_plain(self, "self_attn", CLIPAttention) is None
            and why_not_plain(self, "layer_norm1", nn.LayerNorm) is None
            and is_fast(self.self_attn)
        ):
            return attend(self.self_attn, x, attention_mask, told, self.layer_norm1, x)[0]
        return x + self.self_attn(hidden_states=self.layer_norm1(x), attention_mask=attention_mask, **told)[0]

    def _add_mlp(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if why_not_plain(self, "mlp", stock.CLIPMLP) is not None:
            return x + mlp(self.layer_norm2(x))
        is_plain = why_not_plain(self, "layer_norm2", nn.LayerNorm) is None
        z, norm = (x, self.layer_norm2) if is_plain else (self.layer_norm2(x), None)
        activation = _known_activation(mlp)
        if activation is not None and is_fused(self, mlp, "fc1", z, norm):
            z = fused(self, mlp.fc1, z, norm, activation=activation)
        else:
            z = mlp.activation_fn(project(self, mlp, "fc1", z, norm=norm))
        return project(self, mlp, "fc2", z, residual=x)


def _known_activation(mlp: stock.CLIPMLP) -> str | None:
    """What the op calls the activation; ``None`` for one that has to be called."""
    name = _ACTIVATIONS.get(type(mlp.activation_fn))
    if name is None or why_not_plain(mlp, "activation_fn", type(mlp.activation_fn)) is not None:
        return None
    return None if name == "gelu" and mlp.activation_fn.act is not F.gelu else name


def example_layer(layer: stock.CLIPEncoderLayer) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device."""
    if why_not_plain(layer, "mlp", stock.CLIPMLP) is not None:
        return {}
    first = example_projection(layer.mlp, "fc1", _known_activation(layer.mlp) or "none")
    return first or example_projection(layer.mlp, "fc2")


def example_attention(attn: stock.CLIPAttention) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device."""
    return first_projection(attn, "q_proj", "k_proj", "v_proj", "out_proj")
