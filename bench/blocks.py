"""``python -m bench blocks``: every distinct residual block and resampling of a model, patched against stock."""

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastsd
from bench import harness
from fastsd import models
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table

CLASSES = ("ResnetBlock2D", "Upsample2D", "Downsample2D")
FLOAT32_LIMIT = 1e-4


@dataclass(frozen=True, eq=False)
class Block:
    """A module of a model and the arguments of a call, all on the ``meta`` device: only ``build`` takes memory."""

    module: nn.Module
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        batch, channels, height, width = self.arguments[0].shape
        out = next(p.shape[0] for name, p in reversed(list(self.module.named_parameters())) if p.dim() == 4)
        return f"{type(self.module).__name__} {batch}x{channels}->{out}x{height}x{width}"

    def build(self, device: torch.device) -> tuple[nn.ModuleList, tuple[Any, ...]]:
        """The module with random weights, alone in a list, and random arguments."""
        generator = torch.Generator().manual_seed(0)
        module = copy.deepcopy(self.module).to_empty(device=device).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        given = _tensors(self.arguments, lambda value: torch.randn(value.shape, generator=generator).to(device))
        return nn.ModuleList([module]), given


@dataclass(frozen=True)
class Row:
    """One block: the times of the providers, and how often the model has it."""

    block: str
    count: int
    gflop: float
    megabytes: float
    relative_l2: float
    timings: dict[str, dict[str, float]]
    speedup: float
    gflops_per_s: float
    of_ceiling: float


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("blocks", help="time every distinct block of a model, patched against stock")
    parser.add_argument("--model", default="sd15", help="a named model (default: sd15)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--latent", type=int, help="side of the latent (default: the model's own)")
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--blocks", default="", metavar="TEXT", help="only blocks whose name contains TEXT")
    parser.add_argument("--compile", action="store_true", help="also torch.compile; compiles for every block")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    return parser


def run(options: argparse.Namespace) -> int:
    harness.use(options.device)
    with torch.no_grad():
        every = distinct(options.model, options.batch, options.latent)
        blocks = {block: count for block, count in every.items() if options.blocks in block.name}
        if not blocks:
            raise ValueError(f"blocks: expected a part of the name of a block; none contains {options.blocks!r}")
        ceiling = peak(options.device)
        rows, refusals = [], []
        for block, count in tqdm(blocks.items(), leave=False, disable=None):
            row = measure(block, count, ceiling, options)
            if row.relative_l2 > FLOAT32_LIMIT:
                refusals.append(f"{block.name}: relative L2 error {row.relative_l2:.1e}; it does not count")
            else:
                rows.append(row)
            if options.json:
                facts = {
                    "model": options.model,
                    "device": environment.device_name(options.device),
                    "commit": harness.commit(),
                    "versions": environment.versions(),
                    "ceiling_flops_per_s": ceiling,
                }
                harness.write_json(options.json, facts | {"rows": [vars(row) for row in rows]})
    print(f"{options.model}, batch {options.batch}, float32, {environment.device_name(options.device)}")
    print(
        f"ceiling: the faster of a 2048³ product of matrices and a 512-channel convolution, {ceiling / 1e9:.0f} Gflop/s"
    )
    print(table(rows))
    for sentence in refusals:
        print(f"bench: {sentence}", file=sys.stderr)
    return 1 if refusals else 0


def distinct(name: str, batch: int, latent: int | None) -> Counter[Block]:
    """The blocks that one forward of a named model calls, each with how often."""
    model = models.load(name, torch.float32, torch.device("meta"))
    seen: dict[Any, Block] = {}
    counts: Counter[Block] = Counter()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        shapes = _tensors(given, lambda value: value.shape)
        weights = tuple(parameter.shape for parameter in module.parameters())
        block = seen.setdefault((type(module), shapes, weights), Block(module, given))
        counts[block] += 1

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__ in CLASSES
    ]
    models.entry_point(model)(**models.example_inputs(model, batch, latent))
    for handle in handles:
        handle.remove()
    return counts


def measure(block: Block, count: int, ceiling: float, options: argparse.Namespace) -> Row:
    """Stock in both layouts, compiled if wanted, and patched, interleaved."""
    holder, given = block.build(options.device)
    fast, stock = copy.deepcopy(holder), holder[0]
    fastsd.patch(fast, strict=True)
    last = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    given_last = _tensors(given, lambda v: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v)
    runs = {
        "eager": lambda: stock(*given),
        "eager channels_last": lambda: last(*given_last),
        "fastsd": lambda: fast[0](*given_last),
    }
    if options.compile:
        torch.compiler.reset()
        compiled = torch.compile(last, dynamic=False)
        runs["compile"] = lambda: compiled(*given_last)
    error = harness.relative_l2(runs["fastsd"](), copy.deepcopy(stock).double()(*_tensors(given, Tensor.double)))
    timings = harness.interleaved(runs, harness.clock_for(options.device), options.repeats, warmup=2)
    flops, out = harness.flops_of(runs["eager"]), runs["eager"]()
    least = sum(t.nbytes for t in (*given, *stock.parameters(), out) if isinstance(t, Tensor))
    seconds = timings["fastsd"].median
    return Row(
        block=block.name,
        count=count,
        gflop=flops / 1e9,
        megabytes=least / 1e6,
        relative_l2=error,
        timings={name: timing.summary() for name, timing in timings.items()},
        speedup=min(timings["eager"].median, timings["eager channels_last"].median) / seconds,
        gflops_per_s=flops / seconds / 1e9,
        of_ceiling=flops / seconds / ceiling,
    )


def peak(device: torch.device) -> float:
    """Floating-point operations per second of the fastest of several large products and convolutions."""
    square = torch.randn(2048, 2048, device=device)
    x = torch.randn(1, 512, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 3, 3, device=device)
    runs = {"product": lambda: square @ square, "convolution": lambda: torch.conv2d(x, weight, padding=1)}
    timings = harness.interleaved(runs, harness.clock_for(device), repeats=7)
    return max(
        2 * 2048**3 / min(timings["product"].seconds), 2 * 9 * 512**2 * 64**2 / min(timings["convolution"].seconds)
    )


def _tensors(given: tuple[Any, ...], change: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """``given`` with its tensors changed; a size that an upsampling is asked for stays as it is."""
    return tuple(change(value) if isinstance(value, Tensor) else value for value in given)


def table(rows: list[Row]) -> str:
    """Milliseconds; the speed-up is over the better of eager's two layouts."""
    providers = list(rows[0].timings) if rows else []
    return text_table(
        (
            "block",
            "×",
            "Gflop",
            "MB",
            *(f"{name} ms" for name in providers),
            "speed-up",
            "Gflop/s",
            "of ceiling",
            "error",
        ),
        (
            (
                row.block,
                str(row.count),
                f"{row.gflop:.2f}",
                f"{row.megabytes:.1f}",
                *(harness.milliseconds(row.timings[name]["median_s"]) for name in providers),
                f"{row.speedup:.2f}×",
                f"{row.gflops_per_s:.0f}",
                f"{row.of_ceiling:.0%}",
                f"{row.relative_l2:.1e}",
            )
            for row in rows
        ),
    )
