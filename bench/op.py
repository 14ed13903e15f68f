"""``python -m bench op NAME``: one op at the shapes of the models, against the plain PyTorch that it replaces."""

import argparse
import functools
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastsd_kernels
from bench import harness
from bench.blocks import peak
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd_kernels.dispatch import BackendUnavailable, Op, ops
from fastsd_kernels.testing import ContractViolation, Sample, assert_contract, check_op

# a timed run is as many calls as read and write this much, which most caches do not hold, and at most so many
RUN_BYTES = 128 << 20
MOST_CALLS = 32
# about 5 ms: time to queue MOST_CALLS calls of a few launches each
HEAD_START_CYCLES = 8_000_000


@dataclass(frozen=True)
class Row:
    """One provider on one case; ``bytes`` is the least possible traffic: inputs read once, output written once."""

    case: str
    provider: str
    dtype: str
    median_s: float
    bytes: int
    flops: int
    speedup: float


@dataclass
class Measured:
    """Rows of a table, why providers were refused, and which backends do not serve which cases."""

    rows: list[Row] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    unserved: list[str] = field(default_factory=list)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("op", help="time one op at the models' shapes, against plain PyTorch")
    parser.add_argument("name", choices=[op.name for op in ops()])
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--dtype", type=arguments.dtype, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument(
        "--cache",
        choices=("warm", "cold"),
        help="warm: a call finds its input in the caches, as far as they hold it, as in a model, where the layer "
        "before has just written it (default on a CPU); cold: in memory (default on a GPU)",
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile; compiles for every case")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    return parser


def run(options: argparse.Namespace) -> int:
    device: torch.device = options.device
    dtype = options.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    harness.use(device)
    op = next(op for op in ops() if op.name == options.name)
    bench = importlib.import_module(f"bench.kernels.bench_{op.name}")
    names = [name for name in bench.CASES if options.cases in name]
    if not names:
        raise ValueError(f"cases: expected a part of the name of a case; none contains {options.cases!r}")
    cache = options.cache or ("warm" if device.type == "cpu" else "cold")
    ceiling = copy_ceiling(device)
    found = Measured()
    facts = {
        "op": op.name,
        "device": environment.device_name(device),
        "cache": cache,
        "copy_bytes_per_s": ceiling,
        "peak_flops_per_s": peak(device),
        "commit": harness.commit(),
        "versions": environment.versions(),
    }
    with torch.no_grad(), tqdm(names, leave=False, disable=None) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            sample = bench.sample(name, device, dtype)
            measure(op, bench, sample, cache == "cold", options.repeats, options.compile, found)
            if options.json:  # after every case: a run that is cut off keeps what it has measured
                rows = {"rows": list(map(vars, found.rows))}
                harness.write_json(options.json, facts | rows | _conclusions(bench, found.rows))
    print(f"{op.name}, {arguments.dtype_name(dtype)}, {facts['device']}, caches {cache}")
    print(f"a copy in memory reads and writes {ceiling / 1e9:.1f} GB/s")
    print(table(found.rows, ceiling))
    if drawn := _conclusions(bench, found.rows):
        print(bench.table(drawn["conclusions"]))
    for sentence in (*found.unserved, *found.refusals):
        print(f"bench: {sentence}", file=sys.stderr)
    return 1 if found.refusals else 0


def measure(
    op: Op,
    bench: ModuleType,
    sample: Sample,
    cold: bool,
    repeats: int,
    with_compile: bool,
    found: Measured,
) -> None:
    """Add to ``found`` the providers that keep the numerical contract on ``sample``, and why others do not count."""
    providers = {"eager": bench.eager}

    @functools.cache
    def definition() -> tuple[Tensor, Tensor]:  # in float64, and in the dtype of the sample
        public = functools.partial(getattr(fastsd_kernels, op.name), backend="reference")
        return public(**sample.map_tensors(Tensor.double).kwargs), public(**sample.kwargs)

    for name, function in _candidates(op, bench, sample, with_compile).items():
        try:
            _check(op, bench, sample, name, function, definition)
        except BackendUnavailable as refusal:
            found.unserved.append(f"{sample}: {refusal}")
        except ContractViolation as violation:
            found.refusals.append(
                f"{name} is outside the numerical contract on {sample}: {violation}; it was not timed"
            )
        except Exception as failure:  # a backend that fails must not take the others with it
            found.refusals.append(f"{name} failed on {sample}: {' '.join(str(failure).split())}")
        else:
            providers[name] = function

    traffic = _bytes(sample.kwargs.values()) + _bytes([bench.eager(**sample.kwargs)])
    calls = [sample.kwargs] * min(getattr(bench, "MOST_CALLS", MOST_CALLS), math.ceil(RUN_BYTES / traffic))
    if cold:
        calls = [sample.map_tensors(lambda t: t.clone(memory_format=torch.preserve_format)).kwargs for _ in calls]
    clock = _clock(_first(sample).device, cold)
    timings = harness.interleaved(
        {name: _over(calls, function) for name, function in providers.items()}, clock, repeats
    )
    dtype, flops = arguments.dtype_name(_first(sample).dtype), arithmetic(op, bench, sample)
    found.rows += [
        Row(
            case=sample.name,
            provider=name,
            dtype=dtype,
            median_s=timing.median / len(calls),
            bytes=traffic,
            flops=flops,
            speedup=timings["eager"].median / timing.median,
        )
        for name, timing in timings.items()
    ]


