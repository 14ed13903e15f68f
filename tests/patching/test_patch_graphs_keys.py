"""What a CUDA graph is recorded for: shapes, layouts and values of a call, what torch is set to, how many are kept."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import fastsd
from fastsd.models import example_inputs, flat_output
from tests.patching.models import call
from tests.patching.tape import build, events, graphed, state


class TestKeys:
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

    def test_strides_and_positions(self, tape):
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7)
        model(**inputs)
        model(**(inputs | {"sample": inputs["sample"].to(memory_format=torch.channels_last)}))
        model(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        assert state(model).held == 3

    @pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed"])
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

    def test_nested_inputs(self, tape):
        """What a ControlNet gives, and an adapter, whose list the model empties."""
        model, eager = graphed("unet"), fastsd.patch(build("unet"))
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

    def test_one_too_many(self, tape):
        """All go together, with the memory that they share."""
        model, eager = graphed(most=2), fastsd.patch(build())
        for batch, held in ((1, 1), (2, 2), (1, 2), (3, 0), (3, 1), (1, 2)):
            assert torch.equal(call(model, batch=batch), call(eager, batch=batch))
            assert state(model).held == held
        assert events(tape) == [*("capture", "replay") * 2, "replay", *("capture", "replay") * 2]
        assert [card.events.count("finish") for card in tape.made] == [1, 0]
