"""compress(): what becomes of structure, weights and results."""

import copy
import pickle

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig

import fastsd
from fastsd import models
from fastsd.compress import RECIPES, recipe
from fastsd.compress.model import build as build_structure
from fastsd.nn.skip import SkippedResnet, SkippedTransformer
from tests.combinations import long
from tests.compress.models import (
    PLANS,
    SD_RECIPES,
    SMALL_SD,
    XL_RECIPES,
    build,
    call,
    config_of,
    for_recipe,
    shared,
)

# parameters, computed from the published configurations
PARAMETERS = {
    ("sd15", "bk-sdm-base"): 579_384_964,
    ("sd15", "bk-sdm-small"): 482_346_884,
    ("sd15", "bk-sdm-tiny"): 323_384_964,
    ("sd21", "bk-sdm-base"): 583_480_964,
    ("sd21", "bk-sdm-small"): 485_787_524,
    ("sd21", "bk-sdm-tiny"): 326_825_604,
    ("sdxl", "ssd-1b"): 1_331_334_404,
    ("sdxl", "vega"): 745_225_604,
}
# of each recipe, one of SD1.x or of SD2.x is enough for `make test`
VARIANTS = {("sd21", "bk-sdm-base"), ("sd15", "bk-sdm-small"), ("sd21", "bk-sdm-tiny")}
# the published models, as configurations of their own
PUBLISHED = {
    ("sd15", "bk-sdm-base"): "bk-base",
    ("sd15", "bk-sdm-small"): "bk-small",
    ("sd15", "bk-sdm-tiny"): "bk-tiny",
    ("sd21", "bk-sdm-base"): "bk-v2-base",
    ("sd21", "bk-sdm-small"): "bk-v2-small",
    ("sd21", "bk-sdm-tiny"): "bk-v2-tiny",
    ("sdxl", "ssd-1b"): "ssd1b",
    ("sdxl", "vega"): "vega",
}


@pytest.mark.parametrize(
    ("base", "name"),
    [
        pytest.param(base, name, id=f"{base}-{name}", marks=pytest.mark.long if (base, name) in VARIANTS else ())
        for base, name in PARAMETERS
    ],
)
def test_recipes_are_the_published_models(base, name):
    config = config_of(models.load(base, device="meta"))
    small, structure = build_structure(config, recipe(name, config))
    assert sum(p.numel() for p in small.parameters()) == PARAMETERS[base, name]
    assert type(small) is diffusers.UNet2DConditionModel
    published = models.load(PUBLISHED[base, name], device="meta")
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    assert shapes == {key: value.shape for key, value in published.state_dict().items()}
    assert structure.is_stock


def test_every_recipe_is_tried():
    assert {name for _, name in PARAMETERS} | {"a-sdm"} == set(RECIPES) == {*SD_RECIPES, *XL_RECIPES}


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_published_inheritance(name):
    """Which layer of the given model each of the new one is: in the words of BK-SDM's code."""
    given, state = shared().state_dict(), fastsd.compress(shared(), name).state_dict()

    def source(key):
        for blocks in ("resnets", "attentions"):
            if name != "bk-sdm-tiny":
                for level in range(4):
                    key = key.replace(f"up_blocks.{level}.{blocks}.1.", f"up_blocks.{level}.{blocks}.!2.")
            else:
                for level in (2, 1, 0):
                    key = key.replace(f"up_blocks.{level}.{blocks}.0.", f"up_blocks.{level + 1}.{blocks}.!0.")
                    key = key.replace(f"up_blocks.{level}.{blocks}.1.", f"up_blocks.{level + 1}.{blocks}.!2.")
        if name == "bk-sdm-tiny":
            for level in (1, 0):
                key = key.replace(f"up_blocks.{level}.upsamplers", f"up_blocks.{level + 1}.upsamplers!")
        return key.replace("!", "")

    assert state
    for key, value in state.items():
        assert torch.equal(value, given[source(key)]), key


