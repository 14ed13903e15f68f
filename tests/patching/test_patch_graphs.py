"""CUDA graphs of patched models: what is recorded, replayed, thrown away, refused. Row 15 of the compatibility matrix.

On the CPU a tape stands in for the card: it keeps every operation of torch and the memory that it read, and Python runs
no more when it is replayed. So what a graph would not notice, a tape does not notice either.
"""

import copy
import gc
import inspect
import io
import threading
import weakref
from contextlib import contextmanager
from typing import ClassVar

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastsd
from fastsd.models import example_inputs, flat_output
from fastsd.nn import graphs as graphs_module
from fastsd.nn.graphs import Card, graphs_of
from tests.patching.models import (
    Pipeline,
    assert_as_stock,
    assert_untouched,
    build,
    call,
    fast,
    fingerprint,
    relative_error,
)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result


class Tape:
    """A card whose graphs are lists of operations."""

    device_type = "cpu"
    made: ClassVar = []
    is_busy = False
    error: ClassVar = None

    def __init__(self, device):
        self.events = []
        self.made.append(self)

    @classmethod
    def is_capturing(cls, device):
        return cls.is_busy

    @contextmanager
    def turn(self):
        self.events.append("turn")
        yield

    def warm_up(self, function):
        self.events.append("warm up")
        function()

    def capture(self, function):
        self.events.append("capture")
        if self.error is not None:
            raise self.error
        with _Recorder() as recorder:
            output = function()
        made = {id(leaf) for *_, result in recorder.operations for leaf in tree_leaves(result)}

        def fixed(leaf):
            # the memory of now, wherever a parameter may lie later
            return leaf.detach() if isinstance(leaf, Tensor) and id(leaf) not in made else leaf

        tape = [(f, *tree_map(fixed, (args, kwargs)), result) for f, args, kwargs, result in recorder.operations]
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                leaf.fill_(float("nan"))  # a capture computes nothing
        return lambda: self.replay(tape, tree_leaves(output)), output

    def replay(self, tape, outputs):
        self.events.append("replay")
        now = {}

        def current(leaf):
            return now.get(id(leaf), leaf)

        for function, args, kwargs, result in tape:
            again = function(*tree_map(current, args), **tree_map(current, kwargs))
            now.update({id(old): new for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True)})
        for leaf in outputs:
            if isinstance(leaf, Tensor):
                leaf.copy_(now[id(leaf)])

    def finish(self):
        self.events.append("finish")


@pytest.fixture
def tape(monkeypatch):
    """Graphs are recorded by :class:`Tape`; what happened on all of them."""

    class Own(Tape):
        made: ClassVar = []

    monkeypatch.setattr(graphs_module, "Card", Own)
    return Own


def events(tape, *kinds):
    return [event for card in tape.made for event in card.events if event in (kinds or ("capture", "replay"))]


def graphed(name="unet", *, most=True, seed=0):
    return fastsd.patch(build(name, seed=seed), cuda_graphs=most)


def state(model):
    (part,) = fastsd.report(model).parts
    return part.cuda_graphs


@pytest.mark.parametrize("name", ["unet", "unet_2d_model", "controlnet", "linear_projections", "gligen"])
@torch.no_grad()
def test_row_15_replay_is_as_eager(tape, name):
    model, eager = graphed(name), fastsd.patch(build(name))
    expected = call(eager)
    assert torch.equal(call(model), expected)
    assert torch.equal(call(model), expected)
    assert events(tape) == ["capture", "replay", "replay"]
    assert (state(model).held, state(model).reason) == (1, None)
    other = example_inputs(model, 2, 16, tokens=7)
    other["sample"] = other["sample"] + 1
    assert torch.equal(flat_output(model(**other)), flat_output(eager(**other)))
    assert events(tape)[3:] == ["replay"]


@torch.no_grad()
def test_warm_up_comes_first(tape):
    call(graphed())
    assert events(tape, "turn", "warm up", "capture", "replay") == ["turn", "warm up", "capture", "replay"]


