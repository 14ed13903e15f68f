"""CUDA kernels on the host: the same ``.cu``, compiled by g++, its threads run as fibers.

:func:`launch` stands in for :func:`fastsd_kernels.cuda_runtime.launch`. Every launch is watched: a race, or an access
outside the tensors that were passed and shared memory, is an error. Libraries are compiled at first use and kept as
:mod:`tests.artefacts`.

With ``FASTSD_HOST_SANITIZE=1`` everything is built with AddressSanitizer and UBSan, which exclude that check. The
process must then have been started with :func:`sanitizer_environment`.
"""

import ctypes
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from tests import artefacts

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests/harness"
CUDA_SOURCES = ROOT / "csrc/cuda"

_SANITIZE = os.environ.get("FASTSD_HOST_SANITIZE") == "1"
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(')
_COMMON_FLAGS = ("-std=c++17", "-fPIC", "-gdwarf-4", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes")
_WRAPPED = ("memcpy", "memmove", "memset")
# the calls that it makes of each access are the harness's own
_WATCHED_FLAGS = (
    "-O1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    *(f"-fno-builtin-{name}" for name in _WRAPPED),  # inlined, they would not be seen
)
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
        source: a file of ``csrc/cuda``, or of ``tests/harness``.
        defines: macros, ``"NAME=value"`` or ``"NAME"``.

    Raises:
        HarnessError: g++, pybind11 or CUDA's headers are missing, or the source does not compile.
    """

    def __init__(self, source: str, defines: Sequence[str] = ()) -> None:
        path = _library(source, tuple(defines))
        self._library = _harness().Library(str(path))

    def launch(
        self,
        kernel: str,
        *,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Sequence[int | float | Tensor | None],
        seed: int = 0,
    ) -> None:
        """Run ``kernel`` on CPU tensors.

        Args:
            args: a tensor becomes its address, ``None`` a null pointer, an int ``int64_t``, a float ``float``.
            seed: selects the order of blocks, warps and lanes, and when asynchronous copies are made; no result may
                depend on it. 0: in order, and at once; 1: in the opposite order, and as late as the wait; from 2 on:
                pseudo-random.

        Raises:
            RuntimeError: a race, with both lines and threads; an access outside every tensor and shared memory; a
                thread did what a device does not do; threads wait for each other in vain.
            TypeError, ValueError: the arguments do not fit the kernel, or the launch exceeds CUDA's limits.
        """
        self._library.launch(kernel, grid=grid, block=block, shared_bytes=shared_bytes, args=list(args), seed=seed)


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
    seed: int = 0,
) -> None:
    """:func:`fastsd_kernels.cuda_runtime.launch` for CPU tensors."""
    host_kernels(source, defines).launch(
        kernel, grid=grid, block=block, shared_bytes=shared_bytes, args=args, seed=seed
    )


def build(variants: Iterable[tuple[str, tuple[str, ...]]]) -> list[Path]:
    """The libraries of several sources and definitions, those that are missing compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda variant: _library(*variant), variants))


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
    path = _harness_library()
    # libraries of kernels find what they call in what is loaded already
    ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _harness_library() -> Path:
    import pybind11

    # the bindings touch no kernel's memory, and pybind11 takes long to compile with sanitizers
    sanitizers = _SANITIZER_FLAGS if _SANITIZE else ("-O2",)
    python = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    units = {"block": sanitizers, "races": sanitizers, "bindings": python}

    def compiled(name: str) -> Path:
        flags = (*_COMMON_FLAGS, *_includes(), *units[name])
        source = HARNESS / f"{name}.cpp"
        key = artefacts.digest(_ingredients(), source.read_text(), flags, sys.version)
        return artefacts.artefact("host", f"{name}-{key}.o", lambda path: _compile(path, ["-c", *flags, str(source)]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(map(str, pool.map(compiled, reversed(units))))
    command = ["-shared", *(_SANITIZER_FLAGS if _SANITIZE else ()), *objects]
    return artefacts.artefact(
        "host", f"harness-{artefacts.digest(objects, command)}.so", lambda path: _compile(path, command)
    )


def _library(source: str, defines: tuple[str, ...]) -> Path:
    """The library of one variant. Its key takes a preprocessor run, so it is kept, by what that run reads."""
    text = _read(source)
    macros = "".join(f"#define {define.replace('=', ' ', 1)}\n" for define in defines)
    table = "\n".join(f'    fastsd::host::kernel<{name}>("{name}"),' for name in _KERNEL.findall(text))
    unit = (
        f'{macros}#include "{source}"\n#include "library.hpp"\n\n'
        f'extern "C" const fastsd::host::Kernel fastsd_kernels[];\n'
        f"const fastsd::host::Kernel fastsd_kernels[] = {{\n{table}\n    {{}},\n}};\n"
    )
    stem, flags = Path(source).stem, _kernel_flags()

    def write_key(path: Path) -> None:
        # with line numbers, which reports quote
        preprocessed = _run([_compiler(), "-E", "-x", "c++", *flags, "-"], unit)
        path.write_text(artefacts.digest(preprocessed, flags, _compiler_version()))

    read = artefacts.digest(_ingredients(), text, unit, flags)
    key = artefacts.artefact("host", f"{stem}-{read}.key", write_key).read_text()

    def compile_unit(path: Path) -> None:
        written, compiled = path.with_suffix(".cpp"), path.with_suffix(".o")
        written.write_text(unit)
        _compile(compiled, ["-c", *flags, "-include", str(_precompiled_headers().with_suffix("")), str(written)])
        # without -fsanitize=thread, which would bring ThreadSanitizer's own runtime
        watched = [f"-Wl,--wrap={name}" for name in _WRAPPED]
        _compile(path, ["-shared", *(flags if _SANITIZE else watched), str(compiled)])

    return artefacts.artefact("host", f"{stem}-{key}.so", compile_unit)


def _precompiled_headers() -> Path:
    """Half of a variant's compilation: CUDA's headers and the harness's own, none of which sees a variant's macros."""
    flags = _kernel_flags()
    unit = '#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include "cuda_on_host.hpp"\n#include "kernel_table.hpp"\n'

    def precompile(path: Path) -> None:
        header = path.with_suffix("")
        header.write_text(unit)
        _compile(path, ["-x", "c++-header", *flags, str(header)])

    return artefacts.artefact("host", f"headers-{artefacts.digest(_ingredients(), unit, flags)}.hpp.gch", precompile)


def _compile(target: Path, arguments: Sequence[str]) -> None:
    _run([_compiler(), *arguments, "-o", str(target)])


def _run(command: Sequence[str], unit: str = "") -> str:
    done = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError(f"the host harness does not build:\n{shlex.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)  # warnings
    return done.stdout


@functools.cache
def _ingredients() -> tuple[str, ...]:
    """What every compilation depends on: the compiler, CUDA's headers, those of the harness and of the kernels."""
    headers = [path for folder in (HARNESS, CUDA_SOURCES) for path in folder.rglob("*") if path.is_file()]
    texts = [path.read_text() for path in sorted(headers) if path.suffix in (".hpp", ".cuh", "")]
    return (_compiler_version(), str(_cuda_headers()), *texts)


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
def _compiler_version() -> str:
    return _run([_compiler(), "--version"])


def _kernel_flags() -> tuple[str, ...]:
    return (*_COMMON_FLAGS, *(_SANITIZER_FLAGS if _SANITIZE else _WATCHED_FLAGS), *_includes())


def _includes() -> tuple[str, ...]:
    return ("-DFASTSD_HOST", *(f"-I{folder}" for folder in (HARNESS, CUDA_SOURCES, _cuda_headers())))


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
