"""Rows ``[..., K]``: where they lie."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x [..., K]`` as ``[rows, K]``, the elements of a row side by side; copied only where no strides say that."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    # reshape copies where the leading dimensions have no common stride
    return x.reshape(-1, x.shape[-1])
