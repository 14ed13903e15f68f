"""diffusers' FeedForward, its projections in one op each with what surrounds them."""

from typing import Any

from diffusers.models import attention as stock
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from fastsd.nn.linear import example_projection, fused, is_fused, project
from fastsd.nn.plain import is_idle, remember, why_not_plain, why_stock_everywhere
from fastsd.nn.replacement import Replacement, active_settings

remember(GEGLU)
_GELU = GEGLU.gelu


def why_stock(module: stock.FeedForward) -> str | None:
    """Why ``module`` has to run the stock forward, as a sentence; ``None`` where the fast one gives the same."""
    return why_stock_everywhere()


class FeedForward(Replacement, stock.FeedForward):
    """``y = W2 (a · gelu(g)) + b2`` with ``(a, g) = W1 x + b1``, or another activation, which is called."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [B, N, C] to [B, N, C']
        if args or kwargs or not is_fast(self):
            return stock.FeedForward.forward(self, hidden_states, *args, **kwargs)
        return feed(self, hidden_states)


remember(FeedForward)


def is_fast(module: stock.FeedForward) -> bool:
    """Whether a replaced ``module`` is to run by the ops."""
    return active_settings(module) is not None and why_stock(module) is None


def feed(
    module: stock.FeedForward,
    x: Tensor,  # [B, N, C]
    norm: nn.LayerNorm | None = None,  # of x
    residual: Tensor | None = None,  # [B, N, C']
) -> Tensor:  # [B, N, C']
    """The layer between norm and sum; where :func:`is_fast`."""
    parts: Any = module.net
    live = [i for i, part in enumerate(parts) if not (isinstance(part, nn.Dropout) and is_idle(parts, str(i)))]
    for i in live:
        part = parts[i]
        if isinstance(part, nn.Linear):
            x = project(module, parts, str(i), x, norm=norm, residual=residual if i == live[-1] else None)
        elif _is_plain_geglu(parts, i) and is_fused(module, part, "proj", x, norm):
            x = fused(module, part.proj, x, norm, activation="geglu")
        else:
            x = part(x if norm is None else norm(x))
        norm = None
    is_added = bool(live) and isinstance(parts[live[-1]], nn.Linear)
    return x if residual is None or is_added else x + residual


def _is_plain_geglu(parts: nn.ModuleList, i: int) -> bool:
    return why_not_plain(parts, str(i), GEGLU) is None and GEGLU.gelu is _GELU and "gelu" not in parts[i].__dict__


def example_calls(module: stock.FeedForward) -> dict[str, tuple[Any, ...]]:
    """The op that the module calls in inference, with arguments of its dtype and device."""
    calls: dict[str, tuple[Any, ...]] = {}
    for name, part in module.net.named_children():
        if isinstance(part, GEGLU):
            calls |= example_projection(part, "proj", "geglu")
        else:
            calls |= example_projection(module.net, name)
    return calls
