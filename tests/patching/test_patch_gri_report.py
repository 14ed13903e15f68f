"""Where a patch has put GRI attention, what runs there, and what the report says of it."""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn.modules import module as torch_module

import fastsd
from fastsd.nn.gri_attention import arguments, self_attention
from fastsd_kernels.linear import cpu_speed
from tests.patching.gri import LEVEL_0, SMALL, approximate, gri_calls, run, told, with_processors
from tests.patching.models import TINY, assert_as_stock, assert_untouched, build, call, fingerprint, relative_error

ALL = sorted(LEVEL_0)


def agree(model, expected):
    """The report names ``expected``, and as many layers run GRI attention."""
    assert sorted(approximate(model)) == sorted(expected)
    assert gri_calls(lambda: call(model)) == len(expected)


def test_a_choice_made_inside_a_with_block_outlives_it():
    model = build()
    with fastsd.patched(model):
        fastsd.patch(model, gri=SMALL)
        agree(model, ALL)
    agree(model, ALL)
    assert_as_stock(call(model), call(fastsd.patch(build(), gri=SMALL)))


def test_what_is_unpatched_inside_a_with_block_stays_so():
    model = fastsd.patch(build(), gri=SMALL)
    with fastsd.patched(model, gri=fastsd.GRI(4, 2, levels=(1,))):
        fastsd.unpatch(model)
    agree(model, [])
    assert type(model.get_submodule(LEVEL_0[0])) is BasicTransformerBlock


@pytest.mark.parametrize("cls", [BasicTransformerBlock, Transformer2DModel])
def test_a_method_that_is_overwritten_after_the_patch(monkeypatch, cls):
    model = fastsd.patch(build(), gri=SMALL)
    right = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: right(self, *args, **kwargs))
    agree(model, [])
    assert_as_stock(call(model), call(build()))


def test_a_class_that_is_changed_after_the_patch():
    class Block(BasicTransformerBlock):
        def forward(self, *args, cross_attention_kwargs=None, **kwargs):
            seen.append(cross_attention_kwargs)
            return super().forward(*args, cross_attention_kwargs=cross_attention_kwargs, **kwargs)

    seen = []
    model = fastsd.patch(build(), gri=SMALL)
    model.get_submodule(LEVEL_0[0]).__class__ = Block
    agree(model, LEVEL_0[1:])
    assert not seen[0]  # nothing of ours that a forward that checks its arguments would refuse


def test_a_transformer_that_is_exchanged_after_the_patch():
    """A copy is stock, and tells the blocks that it is given nothing; another patch makes it fast."""
    model = fastsd.patch(build(), gri=SMALL)
    attentions = model.down_blocks[0].attentions
    blocks, attentions[0] = attentions[0].transformer_blocks, copy.deepcopy(attentions[0])
    attentions[0].transformer_blocks = blocks
    agree(model, LEVEL_0[1:])
    agree(fastsd.patch(model), ALL)


def test_a_block_that_is_compiled():
    torch._dynamo.reset()
    for compile_first in (True, False):
        model = build()
        holder = model.down_blocks[0].attentions[0].transformer_blocks
        if compile_first:
            holder[0] = torch.compile(holder[0], backend="eager")
        fastsd.patch(model, gri=SMALL)
        if not compile_first:
            holder[0] = torch.compile(holder[0], backend="eager")
        expected = [LEVEL_0[0] + "._orig_mod", *LEVEL_0[1:]]
        assert sorted(approximate(model)) == sorted(expected)
        assert_as_stock(call(model), call(fastsd.patch(build(), gri=SMALL)))
    torch._dynamo.reset()


