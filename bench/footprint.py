"""The peak of memory of one provider and the time of its first call, in a process that does nothing else."""

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import harness
from bench.providers import prepare_in_place
from fastsd import models


@dataclass(frozen=True)
class Footprint:
    """What a user sees of one provider beside its speed.

    ``peak_bytes``: with the model loaded, of the resident process on a CPU, of what torch allocated on a CUDA device.
    ``first_call_s``: from the loaded model to its first output, with the layout, the patch, capture and compilation.
    """

    peak_bytes: int
    first_call_s: float


def in_fresh_process(
    name: str, model: str, batch: int, latent: int, dtype: torch.dtype, device: torch.device
) -> Footprint:
    """The footprint of the provider ``name``; an error of the process is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, name, model, batch, latent, dtype, device).result()


def measure(name: str, model: str, batch: int, latent: int, dtype: torch.dtype, device: torch.device) -> Footprint:
    """Load, call twice, and look at the peak of this process, which ought to be a new one."""
    harness.use(device)
    loaded = models.denoiser(models.load(model, dtype, device))
    inputs = models.example_inputs(loaded, batch, latent)
    forget_peak(device)  # a named model in half precision is made in float32, which a user's is not
    calls = []

    def first() -> None:
        calls.append(prepare_in_place(name, loaded, inputs))
        calls[0]()

    with torch.no_grad(), harness.exact_float32():
        first_call_s = harness.clock_for(device)(first)
        calls[0]()
    return Footprint(peak_bytes(device), first_call_s)


def forget_peak(device: torch.device) -> None:
    """Let :func:`peak_bytes` start from what is taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """On a CPU ``VmHWM``, and not ``ru_maxrss``: that keeps, through fork and exec, what the parent had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1])
