"""Multi-expert conditional convolution (CondConv) in one op with what surrounds it in a residual block."""

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
from fastsd_kernels.cond_conv2d.reference import cond_conv2d as definition
from fastsd_kernels.conv2d import ACTIVATIONS, KERNEL_SIZES
from fastsd_kernels.dispatch import Op
from fastsd_kernels.gradient import gradient_of
from fastsd_kernels.layout import empty_map, is_channels_last, output_size

ROUTINGS = ("sigmoid", "softmax")
STRATEGIES = ("mix_first", "mix_in_loop", "concat")
_SCHEMA = """(
    Tensor x, Tensor experts, Tensor? expert_biases=None, Tensor? alpha=None, Tensor? routing_weight=None,
    Tensor? routing_bias=None, str routing="sigmoid", int stride=1, int[4] padding=0, Tensor? skip=None,
    int num_groups=0, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-05, str activation="none",
    Tensor? channel_bias=None, Tensor? residual=None, float output_scale=1.0, str? strategy=None, str? backend=None
) -> Tensor"""


def cond_conv2d(
    x: Tensor,
    experts: Tensor,
    expert_biases: Tensor | None = None,
    alpha: Tensor | None = None,
    *,
    routing_weight: Tensor | None = None,
    routing_bias: Tensor | None = None,
    routing: str = "sigmoid",
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    skip: Tensor | None = None,
    num_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
    strategy: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Convolve each sample with a mixture of its own of several kernels.

    .. math::
        z = \mathrm{cat}(x, \mathrm{skip}), \qquad
        u = \mathrm{act}\Big(\frac{z - \mathrm{mean}_g}{\sqrt{\mathrm{var}_g + \mathrm{eps}}} \, w_n + b_n\Big), \qquad
        \alpha' = \alpha + \mathrm{routing}\big(R \; \mathrm{mean}_{h,w}(u) + r\big)

    .. math::
        y_b = \Big(\big(\textstyle\sum_e \alpha'_{be} W_e\big) * u_b + \textstyle\sum_e \alpha'_{be} \beta_e
              + \mathrm{channel\_bias}_b + \mathrm{residual}_b\Big) \, s

    The mixing weights are given, or computed from the map that is convolved, or both: then they are added up, so that
    a layer can start at any mixture, whatever its routing says. They are not meant to be read back from the device.

    Args:
        x: ``[B, C1, H, W]``, float16, bfloat16, float32 or float64; any strides.
        experts: W, ``[E, K, C, 1, 1]`` or ``[E, K, C, 3, 3]`` with C = C1 + C2, ``x``'s dtype.
        expert_biases: β, ``[E, K]``, any floating-point dtype; ``None`` for 0.
        alpha: ``[B, E]`` or ``[1, E]``, any floating-point dtype; ``None`` for 0, only with ``routing_weight``.
        routing_weight: R, ``[E, C]``, any floating-point dtype; ``None`` for no routing.
        routing_bias: r, ``[E]``, any floating-point dtype; only with ``routing_weight``.
        routing: ``"sigmoid"``, or ``"softmax"`` over the experts.
        stride: 1 or 2.
        padding: zeros on every side, or ``(left, right, top, bottom)``; the mean is of the map without them.
        skip: ``[B, C2, H, W]``, ``x``'s dtype; read behind ``x`` in place of a concatenation.
        num_groups: of the GroupNorm; 0 for no norm. Must divide C.
        norm_weight, norm_bias: ``[C]``, or ``[B, C]`` for scale and shift by sample; any floating-point dtype.
        eps: added to the variance.
        activation: ``"none"`` or ``"silu"``, behind the norm.
        channel_bias: ``[B, K]`` or ``[1, K]``, any floating-point dtype: the time embedding.
        residual: ``[B, K, H', W']``, ``x``'s dtype.
        output_scale: s, multiplies the sum.
        strategy: forces how: ``"mix_first"`` mixes the kernels of each sample, then convolves; ``"mix_in_loop"`` mixes
            them piece by piece where the convolution reads them; ``"concat"`` convolves the map, weighted by each
            expert's weight, with all experts, as one map of E·C channels. ``None`` takes the fastest.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[B, K, H', W']`` in ``x``'s dtype, dense; channels last if ``x``'s channels are innermost, else contiguous.
        Under autocast in its dtype, as :func:`torch.nn.functional.conv2d`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in every tensor argument. Source: Yang, Bender, Le and Ngiam, "CondConv: Conditionally
    Parameterized Convolutions for Efficient Inference", 2019 (global average, linear, sigmoid); ``alpha`` beside the
    routing is this library's.
    """
    return op(
        x,
        experts,
        expert_biases,
        alpha,
        routing_weight,
        routing_bias,
        routing,
        stride,
        padding,
        skip,
        num_groups,
        norm_weight,
        norm_bias,
        eps,
        activation,
        channel_bias,
        residual,
        output_scale,
        strategy,
        backend,
    )


def _check(
    x: Tensor,
    experts: Tensor,
    expert_biases: Tensor | None,
    alpha: Tensor | None,
    routing_weight: Tensor | None,
    routing_bias: Tensor | None,
    routing: str,
    stride: int,
    padding: Sequence[int],
    skip: Tensor | None,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    channel_bias: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    strategy: str | None,
) -> None:
    check_map(x)
    batch, channels = x.shape[0], check_skip(x, skip)
    if experts.dim() != 5 or experts.shape[3] != experts.shape[4] or experts.shape[3] not in KERNEL_SIZES:
        raise ValueError(
            f"experts: expected [experts, out, in, 1, 1] or [experts, out, in, 3, 3]; got shape {tuple(experts.shape)}"
        )
    if experts.shape[2] != channels or experts.numel() == 0:
        raise ValueError(
            f"experts: expected {channels} input channels, and at least one expert, one in and one out; "
            f"got shape {tuple(experts.shape)}"
        )
    count, out_channels, _, kernel, _ = experts.shape
    _check_routing(batch, channels, count, alpha, routing_weight, routing_bias, routing)
    out_size = check_window(x, x.shape[2:], kernel, stride, padding)
    check_norm(batch, channels, num_groups, norm_weight, norm_bias, eps)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("strategy", strategy, (None, *STRATEGIES))
    if expert_biases is not None and expert_biases.shape != (count, out_channels):
        raise ValueError(f"expert_biases: expected shape ({count}, {out_channels}); got {tuple(expert_biases.shape)}")
    check_channel_bias(channel_bias, batch, out_channels)
    check_residual(residual, (batch, out_channels, *out_size))
    check_kind(
        x=x,
        experts=experts,
        expert_biases=expert_biases,
        alpha=alpha,
        routing_weight=routing_weight,
        routing_bias=routing_bias,
        skip=skip,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        channel_bias=channel_bias,
        residual=residual,
    )
    check_dtype(x=x, experts=experts, skip=skip, residual=residual)


def _check_routing(
    batch: int,
    channels: int,
    count: int,
    alpha: Tensor | None,
    routing_weight: Tensor | None,
    routing_bias: Tensor | None,
    routing: str,
) -> None:
    if alpha is None and routing_weight is None:
        raise ValueError("alpha, routing_weight: expected one of them, or both; got neither")
    if alpha is not None and (alpha.dim() != 2 or alpha.shape[0] not in (1, batch) or alpha.shape[1] != count):
        raise ValueError(f"alpha: expected shape ({batch}, {count}) or (1, {count}); got {tuple(alpha.shape)}")
    if routing_weight is not None and routing_weight.shape != (count, channels):
        raise ValueError(f"routing_weight: expected shape ({count}, {channels}); got {tuple(routing_weight.shape)}")
    if routing_bias is not None and routing_weight is None:
        raise ValueError(f"routing_bias: expected None without routing_weight; got shape {tuple(routing_bias.shape)}")
    check_vector("routing_bias", routing_bias, count)
    check_choice("routing", routing, ROUTINGS)


def _fake(x: Tensor, experts: Tensor, *args: Any) -> Tensor:
    stride, padding = args[5], args[6]
    out_size = output_size(x.shape[2:], experts.shape[3], stride, padding)
    return empty_map(x, experts.shape[1], is_channels_last(x), out_size)


def _flops(
    y: Tensor,
    x: Tensor,
    experts: Tensor,
    expert_biases: Tensor | None,
    alpha: Tensor | None,
    routing_weight: Tensor | None,
    *args: Any,
) -> int:
    """Of routing and mixing, where each number of an expert counts once a sample, and of the convolution."""
    mixed = sum(tensor.numel() for tensor in (experts, expert_biases, routing_weight) if tensor is not None)
    return 2 * (x.shape[0] * mixed + y.numel() * experts.shape[2:].numel())


_setup_context, _backward = gradient_of(definition)

op = Op(
    "cond_conv2d",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cpu": None, "cuda": None},
    flops=_flops,
)
