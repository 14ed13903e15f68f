"""The ways to run one model that are compared: stock diffusers in its usual dresses, and fastsd."""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

import fastsd
from fastsd import models
from fastsd.gri import highest_level
from fastsd.nn.graphs import EAGER_CALLS

Call = Callable[[], Any]


def _compiled(call: Call) -> Call:
    return torch.compile(call)


def _compiled_max(call: Call) -> Call:
    return torch.compile(call, mode="max-autotune")


def _captured(call: Call) -> Call:
    """One CUDA graph of the whole call; every replay returns the same output tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def _recorded(call: Call) -> Call:
    """With the calls behind it after which ``patch(…, cuda_graphs=…)`` replays."""
    for _ in range(EAGER_CALLS + 1):
        call()
    return call


def _openvino(model: models.Model, inputs: dict[str, Any]) -> Call:
    """OpenVINO's CPU plugin on the traced model, in float32 and for this size alone."""
    import openvino

    values, structure = pytree.tree_flatten(inputs)
    places = [place for place, value in enumerate(values) if isinstance(value, torch.Tensor)]
    tensors = tuple(values[place] for place in places)

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            given = list(values)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            return models.entry_point(self.model)(**pytree.tree_unflatten(given, structure))[0]

    sizes = [list(tensor.shape) for tensor in tensors]
    converted = openvino.convert_model(Traced().eval(), example_input=tensors, input=sizes)
    # without the hint it takes bfloat16 where the processor has it
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(converted, "CPU", options | {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    arrays = [tensor.numpy() for tensor in tensors]
    return lambda: torch.from_numpy(compiled(arrays)[0])


@dataclass(frozen=True)
class Provider:
    """How the model is laid out, whether fastsd patches it, and what goes around the call.

    ``gri``: at the highest level that has transformers, whatever it says itself. ``graphs``: by the option of
    :func:`fastsd.patch`, which compares the model at each call. ``convert``: another runtime's call,
    of the model with these inputs; ``needs``: the package that it is from.
    """

    channels_last: bool = False
    patched: bool = False
    gri: fastsd.GRI | None = None
    graphs: bool | None = None
    around: Callable[[Call], Call] = lambda call: call
    cuda_only: bool = False
    convert: Callable[[models.Model, dict[str, Any]], Call] | None = None
    needs: str | None = None


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(),
    "channels_last": Provider(channels_last=True),
    "compile": Provider(around=_compiled),
    "compile-max": Provider(around=_compiled_max, cuda_only=True),
    "cudagraph": Provider(around=_captured, cuda_only=True),
    "openvino": Provider(convert=_openvino, needs="openvino"),
    "fastsd": Provider(patched=True),
    "fastsd+gri": Provider(patched=True, gri=fastsd.GRI()),
    "fastsd-channels_last": Provider(patched=True, channels_last=True),
    "fastsd-compile": Provider(patched=True, around=_compiled),
    "fastsd-cudagraph": Provider(patched=True, around=_captured, cuda_only=True),
    "fastsd-graphs": Provider(patched=True, graphs=True, around=_recorded, cuda_only=True),
    "fastsd-channels_last-cudagraph": Provider(patched=True, channels_last=True, around=_captured, cuda_only=True),
}


def check_providers(names: Sequence[str], device: torch.device) -> None:
    """Raise ``ValueError`` for a name that is unknown or cannot run on ``device``."""
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"providers: expected some of {', '.join(PROVIDERS)}; got {name!r}")
        if PROVIDERS[name].cuda_only and device.type != "cuda":
            raise ValueError(f"providers: {name} needs a CUDA device; leave it out on {device}")
        if PROVIDERS[name].convert is not None and device.type != "cpu":
            raise ValueError(f"providers: {name} runs on a CPU; leave it out on {device}")
        needed = PROVIDERS[name].needs
        if needed is not None and importlib.util.find_spec(needed) is None:
            raise ValueError(f"providers: {name} needs a package that is not installed; pip install {needed}")


def prepare(name: str, model: models.Model, inputs: dict[str, Any]) -> Call:
    """The call that is timed. Each provider gets modules of its own; ``model`` is left as it is."""
    provider = PROVIDERS[name]
    return _dressed(provider, twin(model, provider.channels_last), inputs)


def prepare_in_place(name: str, model: models.Model, inputs: dict[str, Any]) -> Call:
    """The same call on ``model`` itself, which is changed: what a user has who keeps no second copy."""
    provider = PROVIDERS[name]
    if provider.channels_last:
        torch.nn.Module.to(model, memory_format=torch.channels_last)
    return _dressed(provider, model, inputs)


def twin(model: models.Model, channels_last: bool = False) -> models.Model:
    """A copy of the modules that shares the weights; in channels_last the kernels of convolutions are copied."""
    shared: dict[int, Any] = {}
    for weight in model.parameters():
        is_kernel = channels_last and weight.dim() == 4
        shared[id(weight)] = (
            torch.nn.Parameter(_channels_last(weight.detach()), weight.requires_grad) if is_kernel else weight
        )
    return copy.deepcopy(model, shared)


def _dressed(provider: Provider, own: models.Model, inputs: dict[str, Any]) -> Call:
    if provider.channels_last:
        inputs = {key: _channels_last(value) for key, value in inputs.items()}
    if provider.patched:
        gri = provider.gri and replace(provider.gri, levels=highest_level(own))
        fastsd.patch(own, gri=gri, cuda_graphs=provider.graphs)
    if provider.convert is not None:
        return provider.convert(own, inputs)
    call = models.entry_point(own)
    return provider.around(lambda: call(**inputs))


def _channels_last(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
