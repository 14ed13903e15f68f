"""Convolution in one op with what surrounds it in a residual block: norm and activation, skip, bias, residual sum."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastsd_kernels.checks import (
    check_channel_bias,
    check_choice,
    check_dtype,
    check_kind,
    check_map,
    check_norm,
    check_residual,
    check_skip,
    check_vector,
    check_window,
)
from fastsd_kernels.conv2d import measured
from fastsd_kernels.conv2d.reference import conv2d as definition
from fastsd_kernels.dispatch import Op
from fastsd_kernels.gradient import gradient_of
from fastsd_kernels.layout import empty_map, is_channels_last, output_size

ACTIVATIONS = ("none", "silu")
ALGORITHMS = ("direct", "product", "winograd2", "winograd4", "implicit_gemm")
KERNEL_SIZES = (1, 3)
_SCHEMA = """(
    Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int[4] padding=0, Tensor? skip=None,
    int num_groups=0, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-05, Tensor? mean=None,
    Tensor? rstd=None, str activation="none", SymInt[2]? upsample_size=None, Tensor? channel_bias=None,
    Tensor? residual=None, float output_scale=1.0, str? algorithm=None, str? backend=None
) -> Tensor"""


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    *,
    skip: Tensor | None = None,
    num_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    activation: str = "none",
    upsample_size: Sequence[int] | None = None,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
    algorithm: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Convolve a map that is normalised, activated and enlarged on the way in, and summed up on the way out.

    .. math::
        z = \mathrm{cat}(x, \mathrm{skip}), \qquad
        u = \mathrm{act}\Big(\frac{z - \mathrm{mean}_g}{\sqrt{\mathrm{var}_g + \mathrm{eps}}} \, w_n + b_n\Big), \qquad
        y = \big(W * \mathrm{nearest}(u) + \mathrm{bias} + \mathrm{channel\_bias} + \mathrm{residual}\big) \, s

    Neither the concatenation, nor the normalised map, nor the enlarged one is meant to be materialised; a backend says
    in its documentation where it does. Zero padding is of u, behind norm and activation.

    Args:
        x: ``[B, C1, H, W]``, float16, bfloat16, float32 or float64; any strides.
        weight: ``[K, C, 1, 1]`` or ``[K, C, 3, 3]`` with C = C1 + C2, ``x``'s dtype.
        bias: ``[K]``, any floating-point dtype; ``None`` for 0.
        stride: 1 or 2.
        padding: zeros on every side, or ``(left, right, top, bottom)`` as for :func:`torch.nn.functional.pad`.
        skip: ``[B, C2, H, W]``, ``x``'s dtype; read behind ``x`` in place of a concatenation.
        num_groups: of the GroupNorm; 0 for no norm. Must divide C.
        norm_weight, norm_bias: ``[C]``, or ``[B, C]`` for scale and shift by sample; any floating-point dtype.
        eps: added to the variance.
        mean, rstd: ``[B, num_groups]``, statistics of z that are known already; both or none.
        activation: ``"none"`` or ``"silu"``, behind the norm.
        upsample_size: ``(height, width)`` that u is enlarged to by nearest neighbour.
        channel_bias: ``[B, K]`` or ``[1, K]``, any floating-point dtype: the time embedding.
        residual: ``[B, K, H', W']``, ``x``'s dtype.
        output_scale: s, multiplies the sum.
        algorithm: forces how a backend computes: ``"direct"`` (torch's own convolution between fused passes),
            ``"product"`` (im2col), ``"winograd2"``, ``"winograd4"`` (F(2×2, 3×3), F(4×4, 3×3)) or ``"implicit_gemm"``;
            ``None`` takes the fastest that it has.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[B, K, H', W']`` in ``x``'s dtype, dense; channels last if ``x``'s channels are innermost, else contiguous.
        Under autocast in its dtype, as :func:`torch.nn.functional.conv2d`; the norm then sees x in that dtype too.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in every tensor argument. Sources: Wu and He, "Group Normalization", 2018; Lavin and Gray,
    "Fast Algorithms for Convolutional Neural Networks", 2015 (Winograd F(m×m, 3×3)).
    """
    return op(
        x,
        weight,
        bias,
        stride,
        padding,
        skip,
        num_groups,
        norm_weight,
        norm_bias,
        eps,
        mean,
        rstd,
        activation,
        upsample_size,
        channel_bias,
        residual,
        output_scale,
        algorithm,
        backend,
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    activation: str,
    upsample_size: Sequence[int] | None,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    algorithm: str | None,
) -> None:
    check_map(x)
    batch, channels = x.shape[0], check_skip(x, skip)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] not in KERNEL_SIZES:
        raise ValueError(f"weight: expected [out, in, 1, 1] or [out, in, 3, 3]; got shape {tuple(weight.shape)}")
    if weight.shape[1] != channels or weight.numel() == 0:
        raise ValueError(
            f"weight: expected {channels} input channels, and at least one in and out; got shape {tuple(weight.shape)}"
        )
    if upsample_size is not None and (len(upsample_size) != 2 or min(upsample_size) < 1):
        raise ValueError(f"upsample_size: expected (height, width), both positive; got {tuple(upsample_size)}")
    size = x.shape[2:] if upsample_size is None else upsample_size
    out_size = check_window(x, size, weight.shape[2], stride, padding)
    out_channels = weight.shape[0]
    check_norm(batch, channels, num_groups, norm_weight, norm_bias, eps)
    _check_statistics(batch, num_groups, mean, rstd)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("algorithm", algorithm, (None, *ALGORITHMS))
    check_vector("bias", bias, out_channels)
    check_channel_bias(channel_bias, batch, out_channels)
    check_residual(residual, (batch, out_channels, *out_size))
    check_kind(
        x=x,
        weight=weight,
        bias=bias,
        skip=skip,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        mean=mean,
        rstd=rstd,
        channel_bias=channel_bias,
        residual=residual,
    )
    check_dtype(x=x, weight=weight, skip=skip, residual=residual)


def _check_statistics(batch: int, num_groups: int, mean: Tensor | None, rstd: Tensor | None) -> None:
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor is not None and num_groups == 0:
            raise ValueError(f"{name}: expected None without a norm (num_groups=0); got {tuple(tensor.shape)}")
        if tensor is not None and tensor.shape != (batch, num_groups):
            raise ValueError(f"{name}: expected shape ({batch}, {num_groups}); got {tuple(tensor.shape)}")
    if (mean is None) != (rstd is None):
        raise ValueError("mean, rstd: expected both or none; got one of them")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int], *args: Any) -> Tensor:
    upsample_size = args[8]
    size = x.shape[2:] if upsample_size is None else upsample_size
    out_size = output_size(size, weight.shape[2], stride, padding)
    return empty_map(x, weight.shape[0], is_channels_last(x), out_size)


def _prefer(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int], *args: Any
) -> str | None:
    upsample_size, algorithm = args[8], args[12]
    return measured.backend(None if algorithm else measured.fastest(x, weight, stride, padding, upsample_size))


def _flops(y: Tensor, x: Tensor, weight: Tensor, *args: Any) -> int:
    return 2 * y.numel() * weight.shape[1:].numel()


_setup_context, _backward = gradient_of(definition)

op = Op(
    "conv2d",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cpu": None, "cuda": None},
    prefer=_prefer,
    flops=_flops,
)