def plain_function(unet, dropped=()):
    """The given model with layers that do nothing but pass on, taken from its own lists: the oracle of a removal."""
    unet = copy.deepcopy(unet)
    for blocks, index, layer in dropped:
        block = getattr(unet, blocks)[index]
        del block.resnets[layer]
        if hasattr(block, "attentions"):
            del block.attentions[layer]
    return unet


def test_removal_against_lists_that_are_cut_by_hand():
    unet = shared()
    by_hand = plain_function(unet, [("down_blocks", 0, 1), ("up_blocks", 3, 1)])
    plan = fastsd.Plan(
        ("down_blocks.0.resnets.1", "down_blocks.0.attentions.1", "up_blocks.3.resnets.1", "up_blocks.3.attentions.1")
    )
    small = fastsd.compress(unet, plan)
    assert type(small) is diffusers.UNet2DConditionModel
    assert small.config.layers_per_block == [1, 2, 2, 2]
    assert torch.equal(call(small), call(by_hand))


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "a-sdm", *long("bk-sdm-base", "bk-sdm-small", "ssd-1b", "vega")])
@pytest.mark.gradients
def test_the_given_model_is_left_as_it_is(name):
    unet = for_recipe(name).requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    before = {key: (value.clone(), value.requires_grad) for key, value in unet.state_dict(keep_vars=True).items()}
    result = call(unet)
    small = fastsd.compress(unet, name)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    after = unet.state_dict(keep_vars=True)
    assert all(torch.equal(after[key], value) and after[key].requires_grad == g for key, (value, g) in before.items())
    assert torch.equal(call(unet), result)
    assert small.conv_in.weight.requires_grad
    assert not small.conv_out.weight.requires_grad


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "a-sdm"])
def test_in_place(name):
    unet = build()
    expected = call(fastsd.compress(unet, name))
    conv_in, seen = unet.conv_in.weight, []
    unet.register_forward_hook(lambda *args: seen.append(1))
    small = fastsd.compress(unet, name, in_place=True)
    assert small is unet
    assert unet.conv_in.weight is conv_in
    assert torch.equal(call(unet), expected)
    assert seen == [1]
    assert torch.equal(call(copy.deepcopy(unet)), expected)


def test_a_sdm_starts_as_plain_pruning():
    unet = build()
    plan = recipe("a-sdm", config_of(unet))
    for dtype, rounding in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        small, plain = (fastsd.compress(unet.to(dtype), p) for p in (plan, fastsd.Plan(plan.removed)))
        assert sum(isinstance(module, fastsd.CondConv2d) for module in small.modules()) == 5
        assert (call(small) - call(plain)).norm() / call(plain).norm() <= rounding
        small.up_blocks[3].resnets[1].conv1.routing.bias[1] = 1.0
        assert (call(small) - call(plain)).norm() / call(plain).norm() > 1e-4


def test_experts_are_those_of_the_pruned_layers():
    unet = shared()
    small = fastsd.compress(unet, "a-sdm")
    up, down = unet.up_blocks[3].resnets, unet.down_blocks[0].resnets
    for layer, own, other in (
        (small.up_blocks[3].resnets[0].conv2, up[0].conv2, up[1].conv2),
        (small.up_blocks[3].resnets[1].conv1, up[2].conv1, up[1].conv1),
        (small.up_blocks[3].resnets[1].conv2, up[2].conv2, up[1].conv2),
        (small.down_blocks[0].resnets[0].conv1, down[0].conv1, down[1].conv1),
    ):
        assert torch.equal(layer.weight, torch.cat([own.weight, other.weight]))
        assert torch.equal(layer.bias, torch.stack([own.bias, other.bias]))
    assert type(small.up_blocks[3].resnets[0].conv1) is torch.nn.Conv2d  # three inputs of different width


