"""The gates themselves: a kernel that is good passes, and each kind of bad kernel is caught and named."""

from functools import partial

import pytest

from fastsd_kernels import cuda_runtime
from tests.budgets import gates, lock
from tests.budgets.cubin import LOAD_16_BYTES, SPILL, STORE_16_BYTES, TENSOR_CORES, inspect
from tests.budgets.gates import Gate, GateViolation
from tests.budgets.lock import Lock, toolchain
from tests.budgets.targets import TARGETS
from tests.budgets.units import Cuda

pytestmark = pytest.mark.filterwarnings("ignore:lock.json lacks")

KERNELS = """
#include <mma.h>

extern "C" __global__ void copy_vectors(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }

extern "C" __global__ void copy_scalars(const float* x, float* y) { y[2 * threadIdx.x] = x[2 * threadIdx.x]; }

// 96 values that are all alive at once do not fit 32 registers
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const float* x, float* y) {
    float values[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = values[95 - i] * values[i];
}

extern "C" __global__ void static_shared(float* y) {
    __shared__ float values[96];
    values[threadIdx.x] = y[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = values[95 - threadIdx.x];
}

extern "C" __global__ void multiply_tiles(const __half* a, const __half* b, float* c) {
    namespace wmma = nvcuda::wmma;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::load_matrix_sync(left, a, 16);
    wmma::load_matrix_sync(right, b, 16);
    wmma::fill_fragment(sum, 0.0f);
    wmma::mma_sync(sum, left, right, sum);
    wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}
"""


@pytest.fixture(autouse=True)
def an_empty_lock(monkeypatch):
    empty = Lock(toolchain(), {})
    monkeypatch.setattr(lock, "read", lambda: empty)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "kernels.cu").write_text(KERNELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_runtime, "_source_folder", lambda: folder)
        yield Cuda("kernels.cu")


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def gate(planted):
    return partial(Gate, op="an_op", variant="plain", unit=planted, registers=128)


def assert_violates(gate, target, *says):
    with pytest.raises(GateViolation) as caught:
        gate.check(target)
    for words in (gate.kernel, target, *says):
        assert words in str(caught.value)


def test_good_kernels_pass(gate, target):
    gate(kernel="copy_vectors", required=(LOAD_16_BYTES, STORE_16_BYTES), forbidden=(SPILL, TENSOR_CORES)).check(target)
    gate(kernel="copy_scalars").check(target)
    gate(kernel="static_shared", static_shared_bytes=384).check(target)
    gate(kernel="multiply_tiles", required=(TENSOR_CORES,)).check(target)


def test_spill_is_caught(gate, target):
    assert_violates(gate(kernel="spill"), target, "bytes of stack, at most 0 allowed", "spill instructions, none")


def test_missing_vector_access_is_caught(gate, target):
    required = (LOAD_16_BYTES, STORE_16_BYTES)
    assert_violates(
        gate(kernel="copy_scalars", required=required), target, "no 16-byte load", "no 16-byte store", "at least 1"
    )


def test_missing_tensor_cores_are_caught(gate, target):
    assert_violates(gate(kernel="copy_vectors", required=(TENSOR_CORES,)), target, "no tensor cores instruction")


def test_forbidden_instruction_is_caught(gate, target):
    assert_violates(gate(kernel="multiply_tiles", forbidden=(TENSOR_CORES,)), target, "tensor cores instructions, none")


def test_registers_are_caught(gate, target):
    registers = gate(kernel="multiply_tiles").measure(target).registers
    gate(kernel="multiply_tiles", registers=registers).check(target)
    assert_violates(
        gate(kernel="multiply_tiles", registers=registers - 1),
        target,
        f"{registers} registers, at most {registers - 1} allowed",
    )


def test_static_shared_memory_is_caught(gate, target):
    assert_violates(
        gate(kernel="static_shared", static_shared_bytes=383),
        target,
        "384 bytes of static shared memory, at most 383 allowed",
    )


def test_missing_kernel_is_caught(gate, target):
    assert_violates(gate(kernel="copy"), target, "not in the cubin", "copy_vectors", "multiply_tiles")


def test_stack_may_be_allowed(gate, target):
    gate(kernel="spill", stack_bytes=None, forbidden=()).check(target)
    stack = gate(kernel="spill").measure(target).stack_bytes
    assert_violates(gate(kernel="spill", stack_bytes=stack - 1), target, f"{stack} bytes of stack, at most {stack - 1}")


def test_another_number_of_instructions_is_caught(gate, target):
    vectors = gate(kernel="copy_vectors")
    gate(kernel="copy_vectors", as_many=(LOAD_16_BYTES, vectors)).check(target)
    assert_violates(
        gate(kernel="copy_scalars", as_many=(LOAD_16_BYTES, vectors)),
        target,
        "0 16-byte load instructions, 1 as in cuda-copy_vectors-plain expected",
    )


def test_inspection_reads_each_kernel(planted, target):
    kernels = inspect(planted.compiled(target).cubin)
    assert sorted(kernels) == ["copy_scalars", "copy_vectors", "multiply_tiles", "spill", "static_shared"]
    assert kernels["static_shared"].static_shared_bytes == 384
    assert {kernel.static_shared_bytes for name, kernel in kernels.items() if name != "static_shared"} == {0}
    assert kernels["spill"].registers == 32
    assert kernels["spill"].stack_bytes > 0
    for access in (LOAD_16_BYTES, STORE_16_BYTES):
        assert (kernels["copy_vectors"].instructions[access], kernels["copy_scalars"].instructions[access]) == (1, 0)
    assert [name for name, kernel in kernels.items() if kernel.instructions[TENSOR_CORES]] == ["multiply_tiles"]


def test_what_is_no_cubin_is_refused():
    with pytest.raises(RuntimeError, match="cuobjdump"):
        inspect(b"not a cubin")


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    gates.cubin._newest_cuobjdump.cache_clear()
    with pytest.raises(RuntimeError, match="pip install triton"):
        inspect(b"")


def test_table_lists_and_judges_every_gate(gate, monkeypatch):
    ours = [gate(kernel="copy_vectors", required=(LOAD_16_BYTES,)), gate(kernel="spill")]
    monkeypatch.setattr(gates, "gates_of", lambda op: ours)
    lines, violations = gates.measure_all(["an_op"])
    assert len(lines) == 1 + len(ours) * len(TARGETS)
    for line, target in zip(lines[1:], TARGETS, strict=False):
        assert line.split()[:5] == ["an_op", "cuda", "copy_vectors", "plain", target]
        assert "1 16-byte load" in line
    assert len(violations) == len(TARGETS)
    assert all("spill" in violation for violation in violations)


def test_every_op_with_a_gate_file_is_found():
    assert "group_norm_silu" in gates.gated_ops()
