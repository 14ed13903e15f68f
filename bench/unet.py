"""``python -m bench unet``: one forward of a U-Net (or of what else has a name), fastsd against its baselines."""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastsd
from bench import footprint, harness
from bench.providers import PROVIDERS, check_providers, prepare, twin
from fastsd import models
from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd.gri import highest_level

FLOAT32_LIMIT = 1e-4
HALF_LIMIT = 1.5


@dataclass
class Comparison:
    """What was found: timings and errors of the providers, their footprints if wanted, and why others were refused."""

    timings: dict[str, harness.Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    footprints: dict[str, footprint.Footprint] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def speedup(self) -> dict[str, float]:
        """By how much fastsd is faster than each other provider; empty where fastsd itself was not timed."""
        if "fastsd" not in self.timings:
            return {}
        own = self.timings["fastsd"].median
        return {name: timing.median / own for name, timing in self.timings.items() if name != "fastsd"}

    def providers(self) -> dict[str, dict[str, float]]:
        """The rows of a result file."""
        rows = {name: timing.summary() | {"relative_l2": self.errors[name]} for name, timing in self.timings.items()}
        for name, found in self.footprints.items():
            rows[name] |= asdict(found)
        return rows


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("unet", help="time one forward of a model, fastsd against its baselines")
    parser.add_argument("--model", default="sd15", help="a name, a folder or a hub id (default: sd15)")
    parser.add_argument("--providers", default="eager,fastsd", help=f"comma-separated, from {', '.join(PROVIDERS)}")
    parser.add_argument("--batch", type=int, default=1, help="samples; one guided image is 2")
    parser.add_argument("--latent", type=int, help="side of the latent (default: the model's own)")
    parser.add_argument("--dtype", type=arguments.dtype, default=torch.float32)
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument(
        "--peak-memory",
        action="store_true",
        help="also each provider's peak of memory and first call, in a process of its own that loads the model again",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    return parser


def run(options: argparse.Namespace) -> int:
    names = options.providers.split(",")
    check_providers(names, options.device)
    loaded = models.load(options.model, options.dtype, options.device)
    model = models.denoiser(loaded)
    latent = options.latent or models.default_latent(model)
    facts = {
        "model": options.model,
        "device": environment.device_name(options.device),
        "dtype": arguments.dtype_name(options.dtype),
        "batch": options.batch,
        "latent": latent,
        "commit": harness.commit(),
        "versions": environment.versions(),
    }

    def save(comparison: Comparison) -> None:
        if options.json:
            numbers = {"providers": comparison.providers(), "speedup": comparison.speedup()}
            harness.write_json(options.json, facts | numbers)

    comparison = compare(model, names, options.batch, latent, options.repeats, options.warmup, on_round=save)
    save(comparison)
    if options.peak_memory:
        del loaded, model
        gc.collect()  # the processes need the memory, and torch.compile leaves cycles
        measure_footprints(comparison, options, latent, on_each=save)
    print(f"{options.model}, batch {options.batch}, latent {latent}, {arguments.dtype_name(options.dtype)}")
    print(environment.device_name(options.device))
    print(table(comparison))
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
    on_round: Callable[[Comparison], object] = lambda comparison: None,
) -> Comparison:
    """Check every provider against the contract, then time those that keep it, interleaved.

    The error of a float32 run is taken against eager, that of a float16 or bfloat16 run against the same weights
    and inputs in float32. A provider that computes another function is held against the reference of that function;
    the error that is shown is its distance from eager. ``on_round`` is given what is known after each round, to keep
    what a cut would lose.
    """
    harness.use(model.device)
    comparison, runs = Comparison(), {}
    inputs = models.example_inputs(model, batch, latent)
    with torch.no_grad(), harness.exact_float32():
        eager = prepare("eager", model, inputs)
        plain = models.flat_output(eager())
        exact = plain if model.dtype == torch.float32 else _in_float32(model, inputs)
        stock_error = harness.relative_l2(plain, exact)
        with tqdm(desc="checking", total=len(names), leave=False, disable=None) as bar:
            for name in names:
                bar.set_postfix_str(name)
                try:
                    call = eager if name == "eager" else prepare(name, model, inputs)
                    output = models.flat_output(call())
                    error = own_error = harness.relative_l2(output, exact)
                    if (gri := PROVIDERS[name].gri) is not None:
                        own_error = harness.relative_l2(output, _in_float32(model, inputs, gri))
                except Exception as failure:  # a baseline that cannot run must not take the others with it
                    comparison.refusals[name] = f"{name} failed: {' '.join(str(failure).split())}"
                    continue
                refusal = outside_contract(name, own_error, stock_error, model.dtype)
                if refusal is None:
                    runs[name], comparison.errors[name] = call, error
                else:
                    comparison.refusals[name] = refusal
                bar.update()

        def keep(timings: dict[str, harness.Timing]) -> None:
            comparison.timings = timings
            on_round(comparison)

        with tqdm(desc="timing", total=len(runs) * (warmup + repeats), leave=False, disable=None) as bar:
            clock = harness.clock_for(model.device)
            harness.interleaved(runs, clock, repeats, warmup, on_run=lambda name: bar.update(), on_round=keep)
    return comparison


def measure_footprints(
    comparison: Comparison,
    options: argparse.Namespace,
    latent: int,
    on_each: Callable[[Comparison], object] = lambda comparison: None,
) -> None:
    """Add the footprint of every provider that was timed, one after the other."""
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    for name in tqdm(comparison.timings, desc="peak of memory", leave=False, disable=None):
        try:
            comparison.footprints[name] = footprint.in_fresh_process(
                name, options.model, options.batch, latent, options.dtype, options.device
            )
        except Exception as failure:  # such as a process that the system ended for want of memory
            comparison.refusals[name] = f"{name} has no peak of memory: {' '.join(str(failure).split())}"
        on_each(comparison)


def outside_contract(name: str, error: float, stock_error: float, dtype: torch.dtype) -> str | None:
    """Why a result of this relative L2 error may not be timed, or ``None``."""
    if dtype == torch.float32:
        limit, rule = FLOAT32_LIMIT, f"{FLOAT32_LIMIT:.0e}"
    else:
        limit, rule = HALF_LIMIT * stock_error, f"{HALF_LIMIT} times eager's {stock_error:.1e}"
    if name == "eager" or error <= limit:
        return None
    return f"{name} is outside the numerical contract: relative L2 error {error:.1e}, allowed {rule}; it was not timed"


def table(comparison: Comparison) -> str:
    """Median, percentiles, error, the footprint if it was measured, and the speed-up of fastsd over each provider."""
    speedup, footprints = comparison.speedup(), comparison.footprints

    def memory(name: str) -> tuple[str, ...]:
        if not footprints:
            return ()
        found = footprints.get(name)
        return (f"{found.peak_bytes / 1e9:.2f}", f"{found.first_call_s:.2f}") if found else ("-", "-")

    rows = [
        (
            name,
            *(harness.milliseconds(timing.percentile(percent)) for percent in (50, 20, 80)),
            f"{comparison.errors[name]:.1e}",
            *memory(name),
            f"{speedup[name]:.2f}×" if name in speedup else "-",
        )
        for name, timing in comparison.timings.items()
    ]
    rows += [
        (name, "-", "-", "-", "-", *memory(name), "refused")
        for name in comparison.refusals
        if name not in comparison.timings
    ]
    columns = ("peak GB", "first call s") if footprints else ()
    return text_table(("provider", "median ms", "p20", "p80", "relative L2", *columns, "speed-up of fastsd"), rows)


def _in_float32(model: models.Model, inputs: dict[str, Any], gri: fastsd.GRI | None = None) -> Tensor:
    """What the model gives in float32; with ``gri`` by the reference."""
    copy = twin(model) if model.dtype == torch.float32 else models.float32_copy(model)
    if gri is not None:
        fastsd.patch(copy, rules=[], backend="reference", gri=replace(gri, levels=highest_level(copy)))
    return models.flat_output(models.entry_point(copy)(**_widened(inputs)))


def _widened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _widened(part) for key, part in value.items()}
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