def arithmetic(op: Op, bench: ModuleType, sample: Sample) -> int:
    """The operations of one call: of the op's products as defined, unless the benchmark counts others."""
    if hasattr(bench, "flops"):
        return bench.flops(**sample.kwargs)
    kwargs = sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    return harness.flops_of(lambda: getattr(fastsd_kernels, op.name)(**kwargs))


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of several copies of RUN_BYTES in memory."""
    source = torch.zeros(RUN_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = harness.interleaved({"copy": lambda: target.copy_(source)}, _clock(device, True), repeats=5)["copy"]
    return 2 * RUN_BYTES / min(timing.seconds)


def table(rows: list[Row], ceiling: float) -> str:
    """Time, speed-up over eager, and bandwidth as a number and as a part of what a copy reaches."""
    return text_table(
        ("case", "provider", "median µs", "speed-up", "GB/s", "of a copy", "Gflop/s"),
        (
            (
                row.case,
                row.provider,
                f"{row.median_s * 1e6:.1f}",
                f"{row.speedup:.2f}×",
                f"{row.bytes / row.median_s / 1e9:.1f}",
                f"{row.bytes / row.median_s / ceiling:.0%}",
                f"{row.flops / row.median_s / 1e9:.1f}",
            )
            for row in rows
        ),
    )


def _candidates(op: Op, bench: ModuleType, sample: Sample, with_compile: bool) -> dict[str, Callable[..., Tensor]]:
    """``fastsd`` is the backend that is chosen; on a GPU every backend that serves ``sample`` also by its name."""
    public = getattr(fastsd_kernels, op.name)

    def forced(backend: str) -> Callable[..., Tensor]:
        return lambda **kwargs: public(**kwargs, backend=backend)

    candidates = {"fastsd": public}
    device = _first(sample).device
    if device.type == "cuda":
        for name in op.order(device):
            if name != "reference" and op.backends[name].unavailable() is None:
                candidates[name] = forced(name)
    if with_compile:
        torch.compiler.reset()
        candidates["compile"] = torch.compile(bench.eager, dynamic=False)
    yardsticks = {name: function for name, (function, _) in _yardsticks(bench).items()}
    return candidates | _others(bench, device, with_compile) | yardsticks


def _others(bench: ModuleType, device: torch.device, with_compile: bool) -> dict[str, Callable[..., Tensor]]:
    """What a benchmark compares with beside ``eager``, where that computes another function than the op."""
    return bench.others(device, with_compile) if hasattr(bench, "others") else {}


def _yardsticks(bench: ModuleType) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """Functions other than the op's that its time is held against, each with its definition in plain PyTorch."""
    return bench.yardsticks() if hasattr(bench, "yardsticks") else {}


def _conclusions(bench: ModuleType, rows: list[Row]) -> dict[str, Any]:
    """What a benchmark draws from the medians of all its providers, where it does."""
    if not hasattr(bench, "conclusions"):
        return {}
    medians: dict[str, dict[str, float]] = {}
    for row in rows:
        medians.setdefault(row.case, {})[row.provider] = row.median_s
    return {"conclusions": bench.conclusions(medians)}


def _first(sample: Sample) -> Tensor:
    return next(value for value in sample.kwargs.values() if isinstance(value, Tensor))


def _check(
    op: Op,
    bench: ModuleType,
    sample: Sample,
    name: str,
    function: Callable[..., Tensor],
    definition: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    if name in _others(bench, _first(sample).device, True):
        assert_contract(function(**sample.kwargs), *definition(), sample.relative_l2)
    elif name in (yardsticks := _yardsticks(bench)):
        plain = yardsticks[name][1]
        exact = plain(**sample.map_tensors(Tensor.double).kwargs)
        assert_contract(function(**sample.kwargs), exact, plain(**sample.kwargs), sample.relative_l2)
    elif name == "compile":
        exact = bench.eager(**sample.map_tensors(Tensor.double).kwargs)
        assert_contract(function(**sample.kwargs), exact, bench.eager(**sample.kwargs))
    else:
        check_op(op, sample, None if name == "fastsd" else name)


def _over(calls: list[dict[str, Any]], function: Callable[..., Tensor]) -> harness.Run:
    def run() -> None:
        for kwargs in calls:
            function(**kwargs)

    return run


def _bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _clock(device: torch.device, cold: bool) -> harness.Clock:
    """A clock; a cold one first pushes everything out of the caches."""
    clock = harness.cuda_clock(device, HEAD_START_CYCLES) if device.type == "cuda" else harness.host_clock()
    if not cold:
        return clock
    scratch = torch.empty(RUN_BYTES, dtype=torch.uint8, device=device)

    def after_flush(run: harness.Run) -> float:
        scratch.zero_()
        return clock(run)

    return after_flush
