"""``fastsd explain``: what a patch does to every module of a model, or why it leaves it, and where its time goes."""

import argparse
import json
import os
from typing import Any

import torch

import fastsd
from fastsd import models
from fastsd.cli import arguments
from fastsd.cli.table import text_table
from fastsd.compress import RECIPES
from fastsd.gri import highest_level
from fastsd.patching.timing import OpTime, StepTime, time_step
from fastsd_kernels.dispatch import BACKENDS


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("explain", help="show what a patch does to a model, module by module")
    parser.add_argument("model", help=f"a folder, a hub id (owner/name) or one of {', '.join(models.MODELS)}")
    parser.add_argument("--backend", choices=BACKENDS, help="force this backend for every op")
    parser.add_argument(
        "--gri",
        type=_sizes,
        metavar="WINDOW,POOL[,LEVEL...]",
        help="with GRI attention of this window and pool, at these levels (default: the highest that has transformers)",
    )
    parser.add_argument("--recipe", choices=RECIPES, help="of the model's U-Net, compressed by this recipe")
    parser.add_argument("--dtype", type=arguments.dtype, default=torch.float32)
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--time", action="store_true", help="also time one step of it, by module and by op")
    parser.add_argument("--repeats", type=int, default=3, help="steps to take the median of (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON, with one entry for each module")
    return parser


def _sizes(text: str) -> tuple[int, int, tuple[int, ...]]:
    try:
        window, pool, *levels = map(int, text.split(","))
        fastsd.GRI(window, pool, tuple(levels) or (0,))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected WINDOW,POOL such as 16,4; got {text!r} ({error})") from None
    return window, pool, tuple(levels)


def run(options: argparse.Namespace) -> int:
    # undefined weights may be numbers that are slow to compute with
    model = models.load(options.model, options.dtype, options.device, weights=options.time)
    if options.recipe is not None:
        model = fastsd.compress(models.denoiser(model), options.recipe, in_place=True)
    gri = None
    if options.gri is not None:
        window, pool, levels = options.gri
        gri = fastsd.GRI(window, pool, levels or highest_level(model))
    report = fastsd.report(fastsd.patch(model, backend=options.backend, gri=gri))
    timed = models.denoiser(model) if options.time else None
    time = None if timed is None else _time(timed, options.repeats)
    if options.json:
        print(json.dumps(report.to_dict() | ({} if time is None else {"time": time.to_dict()}), indent=2))
        return 0
    print(report)
    if time is not None:
        print(f"\n{_as_text(time, type(timed).__name__, options.repeats)}")
    return 0


def _time(model: models.Model, repeats: int) -> StepTime:
    # torch's profiler would tell stderr when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    call, inputs = models.entry_point(model), models.example_inputs(model)
    with torch.no_grad():
        return time_step(model, lambda: call(**inputs), repeats)


def _as_text(time: StepTime, model: str, repeats: int) -> str:
    large = [row for row in time.ops if row.share >= 0.001]
    small = [row for row in time.ops if row.share < 0.001]
    if small:
        sums = (sum(row.calls for row in small), sum(row.seconds for row in small), sum(row.share for row in small))
        large.append(OpTime(f"{len(small)} others", *sums))
    became = {True: "replaced", False: "left"}
    covered, own = _percent(time.replaced_share), _percent(time.fastsd_share)
    return "\n".join(
        (
            f"one step of {model} on {time.device}: {_ms(time.seconds)} ms, median of {repeats}, under the profiler",
            f"{covered} of it inside replaced modules, {own} in ops of fastsd",
            "",
            text_table(
                ("module", "", "modules", "calls", "ms", "share"),
                (
                    (row.kind, became[row.replaced], row.modules, row.calls, _ms(row.seconds), _percent(row.share))
                    for row in time.modules
                ),
            ),
            "",
            text_table(
                ("op", "calls", "ms", "share", "Gflop", "Gflop/s"),
                ((row.op, row.calls, _ms(row.seconds), _percent(row.share), *_speed(row)) for row in large),
            ),
        )
    )


def _speed(row: OpTime) -> tuple[str, str]:
    if row.flops is None or row.seconds == 0:  # on a card, of a call without kernels
        return "", ""
    return f"{row.flops / 1e9:.1f}", f"{row.flops / 1e9 / row.seconds:.1f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
