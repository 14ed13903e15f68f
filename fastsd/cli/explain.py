"""``fastsd explain``: what a patch does to every module of a model, or why it leaves it."""

import argparse
import json
from typing import Any

import torch

import fastsd
from fastsd import models
from fastsd.cli import arguments
from fastsd.compress import RECIPES
from fastsd.gri import highest_level
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
    model = models.load(options.model, options.dtype, options.device, weights=False)
    if options.recipe is not None:
        model = fastsd.compress(models.denoiser(model), options.recipe, in_place=True)
    gri = None
    if options.gri is not None:
        window, pool, levels = options.gri
        gri = fastsd.GRI(window, pool, levels or highest_level(model))
    report = fastsd.report(fastsd.patch(model, backend=options.backend, gri=gri))
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0
