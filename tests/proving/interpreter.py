"""An op's Triton backend run by Triton's interpreter on the CPU, one result a sample.

A process has either compiled or interpreted kernels, as ``TRITON_INTERPRET`` says when they are imported; so a
child process runs the samples, and the tests that compile live in the parent.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import fastsd_kernels
from fastsd_kernels.dispatch import Op, ops
from fastsd_kernels.testing import Sample, check_op, named

_ROOT = Path(__file__).parents[2]
_TIMEOUT_SECONDS = 600


@functools.cache
def failures(
    op: str,
    dtype: str,
    *,
    names: tuple[str, ...] = (),
    constants: tuple[tuple[str, int], ...] = (),
    twice: bool = False,
) -> dict[str, str | None]:
    """The op's CPU samples by name, each with what went wrong or ``None``.

    A sample is run on memory that is NaN where nothing was written, and held to the numerical contract.

    Args:
        op: its name.
        dtype: ``"float32"`` or ``"float16"``; the interpreter rounds bfloat16 wrongly.
        names: the samples to run; all if empty.
        constants: of the module ``triton_impl``, set first, so that small samples take the paths of large ones; of
            another op's as ``"attention.MOST_M"``.
        twice: whether two more runs must give the same bits.

    Raises:
        RuntimeError: the child process failed as a whole.
    """
    settings = (f"{name}={value}" for name, value in constants)
    command = [sys.executable, "-m", __name__, op, dtype, "--samples", *names, "--set", *settings]
    command += ["--twice"] if twice else []
    child = subprocess.run(
        command,
        cwd=_ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}:\n{child.stderr}")
    return json.loads(child.stdout)


def _failure(op: Op, sample: Sample, twice: bool) -> str | None:
    function = getattr(fastsd_kernels, op.name)
    try:
        check_op(op, sample, "triton")
        if not twice:
            return None
        first, second = (function(**sample.kwargs, backend="triton") for _ in range(2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not torch.equal(first.nan_to_num(nan=0.0), second.nan_to_num(nan=0.0)):
        return "two runs on the same input differ"
    return None


def _op_named(name: str) -> Op:
    return next(op for op in ops() if op.name == name)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("op")
    parser.add_argument("dtype")
    parser.add_argument("--samples", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=INTEGER")
    parser.add_argument("--twice", action="store_true")
    given = parser.parse_args()

    op = _op_named(given.op)
    for name, value in (setting.split("=") for setting in given.set):
        owner, _, constant = name.rpartition(".")
        module = _op_named(owner or given.op).backends["triton"].module
        if not hasattr(module, constant):
            raise AttributeError(f"expected a constant of {module.__name__}; got {constant!r}")
        setattr(module, constant, int(value))
    samples = list(op.cases.samples("cpu", getattr(torch, given.dtype)))

    # with deterministic algorithms torch fills what torch.empty returns with NaN
    torch.use_deterministic_algorithms(True)
    wanted = given.samples or [sample.name for sample in samples]
    json.dump({name: _failure(op, named(samples, name), given.twice) for name in wanted}, sys.stdout)


if __name__ == "__main__":
    _main()
