"""Convolutions of small maps as one matrix product: the same values, and only where nothing else is asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsd.nn import convolution

FORMATS = [torch.contiguous_format, torch.channels_last]


def block(channels=128, out_channels=64, **options):
    owner = nn.Module()
    owner.conv = nn.Conv2d(channels, out_channels, 3, padding=1, **options)
    return owner


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 24, 8, 8), (3, 24, 5, 7), (2, 24, 1, 1)], ids=str)
def test_product_is_the_convolution(shape, memory_format, weight_format, bias):
    x = torch.randn(shape).to(memory_format=memory_format)
    weight = torch.randn(40, 24, 3, 3).to(memory_format=weight_format)
    added = torch.randn(40) if bias else None
    exact = F.conv2d(x.double(), weight.double(), None if added is None else added.double(), padding=1)
    y = convolution.as_product(x, weight, added)
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=memory_format)
    assert (y - exact).norm() <= 3e-6 * exact.norm()


@pytest.fixture
def products(monkeypatch):
    """How often a product took the place of a convolution; one of 73 positions is too large."""
    calls = []
    real = convolution.as_product
    monkeypatch.setattr(convolution, "WEIGHTS_PER_POSITION", 1000)
    monkeypatch.setattr(convolution, "as_product", lambda *args: calls.append(args) or real(*args))
    return calls


def test_small_maps_are_products(products):
    owner, x = block(), torch.randn(1, 128, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(convolution.convolve(owner, "conv", x), owner.conv(x), rtol=1e-4, atol=1e-5)
        assert len(products) == 1
        convolution.convolve(owner, "conv", torch.randn(1, 128, 9, 9))
        assert len(products) == 1


def test_everything_else_goes_through_the_module(products):
    x = torch.randn(1, 128, 4, 4)
    convolution.convolve(block(), "conv", x)  # a gradient may be wanted
    with torch.no_grad():
        for options in ({"stride": 2}, {"groups": 2}, {"padding_mode": "circular"}, {"dilation": 2}):
            convolution.convolve(block(**options), "conv", x)
        convolution.convolve(block().double(), "conv", x.double())
        with torch.autocast("cpu", torch.bfloat16):
            convolution.convolve(block(), "conv", x)
        tiled = block()
        tiled.conv._conv_forward = lambda x, weight, bias: F.conv2d(
            F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
        )
        torch.testing.assert_close(convolution.convolve(tiled, "conv", x), tiled.conv(x), rtol=0, atol=0)
        convolution.convolve(block(), "conv", torch.randn(8, 128, 4, 4))  # a batch of more positions
        mkldnn = torch.backends.mkldnn
        for setting in (mkldnn.matmul, mkldnn.conv):
            before, setting.fp32_precision = setting.fp32_precision, "bf16"
            try:
                convolution.convolve(block(), "conv", x)
            finally:
                setting.fp32_precision = before
        hooked, seen = block(), []
        hooked.conv.register_forward_hook(lambda *_: seen.append(True))
        convolution.convolve(hooked, "conv", x)
        assert convolution.convolve(block(), "conv", x[:0]).shape == (0, 64, 4, 4)
        with pytest.raises(RuntimeError, match="128 channels"):
            convolution.convolve(block(), "conv", torch.randn(1, 64, 4, 4))
    assert products == []
    assert seen


def test_weights_are_read_live(products):
    owner, x = block(), torch.randn(1, 128, 4, 4)
    with torch.no_grad():
        convolution.convolve(owner, "conv", x)
        owner.conv.weight.mul_(2)
        torch.testing.assert_close(convolution.convolve(owner, "conv", x), owner.conv(x), rtol=1e-4, atol=1e-5)
    assert len(products) == 2
