"""ControlNets of the full model, for a pruned U-Net."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastsd.adapters.origin import origin_of, skips_of
from fastsd.adapters.report import FitReport
from fastsd.adapters.twin import check_unwrapped, twin_with
from fastsd.compress.compression import Compression

_MID_BLOCK = "mid_block"


@dataclass(frozen=True)
class KeepResiduals:
    """A forward hook of a ControlNet: of its residuals, those that a pruned U-Net has a place for.

    Attributes:
        kept: indices of those for the maps that go to the up-blocks.
        has_middle: whether that behind the mid block fits; else zeros take its place.
    """

    kept: tuple[int, ...]
    has_middle: bool

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        as_tuple = isinstance(output, tuple)
        down, middle = output if as_tuple else (output.down_block_res_samples, output.mid_block_res_sample)
        down = type(down)(down[index] for index in self.kept)
        if not self.has_middle:
            # diffusers takes residuals for a ControlNet's only where there is one for the middle
            middle = torch.zeros_like(down[-1])
        return (down, middle) if as_tuple else type(output)(down_block_res_samples=down, mid_block_res_sample=middle)


def fit_controlnet(controlnet: Any, unet: Any, *, origin: Compression | None = None) -> tuple[Any, FitReport]:
    """A ControlNet of the full model that gives a pruned U-Net the residuals for the maps that it still has.

    The result is of the same class and shares all modules and weights with ``controlnet``, which stays as it is; it
    only differs by a forward hook. So pipelines take it, it is saved as the ControlNet that it was made of, and to
    undo it is to use the given one again. What is done to shared weights and modules (``to``, :func:`fastsd.patch`) is
    done to both.

    A ControlNet runs as a whole; what is skipped is computed, too.

    Where a pruned U-Net has no mid block (BK-SDM-Small), the residual for its result is added to the deepest map, on
    which the up-blocks now work: the pruned U-Net was trained to do without the mid block, so what stands there takes
    the place of its result. Where the deepest level is gone as well (BK-SDM-Tiny), that residual has no place.

    Args:
        controlnet: a ``ControlNetModel`` or ``ControlNetUnionModel``, or a ``MultiControlNetModel`` of them; not yet
            offloaded or compiled.
        unet: the U-Net that it is for; a full one takes all of it.
        origin: see :func:`fastsd.adapters.origin_of`.

    Returns:
        The ControlNet for this U-Net, and what was used and skipped, by the modules whose results are added to.

    Raises:
        TypeError, ValueError: see :func:`fastsd.adapters.origin_of`.
        TypeError: ``controlnet`` is none of these.
        ValueError: its residuals are not those of the full model; it is compiled, or has a forward of its own (an
            offload).
    """
    known = origin_of(unet, origin)
    unet = getattr(unet, "_orig_mod", unet)
    full = list(skips_of(known.config))
    sources = [known.source_of(path) for path, _ in skips_of(unet.config)]
    kept = tuple(index for index, (path, _) in enumerate(full) if path in sources)
    has_middle = len(unet.config.block_out_channels) == len(known.config["block_out_channels"])
    hook = KeepResiduals(kept, has_middle)
    used = [full[index][0] for index in kept] + [_MID_BLOCK] * has_middle
    skipped = (path for path in (*(path for path, _ in full), _MID_BLOCK) if path not in used)
    report = FitReport("ControlNet", tuple(used), tuple(skipped))
    widths = [width for _, width in full]
    if isinstance(getattr(controlnet, "nets", None), nn.ModuleList):
        check_unwrapped("controlnet", controlnet)
        return type(controlnet)([_fitted(net, hook, widths) for net in controlnet.nets]), report
    return _fitted(controlnet, hook, widths), report


def _fitted(controlnet: Any, hook: KeepResiduals, widths: list[int]) -> Any:
    check_unwrapped("controlnet", controlnet)
    convolutions = getattr(controlnet, "controlnet_down_blocks", None)
    if not isinstance(controlnet, nn.Module) or not isinstance(convolutions, nn.ModuleList):
        raise TypeError(f"controlnet: expected a diffusers ControlNetModel; got {type(controlnet).__qualname__}")
    given = [conv.out_channels for conv in convolutions]
    if given != widths:
        raise ValueError(
            f"controlnet: expected residuals for the maps of the full model that this U-Net was made from, of {widths} "
            f"channels; got {given} (one that was made for the pruned U-Net itself needs no fit)"
        )
    return twin_with(controlnet, hook)


class _Source:
    """A U-Net as ``ControlNetModel.from_unet`` reads it, with another configuration and mid block."""

    def __init__(self, unet: Any, config: Mapping[str, Any], mid_block: nn.Module) -> None:
        from diffusers.configuration_utils import FrozenDict

        self._unet, self.config, self.mid_block = unet, FrozenDict(config), mid_block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


def controlnet_from_unet(unet: Any, **kwargs: Any) -> Any:
    """A new ControlNet with the weights of a U-Net, to be trained; ``mid_block_type`` may be ``None``.

    As ``ControlNetModel.from_unet``, which fails without a mid block. In its place the ControlNet, which needs one,
    gets one residual block that starts as the identity. The result is for this very U-Net: it is used without
    :func:`fit_controlnet`. ``ControlNetModel.from_unet(full)`` and :func:`fit_controlnet` are the other way.

    Args:
        unet: a ``UNet2DConditionModel`` that stock diffusers can describe, with as many layers in each level.
        kwargs: see ``ControlNetModel.from_unet``.

    Raises:
        ValueError: a ControlNet cannot be made so.
    """
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet_class: Any = UNet2DConditionModel
    if type(unet) is not unet_class or not isinstance(unet.config.layers_per_block, int):
        raise ValueError(
            "unet: expected a stock UNet2DConditionModel with as many layers in each level, of which diffusers can "
            f"make a ControlNet; got a {type(unet).__qualname__} with layers_per_block "
            f"{getattr(getattr(unet, 'config', None), 'layers_per_block', None)}: take ControlNetModel.from_unet(full "
            "model) and fit_controlnet"
        )
    controlnet_class: Any = ControlNetModel
    if unet.mid_block is not None:
        return controlnet_class.from_unet(unet, **kwargs)
    config = {**unet.config, "mid_block_type": "UNetMidBlock2D"}
    mid_block = _identity_mid_block(unet)
    controlnet = controlnet_class.from_unet(_Source(unet, config, mid_block), **kwargs)
    controlnet.mid_block.load_state_dict(mid_block.state_dict())
    return controlnet


def _identity_mid_block(unet: Any) -> nn.Module:
    """The mid block that ``ControlNetModel`` builds for ``"UNetMidBlock2D"``, whose block adds nothing yet."""
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D

    config = unet.config
    block: Any = UNetMidBlock2D(
        in_channels=config.block_out_channels[-1],
        temb_channels=config.block_out_channels[0] * 4,
        num_layers=0,
        resnet_eps=config.norm_eps,
        resnet_act_fn=config.act_fn,
        output_scale_factor=config.mid_block_scale_factor,
        resnet_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        add_attention=False,
    )
    for parameter in block.resnets[0].conv2.parameters():
        nn.init.zeros_(parameter)
    return block
