"""``python -m bench compress``: one forward of each compressed U-Net, patched, against the patched full one and eager.

Time does not depend on the weights, so random ones will do; what compression costs in quality, they do not tell.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastsd
from bench import harness
from bench.providers import PROVIDERS, twin
from bench.unet import outside_contract
from fastsd import models
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd.compress import RECIPES
from fastsd.compress.measure import Cost, measure, total

EAGER, FULL, VAE, TEXT = "eager", "full", "vae", "text encoder"
STEPS = 25
SD_RECIPES = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "a-sdm")
# of SD1.x: CLIP ViT-L/14's
TEXT_CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
TOKENS = 77


@dataclass
class Comparison:
    """What was found: costs, errors and timings by name, why others were refused, and what a pipeline lacks.

    The names are the recipes, ``"full"``: the full model, patched, ``"eager"``: the full model as it is, and of a
    pipeline ``"vae"``, patched, and ``"text encoder"``.
    """

    costs: dict[str, Cost] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    timings: dict[str, harness.Timing] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def saved(self, name: str) -> float | None:
        """1 - time / time of the patched full model."""
        return self._ratio(name, FULL, lambda own, full: 1 - own / full)

    def speedup_eager(self, name: str) -> float | None:
        """Time of the eager full model / time."""
        return self._ratio(name, EAGER, lambda own, eager: eager / own)

    def _ratio(self, name: str, other: str, of: Callable[[float, float], float]) -> float | None:
        if name not in self.timings or other not in self.timings:
            return None
        return of(self.timings[name].median, self.timings[other].median)

    def pipeline_s(self, name: str) -> float | None:
        """Seconds of an image: the U-Net's steps, the VAE's decoder, and the text encoder where there is one."""
        if VAE not in self.timings or name not in self.timings:
            return None
        around = sum(self.timings[part].median for part in (VAE, TEXT) if part in self.timings)
        return STEPS * self.timings[name].median + around

    def pipeline_saved(self, name: str) -> float | None:
        """1 - time of an image / that with the patched full model."""
        own, full = self.pipeline_s(name), self.pipeline_s(FULL)
        return None if own is None or full is None else 1 - own / full

    def row(self, name: str) -> dict[str, float | None]:
        """A U-Net's part of a result file."""
        cost = self.costs[FULL if name == EAGER else name]
        row: dict[str, float | None] = {
            "params": cost.parameters,
            "gmacs": cost.all_macs / 1e9,
            "gmacs_attention": cost.attention_macs / 1e9,
            **self.timings[name].summary(),
            "relative_l2": self.errors[name],
            "saved": self.saved(name),
            "speedup_eager": self.speedup_eager(name),
        }
        if VAE in self.timings:
            row |= {"pipeline_s": self.pipeline_s(name), "pipeline_saved": self.pipeline_saved(name)}
        return row

    def to_dict(self) -> dict[str, Any]:
        """The numbers of a result file."""
        unets = [name for name in self.timings if name not in (VAE, TEXT)]
        result: dict[str, Any] = {"recipes": {name: self.row(name) for name in unets if name not in (FULL, EAGER)}}
        result |= {name: self.row(name) for name in (FULL, EAGER) if name in unets}
        parts = {name: self.timings[name].summary() for name in (VAE, TEXT) if name in self.timings}
        return result | {"pipeline": {"steps": STEPS, "parts": parts, "left_out": self.left_out}}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("compress", help="time compressed U-Nets, patched, against the full one")
    parser.add_argument("--model", default="sd15", help="a name, a folder or a hub id (default: sd15)")
    parser.add_argument("--recipes", default=",".join(SD_RECIPES), help=f"comma-separated, from {', '.join(RECIPES)}")
    parser.add_argument("--batch", type=int, default=1, help="samples; one guided image is 2")
    parser.add_argument("--latent", type=int, help="side of the latent (default: the model's own)")
    parser.add_argument("--dtype", type=arguments.dtype, default=torch.float32)
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--cudagraph", action="store_true", help="every U-Net, eager too, as a CUDA graph")
    parser.add_argument(
        "--no-pipeline",
        action="store_true",
        help=f"no VAE and text encoder, and so no time of an image ({STEPS} steps, one decoding, one prompt)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    return parser


def run(options: argparse.Namespace) -> int:
    names = options.recipes.split(",")
    for name in names:
        if name not in RECIPES:
            raise ValueError(f"recipes: expected some of {', '.join(RECIPES)}; got {name!r}")
    if options.cudagraph and options.device.type != "cuda":
        raise ValueError(f"--cudagraph: expected a CUDA device; leave it out on {options.device}")
    harness.use(options.device)
    model = models.denoiser(models.load(options.model, options.dtype, options.device))
    latent = options.latent or models.default_latent(model)
    facts = {
        "model": options.model,
        "device": environment.device_name(options.device),
        "dtype": arguments.dtype_name(options.dtype),
        "batch": options.batch,
        "latent": latent,
        "cudagraph": options.cudagraph,
        "commit": harness.commit(),
        "versions": environment.versions(),
    }

    def save(comparison: Comparison) -> None:
        if options.json:
            harness.write_json(options.json, facts | comparison.to_dict())

    comparison = compare(
        model,
        names,
        options.batch,
        latent,
        options.repeats,
        options.warmup,
        with_pipeline=not options.no_pipeline,
        cudagraph=options.cudagraph,
        on_round=save,
    )
    save(comparison)
    print(f"{options.model}, batch {options.batch}, latent {latent}, {facts['dtype']}")
    print(facts["device"])
    print(table(comparison))
    for part, why in comparison.left_out.items():
        print(f"an image is counted without its {part}: {why}")
    for sentence in comparison.refusals.values():
        print(f"bench: {sentence}", file=sys.stderr)
    return 1 if comparison.refusals else 0


def compare(
    model: models.Model,
    names: Sequence[str],
    batch: int,
    latent: int,
    repeats: int,
    warmup: int = 1,
    *,
    with_pipeline: bool = True,
    cudagraph: bool = False,
    on_round: Callable[[Comparison], object] = lambda comparison: None,
) -> Comparison:
    """Check and time the recipes on ``model``, which is left as it is; what breaks the contract is not timed.

    Each compressed and patched model is held against itself unpatched, in float32, with GRI attention by the reference
    where its plan has it.

    Raises:
        PlanError: a recipe is not for this model.
    """
    comparison = Comparison()
    inputs = models.example_inputs(model, batch, latent)
    around = PROVIDERS["fastsd-cudagraph"].around if cudagraph else lambda call: call
    runs: dict[str, harness.Run] = {}
    small = {name: fastsd.compress(twin(model), name, in_place=True) for name in names}
    for name, each in {**small, FULL: twin(model)}.items():
        comparison.costs[name] = measure_total(each, batch, latent)
        small[name] = each
    parts = _parts(model, batch, latent, comparison) if with_pipeline else {}
    with torch.no_grad(), harness.exact_float32():
        with tqdm(desc="checking", total=len(small) + len(parts), leave=False, disable=None) as bar:
            for name, each in small.items():
                bar.set_postfix_str(name)
                call = functools.partial(each, **inputs)
                _admit(comparison, runs, name, each, call, inputs, around)
                bar.update()
            for name, (part, given) in parts.items():
                bar.set_postfix_str(name)
                if name == VAE:
                    _admit(
                        comparison, runs, name, part, functools.partial(part.decode, **given), given, lambda call: call
                    )
                else:
                    runs[name] = functools.partial(part, **given)
                bar.update()
        eager = twin(model)
        runs[EAGER] = around(functools.partial(eager, **inputs))
        comparison.errors[EAGER] = 0.0

        def keep(timings: dict[str, harness.Timing]) -> None:
            comparison.timings = timings
            on_round(comparison)

        with tqdm(desc="timing", total=len(runs) * (warmup + repeats), leave=False, disable=None) as bar:
            clock = harness.clock_for(model.device)
            harness.interleaved(runs, clock, repeats, warmup, on_run=lambda name: bar.update(), on_round=keep)
    return comparison


def measure_total(unet: models.Model, batch: int, latent: int) -> Cost:
    """Of the whole U-Net."""
    return total(measure(unet, batch=batch, latent=latent))


def table(comparison: Comparison) -> str:
    """Size, time, error, and what is saved; a dash where there is nothing to hold it against."""
    with_pipeline = VAE in comparison.timings

    def part(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    rows = []
    for name, timing in comparison.timings.items():
        if name in (VAE, TEXT):
            size: tuple[str, ...] = ("-", "-")
            ratios: tuple[str, ...] = ("-",) * (4 if with_pipeline else 2)
        else:
            cost = comparison.costs[FULL if name == EAGER else name]
            size = (f"{cost.parameters / 1e6:.1f}", f"{cost.all_macs / 1e9:.1f}")
            ratios = (
                part(comparison.saved(name), "{:.1%}"),
                part(comparison.speedup_eager(name), "{:.2f}×"),
            )
            if with_pipeline:
                image = part(comparison.pipeline_s(name), "{:.2f}")
                ratios += (image, part(comparison.pipeline_saved(name), "{:.1%}"))
        times = (harness.milliseconds(timing.percentile(percent)) for percent in (50, 20, 80))
        rows.append((name, *size, *times, part(comparison.errors.get(name), "{:.1e}"), *ratios))
    columns = ("image s", "of it saved") if with_pipeline else ()
    headers = ("U-Net", "M params", "GMAC", "median ms", "p20", "p80", "relative L2", "saved", "eager /", *columns)
    return text_table(headers, rows)


def _admit(
    comparison: Comparison,
    runs: dict[str, harness.Run],
    name: str,
    model: models.Model,
    call: Callable[[], Any],
    inputs: dict[str, Any],
    around: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> None:
    """Patch ``model``, and let it run if it keeps the contract."""
    try:
        plain = models.flat_output(call())
        exact = plain if model.dtype == torch.float32 else _in_float32(model, inputs, None)
        stock_error = harness.relative_l2(plain, exact)
        gri = model.compression.plan.gri if hasattr(model, "compression") else None
        if gri is not None:
            exact = _in_float32(model, inputs, gri)
        fastsd.patch(model)
        patched = around(call)
        error = harness.relative_l2(models.flat_output(patched()), exact)
    except Exception as failure:  # one that cannot run must not take the others with it
        comparison.refusals[name] = f"{name} failed: {' '.join(str(failure).split())}"
        return
    refusal = outside_contract(name, error, stock_error, model.dtype)
    if refusal is None:
        runs[name], comparison.errors[name] = patched, error
    else:
        comparison.refusals[name] = refusal


def _in_float32(model: models.Model, inputs: dict[str, Any], gri: fastsd.GRI | None) -> Tensor:
    """What the unpatched model gives in float32; with ``gri`` by the reference."""
    own = twin(model) if model.dtype == torch.float32 else models.float32_copy(model)
    if gri is not None:
        fastsd.patch(own, rules=[], backend="reference", gri=gri)
    given = {key: value.float() if _is_float(value) else value for key, value in inputs.items()}
    if isinstance(more := given.get("added_cond_kwargs"), dict):
        given["added_cond_kwargs"] = {key: value.float() for key, value in more.items()}
    return models.flat_output(models.entry_point(own)(**given))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _parts(model: models.Model, batch: int, latent: int, comparison: Comparison) -> dict[str, tuple[Any, Any]]:
    """The models around a U-Net, and what they are called with: one image; as many prompts as the U-Net has samples."""
    vae = models.load("vae-sd", model.dtype, model.device)
    parts: dict[str, tuple[Any, Any]] = {VAE: (vae, models.example_inputs(vae, 1, latent))}
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        comparison.left_out[TEXT] = f"transformers cannot be imported ({' '.join(str(error).split())})"
        return parts
    with torch.random.fork_rng([]), model.device:
        torch.manual_seed(0)
        text = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))
    text = nn.Module.to(text, model.dtype).eval()
    prompts = torch.arange(TOKENS, device=model.device).repeat(batch, 1)
    return parts | {TEXT: (text, {"input_ids": prompts})}
