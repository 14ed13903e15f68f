"""``python -m bench report``: everything that this machine can measure, the most valuable first, within a time limit.

Each step is a process of its own with its own limit. The summary ``report.md`` is rewritten after every step, so that
a cut loses only what had not been measured yet. Send the whole folder back.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import ROOT, commit
from fastsd.cli.table import markdown_table
from fastsd_kernels.conv2d import measured

NOT_RUN = "not run: out of time"
SHORTEST_STEP_S = 5


@dataclass(frozen=True)
class Step:
    """A command of this Python, the most seconds it may take, and the result file it writes, if any, with its option.

    ``variable``: of the environment of the steps behind it, names the result file from then on.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    result: str | None = None
    option: str = "--json"
    variable: str | None = None

    def command(self, out: Path) -> list[str]:
        """What is executed; a result file goes to ``out``."""
        return [sys.executable, "-m", *self.arguments, *([self.option, str(out / self.result)] if self.result else [])]

    def described(self) -> str:
        """The command as a user types it."""
        return " ".join(["python", "-m", *self.arguments])


@dataclass(frozen=True)
class Outcome:
    """How a step ended, in how many seconds, and what it printed."""

    status: str
    seconds: float = 0.0
    output: str = ""

    @property
    def finished(self) -> bool:
        return self.status == "done"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("report", help="measure everything that this machine can, within a time limit")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.md and the results")
    parser.add_argument("--minutes", type=float, default=9, help="time for everything together (default: 9)")
    return parser


def run(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    steps = steps_for(torch.cuda.is_available())
    outcomes = run_steps(steps, options.out, time.monotonic() + 60 * options.minutes)
    print(f"{options.out / 'report.md'}: {sum(o.finished for o in outcomes)} of {len(steps)} steps done")
    return 0 if all(outcome.finished or outcome.status == NOT_RUN for outcome in outcomes) else 1


def steps_for(has_gpu: bool) -> tuple[Step, ...]:
    """The steps for a machine with or without a CUDA device, the most valuable first."""
    info = Step("environment", ("fastsd.cli", "info"), 60)
    doctor = Step("doctor", ("fastsd.cli", "doctor"), 120)
    if not has_gpu:
        return (
            info,
            _unet("sd15", "float32", 1, "eager,channels_last,fastsd,fastsd-channels_last", 200),
            _blocks("sd15", 150),
            _op("group_norm_silu", "float32", 150),
            _op("conv2d", "float32", 150),
            _op("gri_attention", "float32", 150),
            _op("attention", "float32", 150, "--cases", "1x8x"),
            _op("linear", "float32", 150),
            _op("cond_conv2d", "float32", 150, "--cases", "2x"),
            Step("gri-scaling", ("bench", "gri-scaling"), 120, "gri-scaling.json"),
            Step("crossover", ("bench", "crossover"), 120, "crossover.json"),
            doctor,
            _unet("sd15", "float32", 1, "eager,fastsd,fastsd+gri", 200, suffix="-gri"),
            _compress("float32", 1, 400, "--repeats", "3"),
            _unet("vae-sd", "float32", 1, "eager,fastsd,fastsd-channels_last", 200, repeats=3),
            _blocks("vae-sd", 200, "--repeats", "3"),
            _unet("sd15", "float32", 1, "eager,compile,fastsd,fastsd-compile", 400, suffix="-compile"),
        )
    stock, fast = (
        "eager,channels_last,cudagraph",
        "fastsd,fastsd-channels_last,fastsd-cudagraph,fastsd-channels_last-cudagraph",
    )
    return (
        info,
        Step("gpu-tests", ("pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider"), 240),
        _op("group_norm_silu", "float16", 90),
        _op("conv2d", "float16", 90),
        _op("gri_attention", "float16", 60),
        _op("attention", "float16", 60, "--cases", "1x8x"),
        _op("linear", "float16", 60),
        _op("cond_conv2d", "float16", 60, "--cases", "2x"),
        _unet("sd15", "float16", 2, f"{stock},{fast},fastsd-graphs", 90, repeats=20),
        _unet("sd15", "float16", 2, "eager,fastsd,fastsd+gri", 90, repeats=20, suffix="-gri"),
        _compress("float16", 2, 120, "--repeats", "20", "--cudagraph"),
        _unet("sd15", "float16", 2, "eager,compile,fastsd,fastsd-compile", 180, repeats=20, suffix="-compile"),
        _unet("sdxl", "float16", 2, f"{stock},{fast},fastsd-graphs", 120),
        _unet("vae-sd", "float16", 1, f"{stock},{fast}", 60),
        doctor,
        _op("group_norm_silu", "float32", 90),
        _unet("sd15", "float16", 2, "eager,compile-max,fastsd", 400, repeats=20, suffix="-compile-max"),
        Step(
            "tune-float16",
            ("bench", "tune", "--models", "sd15", "--repeats", "10"),
            240,
            "measured.json",
            option="--into",
            variable=measured.ENVIRONMENT_VARIABLE,
        ),
        _unet("sd15", "float16", 2, "channels_last,fastsd-channels_last", 90, repeats=20, suffix="-tuned"),
        _op("group_norm_silu", "bfloat16", 90),
        _unet("sd15", "float32", 1, f"{stock},{fast}", 90),
    )


def run_steps(steps: Sequence[Step], out: Path, deadline: float) -> list[Outcome]:
    """Run ``steps`` until ``deadline`` on the monotonic clock; ``report.md`` is whole after each of them."""
    environment, note = import_environment(out)
    if not torch.cuda.is_available():
        note += " torch finds no CUDA device: the GPU tests and benchmarks were not run."
    outcomes: list[Outcome] = []
    for step in steps:
        left = deadline - time.monotonic()
        if left < SHORTEST_STEP_S:
            outcomes.append(Outcome(NOT_RUN))
        else:
            print(f"{step.name}: {step.described()}", file=sys.stderr)
            outcomes.append(_execute(step, out, min(step.limit_s, left), environment))
            (out / f"{step.name}.txt").write_text(outcomes[-1].output)
            if step.variable and step.result and (out / step.result).exists():
                environment[step.variable] = str((out / step.result).resolve())
        (out / "report.md").write_text(markdown(steps, outcomes, note))
    return outcomes


def import_environment(out: Path) -> tuple[dict[str, str], str]:
    """The environment that steps run in, and a sentence on where they find fastsd.

    Where fastsd is not installed, links in ``out`` put the CUDA sources where the installed package has them.
    """
    if importlib.util.find_spec("fastsd_kernels.cuda_sources") is not None:
        return dict(os.environ), "fastsd is installed."
    package = out / "import-path" / "fastsd_kernels"
    package.mkdir(parents=True, exist_ok=True)
    sources = {entry.name: entry for entry in (ROOT / "kernels" / "fastsd_kernels").iterdir()}
    for name, target in (sources | {"cuda_sources": ROOT / "csrc" / "cuda"}).items():
        if not (package / name).exists():
            (package / name).symlink_to(target)
    path = os.pathsep.join([str(package.parent.resolve()), str(ROOT), os.environ.get("PYTHONPATH", "")])
    note = (
        "fastsd is not installed: it is imported from the checkout, without the CPU extension unless that was built "
        "in place; `pip install --no-build-isolation -e .` installs it."
    )
    return os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}, note


