"""CUDA graphs of patched models: what is recorded, replayed, refused. Row 15 of the compatibility matrix."""

import copy
import gc
import threading
import weakref
from contextlib import contextmanager

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import fastsd
from fastsd.models import example_inputs, flat_output
from fastsd.nn import graphs as graphs_module
from fastsd.nn.graph_calls import takes_timestep
from fastsd.nn.graphs import graphs_of
from tests.patching.models import assert_as_stock, build, call
from tests.patching.tape import Recorder, events, graphed, state


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


class TestFirstCalls:
    """The first two calls of a shape run as without graphs, the third is recorded."""

    @pytest.fixture(autouse=True)
    def two(self, tape, monkeypatch):
        monkeypatch.setattr(graphs_module, "EAGER_CALLS", 2)

    @torch.no_grad()
    def test_row_15_third_is_recorded(self, tape):
        model, expected = graphed(), call(fastsd.patch(build()))
        for number, then in ((1, []), (2, []), (3, ["capture", "replay"]), (4, ["capture", "replay", "replay"])):
            assert torch.equal(call(model), expected)
            assert events(tape) == then
            early = f"in its last call it was call {number} with inputs of its shapes, and call 3 is recorded"
            assert state(model).reason == (early if number < 3 else None)

    @torch.no_grad()
    def test_each_shape_has_its_own(self, tape):
        model = graphed()
        for batch in (1, 2, 1, 2, 1, 1, 2):
            call(model, batch=batch)
        assert events(tape) == ["capture", "replay", "replay", "capture", "replay"]

    @torch.no_grad()
    def test_python_runs_as_often_as_without_graphs(self, tape):
        """What only the first call does, it does once; what every call does, it goes on doing."""

        class Once(AttnProcessor):
            def __init__(self):
                self.calls = 0

            def __call__(self, *args, **kwargs):
                self.calls = min(self.calls + 1, 1)
                return super().__call__(*args, **kwargs)

        class Each(AttnProcessor):
            calls = 0

            def __call__(self, *args, **kwargs):
                self.calls += 1
                return super().__call__(*args, **kwargs)

        for processor, then in ((Once(), ["capture", "replay"]), (Each(), [])):
            model = graphed()
            model.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor
            tape.made.clear()
            for number in range(1, 5):
                call(model)
                assert processor.calls == (1 if then else number)
            assert events(tape) == then
        path = "mid_block.attentions.0.transformer_blocks.0.attn1.processor"
        assert f"call 1 with inputs of its shapes since {path} has changed" in state(model).reason

    @torch.no_grad()
    def test_a_change_begins_anew(self, tape):
        model = graphed()
        for _ in range(3):
            call(model)
        for scale in (2.0, 3.0):  # at every call: nothing is ever recorded
            model.mid_block.resnets[0].output_scale_factor = scale
            call(model)
        assert events(tape) == ["capture", "replay"]
        assert state(model).held == 0
        for _ in range(2):
            call(model)
        assert events(tape) == ["capture", "replay"] * 2

    @torch.no_grad()
    def test_each_thread_has_its_own(self, tape):
        """What torch's libraries get ready at the first calls, they have for each thread."""
        model = graphed()
        calls = [*[call] * 2, lambda model: in_a_thread(lambda: torch.no_grad()(call)(model))]
        for each in calls:
            each(model)
        assert events(tape) == []
        call(model)
        in_a_thread(lambda: torch.no_grad()(call)(model))
        assert events(tape) == ["capture", "replay", "replay"]

    @torch.no_grad()
    def test_weights_that_autocast_has_cast(self, tape):
        """They are not read in their place, though the first calls have left them for the third."""
        model, eager = graphed(), fastsd.patch(build())
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                call(model)
        assert events(tape) == ["capture", "replay"]
        for each in (model, eager):
            each.conv_in.weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(model), call(eager))

    @pytest.mark.parametrize(
        ("forward", "reason"),
        [
            (lambda self, x, timestep: x * x.sum().item(), "_local_scalar_dense"),
            (lambda self, x, timestep: x[x > 0], "dynamic"),
            (lambda self, x, timestep: x + torch.ones(2, device="cpu").to(x.device), "copies between cpu and"),
            (lambda self, x, timestep: x[torch.tensor([1, 0], device="cpu")], "copies between cpu and"),
            (lambda self, x, timestep: x + torch.tensor([1.0, 2.0]), "copies between cpu and cpu (aten::lift_fresh)"),
        ],
        ids=["item", "mask", "copy", "index", "tensor"],
    )
    @torch.no_grad()
    def test_what_no_graph_can_hold(self, tape, forward, reason, monkeypatch):
        """Is found before a capture fails at it."""
        is_copy = reason == "copies between cpu and"
        if is_copy:
            self.use_meta(tape, monkeypatch)
        model = type("Net", (nn.Module,), {"forward": forward})()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        model.to("meta" if is_copy else "cpu")
        for _ in range(4):
            model(torch.ones(2, device="meta" if is_copy else "cpu"), 1)
        assert events(tape) == []
        assert ("waits for numbers of the card" if reason == "dynamic" else reason) in state(model).reason

    @pytest.mark.parametrize(
        ("forward", "operation"),
        [
            (lambda self, x, timestep: x + 1 if x.sum() > 0 else x, "_local_scalar_dense"),
            (lambda self, x, timestep: x * len(torch.where(x > 0)[0]), "nonzero"),
            (lambda self, x, timestep: x + torch.ones(2, device="cpu").to(x.device), "copies between cpu and"),
        ],
        ids=["bool", "where", "copy"],
    )
    def test_what_no_graph_can_hold_in_inference_mode(self, tape, forward, operation, monkeypatch):
        """There operations reach a mode before they are taken apart."""
        if "copies" in operation:
            self.use_meta(tape, monkeypatch)
        device = tape.device_type
        model = type("Net", (nn.Module,), {"forward": forward})()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        model.to(device)
        with torch.inference_mode():
            for _ in range(4):
                model(torch.ones(2, device=device), 1)
        assert events(tape) == []
        assert operation in state(model).reason

    @pytest.mark.parametrize("timestep", [1, torch.tensor(1)], ids=["integer", "cpu"])
    @pytest.mark.parametrize("name", ["unet", "controlnet"])
    @torch.no_grad()
    def test_timestep_elsewhere(self, tape, name, timestep, monkeypatch):
        """It is on the card before a forward that would copy it is watched."""
        self.use_meta(tape, monkeypatch)
        model = graphed(name).to("meta")
        inputs = example_inputs(model, 2, 16, tokens=7) | {"timestep": timestep}
        for _ in range(3):
            model(**inputs)
        assert events(tape) == ["capture", "replay"]

    @torch.no_grad()
    def test_integer_timesteps(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        for timestep in (1, 2, 3, 4):
            assert torch.equal(call(model, timestep=timestep), call(eager, timestep=timestep))
        assert events(tape) == ["capture", "replay", "replay"]

    @staticmethod
    def use_meta(tape, monkeypatch):
        """A card without numbers, and of no autocast."""
        monkeypatch.setattr(tape, "device_type", "meta")
        monkeypatch.setattr(graphs_module, "settings_of_torch", lambda device_type: ())

    @torch.no_grad()
    def test_watching_disturbs_nobody(self, tape):
        """Operations of higher order, and functions that are compiled inside."""
        compiled = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)

        def forward(self, x, timestep):
            return compiled(torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))

        model = type("Net", (nn.Module,), {"forward": forward})()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        for _ in range(2):
            assert torch.equal(model(torch.ones(2), 1), torch.full((2,), 4.0))
        assert "and call 3 is recorded" in state(model).reason

    @torch.no_grad()
    def test_indices_of_a_table_of_masks(self, tape):
        table = torch.tensor([True, False])
        model = type("Net", (nn.Module,), {"forward": lambda self, x, timestep: table[x.long()]})()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        for _ in range(3):
            assert torch.equal(model(torch.ones(2), 1), torch.tensor([False, False]))
        assert events(tape) == ["capture", "replay"]

    @torch.no_grad()
    def test_boxes_of_gligen(self, tape, monkeypatch):
        """For which diffusers makes numbers on the CPU, in every call."""
        self.use_meta(tape, monkeypatch)
        model = graphed("gligen").to("meta")
        boxes = {
            "boxes": torch.rand(2, 3, 4, device="meta"),
            "positive_embeddings": torch.rand(2, 3, 8, device="meta"),
            "masks": torch.ones(2, 3, device="meta"),
        }
        inputs = example_inputs(model, 2, 16, tokens=7) | {"cross_attention_kwargs": {"gligen": boxes}}
        inputs = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
        for _ in range(3):
            model(**inputs)
        assert events(tape) == []
        assert "its forward copies between cpu and meta (aten::_to_copy)" in state(model).reason

    @torch.no_grad()
    def test_calls_that_fail_do_not_count(self, tape):
        model = graphed()
        for _ in range(4):
            with pytest.raises(RuntimeError):
                call(model, encoder_hidden_states=torch.randn(2, 7, 5))
        for _ in range(3):
            call(model)
        assert events(tape) == ["capture", "replay"]
        assert state(model).reason is None

    @torch.no_grad()
    def test_many_shapes(self, tape, monkeypatch):
        monkeypatch.setattr(graphs_module, "_SHAPES", 2)
        model = graphed()
        for batch in (1, 2, 3, 1, 2, 3):
            call(model, batch=batch)
        assert len(graphs_of(model)._calls) <= 2
        for _ in range(3):
            call(model, batch=1)
        assert events(tape) == ["capture", "replay"]


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


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


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

    @pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
    @torch.no_grad()
    def test_a_forward_sees_the_strides_that_it_was_given(self, tape, layout):
        """Every other way that it may take for other strides was not seen in the first calls."""
        seen = []

        class Seeing(AttnProcessor):
            def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
                seen.append(encoder_hidden_states.stride())
                return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)

        model, eager = graphed(), fastsd.patch(build())
        for each in (model, eager):
            each.mid_block.attentions[0].transformer_blocks[0].attn2.processor = Seeing()
        for seed in range(2):
            text = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(seed))[..., :8]
            text = {"expanded": text[:1].expand(2, -1, -1), "sliced": text, "transposed": text.mT.clone().mT}[layout]
            expected = call(eager, encoder_hidden_states=text)
            assert torch.equal(call(model, encoder_hidden_states=text), expected)
        assert events(tape) == ["capture", "replay", "replay"]
        assert seen == [text.stride()] * 3

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
    def test_timestep_of_another_forward(self, tape):
        """Of which nobody knows what it does with a number."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = build().mid_block.resnets[0]

            def forward(self, x, timestep):
                return x.repeat(timestep)

        model = fastsd.patch(Net(), cuda_graphs=True)
        for timestep in (2, 3, 2):
            assert model(torch.ones(1), timestep).numel() == timestep
        assert state(model).held == 2

    @torch.no_grad()
    def test_precisions_by_layer(self, tape):
        """After which torch's older settings raise where they are read."""
        model, conv = graphed(), torch.backends.cudnn.conv
        call(model)
        before = conv.fp32_precision
        conv.fp32_precision = "ieee"
        try:
            call(model)
        finally:
            conv.fp32_precision = before
        assert state(model).held == 2

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

    @pytest.mark.parametrize(
        ("switch", "on", "off"),
        [
            (torch.set_default_dtype, torch.float64, torch.float32),
            (torch.set_default_device, "cpu:0", None),
            (torch.use_deterministic_algorithms, True, False),
            (torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, True, False),
        ],
        ids=["dtype", "device", "deterministic", "reduction"],
    )
    @torch.no_grad()
    def test_switches_of_torch(self, tape, switch, on, off):
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7)
        model(**inputs)
        switch(on)
        try:
            model(**inputs)
        finally:
            switch(off)
        assert state(model).held == 2

    @torch.no_grad()
    def test_one_too_many(self, tape):
        """All go together, with the memory that they share."""
        model, eager = graphed(most=2), fastsd.patch(build())
        for batch, held in ((1, 1), (2, 2), (1, 2), (3, 0), (3, 1), (1, 2)):
            assert torch.equal(call(model, batch=batch), call(eager, batch=batch))
            assert state(model).held == held
        assert events(tape) == [*("capture", "replay") * 2, "replay", *("capture", "replay") * 2]
        assert [card.events.count("finish") for card in tape.made] == [1, 0]


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

    @torch.no_grad()
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

    @torch.no_grad()
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
    @torch.no_grad()
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
