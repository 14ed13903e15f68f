"""The CUDA runtime: compiling, the cache key, and what reaches the driver at a launch.

No card is needed: the driver is replaced by a recorder, everything else is real.
"""

import ctypes
import os
import re
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastsd_kernels import cuda_runtime

SOURCE = """
#include "scale.cuh"
extern "C" __global__ void scale(const DTYPE* x, DTYPE* y, long long n, float factor) {
    if (threadIdx.x < n) y[threadIdx.x] = multiply(x[threadIdx.x], factor);
}
extern "C" __global__ void nothing() {}
"""
HEADER = """
#include <cuda_fp16.h>
__device__ inline DTYPE multiply(DTYPE x, float factor) { return DTYPE(float(x) * factor); }
"""
HALF = ("DTYPE=__half",)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A source folder of the test's own, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "scale.cu").write_text(SOURCE)
    (folder / "scale.cuh").write_text(HEADER)
    monkeypatch.setattr(cuda_runtime, "_source_folder", lambda: folder)
    monkeypatch.setenv("FASTSD_CACHE_DIR", str(tmp_path / "cache"))
    return folder


class Driver:
    """Stands in for ``cuda.bindings.driver``: writes down each call; thread-wise stacks of current contexts."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="max dynamic shared")

    def __init__(self):
        self.calls = []
        self.failing = {}
        self._stacks = threading.local()

    @property
    def stack(self):
        if not hasattr(self._stacks, "contexts"):
            self._stacks.contexts = []
        return self._stacks.contexts

    def named(self, name):
        return [args for called, *args in self.calls if called == name]

    def _record(self, name, args, *values):
        self.calls.append((name, *args))
        return (self.failing.get(name, 0), *values)

    def cuInit(self, flags):
        return self._record("cuInit", (flags,))

    def cuDeviceGet(self, index):
        return self._record("cuDeviceGet", (index,), f"device {index}")

    def cuDevicePrimaryCtxRetain(self, device):
        return self._record("cuDevicePrimaryCtxRetain", (device,), f"context of {device}")

    def cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.stack.pop()

    def cuModuleLoadData(self, code):
        return self._record("cuModuleLoadData", (code, self.stack[-1]), ("module", self.stack[-1]))

    def cuModuleGetFunction(self, module, name):
        return self._record("cuModuleGetFunction", (module, name), (*module, name))

    def cuFuncSetAttribute(self, *args):
        return self._record("cuFuncSetAttribute", args)

    def cuLaunchKernel(self, *args):
        return self._record("cuLaunchKernel", (*args, self.stack[-1]))

    def cuGetErrorName(self, status):
        return 0, b"CUDA_ERROR_PLANTED"

    def cuGetErrorString(self, status):
        return 0, b"the planted error"


@pytest.fixture
def driver(sources, monkeypatch):
    """Two cards of compute capability 8.0 and 9.0, the first one current; streams 1000 and 1001."""

    @contextmanager
    def device(index):
        yield

    recorder = Driver()
    monkeypatch.setattr(cuda_runtime, "_driver", lambda: recorder)
    monkeypatch.setattr(cuda_runtime, "_kernels", {})
    monkeypatch.setattr(cuda_runtime, "_modules", {})
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (9, 0))[index])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    return recorder


def launch(kernel="scale", device="cuda:0", args=(), **changes):
    given = {"grid": (3, 2, 1), "block": (128, 1, 1), "shared_bytes": 0} | changes
    cuda_runtime.launch("scale.cu", kernel, HALF, device=torch.device(device), args=args, **given)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_compile(sources, arch):
    code = cuda_runtime.compile_cubin("scale.cu", arch, HALF)
    assert code.startswith(b"\x7fELF")
    assert b"scale" in code
    assert b"nothing" in code


def test_defines_reach_the_source(sources):
    (sources / "flag.cu").write_text("#ifndef FLAG\n#error no flag\n#endif\n#if VALUE != 3\n#error no value\n#endif\n")
    cuda_runtime.compile_cubin("flag.cu", "sm_80", ("FLAG", "VALUE=3"))
    with pytest.raises(RuntimeError, match="no flag"):
        cuda_runtime.compile_cubin("flag.cu", "sm_80", ("VALUE=3",))
    with pytest.raises(RuntimeError, match="no value"):
        cuda_runtime.compile_cubin("flag.cu", "sm_80", ("FLAG", "VALUE=4"))

    (sources / "plain.cu").write_text('extern "C" __global__ void plain() {}')
    assert cuda_runtime.compile_cubin("plain.cu", "sm_80", ())


@pytest.mark.parametrize(
    ("arch", "defines", "says"),
    [
        ("sm_80", ("DTYPE=no_such_type",), ("for sm_80 DTYPE=no_such_type", "scale.cu(3)", "no_such_type")),
        ("sm_45", HALF, ("for sm_45 ", "gpu-architecture")),
    ],
    ids=("source", "architecture"),
)
def test_compile_error_names_source_variant_and_line(sources, arch, defines, says):
    with pytest.raises(RuntimeError, match=r"scale\.cu does not compile") as caught:
        cuda_runtime.compile_cubin("scale.cu", arch, defines)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize("define", ["T=float", "DTYPE=", "two words", "lower=1", ""])
def test_unsafe_define_is_refused(sources, define):
    with pytest.raises(ValueError, match="three or more capitals"):
        cuda_runtime.compile_cubin("scale.cu", "sm_80", (define,))


def test_shipped_sources_are_found():
    assert (cuda_runtime._source_folder() / "device.cuh").is_file()


def test_cubin_compiles_once(sources, monkeypatch):
    code = cuda_runtime.cubin("scale.cu", "sm_80", HALF)
    monkeypatch.setattr(cuda_runtime, "compile_cubin", None)
    assert cuda_runtime.cubin("scale.cu", "sm_80", HALF) == code


def test_key_changes_with_all_it_depends_on(sources, monkeypatch):
    from cuda.bindings import nvrtc

    def key(source="scale.cu", arch="sm_80", defines=HALF):
        return cuda_runtime._cache_key(source, arch, defines)

    before = key()
    assert key() == before
    assert key(arch="sm_90a") != before
    assert key(defines=("DTYPE=float",)) != before
    assert key(defines=(*HALF, "FLAG")) != before
    (sources / "copy.cu").write_text(SOURCE)
    assert key(source="copy.cu") != before

    (sources / "unrelated.cuh").write_text("// not included")
    assert key() == before
    (sources / "scale.cu").write_text(SOURCE + "// longer")
    assert key() != before
    (sources / "scale.cu").write_text(SOURCE)
    (sources / "scale.cuh").write_text(HEADER + "// longer")
    assert key() != before
    (sources / "scale.cuh").write_text(HEADER)
    assert key() == before

    (sources / "cuda_fp16.h").write_text("// takes the place of CUDA's header")
    assert key() != before
    (sources / "cuda_fp16.h").unlink()

    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 99, 0))
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(cuda_runtime, "_source_folder", lambda: sources)
    monkeypatch.setattr(cuda_runtime, "version", lambda package: "99.0")
    assert key() != before


def test_header_of_a_header_is_part_of_the_key(sources):
    (sources / "inner.cuh").write_text("// first")
    (sources / "scale.cuh").write_text(f'#  include "inner.cuh"\n{HEADER}')
    before = cuda_runtime._cache_key("scale.cu", "sm_80", HALF)
    (sources / "inner.cuh").write_text("// second")
    assert cuda_runtime._cache_key("scale.cu", "sm_80", HALF) != before


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_unavailable_without_cuda_build():
    assert "built without CUDA" in cuda_runtime.unavailable()


@pytest.mark.parametrize(
    ("capabilities", "says"),
    [
        (((8, 0), (12, 0)), None),
        (((7, 5),), "cuda:0 has compute capability 7.5; the cuda backend needs 8.0"),
        (((9, 0), (7, 5)), "cuda:1 has compute capability 7.5; .*CUDA_VISIBLE_DEVICES"),
    ],
    ids=str,
)
def test_unavailable_on_old_cards(monkeypatch, capabilities, says):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    sentence = cuda_runtime.unavailable.__wrapped__()
    assert sentence is None if says is None else re.match(says, sentence)


@pytest.mark.parametrize(
    ("module", "says"),
    [("cuda.core", "cuda-core"), ("cuda.bindings.nvrtc", "cuda-python"), ("cuda.pathfinder", "cuda-pathfinder")],
)
def test_missing_package_is_named(monkeypatch, module, says):
    def import_module(name):
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return real_import(name)

    real_import = cuda_runtime.importlib.import_module
    monkeypatch.setattr(cuda_runtime.importlib, "import_module", import_module)
    for name in ("_compiler_unavailable", "_cuda_headers"):
        monkeypatch.setattr(cuda_runtime, name, getattr(cuda_runtime, name).__wrapped__)
    with pytest.raises(RuntimeError, match=f"scale.cu cannot be compiled: .*{says}.*pip install"):
        cuda_runtime.compile_cubin("scale.cu", "sm_80", HALF)


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_runtime, "_cuda_headers", lambda: (tmp_path,))
    monkeypatch.setattr(cuda_runtime, "_compiler_unavailable", cuda_runtime._compiler_unavailable.__wrapped__)
    with pytest.raises(RuntimeError, match=r"cuda_fp16\.h is not found; run `pip install"):
        cuda_runtime.cubin("scale.cu", "sm_80", HALF)


def test_launch_passes_arguments_by_type(driver):
    x = torch.zeros(8)[3:]
    launch(args=[x, None, 2**40, -1, True, 0.5, 3.0])
    ((function, *shape, shared, stream, parameters, extra, context),) = driver.named("cuLaunchKernel")
    values, types = parameters
    assert values == (x.data_ptr(), 0, 2**40, -1, 1, 0.5, 3.0)
    assert types == (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_float] * 2)
    assert function == ("module", context, b"scale")
    assert (*shape, shared, stream, extra) == (3, 2, 1, 128, 1, 1, 0, 1000, 0)


def test_launch_refuses_other_types(driver):
    with pytest.raises(TypeError, match=r"args\[1\]: expected a Tensor, None, int or float; got str"):
        launch(args=[1, "two"])
    assert driver.named("cuLaunchKernel") == []


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_launch_on_the_other_device(driver, device, monkeypatch):
    """By its index, or as the current one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0 if device == "cuda:1" else 1)
    launch(device=device)
    ((*_, stream, _parameters, _extra, context),) = driver.named("cuLaunchKernel")
    assert context == "context of device 1"
    assert stream == 1001
    assert driver.stack == []
    ((code, _),) = driver.named("cuModuleLoadData")
    assert code == cuda_runtime.cubin("scale.cu", "sm_90a", HALF)