def test_blocks_beside_a_stock_one_tell_it_nothing(caplog):
    """diffusers warns of arguments that a processor does not know."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**TINY, transformer_layers_per_block=2).eval()
    model.get_submodule(LEVEL_0[0]).attn1.set_processor(SlicedAttnProcessor(1))
    with pytest.warns(UserWarning, match="SlicedAttnProcessor"):
        fastsd.patch(model, gri=SMALL)
    assert type(model.get_submodule(LEVEL_0[0])) is BasicTransformerBlock
    assert gri_calls(lambda: call(model)) == 5
    assert "not expected" not in caplog.text


def test_a_block_of_another_class_is_named():
    class Block(BasicTransformerBlock):
        pass

    model = build()
    for path in LEVEL_0:
        model.get_submodule(path).__class__ = Block
    before = fingerprint(model)
    with pytest.raises(fastsd.PatchError, match=r"down_blocks.0.*it is a .*Block, expected diffusers"):
        fastsd.patch(model, gri=SMALL, strict=True)
    assert_untouched(model, before)
    with pytest.warns(UserWarning, match="left 3 modules"):
        fastsd.patch(model, gri=SMALL)


def test_another_module_in_place_of_the_attention():
    class Nothing(nn.Module):
        def forward(self, x, **kwargs):
            return torch.zeros_like(x)

    model, expected = fastsd.patch(build(), gri=SMALL), with_processors(build())
    for each in (model, expected):
        each.get_submodule(LEVEL_0[0]).attn1 = Nothing()
    agree(model, LEVEL_0[1:])
    with pytest.warns(UserWarning, match="Nothing"):
        fastsd.patch(model, backend="cpu", gri=SMALL)
    assert_as_stock(call(model), call(expected))


def test_quantised_projections():
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(build()), {nn.Linear})
    exact = call(quantised)
    fastsd.patch(quantised, gri=SMALL)
    agree(quantised, ALL)
    assert 1e-4 < relative_error(call(quantised), exact) < 0.5


def test_layerwise_casting():
    model = build()
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    fastsd.patch(model, gri=SMALL, backend="cpu")
    entries = [entry for entry in fastsd.report(model).entries if entry.approximate]
    assert [entry.backends for entry in entries] == [{"gri_attention": "cpu"}] * 3


def test_looking_at_all_modules_changes_nothing():
    model = fastsd.patch(build(), gri=SMALL)
    expected = call(model)
    handle = torch_module.register_module_forward_hook(lambda module, args, output: None)
    try:
        agree(model, ALL)
        assert_as_stock(call(model), expected)
    finally:
        handle.remove()


@pytest.mark.gradients
def test_transforms_change_nothing():
    model = fastsd.patch(build(), gri=SMALL).double()
    block = model.get_submodule(LEVEL_0[0])
    x, context = torch.randn(1, 256, 4, dtype=torch.float64), torch.randn(1, 7, 8, dtype=torch.float64)

    def loss(x):
        return block(x, None, context, **told(16, 16)).square().sum()

    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


@pytest.mark.gradients
def test_forward_mode_where_the_library_multiplies_faster(monkeypatch):
    monkeypatch.setattr(cpu_speed, "_is_faster", True)
    block = fastsd.patch(build(), gri=SMALL).requires_grad_(False).get_submodule(LEVEL_0[0])
    x = torch.randn(1, 256, 4)

    def loss(x):
        return self_attention(block, block.attn1, x, (16, 16), **arguments(SMALL, (16, 16))).square().sum()

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    _, slope = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(slope, gradient.sum(), rtol=1e-3, atol=1e-3)


def test_rules_of_a_user_inside_the_blocks():
    from diffusers.models.attention_processor import Attention

    from fastsd.nn.replacement import Replacement

    fast = type("Attention", (Replacement, Attention), {})
    own = fastsd.Rule(name="own", target=Attention, replacement=fast, reject=lambda module: None)
    model = fastsd.patch(build(), gri=SMALL)
    fastsd.patch(model, rules=[own])
    replaced = [entry.path for entry in fastsd.report(model).entries if entry.rule == "own"]
    assert {f"{path}.attn2" for path in LEVEL_0} <= set(replaced)


def test_fast_feed_forwards_are_found_inside_the_blocks():
    model = fastsd.patch(build(), gri=SMALL)
    rules = {entry.path: entry.rule for entry in fastsd.report(model).entries}
    assert [rules[f"{path}.ff"] for path in LEVEL_0] == ["feed_forward"] * 3


@pytest.mark.parametrize("name", ["encoder_attention_mask", "scale", "ip_adapter_masks"])
def test_arguments_reach_the_cross_attention(name):
    """What the block does not read itself gets where stock hands it."""
    seen = {}

    class Noting(AttnProcessor2_0):
        def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, temb=None, ip_adapter_masks=None):
            seen.update(mask=attention_mask, ip_adapter_masks=ip_adapter_masks)
            return super().__call__(attn, x, encoder_hidden_states, attention_mask)

    model = fastsd.patch(build(), gri=SMALL)
    block = model.get_submodule(LEVEL_0[0])
    block.attn2.set_processor(Noting())
    x, context = torch.randn(2, 256, 4), torch.randn(2, 7, 8)
    given = told(16, 16)
    if name == "encoder_attention_mask":
        given[name] = torch.zeros(2, 1, 7)
        block(x, None, context, **given)
        assert seen["mask"] is not None
        return
    given["cross_attention_kwargs"][name] = 0.5
    calls = gri_calls(lambda: block(x, None, context, **given))
    assert seen[name] == 0.5 if name == "ip_adapter_masks" else calls == 0


def test_refusals_of_a_block(recwarn):
    from fastsd.nn.gri_attention import why_stock

    def block(**given):
        return BasicTransformerBlock(8, 2, 4, **given)

    assert why_stock(block()) is None
    assert "ada_norm" in why_stock(block(norm_type="ada_norm", num_embeds_ada_norm=4))
    assert "positions" in why_stock(block(positional_embeddings="sinusoidal", num_positional_embeddings=16))
    assert "no self-attention" in why_stock(block(only_cross_attention=True, cross_attention_dim=8))


def test_output_dropout_in_training():
    model = fastsd.patch(build(), gri=SMALL)
    block = model.get_submodule(LEVEL_0[0])
    x, context = torch.randn(2, 256, 4), torch.randn(2, 7, 8)
    plain = block(x, None, context, **told(16, 16))
    block.attn1.to_out[1].p = 0.5
    assert torch.equal(block(x, None, context, **told(16, 16)), plain)
    block.train()
    assert relative_error(block(x, None, context, **told(16, 16)), plain) > 1e-3


def test_orientation_is_nothing_to_compile_for():
    """Blocks share their graphs; one more for each order of a map's sides, and they would reach Dynamo's limit of 8."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fastsd.patch(diffusers.UNet2DConditionModel(**TINY, transformer_layers_per_block=2).eval(), gri=SMALL)
    graphs = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph

    for module in model.modules():
        if isinstance(module, BasicTransformerBlock):
            module.compile(fullgraph=True, backend=backend)
    for size in ((16, 16), (12, 20), (20, 12), (24, 16), (16, 24), (32, 8), (8, 32)):
        run(model, *size)
    assert 1 < len(graphs) <= 6  # 6 for the stock model
    torch._dynamo.reset()
