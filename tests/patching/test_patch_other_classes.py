"""Replaced modules whose class another library has changed: left alone, reported, unpatched where that is safe."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import fastsd
from fastsd.nn.replacement import settings_of
from tests.patching.models import assert_as_stock, build, call

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def swap_forward(module):
    """As tomesd does: a subclass of the present class that overrides forward."""

    class Block(type(module)):
        _parent = type(module)

        def forward(self, hidden_states, *args, **kwargs):
            return 0.5 * super().forward(hidden_states, *args, **kwargs)

    module.__class__ = Block


def mix_in(module):
    """As FSDP2 does."""
    cls = type(module)
    module.__class__ = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {"__deepcopy__": None})


def swapped():
    """A patched model in which another library has changed a block, and what that computes."""
    model = build()
    swap_forward(model.get_submodule(BLOCK))
    expected = call(model)
    model = fastsd.patch(build())
    swap_forward(model.get_submodule(BLOCK))
    return model, expected


def entry_of(model):
    return next(entry for entry in fastsd.report(model).entries if entry.path == BLOCK)


@pytest.mark.parametrize("arguments", [{}, {"backend": "reference"}, {"gri": fastsd.GRI(4, 2)}], ids=str)
def test_row_16_a_second_patch_leaves_a_swapped_class_alone(arguments):
    model, expected = swapped()
    block = model.get_submodule(BLOCK)
    cls = type(block)
    with pytest.warns(UserWarning, match=r"its class is .*Block by now"):
        fastsd.patch(model, **arguments)
    assert type(block) is cls
    if "gri" not in arguments:
        assert_as_stock(call(model), expected)


def test_row_16_strict_refuses_a_swapped_class():
    model, expected = swapped()
    with pytest.raises(fastsd.PatchError, match=r"its class is .*Block by now"):
        fastsd.patch(model, strict=True)
    assert_as_stock(call(model), expected)


def test_row_16_a_swapped_class_outlives_a_with_block():
    model, expected = swapped()
    with pytest.warns(UserWarning, match="by now"), fastsd.patched(model, backend="reference"):
        assert_as_stock(call(model), expected)
    assert_as_stock(call(model), expected)


def test_row_16_a_swapped_class_is_reported():
    model, _ = swapped()
    entry = entry_of(model)
    assert not entry.replaced
    assert "by now" in entry.reason


def test_row_16_unpatch_says_what_to_undo():
    model, expected = swapped()
    with pytest.raises(fastsd.PatchError, match=f"{BLOCK}: .*undo what was done"):
        fastsd.unpatch(model)
    assert_as_stock(call(model), expected)
    block = model.get_submodule(BLOCK)
    block.__class__ = block._parent
    stock = call(build())
    assert torch.equal(call(fastsd.unpatch(model)), stock)


def test_row_16_a_mixed_in_class_stays():
    model = build()
    stock = call(model)
    fastsd.patch(model)
    block = model.get_submodule(BLOCK)
    mix_in(block)
    for arguments in ({}, {"strict": True}, {"backend": "reference"}):
        fastsd.patch(model, **arguments)
        assert isinstance(block, FSDPModule)
        assert settings_of(block).backend == arguments.get("backend")
        assert entry_of(model).replaced
        assert entry_of(model).reason is None
        assert_as_stock(call(model), stock)
    fastsd.unpatch(model)
    assert [base.__module__.split(".")[0] for base in type(block).__bases__] == ["torch", "diffusers"]
    assert settings_of(block) is None
    assert torch.equal(call(model), stock)
