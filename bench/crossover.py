"""``python -m bench crossover``: conv2d's algorithms on the CPU by channels and size, and which is chosen."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import harness
from fastsd.cli import environment
from fastsd.cli.table import text_table
from fastsd_kernels import conv2d
from fastsd_kernels.conv2d import cpu_costs
from fastsd_kernels.conv2d.packed_weights import WeightBudget

ALGORITHMS = ("direct", "product", "winograd2", "winograd4")
CHANNELS = (64, 128, 320, 640, 1280)
SIDES = (8, 16, 32, 64, 128)
MOST_FLOPS = 60e9


@dataclass(frozen=True)
class Row:
    """One 3×3 convolution of C to C channels on a square map, packed weights kept; seconds of each algorithm."""

    channels: int
    side: int
    seconds: dict[str, float]
    chosen: str

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=lambda name: self.seconds[name])


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("crossover", help="time conv2d's algorithms on the CPU, and show what is chosen")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    return parser


def run(options: argparse.Namespace) -> int:
    sizes = [(c, s) for c in CHANNELS for s in SIDES if 18 * c * c * s * s <= MOST_FLOPS]
    rows = []
    with torch.no_grad():
        for channels, side in tqdm(sizes, leave=False, disable=None):
            rows.append(measure(channels, side, options.repeats))
            if options.json:
                facts = {"device": environment.device_name(torch.device("cpu")), "commit": harness.commit()}
                harness.write_json(options.json, facts | {"rows": list(map(asdict, rows))})
    print(
        f"3×3, batch 1, float32, channels_last, weights packed before; {environment.device_name(torch.device('cpu'))}"
    )
    print(table(rows))
    return 0


def measure(channels: int, side: int, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * (9 * channels) ** -0.5
    copies = {algorithm: weight.clone() for algorithm in ALGORITHMS}
    budget = WeightBudget(8 << 30)
    for copy in copies.values():
        budget.admit(copy)

    def call(algorithm: str) -> harness.Run:
        return lambda: conv2d(x, copies[algorithm], padding=1, algorithm=algorithm, backend="cpu")

    runs = {algorithm: call(algorithm) for algorithm in ALGORITHMS}
    timings = harness.interleaved(runs, harness.host_clock(), repeats, warmup=2)
    chosen = cpu_costs.cheapest(cpu_costs.Call(1, channels, channels, side, side, 3, 1, 0), None, 8 << 30)
    return Row(channels, side, {name: timing.median for name, timing in timings.items()}, chosen)


def table(rows: list[Row]) -> str:
    """Milliseconds; the last column is what the choice costs against the fastest."""
    return text_table(
        ("channels", "side", *(f"{name} ms" for name in ALGORITHMS), "fastest", "chosen", "loses"),
        (
            (
                str(row.channels),
                str(row.side),
                *(harness.milliseconds(row.seconds[name]) for name in ALGORITHMS),
                row.fastest,
                row.chosen,
                f"{row.seconds[row.chosen] / row.seconds[row.fastest] - 1:.0%}",
            )
            for row in rows
        ),
    )
