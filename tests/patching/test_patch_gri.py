"""GRI attention in U-Nets, as a choice of patch."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

import fastsd
from fastsd.gri import highest_level, level_of
from fastsd.models import example_inputs
from fastsd.nn.replacement import Replacement
from fastsd.nn.transformer_block import BasicTransformerBlock as FastBlock
from fastsd.patching.rules import TRANSFORMER_BLOCK
from fastsd_kernels.gri_attention import op
from fastsd_kernels.linear import cpu_speed
from tests.combinations import pairwise
from tests.flops import flops_of, flops_without_hooks
from tests.patching.gri import LEVEL_0, MIDDLE, SMALL, approximate, gri_calls, ip_adapter, run, told, with_processors
from tests.patching.models import (
    TINY,
    assert_as_stock,
    assert_untouched,
    build,
    call,
    calls_of,
    fingerprint,
    relative_error,
)


def test_off_unless_asked_for():
    model = fastsd.patch(build())
    assert approximate(model) == []
    assert gri_calls(lambda: call(model)) == 0


def test_flops():
    model = build()
    with sdpa_kernel(SDPBackend.MATH):  # torch has no formula for its own attention of the CPU
        stock = flops_of(lambda: call(model))
        fastsd.patch(model, gri=SMALL)
        # three layers of 4 channels, two samples of 16² tokens: 4² keys of a window and 8² cells
        saved = 3 * 4 * 4 * 2 * 256 * (256 - 16 - 64)
        assert flops_of(lambda: call(model)) == stock - saved
        assert flops_without_hooks(lambda: call(model)) == stock - saved


def test_layers_of_a_level():
    model = fastsd.patch(build(), gri=SMALL)
    assert sorted(approximate(model)) == sorted(LEVEL_0)
    assert gri_calls(lambda: call(model)) == 3
    lines = str(fastsd.report(model)).splitlines()
    (line,) = [line for line in lines if "approximate" in line]
    assert line.split() == [
        "BasicTransformerBlock",
        "3",
        "replaced",
        "by",
        "gri_attention",
        "(approximate)",
        "→",
        "gri_attention",
        "[cpu]",
    ]
    assert all(entry.rule != "gri_attention" for entry in fastsd.report(fastsd.patch(build())).entries)

    fastsd.patch(model, gri=fastsd.GRI(4, 2, levels=(1,)))
    assert approximate(model) == [MIDDLE]
    assert {type(model.get_submodule(path)) for path in LEVEL_0} == {FastBlock}
    fastsd.patch(model, gri=fastsd.GRI(4, 2, levels=(1, 0)))
    assert sorted(approximate(model)) == sorted([*LEVEL_0, MIDDLE])
    # a choice of rules that does not replace what has GRI attention by now
    fastsd.patch(model, gri=fastsd.GRI(4, 2, levels=(1,)), rules=["resnet_block"])
    assert approximate(model) == [MIDDLE]


def test_levels():
    root = build()
    assert [level_of(root, path) for path in (*LEVEL_0, MIDDLE)] == [0, 0, 0, 1]
    for path in (LEVEL_0[0] + ".attn1", "down_blocks.0", "down_blocks.0.attentions.0"):
        assert level_of(root, path) is None


def test_highest_level():
    assert highest_level(build()) == (0,)
    assert highest_level(build("vae")) == (0,)  # there is none; a patch says so
    attention_below = TINY | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model = diffusers.UNet2DConditionModel(**attention_below)
    assert highest_level(model) == (1,)
    assert len(approximate(fastsd.patch(model, gri=fastsd.GRI(4, 2, levels=highest_level(model))))) == 4


@pairwise(
    "interaction,mask_own_window,size",
    ["joint", "agent"],
    [False, True],
    [(16, 16), (12, 20), (13, 17), (8, 40), (1, 2)],
)
def test_as_with_processors(interaction, mask_own_window, size):
    height, width = size
    given = {"interaction": interaction, "mask_own_window": mask_own_window}
    model = fastsd.patch(build(), gri=fastsd.GRI(4, 2, **given))
    expected = build()
    with_processors(expected, grid=(height, width), **given)
    assert_as_stock(run(model, height, width), run(expected, height, width))
    if height > 8:
        assert relative_error(run(model, height, width), run(build(), height, width)) > 1e-4


def test_maps_of_several_sizes_one_after_the_other():
    model = fastsd.patch(build(), gri=SMALL)
    for height, width in ((12, 20), (20, 12), (16, 16), (12, 20)):
        assert_as_stock(run(model, height, width), run(with_processors(build(), grid=(height, width)), height, width))


def test_a_window_that_covers_the_map_is_exact():
    model = fastsd.patch(build(), gri=fastsd.GRI(window=16, pool=4, levels=(0, 1)))
    assert gri_calls(lambda: call(model)) == 4
    assert_as_stock(call(model), call(build()))


def test_taken_back():
    model = build()
    before, stock = fingerprint(model), call(model)
    fastsd.patch(model, gri=SMALL)
    assert relative_error(call(model), stock) > 1e-4
    fastsd.unpatch(model)
    assert_untouched(model, before)
    assert torch.equal(call(model), stock)


def test_inside_a_with_block():
    model = fastsd.patch(build())
    exact = call(model)
    with fastsd.patched(model, gri=SMALL):
        assert len(approximate(model)) == 3
    assert torch.equal(call(model), exact)
    fastsd.patch(model, gri=SMALL)
    with fastsd.patched(model, gri=fastsd.GRI(4, 2, levels=(1,))):
        assert approximate(model) == [MIDDLE]
    assert sorted(approximate(model)) == sorted(LEVEL_0)


def test_patching_again_keeps_the_choice():
    model = fastsd.patch(build(), gri=SMALL)
    before = fingerprint(model)
    fastsd.patch(model, gri=fastsd.GRI(window=4, pool=2))
    fastsd.patch(model)
    assert_untouched(model, before)
    assert len(approximate(model)) == 3
    fastsd.patch(model, backend="reference")
    assert len(approximate(model)) == 3
    backends = [entry.backends for entry in fastsd.report(model).entries if entry.approximate]
    assert backends == [{"gri_attention": "reference"}] * 3
    other = call(fastsd.patch(model, gri=fastsd.GRI(window=2, pool=2), backend="cpu"))
    assert relative_error(other, call(fastsd.patch(build(), gri=SMALL))) > 1e-4


def test_keys_and_copies_are_stock():
    model = build()
    keys = list(model.state_dict())
    fastsd.patch(model, gri=SMALL)
    call(model)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert approximate(other) == []
        assert torch.equal(call(other), call(build()))


def test_with_rules_that_leave_the_transformer_out():
    model = fastsd.patch(build(), rules=["resnet_block"], gri=SMALL)
    assert_as_stock(run(model, 12, 20), run(with_processors(build(), grid=(12, 20)), 12, 20))


def left_as_it_is(path):
    """A rule of a user's for the class of ``path``, whose replacement does as stock does."""
    stock = {"block": BasicTransformerBlock, "transformer": Transformer2DModel}[path]
    replacement = type(stock.__name__, (Replacement, stock), {})
    return fastsd.Rule(name="own", target=stock, replacement=replacement, reject=lambda module: None)


