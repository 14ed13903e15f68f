"""Rows 1, 8, 11 and 12 of the compatibility matrix: what is put into or onto a model, before patch and after."""

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

import fastsd
from tests.patching.gri import ip_adapter
from tests.patching.models import assert_as_stock, blocks, build, call, calls_of, op_calls, relative_error

LEAVES = ["to_q", "to_v", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv_in", "proj_out"]


def lora(targets=LEAVES):
    return LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)


def lora_state(seed):
    """The LoRA of another model, as a file holds it."""
    other = build()
    torch.manual_seed(seed)
    other.add_adapter(lora())
    return get_peft_model_state_dict(other)


def add(model):
    torch.manual_seed(3)
    model.add_adapter(lora(), adapter_name="one")


def weigh(model):
    model.set_adapters(["one"], [0.3])


def fuse(model):
    model.fuse_lora()


def unfuse(model):
    model.unfuse_lora()


def disable(model):
    model.disable_adapters()


def delete(model):
    model.delete_adapters("one")


def add_second(model):
    torch.manual_seed(4)
    model.add_adapter(lora(["conv1", "to_k"]), adapter_name="two")
    model.set_adapters(["one", "two"], [1.0, 0.5])


def load(model):
    model.load_lora_adapter(lora_state(5), prefix=None, adapter_name="one")


def hotswap(model):
    model.load_lora_adapter(lora_state(6), prefix=None, adapter_name="one", hotswap=True)


def unload(model):
    model.unload_lora()


