"""What fastsd does to a model on this machine, in about a minute: ``python -m examples.demo --model sd15``.

``--model`` is a named model (random weights, which are as fast as trained ones), the folder of a diffusers model or
pipeline, or a hub id.
"""

import argparse
import sys

import torch

import fastsd
from bench import harness, unet
from fastsd import models
from fastsd.cli import arguments, environment, run_safely

REPEATS = 3


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--model", default="sd15", help="a name, a folder or a hub id (default: sd15)")
    parser.add_argument("--device", type=arguments.device, default=arguments.best_device())
    parser.set_defaults(run=run)
    return run_safely(parser.parse_args(given), parser.prog)


def run(options: argparse.Namespace) -> int:
    on_gpu = options.device.type == "cuda"
    dtype = torch.float16 if on_gpu else torch.float32
    print(environment.device_name(options.device), environment.device_capability(options.device), sep=", ")
    print("  ".join(f"{package} {version}" for package, version in environment.versions().items()))
    print(f"{options.model}, {arguments.dtype_name(dtype)}; commit {harness.commit()}\n", flush=True)

    model = models.denoiser(models.load(options.model, dtype, options.device))
    with fastsd.patched(model):
        print(f"{fastsd.report(model)}\n", flush=True)

    batch, latent = (2 if on_gpu else 1), models.default_latent(model)
    comparison = unet.compare(model, ("eager", "fastsd"), batch, latent, REPEATS)
    print(f"One forward, batch {batch}, latent {latent}×{latent}, {REPEATS} interleaved runs each")
    print(unet.table(comparison))
    for sentence in comparison.refusals.values():
        print(sentence, file=sys.stderr)

    print("\nin your program:        fastsd.patch(pipe); fastsd.unpatch(pipe) brings the stock pipeline back")
    print(f"module by module:       fastsd explain {options.model} --json; fastsd doctor checks the kernels here")
    print(f"against torch.compile:  python -m bench unet --model {options.model} --providers eager,compile,fastsd")
    return 1 if comparison.refusals else 0


if __name__ == "__main__":
    sys.exit(main())
