"""Compressed U-Nets that stock diffusers cannot describe."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import (
    ModelMixin,  # noqa: F401 - pipelines look here for the base that says how to load the class below
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastsd.compress.compression import Compression
from fastsd.compress.plan import Plan, PlanError
from fastsd.compress.structure import Structure, structure_of
from fastsd.nn.cond_conv import CondConv2d
from fastsd.nn.skip import SkippedResnet, SkippedTransformer


class CompressedUNet2DConditionModel(UNet2DConditionModel):
    """A ``UNet2DConditionModel`` that :func:`fastsd.compress` has made, and that no stock configuration describes.

    It is used as any other. ``save_pretrained`` writes a folder that :func:`fastsd.load` reads, and that stock
    diffusers refuses: it would build other layers from the configuration, with random weights.

    Attributes:
        compression: the plan, and the configuration of the model that it was carried out on.
    """

    compression: Compression

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes plan and weights into a folder for :func:`fastsd.load`.

        Raises:
            ValueError: anything else than safetensors is asked for, a variant, or to be sent to a hub.
            CheckpointError: the weights are not those of the plan (adapters? fuse or unload them), or share memory; or
                the folder holds a stock model.
        """
        from fastsd.compress.storage import save

        if not safe_serialization or push_to_hub or variant is not None:
            raise ValueError(
                "save_pretrained: a compressed model is saved to a folder, as safetensors without a variant; got "
                f"safe_serialization={safe_serialization}, push_to_hub={push_to_hub}, variant={variant!r}"
            )
        if is_main_process:
            save(self, save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The model in a folder that :meth:`save_pretrained` has written; see :func:`fastsd.load`.

        Args:
            device_map: one device. Options that say where files are kept, or how they are read, change nothing here.

        Raises:
            ValueError: what is asked for cannot be had: a variant, loading information, quantised weights, or several
                devices.
            CheckpointError: as :func:`fastsd.load`, or the folder holds a stock model.
        """
        from fastsd.compress.storage import load_compressed

        for option in ("variant", "output_loading_info", "quantization_config", "use_flashpack"):
            if kwargs.get(option):
                raise ValueError(
                    "from_pretrained: a compressed model is loaded from safetensors without a variant, and returned "
                    f"alone; got {option}={kwargs[option]!r}"
                )
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        return load_compressed(folder, torch_dtype if dtype is None else dtype, _one_device(device_map))

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the configuration does not say what was taken out."""
        raise PlanError(
            "a compressed U-Net cannot be built from its configuration, which does not say what was taken out; "
            "use fastsd.load, copy.deepcopy, or fastsd.compress on the model that it was made from"
        )


def _one_device(device_map: Any) -> torch.device:
    device = device_map[""] if isinstance(device_map, dict) and set(device_map) == {""} else device_map
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device_map: expected one device for a compressed model; got {device_map!r}") from None


def build(base_config: dict[str, Any], plan: Plan) -> tuple[Any, Structure]:
    """The model that ``plan`` makes of one with this configuration, without weights (on ``meta``), and its structure.

    Raises:
        PlanError: the plan does not suit the model.
    """
    structure = structure_of(base_config, plan)
    is_stock = structure.is_stock and plan.gri is None
    with torch.device("meta"):
        model: Any = (UNet2DConditionModel if is_stock else CompressedUNet2DConditionModel)(**structure.config)
        _edit(model, structure, plan)
    if isinstance(model, CompressedUNet2DConditionModel):
        model.compression = Compression(dict(base_config), plan)
    return model, structure


def build_stock(config: dict[str, Any]) -> Any:
    """The model with this configuration, without weights (on ``meta``)."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def _edit(model: nn.Module, structure: Structure, plan: Plan) -> None:
    for path, count in structure.edits.shortened.items():
        transformer: Any = model.get_submodule(path)
        transformer.transformer_blocks = nn.ModuleList(list(transformer.transformer_blocks)[:count])
    for path in structure.edits.skipped:
        old = model.get_submodule(path)
        _replace(model, path, SkippedResnet(old) if isinstance(old, ResnetBlock2D) else SkippedTransformer())
    for path, further in structure.edits.experts.items():
        conv: Any = model.get_submodule(path)
        _replace(model, path, CondConv2d(conv, [conv] * further, plan.routing))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    place, _, name = path.rpartition(".")
    setattr(model.get_submodule(place), name, module)
