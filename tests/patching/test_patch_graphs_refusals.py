"""Calls and models that no CUDA graph serves: they run as without graphs, and the report says why."""

import copy
import gc
import weakref
from contextlib import contextmanager

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import fastsd
from fastsd.models import example_inputs
from fastsd.nn.graph_calls import takes_timestep
from tests.patching.models import assert_as_stock, call
from tests.patching.tape import Recorder, build, events, graphed, state


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

    def test_cpu(self):
        model = graphed()
        expected = "the model is on cpu, and there are CUDA graphs only on a CUDA device"
        assert state(model).reason == expected
        assert_as_stock(call(model), call(build()))
        assert state(model).reason == expected

    @pytest.mark.gradients
    def test_gradients(self, tape):
        model = graphed()
        self.check(tape, model, "gradients were wanted")
        model(**example_inputs(model, 2, 16, tokens=7))[0].sum().backward()
        assert model.conv_in.weight.grad is not None
        model.requires_grad_(False)
        call(model)
        assert events(tape) == ["capture", "replay"]

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

    def test_offloading_hook_on_a_module(self, tape):
        model = graphed()
        add_hook_to_module(model.mid_block, ModelHook())
        self.check(tape, model, "mid_block has an instance forward (an offloading or casting hook?)")

    def test_layerwise_casting(self, tape):
        model = graphed()
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        call(model)
        assert "has an instance forward" in state(model).reason

    def test_compiled_block(self, tape):
        model = graphed()
        model.mid_block.compile(backend="eager")
        assert state(model).reason == "mid_block is compiled"

    def test_two_devices(self, tape):
        model = graphed()
        model.conv_out.to("meta")
        assert "the model is on cpu and meta" in state(model).reason

    def test_weight_of_another_kind(self, tape):
        class Quantised(nn.Parameter):
            pass

        model = graphed()
        model.conv_out.weight = Quantised(model.conv_out.weight.data)
        assert state(model).reason.startswith("conv_out.weight is a ")

    def test_inputs(self, tape):
        model = graphed()
        self.check(tape, model, "an input was a Generator", cross_attention_kwargs={"unknown": torch.Generator()})

    def test_just_now(self, tape):
        model = graphed()
        expected = call(fastsd.patch(build()))
        for context, reason in (
            (Recorder(), "a mode that sees every operation"),
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

    def test_change_while_somebody_captures(self, tape):
        """Nothing is freed then, which would wait for the card."""
        model = graphed()
        call(model)
        model.mid_block.resnets[0].output_scale_factor = 2.0
        with _busy(tape):
            call(model)
        assert events(tape, "finish") == []
        call(model)
        assert events(tape, "finish") == ["finish"]

    def test_failed_capture_leaves_nothing_behind(self, tape, monkeypatch):
        class Failure(RuntimeError):
            pass

        failures = []

        def capture(card, function):
            error = Failure("no")
            failures.append(weakref.ref(error))
            try:
                raise error
            finally:
                del error

        monkeypatch.setattr(tape, "capture", capture)
        model = graphed()
        gc.disable()
        try:
            with pytest.warns(UserWarning, match="a capture failed"):
                call(model)
            assert failures[0]() is None
        finally:
            gc.enable()

    def test_transforms(self, tape):
        model = graphed("no_attention")
        inputs = example_inputs(model, 2, 16, tokens=7)

        def sample(x):
            return model(**(inputs | {"sample": x}))[0]

        torch.func.jvp(sample, (inputs["sample"],), (torch.ones_like(inputs["sample"]),))
        assert events(tape) == []
        assert "torch.func" in state(model).reason

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
        assert model.mid_block.attentions[0].transformer_blocks[0].attn1.processor.calls == calls + 2

    @pytest.mark.parametrize(
        ("forward", "reason"),
        [
            (lambda self, sample, timestep: sample.add_(1), "writes into its inputs"),
            (
                lambda self, sample, timestep: sample + self.block.norm1.weight.add_(1)[0],
                "or into tensors of the model",
            ),
            (lambda self, sample, timestep: (sample + 1, object()), "its output holds a object"),
        ],
        ids=["in_place", "in_the_model", "object"],
    )
    def test_forward_of_its_own_kind(self, tape, forward, reason):
        cls = type("Net", (nn.Module,), {"forward": forward})
        model = cls()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        with pytest.warns(UserWarning, match=reason):
            model(torch.zeros(2), 1)
        assert reason in state(model).reason


@pytest.mark.parametrize(
    ("cls", "is_served"),
    [
        (diffusers.UNet2DConditionModel, True),
        (diffusers.UNetSpatioTemporalConditionModel, True),
        (diffusers.ControlNetModel, True),
        (diffusers.FluxTransformer2DModel, False),
        (diffusers.AutoencoderKL, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_served_classes(cls, is_served):
    assert takes_timestep(cls.__new__(cls)) == is_served
