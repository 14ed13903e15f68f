"""GRIAttnProcessor, GRI attention as a diffusers processor."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

import fastsd
from tests.patching.gri import ip_adapter, with_processors
from tests.patching.models import assert_as_stock, build


class TestProcessor:
    def layer(self):
        torch.manual_seed(0)
        return Attention(query_dim=8, heads=2, dim_head=4, bias=False).eval()

    def test_full_window(self):
        attn, x = self.layer(), torch.randn(2, 30, 8)
        exact = attn(x)
        attn.set_processor(fastsd.GRIAttnProcessor(window=8, pool=2, grid=(5, 6)))
        assert_as_stock(attn(x), exact)

    def test_no_grid(self):
        attn = self.layer()
        attn.set_processor(fastsd.GRIAttnProcessor(16, 4))
        assert attn(torch.randn(1, 64, 8)).shape == (1, 64, 8)
        with pytest.raises(ValueError, match=r"grid: .*30 tokens"):
            attn(torch.randn(1, 30, 8))

    @pytest.mark.gradients
    def test_gate_is_trained(self):
        attn = self.layer().train()
        with pytest.raises(ValueError, match="heads"):
            fastsd.GRIAttnProcessor(4, 2, interaction="gated")
        attn.set_processor(fastsd.GRIAttnProcessor(4, 2, "gated", heads=2))
        assert "processor.gate" in attn.state_dict()
        attn(torch.randn(1, 64, 8)).sum().backward()
        assert attn.processor.gate.grad.abs().min() > 0

    def test_cross_attention_is_left_alone(self):
        attn, x, context = self.layer(), torch.randn(2, 64, 8), torch.randn(2, 5, 8)
        exact = attn(x, context)
        attn.set_processor(fastsd.GRIAttnProcessor(4, 2))
        assert torch.equal(attn(x, context), exact)

    def test_norms_residual_and_scale(self):
        torch.manual_seed(0)
        attn = Attention(
            query_dim=8, heads=2, dim_head=4, qk_norm="layer_norm", residual_connection=True, rescale_output_factor=2.0
        ).eval()
        x = torch.randn(2, 64, 8)
        exact = attn(x)
        attn.set_processor(fastsd.GRIAttnProcessor(window=8, pool=2))
        assert_as_stock(attn(x), exact)

    def test_loading_an_ip_adapter_does_not_lose_it(self):
        """diffusers builds all processors anew, without arguments: with the wrong sizes and without the gate."""
        model = with_processors(build())
        before = dict(model.attn_processors)
        with pytest.raises(TypeError, match="window"):
            model._load_ip_adapter_weights(ip_adapter(model))
        assert model.attn_processors == before

    def test_cells_are_no_larger_than_the_map(self):
        attn, x = self.layer(), torch.randn(2, 6, 8)
        exact = attn(x)
        attn.set_processor(fastsd.GRIAttnProcessor(window=4, pool=4, grid=(2, 3)))
        assert_as_stock(attn(x), exact)

    def test_a_scale_of_its_own(self):
        torch.manual_seed(0)
        attn = Attention(query_dim=8, heads=2, dim_head=4, scale_qk=False, processor=AttnProcessor()).eval()
        x = torch.randn(2, 30, 8)
        exact = attn(x)
        attn.set_processor(fastsd.GRIAttnProcessor(window=8, pool=2, grid=(5, 6)))
        assert_as_stock(attn(x), exact)

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"window": 0}, "window: .*got 0"),
            ({"pool": 2.5}, "pool: .*got 2.5"),
            ({"pool": (2,)}, r"pool: .*two of them, or None; got \(2,\)"),
            ({"grid": 16}, r"grid: expected \(height, width\), or None; got 16"),
            ({"interaction": "both"}, "interaction: expected one of joint.*got 'both'"),
        ],
    )
    def test_bad_arguments(self, given, says):
        with pytest.raises(ValueError, match=says):
            fastsd.GRIAttnProcessor(**{"window": 4, "pool": 2} | given)

    @pytest.mark.gradients
    def test_transforms_differentiate_it(self):
        """torch.func and forward mode, which the op refuses, run the definition."""
        attn, x, tangent = self.layer().double(), *torch.randn(2, 2, 16, 8, dtype=torch.float64)
        attn.set_processor(fastsd.GRIAttnProcessor(2, 2))
        _, slope = torch.func.jvp(attn, (x,), (tangent,))
        step = 1e-6
        torch.testing.assert_close(slope, (attn(x + step * tangent) - attn(x - step * tangent)) / (2 * step))
