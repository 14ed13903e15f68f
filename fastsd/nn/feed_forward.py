"""diffusers' FeedForward, its projections as 1×1 convolutions where these are faster than torch's products."""

from typing import Any

from diffusers.models import attention as stock
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from fastsd.nn.linear import example_projection, is_fused, project
from fastsd.nn.plain import is_idle, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings


def why_stock(module: stock.FeedForward) -> str | None:
    """Why ``module`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    return why_stock_everywhere()


class FeedForward(Replacement, stock.FeedForward):
    """``y = W2 (a · gelu(g)) + b2`` with ``(a, g) = W1 x + b1``, or another activation, which is called."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [B, N, C] to [B, N, C']
        if args or kwargs or active_settings(self) is None or why_stock(self) is not None:
            return stock.FeedForward.forward(self, hidden_states, *args, **kwargs)
        x = hidden_states
        parts: Any = self.net
        for index, module in enumerate(parts):
            if isinstance(module, nn.Linear):
                x = project(self, self.net, str(index), x)
            elif why_not_plain(self.net, str(index), GEGLU) is None and is_fused(module, "proj", x):
                x, gate = project(self, module, "proj", x).chunk(2, dim=-1)
                x = x * module.gelu(gate)
            elif not (isinstance(module, nn.Dropout) and is_idle(self.net, str(index))):
                x = module(x)
        return x


def example_calls(module: stock.FeedForward) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device."""
    calls: dict[str, tuple[Any, ...]] = {}
    for index, part in enumerate(module.net):
        holder, name = (part, "proj") if isinstance(part, GEGLU) else (module.net, str(index))
        calls |= example_projection(holder, name)
    return calls