def test_each_kernel_is_loaded_once_per_device(driver):
    for _ in range(2):
        for device in ("cuda:0", "cuda:1"):
            for kernel in ("scale", "nothing"):
                launch(kernel, device)
    assert len(driver.named("cuLaunchKernel")) == 8
    assert [context for _, context in driver.named("cuModuleLoadData")] == [
        "context of device 0",
        "context of device 1",
    ]
    assert len(driver.named("cuModuleGetFunction")) == 4


def test_threads_load_once_and_have_the_context(driver):
    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [call[-1] for call in driver.named("cuLaunchKernel")] == ["context of device 0"] * 8
    assert len(driver.named("cuModuleLoadData")) == 1
    assert len(driver.named("cuModuleGetFunction")) == 1


def test_shared_memory_limit_is_raised_once(driver):
    # below 48 KiB too: static shared memory counts towards them
    sizes = [0, 40_000, 100_000, 60_000, 100_000, 200_000]
    for shared_bytes in sizes:
        launch(shared_bytes=shared_bytes)
    function = ("module", "context of device 0", b"scale")
    limits = [[function, "max dynamic shared", shared_bytes] for shared_bytes in (40_000, 100_000, 200_000)]
    assert driver.named("cuFuncSetAttribute") == limits
    assert [call[7] for call in driver.named("cuLaunchKernel")] == sizes
    order = [name for name, *_ in driver.calls if name in ("cuFuncSetAttribute", "cuLaunchKernel")]
    assert order[:3] == ["cuLaunchKernel", "cuFuncSetAttribute", "cuLaunchKernel"]