def test_beside_rules_of_a_user(monkeypatch):
    for path in ("block", "transformer"):
        model = build()
        before = fingerprint(model)
        with pytest.raises(ValueError, match=r"one rule for each name and each target; .*'own'"):
            fastsd.patch(model, rules=[left_as_it_is(path)], gri=SMALL)
        assert_untouched(model, before)

    fastsd.patch(model, rules=[left_as_it_is("block")])
    assert_as_stock(call(fastsd.patch(model, gri=SMALL)), call(with_processors(build())))

    of_others = {rule.name: rule for rule in fastsd.registered_rules() if rule is not TRANSFORMER_BLOCK}
    monkeypatch.setattr("fastsd.patching.rule._registered", of_others)
    fastsd.register_rule(left_as_it_is("block"))
    assert sorted(approximate(model)) == sorted(LEVEL_0)
    fastsd.patch(model)
    assert gri_calls(lambda: call(model)) == 3


@pytest.mark.filterwarnings("ignore:fastsd.patch left")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_transformer_that_is_left_as_it_is(when):
    """Nothing guesses the size of its map: 8 by 32 is as many tokens as 16 by 16."""
    model, path = build(), LEVEL_0[0].partition(".transformer_blocks")[0]
    if when == "after":
        fastsd.patch(model, gri=SMALL)
    model.get_submodule(path).norm.register_forward_hook(lambda module, args, output: None)
    if when == "before":
        fastsd.patch(model, gri=SMALL)
    replaced = [p for p in LEVEL_0 if not p.startswith(path) or when == "after"]
    assert sorted(approximate(model)) == sorted(replaced)
    expected = with_processors(build(), replaced, grid=(8, 32))
    assert gri_calls(lambda: run(model, 8, 32)) == len(replaced)
    assert_as_stock(run(model, 8, 32), run(expected, 8, 32))


