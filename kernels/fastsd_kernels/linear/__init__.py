"""A linear layer in one op with what surrounds it in a transformer: LayerNorm, activation, residual sum."""

from typing import Any

from torch import Tensor

from fastsd_kernels.checks import check_choice, check_dtype, check_kind, check_residual, check_vector
from fastsd_kernels.dispatch import Op
from fastsd_kernels.gradient import gradient_of
from fastsd_kernels.linear.reference import linear as definition

ACTIVATIONS = ("none", "gelu", "quick_gelu", "geglu")
_SCHEMA = """(
    Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, Tensor? norm_bias=None,
    float? norm_eps=None, str activation="none", Tensor? residual=None, str? backend=None
) -> Tensor"""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Project rows that are normalised on the way in, activated and summed up on the way out.

    .. math::
        u = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \mathrm{eps}}} \, w_n + b_n, \qquad
        z = u W^\top + b, \qquad
        y = \mathrm{act}(z) + \mathrm{residual}

    act(z) is z, gelu(z) = z Φ(z) with the normal distribution's Φ, quick_gelu(z) = z σ(1.702 z), or, of z = (a, g) in
    halves, a · gelu(g).

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64; any strides.
        weight: W, ``[N, K]``, ``x``'s dtype, any strides; for ``"geglu"`` ``[2 N, K]``, a's rows before those of g.
        bias: b, as long as W has rows, any floating-point dtype; ``None`` for 0.
        norm_weight, norm_bias: w_n and b_n, ``[K]``, any floating-point dtype; ``None`` for 1 and 0.
        norm_eps: of the LayerNorm over K; ``None`` for no norm, u = x.
        activation: ``"none"``, ``"gelu"`` (exact, by erf), ``"quick_gelu"`` (by the logistic function) or ``"geglu"``.
        residual: ``[..., N]``, ``x``'s dtype, any strides.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; ``None`` takes the fastest that serves.

    Returns:
        ``[..., N]`` in ``x``'s dtype, contiguous. Under autocast in its dtype, as :func:`torch.nn.functional.linear`;
        the norm then sees x in that dtype too.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; the message names it.
        BackendUnavailable: ``backend`` cannot run here or cannot serve these arguments; the message says why.

    Differentiable, twice, in every tensor argument. Sources: Ba, Kiros and Hinton, "Layer Normalization", 2016;
    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    return op(x, weight, bias, norm_weight, norm_bias, norm_eps, activation, residual, backend)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, [..., in]; got a number")
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != channels or weight.numel() == 0:
        raise ValueError(
            f"weight: expected shape (out, {channels}), at least one in and out; got {tuple(weight.shape)}"
        )
    check_choice("activation", activation, ACTIVATIONS)
    if activation == "geglu" and weight.shape[0] % 2:
        raise ValueError(f"weight: expected as many rows of values as of gates; got {weight.shape[0]} rows")
    if norm_eps is not None and not norm_eps >= 0:
        raise ValueError(f"norm_eps: expected None or a number that is not negative; got {norm_eps}")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and norm_eps is None:
            raise ValueError(f"{name}: expected None without a norm (norm_eps=None); got {tuple(tensor.shape)}")
        check_vector(name, tensor, channels)
    check_vector("bias", bias, weight.shape[0])
    check_residual(residual, (*x.shape[:-1], out_features(weight, activation)))
    check_kind(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    check_dtype(x=x, weight=weight, residual=residual)


def out_features(weight: Tensor, activation: str) -> int:
    """The width N of the result."""
    return weight.shape[0] // (2 if activation == "geglu" else 1)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features(weight, args[4])))


def _flops(y: Tensor, x: Tensor, weight: Tensor, *args: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_setup_context, _backward = gradient_of(definition)

op = Op(
    "linear",
    _SCHEMA,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast={"cpu": None, "cuda": None},
    flops=_flops,
)
