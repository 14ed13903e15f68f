"""Convolutions of replaced modules: one op where they are plain, the module itself where anything else is asked."""

import collections
import contextlib

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from fastsd.nn import convolution
from fastsd_kernels.conv2d import cpu_costs, measured
from tests.combinations import pairwise
from tests.patching.models import (
    assert_as_stock,
    assert_layout,
    blocks,
    build,
    call,
    fused_convolutions,
    relative_error,
)

FORMATS = [torch.contiguous_format, torch.channels_last]


def holder(kind=ResnetBlock2D, **changes):
    """A module that holds one block, with weights of which none is 0 or 1."""
    torch.manual_seed(0)
    arguments = {"in_channels": 64, "groups": 8, "temb_channels": 6} if kind is ResnetBlock2D else {"channels": 64}
    model = nn.ModuleList([kind(**arguments | changes)]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(block, height=9, width=7, batch=2, channels=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return (x, torch.randn(batch, 6, generator=generator)) if isinstance(block, ResnetBlock2D) else (x,)


ALGORITHMS = ["direct", "product", "winograd2", "winograd4"]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request, monkeypatch):
    """What every convolution that has the choice is computed by."""
    monkeypatch.setattr(
        cpu_costs,
        "cheapest",
        lambda call, but=(): request.param if call.kernel == 3 and call.stride == 1 else "product",
    )
    return request.param


@pairwise(
    "algorithm,name,memory_format",
    ALGORITHMS,
    ["unet", "scale_shift", "resnet_sampling", "output_scale", "vae", "controlnet"],
    FORMATS,
    indirect=["algorithm"],
)
def test_every_algorithm(algorithm, name, memory_format):
    model = build(name).to(memory_format=memory_format)
    stock = [call(model, 2, latent) for latent in (16, 20)]
    fastsd.patch(model, strict=True)
    assert fused_convolutions(lambda: call(model)) > 0
    for latent, expected in zip((16, 20), stock, strict=True):
        assert_as_stock(call(model, 2, latent), expected)


MODULES = [
    (ResnetBlock2D, {"out_channels": 32}, ()),
    (ResnetBlock2D, {"time_embedding_norm": "scale_shift", "output_scale_factor": 1.7}, ()),
    (Downsample2D, {"use_conv": True}, ()),
    (Downsample2D, {"use_conv": True, "padding": 0, "name": "op"}, ()),
    (Downsample2D, {"use_conv": True, "name": "Conv2d_0"}, ()),
    (Upsample2D, {"use_conv": True}, ()),
    (Upsample2D, {"use_conv": True, "out_channels": 24, "name": "Conv2d_0"}, ()),
    (Upsample2D, {"use_conv": True}, ((17, 13),)),
    (Upsample2D, {"use_conv": True}, (torch.Size((18, 14)),)),
    (Upsample2D, {"use_conv": True, "kernel_size": 1, "padding": 0, "bias": False}, ()),
]


@pairwise("algorithm,module,memory_format", ALGORITHMS, MODULES, FORMATS, indirect=["algorithm"])
def test_module(algorithm, module, memory_format):
    kind, options, arguments = module
    model = holder(kind, **options).to(memory_format=memory_format)
    given = (*inputs(model[0]), *arguments)
    given = (given[0].contiguous(memory_format=memory_format), *given[1:])
    stock = model[0](*given)
    fastsd.patch(model, strict=True)
    assert fused_convolutions(lambda: model[0](*given)) == (
        3 if "out_channels" in options and kind is ResnetBlock2D else 2 if kind is ResnetBlock2D else 1
    )
    fast = model[0](*given)
    assert_layout(fast, stock)
    assert_as_stock(fast, stock)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (Upsample2D, {}, "it has no convolution"),
        (Upsample2D, {"use_conv_transpose": True, "use_conv": True}, "its convolution is transposed"),
        (Upsample2D, {"use_conv": True, "interpolate": False}, "it does not enlarge the map"),
        (
            Upsample2D,
            {"use_conv": True, "norm_type": "ln_norm", "eps": 1e-5, "elementwise_affine": True},
            "it has a norm",
        ),
        (Downsample2D, {}, "it has no convolution"),
    ],
    ids=str,
)
def test_what_is_refused(kind, options, reason):
    model = holder(kind, **options)
    with pytest.raises(fastsd.PatchError, match=reason):
        fastsd.patch(model, strict=True)
    assert type(model[0]) is kind