def test_video_models_of_other_transformers_are_refused():
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(1, 2),
        cross_attention_dim=8,
        layers_per_block=1,
        projection_class_embeddings_input_dim=6,
        addition_time_embed_dim=2,
    )
    with pytest.raises(ValueError, match="gri: expected levels"):
        fastsd.patch(model, gri=SMALL)


@pytest.mark.gradients
def test_checkpoints_of_maps_of_several_sizes():
    """The backward pass computes the blocks again: with the size that they had, not the last one."""
    gradients = []
    for checkpointed in (False, True):
        model = fastsd.patch(build(), gri=SMALL).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        inputs = [example_inputs(model, 1, 16, tokens=7) | {"sample": torch.randn(1, 4, h, w, generator=seeded())}
                  for h, w in ((8, 32), (16, 16), (32, 8))]  # fmt: skip
        sum(model(**given)[0].square().sum() for given in inputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


def seeded():
    return torch.Generator().manual_seed(3)


def test_threads_with_maps_of_several_sizes():
    model = fastsd.patch(build(), gri=SMALL)
    sizes = [(8, 32), (32, 8), (16, 16)]
    expected = {size: run(model, *size, batch=1) for size in sizes}
    with ThreadPoolExecutor(3) as pool:
        for size, result in zip(sizes * 8, pool.map(lambda s: run_without_grad(model, s), sizes * 8), strict=True):
            assert_as_stock(result, expected[size])


def run_without_grad(model, size):
    with torch.no_grad():  # of this thread
        return run(model, *size, batch=1)


def test_the_backend_is_the_one_that_was_asked_for(monkeypatch):
    used = []
    for backend in ("cpu", "reference"):
        module = op.backends[backend].module
        right = module.run
        monkeypatch.setattr(module, "run", lambda *a, name=backend, right=right: used.append(name) or right(*a))
    call(fastsd.patch(build(), gri=SMALL, backend="reference"))
    assert used == ["reference"] * 3
    used.clear()
    call(fastsd.patch(build(), gri=SMALL))
    assert used == ["cpu"] * 3


def test_controlnet():
    model = fastsd.patch(build("controlnet"), gri=SMALL)
    assert approximate(model) == [LEVEL_0[0]]
    assert_as_stock(call(model), call(with_processors(build("controlnet"), LEVEL_0[:1])))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_projections(when):
    expected, model = with_processors(build()), build()
    if when == "after":
        fastsd.patch(model, gri=SMALL)
    for each in (expected, model):
        torch.manual_seed(0)
        each.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    fastsd.patch(model, gri=SMALL)
    assert gri_calls(lambda: call(model)) == 3
    assert_as_stock(call(model), call(expected))
    assert relative_error(call(model), call(with_processors(build()))) > 1e-3
    for each in (expected, model):
        each.fuse_lora()
    assert_as_stock(call(model), call(expected))


@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapter(when):
    torch.manual_seed(7)
    model = build()
    state = ip_adapter(model)
    expected = build()
    expected._load_ip_adapter_weights(state)
    with_processors(expected)
    if when == "after":
        fastsd.patch(model, gri=SMALL)
    model._load_ip_adapter_weights(state)
    fastsd.patch(model, gri=SMALL)
    inputs = {"added_cond_kwargs": {"image_embeds": torch.randn(2, 6)}}
    assert gri_calls(lambda: call(model, **inputs)) == 3
    assert_as_stock(call(model, **inputs), call(expected, **inputs))


def test_another_processor_is_called():
    model = fastsd.patch(build(), gri=SMALL)
    exact = call(build())
    model.set_attn_processor(SlicedAttnProcessor(1))
    assert gri_calls(lambda: call(model)) == 0
    assert_as_stock(call(model), exact)
    (reason,) = {entry.reason for entry in fastsd.report(model).entries if entry.rule == "gri_attention"}
    assert "SlicedAttnProcessor" in reason
    assert approximate(model) == []


def test_packed_projections():
    model = fastsd.patch(build(), gri=SMALL)
    expected = call(model)
    model.fuse_qkv_projections()
    assert gri_calls(lambda: call(model)) > 0
    assert_as_stock(call(model), expected)


def test_a_processor_whose_call_is_overwritten_is_called(monkeypatch):
    model = fastsd.patch(build(), gri=SMALL)
    right, calls = AttnProcessor2_0.__call__, []
    monkeypatch.setattr(AttnProcessor2_0, "__call__", lambda *a, **k: calls.append(1) or right(*a, **k))
    assert_as_stock(call(model), call(build()))
    assert len(calls) == 2 * len(model.attn_processors)
    assert approximate(model) == []


def test_a_choice_made_while_another_processor_is_there():
    model = fastsd.patch(build(), gri=SMALL)
    model.set_attn_processor(SlicedAttnProcessor(1))
    with pytest.warns(UserWarning, match="SlicedAttnProcessor"):
        fastsd.patch(model, gri=fastsd.GRI(8, 4))
    model.set_default_attn_processor()
    assert_as_stock(call(model), call(fastsd.patch(build(), gri=fastsd.GRI(8, 4))))


def test_masks_and_hooks_are_kept():
    model, stock = fastsd.patch(build(), gri=SMALL), build()
    block, stock_block = (each.get_submodule(LEVEL_0[0]) for each in (model, stock))
    x, context = torch.randn(2, 256, 4), torch.randn(2, 7, 8)
    grid = told(16, 16)
    assert relative_error(block(x, None, context, **grid), stock_block(x, None, context)) > 1e-4
    mask = -10000.0 * (torch.rand(2, 1, 256) > 0.7)
    assert_as_stock(block(x, mask, context, **grid), stock_block(x, mask, context))
    assert_as_stock(block(x, None, context), stock_block(x, None, context))
    seen = []
    block.attn1.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_as_stock(call(model), call(with_processors(build(), LEVEL_0[1:])))
    assert len(seen) == 1


def test_chunked_feed_forward():
    model, expected = fastsd.patch(build(), gri=SMALL), with_processors(build())
    for each in (model, expected):
        for path in LEVEL_0:
            each.get_submodule(path).set_chunk_feed_forward(64, 1)
    chunks = []
    model.get_submodule(LEVEL_0[0]).ff.register_forward_hook(lambda ff, args, y: chunks.append(y.shape[1]))
    assert_as_stock(call(model), call(expected))
    assert chunks == [64] * 4


def test_gligen():
    boxes = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, 8), "masks": torch.ones(2, 3)}
    results = []
    for model in (fastsd.patch(build("gligen"), gri=SMALL), with_processors(build("gligen"))):
        results.append(call(model, cross_attention_kwargs={"gligen": dict(boxes)}))
    assert_as_stock(*results)


