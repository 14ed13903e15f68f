"""``fastsd doctor``: every op on every backend that can run here, held to the numerical contract."""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastsd.cli import arguments
from fastsd.cli.table import text_table
from fastsd_kernels.dispatch import BACKENDS, BackendUnavailable, Op, ops
from fastsd_kernels.testing import ContractViolation, Sample, check_op


@dataclass
class Finding:
    """How one backend of one op did on the samples of one dtype."""

    op: str
    backend: str
    device: str
    dtype: str
    passed: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    unavailable: str | None = None

    def count(self, op: Op, sample: Sample) -> None:
        """Run ``sample`` and note the outcome."""
        try:
            check_op(op, sample, self.backend)
        except BackendUnavailable:
            self.refused += 1
        except ContractViolation as violation:
            self.failures.append(f"{sample}: {violation}")
        except Exception as error:  # whatever a broken kernel raises is a finding, not the end of the examination
            self.failures.append(f"{sample}: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            self.passed += 1


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("doctor", help="check every kernel against its definition on this machine")
    parser.add_argument("--device", type=arguments.device, help="check this device only (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    findings = list(examine([options.device] if options.device else arguments.devices()))
    failures = [(finding, failure) for finding in findings for failure in finding.failures]
    if options.json:
        print(json.dumps({"healthy": not failures, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 1 if failures else 0
    print(
        text_table(
            ("op", "backend", "device", "dtype", "passed", "refused", "failed", ""),
            (
                (f.op, f.backend, f.device, f.dtype)
                + (("-", "-", "-", f.unavailable) if f.unavailable else (f.passed, f.refused, len(f.failures), ""))
                for f in findings
            ),
        )
    )
    for finding, failure in failures:
        print(f"FAILED  {finding.op} on {finding.backend}, {finding.device}, {finding.dtype}: {failure}")
    print("Some kernels are wrong on this machine." if failures else "Every kernel that can run here is right.")
    return 1 if failures else 0


def examine(devices: Iterable[torch.device]) -> Iterator[Finding]:
    """One finding for each op, backend, device and dtype; the reference is the measure and is not examined."""
    devices = tuple(devices)
    for op in ops():
        for backend in (name for name in BACKENDS if name != "reference"):
            refusal = op.backends[backend].unavailable()
            if refusal is not None:
                yield Finding(op.name, backend, "-", "-", unavailable=refusal)
                continue
            for device in (device for device in devices if backend in op.order(device)):
                yield from _examine_backend(op, backend, device)


def _examine_backend(op: Op, backend: str, device: torch.device) -> Iterator[Finding]:
    for name, dtype in arguments.DTYPES.items():
        finding = Finding(op.name, backend, str(device), name)
        for sample in op.cases.samples(device, dtype):
            finding.count(op, sample)
        yield finding
