"""CUDA kernels on the host: the same ``.cu``, compiled by g++, its threads run as fibers. See ``tests/host``.

:func:`launch` stands in for :func:`fastsd_kernels.cuda_runtime.launch`. Libraries are built by ninja at first use and
kept in ``build/host``, named by a hash of all that they are made from.

With ``FASTSD_HOST_SANITIZE=1`` everything is built with AddressSanitizer and UBSan. The process must then have been
started with :func:`sanitizer_environment`.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests/host"
CUDA_SOURCES = ROOT / "csrc/cuda"
BUILD = ROOT / "build/host"

_SANITIZE = os.environ.get("FASTSD_HOST_SANITIZE") == "1"
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(')
_COMMON_FLAGS = ("-std=c++17", "-fPIC", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes")
_PLAIN_FLAGS = ("-O1",)
_SANITIZER_FLAGS = (
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=object-size",  # AddressSanitizer finds the same and says where the memory is from
    "-fsanitize-sections=fastsd_shared",
    "-fno-sanitize-recover=undefined",
)


class HarnessError(RuntimeError):
    """The harness cannot be built; the message says what is missing or what the compiler said."""


class HostKernels:
    """The kernels of one source for one set of macro definitions.

    Args:
        source: a file of ``csrc/cuda``, or of ``tests/host``.
        defines: macros, ``"NAME=value"`` or ``"NAME"``.

    Raises:
        HarnessError: g++, ninja, pybind11 or CUDA's headers are missing, or the source does not compile.
    """

    def __init__(self, source: str, defines: Sequence[str] = ()) -> None:
        (path,) = build([(source, tuple(defines))])
        self._library = _harness().Library(str(path))

    def launch(
        self,
        kernel: str,
        *,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Sequence[int | float | Tensor | None],
        reverse: bool = False,
    ) -> None:
        """Run ``kernel`` on CPU tensors.

        Args:
            args: a tensor becomes its address, ``None`` a null pointer, an int ``int64_t``, a float ``float``.
            reverse: run blocks and threads in the opposite order, and make asynchronous copies as late, instead of as
                early, as a device may; no result may depend on it.

        Raises:
            RuntimeError: a thread did what a device does not do; threads wait for each other in vain.
            TypeError, ValueError: the arguments do not fit the kernel, or the launch exceeds CUDA's limits.
        """
        self._library.launch(
            kernel, grid=grid, block=block, shared_bytes=shared_bytes, args=list(args), reverse=reverse
        )


@functools.cache
def host_kernels(source: str, defines: tuple[str, ...]) -> HostKernels:
    return HostKernels(source, defines)


def launch(
    source: str,
    kernel: str,
    defines: tuple[str, ...],
    *,
    device: torch.device,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    args: Sequence[int | float | Tensor | None],
    reverse: bool = False,
) -> None:
    """:func:`fastsd_kernels.cuda_runtime.launch` for CPU tensors."""
    host_kernels(source, defines).launch(
        kernel, grid=grid, block=block, shared_bytes=shared_bytes, args=args, reverse=reverse
    )


def build(variants: Iterable[tuple[str, tuple[str, ...]]]) -> list[Path]:
    """The libraries of several sources and definitions, those that are missing compiled side by side."""
    flags = [*_COMMON_FLAGS, *(_SANITIZER_FLAGS if _SANITIZE else _PLAIN_FLAGS)]
    harness = _harness_path()
    BUILD.mkdir(parents=True, exist_ok=True)
    edges, paths = _harness_edges(harness, flags), []
    for source, defines in variants:
        path = _library_path(source, defines)
        paths.append(path)
        text = _read(source)
        table = "\n".join(f'    fastsd::host::kernel<{name}>("{name}"),' for name in _KERNEL.findall(text))
        unit = (
            f'#include "{source}"\n#include "library.hpp"\n\n'
            f'extern "C" const fastsd::host::Kernel fastsd_kernels[];\n'
            f"const fastsd::host::Kernel fastsd_kernels[] = {{\n{table}\n    {{}},\n}};\n"
        )
        edges |= _library_edges(path, unit, [*flags, *(f"-D{define}" for define in defines)], harness)
    _run_ninja(edges)
    return paths


def sanitizer_environment() -> dict[str, str]:
    """The environment in which a Python process can load libraries built with ``FASTSD_HOST_SANITIZE=1``."""
    libraries = [
        subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "FASTSD_HOST_SANITIZE": "1",
        "LD_PRELOAD": ":".join(library.stdout.strip() for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


def run_sanitized(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python ``code`` in a process of its own, with the harness under AddressSanitizer and UBSan."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=sanitizer_environment(),
        cwd=ROOT,
        check=False,
    )


@functools.cache
def _harness() -> ModuleType:
    path = _harness_path()
    if not path.exists():
        build([])
    spec = importlib.util.spec_from_file_location("harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _harness_edges(target: Path, flags: list[str]) -> dict[Path, str]:
    import pybind11

    block, bindings = (target.with_name(f"{target.stem}.{name}.o") for name in ("block", "bindings"))
    # the bindings touch no kernel's memory, and pybind11 takes long to compile with sanitizers
    includes = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    return {
        block: _edge(block, "compile", [HARNESS / "block.cpp"], flags),
        bindings: _edge(bindings, "compile", [HARNESS / "bindings.cpp"], [*_COMMON_FLAGS, *includes]),
        target: _edge(target, "link", [block, bindings], flags),
    }


def _library_edges(target: Path, unit: str, flags: list[str], harness: Path) -> dict[Path, str]:
    source, compiled = target.with_suffix(".cpp"), target.with_suffix(".o")
    if not target.exists():
        source.write_text(unit)
    return {
        compiled: _edge(compiled, "compile", [source], flags),
        target: _edge(target, "link", [compiled, harness], flags),
    }


def _edge(target: Path, rule: str, inputs: list[Path], flags: list[str]) -> str:
    escaped = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (target, *inputs)]
    return f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}\n  flags = {' '.join(map(shlex.quote, flags))}\n"


def _run_ninja(edges: dict[Path, str]) -> None:
    """Build the targets that are missing. A target's name holds a hash of its inputs: one that exists is right."""
    import ninja

    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {target: edge for target, edge in edges.items() if not target.exists()}
        wanted = [target for target in missing if target.suffix == ".so"]
        if not wanted:
            return
        includes = " ".join(shlex.quote(f"-I{folder}") for folder in (HARNESS, CUDA_SOURCES, _cuda_headers()))
        rules = (
            f"rule compile\n  command = {_compiler()} -DFASTSD_HOST {includes} $flags -c $in -o $out\n"
            f"rule link\n  command = {_compiler()} -shared $flags $in '-Wl,-rpath,$$ORIGIN' -o $out\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "build.ninja"
            file.write_text(rules + "".join(missing.values()))
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", "-f", str(file), *map(str, wanted)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HarnessError(f"the host harness does not build:\n{done.stdout}{done.stderr}")


def _harness_path() -> Path:
    return BUILD / f"harness-{_hash('harness')}.so"


def _library_path(source: str, defines: tuple[str, ...]) -> Path:
    return BUILD / f"{Path(source).stem}-{_hash(source, _read(source), *defines)}.so"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr((_ingredients(), parts)).encode()).hexdigest()[:16]


