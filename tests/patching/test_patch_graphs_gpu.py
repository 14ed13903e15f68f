"""CUDA graphs of patched models on a card."""

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import fastsd
from fastsd.models import example_inputs, flat_output
from fastsd.nn import frozen
from fastsd.nn.capture import Card
from fastsd.nn.graphs import EAGER_CALLS
from tests.patching.models import assert_as_stock
from tests.patching.tape import build, graphed, state

CALLS = EAGER_CALLS + 2  # until one is a replay of an earlier call's graph


@pytest.mark.gpu
class TestOnACard:
    @pytest.mark.parametrize("name", ["unet", "controlnet"])
    def test_replay_is_as_eager(self, name):
        model, eager = graphed(name).cuda(), fastsd.patch(build(name)).cuda()
        for _ in range(CALLS):
            for batch in (1, 2):
                inputs = {key: _to_card(value) for key, value in example_inputs(model, batch, 16, tokens=7).items()}
                assert_as_stock(flat_output(model(**inputs)), flat_output(eager(**inputs)))
        assert (state(model).held, state(model).reason) == (2, None)

    def test_changes(self):
        model, eager = graphed().cuda(), fastsd.patch(build()).cuda()
        inputs = {key: _to_card(value) for key, value in example_inputs(model, 2, 16, tokens=7).items()}
        for change in (
            lambda each: each.conv_in.weight.mul_(2),
            lambda each: _lora(each.cpu()) or each.cuda(),
            lambda each: each.delete_adapters("default"),
            lambda each: each.to(memory_format=torch.channels_last),
            lambda each: each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        ):
            for _ in range(CALLS):
                model(**inputs)
            assert (state(model).held, state(model).reason) == (1, None)
            for each in (model, eager):
                change(each)
            assert_as_stock(flat_output(model(**inputs)), flat_output(eager(**inputs)))

    def test_streams_and_memory(self):
        """Calls on several streams, and more shapes than graphs are kept."""
        model, eager = graphed(most=2).cuda(), fastsd.patch(build()).cuda()
        inputs = {key: _to_card(value) for key, value in example_inputs(model, 1, 16, tokens=7).items()}
        for step in range(12 * CALLS):
            sample = inputs["sample"].repeat(1 + step // CALLS % 4, 1, 1, 1) + step
            tokens = inputs["encoder_hidden_states"].expand(len(sample), -1, -1).contiguous()
            now = inputs | {"sample": sample, "encoder_hidden_states": tokens, "timestep": step}
            expected = flat_output(eager(**now))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                actual = flat_output(model(**now))
            stream.synchronize()
            assert_as_stock(actual, expected)
        assert state(model).reason is None
        assert 0 < state(model).held <= 2

    def test_failed_capture(self, monkeypatch):
        """The card stays usable: what cannot be recorded runs eagerly, also its random numbers."""
        monkeypatch.setattr(frozen, "_KNOWN", {*frozen._KNOWN, __name__.partition(".")[0]})
        model = graphed().cuda()
        model.mid_block.resnets[0].nonlinearity = _Waits()
        inputs = {key: _to_card(value) for key, value in example_inputs(model, 2, 16, tokens=7).items()}
        first, _ = (flat_output(model(**inputs)) for _ in range(EAGER_CALLS))
        with pytest.warns(UserWarning, match="a capture failed"):
            model(**inputs)
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
        torch.cuda.synchronize()  # which no mode sees
        return super().forward(x)


def _lora(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))


def _to_card(value):
    return value.cuda() if isinstance(value, Tensor) else value
