"""What the benchmarks share: interleaved timing, statistics, the environment of a result, JSON files.

Absolute times on a busy machine say nothing. Everything that is compared runs in one process, A B A B …, after a
warm-up; the table shows medians with the 20th and 80th percentile, and speed-ups are ratios of such medians.
"""

import argparse
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastsd_kernels.flops  # noqa: F401, counts the ops

ROOT = Path(__file__).resolve().parent.parent

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Run = Callable[[], object]
Clock = Callable[[Run], float]


@dataclass(frozen=True)
class Timing:
    """Seconds of every timed run of one provider, in order."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the two nearest runs."""
        return float(np.percentile(self.seconds, percent))

    @property
    def median(self) -> float:
        return self.percentile(50)

    def summary(self) -> dict[str, float]:
        """The three numbers that a result file holds."""
        return {"median_s": self.median, "p20_s": self.percentile(20), "p80_s": self.percentile(80)}


def interleaved(
    runs: Mapping[str, Run],
    clock: Clock,
    repeats: int,
    warmup: int = 1,
    on_run: Callable[[str], object] = lambda name: None,
    on_round: Callable[[dict[str, Timing]], object] = lambda timings: None,
) -> dict[str, Timing]:
    """Time ``runs`` in turn, ``repeats`` rounds after ``warmup`` rounds that do not count.

    Args:
        runs: name to what is timed; each round runs them in this order.
        clock: runs once and returns seconds.
        on_run: told the name after each run, for a progress bar.
        on_round: given all timings so far after each round that counts, to keep what a cut would lose.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            elapsed = clock(run)
            if turn >= warmup:
                seconds[name].append(elapsed)
            on_run(name)
        if turn >= warmup:
            on_round({name: Timing(tuple(values)) for name, values in seconds.items()})
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def host_clock(now: Callable[[], float] = time.perf_counter) -> Clock:
    """Wall time on the host."""

    def clock(run: Run) -> float:
        start = now()
        run()
        return now() - start

    return clock


def cuda_clock(device: torch.device, head_start_cycles: int = 0) -> Clock:
    """Time between two CUDA events, from an idle stream.

    With ``head_start_cycles`` the card first spins that long, so that the host queues every launch before the
    first kernel starts: the time of the kernels alone. Without it launch latency counts, as it does for a user.
    """

    def clock(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        if head_start_cycles:
            torch.cuda._sleep(head_start_cycles)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return clock


def use(device: torch.device) -> None:
    """Make ``device`` the current one, whose streams and events the clocks and captured graphs use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def clock_for(device: torch.device) -> Clock:
    """The clock for whole models on ``device``: what a user waits for."""
    return cuda_clock(device) if device.type == "cuda" else host_clock()


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which alone would break the float32 contract."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def relative_l2(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in float64; infinite where a value is not finite or the exact norm is zero."""
    error = (actual.double() - exact.double()).norm() / exact.double().norm()
    return error.item() if error.isfinite() else float("inf")


def commit() -> str:
    """The commit of this checkout, ``-dirty`` if files differ from it; ``unknown`` outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def flops_of(run: Run) -> int:
    """Multiplications and additions of the products of one run, whatever algorithms compute them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def write_json(path: Path, result: Any) -> None:
    """Write ``result`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)


def milliseconds(seconds: float) -> str:
    """Four digits, or all before the point."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.4g}"


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """``--plot PATH``, and ``--json PATH`` or ``--from JSON``, an earlier result that is shown instead of a new one."""
    suffixes = ", ".join(PLOT_SUFFIXES)
    parser.add_argument("--plot", type=Path, metavar="PATH", help=f"draw it there; ends in {suffixes}")
    file = parser.add_mutually_exclusive_group()
    file.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    file.add_argument("--from", dest="source", type=Path, metavar="JSON", help="show that result; measure nothing")


def check_plot(path: Path) -> None:
    """Raise if a plot cannot be drawn to ``path``: before minutes go into measuring."""
    if path.suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot: expected a file that ends in {', '.join(PLOT_SUFFIXES)}; got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or the extra `bench` of fastsd")
