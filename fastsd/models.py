"""Models by name, from a folder or from a hub, and the inputs to call them with.

A named model is a configuration with random weights: speed does not depend on the weights, so every table can be
reproduced without a download. ``load("./sd15")`` means the folder, ``load("sd15")`` the configuration.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# diffusers is imported when a model is built, and not for its types
Model = Any
Loaded = Any


class UnknownModel(ValueError):
    """No configuration, folder or hub model answers to the name that was given."""


@dataclass(frozen=True)
class NamedModel:
    """A model class of diffusers and the arguments that build it; of transformers' those of its configuration."""

    model_class: str
    config: dict[str, Any]

    def __or__(self, changes: dict[str, Any]) -> "NamedModel":
        """The same model with some arguments changed."""
        return NamedModel(self.model_class, self.config | changes)


MODEL_CLASSES = ("UNet2DConditionModel", "UNet2DModel", "ControlNetModel", "AutoencoderKL")
_TEXT_CLASS = "CLIPTextModel"

_SD15 = NamedModel("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8})
_SD21 = _SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
_SDXL = NamedModel(
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
_SSD1B = _SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
_VEGA = _SSD1B | {
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}
_BK_BASE = {"layers_per_block": 1}
_BK_SMALL = _BK_BASE | {"mid_block_type": None}
_BK_TINY = _BK_SMALL | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}

MODELS: dict[str, NamedModel] = {
    "sd15": _SD15,
    "sd21": _SD21,
    "sdxl": _SDXL,
    "ssd1b": _SSD1B,
    "vega": _VEGA,
    "bk-base": _SD15 | _BK_BASE,
    "bk-small": _SD15 | _BK_SMALL,
    "bk-tiny": _SD15 | _BK_TINY,
    "bk-v2-base": _SD21 | _BK_BASE | {"sample_size": 64},
    "bk-v2-small": _SD21 | _BK_SMALL | {"sample_size": 64},
    "bk-v2-tiny": _SD21 | _BK_TINY | {"sample_size": 64, "attention_head_dim": [5, 10, 20]},
    "inpaint": _SD15 | {"in_channels": 9},
    "ip2p": _SD15 | {"in_channels": 8},
    "lcm": _SD15 | {"time_cond_proj_dim": 256},
    "tiny": NamedModel(
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": [4, 8],
            "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "layers_per_block": 1,
        },
    ),
    "controlnet-sd15": NamedModel("ControlNetModel", {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "vae-sd": NamedModel(
        "AutoencoderKL",
        {
            "sample_size": 512,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    ),
    "text-sd15": NamedModel(
        _TEXT_CLASS,
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
}


def load(
    model: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, weights: bool = True
) -> Loaded:
    """A model or a pipeline, in evaluation mode.

    Args:
        model: a name in :data:`MODELS` (random weights, the same on every call; ``device="meta"`` builds the
            structure alone), the folder of a diffusers model or pipeline, or a hub id such as ``"owner/name"``.
            Only a hub id uses the network. Weights are read from safetensors files only.
        dtype, device: as what and where the weights are returned.
        weights: ``False`` leaves those of a named model undefined, which takes no time: for a look at the structure.

    Returns:
        A model of one of :data:`MODEL_CLASSES` or, by name alone, a ``CLIPTextModel``; or a ``DiffusionPipeline`` for
        the folder or id of a pipeline.

    Raises:
        UnknownModel: nothing answers to ``model``; the message lists what is known.
        CheckpointError: the files of a folder do not fit each other, or were changed.
    """
    if model in MODELS:
        return _build(MODELS[model], dtype, torch.device(device), weights)
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _from_folder(folder, dtype, device)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise UnknownModel(
            f"{model!r} is no folder, no hub id (owner/name) and none of the named models: {', '.join(MODELS)}"
        )
    return _pretrained(model, _is_pipeline(model), dtype, device)


def _build(named: NamedModel, dtype: torch.dtype, device: torch.device, weights: bool) -> Model:
    if not weights:
        with torch.device("meta"):
            model = _built(named)
        model = torch.nn.Module.to(model, dtype).to_empty(device=device)
        return model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            model = _built(named)
        if device.type != "meta":
            _fill_zero_convolutions(model)
    # diffusers' own `to` warns of modules to keep in float32; these models have none
    return torch.nn.Module.to(model, dtype).eval()


def _built(named: NamedModel) -> Model:
    if named.model_class == _TEXT_CLASS:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**named.config))
    import diffusers

    return getattr(diffusers, named.model_class)(**named.config)


def _fill_zero_convolutions(model: Model) -> None:
    """A new ControlNet's outputs are zero, and every result would agree with zero."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and not module.weight.any():
            module.reset_parameters()


def _from_folder(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Loaded:
    from fastsd.compress.stock import check_stock
    from fastsd.compress.storage import is_compressed, load_compressed

    if is_compressed(folder):
        return load_compressed(folder, dtype, device)
    is_pipeline = (folder / "model_index.json").is_file()
    if not is_pipeline and not (folder / "config.json").is_file():
        raise UnknownModel(
            f"{folder}: expected the folder of a diffusers model or pipeline or of a compressed model, with "
            "config.json, model_index.json or fastsd_plan.json in it"
        )
    unet = folder / "unet" if is_pipeline else folder
    if is_compressed(unet):
        return _pretrained(folder, True, dtype, device, local_files_only=True, unet=load_compressed(unet, dtype))
    if (unet / "config.json").is_file():
        check_stock(unet)
    return _pretrained(folder, is_pipeline, dtype, device, local_files_only=True)


def _is_pipeline(hub_id: str) -> bool:
    import diffusers

    try:
        diffusers.DiffusionPipeline.load_config(hub_id)
    except OSError:
        return False
    return True


def _pretrained(
    source: str | Path, is_pipeline: bool, dtype: torch.dtype, device: torch.device | str, **options: Any
) -> Loaded:
    import diffusers
    from packaging.version import Version

    dtype_option = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
    options |= {dtype_option: dtype, "use_safetensors": True}
    if is_pipeline:
        return diffusers.DiffusionPipeline.from_pretrained(source, **options).to(device)
    config = diffusers.UNet2DConditionModel.load_config(source, local_files_only=options.get("local_files_only", False))
    name = config.get("_class_name")
    if name not in MODEL_CLASSES:
        raise UnknownModel(f"{source}: expected a {', '.join(MODEL_CLASSES)} or a pipeline; config.json names {name!r}")
    return getattr(diffusers, name).from_pretrained(source, **options).to(device).eval()


def denoiser(loaded: Loaded) -> Model:
    """The model itself, or the U-Net of a pipeline.

    Raises:
        UnknownModel: a pipeline without a U-Net.
    """
    if isinstance(loaded, torch.nn.Module):
        return loaded
    if "unet" not in loaded.components:
        raise UnknownModel(f"{type(loaded).__name__} has no U-Net; fastsd serves pipelines that have one")
    return loaded.unet


def default_latent(model: Model) -> int:
    """The side of the latent that ``model`` was made for: its ``sample_size``, for a VAE in latent pixels."""
    size = getattr(model.config, "sample_size", None) or 64
    size = size if isinstance(size, int) else max(size)
    if type(model).__name__ == "AutoencoderKL":
        return size // 2 ** (len(model.config.block_out_channels) - 1)
    return size


def example_inputs(model: Model, batch: int = 1, latent: int | None = None, tokens: int = 77) -> dict[str, Any]:
    """The keyword arguments of :func:`entry_point` for ``model``: random values, the same on every device.

    Args:
        batch: samples; classifier-free guidance on one image is 2.
        latent: side of the square latent; ``None`` for :func:`default_latent`.
        tokens: length of the text context.
    """
    config = model.config
    latent = latent or default_latent(model)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    inputs: dict[str, Any] = {"return_dict": False}
    if type(model).__name__ == _TEXT_CLASS:
        ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
        return inputs | {"input_ids": ids.to(model.device)}
    if type(model).__name__ == "AutoencoderKL":
        return inputs | {"z": normal(batch, config.latent_channels, latent, latent)}

    # a tensor: a number would be copied to the device inside a captured graph
    timestep = torch.tensor(500, device=model.device)
    inputs |= {"sample": normal(batch, config.in_channels, latent, latent), "timestep": timestep}
    if type(model).__name__ == "UNet2DModel":
        if _counts_classes(config):
            inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=model.device)
        return inputs

    context = config.cross_attention_dim
    context = context if isinstance(context, int) else context[0]
    inputs["encoder_hidden_states"] = normal(batch, tokens, config.encoder_hid_dim or context)
    if config.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = normal(batch, config.projection_class_embeddings_input_dim)
    elif _counts_classes(config):
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device=model.device)
    if config.addition_embed_type == "text_time":
        times = 6
        text = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": normal(batch, text), "time_ids": normal(batch, times)}
    if getattr(config, "time_cond_proj_dim", None) is not None:
        inputs["timestep_cond"] = normal(batch, config.time_cond_proj_dim)
    if type(model).__name__ == "ControlNetModel":
        factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        inputs["controlnet_cond"] = normal(batch, config.conditioning_channels, factor * latent, factor * latent)
    return inputs


def _counts_classes(config: Any) -> bool:
    return config.class_embed_type is not None or config.num_class_embeds is not None


def entry_point(model: Model) -> Callable[..., Any]:
    """What is called and timed: the model, or for a VAE its decoder."""
    return model.decode if type(model).__name__ == "AutoencoderKL" else model


def float32_copy(model: Model) -> Model:
    """The same model with weights of its own, in float32."""
    return torch.nn.Module.to(copy.deepcopy(model), torch.float32)


def flat_output(output: Any) -> Tensor:
    """All values of a model's output, which may be nested tuples of tensors, as one float64 vector."""
    if isinstance(output, Tensor):
        return output.detach().double().flatten()
    return torch.cat([flat_output(part) for part in output])
