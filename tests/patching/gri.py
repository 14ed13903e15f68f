"""Small U-Nets with GRI attention: by patch, and by processors; and whether it runs."""

import torch

import fastsd
from fastsd.models import example_inputs, flat_output
from fastsd.nn.gri_attention import ToldKwargs
from tests.patching.models import calls_of

SMALL = fastsd.GRI(window=4, pool=2)
LEVEL_0 = (
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
)
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"


def gri_calls(function):
    """How often ``function()`` calls gri_attention."""
    return calls_of("gri_attention", function)


def with_processors(model, paths=LEVEL_0, **given):
    """The stock model with a processor on each of ``paths``."""
    for path in paths:
        model.get_submodule(path).attn1.set_processor(fastsd.GRIAttnProcessor(4, 2, **given))
    return model


def approximate(model):
    return [entry.path for entry in fastsd.report(model).entries if entry.approximate]


def run(model, height, width, batch=2):
    """The model's result for a map that need be no square."""
    inputs = example_inputs(model, batch, 16, tokens=7)
    generator = torch.Generator().manual_seed(0)
    inputs["sample"] = torch.randn(batch, model.config.in_channels, height, width, generator=generator)
    return flat_output(model(**inputs))


def told(height, width):
    """What a transformer hands to its blocks for such a map."""
    kwargs = ToldKwargs()
    kwargs.grid = height, width
    return {"cross_attention_kwargs": kwargs}


def ip_adapter(model):
    """Random weights of an adapter for images of 6 features, as 4 tokens."""
    tokens, clip, context = 4, 6, 8
    cross = [name.removesuffix(".processor") for name in model.attn_processors if "attn2" in name]
    return {
        "image_proj": {
            "proj.weight": torch.randn(tokens * context, clip),
            "proj.bias": torch.randn(tokens * context),
            "norm.weight": torch.ones(context),
            "norm.bias": torch.zeros(context),
        },
        "ip_adapter": {
            f"{2 * index + 1}.to_{letter}_ip.weight": torch.randn(model.get_submodule(path).to_k.out_features, context)
            for index, path in enumerate(cross)
            for letter in "kv"
        },
    }