def markdown(steps: Sequence[Step], outcomes: Sequence[Outcome], note: str) -> str:
    """The summary: a table of the steps, then what each printed."""
    waiting = [Outcome("not run yet")] * (len(steps) - len(outcomes))
    pairs = list(zip(steps, [*outcomes, *waiting], strict=True))
    table = markdown_table(
        ("step", "outcome", "seconds", "command"),
        ((step.name, outcome.status, f"{outcome.seconds:.0f}", f"`{step.described()}`") for step, outcome in pairs),
    )
    printed = [
        f"## {step.name}\n\n```text\n{outcome.output.rstrip()}\n```" for step, outcome in pairs if outcome.output
    ]
    return "\n\n".join(["# fastsd on this machine", f"Commit {commit()}. {note}", table, *printed]) + "\n"


def _execute(step: Step, out: Path, limit_s: float, environment: dict[str, str]) -> Outcome:
    if step.result:
        (out / step.result).unlink(missing_ok=True)
    start = time.monotonic()
    process = subprocess.Popen(
        step.command(out.resolve()),
        cwd=ROOT,
        env=environment | {"COLUMNS": "140"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        status = "done" if process.returncode == 0 else f"failed with exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        # compilers are children of the step, and must not run into the next one
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"cut off after {limit_s:.0f} s"
        if step.result and (out / step.result).exists():
            status += f"; {step.result} holds what it had measured"
    return Outcome(status, time.monotonic() - start, output)


def _unet(
    model: str, dtype: str, batch: int, providers: str, limit_s: float, *, repeats: int = 5, suffix: str = ""
) -> Step:
    name = f"unet-{model}-{dtype}-b{batch}{suffix}"
    flags = ("--model", model, "--dtype", dtype, "--batch", str(batch), "--providers", providers)
    return Step(name, ("bench", "unet", *flags, "--repeats", str(repeats)), limit_s, f"{name}.json")


def _blocks(model: str, limit_s: float, *flags: str) -> Step:
    name = f"blocks-{model}-float32"
    return Step(name, ("bench", "blocks", "--model", model, *flags), limit_s, f"{name}.json")


def _op(op: str, dtype: str, limit_s: float, *flags: str) -> Step:
    name = f"op-{op}-{dtype}"
    return Step(name, ("bench", "op", op, "--dtype", dtype, *flags), limit_s, f"{name}.json")


def _compress(dtype: str, batch: int, limit_s: float, *flags: str) -> Step:
    name = f"compress-sd15-{dtype}-b{batch}"
    given = ("--model", "sd15", "--dtype", dtype, "--batch", str(batch))
    return Step(name, ("bench", "compress", *given, *flags), limit_s, f"{name}.json")