def test_everything_else_goes_through_the_module():
    """Whatever a user puts on a convolution or asks of it is what stock does."""

    def tile(conv):
        conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    def seamless(conv):
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = [1, 1, 1, 1]

    changes = {
        "overridden": tile,
        "padding_mode": seamless,
        "dilation": lambda conv: (setattr(conv, "dilation", (2, 2)), setattr(conv, "padding", (2, 2))),
        "hook": lambda conv: conv.register_forward_hook(lambda module, args, y: 3 * y),
        "instance_forward": lambda conv: setattr(conv, "forward", lambda x: F.conv2d(x, conv.weight, padding=1)),
    }
    for change in changes.values():
        model = holder()
        change(model[0].conv1)
        with torch.no_grad():
            given = inputs(model[0])
            stock = model[0](*given)
            fastsd.patch(model)
            assert fused_convolutions(lambda: model[0](*given)) == 1  # noqa: B023 (called at once)
            assert_as_stock(model[0](*given), stock)


@pytest.mark.gradients
def test_gradients_and_autocast_go_through_the_module():
    model = fastsd.patch(holder())
    given = inputs(model[0])
    with torch.enable_grad():
        assert model[0](*given).requires_grad
        assert fused_convolutions(lambda: model[0](*given), grad=True) == 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("conv1.bias"))
        assert fused_convolutions(lambda: model[0](*given), grad=True) == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused_convolutions(lambda: model[0](*given)) == 0
        fast = model[0](*given)
        assert fast.dtype == fastsd.unpatch(model)[0](*given).dtype


def test_wrong_input_fails_as_stock():
    model = fastsd.patch(holder(Downsample2D, use_conv=True))
    with torch.no_grad(), pytest.raises(RuntimeError, match="64 channels"):
        model[0](torch.randn(1, 32, 8, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="same"):
        model[0](torch.randn(1, 64, 8, 8, dtype=torch.float64))


# each changes what the first convolution computes, but for those that begin with "to_"
CHANGES = {
    "in_place": lambda block: block.conv1.weight.mul_(2),
    "through_data": lambda block: block.conv1.weight.data.mul_(2),
    "one_element_through_data": lambda block: block.conv1.weight.data[7, 32, 0, 1].add_(50),
    "two_channels_swapped_through_data": lambda block: block.conv1.weight.data.copy_(
        block.conv1.weight.data[[1, 0, *range(2, 64)]]
    ),
    "negated_through_data": lambda block: block.conv1.weight.data.neg_(),
    "transposed": lambda block: setattr(block.conv1.weight, "data", block.conv1.weight.data.transpose(0, 1)),
    "with_gaps": lambda block: setattr(block.conv1, "weight", nn.Parameter(torch.randn(64, 128, 3, 3)[:, ::2] / 24)),
    "expanded": lambda block: setattr(
        block.conv1, "weight", nn.Parameter(torch.randn(1, 64, 3, 3).expand(64, -1, -1, -1) / 24)
    ),
    "load_state_dict": lambda block: block.load_state_dict({k: 2 * v for k, v in block.state_dict().items()}),
    "load_state_dict_assign": lambda block: block.load_state_dict(
        {k: 2 * v for k, v in block.state_dict().items()}, assign=True
    ),
    "new_parameter": lambda block: setattr(block.conv1, "weight", nn.Parameter(2 * block.conv1.weight)),
    "new_parameter_at_the_same_address": lambda block: setattr(
        block.conv1, "weight", nn.Parameter(block.conv1.weight.data.mul_(2))
    ),
    "new_data": lambda block: setattr(block.conv1.weight, "data", 2 * block.conv1.weight),
    "new_convolution": lambda block: setattr(block, "conv1", nn.Conv2d(64, 64, 3, padding=1)),
    "to_double_and_back": lambda block: block.double().float(),
    "to_channels_last": lambda block: block.to(memory_format=torch.channels_last),
    "numpy": lambda block: block.conv1.weight.detach().numpy().__imul__(2),
}


@pairwise("algorithm,change,memory_format", ALGORITHMS, list(CHANGES), FORMATS, indirect=["algorithm"])
def test_row_3_weights_change(algorithm, change, memory_format):
    """Weights are read at every call, however they came to be what they are."""
    model = fastsd.patch(holder().to(memory_format=memory_format))
    given = inputs(model[0])
    before = model[0](*given)
    CHANGES[change](model[0])
    assert fused_convolutions(lambda: model[0](*given)) == 2
    fast = model[0](*given)
    stock = fastsd.unpatch(model)[0](*given)
    assert_as_stock(fast, stock)
    assert (relative_error(fast, before) > 0.01) == (not change.startswith("to_"))


def test_row_1_fused_adapter(algorithm):
    model = build()
    fastsd.patch(model)
    before = call(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False), "a")
    model.fuse_lora()
    model.unload_lora()
    assert fused_convolutions(lambda: call(model)) > 0
    fast = call(model)
    assert_as_stock(fast, call(fastsd.unpatch(model)))
    assert relative_error(fast, before) > 1e-3


