"""What the stages of a U-Net hold, compute and take: parameters, multiply-accumulates, bytes of weights, seconds."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastsd_kernels.flops  # noqa: F401, counts the ops

EMBEDDINGS = "embeddings"
_LISTS = ("down_blocks", "up_blocks")
_LAST = ("conv_norm_out", "conv_act", "conv_out")


@dataclass(frozen=True)
class Cost:
    """What a stage of a U-Net, or the whole, holds and computes in one call.

    Attributes:
        parameters: how many numbers its parameters have.
        bytes: of its parameters and buffers.
        macs: multiply-accumulates of convolutions and linear layers, and of mixing kernels and their biases.
        attention_macs: those of the products of queries, keys and values.
    """

    parameters: int = 0
    bytes: int = 0
    macs: int = 0
    attention_macs: int = 0

    @property
    def all_macs(self) -> int:
        return self.macs + self.attention_macs

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.macs + other.macs,
            self.attention_macs + other.attention_macs,
        )


def stages(unet: Any) -> dict[str, list[str]]:
    """The stages of a U-Net from its input to its output, and the paths of the modules of each.

    ``conv_in``; ``embeddings`` of time and whatever else; ``down_blocks.N``; ``mid_block``; ``up_blocks.N``;
    ``conv_out`` with its norm. Every parameter is in one of them.
    """
    found: dict[str, list[str]] = {"conv_in": [], EMBEDDINGS: []}
    last = []
    for name, _ in unet.named_children():
        if name in _LISTS:
            continue
        if name in _LAST:
            last.append(name)
        elif name != "mid_block":
            found["conv_in" if name == "conv_in" else EMBEDDINGS].append(name)
    for blocks in _LISTS:
        found |= {f"{blocks}.{index}": [f"{blocks}.{index}"] for index in range(len(getattr(unet, blocks)))}
        if blocks == "down_blocks" and getattr(unet, "mid_block", None) is not None:
            found["mid_block"] = ["mid_block"]
    return {name: paths for name, paths in (found | {"conv_out": last}).items() if paths}


def measure(unet: Any, *, batch: int = 1, latent: int | None = None, tokens: int = 77) -> dict[str, Cost]:
    """What each stage of a U-Net holds and computes, by its name in :func:`stages`; takes neither memory nor weights.

    Counted by ``torch.utils.flop_counter``, as defined: whatever algorithm a kernel takes, patched or not. Where the
    plan of a compressed model has GRI attention, that is counted, as :func:`fastsd.patch` puts it there.

    Args:
        unet: a ``UNet2DConditionModel``, on any device; left as it is.
        batch: samples; classifier-free guidance on one image is 2.
        latent: side of the square latent; ``None`` for the one that the model was made for.
        tokens: length of the text context.
    """
    from fastsd import models

    own = _without_weights(unet)
    _put_gri(own)
    inputs = models.example_inputs(own, batch, latent, tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        own(**inputs)
    counts = counter.get_flop_counts()
    found = {}
    for stage, paths in stages(own).items():
        cost = Cost()
        for path in paths:
            module = own.get_submodule(path)
            flops = counts.get(f"{type(own).__name__}.{path}", {})
            attention = sum(count for op, count in flops.items() if _is_attention(str(op)))
            tensors = [*module.parameters(), *module.buffers()]
            cost += Cost(
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                bytes=sum(tensor.nbytes for tensor in tensors),
                macs=(sum(flops.values()) - attention) // 2,
                attention_macs=attention // 2,
            )
        found[stage] = cost
    return found


def total(costs: dict[str, Cost]) -> Cost:
    """The sum over all stages."""
    return sum(costs.values(), Cost())


@contextmanager
def timed(unet: Any) -> Iterator[Callable[[dict[str, Any]], dict[str, float]]]:
    """Within it, a function that calls a U-Net with keyword arguments and returns the seconds of each stage.

    And under ``"total"`` those of the whole call, which has more than its stages: what stands between them. Timed by
    hooks on the stages, which are gone behind it; on a CUDA device each waits for the device, so that the whole takes
    longer than it does without them.
    """
    seconds: dict[str, float] = {}
    device = next(unet.parameters()).device
    handles = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def watch(stage: str, module: nn.Module) -> None:
        start = 0.0

        def before(*arguments: Any) -> None:
            nonlocal start
            start = now()

        def after(*arguments: Any) -> None:
            seconds[stage] = seconds.get(stage, 0.0) + now() - start

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    def call(inputs: dict[str, Any]) -> dict[str, float]:
        seconds.clear()
        start = now()
        with torch.no_grad():
            unet(**inputs)
        return {**seconds, "total": now() - start}

    try:
        for stage, paths in stages(unet).items():
            for path in paths:
                watch(stage, unet.get_submodule(path))
        yield call
    finally:
        for handle in handles:
            handle.remove()


def _without_weights(unet: Any) -> Any:
    """A copy on ``meta``. Copies of patched modules are stock ones."""
    empty: dict[int, Any] = {}
    for parameter in unet.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in unet.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(unet, empty)


def _put_gri(unet: Any) -> None:
    compression = getattr(unet, "compression", None)
    if compression is not None and compression.plan.gri is not None:
        from fastsd.patching import patch

        patch(unet, rules=[], gri=compression.plan.gri)


def _is_attention(op: str) -> bool:
    return "bmm" in op or "attention" in op
