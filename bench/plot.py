"""``python -m bench plot RESULT --into PATH``: bars of a model's providers, or an op's roofline."""

import argparse
import json
from pathlib import Path
from typing import Any

from bench import harness


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("plot", help="draw a result of `bench unet` or `bench op`; measures nothing")
    parser.add_argument("result", type=Path, metavar="RESULT", help="what --json wrote")
    parser.add_argument("--into", type=Path, required=True, metavar="PATH", help=".png, .svg or .pdf")
    return parser


def run(options: argparse.Namespace) -> int:
    harness.check_plot(options.into)
    try:
        result = json.loads(options.result.read_text())
        draw = bars if "providers" in result else roofline
        figure = draw(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"RESULT: expected a file of `bench unet --json` or `bench op --json`; {options.result}: {error!r}"
        ) from error
    options.into.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.into)
    return 0


def bars(result: dict[str, Any]) -> Any:
    """One bar for each provider: the median, with the 20th and 80th percentile."""
    figure, axes = _axes()
    rows = {name: [row[f"{of}_s"] for of in ("median", "p20", "p80")] for name, row in result["providers"].items()}
    medians = [median for median, _, _ in rows.values()]
    spread = [[median - low for median, low, _ in rows.values()], [high - median for median, _, high in rows.values()]]
    drawn = axes.barh(list(rows), medians, xerr=spread, capsize=3)
    axes.bar_label(drawn, [f" {median:.3g} s" for median in medians], label_type="center", color="white")
    axes.invert_yaxis()
    axes.set_xlabel("seconds; whiskers: 20th and 80th percentile")
    axes.set_title(
        f"{result['model']}, batch {result['batch']}, latent {result['latent']}, {result['dtype']}; {result['device']}"
    )
    return figure


def roofline(result: dict[str, Any]) -> Any:
    """Each provider of each case: what it computes a second, over the operations for each byte that must be moved.

    The roof is what the machine's memory copies and its fastest product of matrices allow. What Winograd's algorithms
    save is counted as computed, so they may lie above it.
    """
    figure, axes = _axes()
    bandwidth, peak = result["copy_bytes_per_s"], result["peak_flops_per_s"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        points.setdefault(row["provider"], []).append((row["flops"] / row["bytes"], row["flops"] / row["median_s"]))
    for provider, of in points.items():
        axes.plot(*zip(*of, strict=True), linestyle="", marker="o", label=provider)
    intensities = sorted([x for of in points.values() for x, _ in of] + [peak / bandwidth])
    span = [intensities[0] / 2, peak / bandwidth, intensities[-1] * 2]
    axes.plot(span, [min(peak, bandwidth * x) for x in span], color="black", label="roof")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value / 1e9:g}")
    axes.set_xlabel("operations for each byte that must be moved")
    axes.set_ylabel("Gflop/s")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{result['op']}, {result['rows'][0]['dtype']}; {result['device']}")
    return figure


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # and no pyplot, which would choose a display for the whole process

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()
