"""compress(): a smaller U-Net with the weights of a given one."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastsd.compress.compression import CONFIG_ENTRY, Compression
from fastsd.compress.configuration import arguments_of, unknown_entries_of
from fastsd.compress.plan import Plan, PlanError
from fastsd.compress.recipes import recipe
from fastsd.nn.plain import PLAIN
from fastsd.nn.replacement import settings_of


def compress(unet: Any, plan: Plan | str, *, in_place: bool = False) -> Any:
    """Take modules out of a U-Net, and give the rest the weights that it had there.

    The result has parameters of its own, in the dtypes and on the devices of the given ones. Where stock diffusers can
    describe it, it is a stock ``UNet2DConditionModel``, which ``save_pretrained`` writes and anyone can load; else it
    is a :class:`fastsd.CompressedUNet2DConditionModel`. It is not patched, whether or not ``unet`` is; self-attention
    that the plan gives to GRI attention is full attention until :func:`fastsd.patch`.

    A pruned U-Net needs training: what is left was not made to do without the rest.

    Args:
        unet: a ``UNet2DConditionModel``; left as it is.
        plan: a :class:`fastsd.Plan`, or the name of a recipe: ``"bk-sdm-base"``, ``"bk-sdm-small"``,
            ``"bk-sdm-tiny"``, ``"ssd-1b"``, ``"vega"`` or ``"a-sdm"``.
        in_place: change ``unet`` itself, without a second copy of the weights: it becomes the result.

    Returns:
        The compressed model; ``unet`` itself if ``in_place``.

    Raises:
        TypeError: ``unet`` is no ``UNet2DConditionModel``, or ``plan`` neither a plan nor a name.
        PlanError: there is no such recipe, the plan does not suit the model, or the model carries what would be lost:
            adapters, quantised weights, hooks, FreeU, modules and parameters that its configuration does not name.

    An error leaves the model as it was.
    """
    from diffusers import UNet2DConditionModel

    from fastsd.compress.model import CompressedUNet2DConditionModel, build

    unet_class: Any = UNet2DConditionModel
    if type(unet) is CompressedUNet2DConditionModel:
        raise TypeError("unet: expected one that no plan has changed yet; got a compressed one (make one plan of both)")
    if type(unet) is not unet_class:
        raise TypeError(f"unet: expected a diffusers UNet2DConditionModel; got {type(unet).__qualname__}")
    config = copy.deepcopy(arguments_of(unet.config))
    if isinstance(plan, str):
        plan = recipe(plan, config)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a fastsd.Plan or a recipe's name; got {type(plan).__name__}")
    _require_plain(unet, config, in_place)
    small, structure = build(config, plan)
    made = Compression(config, plan, Compression.of(unet))  # adapters ask, and files forget the rest
    if isinstance(small, CompressedUNet2DConditionModel):
        small.compression = made
    else:
        small.register_to_config(**{CONFIG_ENTRY: made.to_dict()})
    small.register_to_config(**unknown_entries_of(unet.config))

    processors = _processors(unet, in_place)
    given = unet.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    for path, sources in structure.expert_sources.items():
        layer = _cond_conv(unet, sources, plan.routing)
        state |= {f"{path}.{key}": value for key, value in layer.state_dict(keep_vars=True).items()}
    for name, placeholder in small.state_dict().items():
        if name in state:
            continue
        source = structure.source_of(name)
        value = given.get(source)
        if value is None or value.shape != placeholder.shape:
            raise PlanError(
                f"removed: expected a rest that fits together; {name} has to be {tuple(placeholder.shape)}, and "
                f"{source} is {None if value is None else tuple(value.shape)}"
            )
        state[name] = value if in_place else _copy(value)
    is_trained = {name: value.requires_grad for name, value in state.items()}  # which loading overwrites
    small.load_state_dict(state, strict=True, assign=True)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(is_trained[name])
    _carry_over(unet, small, structure, processors)
    return _become(unet, small) if in_place else small


def _require_plain(unet: Any, config: dict[str, Any], in_place: bool) -> None:
    from fastsd.compress.model import build_stock

    plain = build_stock(config)
    expected = {name: value.shape for name, value in plain.state_dict().items()}
    given = unet.state_dict(keep_vars=True)
    shapes = {name: value.shape for name, value in given.items()}
    if getattr(unet, "peft_config", None):
        raise PlanError("unet: expected one without adapters; fuse them (fuse_lora, unload_lora) or unload them first")
    if shapes != expected:
        odd = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise PlanError(
            f"unet: expected the weights that its configuration names; {len(odd)} differ, the first is {odd[0]}: "
            f"expected {_shape(expected.get(odd[0]))}, got {_shape(shapes.get(odd[0]))} (an adapter? a changed module?)"
        )
    for name, value in given.items():
        if type(value) not in PLAIN:
            raise PlanError(f"unet: expected plain parameters; {name} is a {type(value).__qualname__}")
        if value.device.type == "meta":
            raise PlanError(f"unet: expected weights; {name} has none (it is on the meta device)")
    there = dict(plain.named_modules())
    for path, module in unet.named_modules():
        _require_plain_module(path, module, there.get(path))
        if (path or not in_place) and _has_hooks(module):
            raise PlanError(
                f"unet: expected no hooks, which would be lost; {path or 'it'} has some: remove them, compress, and "
                "put them on the result"
            )
    if any(getattr(block, "b1", None) is not None for block in unet.up_blocks):
        raise PlanError("unet: expected one without FreeU; disable_freeu, compress, and enable it on the result")


def _require_plain_module(path: str, module: nn.Module, expected: nn.Module | None) -> None:
    settings = settings_of(module)
    if "forward" in module.__dict__ and settings is None:
        raise PlanError(
            f"unet: expected no hooks that offload or cast weights; {path or 'it'} has a forward of its own: "
            "remove them, compress, and put them on the result"
        )
    # processors that are modules are no part of the structure
    if expected is None:
        return
    own = type(module) if settings is None else settings.stock
    names = [f"{cls.__qualname__}({m.extra_repr()})" for cls, m in ((type(expected), expected), (own, module))]
    if own is not type(expected) or names[0] != names[1] or "_conv_forward" in module.__dict__:
        raise PlanError(
            f"unet: expected the modules that its configuration names; {path or 'it'} should be {names[0]}, and is "
            f"{names[1]}{' with a _conv_forward of its own' if names[0] == names[1] else ''}"
        )


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _shape(shape: Any) -> Any:
    return "nothing" if shape is None else tuple(shape)


def _copy(value: Tensor) -> Tensor:
    copied = value.detach().clone(memory_format=torch.preserve_format)
    return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied


def _cond_conv(unet: nn.Module, sources: tuple[str, ...], routing: str) -> nn.Module:
    from fastsd.nn.cond_conv import CondConv2d

    own, *others = (unet.get_submodule(path) for path in sources)
    try:
        return CondConv2d(own, others, routing)  # type: ignore[arg-type]
    except ValueError as error:
        raise PlanError(f"experts: {sources[0]} with {', '.join(sources[1:])}: {error}") from None


def _processors(unet: Any, in_place: bool) -> dict[str, Any]:
    """The attention processors of the result, by the given model's names; what several share stays shared."""
    if in_place:
        return unet.attn_processors
    try:
        return copy.deepcopy(unet.attn_processors)
    except Exception as error:  # theirs, whatever it is
        raise PlanError(f"unet: expected attention processors that can be copied, or in_place=True: {error}") from error


def _carry_over(unet: Any, small: Any, structure: Any, processors: dict[str, Any]) -> None:
    """What is no weight: attention processors, buffers that are not saved, training mode, checkpointing."""
    small.set_attn_processor({name: processors[structure.source_of(name)] for name in small.attn_processors})
    for name, buffer in small.named_buffers():
        if buffer.device.type == "meta":
            place, _, key = name.rpartition(".")
            small.get_submodule(place).register_buffer(
                key, unet.get_buffer(structure.source_of(name)).clone(), persistent=False
            )
    small.train(unet.training)
    if unet.is_gradient_checkpointing:
        small.enable_gradient_checkpointing()


def _become(unet: Any, small: Any) -> Any:
    """``unet`` with the class, the modules and the configuration of ``small``; its own hooks stay."""
    unet.__class__ = type(small)
    for name, value in vars(small).items():
        if not name.startswith("_") or name in ("_modules", "_internal_dict"):
            unet.__dict__[name] = value
    return unet