def test_bypassed_blocks_keep_their_shortcut_and_their_skip_connection():
    unet = shared()
    small = fastsd.compress(unet, PLANS["bypassed"])

    class Shortcut(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, temb):
            return x if self.block.conv_shortcut is None else self.block.conv_shortcut(x)

    by_hand = copy.deepcopy(unet)
    for blocks, index, layer in (("down_blocks", 0, 1), ("down_blocks", 1, 0), ("up_blocks", 3, 2)):
        resnets = getattr(by_hand, blocks)[index].resnets
        resnets[layer] = Shortcut(resnets[layer])
    assert torch.equal(call(small), call(by_hand))
    assert isinstance(small.down_blocks[0].resnets[1], SkippedResnet)
    assert not list(small.down_blocks[0].resnets[1].parameters())
    assert len(list(small.up_blocks[3].resnets[2].parameters())) == 2


def test_transformers_alone():
    unet = shared()
    small = fastsd.compress(unet, PLANS["transformer"])
    assert isinstance(small.down_blocks[1].attentions[0], SkippedTransformer)
    assert type(small.down_blocks[1].resnets[0]) is ResnetBlock2D
    by_hand = copy.deepcopy(unet)
    for transformer in (by_hand.down_blocks[1].attentions[0], by_hand.mid_block.attentions[0]):
        transformer.forward = lambda x, *args, **kwargs: (x,)
    assert torch.equal(call(small), call(by_hand))


def test_all_transformers_of_a_block_are_another_type_of_block():
    small = fastsd.compress(shared(), PLANS["all_transformers_of_a_block"])
    assert type(small) is diffusers.UNet2DConditionModel
    assert small.config.down_block_types[1] == "DownBlock2D"
    assert small.config.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


def test_copies_of_a_compressed_model():
    small = fastsd.compress(shared(), "a-sdm")
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(call(other), call(small))
        assert other.compression == small.compression
    with pytest.raises(fastsd.PlanError, match="cannot be built from its configuration"):
        type(small).from_config(small.config)


@pytest.mark.gradients
def test_what_is_no_weight_is_carried_over():
    unet = build().double().train()
    unet.enable_gradient_checkpointing()
    processors = unet.attn_processors
    mark = AttnProcessor()
    processors["up_blocks.1.attentions.2.transformer_blocks.0.attn1.processor"] = mark
    unet.set_attn_processor(processors)
    small = fastsd.compress(unet, "bk-sdm-base")
    assert small.training
    assert small.is_gradient_checkpointing
    assert small.dtype == torch.float64
    assert type(small.attn_processors["up_blocks.1.attentions.1.transformer_blocks.0.attn1.processor"]) is AttnProcessor


def test_processors_stay_shared():
    for in_place in (False, True):
        unet = build()
        shared = AttnProcessor()
        shared.store = []
        unet.set_attn_processor(shared)
        small = fastsd.compress(unet, "bk-sdm-base", in_place=in_place)
        found = set(map(id, small.attn_processors.values()))
        assert len(found) == 1
        assert (found == {id(shared)}) == in_place


@pytest.mark.gradients
def test_what_was_frozen_stays_frozen():
    small = fastsd.compress(build().requires_grad_(False), "a-sdm")
    trained = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".routing." in name for name in trained)


def test_entries_that_somebody_has_added():
    unet = build()
    unet.register_to_config(note="mine")
    small = fastsd.compress(unet, "bk-sdm-base")
    assert small.config.note == "mine"
    assert fastsd.compress(unet, "a-sdm").config.note == "mine"


def test_channels_last():
    small = fastsd.compress(shared(), "a-sdm")
    expected = call(small)
    small.to(memory_format=torch.channels_last)
    torch.testing.assert_close(call(small), expected, rtol=1e-4, atol=1e-5)
    fastsd.patch(small, gri=None, rules=[rule.name for rule in fastsd.registered_rules()])
    torch.testing.assert_close(call(small), expected, rtol=1e-4, atol=1e-5)


def test_plans_can_be_keys():
    assert {fastsd.Plan(("mid_block",)): 1}[fastsd.Plan(("mid_block",))] == 1
    experts = {"up_blocks.1.resnets.0.conv2": ()}
    assert hash(fastsd.Plan(experts=experts)) == hash(fastsd.Plan(experts=dict(experts)))


