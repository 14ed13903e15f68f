"""Rules: what a user registers is used like what comes with fastsd."""

import pytest
import torch
from torch import nn

import fastsd
from fastsd.nn.replacement import Replacement, settings_of
from fastsd.nn.resnet_block import ResnetBlock2D as FastResnetBlock2D
from fastsd.patching.rules import BUILT_IN
from tests.patching.models import assert_as_stock, blocks, build, call


class Gate(nn.Module):
    """A module of a user's own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x) * self.scale


class Fast:
    """Holds the fast classes, which have the names of the stock ones."""

    calls = 0

    class Gate(Replacement, Gate):
        def forward(self, x):
            Fast.calls += 1
            return self.inner(x) * self.scale if settings_of(self) else Gate.forward(self, x)


def refuse_negative(gate):
    return f"scale is {gate.scale.item():g}, expected a positive one" if gate.scale < 0 else None


GATE = fastsd.Rule("gate", Gate, Fast.Gate, refuse_negative)


@pytest.fixture
def registered():
    fastsd.register_rule(GATE)
    yield GATE
    fastsd.unregister_rule("gate")


@pytest.fixture
def model():
    return nn.Sequential(build(), Gate(2), nn.ModuleDict({"deep": Gate(-1)}))


def is_fast(model):
    return [type(module) is Fast.Gate for module in model.modules() if isinstance(module, Gate)]


def test_registered_rule(registered, model):
    with pytest.warns(UserWarning, match=r"2\.deep because scale is -1, expected a positive one"):
        fastsd.patch(model)
    assert is_fast(model) == [True, False]
    assert all(type(block) is FastResnetBlock2D for block in blocks(model))
    x = torch.randn(3, 2)
    before = Fast.calls
    assert torch.equal(model[1](x), Gate.forward(model[1], x))
    assert Fast.calls == before + 1
    entries = {entry.path: entry for entry in fastsd.report(model).entries}
    assert (entries["1"].rule, entries["1"].replaced, entries["1"].ops) == ("gate", True, ())
    assert entries["2.deep"].reason == "scale is -1, expected a positive one"
    assert "1.inner" not in entries
    fastsd.unpatch(model)
    assert is_fast(model) == [False, False]


def test_strict(registered, model):
    with pytest.raises(fastsd.PatchError, match=r"1 of 34 modules cannot be replaced: 2\.deep: scale is -1"):
        fastsd.patch(model, strict=True)
    assert is_fast(model) == [False, False]


def test_registry(registered):
    assert fastsd.registered_rules() == (*BUILT_IN, GATE)
    with pytest.raises(ValueError, match=r"'gate'.*clash"):
        fastsd.register_rule(GATE)
    with pytest.raises(ValueError, match=r"'another'.*clash"):
        fastsd.register_rule(fastsd.Rule("another", Gate, Fast.Gate, refuse_negative))
    with pytest.raises(ValueError, match=r"'gate'.*clash"):
        fastsd.register_rule(fastsd.Rule("gate", nn.Linear, Fast.Gate, refuse_negative))
    with pytest.raises(TypeError, match="expected each to be a Rule"):
        fastsd.register_rule(Gate)
    with pytest.raises(ValueError, match="got 'nobody'"):
        fastsd.unregister_rule("nobody")
    assert len(fastsd.registered_rules()) == len(BUILT_IN) + 1


def test_unpatch_after_the_rule_is_forgotten(model):
    fastsd.register_rule(GATE)
    try:
        fastsd.patch(nn.Sequential(model[1]))
    finally:
        fastsd.unregister_rule("gate")
    (entry,) = fastsd.report(nn.Sequential(model[1])).entries
    assert (entry.rule, entry.replaced) == ("gate", True)
    assert is_fast(fastsd.unpatch(model)) == [False, False]


def test_rules_of_one_call(model):
    fastsd.patch(nn.Sequential(model[1]), rules=[GATE], strict=True)
    assert is_fast(model) == [True, False]
    fastsd.patch(model, rules=["resnet_block"], strict=True)
    assert all(type(block) is FastResnetBlock2D for block in blocks(model))
    assert is_fast(model) == [True, False]
    fastsd.patch(model, rules=["resnet_block"], backend="reference")
    assert settings_of(model[1]).backend is None
    assert settings_of(blocks(model)[0]).backend == "reference"
    fastsd.unpatch(model)
    assert is_fast(model) == [False, False]
    assert not any(type(block) is FastResnetBlock2D for block in blocks(model))


def test_restricting_rules(model):
    with pytest.warns(UserWarning, match="scale is -1"):
        fastsd.patch(model, rules=[GATE])
    assert not any(type(block) is FastResnetBlock2D for block in blocks(model))
    with pytest.raises(ValueError, match=r"expected one that holds a module that a rule knows \(there is no rule\)"):
        fastsd.patch(model, rules=[])
    with pytest.raises(ValueError, match=r"expected names among resnet_block, skipped_resnet, .*; got 'vae'"):
        fastsd.patch(model, rules=["vae"])


def test_rule_that_takes_a_target_over():
    """A user's own block in the place of fastsd's, on a model that is patched already."""

    class ResnetBlock2D(FastResnetBlock2D):
        pass

    model = build()
    stock = call(model)
    fastsd.patch(model)
    built_in = fastsd.registered_rules()[0]
    rule = fastsd.Rule("mine", built_in.target, ResnetBlock2D, built_in.reject, built_in.op_calls)
    with fastsd.patched(model, rules=[rule]):
        assert {type(block) for block in blocks(model)} == {ResnetBlock2D}
        assert_as_stock(call(model), stock)
    assert {type(block) for block in blocks(model)} == {FastResnetBlock2D}
    assert torch.equal(call(fastsd.unpatch(model)), stock)


class TestBadRules:
    def test_replacement_that_is_no_replacement(self):
        class Other(Gate):
            pass

        for replacement in (Other, Replacement, FastResnetBlock2D):
            rule = fastsd.Rule("gate", Gate, replacement, lambda gate: None)
            model = nn.Sequential(Gate(1))
            with pytest.raises(TypeError, match="rule 'gate': expected a replacement that derives from Replacement"):
                fastsd.patch(model, rules=[rule])
            assert type(model[0]) is Gate

    def test_replacement_with_another_name(self):
        class Other(Replacement, Gate):
            pass

        with pytest.raises(TypeError, match=r"name 'Gate'.*got 'Other'"):
            fastsd.patch(nn.Sequential(Gate(1)), rules=[fastsd.Rule("gate", Gate, Other, lambda gate: None)])

    def test_op_that_is_none(self):
        rule = fastsd.Rule("gate", Gate, Fast.Gate, refuse_negative, lambda gate: {"no_such_op": ()})
        model = nn.Sequential(Gate(1))
        with pytest.raises(ValueError, match=r"expected ops among .*group_norm_silu.*got 'no_such_op'"):
            fastsd.patch(model, rules=[rule], backend="cpu")
        assert type(model[0]) is Gate

    def test_unknown_backend_of_a_rule_without_ops(self):
        with pytest.raises(ValueError, match=r"backend: expected one of .*; got 'numpy'"):
            fastsd.patch(nn.Sequential(Gate(1)), rules=[GATE], backend="numpy")

    def test_reject_that_fails(self):
        model = nn.Sequential(build(), Gate(1))
        rule = fastsd.Rule("gate", Gate, Fast.Gate, lambda gate: gate.no_such_attribute)
        with pytest.raises(AttributeError, match="no_such_attribute"):
            fastsd.patch(model, rules=["resnet_block", rule])
        assert not any(type(block) is FastResnetBlock2D for block in blocks(model))

    def test_library_that_is_not_there(self):
        rule = fastsd.Rule("other", "no_such_library.models.Block", "fastsd.nn.no_such.Block", lambda block: None)
        fastsd.patch(build(), rules=["resnet_block", rule], strict=True)
