"""The CUDA sources of ``csrc/cuda``: compiled by NVRTC at first use, kept as cubins, launched on torch's stream.

Compiling needs no GPU and no CUDA toolkit, only the packages of ``fastsd[cuda]``. A source is named by its file in
``csrc/cuda``, a variant of it by macro definitions, ``"NAME=value"`` or ``"NAME"``. The sources need compute capability
8.0: asynchronous copies, and tensor cores that multiply bfloat16.
"""

import ctypes
import functools
import hashlib
import importlib
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import cubin_cache

# What sources call the element types that they take
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
VECTOR_BYTES = 16  # of the widest access
MAX_BLOCKS = 2**31 - 1  # of one launch, all in the grid's first dimension
OLDEST = (8, 0)  # compute capability

_INSTALL = "run `pip install 'fastsd[cuda]'`"
_STANDARD = "c++17"
_CRT_HEADER = "crt/host_defines.h"
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)
_DEFINE = re.compile(r"[A-Z][A-Z0-9_]{2,}(=.+)?")


@dataclass(frozen=True)
class Launch:
    """One kernel launch without its arguments."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@functools.cache
def unavailable() -> str | None:
    """Why CUDA kernels cannot run on this machine, or ``None``."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch"
    missing = _compiler_unavailable()
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    # the answer is that of the machine, whichever card a tensor is on
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST:
            return (
                f"cuda:{index} has compute capability {capability[0]}.{capability[1]}; the cuda backend needs "
                f"{OLDEST[0]}.{OLDEST[1]} of every card; use backend='triton', or hide this one by CUDA_VISIBLE_DEVICES"
            )
    return None


def compile_cubin(source: str, arch: str, defines: tuple[str, ...]) -> bytes:
    """Machine code for one architecture, compiled anew.

    Args:
        source: a file of ``csrc/cuda``, e.g. ``"group_norm_silu.cu"``.
        arch: ``"sm_80"``, ``"sm_90a"``, …
        defines: macros, e.g. ``("DTYPE=__half", "CHANNELS_LAST")``.

    Raises:
        RuntimeError: the compiler is missing, or the source does not compile; the message ends with NVRTC's log.
    """
    missing = _compiler_unavailable()
    if missing is not None:
        raise RuntimeError(f"{source} cannot be compiled: {missing}")
    _check_defines(defines)
    text = (_source_folder() / source).read_text()
    program, options = _cuda_core().Program, _options(source, arch, defines)
    try:
        return bytes(program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core's own types have no public name
        log = str(error).rstrip("\0\n ")
        raise RuntimeError(f"{source} does not compile for {' '.join((arch, *defines))}: {log}") from error


def _options(source: str, arch: str, defines: tuple[str, ...]) -> Any:
    return _cuda_core().ProgramOptions(
        name=source,
        arch=arch,
        std=_STANDARD,
        include_path=[str(folder) for folder in _include_path()],
        define_macro=[tuple(define.split("=", 1)) if "=" in define else define for define in defines] or None,
    )


def cubin(source: str, arch: str, defines: tuple[str, ...]) -> bytes:
    """As :func:`compile_cubin`, from the cache on disk where it holds this source, variant and compiler."""
    missing = _compiler_unavailable()
    if missing is not None:
        raise RuntimeError(f"{source} cannot be compiled: {missing}")
    key = _cache_key(source, arch, defines)
    return cubin_cache.load_or_build(key, lambda: compile_cubin(source, arch, defines))


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
) -> None:
    """Launch ``kernel`` on torch's current stream of ``device``; the caller's current device stays as it is.

    Args:
        source, defines: as for :func:`compile_cubin`; compiled and loaded once per process and device.
        kernel: the name of an ``extern "C" __global__`` function.
        grid: blocks, none of them 0. block: threads.
        shared_bytes: dynamic shared memory per block; may exceed 48 KiB where the card has more.
        args: what the function's parameters get: a tensor its address, ``None`` a null pointer, an int ``int64_t``,
            a float ``float``.

    Raises:
        RuntimeError: the kernel does not compile or load, or the driver refuses the launch; or it is launched for
            the first time, and so has to be loaded, while a CUDA graph is captured.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    loaded = _kernels.get((source, kernel, defines, index)) or _load_kernel(source, kernel, defines, index)
    parameters = _parameters(args)
    driver = _driver()
    # The primary context is pushed, rather than the device set: a thread that has made no CUDA call yet has no
    # context, and torch.cuda.device does not give it one when that device counts as current already.
    _check(driver.cuCtxPushCurrent(loaded.context))
    try:
        if shared_bytes > loaded.shared_limit:
            loaded.raise_shared_limit(shared_bytes)
        # torch.cuda.current_stream would build a Stream object for each launch. The driver's launch through
        # cuda.bindings takes plain tuples and has kept its form for years; cuda.core.launch wraps it in more objects.
        stream = torch._C._cuda_getCurrentRawStream(index)
        _check(driver.cuLaunchKernel(loaded.function, *grid, *block, shared_bytes, stream, parameters, 0))
    except RuntimeError as error:
        raise RuntimeError(
            f"{kernel} of {source} cannot be launched on cuda:{index} with grid {grid}, block {block} and "
            f"{shared_bytes} bytes of dynamic shared memory: {error}"
        ) from error
    finally:
        driver.cuCtxPopCurrent()


def of_one_dtype(*parameters: Tensor | None) -> list[Tensor | None]:
    """Contiguous parameters of one dtype that the kernels take: their own if they share one, else float32."""
    dtypes = {p.dtype for p in parameters if p is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= ELEMENTS.keys() else torch.float32
    return [None if p is None else p.to(dtype).contiguous() for p in parameters]


def alignment(*maps: Tensor | None) -> int:
    """The largest power of two, up to a vector's bytes, that every address is a multiple of."""
    return math.gcd(VECTOR_BYTES, *(m.data_ptr() for m in maps if m is not None))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _parameters(args: Sequence[int | float | Tensor | None]) -> tuple[tuple[Any, ...], tuple[type, ...]]:
    """Values and C types, as ``cuLaunchKernel`` takes them."""
    values: list[int | float] = []
    types: list[type] = []
    for position, arg in enumerate(args):
        if isinstance(arg, int):
            values.append(arg)
            types.append(ctypes.c_int64)
        elif isinstance(arg, float):
            values.append(arg)
            types.append(ctypes.c_float)
        elif arg is None:
            values.append(0)
            types.append(ctypes.c_void_p)
        elif isinstance(arg, Tensor):
            values.append(arg.data_ptr())
            types.append(ctypes.c_void_p)
        else:
            raise TypeError(f"args[{position}]: expected a Tensor, None, int or float; got {type(arg).__name__}")
    return tuple(values), tuple(types)