def test_the_heads_of_the_mid_block():
    unet = build(SMALL_SD, attention_head_dim=(1, 2, 4, 8))
    removed = PLANS["level"].removed
    with pytest.raises(fastsd.PlanError, match=r"attention_head_dim differs.*got 4 there and 8 in the mid block"):
        fastsd.compress(unet, fastsd.Plan(removed))
    assert fastsd.compress(unet, fastsd.Plan((*removed, "mid_block"))).mid_block is None


def test_a_patched_model_is_compressed_as_stock():
    unet = build()
    expected = call(fastsd.compress(unet, "bk-sdm-small"))
    assert torch.equal(call(fastsd.compress(fastsd.patch(unet), "bk-sdm-small")), expected)


def layer(block, *indices, attentions=True):
    """Residual blocks, and the transformers behind them."""
    kinds = ("resnets", "attentions") if attentions else ("resnets",)
    return tuple(f"{block}.{kind}.{index}" for index in indices for kind in kinds)


D0, D1, D3, U0, U2, U3 = "down_blocks.0", "down_blocks.1", "down_blocks.3", "up_blocks.0", "up_blocks.2", "up_blocks.3"
WRONG = [
    ({"removed": (f"{D0}.resnets.2",)}, r"removed: .*no 'down_blocks.0.resnets.2'"),
    ({"removed": (f"{U0}.resnets.3",)}, r"removed: .*no 'up_blocks.0.resnets.3'"),
    ({"removed": ("conv_in",)}, "removed: expected paths such as 'down_blocks.0.resnets.1'.*'conv_in'"),
    ({"removed": "mid_block"}, "removed: expected a list of paths; got 'mid_block'"),
    ({"removed": ("mid_block", "mid_block")}, "each path once; got 'mid_block' twice"),
    ({"removed": (f"{D3}.resnets.1",)}, "as many residual blocks of up_blocks.0 as.*got 0 and 1.*bypassed"),
    (
        {"removed": (f"{D0}.resnets.1", *layer(U3, 1))},
        "expected down_blocks.0.attentions.1 with down_blocks.0.resnets.1",
    ),
    (
        {"removed": (*layer(D3, 0, 1, attentions=False), *layer(U0, 0, 1, attentions=False))},
        "one of the latter to stay",
    ),
    ({"removed": (D3,)}, "whole levels.*lacking: down_blocks.2.downsamplers, up_blocks.0"),
    ({"removed": (U3,)}, "whole levels.*not to be removed without: up_blocks.3"),
    (
        {"removed": (*layer(D1, 0), *layer(U2, 0))},
        r"a rest that fits together; down_blocks.1.resnets.0.norm1.weight has to be \(8,\), and .* is \(16,\)",
    ),
    ({"bypassed": (D0,)}, "bypassed: expected paths such as 'down_blocks.0.resnets.1'"),
    ({"removed": ("mid_block",), "bypassed": ("mid_block.resnets.0",)}, "bypassed: .*modules that are not removed"),
    ({"experts": {f"{D0}.resnets.0.conv1": (f"{D1}.resnets.0.conv1",)}}, "experts: .*of the shape of"),
    ({"experts": {f"{D0}.resnets.0": ()}}, "experts: expected paths such as 'down_blocks.0.resnets.0.conv1'"),
    (
        {"bypassed": (f"{D0}.resnets.0",), "experts": {f"{D0}.resnets.0.conv1": (f"{D0}.resnets.1.conv1",)}},
        "experts: expected convolutions of blocks that stay",
    ),
    ({"routing": "hard"}, "routing: expected one of sigmoid, softmax; got 'hard'"),
    ({"gri": 4}, "gri: expected a fastsd.GRI, or None; got int"),
]


