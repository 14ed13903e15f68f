"""A convolution that mixes its kernel for each sample: CondConv, on cond_conv2d."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.nn.plain import is_transformed
from fastsd_kernels import cond_conv2d
from fastsd_kernels.cond_conv2d import ROUTINGS, definition


class CondConv2d(nn.Module):
    r"""Multi-expert conditional convolution: each sample is convolved with a mixture of its own of several kernels.

    .. math::
        \alpha_b = \mathrm{offset} + \mathrm{routing}\big(R \; \mathrm{mean}_{h,w}(x_b) + r\big), \qquad
        y_b = \big(\textstyle\sum_e \alpha_{be} W_e\big) * x_b + \textstyle\sum_e \alpha_{be} \beta_e

    R and r start at 0, and the offset is what makes the mixture the first expert alone then: so the layer starts as
    the convolution that it is made of, and its routing has a gradient from the first step on.

    ``state_dict``: ``weight [E·K, C, k, k]``, one expert behind the other, so that ``torch.channels_last`` means for it
    what it means for a convolution; ``bias [E, K]`` if any, ``routing.weight [E, C]``, ``routing.bias [E]``,
    ``offset [1, E]``. What is trained is what was trained of the first convolution, and the routing.

    Args:
        conv: the convolution that it is made of: the first expert, and stride and padding.
        others: convolutions of the same shape: the further experts. All kernels are copied.
        routing: ``"sigmoid"`` or ``"softmax"``.

    Raises:
        ValueError: a convolution that cond_conv2d does not know (it takes 1×1 and 3×3 kernels, a stride of 1 or 2 and
            zeros as padding), or two that differ in shape, dtype or device.

    Source: Yang, Bender, Le and Ngiam, "CondConv", 2019, with sigmoid; the offset is this library's.
    """

    def __init__(self, conv: nn.Conv2d, others: Sequence[nn.Conv2d], routing: str = "sigmoid") -> None:
        super().__init__()
        if routing not in ROUTINGS:
            raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}; got {routing!r}")
        _check(conv, others)
        every = [conv, *others]
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding: tuple[int, int] = conv.padding  # type: ignore[assignment]  # no name: _check says so
        self.routing_function, self.experts = routing, len(every)
        self.weight = _joined([c.weight for c in every])
        self.bias = None
        if conv.bias is not None:
            self.bias = _joined([c.bias[None] for c in every])  # type: ignore[index]
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.routing = nn.utils.skip_init(nn.Linear, conv.in_channels, len(every), **like)
        nn.init.zeros_(self.routing.weight)
        nn.init.zeros_(self.routing.bias)
        logits = torch.zeros(1, len(every), **like)
        start = logits.sigmoid() if routing == "sigmoid" else logits.softmax(dim=1)
        offset = torch.zeros(1, len(every), **like)
        offset[:, 0] = 1
        self.register_buffer("offset", offset - start)
        self.offset: Tensor

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, K, H', W']
        vertical, horizontal = self.padding
        padding = [horizontal, horizontal, vertical, vertical]
        # called, not read through: whatever is put on a linear layer works on this one
        logits = self.routing(x.mean(dim=(2, 3)))
        alpha = self.offset + (logits.sigmoid() if self.routing_function == "sigmoid" else logits.softmax(dim=1))
        if is_transformed():
            return definition(
                x, self.kernels, self.bias, alpha, None, None, self.routing_function, self.stride[0], padding,
                None, 0, None, None, 0.0, "none", None, None, 1.0, None,
            )  # fmt: skip
        return cond_conv2d(x, self.kernels, self.bias, alpha, stride=self.stride[0], padding=padding)

    @property
    def kernels(self) -> Tensor:
        """``[E, K, C, k, k]``, a view of the weight."""
        return self.weight.unflatten(0, (self.experts, self.out_channels))

    def mixture(self) -> dict[str, Any]:
        """The op's arguments behind ``x`` and before the stride, in its order, for who lets it do the routing too."""
        return {
            "experts": self.kernels,
            "expert_biases": self.bias,
            "alpha": self.offset,
            "routing_weight": self.routing.weight,
            "routing_bias": self.routing.bias,
            "routing": self.routing_function,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, experts={self.experts}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, routing={self.routing_function!r}"
        )


def _check(conv: nn.Conv2d, others: Sequence[nn.Conv2d]) -> None:
    for each in (conv, *others):
        if type(each) is not nn.Conv2d:
            raise ValueError(f"expected plain convolutions (torch.nn.Conv2d); got a {type(each).__qualname__}")
    if (
        conv.kernel_size not in ((1, 1), (3, 3))
        or conv.stride not in ((1, 1), (2, 2))
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
    ):
        raise ValueError(
            "conv: expected a 1×1 or 3×3 kernel, a stride of 1 or 2, no dilation, one group and zeros as padding; "
            f"got {conv}"
        )
    for other in others:
        if other.weight.shape != conv.weight.shape or (other.bias is None) != (conv.bias is None):
            raise ValueError(f"others: expected convolutions of the shape of {conv}; got {other}")
        kinds = [f"{c.weight.dtype} on {c.weight.device}" for c in (conv, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"others: expected convolutions in {kinds[0]}, as the first; got {kinds[1]}")


def _joined(parts: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), parts[0].requires_grad)
