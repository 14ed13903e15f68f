"""Kernels under AddressSanitizer and UBSan: the program of a child process, since a sanitizer wants a whole one.

    python -m tests.contract.sanitized cpu EXTENSION     # the CPU extension at this path, built with sanitizers
    python -m tests.contract.sanitized host              # CUDA kernels, in tests.harness.host.sanitizer_environment()

Each sample is held to the contract; a line says how many there were. ``--full`` runs all combinations. In the CPU's
program each planted overrun runs first, in a fork of its own: the sanitizer must end it.
"""

import importlib.util
import itertools
import os
import sys

import torch

from fastsd_kernels.dispatch import ops
from fastsd_kernels.testing import check_result
from tests.contract import covering
from tests.runners.cpu import CPU
from tests.runners.host import Host

FULL = "--full" in sys.argv
VARIANTS, CASES = 1, 20  # of each op's kernels, compiled with sanitizers, and what runs of these, if not full


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "cpu":
        _load_extension(sys.argv[2])
        for name, mistake in PLANTED.items():
            print(name, "caught" if _fails(mistake) else "missed", flush=True)
        _other_sizes()
        _run(covering.cases(CPU(), covering.product if FULL else covering.covering))
    else:
        _run(list(_host_cases()))


def _run(cases) -> None:
    for case in cases:
        print("case:", case, file=sys.stderr)  # the last one is what a sanitizer ends the process in
        check_result(case.op, case.sample, case.runner.run(case.op, case.sample, case.setting))
    print("right:", len(cases))


def _host_cases():
    """Cases of a few variants of each op's kernels, other ones at each commit."""
    for op in ops():
        cases = [case for case in covering.covering(op, Host()) if case.needs]
        chosen: set[object] = set()
        for case in cases:
            if FULL or len(chosen) < VARIANTS:
                chosen |= case.needs
        yield from [case for case in cases if case.needs <= chosen][: None if FULL else CASES]


def _load_extension(path: str) -> None:
    spec = importlib.util.spec_from_file_location("fastsd_kernels._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["fastsd_kernels._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastsd_kernels._cpu"])


def _fails(mistake) -> bool:
    child = os.fork()
    if child == 0:
        mistake(torch.ops.fastsd_cpu)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def _skip_of_half_the_rows(kernels) -> None:
    x, skip, whole = torch.randn(1, 8, 64, 64), torch.randn(1, 8, 32, 64), torch.empty(1, 16, 64, 64)
    kernels.group_norm_silu(x, skip, None, None, None, 4, 1e-5, True, False, 0, whole)


def _norm_of_half_the_channels(kernels) -> None:
    x, whole, source = torch.randn(1, 8, 64, 64), torch.empty(1, 16, 64, 64), torch.arange(66, dtype=torch.int32) - 1
    weights, norm = torch.randn(16, 8, 3, 3), torch.randn(1, 3, 4)
    kernels.conv2d(x, None, norm, True, source, source, weights, 2, 3, 1, None, None, None, 1.0, 0, whole)


def _means_of_half_the_channels(kernels) -> None:
    x = torch.randn(1, 8, 64, 64)
    kernels.group_norm_silu_mean(x, None, None, None, 4, 1e-5, True, 0, torch.empty_like(x), torch.empty(1, 4))


def _result_of_half_the_tokens(kernels) -> None:
    q = torch.randn(1, 2, 64, 8)
    kernels.gri_attention(q, q, q, 8, 8, 4, 4, 2, 2, False, None, None, 1.0, 0, q[:, :, :32].clone())


PLANTED = {
    "skip of half the rows": _skip_of_half_the_rows,
    "norm of half the channels": _norm_of_half_the_channels,
    "means of half the channels": _means_of_half_the_channels,
    "result of half the tokens": _result_of_half_the_tokens,
}


def _other_sizes() -> None:
    """What the samples are too small for."""
    from fastsd_kernels import attention, conv2d, cpu_runtime, linear

    for isa, size in itertools.product(range(cpu_runtime.isa() + 1), (0, 1, 67, 100_003)):
        torch.ops.fastsd_cpu.digest(torch.randn(size), isa)
    # more channels than have their weights transformed at once
    for algorithm in ("product", "winograd2", "winograd4"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            wide = torch.randn(33, 1601, 3, 3).contiguous(memory_format=memory_format)
            conv2d(torch.randn(1, 1601, 7, 5), wide, padding=1, algorithm=algorithm, backend="cpu")
    # many rows, weights in two parts, and few rows whose next panels are fetched
    for rows in (520, 40):
        x, weight = torch.randn(rows, 1280), torch.randn(2600, 1280)
        linear(x, weight, norm_eps=1e-5, activation="geglu", residual=torch.randn(rows, 1300), backend="cpu")
    # keys and values that are copied
    q, k, v = torch.randn(2, 1031, 3, 3, 9).transpose(1, 3).unbind(2)
    attention(q, k[:, :, 7:], v[:, :, :-7], backend="cpu")


if __name__ == "__main__":
    main()
