"""A map as tokens, and tokens as a map: the same memory where the map is channels last."""

from torch import Tensor


def as_tokens(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H·W, C]``."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_map(tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
    """``[B, H·W, C]`` to ``[B, C, H, W]``, channels last; ``size``: B, H, W."""
    return tokens.reshape(*size, tokens.shape[2]).permute(0, 3, 1, 2)
