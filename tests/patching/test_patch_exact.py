"""A patched model computes what the stock one computes; an unpatched one is the stock one."""

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsd
from fastsd.models import example_inputs
from tests.flops import flops_of, flops_without_hooks
from tests.patching.models import (
    NAMES,
    TINY,
    assert_as_stock,
    assert_layout,
    block_count,
    blocks,
    build,
    call,
    norm_count,
    op_calls,
    relative_error,
)

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_float32(name, memory_format):
    model = build(name).to(memory_format=memory_format)
    stock = call(model)
    assert fastsd.patch(model, strict=True) is model
    assert len(blocks(model)) == block_count(name)
    assert op_calls(lambda: call(model)) == norm_count(name)
    patched = call(model)
    assert_as_stock(patched, stock)
    assert torch.equal(call(model), patched)
    fastsd.unpatch(model)
    assert op_calls(lambda: call(model)) == 0
    assert torch.equal(call(model), stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["unet", "scale_shift", "resnet_sampling", "unet_2d_model", "controlnet", "vae"])
def test_half_precision(name, memory_format, dtype):
    """The error against float32 is at most 1.5 times that of the stock model at this dtype."""
    model = build(name).to(dtype)
    exact = call(build(name).to(dtype).float(), rounded_to=dtype)
    model.to(memory_format=memory_format)
    stock = call(model)
    patched = call(fastsd.patch(model, strict=True))
    assert relative_error(patched, exact) <= 1.5 * relative_error(stock, exact)
    assert torch.equal(call(fastsd.unpatch(model)), stock)


@pytest.mark.parametrize("name", ["unet", "scale_shift", "resnet_sampling"])
def test_autocast(name):
    model = build(name)
    exact = call(model)
    with torch.autocast("cpu", torch.bfloat16):
        stock = call(model)
        patched = call(fastsd.patch(model, strict=True))
        # scale and shift come between norm and activation: the op of the second norm has no activation
        fused = block_count(name) if name == "scale_shift" else norm_count(name)
        assert op_calls(lambda: call(model)) == fused
    assert relative_error(patched, exact) <= 1.5 * relative_error(stock, exact)


@pytest.mark.parametrize("last", ["UpBlock2D", "CrossAttnUpBlock2D"])
def test_the_result_is_laid_out_as_stocks(last):
    """Maps between replaced modules are channels last; what a U-Net gives is not."""
    model = diffusers.UNet2DConditionModel(**TINY | {"up_block_types": ("CrossAttnUpBlock2D", last)}).eval()
    inputs = example_inputs(model, 2, 16, tokens=7)
    stock = model(**inputs)[0].stride()
    assert fastsd.patch(model)(**inputs)[0].stride() == stock


@pytest.mark.parametrize("name", NAMES)
def test_flops(name):
    model = build(name)
    # torch has no formula for its own attention of the CPU
    with sdpa_kernel(SDPBackend.MATH):
        stock = flops_of(lambda: call(model))
        fastsd.patch(model, strict=True)
        assert flops_of(lambda: call(model)) == stock
        assert flops_without_hooks(lambda: call(model)) == stock


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backend(backend):
    model = build()
    stock = call(model)
    assert_as_stock(call(fastsd.patch(model, backend=backend)), stock)


class TestBlock:
    """One residual block, with arguments that no U-Net gives it but other models may."""

    @staticmethod
    def holder(**changes):
        torch.manual_seed(0)
        block = ResnetBlock2D(**{"in_channels": 8, "groups": 4, "temb_channels": 6} | changes)
        for parameter in block.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return nn.ModuleList([block]).eval()

    @staticmethod
    def both(holder, *args, **kwargs):
        """The stock result and the fast one, or the errors."""
        results = []
        for change in (fastsd.unpatch, fastsd.patch):
            try:
                results.append(change(holder)[0](*args, **kwargs))
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                results.append(error)
        return results

    @pytest.mark.parametrize(
        "changes",
        [
            {"up": True},
            {"down": True},
            {"up": True, "kernel": "fir"},
            {"down": True, "kernel": "fir"},
            {"up": True, "kernel": "sde_vp"},
            {"down": True, "kernel": "sde_vp"},
            {"out_channels": 4, "conv_2d_out_channels": 12, "groups_out": 2},
            {"out_channels": 4, "conv_shortcut_bias": False},
            {"output_scale_factor": 2.0},
            {"use_in_shortcut": True, "eps": 0.1},
            {"time_embedding_norm": "scale_shift", "skip_time_act": True, "up": True},
            {"temb_channels": None},
            {"temb_channels": None, "time_embedding_norm": "other"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("batch", [1, 3, 64])
    def test_options(self, changes, batch):
        holder = self.holder(**changes)
        temb = None if holder[0].time_emb_proj is None else torch.randn(batch, 6)
        stock, fast = self.both(holder, torch.randn(batch, 8, 6, 4), temb)
        assert_layout(fast, stock)
        assert_as_stock(fast, stock)
        assert op_calls(lambda: holder[0](torch.randn(batch, 8, 6, 4), temb)) == 2

    @pytest.mark.parametrize(
        ("x", "temb"),
        [
            ((3, 8, 6, 4), (1, 6)),
            ((1, 8, 6, 4), (3, 6)),
            ((0, 8, 6, 4), (0, 6)),
            ((2, 8, 6, 4), (3, 6)),
            ((2, 8, 6, 4), (2, 7)),
            ((2, 7, 6, 4), (2, 6)),
            ((2, 8, 6, 4), None),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("time_embedding_norm", ["default", "scale_shift"])
    def test_shapes(self, time_embedding_norm, x, temb):
        """Broadcasts as stock, and fails where stock fails."""
        temb = None if temb is None else torch.randn(temb)
        holder = self.holder(time_embedding_norm=time_embedding_norm)
        stock, fast = self.both(holder, torch.randn(x), temb)
        assert isinstance(fast, Exception) == isinstance(stock, Exception)
        if isinstance(stock, torch.Tensor):
            torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("time_embedding_norm", ["default", "other"])
    def test_raw_time_embedding(self, time_embedding_norm):
        """A block without a projection adds what it is given, or leaves it."""
        holder = self.holder(temb_channels=None, time_embedding_norm=time_embedding_norm)
        for shape in ((2, 8, 1, 1), (2, 1, 1, 1), (2, 8, 6, 4)):
            stock, fast = self.both(holder, torch.randn(2, 8, 6, 4), torch.randn(shape))
            assert_as_stock(fast, stock)

    def test_time_embedding_of_another_dtype(self):
        holder = self.holder()
        holder[0].time_emb_proj.double()
        holder[0].norm2.double()
        holder[0].conv2.double()
        stock, fast = self.both(holder, torch.randn(2, 8, 6, 4), torch.randn(2, 6, dtype=torch.float64))
        assert fast.dtype == stock.dtype == torch.float64
        assert_as_stock(fast, stock)

    def test_deprecated_scale(self):
        holder = fastsd.patch(self.holder())
        x, temb = torch.randn(2, 8, 6, 4), torch.randn(2, 6)
        for args, kwargs in (((1.0,), {}), ((), {"scale": 1.0})):
            with pytest.warns(FutureWarning, match="scale"):
                assert op_calls(lambda args=args, kwargs=kwargs: holder[0](x, temb, *args, **kwargs)) == 0

    def test_nan_and_infinity(self):
        holder = self.holder()
        for value in (float("nan"), float("inf")):
            x = torch.randn(2, 8, 6, 4)
            x[0, 3, 2, 1] = value
            stock, fast = self.both(holder, x, torch.randn(2, 6))
            torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5, equal_nan=True)
