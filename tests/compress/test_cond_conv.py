"""CondConv2d: made of convolutions, starts as the first of them, learns to mix."""

import copy

import pytest
import torch
from torch import nn

import fastsd


def convolutions(count=3, **changes):
    torch.manual_seed(0)
    return [nn.Conv2d(**{"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1} | changes)
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("routing", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_starts_as_its_own_convolution(routing, dtype):
    own, *others = (conv.to(dtype) for conv in convolutions())
    layer = fastsd.CondConv2d(own, others, routing)
    x = torch.randn(2, 6, 7, 5, dtype=dtype)
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(layer(x), own(x), rtol=rounding, atol=rounding)
    assert torch.equal(layer.kernels[0], own.weight)
    start = torch.sigmoid(layer.routing.bias) if routing == "sigmoid" else layer.routing.bias.softmax(0)
    assert torch.equal(layer.offset[0] + start, torch.eye(3, dtype=dtype)[0])


@pytest.mark.parametrize(
    "changes",
    [{"stride": 2}, {"kernel_size": 1, "padding": 0}, {"bias": False}, {"padding": (0, 2)}],
    ids=str,
)
def test_of_other_convolutions(changes):
    own, *others = convolutions(**changes)
    layer, x = fastsd.CondConv2d(own, others), torch.randn(1, 6, 8, 9)
    torch.testing.assert_close(layer(x), own(x), rtol=1e-5, atol=1e-5)
    assert (layer.bias is None) == (own.bias is None)


def test_state_dict():
    own, *others = convolutions()
    layer = fastsd.CondConv2d(own, others)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (12, 6, 3, 3),
        "bias": (3, 4),
        "offset": (1, 3),
        "routing.weight": (3, 6),
        "routing.bias": (3,),
    }
    other = fastsd.CondConv2d(*reversed(convolutions(2)[:1]), convolutions(2))
    layer.routing.bias.data.normal_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    own.weight.data.zero_()
    assert torch.equal(other(x), layer(x))  # kernels are copied


def mixing(**changes):
    """A layer whose routing says something."""
    own, *others = convolutions(**changes)
    layer = fastsd.CondConv2d(own, others)
    torch.nn.init.normal_(layer.routing.weight)
    return layer


def test_channels_last():
    layer, x = mixing(), torch.randn(2, 6, 7, 5)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.kernels[1], layer.weight[4:8])


def test_what_is_put_on_the_routing_runs():
    layer, x = mixing(), torch.randn(2, 6, 7, 5)
    layer.routing.register_forward_hook(lambda module, args, y: y + 2)
    other = copy.deepcopy(layer)
    other.routing._forward_hooks.clear()
    other.routing.bias += 2
    torch.testing.assert_close(layer(x), other(x))
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(other), {nn.Linear}, torch.qint8)
    assert (quantised(x) - other(x)).norm() <= 0.02 * other(x).norm()


@pytest.mark.gradients
def test_transforms():
    layer, x = mixing().double(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    loss(parameters).backward()
    gradients = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(layer, (x,), (tangent,))
    step = 1e-6 * tangent
    torch.testing.assert_close(slope, (layer(x + step) - layer(x - step)) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.gradients
def test_what_was_not_trained_is_not():
    own, *others = convolutions()
    layer = fastsd.CondConv2d(own.requires_grad_(False), others)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["routing.weight", "routing.bias"]


@pytest.mark.gradients
def test_every_part_learns_from_the_first_step():
    own, *others = convolutions()
    layer, x = fastsd.CondConv2d(own, others), torch.randn(4, 6, 8, 8)
    target = 0.5 * own(x).detach() + 0.5 * others[0](x).detach()
    optimizer = torch.optim.SGD(layer.routing.parameters(), lr=0.3)
    losses = []
    for _ in range(200):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    assert layer.weight.grad[0].abs().max() > 0


def test_what_it_cannot_be_made_of():
    own, other = convolutions(2)
    for conv, says in (
        (nn.Conv2d(6, 4, 5), "1×1 or 3×3 kernel"),
        (nn.Conv2d(6, 4, 3, groups=2), "one group"),
        (nn.Conv2d(6, 4, 3, dilation=2), "no dilation"),
        (nn.Conv2d(6, 4, 3, padding_mode="circular"), "zeros as padding"),
        (nn.Conv2d(6, 4, 3, padding="same"), "zeros as padding"),
        (nn.Linear(6, 4), "got a Linear"),
    ):
        with pytest.raises(ValueError, match=says):
            fastsd.CondConv2d(conv, [other])
    with pytest.raises(ValueError, match="others: expected convolutions of the shape of"):
        fastsd.CondConv2d(own, [nn.Conv2d(5, 4, 3)])
    with pytest.raises(ValueError, match="others: expected convolutions of the shape of"):
        fastsd.CondConv2d(own, [nn.Conv2d(6, 4, 3, padding=1, bias=False)])
    with pytest.raises(ValueError, match=r"others: expected convolutions in torch.float16 on cpu.*got torch.float32"):
        fastsd.CondConv2d(own.half(), [other])
    with pytest.raises(ValueError, match="routing: expected one of sigmoid, softmax; got 'top1'"):
        fastsd.CondConv2d(own, [other], "top1")
