"""The command ``fastsd``: what can run here, what a patch does, smaller models, and whether the kernels are right.

Exit status: 0 for success, 1 when a check failed, 2 for a request that cannot be served, with one line on stderr.
"""

import argparse
import sys
from collections.abc import Sequence

from fastsd.cli import compress, doctor, explain, info

COMMANDS = (info, explain, compress, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` default to those of the process."""
    parser = argparse.ArgumentParser(prog="fastsd", description="Custom kernels for Stable Diffusion U-Nets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return run_safely(options, parser.prog)


def run_safely(options: argparse.Namespace, program: str) -> int:
    """``options.run(options)``, where a request that cannot be served is one line on stderr and status 2."""
    try:
        return options.run(options)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
