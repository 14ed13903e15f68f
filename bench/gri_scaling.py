"""``python -m bench gri-scaling``: time of GRI and of full attention against the number of tokens, and the slopes."""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import harness
from bench.kernels import bench_gri_attention as bench
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd_kernels import gri_attention

SIDES = (32, 48, 64, 96, 128)
HEADS, WIDTH = 8, 40
# windows as they are, and as many cells on every map: then a token has as many keys on all of them
WINDOW, CELLS_ALONG = 8, 8


@dataclass(frozen=True)
class Row:
    """One square map, batch 1; medians."""

    side: int
    full_s: float
    gri_s: float

    @property
    def tokens(self) -> int:
        return self.side**2


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("gri-scaling", help="time GRI and full attention against the number of tokens")
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--dtype", type=arguments.dtype, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    harness.add_result_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    if options.plot:
        harness.check_plot(options.plot)
    device, rows = read(options.source) if options.source else measure_all(options)
    title = f"{HEADS} heads of {WIDTH}, window {WINDOW}, {CELLS_ALONG}×{CELLS_ALONG} cells; {device}"
    print(title)
    print(table(rows))
    gri, full = (slope(rows, name) for name in ("gri_s", "full_s"))
    print(f"time grows as N^{gri:.2f} with GRI, as N^{full:.2f} with full attention (least squares of the logarithms)")
    if options.plot:
        plot(options.plot, title, rows)
    return 0


def read(path: Path) -> tuple[str, list[Row]]:
    """The device and the rows of a result file."""
    try:
        result = json.loads(path.read_text())
        return result["device"], [Row(**row) for row in result["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--from: expected a file of `bench gri-scaling --json`; {path}: {error!r}") from error


def measure_all(options: argparse.Namespace) -> tuple[str, list[Row]]:
    """The device and its rows; written to a file after every size, as a cut loses what is not."""
    device: torch.device = options.device
    dtype = options.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    harness.use(device)
    facts = {"device": environment.device_name(device), "commit": harness.commit(), "versions": environment.versions()}
    clock = harness.cuda_clock(device) if device.type == "cuda" else harness.host_clock()
    rows: list[Row] = []
    with torch.no_grad():
        for side in tqdm(SIDES, leave=False, disable=None):
            case = bench.Case(1, HEADS, side, WIDTH, WINDOW, side // CELLS_ALONG)
            given = bench.sample_of(case, str(side), device, dtype).kwargs
            timings = harness.interleaved(
                {"full": lambda given=given: bench.eager(**given), "gri": lambda given=given: gri_attention(**given)},  # type: ignore[misc]
                clock,
                options.repeats,
            )
            rows.append(Row(side, timings["full"].median, timings["gri"].median))
            if options.json:
                harness.write_json(options.json, facts | {"rows": list(map(asdict, rows))})
    return facts["device"], rows


def slope(rows: list[Row], name: str) -> float:
    """b of t = a·N^b, by least squares of the logarithms."""
    x = torch.tensor([math.log(row.tokens) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log(getattr(row, name)) for row in rows], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


def table(rows: list[Row]) -> str:
    return text_table(
        ("map", "tokens", "full ms", "GRI ms", "ratio", "GRI ns a token"),
        (
            (
                f"{row.side}x{row.side}",
                str(row.tokens),
                harness.milliseconds(row.full_s),
                harness.milliseconds(row.gri_s),
                f"{row.full_s / row.gri_s:.1f}×",
                f"{row.gri_s / row.tokens * 1e9:.0f}",
            )
            for row in rows
        ),
    )


def plot(path: Path, title: str, rows: list[Row]) -> None:
    """Both times over the number of tokens, on logarithmic axes, with their slopes."""
    from matplotlib.figure import Figure  # and no pyplot, which would choose a display for the whole process

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [row.tokens for row in rows]
    for name, label in (("full_s", "full attention"), ("gri_s", "GRI")):
        times = [getattr(row, name) * 1e3 for row in rows]
        axes.plot(tokens, times, marker="o", label=f"{label}: N^{slope(rows, name):.2f}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{row.side}²" for row in rows])
    axes.set_xlabel("tokens of the map")
    axes.set_ylabel("ms")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