def test_shared_memory_limit_is_not_lowered_by_a_slower_thread(driver):
    launch(shared_bytes=100_000)
    (kernel,) = cuda_runtime._kernels.values()
    kernel.raise_shared_limit(60_000)
    assert len(driver.named("cuFuncSetAttribute")) == 1


@pytest.mark.parametrize("call", ["cuLaunchKernel", "cuFuncSetAttribute"])
def test_refused_launch_names_kernel_and_shape(driver, call):
    driver.failing[call] = 1
    with pytest.raises(RuntimeError) as caught:
        launch(shared_bytes=999_999, device="cuda:1")
    for words in ("scale of scale.cu", "cuda:1", "(3, 2, 1)", "(128, 1, 1)", "999999 bytes", "CUDA_ERROR_PLANTED"):
        assert words in str(caught.value)
    assert driver.stack == []
    driver.failing.clear()
    launch(shared_bytes=999_999, device="cuda:1")


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction"])
def test_failed_load_is_tried_again(driver, call):
    driver.failing[call] = 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_PLANTED: the planted error"):
        launch()
    assert driver.stack == []
    driver.failing.clear()
    launch()
    assert len(driver.named("cuLaunchKernel")) == 1


def test_first_launch_cannot_be_captured(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the same call once before the capture"):
        launch()
    assert driver.calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch()
    assert len(driver.named("cuLaunchKernel")) == 2


def test_forked_child_has_no_kernels(driver):
    launch()
    with cuda_runtime._lock:  # as if another thread were loading a kernel
        child = os.fork()
        if child == 0:
            forgotten = not cuda_runtime._kernels and not cuda_runtime._modules
            os._exit(0 if forgotten and cuda_runtime._lock.acquire(timeout=1) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert cuda_runtime._kernels
    assert cuda_runtime._modules


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120a")]
)
def test_arch_of_a_card(capability, arch):
    assert cuda_runtime._arch(capability) == arch


@pytest.mark.parametrize("name", [name for name in vars(Driver) if name.startswith("cu")])
def test_real_driver_has_the_functions_of_the_recorder(name):
    from cuda.bindings import driver

    assert callable(getattr(driver, name))
    assert hasattr(driver.CUfunction_attribute, "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES")


def test_real_driver_understands_the_parameters():
    """cuda.bindings converts the arguments before it calls the driver; a card is not needed for that."""
    from cuda.bindings import driver

    def call(parameters):
        return driver.cuLaunchKernel(driver.CUfunction(0), 1, 1, 1, 1, 1, 1, 0, 0, parameters, 0)

    with pytest.raises(TypeError):
        call(((1,), (str,)))
    parameters = cuda_runtime._parameters([torch.zeros(1), None, 1, True, 0.5])
    try:
        driver.cuInit(0)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="driver"):  # this machine has none
            call(parameters)
    else:
        (status,) = call(parameters)
        assert status != driver.CUresult.CUDA_SUCCESS == 0  # there is no such function