@pytest.mark.gradients
def test_gradients():
    model, expected = fastsd.patch(build(), gri=SMALL).train(), with_processors(build()).train()
    for each in (model, expected):
        inputs = example_inputs(each, 2, 16, tokens=7)
        each(**inputs)[0].square().sum().backward()
    actual, wanted = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, expected))
    assert_as_stock(actual, wanted)
    exact = build().train()
    exact(**inputs)[0].square().sum().backward()
    assert relative_error(actual, torch.cat([p.grad.flatten() for p in exact.parameters()])) > 1e-3


def test_compiled():
    torch._dynamo.reset()
    model = fastsd.patch(build("cross_up"), gri=SMALL)
    eager = [run(model, 16, 16), run(model, 12, 20)]
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    model.compile(fullgraph=True, backend=backend)
    assert_as_stock(run(model, 16, 16), eager[0])
    assert targets.count(torch.ops.fastsd.gri_attention.default) == 2
    assert_as_stock(run(model, 12, 20), eager[1])
    torch._dynamo.reset()


def test_compiled_blocks():
    torch._dynamo.reset()
    model, other = fastsd.patch(build(), gri=SMALL), fastsd.patch(build(), gri=SMALL)
    for path in LEVEL_0:
        other.get_submodule(path).compile(fullgraph=True, backend="aot_eager")
    for side in range(8, 40, 2):
        assert_as_stock(run(other, side, 16, batch=1), run(model, side, 16, batch=1))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"gri": {"window": 4}}, TypeError, "GRI, or None; got dict"),
        ({"gri": fastsd.GRI(levels=(0, 2))}, ValueError, r"levels.*\(0, 1\); got \(0, 2\)"),
    ],
)
def test_bad_choices(given, error, says):
    model = build()
    before = fingerprint(model)
    with pytest.raises(error, match=says):
        fastsd.patch(model, **given)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"window": 0}, "window.*from 1 to 1048576; got 0"),
        ({"pool": -1}, "pool.*from 1 to.*got -1"),
        ({"window": 2**70}, "window.*from 1 to"),
        ({"pool": 2.0}, "pool.*got 2.0"),
        ({"levels": ()}, r"levels.*got \(\)"),
        ({"levels": (-1,)}, r"levels.*got \(-1,\)"),
        ({"interaction": "gated"}, "interaction.*joint, agent; got 'gated'"),
        ({"mask_own_window": "no"}, "mask_own_window.*True or False; got 'no'"),
    ],
)
def test_bad_sizes(given, says):
    with pytest.raises(ValueError, match=says):
        fastsd.GRI(**given)


