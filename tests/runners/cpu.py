"""The CPU extension, on every instruction set that this processor has, with one thread and with several."""

import functools

import torch

from fastsd_kernels import cpu_runtime
from tests.runners import protocol
from tests.runners.protocol import attributes


class CPU:
    name, backend, device = "cpu", "cpu", "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    one_in = 1

    @functools.cached_property
    def settings(self):
        return {"isa": cpu_runtime.ISAS[: cpu_runtime.extension().best_isa() + 1], "threads": (1, 3)}

    def unavailable(self):
        return cpu_runtime.unavailable()

    def run(self, op, sample, setting):
        isa, threads = cpu_runtime.ISAS.index(setting["isa"]), torch.get_num_threads()
        torch.set_num_threads(setting["threads"])
        try:
            with attributes((cpu_runtime, "isa", lambda: isa)):
                return protocol.call(op, sample, "cpu")
        finally:
            torch.set_num_threads(threads)

    def cost(self, op, sample, setting):
        return 0

    def same_bits(self, setting):
        # with another number of threads only the library's own products give the same bits, not torch's
        return setting

    def launches(self, op, sample):
        return []

    def served(self, op, samples):
        return protocol.not_refused(op, samples, "cpu")