def test_modules_that_share_a_weight(algorithm):
    """One weight, maps of two sizes, and two strides."""
    large, small = holder(Upsample2D, use_conv=True)[0], holder(Downsample2D, use_conv=True)[0]
    small.conv.weight = large.conv.weight
    model = nn.ModuleList([large, small])
    given = [torch.randn(1, 64, side, side) for side in (16, 9)]
    stock = [module(x) for module, x in zip(model, given, strict=True)]
    fastsd.patch(model, strict=True)
    for _ in range(2):
        for module, x, expected in zip(model, given, stock, strict=True):
            assert_as_stock(module(x), expected)


def test_odd_latents_up_and_down():
    model = build("unet_2d_model")
    stock = call(model, 1, 18)
    assert_as_stock(call(fastsd.patch(model), 1, 18), stock)


@pytest.fixture
def ops_on_a_card(monkeypatch):
    """Counts how often each op runs in a call of a model, patched, on what takes the place of a card.

    Shapes, layouts, dtypes and every decision are real; values are not computed, since the place is the meta device.
    """
    monkeypatch.setattr(convolution, "_DEVICES", ("meta",))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # refuses the meta device

    def count(model, memory_format=torch.channels_last, dtype=torch.float16):
        counts = collections.Counter()

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                counts[function.name().removeprefix("fastsd::")] += function.namespace == "fastsd"
                return function(*args, **kwargs or {})

        fastsd.patch(model).to("meta", dtype).to(memory_format=memory_format)
        channels = 3 if isinstance(model, diffusers.AutoencoderKL) else model.config.in_channels
        x = torch.empty(2, channels, 16, 16, device="meta", dtype=dtype).contiguous(memory_format=memory_format)
        others = torch.empty((), device="meta"), torch.empty(2, 7, 8, device="meta", dtype=dtype)
        with torch.no_grad(), Count():
            model(x, *(() if isinstance(model, diffusers.AutoencoderKL) else others))
        return +counts

    return count


@pytest.mark.parametrize("fastest", ["implicit_gemm", "triton 128x64"])
def test_on_a_card_where_the_op_was_measured_to_be_faster(fastest, ops_on_a_card):
    with measured.forced(fastest):
        counts = ops_on_a_card(build())
    # proj_in and proj_out of four transformers, two samplings
    assert counts == {"resnet_block": 8, "conv2d": 2 * 4 + 2}


@pytest.mark.parametrize("fastest", ["direct", None])
def test_on_a_card_where_it_was_not(fastest, ops_on_a_card):
    with contextlib.nullcontext() if fastest is None else measured.forced(fastest):
        counts = ops_on_a_card(build())
    assert counts == {"group_norm_silu": 2 * 8 + 4}  # of blocks and transformers


def test_on_a_card_each_convolution_is_chosen_for_itself(ops_on_a_card, monkeypatch):
    only = "implicit_gemm"
    monkeypatch.setattr(measured, "fastest", lambda x, weight, *rest: only if weight.shape[:2] == (4, 4) else None)
    counts = ops_on_a_card(build(), torch.contiguous_format)
    model = build()
    whole = [b for b in blocks(model) if b.conv1.weight.shape[:2] == (4, 4) and b.conv_shortcut is None]
    second = [b for b in blocks(model) if b.conv2.weight.shape[:2] == (4, 4)]
    assert counts["resnet_block"] == len(whole) > 0
    assert len(second) > len(whole)  # blocks of which only the second convolution is the op's
    assert counts["conv2d"] >= len(second) - len(whole)


def test_on_a_card_in_a_dtype_that_is_not_measured(ops_on_a_card):
    with measured.forced("implicit_gemm"):
        assert ops_on_a_card(build(), dtype=torch.float32) == {"group_norm_silu": 2 * 8 + 4}


def test_on_a_card_the_vae(ops_on_a_card):
    with measured.forced("implicit_gemm"):
        counts = ops_on_a_card(build("vae"))
    # samplings, and the ends that have a norm
    assert counts == {"resnet_block": 10, "conv2d": 2 + 2}
