"""``fastsd compress``: a smaller U-Net in a folder, and what each of its stages saves."""

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastsd
from fastsd import models
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd.compress import RECIPES, recipe, storage
from fastsd.compress.configuration import arguments_of
from fastsd.compress.measure import Cost, measure, timed, total

WHOLE = "total"
Seconds = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A stage of the given model and what has become of it; the last row is the whole.

    ``seconds``: medians, ``None`` where nothing was timed. ``after`` and its name are ``None`` of a stage that is gone.
    """

    stage: str
    before: Cost
    before_seconds: float | None
    compressed_stage: str | None
    after: Cost | None
    after_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "stage": self.stage,
            "before": asdict(self.before) | {"seconds": self.before_seconds},
            "compressed_stage": self.compressed_stage,
            "after": None if self.after is None else asdict(self.after) | {"seconds": self.after_seconds},
        }


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("compress", help="make a smaller U-Net, save it, and show what each stage saves")
    parser.add_argument(
        "model",
        help="a folder or a hub id (owner/name) of a U-Net or of a pipeline, whose U-Net is taken, or one of "
        f"{', '.join(models.MODELS)} (random weights)",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the U-Net; fastsd.load reads it")
    parser.add_argument("--dry-run", action="store_true", help="show what each stage saves; load and save no weights")
    parser.add_argument("--batch", type=_count, default=1, help="samples in a call that is counted and timed")
    parser.add_argument("--latent", type=_count, help="side of their latent (default: the model's own)")
    parser.add_argument(
        "--repeats",
        type=_count_or_none,
        default=3,
        help="timed calls of either model, both patched; 0 for none (default: 3)",
    )
    parser.add_argument(
        "--dtype", type=arguments.dtype, help="default: that of a folder; float32 for others, and in a dry run"
    )
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the summary there")
    return parser


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a number from {least} on; got {text!r}")
    return int(text)


def _count_or_none(text: str) -> int:
    return _count(text, 0)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm  # diffusers brings it; other commands do without both

    if options.dry_run:
        unet, small, structure = _planned(options)
        costs = _costs(unet, options), _costs(small, options)
        seconds: tuple[Seconds, Seconds] = {}, {}
    else:
        _check_folder(options.out)
        calls = 2 * (1 + options.repeats) if options.repeats > 0 else 0
        with tqdm(total=3 + calls, leave=False, disable=None) as bar:
            bar.set_postfix_str("loading")
            unet = _load(options)
            bar.update()
            bar.set_postfix_str("compressing")
            small = fastsd.compress(unet, options.recipe)
            structure = _build(unet.config, options.recipe)[1]
            costs = _costs(unet, options), _costs(small, options)
            bar.update()
            bar.set_postfix_str(f"saving to {options.out}")
            small.save_pretrained(options.out)
            bar.update()
            bar.set_postfix_str("timing")
            seconds = _time(unet, small, options, bar) if calls else ({}, {})
    latent = options.latent or models.default_latent(unet)
    rows = summary(*costs, seconds, structure)
    facts = {
        "model": options.model,
        "recipe": options.recipe,
        "out": None if options.dry_run else str(options.out),
        "class": type(small).__name__,
        "device": environment.device_name(options.device),
        "dtype": arguments.dtype_name(unet.dtype),
        "batch": options.batch,
        "latent": latent,
        "versions": environment.versions(),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts | {"stages": [row.to_dict() for row in rows]}, indent=2) + "\n")
    print(f"{options.model}, {options.recipe}, batch {options.batch}, latent {latent}, {facts['dtype']}")
    if seconds[0]:
        print(f"{facts['device']}; medians of {options.repeats} calls in turn, both models patched")
    print(table(rows))
    if options.dry_run:
        print("a dry run: no weights were read and nothing was saved")
    else:
        print(f"saved to {options.out}, {_how_to_load(small)}; its quality needs training")
    return 0


def summary(
    before: dict[str, Cost], after: dict[str, Cost], seconds: tuple[Seconds, Seconds], structure: Any
) -> list[Row]:
    """A row for each stage of the given model, and one for the whole.

    Args:
        before, after: of the given model and of the compressed one, by stage.
        seconds: likewise; empty where nothing was timed.
        structure: says which stage of the given model each of the compressed one was.
    """
    became = {structure.source_of(stage): stage for stage in after}
    rows = []
    for stage, cost in before.items():
        new = became.get(stage)
        left = (None, None) if new is None else (after[new], seconds[1].get(new))
        rows.append(Row(stage, cost, seconds[0].get(stage), new, *left))
    whole = (total(before), seconds[0].get(WHOLE), WHOLE, total(after), seconds[1].get(WHOLE))
    return [*rows, Row(WHOLE, *whole)]


def table(rows: list[Row]) -> str:
    """Each quantity before and after; the row behind the whole is what is saved of it."""

    def cells(cost: Cost | None, seconds: float | None) -> tuple[str, ...]:
        if cost is None:
            return ("-", "-", "-", "-")
        return (
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.all_macs / 1e9:.2f}",
            f"{cost.bytes / 1e6:.1f}",
            "-" if seconds is None else f"{seconds * 1e3:.1f}",
        )

    def saved(row: Row) -> tuple[str, ...]:
        assert row.after is not None
        pairs = (
            (row.before.parameters, row.after.parameters),
            (row.before.all_macs, row.after.all_macs),
            (row.before.bytes, row.after.bytes),
            (row.before_seconds, row.after_seconds),
        )
        return tuple("-" if a is None or b is None else f"{1 - b / a:.1%}" for a, b in pairs)

    shown = []
    for row in rows:
        before, after = cells(row.before, row.before_seconds), cells(row.after, row.after_seconds)
        shown.append((row.stage, *(cell for pair in zip(before, after, strict=True) for cell in pair)))
    shown.append(("saved", *(cell for share in saved(rows[-1]) for cell in ("", share))))
    columns = (cell for name in ("M params", "GMAC", "MB", "ms") for cell in (name, "now"))
    return text_table(("stage", *columns), shown)


def _check_folder(out: Path | None) -> None:
    if out is None:
        raise ValueError("--out: expected a folder for the compressed model, or --dry-run; got neither")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: expected a new or an empty folder; {out} is there already")


def _load(options: argparse.Namespace) -> Any:
    place = _unet_folder(options.model)
    if place is not None:
        return storage.load(place, dtype=options.dtype, device=options.device)
    return models.denoiser(models.load(options.model, options.dtype or torch.float32, options.device))


def _unet_folder(model: str) -> Path | None:
    """The folder of the U-Net, where ``model`` is a folder of it or of a pipeline."""
    folder = Path(model).expanduser()
    if model in models.MODELS or not folder.is_dir():
        return None
    return folder / "unet" if (folder / "model_index.json").is_file() else folder


def _planned(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The given and the compressed model, without weights, and the structure of the latter."""
    from diffusers import UNet2DConditionModel

    place = _unet_folder(options.model)
    unet: Any
    if options.model in models.MODELS:
        unet = models.load(options.model, device="meta")
    elif place is not None and storage.is_compressed(place):
        raise TypeError(f"{place}: expected a U-Net that no plan has changed yet; it is a compressed one")
    else:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(_config(options.model, place))
    if type(unet).__name__ != UNet2DConditionModel.__name__:
        raise TypeError(f"model: expected a U-Net (UNet2DConditionModel); {options.model} is {type(unet).__name__}")
    small, structure = _build(unet.config, options.recipe)
    dtype = options.dtype or torch.float32
    # diffusers' own `to` warns of modules to keep in float32, and not every model has a list of these
    return torch.nn.Module.to(unet, dtype), torch.nn.Module.to(small, dtype), structure