@dataclass
class _Kernel:
    """A kernel that is loaded on one device; handles of cuda.bindings."""

    context: Any
    function: Any
    shared_limit: int = 0  # bytes of dynamic shared memory that the driver allows for now

    def raise_shared_limit(self, shared_bytes: int) -> None:
        driver = _driver()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with _lock:
            if shared_bytes > self.shared_limit:
                _check(driver.cuFuncSetAttribute(self.function, attribute, shared_bytes))
                self.shared_limit = shared_bytes


_kernels: dict[tuple[str, str, tuple[str, ...], int], _Kernel] = {}
_modules: dict[tuple[str, tuple[str, ...], int], tuple[Any, Any]] = {}
_lock = threading.Lock()


def _forget_after_fork() -> None:
    """A child process has none of its parent's CUDA handles, and perhaps a lock that nobody will release."""
    global _lock
    _kernels.clear()
    _modules.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _load_kernel(source: str, kernel: str, defines: tuple[str, ...], index: int) -> _Kernel:
    with _lock:
        key = (source, kernel, defines, index)
        if key not in _kernels:
            with torch.cuda.device(index):
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"{kernel} of {source} is not loaded yet, which a CUDA graph cannot capture; "
                        "run the same call once before the capture"
                    )
            context, module = _load_module(source, defines, index)
            function = _check(_driver().cuModuleGetFunction(module, kernel.encode()))
            _kernels[key] = _Kernel(context, function)
        return _kernels[key]