@torch.no_grad()
def test_outputs_are_the_callers_to_keep(tape):
    model = graphed()
    inputs = example_inputs(model, 2, 16, tokens=7) | {"return_dict": True}
    first = model(**inputs)
    kept = first.sample.clone()
    second = model(**(inputs | {"sample": inputs["sample"] + 1}))
    assert type(first) is diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput
    assert torch.equal(first.sample, kept)
    assert not torch.equal(second.sample, kept)
    first.sample.zero_()
    assert torch.equal(model(**inputs).sample, kept)


class TestKeys:
    @torch.no_grad()
    def test_shapes_and_values(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        for inputs in (
            {},
            {"batch": 1},
            {"latent": 8},
            {"encoder_attention_mask": torch.ones(2, 7)},
            {"cross_attention_kwargs": {"scale": 0.5}},
        ):
            assert torch.equal(call(model, **inputs), call(eager, **inputs))
        assert state(model).held == 5
        assert events(tape) == ["capture", "replay"] * 5

    @torch.no_grad()
    def test_strides_and_positions(self, tape):
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7)
        model(**inputs)
        model(**(inputs | {"sample": inputs["sample"].to(memory_format=torch.channels_last)}))
        model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        assert state(model).held == 3

    @torch.no_grad()
    def test_nested_inputs(self, tape):
        """What a ControlNet gives, and an adapter, whose list the model empties."""
        model, eager = graphed(), fastsd.patch(build())
        controlnet = build("controlnet")
        for seed in range(2):
            torch.manual_seed(seed)
            inputs = example_inputs(controlnet, 2, 16, tokens=7)
            down, mid = controlnet(**(inputs | {"return_dict": False}))
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            assert torch.equal(call(model, **residuals), call(eager, **residuals))
        adapter = [torch.randn(2, 4, 16, 16), torch.randn(2, 8, 8, 8)]
        expected = call(eager, down_intrablock_additional_residuals=list(adapter))
        for _ in range(2):
            assert torch.equal(call(model, down_intrablock_additional_residuals=list(adapter)), expected)
        assert events(tape) == ["capture", "replay", "replay", "capture", "replay", "replay"]

    @pytest.mark.parametrize("name", ["unet", "unet_2d_model"])
    @torch.no_grad()
    def test_timesteps(self, tape, name):
        """One graph for every timestep, as a number or on whichever device."""
        model, eager = graphed(name), fastsd.patch(build(name))
        for timestep in (3, 500):
            assert torch.equal(call(model, timestep=timestep), call(eager, timestep=timestep))
        for timestep in (torch.tensor(7), torch.tensor(900)):
            assert torch.equal(call(model, timestep=timestep), call(eager, timestep=timestep))
        assert state(model).held == 2
        sample = example_inputs(model, 2, 16, tokens=7)
        others = {key: value for key, value in sample.items() if key not in ("sample", "timestep")}
        assert torch.equal(
            flat_output(model(sample["sample"], 3, **others)), flat_output(eager(sample["sample"], 3, **others))
        )
        call(model, timestep=3.5)
        assert state(model).reason == "in its last call the timestep was a float, expected a tensor or an integer"

    @torch.no_grad()
    def test_settings_of_torch(self, tape, monkeypatch):
        model, eager = graphed(), fastsd.patch(build())
        call(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(model), call(eager))
            assert torch.is_autocast_cache_enabled()
        with torch.inference_mode():
            assert torch.equal(call(model), call(eager))
        monkeypatch.setenv("FASTSD_BACKEND", "reference")
        assert torch.equal(call(model), call(eager))
        assert state(model).held == 4
        monkeypatch.delenv("FASTSD_BACKEND")
        call(model)
        assert events(tape) == ["capture", "replay"] * 4 + ["replay"]

    @torch.no_grad()
    def test_least_recently_used_goes(self, tape):
        model = graphed(most=2)
        for batch in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, and 2 that of 3
            call(model, batch=batch)
        assert events(tape) == [
            *("capture", "replay", "capture", "replay", "replay"),
            *("capture", "replay", "replay", "capture", "replay"),
        ]
        assert (state(model).most, state(model).held, len(tape.made)) == (2, 2, 1)
        assert events(tape, "finish") == ["finish"] * 2

    @torch.no_grad()
    def test_memory_is_new_after_the_last_graph(self, tape):
        model = graphed(most=1)
        for batch in (1, 2):
            call(model, batch=batch)
        assert (state(model).held, len(tape.made)) == (1, 2)


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
    @pytest.mark.parametrize("change", CHANGES)
    @torch.no_grad()
    def test_row_15_recorded_anew(self, tape, change):
        model, eager = graphed(), fastsd.patch(build())
        for each in (model, eager):
            call(each)
            call(each)
            CHANGES[change](each)
        assert relative_error(call(model), call(eager)) == 0
        assert relative_error(call(model), call(eager)) == 0
        assert events(tape) == ["capture", "replay", "replay"] * 2
        assert (state(model).held, state(model).reason) == (1, None)

    @pytest.mark.parametrize("stale", ["leaf", "data", "freeu", "attribute"])
    @torch.no_grad()
    def test_a_tape_would_not_notice(self, tape, stale, monkeypatch):
        """The tests above say something: without a look at the model they would fail."""
        model, eager = graphed(), fastsd.patch(build())
        call(model)
        monkeypatch.setattr(graphs_module.Frozen, "change", lambda frozen: None)
        for each in (model, eager):
            CHANGES[stale](each)
        assert relative_error(call(model), call(eager)) > 1e-3

    @torch.no_grad()
    def test_weights_written_in_place(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        call(model)
        for each in (model, eager):
            each.conv_in.weight.mul_(2)
            each.load_state_dict({name: value + 0.01 for name, value in each.state_dict().items()})
        assert torch.equal(call(model), call(eager))
        assert events(tape) == ["capture", "replay", "replay"]

    @torch.no_grad()
    def test_scale_of_a_lora(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        for each in (model, eager):
            _lora(each)
        for scale in (1.0, 0.25, 0.25):
            for each in (model, eager):
                each.set_adapters(["default"], [scale])
            assert torch.equal(call(model), call(eager))
        assert events(tape) == ["capture", "replay", "capture", "replay", "replay"]

    @torch.no_grad()
    def test_unloaded_lora(self, tape):
        model = graphed()
        before = call(model)
        _lora(model)
        assert not torch.equal(call(model), before)
        model.delete_adapters("default")
        assert_as_stock(call(model), before)
        assert state(model).reason is None

    @torch.no_grad()
    def test_function_in_the_place_of_a_method(self, tape, monkeypatch):
        model = graphed()
        before = call(model)
        forward = nn.Conv2d.forward
        monkeypatch.setattr(nn.Conv2d, "forward", lambda conv, x: 2 * forward(conv, x))
        assert not torch.equal(call(model), before)

    @torch.no_grad()
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

    @torch.no_grad()
    def test_change_at_every_call(self, tape):
        model = graphed()
        for scale in (1.0, 2.0, 3.0):
            model.mid_block.resnets[0].output_scale_factor = scale
            call(model)
        model.mid_block.resnets[0].output_scale_factor = 4.0
        with pytest.warns(UserWarning, match=r"no graph is used twice: mid_block\.resnets\.0"):
            call(model)
        call(model)
        assert events(tape, "capture") == ["capture"] * 3
        assert "something changes from call to call" in state(model).reason
        assert state(model).held == 0
        fastsd.patch(model, cuda_graphs=True)
        call(model)
        assert (state(model).held, state(model).reason) == (1, None)


class _Doubled(ModelHook):
    def post_forward(self, module, output):
        return (2 * output[0],)


@contextmanager
def _global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


@contextmanager
def _busy(tape):
    tape.is_busy = True
    yield
    tape.is_busy = False


class TestRefusals:
    @staticmethod
    def check(tape, model, reason, **inputs):
        eager = fastsd.unpatch(copy.deepcopy(model))
        assert_as_stock(call(model, **inputs).detach(), call(eager, **inputs).detach())
        assert events(tape) == []
        assert reason in state(model).reason
        assert f"off: {state(model).reason}" in str(fastsd.report(model))

    @torch.no_grad()
    def test_cpu(self):
        model = graphed()
        expected = "the model is on cpu, and there are CUDA graphs only on a CUDA device"
        assert state(model).reason == expected
        assert_as_stock(call(model), call(build()))
        assert state(model).reason == expected

    def test_gradients(self, tape):
        model = graphed()
        self.check(tape, model, "gradients were wanted")
        model(**example_inputs(model, 2, 16, tokens=7))[0].sum().backward()
        assert model.conv_in.weight.grad is not None
        model.requires_grad_(False)
        call(model)
        assert events(tape) == ["capture", "replay"]

    @torch.no_grad()
    def test_forward_hook(self, tape):
        model = graphed()
        calls = []
        handle = model.up_blocks[0].register_forward_hook(lambda module, args, output: calls.append(1))
        self.check(tape, model, "up_blocks.0 has a forward hook, which a graph would run only once")
        call(model)
        assert len(calls) == 2 + 1  # the copy in the check has it too
        handle.remove()
        call(model)
        assert events(tape) == ["capture", "replay"]

    @torch.no_grad()
    def test_offloading_hook_on_a_module(self, tape):
        model = graphed()
        add_hook_to_module(model.mid_block, ModelHook())
        self.check(tape, model, "mid_block has an instance forward (an offloading or casting hook?)")

    @torch.no_grad()
    def test_layerwise_casting(self, tape):
        model = graphed()
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        call(model)
        assert "has an instance forward" in state(model).reason

    @torch.no_grad()
    def test_compiled_block(self, tape):
        model = graphed()
        model.mid_block.compile(backend="eager")
        assert state(model).reason == "mid_block is compiled"

    @torch.no_grad()
    def test_two_devices(self, tape):
        model = graphed()
        model.conv_out.to("meta")
        assert "the model is on cpu and meta" in state(model).reason

    @torch.no_grad()
    def test_weight_of_another_kind(self, tape):
        class Quantised(nn.Parameter):
            pass

        model = graphed()
        model.conv_out.weight = Quantised(model.conv_out.weight.data)
        assert state(model).reason.startswith("conv_out.weight is a ")

    @torch.no_grad()
    def test_inputs(self, tape):
        model = graphed()
        self.check(tape, model, "an input was a Generator", cross_attention_kwargs={"unknown": torch.Generator()})

    @torch.no_grad()
    def test_just_now(self, tape):
        model = graphed()
        expected = call(fastsd.patch(build()))
        for context, reason in (
            (_Recorder(), "a mode that sees every operation"),
            (torch.overrides.BaseTorchFunctionMode(), "a mode that sees every operation"),
            (_global_hook(), "a hook on all modules is registered"),
            (_busy(tape), "a capture of somebody else's is in progress"),
        ):
            with context:
                assert_as_stock(call(model), expected)
            assert events(tape) == []
            assert reason in state(model).reason
        with torch.device("cpu"):
            call(model)
        assert events(tape) == ["capture", "replay"]

    @torch.no_grad()
    def test_transforms(self, tape):
        model = graphed("no_attention")
        inputs = example_inputs(model, 2, 16, tokens=7)

        def sample(x):
            return model(**(inputs | {"sample": x}))[0]

        torch.func.jvp(sample, (inputs["sample"],), (torch.ones_like(inputs["sample"]),))
        assert events(tape) == []
        assert "torch.func" in state(model).reason

    @torch.no_grad()
    def test_row_15_failed_capture(self, tape):
        model = graphed()
        expected = call(fastsd.patch(build()))
        tape.error = RuntimeError("operation not permitted when stream is capturing\nmore lines")
        try:
            raise KeyError("of the caller's")
        except KeyError:
            with pytest.warns(UserWarning, match="without CUDA graphs: a capture failed"):
                assert torch.equal(call(model), expected)
        tape.error = None
        assert torch.equal(call(model), expected)  # without another warning
        assert events(tape) == ["capture"]
        assert state(model).reason == "a capture failed (operation not permitted when stream is capturing)"
        assert state(model).held == 0

    @torch.no_grad()
    def test_errors_of_the_model(self, tape):
        model = graphed()
        with pytest.raises(RuntimeError) as stock:
            call(build(), encoder_hidden_states=torch.randn(2, 7, 5))
        with pytest.raises(RuntimeError) as ours:
            call(model, encoder_hidden_states=torch.randn(2, 7, 5))
        assert str(ours.value) == str(stock.value)
        call(model)
        assert (state(model).held, state(model).reason) == (1, None)

    @torch.no_grad()
    def test_forward_that_changes_the_model(self, tape):
        class Counting(AttnProcessor):
            calls = 0

            def __call__(self, *args, **kwargs):
                self.calls += 1
                return super().__call__(*args, **kwargs)

        model = graphed()
        model.set_attn_processor(Counting())
        with pytest.warns(UserWarning, match="its forward changes the model"):
            call(model)
        calls = model.mid_block.attentions[0].transformer_blocks[0].attn1.processor.calls
        call(model)
        assert model.mid_block.attentions[0].transformer_blocks[0].attn1.processor.calls == calls + 8

    @torch.no_grad()
    def test_first_call_that_changes_the_model(self, tape):
        """What is kept for each shape is fine, but what was recorded before it is not used again."""

        class Caching(AttnProcessor):
            def __init__(self):
                self.sizes = {}

            def __call__(self, attn, hidden_states, *args, **kwargs):
                self.sizes.setdefault(len(hidden_states), len(self.sizes))
                return super().__call__(attn, hidden_states, *args, **kwargs)

        model = graphed()
        model.set_attn_processor(Caching())
        for batch, held in ((1, 1), (2, 0), (2, 1), (1, 2), (2, 2)):
            call(model, batch=batch)
            assert state(model).held == held
            assert (state(model).reason is None) == (held > 0)

    @pytest.mark.parametrize(
        ("forward", "reason"),
        [
            (lambda self, sample, timestep: sample.add_(1), "writes into its inputs"),
            (lambda self, sample, timestep: (sample + 1, object()), "its output holds a object"),
        ],
        ids=["in_place", "object"],
    )
    @torch.no_grad()
    def test_forward_of_its_own_kind(self, tape, forward, reason):
        cls = type("Net", (nn.Module,), {"forward": forward})
        model = cls()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        with pytest.warns(UserWarning, match=reason):
            model(torch.zeros(2), 1)
        assert reason in state(model).reason


class TestTrace:
    @torch.no_grad()
    def test_row_15_unpatch(self, tape):
        model = build()
        before, stock = fingerprint(model), call(model)
        fastsd.patch(model, cuda_graphs=True)
        call(model)
        assert_untouched(fastsd.unpatch(model), before)
        assert torch.equal(call(model), stock)
        assert state(model) is None

    def test_names(self):
        model, stock = graphed(), build()
        assert type(model) is type(stock)
        assert list(model.state_dict()) == list(stock.state_dict())
        assert inspect.signature(model.forward) == inspect.signature(stock.forward)
        assert model.forward.__name__ == "forward"

    @pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle_1", "pickle_5", "save_pretrained", "replica"])
    @torch.no_grad()
    def test_row_15_copies_are_stock(self, tape, how, tmp_path):
        model = graphed()
        expected = call(build())
        call(model)
        if how == "save_pretrained":
            model.save_pretrained(tmp_path)
            copied = type(model).from_pretrained(tmp_path)
        elif how == "replica":
            copied = model._replicate_for_data_parallel()
        elif how == "copy":
            copied = copy.copy(model)
        elif how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file, pickle_protocol=int(how[-1]))
            assert b"fastsd" not in file.getvalue()
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        assert type(copied) is type(model)
        assert not {"forward", "__reduce_ex__", "_replicate_for_data_parallel", "_fastsd_graphs"} & set(vars(copied))
        if how != "replica":  # whose parameters DataParallel sets
            assert_as_stock(call(copied), expected)
        call(model)
        # saving writes into the configuration, which a forward may read
        anew = ["capture"] if how == "save_pretrained" else []
        assert events(tape) == ["capture", "replay", *anew, "replay"]

    @torch.no_grad()
    def test_row_15_hook_around_the_forward(self, tape):
        """What offloads a whole model runs at every call; a copy and the unpatched model keep it."""
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7) | {"return_dict": False}
        (plain,) = model(**inputs)
        (stock,) = build()(**inputs)
        add_hook_to_module(model, _Doubled())
        for _ in range(2):
            assert torch.equal(model(**inputs)[0], 2 * plain)
        assert events(tape) == ["capture", "replay", "capture", "replay", "replay"]
        assert state(model).reason is None
        copied = copy.deepcopy(model)
        assert_as_stock(copied(**inputs)[0], 2 * stock)
        assert events(tape, "capture") == ["capture"] * 2
        fastsd.unpatch(model)
        assert torch.equal(model(**inputs)[0], 2 * stock)
        remove_hook_from_module(model)
        assert torch.equal(model(**inputs)[0], stock)
        fastsd.patch(model, cuda_graphs=True)  # over what the hook has left
        assert torch.equal(model(**inputs)[0], plain)
        assert events(tape, "capture") == ["capture"] * 3
        fastsd.unpatch(model)
        assert "forward" not in vars(model)

    @torch.no_grad()
    def test_hooks_of_torch_on_the_model(self, tape):
        model = graphed()
        calls = []
        model.register_forward_pre_hook(lambda module, args: calls.append(1))
        for _ in range(3):
            call(model)
        assert len(calls) == 3
        assert events(tape) == ["capture", "replay", "replay", "replay"]

    @torch.no_grad()
    def test_row_15_compile(self, tape):
        model = graphed()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_as_stock(call(compiled), call(build()))
        assert events(tape) == []
        assert "it is compiled" in state(compiled).reason
        assert state(model).reason is None
        model.compile(backend="eager", fullgraph=True)
        assert_as_stock(call(model), call(build()))
        assert events(tape) == []
        assert "it is compiled" in state(model).reason

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
    @torch.no_grad()
    def test_row_15_export(self, tape, strict):
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7)
        program = torch.export.export(model, (), inputs, strict=strict)
        assert_as_stock(flat_output(program.module()(**inputs)), call(build()))
        assert events(tape) == []

    @torch.no_grad()
    def test_row_15_two_threads(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        inputs = [example_inputs(model, 1, 8, tokens=7) for _ in range(2)]
        inputs[1]["sample"] = inputs[1]["sample"] + 1
        expected = [eager(**each)[0] for each in inputs]
        failures = []

        @torch.no_grad()
        def work(each, right):
            for _ in range(10):
                if not torch.equal(model(**each)[0], right):
                    failures.append(each)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert events(tape, "capture") == ["capture"]

    @torch.no_grad()
    def test_two_models(self, tape):
        one, other = graphed(seed=1), graphed(seed=2)
        first = call(one), call(other)
        assert torch.equal(call(one), first[0])
        assert torch.equal(call(other), first[1])
        fastsd.unpatch(one)
        assert torch.equal(call(other), first[1])


class TestPatch:
    def test_again(self):
        model = graphed()
        before = fingerprint(model)
        assert_untouched(fastsd.patch(model), before)
        assert_untouched(fastsd.patch(model, cuda_graphs=True), before)
        assert_untouched(fastsd.patch(model, cuda_graphs=8), before)
        assert state(fastsd.patch(model, cuda_graphs=3)).most == 3
        assert state(fastsd.patch(model)).most == 3
        assert state(fastsd.patch(model, cuda_graphs=False)) is None
        assert all(fast(model))
        assert "forward" not in vars(model)

    @torch.no_grad()
    def test_patched(self, tape):
        model = build()
        before = fingerprint(model)
        with fastsd.patched(model, cuda_graphs=2):
            call(model)
            assert state(model).held == 1
        assert_untouched(model, before)
        fastsd.patch(model, cuda_graphs=4)
        call(model)
        earlier = graphs_of(model)
        with fastsd.patched(model, cuda_graphs=False):
            assert state(model) is None
        assert graphs_of(model) is earlier
        call(model)
        assert state(model).held == 1
        for inside in (2, False):
            fastsd.patch(model, cuda_graphs=4)
            with fastsd.patched(model, cuda_graphs=inside):
                fastsd.unpatch(model)
            assert state(model) is None

    def test_pipeline(self):
        pipe = Pipeline(unet=build(), vae=build("vae"), controlnet=[build("controlnet")])
        report = fastsd.report(fastsd.patch(pipe, cuda_graphs=True))
        assert {part.name: part.cuda_graphs is not None for part in report.parts} == {
            "unet": True,
            "vae": False,
            "controlnet.0": True,
        }
        fastsd.unpatch(pipe)
        assert all(part.cuda_graphs is None for part in fastsd.report(pipe).parts)

    def test_inside_of_another_model(self):
        model = graphed()
        fastsd.unpatch(nn.Sequential(model))
        assert "forward" not in vars(model)

    @pytest.mark.parametrize("wrong", [-1, 2.0, "8"], ids=repr)
    def test_wrong_number(self, wrong):
        model = build()
        before = fingerprint(model)
        with pytest.raises(ValueError, match="cuda_graphs: expected True, False or a number of graphs"):
            fastsd.patch(model, cuda_graphs=wrong)
        assert_untouched(model, before)

    def test_model_that_is_not_called_by_its_forward(self):
        model = build("vae")
        before = fingerprint(model)
        with pytest.raises(ValueError, match="cuda_graphs: expected a U-Net, a ControlNet or a pipeline"):
            fastsd.patch(model, cuda_graphs=True)
        assert_untouched(model, before)

    def test_hook_before_patch(self):
        model = build()
        add_hook_to_module(model, ModelHook())
        before = fingerprint(model)
        with pytest.raises(fastsd.PatchError, match="has an instance forward"):
            fastsd.patch(model, cuda_graphs=True)
        assert_untouched(model, before)
        remove_hook_from_module(model)
        assert state(fastsd.patch(model, cuda_graphs=True)) is not None


@pytest.mark.gpu
class TestOnACard:
    @pytest.mark.parametrize("name", ["unet", "controlnet"])
    @torch.no_grad()
    def test_replay_is_as_eager(self, name):
        model, eager = graphed(name).cuda(), fastsd.patch(build(name)).cuda()
        for batch in (1, 2, 1, 2):
            inputs = {key: _to_card(value) for key, value in example_inputs(model, batch, 16, tokens=7).items()}
            assert_as_stock(flat_output(model(**inputs)), flat_output(eager(**inputs)))
        assert (state(model).held, state(model).reason) == (2, None)

    @torch.no_grad()
    def test_changes(self):
        model, eager = graphed().cuda(), fastsd.patch(build()).cuda()
        inputs = {key: _to_card(value) for key, value in example_inputs(model, 2, 16, tokens=7).items()}
        for change in (
            lambda each: each.conv_in.weight.mul_(2),
            lambda each: _lora(each.cpu()) or each.cuda(),
            lambda each: each.delete_adapters("default"),
            lambda each: each.to(memory_format=torch.channels_last),
            _freeu,
        ):
            model(**inputs)
            for each in (model, eager):
                change(each)
            assert_as_stock(flat_output(model(**inputs)), flat_output(eager(**inputs)))
            assert (state(model).held, state(model).reason) == (1, None)

    @torch.no_grad()
    def test_streams_and_memory(self):
        """Calls on several streams, and more shapes than graphs are kept."""
        model, eager = graphed(most=1).cuda(), fastsd.patch(build()).cuda()
        inputs = {key: _to_card(value) for key, value in example_inputs(model, 1, 16, tokens=7).items()}
        for step in range(6):
            sample = inputs["sample"].repeat(1 + step // 2 % 2, 1, 1, 1) + step
            tokens = inputs["encoder_hidden_states"].expand(len(sample), -1, -1).contiguous()
            now = inputs | {"sample": sample, "encoder_hidden_states": tokens, "timestep": step}
            expected = flat_output(eager(**now))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                actual = flat_output(model(**now))
            stream.synchronize()
            assert_as_stock(actual, expected)
        assert (state(model).held, state(model).reason) == (1, None)

    @torch.no_grad()
    def test_failed_capture(self):
        """The card stays usable: what cannot be recorded runs eagerly, also its random numbers."""
        model = graphed().cuda()
        model.mid_block.resnets[0].nonlinearity = _Waits()
        inputs = {key: _to_card(value) for key, value in example_inputs(model, 2, 16, tokens=7).items()}
        with pytest.warns(UserWarning, match="a capture failed"):
            first = flat_output(model(**inputs))
        assert torch.equal(flat_output(model(**inputs)), first)
        assert torch.randn(4, device="cuda").isfinite().all()

    def test_card_is_current_again(self):
        card = Card(torch.device("cuda", 0))
        before = torch.cuda.current_stream()
        with pytest.raises(RuntimeError):
            card.capture(lambda: torch.ones(1, device="cuda").item())
        assert torch.cuda.current_stream() == before


class _Waits(nn.SiLU):
    def forward(self, x):
        return super().forward(x) + 0 * x.sum().item()


def _to_card(value):
    return value.cuda() if isinstance(value, Tensor) else value
