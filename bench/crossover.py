"""``python -m bench crossover``: conv2d's algorithms on the CPU by channels and size, and which is chosen."""

import argparse
import json
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

ALGORITHMS = ("direct", "product", "winograd2", "winograd4")
CHANNELS = (64, 128, 320, 640, 1280)
SIDES = (8, 16, 32, 64, 128)
MOST_FLOPS = 60e9


@dataclass(frozen=True)
class Row:
    """One 3×3 convolution of C to C channels on a square map; seconds of each algorithm."""

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
    harness.add_result_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    if options.plot:
        harness.check_plot(options.plot)
    device, rows = read(options.source) if options.source else measure_all(options.repeats, options.json)
    title = f"3×3, batch 1, float32, channels_last; {device}"
    print(title)
    print(table(rows))
    if options.plot:
        plot(options.plot, title, rows)
    return 0


def read(path: Path) -> tuple[str, list[Row]]:
    """The device and the rows of a result file."""
    try:
        result = json.loads(path.read_text())
        device, rows = result["device"], [Row(**row) for row in result["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--from: expected a file of `bench crossover --json`; {path}: {error!r}") from error
    return device, rows


def measure_all(repeats: int, path: Path | None) -> tuple[str, list[Row]]:
    """The device and its rows; written to ``path`` after every size, as a cut loses what is not."""
    device, commit = environment.device_name(torch.device("cpu")), harness.commit()
    sizes = [(c, s) for c in CHANNELS for s in SIDES if 18 * c * c * s * s <= MOST_FLOPS]
    rows = []
    with torch.no_grad():
        for channels, side in tqdm(sizes, leave=False, disable=None):
            rows.append(measure(channels, side, repeats))
            if path:
                harness.write_json(path, {"device": device, "commit": commit, "rows": list(map(asdict, rows))})
    return device, rows


def measure(channels: int, side: int, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * (9 * channels) ** -0.5

    def call(algorithm: str) -> harness.Run:
        return lambda: conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")

    runs = {algorithm: call(algorithm) for algorithm in ALGORITHMS}
    timings = harness.interleaved(runs, harness.host_clock(), repeats, warmup=2)
    chosen = cpu_costs.cheapest(cpu_costs.Call(1, channels, channels, side, side, 3, 1, 0))
    return Row(channels, side, {name: timing.median for name, timing in timings.items()}, chosen)


def table(rows: list[Row]) -> str:
    """Milliseconds; the last column is what the choice costs against the fastest."""
    names = list(rows[0].seconds) if rows else []
    return text_table(
        ("channels", "side", *(f"{name} ms" for name in names), "fastest", "chosen", "loses"),
        (
            (
                str(row.channels),
                str(row.side),
                *(harness.milliseconds(row.seconds[name]) for name in names),
                row.fastest,
                row.chosen,
                f"{row.seconds[row.chosen] / row.seconds[row.fastest] - 1:.0%}",
            )
            for row in rows
        ),
    )


def plot(path: Path, title: str, rows: list[Row]) -> None:
    """For each number of channels one line per algorithm: its time against the fastest, over the side of the map.

    So the fastest lies on 1, and a ring above 1 shows what a wrong choice costs.
    """
    from matplotlib.figure import Figure  # and no pyplot, which would choose a display for the whole process

    channels = sorted({row.channels for row in rows})
    figure = Figure(figsize=(3 * len(channels) + 1, 4), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(channels), sharey=True, squeeze=False)[0], channels, strict=True):
        shown = sorted((row for row in rows if row.channels == count), key=lambda row: row.side)
        sides = [row.side for row in shown]
        for name in rows[0].seconds:
            axes.plot(sides, [_to_fastest(row, name) for row in shown], marker=".", label=name)
        chosen = [_to_fastest(row, row.chosen) for row in shown]
        axes.plot(sides, chosen, "o", color="black", fillstyle="none", markersize=10, label="chosen")
        axes.set_title(f"{count} channels")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sides, map(str, sides))
        axes.yaxis.set_major_formatter("{x:g}×")
        axes.grid(alpha=0.3)
    figure.supxlabel("side of the map")
    figure.supylabel("time / the fastest")
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _to_fastest(row: Row, name: str) -> float:
    return row.seconds[name] / row.seconds[row.fastest]
