"""Small models of every kind that patch serves, and how a patched one is compared with the stock one."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.models import example_inputs, flat_output
from fastsd.nn.resnet_block import ResnetBlock2D as FastResnetBlock2D

TINY = {
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "sample_size": 16,
}
_SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
}
_ONE_LEVEL = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
_NO_ATTENTION = {
    "block_out_channels": (4,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
    "layers_per_block": 1,
    "sample_size": 16,
}

# name: class, arguments, residual blocks
_MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "unet": ("UNet2DConditionModel", TINY, 8),
    # one level, with attention in the middle or on the way up: for what takes long with many modules
    "small": ("UNet2DConditionModel", TINY | _ONE_LEVEL, 5),
    "cross_up": (
        "UNet2DConditionModel",
        TINY
        | _ONE_LEVEL
        | {"up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None, "use_linear_projection": True},
        3,
    ),
    "scale_shift": ("UNet2DConditionModel", TINY | {"resnet_time_scale_shift": "scale_shift"}, 8),
    "resnet_sampling": ("UNet2DConditionModel", TINY | _SIMPLE, 10),
    "skip_time_act": ("UNet2DConditionModel", TINY | _SIMPLE | {"resnet_skip_time_act": True}, 10),
    "output_scale": ("UNet2DConditionModel", TINY | _SIMPLE | {"resnet_out_scale_factor": 1.5}, 10),
    "mid_scale": ("UNet2DConditionModel", TINY | {"mid_block_scale_factor": 1.4142}, 8),
    "no_mid_block": ("UNet2DConditionModel", TINY | {"mid_block_type": None}, 6),
    "plain_mid_block": ("UNet2DConditionModel", TINY | {"mid_block_type": "UNetMidBlock2D"}, 7),
    "nine_channels": ("UNet2DConditionModel", TINY | {"in_channels": 9}, 8),
    "eight_channels": ("UNet2DConditionModel", TINY | {"in_channels": 8}, 8),
    "gligen": ("UNet2DConditionModel", TINY | {"attention_type": "gated"}, 8),
    "dropout": ("UNet2DConditionModel", TINY | {"dropout": 0.3}, 8),
    # as SD2.x and SDXL
    "linear_projections": (
        "UNet2DConditionModel",
        TINY | {"use_linear_projection": True, "transformer_layers_per_block": 2},
        8,
    ),
    "unet_2d_model": (
        "UNet2DModel",
        {
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        8,
    ),
    "no_attention": ("UNet2DModel", _NO_ATTENTION, 5),
    "no_attention_scale_shift": ("UNet2DModel", _NO_ATTENTION | {"resnet_time_scale_shift": "scale_shift"}, 5),
    "controlnet": (
        "ControlNetModel",
        {key: value for key, value in TINY.items() if key not in ("sample_size", "up_block_types")}
        | {"conditioning_embedding_out_channels": (4, 8)},
        4,
    ),
    "vae": (
        "AutoencoderKL",
        {
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        10,
    ),
}
NAMES = tuple(name for name in _MODELS if name not in ("small", "cross_up"))


def build(name: str = "unet", *, seed: int = 0) -> nn.Module:
    """A model in evaluation mode, every parameter random: norms that do not scale would hide mistakes."""
    class_name, config, _ = _MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, class_name)(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def block_count(name: str) -> int:
    """How many residual blocks ``build(name)`` has."""
    return _MODELS[name][2]


def norm_count(name: str) -> int:
    """How many norms of ``build(name)`` have an activation behind them: two of a block, one of either half of a VAE."""
    return 2 * block_count(name) + (2 if name == "vae" else 0)


def blocks(model: nn.Module) -> list[ResnetBlock2D]:
    """The residual blocks of a model, fast or stock."""
    return [module for module in model.modules() if isinstance(module, ResnetBlock2D)]


class Pipeline:
    """A pipeline as patch sees it: something with ``components``."""

    def __init__(self, **components: Any) -> None:
        self.components = components


def fingerprint(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Everything that patch could have left on a model: classes, attributes, tensors."""
    return [
        (path, type(module), {key: id(value) for key, value in vars(module).items()})
        for path, module in model.named_modules()
    ], [(name, id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()]


def assert_untouched(model: nn.Module, before: tuple[list[Any], list[Any]]) -> None:
    """The model is as it was when :func:`fingerprint` gave ``before``."""
    modules, tensors = fingerprint(model)
    assert modules == before[0]
    assert all(
        (name, identity) == (old_name, old_identity) and torch.equal(value, old)
        for (name, identity, value), (old_name, old_identity, old) in zip(tensors, before[1], strict=True)
    )


def fast(model: nn.Module) -> list[bool]:
    """For each residual block whether it has its fast class."""
    return [type(block) is FastResnetBlock2D for block in blocks(model)]


def call(
    model: nn.Module, batch: int = 2, latent: int = 16, rounded_to: torch.dtype | None = None, **inputs: Any
) -> Tensor:
    """All values that ``model`` gives for random inputs, the same on every call, as one float64 vector.

    ``rounded_to`` gives a model of a wider dtype the inputs that one of this dtype gets.
    """
    if isinstance(model, diffusers.AutoencoderKL):
        image = torch.randn(batch, 3, latent, latent, generator=torch.Generator().manual_seed(0))
        inputs = {"sample": image.to(model.dtype), "return_dict": False} | inputs
    else:
        inputs = example_inputs(model, batch, latent, tokens=7) | inputs
    if rounded_to is not None:
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                inputs[name] = value.to(rounded_to).to(model.dtype)
    return flat_output(model(**inputs))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The relative L2 distance; infinite where a value is not finite."""
    error = ((actual - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def assert_layout(actual: Tensor, stock: Tensor) -> None:
    """A replaced block gives a map that is channels last, or laid out as stock's."""
    assert actual.is_contiguous(memory_format=torch.channels_last) or actual.stride() == stock.stride()


def assert_as_stock(actual: Tensor, stock: Tensor) -> None:
    """The float32 contract of a patched model."""
    assert relative_error(actual, stock) <= 1e-4


class _OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.norms = self.convolutions = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += fused_in(function, args, "convolutions")
        self.norms += fused_in(function, args, "norms")
        return function(*args, **(kwargs or {}))


def fused_in(target: Any, args: Any, what: str) -> int:
    """How many ``"convolutions"``, or ``"norms"`` with an activation behind them, a call computes in an op of fastsd.

    A residual block that runs its fast forward has two such norms; transformers have none.
    """
    if target is torch.ops.fastsd.resnet_block.default:
        _, conv1, conv2, *rest = args
        shortcut = rest[11] if len(rest) > 11 else None
        kernels = [weight for weight in (conv1, conv2, shortcut) if weight is not None]
        return len(kernels) if what == "convolutions" else 2 * (conv1 is not None)
    if target is torch.ops.fastsd.conv2d.default:
        is_activated_norm = len(args) > 12 and args[6] > 0 and args[12] == "silu"
        return 1 if what == "convolutions" else int(is_activated_norm)
    # the activation is SiLU unless another is given
    is_activated = len(args) <= 5 or args[5] == "silu"
    return int(what == "norms" and target is torch.ops.fastsd.group_norm_silu.default and is_activated)


def op_calls(function: Callable[[], Any]) -> int:
    """How many norms with an activation ``function()`` computes in ops of fastsd."""
    with torch.no_grad(), _OpCounter() as counter:
        function()
    return counter.norms


def fused_convolutions(function: Callable[[], Any], *, grad: bool = False) -> int:
    """How many convolutions ``function()`` computes in ops of fastsd."""
    with torch.set_grad_enabled(grad), _OpCounter() as counter:
        function()
    return counter.convolutions


class OpCalls(TorchDispatchMode):
    """Which of the ops of these names (``"aten::add"``) are called, in their order."""

    def __init__(self, *wanted: str) -> None:
        super().__init__()
        self.wanted = wanted
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition(".")[0]
        self.names += [name] * (name in self.wanted)
        return function(*args, **(kwargs or {}))


def calls_of(name: str, function: Callable[[], Any]) -> int:
    """How often ``function()`` calls the library's op of this name."""
    with OpCalls(f"fastsd::{name}") as calls:
        function()
    return len(calls.names)