HISTORIES = {
    "weigh": (add, weigh),
    "unfuse": (add, fuse, unfuse),
    "disable": (add, disable),
    "delete": (add, delete),
    "two": (add, add_second),
    "hotswap": (load, hotswap),
    "unload": (load, unload),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_row_1_lora(history):
    """Patched at every point of the history, a model goes on as the stock one does."""
    steps = HISTORIES[history]
    stock = build()
    base = call(stock)
    expected = [base]
    for step in steps:
        step(stock)
        expected.append(call(stock))
    assert any(relative_error(result, base) > 1e-3 for result in expected[1:])
    for patch_at in range(len(steps) + 1):
        model = build()
        for at, step in enumerate((*steps, None)):
            if at == patch_at:
                fastsd.patch(model, strict=True)
            if at >= patch_at:
                assert_as_stock(call(model), expected[at])
                assert op_calls(lambda model=model: call(model)) == 16
            if step is not None:
                step(model)
        fastsd.unpatch(model)
        assert torch.equal(call(model), expected[-1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_row_1_norms_trained_by_peft(when):
    """PEFT wraps the norms that it trains: a copy inside the wrapper is what counts."""

    def wrap(model):
        if when == "after" and model is patched:
            fastsd.patch(model)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["norm1", "norm2"]))
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
        if when == "before" and model is patched:
            with pytest.warns(UserWarning, match=r"norm1 is a peft\..*ModulesToSaveWrapper"):
                fastsd.patch(model)
        return model

    stock, patched = build(), build()
    base = call(stock)
    expected = call(wrap(stock))
    assert relative_error(expected, base) > 1e-3
    assert_as_stock(call(wrap(patched)), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_row_8_freeu(when):
    stock, model = build(), build()
    options = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    stock.enable_freeu(**options)
    if when == "before":
        model.enable_freeu(**options)
        fastsd.patch(model)
    else:
        fastsd.patch(model).enable_freeu(**options)
    assert relative_error(call(stock), call(build())) > 1e-3
    assert_as_stock(call(model), call(stock))
    stock.disable_freeu()
    model.disable_freeu()
    assert_as_stock(call(model), call(stock))


def test_row_8_controlnet():
    net = build("controlnet")
    down = net.config.block_out_channels
    residuals = {
        "down_block_additional_residuals": tuple(
            torch.randn(2, channels, side, side)
            for channels, side in ((down[0], 16), (down[0], 16), (down[0], 8), (down[1], 8))
        ),
        "mid_block_additional_residual": torch.randn(2, down[1], 8, 8),
    }
    stock = call(build(), **residuals)
    assert_as_stock(call(fastsd.patch(build()), **residuals), stock)


def test_row_8_t2i_adapter():
    adapter = diffusers.T2IAdapter(channels=(4, 8), num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    adapter.eval().requires_grad_(False)
    features = adapter(torch.randn(2, 3, 128, 128))
    stock, model = build(), fastsd.patch(build())

    def run(model):
        # the U-Net pops what it takes
        return call(model, down_intrablock_additional_residuals=list(features))

    assert_as_stock(run(model), run(stock))
    assert relative_error(run(stock), call(stock)) > 1e-4


@pytest.mark.parametrize("when", ["before", "after"])
def test_row_8_ip_adapter(when):
    torch.manual_seed(7)
    stock, model = build(), build()
    state = ip_adapter(stock)
    inputs = {"added_cond_kwargs": {"image_embeds": torch.randn(2, 6)}}
    if when == "after":
        fastsd.patch(model)
    for each in (stock, model):
        each._load_ip_adapter_weights(state)
    fastsd.patch(model)
    assert_as_stock(call(model, **inputs), call(stock, **inputs))
    for each in (stock, model):
        each.encoder_hid_proj = None
        each.config.encoder_hid_dim_type = None
        each.set_default_attn_processor()
    assert_as_stock(call(model), call(stock))


def test_row_8_gligen():
    boxes = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, 8), "masks": torch.ones(2, 3)}

    def run(model):
        return call(model, cross_attention_kwargs={"gligen": dict(boxes)})

    assert_as_stock(run(fastsd.patch(build("gligen"))), run(build("gligen")))


def test_row_8_attention_masks():
    inputs = {"encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4])}
    assert_as_stock(call(fastsd.patch(build()), **inputs), call(build(), **inputs))


def test_row_11_attention_processors():
    stock, model = build(), fastsd.patch(build())
    for change in (
        lambda model: model.fuse_qkv_projections(),
        lambda model: model.unfuse_qkv_projections(),
        lambda model: model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
        lambda model: model.set_default_attn_processor(),
    ):
        change(stock)
        change(model)
        assert_as_stock(call(model), call(stock))
        assert op_calls(lambda: call(model)) == 16
        assert calls_of("attention", lambda: call(model)) == 8


class _QuantisedConv2d(nn.Conv2d):
    """Eight-bit weights with one scale, as a quantised layer keeps them."""

    @classmethod
    def of(cls, conv):
        quantised = cls(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
        scale = conv.weight.abs().max() / 127
        quantised.weight = nn.Parameter((conv.weight / scale).round().to(torch.int8), requires_grad=False)
        quantised.register_buffer("scale", scale)
        quantised.bias = conv.bias
        return quantised

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.scale, self.bias)


class _QuantisedWeight(nn.Parameter):
    pass


def test_row_12_quantised_convolutions():
    """They are called, so the rest of their block is still fast."""
    stock, model = build(), build()
    for each in (stock, model):
        for block in blocks(each):
            block.conv1 = _QuantisedConv2d.of(block.conv1)
    fastsd.patch(model, strict=True)
    assert_as_stock(call(model), call(stock))
    assert relative_error(call(stock), call(build())) > 1e-4
    assert op_calls(lambda: call(model)) == 16
    assert isinstance(blocks(model)[0].conv1, _QuantisedConv2d)


def test_row_12_quantised_norm():
    model = build()
    norm = model.mid_block.resnets[0].norm2
    norm.weight = _QuantisedWeight(norm.weight)
    with pytest.raises(fastsd.PatchError, match=r"norm2\.weight is a _QuantisedWeight, expected a plain Parameter"):
        fastsd.patch(model, strict=True)
    with pytest.warns(UserWarning, match="_QuantisedWeight"):
        fastsd.patch(model)
    assert op_calls(lambda: call(model)) == 14
    norm.weight = nn.Parameter(norm.weight.data)
    assert op_calls(lambda: call(fastsd.patch(model, strict=True))) == 16
