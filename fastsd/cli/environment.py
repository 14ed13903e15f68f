"""What a result depends on: versions, devices, and whether fastsd is installed."""

import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("fastsd", "torch", "triton", "diffusers", "transformers", "peft", "cuda-python", "cuda-core", "openvino")


def versions() -> dict[str, str]:
    """Python, the packages that fastsd can use and are installed, and the CUDA that torch was built with."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """The product name, for a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def device_capability(device: torch.device) -> str:
    """The compute capability of a card, the instruction set that torch uses on a CPU."""
    if device.type == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    return torch.backends.cpu.get_cpu_capability()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