def _config(model: str, place: Path | None) -> dict[str, Any]:
    """The configuration in a folder or on a hub."""
    from diffusers import UNet2DConditionModel

    if place is not None:
        if not (place / "config.json").is_file():
            raise models.UnknownModel(f"{place}: expected the folder of a U-Net; there is no config.json")
        config = UNet2DConditionModel.load_config(place, local_files_only=True)
    elif model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise models.UnknownModel(
            f"{model!r} is no folder, no hub id (owner/name) and none of the named models: {', '.join(models.MODELS)}"
        )
    else:
        try:
            config = UNet2DConditionModel.load_config(model, subfolder="unet")
        except OSError:
            config = UNet2DConditionModel.load_config(model)
    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise TypeError(
            f"{model}: expected a UNet2DConditionModel or a pipeline with one; config.json names "
            f"{config.get('_class_name')!r}"
        )
    return config


def _build(config: Any, name: str) -> tuple[Any, Any]:
    from fastsd.compress.model import build

    given = arguments_of(config)
    return build(given, recipe(name, given))


def _costs(unet: Any, options: argparse.Namespace) -> dict[str, Cost]:
    return measure(unet, batch=options.batch, latent=options.latent)


def _time(unet: Any, small: Any, options: argparse.Namespace, bar: Any) -> tuple[Seconds, Seconds]:
    """Medians of the stages of both, patched, which run in turn after one call that does not count."""
    inputs = models.example_inputs(unet, options.batch, options.latent)
    found: tuple[list[Seconds], list[Seconds]] = [], []
    with ExitStack() as hooks:
        calls = [hooks.enter_context(timed(fastsd.patch(model))) for model in (unet, small)]
        for turn in range(1 + options.repeats):
            for call, measured in zip(calls, found, strict=True):
                seconds = call(inputs)
                if turn > 0:
                    measured.append(seconds)
                bar.update()
    before, after = ({stage: statistics.median(s[stage] for s in runs) for stage in runs[0]} for runs in found)
    return before, after


def _how_to_load(small: Any) -> str:
    if type(small).__name__ == "UNet2DConditionModel":
        return "a stock model (diffusers.UNet2DConditionModel.from_pretrained)"
    return "for fastsd.load; stock diffusers has no configuration that describes it"