def test_levels_are_a_set():
    assert fastsd.GRI(levels=1) == fastsd.GRI(levels=(1, 1))
    assert fastsd.GRI(levels=[1, 0]).levels == (0, 1)


def test_a_scale_of_its_own():
    torch.manual_seed(0)
    attn = Attention(query_dim=8, heads=2, dim_head=4, scale_qk=False, processor=AttnProcessor()).eval()
    x = torch.randn(2, 30, 8)
    block = BasicTransformerBlock(8, 2, 4).eval()
    block.attn1 = attn
    exact = block(x)
    model = nn.Module()
    model.down_blocks = nn.ModuleList([nn.Module()])
    transformer = Transformer2DModel(2, 4, 8, norm_num_groups=2)
    transformer.transformer_blocks = nn.ModuleList([block])
    model.down_blocks[0].attentions = nn.ModuleList([transformer])
    fastsd.patch(model, gri=fastsd.GRI(window=8, pool=2))
    given = told(5, 6)
    assert gri_calls(lambda: block(x, **given)) == 1
    assert_as_stock(block(x, **given), exact)


def test_hooks_on_all_modules_see_its_projections(monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", True)
    seen = []
    for model in (fastsd.patch(build(), gri=SMALL), with_processors(build())):
        linears = []
        handle = register_module_forward_hook(lambda module, args, y, to=linears: to.append(type(module)))
        call(model)
        handle.remove()
        seen.append(linears.count(nn.Linear))
    assert seen[0] == seen[1]


def test_projections_where_the_library_multiplies_faster(monkeypatch):
    model = fastsd.patch(build(), gri=SMALL)
    expected = call(model)
    monkeypatch.setattr(cpu_speed, "_is_faster", True)
    # of each of the three blocks those of both attentions and of the feed-forward layer, of the one without GRI too
    assert calls_of("linear", lambda: call(model)) == 4 * (2 * 4 + 2)
    assert_as_stock(call(model), expected)