@pytest.mark.parametrize(("plan", "says"), WRONG)
def test_plans_that_cannot_be(plan, says):
    unet = shared()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(fastsd.PlanError, match=says):
        fastsd.compress(unet, fastsd.Plan(**plan), in_place=True)
    assert type(unet) is diffusers.UNet2DConditionModel
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_recipes_for_other_models():
    with pytest.raises(fastsd.PlanError, match=r"recipe: expected one of bk-sdm-base, .*got 'bk-sdm-huge'"):
        fastsd.compress(shared(), "bk-sdm-huge")
    with pytest.raises(fastsd.PlanError, match=r"recipe 'ssd-1b': expected .* as SDXL has; got down_block_types"):
        fastsd.compress(shared(), "ssd-1b")
    with pytest.raises(fastsd.PlanError, match=r"recipe 'bk-sdm-tiny': expected .*four levels"):
        fastsd.compress(shared("ssd-1b"), "bk-sdm-tiny")


def test_other_objects():
    unet = shared()
    small = fastsd.compress(unet, "a-sdm")
    with pytest.raises(TypeError, match="no plan has changed yet"):
        fastsd.compress(small, "bk-sdm-base")
    with pytest.raises(TypeError, match="expected a diffusers UNet2DConditionModel; got Linear"):
        fastsd.compress(torch.nn.Linear(1, 1), "bk-sdm-base")
    with pytest.raises(TypeError, match=r"expected a fastsd\.Plan or a recipe's name; got list"):
        fastsd.compress(unet, ["mid_block"])


def test_what_would_be_lost():
    adapted = build()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(fastsd.PlanError, match="without adapters"):
        fastsd.compress(adapted, "bk-sdm-base")
    changed = build()
    changed.conv_in = torch.nn.Conv2d(5, 8, 3, padding=1)
    with pytest.raises(fastsd.PlanError, match=r"1 differ, the first is conv_in.weight: expected \(8, 4, 3, 3\)"):
        fastsd.compress(changed, "bk-sdm-base")
    with pytest.raises(fastsd.PlanError, match="meta device"):
        fastsd.compress(build().to("meta"), "bk-sdm-base")
    hooked = build()
    hooked.conv_in.forward = lambda x: x
    with pytest.raises(fastsd.PlanError, match="conv_in has a forward of its own"):
        fastsd.compress(hooked, "bk-sdm-base")


class Doubling(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Uncopied(AttnProcessor):
    def __deepcopy__(self, memo):
        raise TypeError("mine alone")


def _doubling(unet):
    unet.conv_in.__class__ = Doubling


def _hooked(unet):
    unet.mid_block.register_forward_hook(lambda *args: None)


def _seamless(unet):
    unet.conv_in.padding_mode = "circular"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_doubling, r"conv_in should be Conv2d\(.*and is Doubling\("),
        (_hooked, "no hooks, which would be lost; mid_block has some"),
        (_seamless, "conv_in should be .*and is .*padding_mode=circular"),
        (lambda unet: unet.enable_freeu(0.9, 0.2, 1.5, 1.6), "without FreeU"),
        (lambda unet: unet.set_attn_processor(Uncopied()), r"processors that can be copied, or .*: mine alone"),
    ],
)
def test_behaviour_that_would_be_lost(change, says):
    unet = build()
    change(unet)
    with pytest.raises(fastsd.PlanError, match=says):
        fastsd.compress(unet, "bk-sdm-base")
    assert type(unet) is diffusers.UNet2DConditionModel


def test_hooks_of_a_model_that_stays():
    unet, seen = build(), []
    unet.register_forward_hook(lambda *args: seen.append(1))
    with pytest.raises(fastsd.PlanError, match="no hooks, which would be lost; it has some"):
        fastsd.compress(unet, "bk-sdm-base")
    call(fastsd.compress(unet, "bk-sdm-base", in_place=True))
    assert seen == [1]


def test_configurations_stay_as_they_were_written():
    """What a plan does not touch is not rewritten, so that other tools find what they look for."""
    unet = build(SMALL_SD, layers_per_block=2, transformer_layers_per_block=1)
    small = fastsd.compress(unet, fastsd.Plan(("mid_block",)))
    changed = {key for key, value in config_of(small).items() if config_of(unet)[key] != value}
    assert changed <= {"mid_block_type", "down_block_types", "up_block_types"}
