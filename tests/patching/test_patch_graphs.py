"""CUDA graphs of patched models: the first calls, recording and replay. Row 15 of the compatibility matrix."""

import threading

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import fastsd
from fastsd.models import example_inputs, flat_output
from fastsd.nn import graphs as graphs_module
from fastsd.nn.graphs import graphs_of
from tests.patching.models import call
from tests.patching.tape import build, events, graphed, state


@pytest.mark.parametrize("name", ["unet", "unet_2d_model", "controlnet", "linear_projections", "gligen"])
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

    def test_row_15_third_is_recorded(self, tape):
        model, expected = graphed(), call(fastsd.patch(build()))
        for number, then in ((1, []), (2, []), (3, ["capture", "replay"]), (4, ["capture", "replay", "replay"])):
            assert torch.equal(call(model), expected)
            assert events(tape) == then
            early = f"in its last call it was call {number} with inputs of its shapes, and call 3 is recorded"
            assert state(model).reason == (early if number < 3 else None)

    def test_each_shape_has_its_own(self, tape):
        model = graphed()
        for batch in (1, 2, 1, 2, 1, 1, 2):
            call(model, batch=batch)
        assert events(tape) == ["capture", "replay", "replay", "capture", "replay"]

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
    @pytest.mark.gradients
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
    def test_timestep_elsewhere(self, tape, name, timestep, monkeypatch):
        """It is on the card before a forward that would copy it is watched."""
        self.use_meta(tape, monkeypatch)
        model = graphed(name).to("meta")
        inputs = example_inputs(model, 2, 16, tokens=7) | {"timestep": timestep}
        for _ in range(3):
            model(**inputs)
        assert events(tape) == ["capture", "replay"]

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

    def test_indices_of_a_table_of_masks(self, tape):
        table = torch.tensor([True, False])
        model = type("Net", (nn.Module,), {"forward": lambda self, x, timestep: table[x.long()]})()
        model.block = build().mid_block.resnets[0]
        fastsd.patch(model, cuda_graphs=True)
        for _ in range(3):
            assert torch.equal(model(torch.ones(2), 1), torch.tensor([False, False]))
        assert events(tape) == ["capture", "replay"]

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

    def test_calls_that_fail_do_not_count(self, tape):
        model = graphed()
        for _ in range(4):
            with pytest.raises(RuntimeError):
                call(model, encoder_hidden_states=torch.randn(2, 7, 5))
        for _ in range(3):
            call(model)
        assert events(tape) == ["capture", "replay"]
        assert state(model).reason is None

    def test_many_shapes(self, tape, monkeypatch):
        monkeypatch.setattr(graphs_module, "_SHAPES", 2)
        model = graphed()
        for batch in (1, 2, 3, 1, 2, 3):
            call(model, batch=batch)
        assert len(graphs_of(model)._calls) <= 2
        for _ in range(3):
            call(model, batch=1)
        assert events(tape) == ["capture", "replay"]


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