@functools.cache
def _ingredients() -> tuple[str, ...]:
    """What every library depends on: compiler, flags, CUDA's headers, the harness and the shared device header."""
    compiler = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    headers = [path for path in (*HARNESS.rglob("*"), *CUDA_SOURCES.glob("*.cuh")) if path.is_file()]
    texts = [path.read_text() for path in sorted(headers) if path.suffix != ".cu"]
    return (compiler, sys.version, str(_SANITIZE), str(_cuda_headers()), Path(__file__).read_text(), *texts)


def _read(source: str) -> str:
    path = next((folder / source for folder in (CUDA_SOURCES, HARNESS) if (folder / source).is_file()), None)
    if path is None:
        raise HarnessError(f"{source} is neither in {CUDA_SOURCES} nor in {HARNESS}")
    return path.read_text()


@functools.cache
def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise HarnessError("g++ is needed to run CUDA kernels on the host and is not in PATH; install g++")
    return compiler


@functools.cache
def _cuda_headers() -> Path:
    try:
        headers = [Path(str(file.locate())) for file in files("nvidia-cuda-runtime") or ()]
    except PackageNotFoundError:
        headers = []
    folder = next((header.parent for header in headers if header.name == "cuda_fp16.h"), None)
    if folder is None or not (folder / "crt/host_defines.h").is_file():
        raise HarnessError("CUDA's headers are not found; run `pip install nvidia-cuda-runtime nvidia-cuda-crt`")
    return folder
