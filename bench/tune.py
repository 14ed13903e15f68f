"""``python -m bench tune``: which implementation of each convolution of the models is the fastest on a CUDA device.

Times cuDNN between this library's passes, the CUDA kernel and every tile of the Triton kernel, each checked against the
numerical contract first, and writes what was fastest to a file that :mod:`fastsd_kernels.conv2d.measured` reads.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import harness
from bench.op import HEAD_START_CYCLES
from fastsd import models
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import measured
from fastsd_kernels.conv2d.measured import Shape
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import ContractViolation, Sample, assert_contract
from fastsd_kernels.testing.inputs import feature_map, random_tensor

MODELS = "sd15,bk-small,sdxl,vae-sd"
NUM_GROUPS = 32
# What is not cuDNN has to be so much faster, or noise would decide
FEWEST_GAIN = 1.03


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("tune", help="measure which implementation of conv2d a CUDA device should take")
    parser.add_argument("--models", default=MODELS, metavar="NAMES", help=f"named models (default: {MODELS})")
    parser.add_argument("--batch", type=int, default=2, help="2 is one image with guidance (default: 2)")
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--dtype", type=arguments.dtype, default=torch.float16, help="float16 or bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="PATH",
        help=f"add the choices to that file; {measured.ENVIRONMENT_VARIABLE} takes it",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all times there")
    return parser


def run(options: argparse.Namespace) -> int:
    if options.device.type != "cuda":
        raise ValueError(f"--device: expected a CUDA device, whose choices these are; got {options.device}")
    if options.dtype.itemsize != 2:
        raise ValueError(f"--dtype: expected float16 or bfloat16; got {arguments.dtype_name(options.dtype)}")
    harness.use(options.device)
    capability = measured.key(torch.cuda.get_device_capability(options.device))
    tables = measured.read(options.into) if options.into and options.into.exists() else {}
    clock = harness.cuda_clock(options.device, HEAD_START_CYCLES)
    facts = {
        "device": environment.device_name(options.device),
        "dtype": arguments.dtype_name(options.dtype),
        "batch": options.batch,
        "commit": harness.commit(),
        "versions": environment.versions(),
    }
    rows: list[dict[str, Any]] = []
    shapes = sorted(set().union(*(shapes_of(name) for name in _names(options.models))))
    with torch.no_grad(), tqdm(shapes, leave=False, disable=None) as bar:
        for shape in bar:
            sample = sample_of(shape, options.batch, options.device, options.dtype)
            seconds, left_out = measure(sample, clock, options.repeats)
            for name, reason in left_out.items():
                tqdm.write(f"bench: {name} is left out of {sample}: {reason}", file=sys.stderr)
            fastest = choice(seconds)
            rows.append(shape._asdict() | {"fastest": fastest, "seconds": seconds, "left_out": left_out})
            if fastest is not None:
                tables.setdefault(capability, {})[shape] = fastest
            if options.into:  # after every convolution: a run that is cut off keeps what it has measured
                harness.write_json(options.into, measured.as_json(tables))
            if options.json:
                harness.write_json(options.json, facts | {"rows": rows})
    print(f"conv2d, batch {options.batch}, {facts['dtype']}, {facts['device']}; µs")
    print(table(rows))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def shapes_of(model: str) -> set[Shape]:
    """The convolutions that one forward of a named model calls, as far as conv2d serves them."""
    loaded = models.load(model, torch.float32, torch.device("meta"))
    found = set()

    def note(module: nn.Conv2d, args: tuple[Any, ...], result: Tensor) -> None:
        kernel, stride = module.kernel_size[0], module.stride[0]
        if module.groups == 1 and module.kernel_size in ((1, 1), (3, 3)):
            found.add(Shape(kernel, stride, module.in_channels, module.out_channels, *result.shape[2:]))

    handles = [m.register_forward_hook(note) for m in loaded.modules() if isinstance(m, nn.Conv2d)]
    models.entry_point(loaded)(**models.example_inputs(loaded))
    for handle in handles:
        handle.remove()
    return found


def sample_of(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Sample:
    """A call with that convolution; a 3×3 one of stride 1 with the norm and SiLU that stand before most of them."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    size = (batch, shape.channels, shape.height * shape.stride, shape.width * shape.stride)
    window = (shape.out_channels, shape.channels, shape.kernel, shape.kernel)
    weight = random_tensor(window, **like, seed=1) * (shape.channels * shape.kernel**2) ** -0.5
    kwargs = {
        "x": feature_map(size, "channels_last", **like),
        "weight": weight.contiguous(memory_format=torch.channels_last),
        "bias": random_tensor((shape.out_channels,), **like, seed=2),
        "stride": shape.stride,
        "padding": shape.kernel // 2,
    }
    if shape.kernel == 3 and shape.stride == 1 and shape.channels % NUM_GROUPS == 0:
        parameters = (random_tensor((shape.channels,), **like, seed=seed) for seed in (3, 4))
        kwargs |= dict(zip(("norm_weight", "norm_bias"), parameters, strict=True))
        kwargs |= {"num_groups": NUM_GROUPS, "activation": "silu"}
    return Sample("x".join(map(str, shape)), kwargs)


def call(name: str, kwargs: dict[str, Any]) -> Tensor:
    """conv2d by one of :data:`measured.IMPLEMENTATIONS`."""
    if measured.tile(name) is None:
        return conv2d(**kwargs, algorithm=name, backend="cuda")
    with measured.forced(name):
        return conv2d(**kwargs, backend="triton")


def measure(sample: Sample, clock: harness.Clock, repeats: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each implementation that keeps the contract, and why the others do not count."""
    left_out: dict[str, str] = {}
    runs: dict[str, harness.Run] = {}
    try:
        exact = conv2d(**sample.map_tensors(Tensor.double).kwargs, backend="reference")
        plain = conv2d(**sample.kwargs, backend="reference")
    except torch.OutOfMemoryError as error:
        return {}, dict.fromkeys(measured.IMPLEMENTATIONS, _line(error))
    for name in measured.IMPLEMENTATIONS:
        try:
            assert_contract(call(name, sample.kwargs), exact, plain)
        except (BackendUnavailable, ContractViolation, torch.OutOfMemoryError) as error:
            left_out[name] = _line(error)
        else:
            runs[name] = partial(call, name, sample.kwargs)
    timings = harness.interleaved(runs, clock, repeats)
    return {name: timing.median for name, timing in timings.items()}, left_out


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def choice(seconds: dict[str, float]) -> str | None:
    """The fastest; cuDNN, unless another is clearly faster; ``None`` if nothing was compared with cuDNN."""
    if measured.DIRECT not in seconds:
        return None
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] * FEWEST_GAIN < seconds[measured.DIRECT] else measured.DIRECT


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds of each implementation, and the choice."""
    return text_table(
        ("convolution", *measured.IMPLEMENTATIONS, "choice"),
        (
            (
                "{kernel}² /{stride} {channels}->{out_channels} {height}x{width}".format(**row),
                *(
                    f"{1e6 * row['seconds'][name]:.1f}" if name in row["seconds"] else ""
                    for name in measured.IMPLEMENTATIONS
                ),
                row["fastest"] or "none: no time of direct",
            )
            for row in rows
        ),
    )
