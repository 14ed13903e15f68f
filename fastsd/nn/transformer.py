"""diffusers' Transformer2DModel on conv2d: norm and projection of the map as one op, projection and sum as another."""

from typing import Any

import torch
from diffusers.models.transformers import transformer_2d as stock
from torch import Tensor, nn

from fastsd.nn.convolution import convolve, example_convolution, normalise
from fastsd.nn.gri_attention import ToldKwargs, tell_grid
from fastsd.nn.linear import example_projection, project
from fastsd.nn.plain import why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings
from fastsd.nn.tokens import as_map, as_tokens


def why_stock(transformer: stock.Transformer2DModel) -> str | None:
    """Why ``transformer`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    if not transformer.is_input_continuous:
        return "it takes no map but patches or classes"
    return why_not_plain(transformer, "norm", nn.GroupNorm) or why_stock_everywhere()


class Transformer2DModel(Replacement, stock.Transformer2DModel):  # type: ignore[misc]  # diffusers' bases disagree
    """``y = x + proj_out(blocks(proj_in(norm(x))))``; the blocks are modules of their own, and read tokens.

    Tokens ``[B, H·W, C]`` are a channels-last map seen otherwise, so nothing is copied between the two.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [B, C, H, W]
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if active_settings(self) is not None and self.is_input_continuous:
            cross_attention_kwargs = tell_grid(self.transformer_blocks, hidden_states, cross_attention_kwargs)
            if isinstance(cross_attention_kwargs, ToldKwargs) and torch.jit.is_tracing():
                # the size becomes part of the trace, which must not cut another map into the windows of this one
                hidden_states = hidden_states.expand(-1, -1, *map(int, hidden_states.shape[2:]))
        given: Any = (encoder_hidden_states, timestep, added_cond_kwargs, class_labels, cross_attention_kwargs)
        return stock.Transformer2DModel.forward(self, hidden_states, *given, *args, **kwargs)

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if active_settings(self) is None or why_stock(self) is not None:
            return stock.Transformer2DModel._operate_on_continuous_inputs(self, hidden_states)
        x = hidden_states.contiguous(memory_format=torch.channels_last)
        if self.use_linear_projection:
            tokens = project(self, self, "proj_in", as_tokens(normalise(self, x, self.norm)))
        else:
            tokens = as_tokens(convolve(self, "proj_in", x, norm=self.norm))
        # as stock: the blocks' channels where a convolution projects, the map's where a linear layer does
        return tokens, x.shape[1] if self.use_linear_projection else tokens.shape[2]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if active_settings(self) is None or why_stock(self) is not None:
            given = (hidden_states, residual, batch_size, height, width, inner_dim)
            return stock.Transformer2DModel._get_output_for_continuous_inputs(self, *given)
        size = (batch_size, height, width)
        if self.use_linear_projection:
            tokens = as_tokens(residual)
            y = as_map(project(self, self, "proj_out", hidden_states, residual=tokens), size)
        else:
            y = convolve(self, "proj_out", as_map(hidden_states, size), residual=residual)
        return y.contiguous() if residual.is_contiguous() else y


def example_calls(transformer: stock.Transformer2DModel) -> dict[str, tuple[Any, ...]]:
    """The ops that the module calls in inference, with arguments of its dtype and device."""
    norm: nn.GroupNorm = transformer.norm
    first = next(transformer.parameters())
    x = first.new_empty((1, norm.num_channels, 8, 8))
    parameters = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    if not transformer.use_linear_projection:
        fused = example_convolution(transformer, "proj_in", x, *parameters)
        if fused:
            return fused
    norm_alone = {"group_norm_silu": (x, *parameters, "none", None, None)}
    return norm_alone | (example_projection(transformer, "proj_in") if transformer.use_linear_projection else {})
