"""Small U-Nets of the structure of SD1.x and SDXL, with random weights, and how their results are compared."""

import functools
from typing import Any

import diffusers
import torch

import fastsd
from fastsd.models import example_inputs, flat_output

SMALL_SD: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
SMALL_XL: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
# two levels: for what no recipe is needed for
SMALLEST = SMALL_SD | {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
SD_RECIPES = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "a-sdm")
XL_RECIPES = ("ssd-1b", "vega")


def build(config: dict[str, Any] = SMALL_SD, **changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = diffusers.UNet2DConditionModel(**config | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def for_recipe(name: str) -> Any:
    return build(SMALL_XL if name in XL_RECIPES else SMALL_SD)


def shared(name: str = "") -> Any:
    """One that all tests share, for a recipe or a plan: to be read and called only."""
    return _shared(name in XL_RECIPES)


@functools.cache
def _shared(is_xl: bool) -> Any:
    return build(SMALL_XL if is_xl else SMALL_SD)


@torch.no_grad()
def call(model: Any, **inputs: Any) -> torch.Tensor:
    return flat_output(model(**example_inputs(model, 2, 16, tokens=7) | inputs))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def config_of(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def trained(model: Any) -> Any:
    """With values that a compression does not start with: in all that it has added, too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


PLANS = {
    "transformer": fastsd.Plan(removed=("down_blocks.1.attentions.0", "mid_block.attentions.0")),
    "all_transformers_of_a_block": fastsd.Plan(removed=("down_blocks.1.attentions.0", "down_blocks.1.attentions.1")),
    "bypassed": fastsd.Plan(bypassed=("down_blocks.0.resnets.1", "down_blocks.1.resnets.0", "up_blocks.3.resnets.2")),
    "level": fastsd.Plan(removed=("down_blocks.3", "down_blocks.2.downsamplers", "up_blocks.0")),
    "experts": fastsd.Plan(
        experts={"up_blocks.1.resnets.0.conv2": ("up_blocks.1.resnets.1.conv2", "up_blocks.1.resnets.2.conv2")},
        routing="softmax",
    ),
}
# every kind of module that a plan makes of SMALLEST
EVERYTHING = fastsd.Plan(
    removed=("up_blocks.1.attentions.0", "mid_block.attentions.0"),
    bypassed=("up_blocks.1.resnets.0", "mid_block.resnets.1"),
    experts={"up_blocks.0.resnets.0.conv2": ("up_blocks.0.resnets.1.conv2",)},
    gri=fastsd.GRI(4, 2),
    name="everything",
)