def _load_module(source: str, defines: tuple[str, ...], index: int) -> tuple[Any, Any]:
    """The primary context of a device, and a source's variant loaded into it."""
    key = (source, defines, index)
    if key not in _modules:
        code = cubin(source, _arch(torch.cuda.get_device_capability(index)), defines)
        driver = _driver()
        _check(driver.cuInit(0))
        context = _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(index))))
        _check(driver.cuCtxPushCurrent(context))
        try:
            _modules[key] = context, _check(driver.cuModuleLoadData(code))
        finally:
            driver.cuCtxPopCurrent()
    return _modules[key]


def _arch(capability: tuple[int, int]) -> str:
    major, minor = capability
    # from Hopper on, "a" unlocks the instructions that only this very architecture has
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def _driver() -> ModuleType:
    return importlib.import_module("cuda.bindings.driver")


def _check(result: tuple[Any, ...]) -> Any:
    """The value that a driver call returned beside its status.

    Raises:
        RuntimeError: the call failed; the message is the driver's.
    """
    status = result[0]
    if status != 0:
        driver = _driver()
        name, text = (get(status)[1] or b"unknown" for get in (driver.cuGetErrorName, driver.cuGetErrorString))
        raise RuntimeError(f"{name.decode()}: {text.decode()}")
    return result[1] if len(result) > 1 else None


def _check_defines(defines: tuple[str, ...]) -> None:
    # definitions come before NVRTC's built-in headers, which are full of `template <typename T>`
    for define in defines:
        if not _DEFINE.fullmatch(define):
            raise ValueError(
                "defines: expected NAME or NAME=value with a name of three or more capitals (a shorter one, such as T, "
                f"breaks the templates in CUDA's headers); got {define!r}"
            )


def _cache_key(source: str, arch: str, defines: tuple[str, ...]) -> str:
    """A hash of all that the machine code depends on."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    key = hashlib.sha256(repr((version("fastsd"), nvrtc.nvrtcVersion()[1:], _STANDARD, arch, defines)).encode())
    for name, content in _texts(source):
        key.update(repr((name, hashlib.sha256(content).digest())).encode())
    return key.hexdigest()


def _texts(source: str) -> Iterator[tuple[str, bytes]]:
    """A source and all headers that it may include, by name; CUDA's headers too, which have their own version.

    Conditions around an ``#include`` are not evaluated: at worst a kernel is compiled once too often.
    """
    folders = _include_path()
    pending, seen = [source], {source}
    while pending:
        name = pending.pop()
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            continue  # NVRTC has it built in, or reports it missing
        content = path.read_bytes()
        yield name, content
        included = {match.decode() for match in _INCLUDE.findall(content)}
        pending += sorted(included - seen)
        seen |= included


def _source_folder() -> Path:
    return Path(str(files("fastsd_kernels.cuda_sources")))


def _include_path() -> list[Path]:
    return [_source_folder(), *_cuda_headers()]


@functools.cache
def _cuda_headers() -> tuple[Path, ...]:
    """The folders of CUDA's headers: of the pip packages, else of a conda or system toolkit (CUDA_HOME)."""
    find = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory
    runtime = find("cudart")
    if runtime is None:
        return ()
    if (Path(runtime) / _CRT_HEADER).is_file():
        return (Path(runtime),)
    # in CUDA 12's packages the headers under crt/ belong to nvcc
    compiler = find("nvcc")
    return (Path(runtime),) if compiler is None else (Path(runtime), Path(compiler))


def _cuda_core() -> ModuleType:
    core = importlib.import_module("cuda.core")
    # before version 0.5 its contents were in a package of their own
    return core if hasattr(core, "Program") else importlib.import_module("cuda.core.experimental")


@functools.cache
def _compiler_unavailable() -> str | None:
    """Why CUDA sources cannot be compiled here, or ``None``."""
    try:
        _cuda_core()
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        return f"cuda-core and cuda-python are needed and cannot be imported ({error}); {_INSTALL}"
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"NVRTC, CUDA's run-time compiler, is not found ({error}); {_INSTALL}"
    try:
        folders = _cuda_headers()
    except (ImportError, AttributeError):
        return "cuda-pathfinder is too old to find CUDA's headers; run `pip install --upgrade cuda-pathfinder`"
    for header in ("cuda_fp16.h", _CRT_HEADER):
        if not any((folder / header).is_file() for folder in folders):
            return f"CUDA's header {header} is not found; {_INSTALL}, or set CUDA_HOME to a CUDA toolkit"
    return None
