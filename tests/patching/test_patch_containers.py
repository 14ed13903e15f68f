"""Modules that are replaced around others with rules of their own: up-blocks, transformers, halves of a VAE."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from tests.patching.models import TINY, assert_as_stock, build, call

FORMATS = [torch.contiguous_format, torch.channels_last]


class Calls(TorchDispatchMode):
    """Counts the ops that run, by name, and the concatenations of maps."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.joined_maps = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.name()] += 1
        self.joined_maps += function is torch.ops.aten.cat.default and args[0][0].dim() == 4
        return function(*args, **(kwargs or {}))


def calls(function):
    with torch.no_grad(), Calls() as counter:
        function()
    return counter


def transformer(**changes):
    """A transformer of a U-Net, alone in a list, with weights of which none is 0 or 1."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "norm_num_groups": 4}
    model = nn.ModuleList([Transformer2DModel(**options | {"cross_attention_dim": 6} | changes)]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model, memory_format=torch.contiguous_format, **changes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 5, 7, generator=generator).contiguous(memory_format=memory_format)
    given = {"encoder_hidden_states": torch.randn(2, 3, 6, generator=generator), "return_dict": False}
    return model[0](x, **given | changes)[0]


class TestUpBlocks:
    def test_the_skip_connection_is_not_concatenated(self):
        model = build()
        stock = calls(lambda: call(model)).joined_maps
        counter = calls(lambda: call(fastsd.patch(model)))
        # two up-blocks of two residual blocks each
        assert stock - counter.joined_maps == 4
        assert counter.names["fastsd::resnet_block"] == 8

    def test_freeu_edits_what_is_concatenated(self):
        model = fastsd.patch(build())
        before = calls(lambda: call(model)).joined_maps
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert calls(lambda: call(model)).joined_maps == before + 4
        model.disable_freeu()
        assert calls(lambda: call(model)).joined_maps == before

    def test_a_hook_on_a_residual_block_sees_all_channels(self):
        model, seen = fastsd.patch(build()), []
        resnet = model.up_blocks[0].resnets[0]
        resnet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        assert_as_stock(call(model), call(build()))
        assert seen == [resnet.in_channels]

    def test_only_some_of_the_blocks(self):
        """Each rule works without the others."""
        stock = call(build())
        for rules in (["up_block", "cross_attention_up_block"], ["resnet_block"], ["transformer"]):
            assert_as_stock(call(fastsd.patch(build(), rules=rules, strict=True)), stock)

    def test_a_raised_scale_is_said_as_stock(self, caplog):
        given = {"cross_attention_kwargs": {"scale": 0.5}}
        assert_as_stock(call(fastsd.patch(build()), **given), call(build(), **given))


class TestTransformer:
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
    @pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
    def test_as_stock(self, linear, masked, memory_format):
        model = transformer(use_linear_projection=linear)
        mask = {"encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])} if masked else {}
        stock = run(model, memory_format, **mask)
        fast = run(fastsd.patch(model, strict=True), memory_format, **mask)
        assert fast.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)
        assert torch.equal(run(fastsd.unpatch(model), memory_format, **mask), stock)

    def test_one_op_on_either_side(self):
        model = fastsd.patch(transformer())
        names = calls(lambda: run(model)).names
        assert (names["fastsd::conv2d"], names["fastsd::group_norm_silu"]) == (2, 0)
        names = calls(lambda: run(fastsd.patch(transformer(use_linear_projection=True)))).names
        assert (names["fastsd::conv2d"], names["fastsd::group_norm_silu"]) == (0, 1)

    def test_other_inputs_than_maps_are_refused(self):
        model = nn.ModuleList([Transformer2DModel(num_vector_embeds=5, sample_size=4, attention_head_dim=4)])
        with pytest.raises(fastsd.PatchError, match="it takes no map but patches or classes"):
            fastsd.patch(model, strict=True)


class TestAutoencoder:
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_layout_is_that_of_stock(self, memory_format):
        model = build("vae").to(memory_format=memory_format)
        latent = torch.randn(1, 4, 6, 5).contiguous(memory_format=memory_format)
        stock = model.decode(latent).sample
        fast = fastsd.patch(model, strict=True).decode(latent).sample
        assert fast.stride() == stock.stride()
        assert_as_stock(fast.double(), stock.double())

    def test_maps_are_converted_once(self):
        model, layouts = fastsd.patch(build("vae")), []
        for block in model.decoder.up_blocks:
            block.register_forward_pre_hook(
                lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
        model.decode(torch.randn(1, 4, 6, 5))
        assert layouts == [True, True]

    def test_tiles_and_slices(self):
        outputs = []
        for model in (build("vae"), fastsd.patch(build("vae"), strict=True)):
            model.enable_tiling()
            model.enable_slicing()
            model.tile_latent_min_size, model.tile_sample_min_size = 8, 16
            outputs.append(model.decode(torch.randn(2, 4, 12, 9, generator=torch.Generator().manual_seed(0))).sample)
        assert_as_stock(outputs[1].double(), outputs[0].double())

    @pytest.mark.gradients
    def test_gradient_checkpointing(self):
        gradients = []
        for prepare in (lambda model: model, fastsd.patch):
            model = prepare(build("vae")).train()
            model.enable_gradient_checkpointing()
            model(
                torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            ).sample.square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)

    @pytest.mark.gradients
    def test_checkpointing_of_a_partly_trained_model(self):
        counts = []
        for prepare in (lambda model: model, fastsd.patch):
            model = prepare(build("vae")).train().requires_grad_(False)
            model.enable_gradient_checkpointing()
            model.decoder.mid_block.requires_grad_(True)
            calls = []
            checkpoint = model.decoder._gradient_checkpointing_func
            model.decoder._gradient_checkpointing_func = lambda f, *a, to=calls, c=checkpoint: (to.append(f), c(f, *a))[
                1
            ]
            model.decode(torch.randn(1, 4, 6, 5)).sample.sum().backward()
            counts.append(len(calls))
        assert counts == [3, 3]


def test_deep_u_net_with_several_up_blocks_of_either_kind():
    config = TINY | {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "use_linear_projection": True,
    }
    outputs = []
    for prepare in (lambda model: model, lambda model: fastsd.patch(model, strict=True)):
        torch.manual_seed(0)
        outputs.append(call(prepare(UNet2DConditionModel(**config).eval())))
    assert_as_stock(outputs[1], outputs[0])
