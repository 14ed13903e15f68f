"""Plans that are drawn: what suits a model does what it says, and what does not is refused."""

import functools
import json
import tempfile

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import fastsd
from fastsd.compress.plan import ROUTINGS
from fastsd.models import example_inputs
from fastsd.patching.report import NO_RULE
from tests.combinations import order
from tests.compress.models import SMALL_SD, SMALLEST, build, call, relative_error, trained


@functools.cache
def stock(attends, layers, depth):
    """A U-Net with a level for each of ``attends``, which tells whether it has transformers; it is only read."""
    kinds = ["CrossAttn" * each for each in attends]
    return build(
        SMALL_SD,
        block_out_channels=(4, 8, 8)[: len(attends)],
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=layers,
        transformer_layers_per_block=depth,
    )


@st.composite
def compressions(draw):
    """A U-Net, and a plan that suits it."""
    attends = tuple(draw(st.lists(st.booleans(), min_size=2, max_size=3)))
    layers, depth = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    unet = stock(attends, layers, depth)
    removed, bypassed = [], []
    kept_levels = len(attends)
    if kept_levels == 3 and draw(st.booleans()):
        removed += ["down_blocks.2", "down_blocks.1.downsamplers", "up_blocks.0"]
        kept_levels = 2
    blocks = {"mid_block": [0, 1]}
    for level in range(kept_levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{len(attends) - 1 - level}"
        blocks |= {down: list(range(layers)), up: list(range(layers + 1))}
        if layers == 2 and draw(st.booleans()):
            for block in (down, up):
                blocks[block].remove(1)
                removed += [f"{block}.{kind}.1" for kind in ("resnets", "attentions")[: 1 + attends[level]]]
    if draw(st.booleans()):
        removed += ["mid_block"]
        del blocks["mid_block"]
    modules, transformers = dict(unet.named_modules()), []
    for block, indices in blocks.items():
        for index in indices:
            transformer = f"{block}.attentions.{index}"
            action = draw(st.integers(0, 3)) if transformer in modules else 2
            if action != 2:
                transformers.append(transformer)
            elif transformer in modules:
                removed.append(transformer)
            if action == 3 and depth == 2:
                removed.append(f"{transformer}.transformer_blocks.1")
            if draw(st.integers(0, 3)) == 0:
                bypassed.append(f"{block}.resnets.{index}")
    mid, shortened = "mid_block.attentions.0", [path for path in removed if path.endswith(".transformer_blocks.1")]
    if mid in transformers and any(path.startswith(f"down_blocks.{kept_levels - 1}.") for path in shortened):
        removed += {f"{mid}.transformer_blocks.1"} - set(shortened)  # stock builds it no deeper than that level
    left = [f"{block}.resnets.{index}" for block, indices in blocks.items() for index in indices]
    convolutions = [f"{path}.{name}" for path in left if path not in bypassed for name in ("conv1", "conv2")]
    experts = {}
    for path in draw(st.lists(st.sampled_from(convolutions), max_size=2, unique=True)) if convolutions else ():
        shape = modules[path].weight.shape
        same = [
            p for p, m in modules.items() if p.endswith(("conv1", "conv2")) and p != path and m.weight.shape == shape
        ]
        if same:
            experts[path] = tuple(draw(st.lists(st.sampled_from(same), min_size=1, max_size=2, unique=True)))
    at_level_0 = ("down_blocks.0.", f"up_blocks.{len(attends) - 1}.")
    has_any = any(path.startswith(at_level_0) for path in transformers)
    gri = draw(st.sampled_from([None, fastsd.GRI(window=4, pool=2)])) if has_any else None
    return (attends, layers, depth), fastsd.Plan(
        tuple(removed), tuple(bypassed), experts, draw(st.sampled_from(ROUTINGS)), gri
    )


def numbers_left(unet, plan):
    """How many numbers of ``unet`` a plan leaves, and adds, by what the plan says."""

    def stays(name):
        kept_of_bypassed = (f"{path}.conv_shortcut." for path in plan.bypassed)
        return not name.startswith(tuple(f"{path}." for path in (*plan.removed, *plan.bypassed))) or name.startswith(
            tuple(kept_of_bypassed)
        )

    state = unet.state_dict()
    count = sum(value.numel() for name, value in state.items() if stays(name))
    for path, others in plan.experts.items():
        weight, bias = state[f"{path}.weight"], state[f"{path}.bias"]
        count += len(others) * (weight.numel() + bias.numel())  # the other kernels
        count += (1 + len(others)) * (weight.shape[1] + 1 + 1)  # the routing, and its offset
    return count


@pytest.mark.gradients
@seed(order("plans that suit"))
@settings(max_examples=settings.default.max_examples // 2)
@given(compressions())
def test_plans_that_suit(drawn):
    unet, plan = stock(*drawn[0]), drawn[1]
    assert fastsd.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    small = fastsd.compress(unet, plan)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert sum(value.numel() for value in small.state_dict().values()) == numbers_left(unet, plan)

    expected = call(trained(small))
    assert expected.isfinite().all()
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = fastsd.load(folder)
    assert type(loaded) is type(small)
    if isinstance(small, fastsd.CompressedUNet2DConditionModel):
        assert loaded.compression.plan == plan
    assert torch.equal(call(loaded), expected)

    # a window that covers the map is full attention
    fastsd.patch(small, strict=True, gri=fastsd.GRI(window=16, pool=4) if plan.gri else None)
    entries = fastsd.report(small).entries
    assert not [entry for entry in entries if entry.rule is not None and not entry.replaced]
    assert all("Resnet" not in entry.class_name for entry in entries if entry.reason == NO_RULE)
    assert relative_error(call(small), expected) <= 1e-4
    assert torch.equal(call(fastsd.unpatch(small)), expected)

    small.train()(**example_inputs(small, 2, 16, tokens=7))[0].square().mean().backward()
    untrained = {name for name, parameter in small.named_parameters() if parameter.grad is None}
    # a time that no block is told trains nothing
    assert not untrained or {name.partition(".")[0] for name in untrained} == {"time_embedding"}
    assert not untrained or not any(getattr(module, "time_emb_proj", None) for module in small.modules())


PLACES = [
    *("mid_block", "conv_in", "", "down_blocks", "up_blocks.0", "up_blocks.1", "down_blocks.0.downsamplers"),
    *(f"{side}_blocks.{level}.{kind}.{index}" for side in ("down", "up") for level in range(3)
      for kind in ("resnets", "attentions") for index in range(3)),
    *("mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0", "down_blocks.1", "down_blocks.2"),
    *("down_blocks.0.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.1.transformer_blocks.0"),
]  # fmt: skip
CONVOLUTIONS = [f"{place}.{name}" for place in PLACES for name in ("conv1", "conv2") if "resnets" in place]


@seed(order("plans of any kind"))
@given(
    st.lists(st.sampled_from(PLACES), max_size=4),
    st.lists(st.sampled_from(PLACES), max_size=2),
    st.dictionaries(st.sampled_from(CONVOLUTIONS), st.lists(st.sampled_from(CONVOLUTIONS), max_size=2), max_size=1),
)
def test_plans_of_any_kind(removed, bypassed, experts):
    """One is refused, and the model is as it was; or what it makes can be called."""
    unet = build(SMALLEST, layers_per_block=2)
    classes = [type(module) for module in unet.modules()]
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    try:
        small = fastsd.compress(unet, fastsd.Plan(tuple(removed), tuple(bypassed), experts), in_place=True)
    except fastsd.PlanError:
        assert [type(module) for module in unet.modules()] == classes
        assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    else:
        assert call(small).isfinite().all()
