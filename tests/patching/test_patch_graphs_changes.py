"""CUDA graphs of models that change: recorded anew. Row 15 of the compatibility matrix."""

import copy
import gc
import random
import threading
import weakref
from collections import OrderedDict
from functools import partial, wraps
from types import BuiltinMethodType
from typing import ClassVar

import numpy
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import nn

import fastsd
from fastsd.nn import frozen
from fastsd.nn import graphs as graphs_module
from fastsd.nn.graphs import graphs_of
from tests.combinations import each_value
from tests.patching.models import assert_as_stock, call, relative_error
from tests.patching.tape import build, events, graphed, state


def _lora(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))


def _processor(model):
    model.set_attn_processor(AttnProcessor())
    model.mid_block.attentions[0].transformer_blocks[0].attn1.processor.scale = [1.0]


def _freeu(model):
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _assign(model):
    other = {name: value + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def _replace_module(model):
    model.mid_block.resnets[0] = build(seed=1).mid_block.resnets[0]


def _replace_leaf(model):
    model.conv_out = copy.deepcopy(model.conv_out).requires_grad_(False)
    model.conv_out.weight.mul_(2)


def _new_data(model):
    model.conv_in.weight.data = model.conv_in.weight.data * 2


CHANGES = {
    "lora": _lora,
    "lora_off": lambda model: (_lora(model), model.disable_adapters()),
    "freeu": _freeu,
    "assign": _assign,
    "module": _replace_module,
    "leaf": _replace_leaf,
    "data": _new_data,
    "double": lambda model: model.double(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "processor": _processor,
    "attribute": lambda model: setattr(model.mid_block.resnets[0], "output_scale_factor", 2.0),
    "unpatched_part": lambda model: fastsd.unpatch(model.mid_block),
    "backend": lambda model: fastsd.patch(model, backend="reference"),
    "train": lambda model: model.train(),
    "fused_projections": lambda model: model.fuse_qkv_projections(),
}


class TestChanges:
    @each_value("change,is_after_something_equal", list(CHANGES), [False, True])
    def test_row_15_recorded_anew(self, tape, change, is_after_something_equal):
        """An equal object in the place of another is no change, and hides none."""
        model, eager = graphed(), fastsd.patch(build())
        expected = ["capture", "replay", "replay"]
        for each in (model, eager):
            call(each)
            if is_after_something_equal:
                block, attn = each.mid_block.resnets[0], each.mid_block.attentions[0].transformer_blocks[0].attn1
                block.output_scale_factor = float(repr(block.output_scale_factor))
                attn.processor = copy.copy(attn.processor)
                block.own = [1.5, {"a": (2,)}]
                call(each)
                block.own = [1.5, {"a": (2,)}]
            call(each)
        if is_after_something_equal:
            expected = ["capture", "replay", *expected]
        assert events(tape) == expected
        for each in (model, eager):
            CHANGES[change](each)
        for _ in range(2):
            assert relative_error(call(model), call(eager)) == 0
        assert events(tape) == [*expected, "capture", "replay", "replay"]
        assert (state(model).held, state(model).reason) == (1, None)

    @pytest.mark.parametrize("stale", ["leaf", "data", "freeu", "attribute"])
    def test_a_tape_would_not_notice(self, tape, stale, monkeypatch):
        """The tests above say something: without a look at the model they would fail."""
        model, eager = graphed(), fastsd.patch(build())
        call(model)
        monkeypatch.setattr(graphs_module.Frozen, "change", lambda frozen: None)
        for each in (model, eager):
            CHANGES[stale](each)
        assert relative_error(call(model), call(eager)) > 1e-3

    def test_weights_written_in_place(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        call(model)
        for each in (model, eager):
            each.conv_in.weight.mul_(2)
            each.load_state_dict({name: value + 0.01 for name, value in each.state_dict().items()})
        assert torch.equal(call(model), call(eager))
        assert events(tape) == ["capture", "replay", "replay"]

    def test_scale_of_a_lora(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        for each in (model, eager):
            _lora(each)
        for scale in (1.0, 0.25, 0.25):
            for each in (model, eager):
                each.set_adapters(["default"], [scale])
            assert torch.equal(call(model), call(eager))
        assert events(tape) == ["capture", "replay", "capture", "replay", "replay"]

    def test_unloaded_lora(self, tape):
        model = graphed()
        before = call(model)
        _lora(model)
        assert not torch.equal(call(model), before)
        model.delete_adapters("default")
        assert_as_stock(call(model), before)
        assert state(model).reason is None

    def test_function_in_the_place_of_a_method(self, tape, monkeypatch):
        model = graphed()
        before = call(model)
        forward = nn.Conv2d.forward
        monkeypatch.setattr(nn.Conv2d, "forward", lambda conv, x: 2 * forward(conv, x))
        assert not torch.equal(call(model), before)

    def test_old_graphs_are_let_go(self, tape):
        model = graphed()
        call(model, batch=1)
        call(model, batch=2)
        old = [weakref.ref(graph) for graph in graphs_of(model)._held.values()]
        _lora(model)
        call(model)
        gc.collect()
        assert [graph() for graph in old] == [None, None]
        assert state(model).held == 1
        assert len(tape.made) == 2

    def test_memory_is_free_before_a_model_moves(self, tape):
        model = graphed()
        call(model)
        held = []

        def move(tensor):
            held.append(state(model).held)
            return tensor.to("meta")

        model._apply(move)
        assert held == [1, *[0] * (len(held) - 1)]  # the first is a try
        assert events(tape, "finish") == ["finish"]
        fastsd.unpatch(model)
        assert "_apply" not in vars(model)

    def test_move_to_where_it_is(self, tape):
        model = graphed()
        for _ in range(3):
            call(model)
            model.to("cpu")
        assert events(tape) == ["capture", "replay", "replay", "replay"]

    def test_numbers_that_each_call_sets_anew(self, tape, monkeypatch):
        """Equal ones are no change, and do not take another look at the whole model; as scales of a LoRA are set."""
        model, eager = graphed(), fastsd.patch(build())
        for each in (model, eager):
            _lora(each)
        looks = []
        look = graphs_module.Frozen.__init__
        monkeypatch.setattr(graphs_module.Frozen, "__init__", lambda *args: looks.append(1) or look(*args))
        for _ in range(3):
            scale = {"cross_attention_kwargs": {"scale": float("0.7")}}
            assert torch.equal(call(model, **scale), call(eager, **scale))
        assert events(tape) == ["capture", "replay", "replay", "replay"]
        assert len(looks) == 1


class _Slotted:
    __slots__ = ("factor",)


class _Factor:
    def __init__(self):
        self.factors = [1.0]

    def of(self, x):
        return x * self.factors[0]


def _times(factors, x):
    return x * factors[0]


def _factor_of(x):
    return x


def _scale_of_a_class():
    class Held:
        scale = 1.0

    return Held


class _Scaled(AttnProcessor):
    """Multiplies by what it is given in one of many ways."""

    factors: ClassVar = [1.0]

    def __init__(self, factor):
        self.factor = factor

    def helper(self):
        return 1.0

    def __call__(self, *args, **kwargs):
        y = super().__call__(*args, **kwargs) * self.helper() * self.factors[0]
        if isinstance(self.factor, type):
            return y * self.factor.scale
        if isinstance(self.factor, BuiltinMethodType):
            return y * self.factor(0)
        return self.factor(y) if callable(self.factor) else y * self.factor


class _Doubling(_Scaled):
    def helper(self):
        return 2.0


# what makes a processor's attribute, and what changes it where it lies
HIDDEN = {
    "bound_method": (lambda: _Factor().of, lambda processor: processor.factor.__self__.factors.insert(0, 2.0)),
    "partial": (lambda: partial(_times, [1.0]), lambda processor: processor.factor.args[0].insert(0, 2.0)),
    "class_attribute": (lambda: 1.0, lambda processor: processor.factors.insert(0, 2.0)),
    "attributes": (lambda: 1.0, lambda processor: setattr(processor, "__dict__", {"factor": 2.0})),
    "attribute_of_a_class": (_scale_of_a_class, lambda processor: setattr(processor.factor, "scale", 2.0)),
    "builtin_method": (lambda: [1.0].__getitem__, lambda processor: processor.factor.__self__.insert(0, 2.0)),
    "class": (lambda: 1.0, lambda processor: setattr(processor, "__class__", _Doubling)),
}


def _processed(model, processor):
    model.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor
    return processor


class TestHidden:
    """What a look at a model has to go far for."""

    @pytest.fixture(autouse=True)
    def class_stays(self, monkeypatch):
        monkeypatch.setattr(_Scaled, "factors", [1.0])

    @pytest.mark.parametrize("way", HIDDEN)
    def test_change(self, tape, way):
        make, change = HIDDEN[way]
        model, eager = graphed(), fastsd.patch(build())
        processors = [_processed(each, _Scaled(make())) for each in (model, eager)]
        assert torch.equal(call(model), call(eager))
        before = call(model)
        for processor in processors[: 1 if way == "class_attribute" else 2]:
            change(processor)
        assert torch.equal(call(model), call(eager))
        assert not torch.equal(call(model), before)
        assert events(tape, "capture") == ["capture"] * 2

    def test_change_inside_of_something_equal(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        processors = [_processed(each, _Scaled(partial(_times, [1.0]))) for each in (model, eager)]
        call(model)
        for processor in processors:
            processor.factor = partial(_times, [1.0])
        call(model)
        assert events(tape) == ["capture", "replay", "replay"]
        for processor in processors:
            processor.factor.args[0][0] = 2.0
        assert torch.equal(call(model), call(eager))

    def test_method_of_a_class(self, tape, monkeypatch):
        model, eager = graphed(), fastsd.patch(build())
        for each in (model, eager):
            _processed(each, _Scaled(1.0))
        before = call(model)
        monkeypatch.setattr(_Scaled, "helper", lambda processor: 2.0)
        assert torch.equal(call(model), call(eager))
        assert not torch.equal(call(model), before)


def _wrapped(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class _Broken:
    def __getattr__(self, name):
        raise KeyError(name)

    @property
    def __dict__(self):
        raise KeyError("no")


class TestUnknown:
    """Code of nobody knows whom runs without graphs: no look can tell what it reads."""

    @pytest.fixture(autouse=True)
    def nothing_of_the_tests_is_known(self, tape, monkeypatch):
        monkeypatch.setattr(frozen, "_KNOWN", frozen._KNOWN - {"test_patch_graphs_changes"})

    @staticmethod
    def check(tape, model, reason):
        for _ in range(2):
            call(model)
        assert reason in state(model).reason
        assert events(tape) == []

    def test_processor(self, tape):
        model = graphed()
        _processed(model, _Scaled(1.0))
        self.check(tape, model, "the class _Scaled is code of test_patch_graphs_changes, of which nobody can tell")

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (_times, "processor.own is code of test_patch_graphs_changes"),
            (_Factor().of, "is code of test_patch_graphs_changes"),
            (partial(_times, [1.0]), "is code of test_patch_graphs_changes"),
            (_Factor, "the class _Factor is code of test_patch_graphs_changes"),
            (torch.no_grad()(_factor_of), "processor.own is code of test_patch_graphs_changes"),
            (torch.compile(_factor_of, backend="eager"), "is code of test_patch_graphs_changes"),
            (_Slotted(), "processor.own is a _Slotted, in which no change would be seen"),
            (numpy.ones(2), "processor.own is a ndarray, in which no change would be seen"),
            (random.Random(0), "processor.own is a Random, in which no change would be seen"),
            (iter([1]), "processor.own is a list_iterator, in which no change would be seen"),
        ],
        ids=["function", "method", "partial", "class", "decorated", "compiled", "slots", "array", "random", "iterator"],
    )
    def test_attribute(self, tape, value, reason):
        model = graphed()
        _processed(model, AttnProcessor()).own = value
        self.check(tape, model, reason)

    @pytest.mark.parametrize(
        "value",
        [numpy.float32(1), object(), threading.Lock(), weakref.ref(_Factor), int | None, ..., OrderedDict(a=1)],
        ids=["number", "object", "lock", "weakref", "union", "ellipsis", "dictionary"],
    )
    def test_attribute_that_cannot_matter(self, tape, value):
        model = graphed()
        _processed(model, AttnProcessor()).own = value
        for _ in range(2):
            call(model)
        assert events(tape) == ["capture", "replay", "replay"]

    @pytest.mark.parametrize(
        "made",
        [
            lambda function: lambda *args, **kwargs: function(*args, **kwargs),
            _wrapped,
            lambda function: torch.no_grad()(_wrapped(function)),
            lambda function: staticmethod(_times),
            lambda function: property(lambda processor: None),
            lambda function: _Factor(),
        ],
        ids=["function", "wrapped", "decorated", "static", "property", "object"],
    )
    def test_in_a_class_of_diffusers(self, tape, made, monkeypatch):
        model = graphed()
        _processed(model, AttnProcessor())
        value = made(AttnProcessor.__call__)
        name = "own" if isinstance(value, staticmethod | property | _Factor) else "__call__"
        monkeypatch.setattr(AttnProcessor, name, value, raising=False)
        self.check(tape, model, f"the class AttnProcessor.{name} is code of test_patch_graphs_changes")

    def test_in_a_module_of_torch(self, tape, monkeypatch):
        model = graphed()
        call(model)
        attend = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: 2 * attend(*args, **kwargs)
        )
        call(model)
        assert "torch.nn.functional.scaled_dot_product_attention is code of test_patch_graphs_ch" in state(model).reason
        monkeypatch.undo()
        assert events(tape) == ["capture", "replay"]

    def test_object_that_breaks_a_look(self, tape):
        model = graphed()
        _processed(model, AttnProcessor()).own = _Broken()
        self.check(tape, model, "a look at the model failed")

    def test_it_lasts_as_long_as_its_reason(self, tape):
        model = graphed()
        processor = _processed(model, AttnProcessor())
        processor.own = _times
        call(model)
        del processor.own
        call(model)
        assert events(tape) == ["capture", "replay"]
