"""CUDA kernels on the host: the same ``.cu`` compiled by g++, the threads of a block run as fibers."""

import functools
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch._subclasses import FakeTensorMode

from fastsd_kernels import cuda_runtime
from fastsd_kernels.conv2d import measured
from fastsd_kernels.dispatch import BackendUnavailable, ops
from tests.harness import host
from tests.runners import protocol
from tests.runners.protocol import attributes

MULTIPROCESSORS = 132

_FAKE = FakeTensorMode()


class Host:
    name, backend, device = "host", "cuda", "cpu"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    one_in = 1
    settings = {"seed": (0, 1, 2, 3)}  # noqa: RUF012 (read only)

    def unavailable(self):
        return None

    def run(self, op, sample, setting):
        with as_a_card(functools.partial(host.launch, **setting)):
            return protocol.call(op, sample, "cuda")

    def cost(self, op, sample, setting):
        return 0

    def same_bits(self, setting):
        return {"seed": 0 if setting["seed"] else 1}

    def launches(self, op, sample):
        recorded = []

        def record(source, kernel, defines, **launch):
            recorded.append({"source": source, "kernel": kernel, "defines": defines, **launch})

        with as_a_card(record):
            protocol.call(op, sample, "cuda")
        return recorded

    def served(self, op, samples):
        recorded, found = [], {}
        with as_a_card(lambda source, kernel, defines, **launch: recorded.append((source, defines))):
            for name, sample in samples.items():
                recorded.clear()
                with suppress(BackendUnavailable):
                    result = protocol.call(op, sample, "cuda")
                    # where torch computes it all, there is nothing to try
                    if recorded or not result.numel():
                        found[name] = frozenset(recorded)
        return found


@contextmanager
def as_a_card(launch):
    """CPU tensors go through the CUDA backends, and these through ``launch``, with their own convolutions."""
    modules = {op.backends["cuda"].module for op in ops()}
    with ExitStack() as stack:
        stack.enter_context(measured.forced(measured.IMPLICIT_GEMM))
        stack.enter_context(
            attributes(
                (cuda_runtime, "launch", launch),
                (cuda_runtime, "multiprocessors", lambda device: MULTIPROCESSORS),
                *((module, "unavailable", lambda: None) for module in modules),
                *((module, "reject", _as_on_a_card(module.reject)) for module in modules),
            )
        )
        yield


def _as_on_a_card(reject):
    def on_a_card(x, *args):
        with _FAKE:
            return reject(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"), *args)

    return on_a_card
