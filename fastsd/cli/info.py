"""``fastsd info``: versions, devices, and for every op which backends can run here, or why not."""

import argparse
import json
from typing import Any

from fastsd.cli import arguments, environment
from fastsd.cli.table import text_table
from fastsd_kernels import cubin_cache
from fastsd_kernels.dispatch import ops


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("info", help="show versions, devices and which kernels can run here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    facts = gather()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print("  ".join(f"{package} {version}" for package, version in facts["versions"].items()))
    print(f"compiled kernels are cached in {facts['cache']}\n")
    print(
        text_table(
            ("device", "capability", "name"), ([d["device"], d["capability"], d["name"]] for d in facts["devices"])
        )
    )
    print()
    print(
        text_table(
            ("op", "backend", "available", ""),
            (
                (op, backend, "no" if why else "yes", why or "")
                for op, described in facts["ops"].items()
                for backend, why in described["backends"].items()
            ),
        )
    )
    print()
    print(
        text_table(
            ("op", "device", "asked in this order"),
            (
                (op, device, ", ".join(order))
                for op, described in facts["ops"].items()
                for device, order in described["order"].items()
            ),
        )
    )
    return 0


def gather() -> dict[str, Any]:
    """``versions``; ``devices``; ``ops``: backend to why it is unavailable (``None``: it runs), order per device."""
    devices = arguments.devices()
    return {
        "versions": environment.versions(),
        "devices": [
            {
                "device": str(device),
                "name": environment.device_name(device),
                "capability": environment.device_capability(device),
            }
            for device in devices
        ],
        "ops": {
            op.name: {
                "backends": {name: backend.unavailable() for name, backend in op.backends.items()},
                "order": {str(device): op.order(device) for device in devices},
            }
            for op in ops()
        },
        "cache": str(cubin_cache.folder_path()),
    }
