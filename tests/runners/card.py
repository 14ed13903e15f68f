"""The kernels on an NVIDIA card."""

import torch

from fastsd_kernels.conv2d import measured
from tests.runners import protocol


class Card:
    device = "cuda"
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    one_in = 1
    settings = {}  # noqa: RUF012 (read only)

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"card-{backend}"

    def unavailable(self):
        return None if torch.cuda.is_available() else "torch sees no NVIDIA card"

    def run(self, op, sample, setting):
        # the library's own convolutions, not torch's
        with measured.forced(measured.IMPLICIT_GEMM):
            return protocol.call(op, sample, self.backend)

    def cost(self, op, sample, setting):
        return 0

    def same_bits(self, setting):
        return setting

    def launches(self, op, sample):
        return []

    def served(self, op, samples):
        return protocol.not_refused(op, samples, self.backend)
