"""What a kernel costs, read from its cubin: registers, stack, shared memory and instructions (SASS).

Needs ``cuobjdump`` and ``nvdisasm``, which Triton and the CUDA toolkit both ship; no GPU.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\*", re.MULTILINE)

# What a gate may ask for or forbid: a name for people, and its form in SASS. Blackwell also has 32-byte accesses.
LOAD_16_BYTES = "16-byte load"
COPY_16_BYTES = "16-byte asynchronous copy"
STORE_16_BYTES = "16-byte store"
TENSOR_CORES = "tensor cores"
SPILL = "spill"
INSTRUCTIONS = {
    LOAD_16_BYTES: r"\bLDG\.\S*\b(128|256)\b",
    COPY_16_BYTES: r"\bLDGSTS\.\S*\b128\b",
    STORE_16_BYTES: r"\bSTG\.\S*\b(128|256)\b",
    TENSOR_CORES: r"\b(HMMA|HGMMA|UTC\w*MMA)\b",
    SPILL: r"\b(LDL|STL)\b",
}

# From compute capability 9.0 on, ptxas adds the part that the system keeps for itself in each block, if there is any
_RESERVED_SHARED_BYTES = 1024


@dataclass(frozen=True)
class KernelResources:
    """One kernel of a cubin.

    Attributes:
        registers: per thread.
        stack_bytes: per thread; local arrays and spilled registers live there.
        static_shared_bytes: per block, what the source declares.
        instructions: how many there are of each kind in ``INSTRUCTIONS``.
        dynamic_shared_bytes: per block, of a launch, which Triton plans as it compiles; a cubin does not tell.
    """

    registers: int
    stack_bytes: int
    static_shared_bytes: int
    instructions: dict[str, int]
    dynamic_shared_bytes: int = 0


def inspect(cubin: bytes) -> dict[str, KernelResources]:
    """Every kernel of ``cubin`` by its (mangled) name.

    Raises:
        RuntimeError: the tools are missing, or they cannot read ``cubin``.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _cuobjdump(file.name)
    architecture = re.search(r"code for sm_(\d+)", listing)
    if architecture is None:
        raise RuntimeError(f"expected a cubin; cuobjdump finds no machine code in these {len(cubin)} bytes")
    reserved = _RESERVED_SHARED_BYTES if int(architecture[1]) >= 90 else 0
    code = dict(_functions(listing))
    return {
        name: KernelResources(int(registers), int(stack), max(int(shared) - reserved, 0), _count(code[name]))
        for name, registers, stack, shared in _RESOURCES.findall(listing)
    }


def _functions(listing: str) -> Iterator[tuple[str, list[str]]]:
    """The instructions of each function, without addresses and encodings, e.g. ``@P0 LDG.E.128 R4, [R6.64]``."""
    for section in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]:
        name, body = section.split("\n", 1)
        yield name.strip(), _INSTRUCTION.findall(body)


def _count(sass: list[str]) -> dict[str, int]:
    return {name: sum(re.search(form, line) is not None for line in sass) for name, form in INSTRUCTIONS.items()}


def _cuobjdump(path: str) -> str:
    # cuobjdump calls nvdisasm, which it looks for in PATH
    tool = _newest_cuobjdump()
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    command = [tool, "-res-usage", "-sass", path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump cannot read the cubin: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@functools.cache
def _newest_cuobjdump() -> Path:
    # a tool reads the cubins of older compilers, not always those of newer ones
    return max(_tool_candidates(), key=_version)


def _tool_candidates() -> list[Path]:
    folders = []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    folders += [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        folders.append(Path(on_path).parent)
    found = [folder / "cuobjdump" for folder in folders if _has_tools(folder)]
    if not found:
        raise RuntimeError(
            "cuobjdump and nvdisasm are needed to inspect a cubin and were found neither in the triton package, nor "
            "under CUDA_HOME or CUDA_PATH, nor in PATH; run `pip install triton` or install the CUDA toolkit"
        )
    return found


def _has_tools(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in ("cuobjdump", "nvdisasm"))


def _version(tool: Path) -> tuple[int, ...]:
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, release.groups())) if release else (0, 0)
