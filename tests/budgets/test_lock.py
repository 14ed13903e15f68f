"""The lock: what needs no compiler, what does, and what it says where it is out of date."""

import importlib.util
import textwrap
from dataclasses import replace

import pytest
import torch

from fastsd_kernels import cuda_runtime
from fastsd_kernels.triton_runtime import INTERPRETED, Launch
from tests import artefacts
from tests.budgets import lock
from tests.budgets.cubin import INSTRUCTIONS, TENSOR_CORES, KernelResources
from tests.budgets.gates import Gate, GateViolation
from tests.budgets.lock import Entry, Lock, toolchain
from tests.budgets.units import Compiled, Cuda, Unit

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")

CUDA = """
#include "helper.cuh"

extern "C" __global__ void half_of(float* x) {
#ifdef TWICE
    x[0] = half_of(x[0]);
#endif
    x[threadIdx.x] = half_of(x[threadIdx.x]);
}
"""
HELPER = "__device__ inline float half_of(float x) { return x / 2; }\n"
TRITON = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)

@triton.jit
def times(x):
    return x * FACTOR

@triton.jit
def total(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(y_ptr, tl.sum(times(x)))
"""
FOUND = KernelResources(40, 0, 128, dict.fromkeys(INSTRUCTIONS, 0) | {TENSOR_CORES: 3}, 4096)


class Sourceless(Unit):
    """It has a digest, and whoever compiles it fails."""

    backend = "none"

    def __init__(self, text="a kernel"):
        self.text = text

    def sees(self, target):
        return (self.text,)


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """The digest of a source."""

    def digest(text=CUDA, helper=HELPER, defines=(), target="sm_80"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "half.cu").write_text(text)
        (folder / "helper.cuh").write_text(helper)
        monkeypatch.setattr(cuda_runtime, "_source_folder", lambda: folder)
        return Cuda("half.cu", defines).digest(target)

    return digest


@pytest.fixture
def triton(tmp_path):
    """The unit of a source."""

    def unit(text=TRITON, size=1024, dtype=torch.float32, num_warps=4):
        path = tmp_path / f"kernels_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(textwrap.dedent(text))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x = torch.empty(size, device="meta", dtype=dtype)
        return triton_aot.Triton(Launch(module.total, (1,), (x, x, size), num_warps))

    return unit


@pytest.fixture
def locked(monkeypatch):
    """Puts kernels in the lock."""

    def put(*gates, found=FOUND, by=None):
        entries = {gate.label(target): Entry(gate.key(target), found) for gate in gates for target in gate.targets}
        the_lock = Lock(by or toolchain(), entries)
        monkeypatch.setattr(lock, "read", lambda: the_lock)
        return the_lock

    return put


def gate(unit=None, **given):
    return Gate(**{"op": "an_op", "unit": unit or Sourceless(), "kernel": "total", "variant": "plain"} | given)


def missing_compiler(gate):
    with pytest.raises(NotImplementedError):
        gate.check("sm_80")


LIMITS = {"registers": 40, "static_shared_bytes": 128, "dynamic_shared_bytes": 4096}


def test_a_locked_kernel_needs_no_compiler(locked):
    locked(gate())
    for target in ("sm_80", "sm_90a", "sm_100a"):
        gate(**LIMITS, required=(TENSOR_CORES,)).check(target)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"registers": 39}, "40 registers, at most 39 allowed"),
        ({"static_shared_bytes": 127}, "128 bytes of static shared memory, at most 127 allowed"),
        ({"dynamic_shared_bytes": 4095}, "4096 bytes of dynamic shared memory, at most 4095 allowed"),
        ({"forbidden": (TENSOR_CORES,)}, "3 tensor cores instructions, none allowed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_lowered_limit_is_caught_by_the_lock_alone(locked, limits, words):
    locked(gate())
    with pytest.raises(GateViolation, match=words):
        gate(**LIMITS | limits).check("sm_80")


def test_what_the_lock_lacks_is_compiled_and_said(locked):
    locked(gate())
    for other in (gate(Sourceless("another kernel")), gate(kernel="another")):
        with pytest.warns(UserWarning, match=r"lock\.json lacks .*python -m tests\.budgets\.lock"):
            missing_compiler(other)


def test_other_compilers_are_named(locked):
    by_others = locked(gate(), by=["NVRTC 1.0"])
    with pytest.warns(UserWarning, match=r"lock\.json is by NVRTC 1\.0; .* by NVRTC \d+\.\d+, Triton .*, ptxas"):
        missing_compiler(gate(Sourceless("another kernel")))
    with pytest.warns(UserWarning, match="is by NVRTC"):
        assert by_others.difference(gate(), "sm_80", replace(FOUND, registers=41)) is None


def test_the_key_of_cuda_is_what_its_compiler_sees(cuda):
    same = {
        cuda(),
        cuda("// a comment\n" + CUDA),
        cuda(CUDA.replace("    x[threadIdx.x]", "\n    /* a\n       comment */ x[threadIdx.x]")),
        cuda(helper=HELPER + "// a comment\n"),
        cuda(helper=HELPER + "#ifdef FASTSD_HOST\nvoid on_the_host();\n#endif\n"),
    }
    assert len(same) == 1
    others = [
        cuda(CUDA.replace("x[0]", "x[1]"), defines=("TWICE",)),
        cuda(helper=HELPER.replace("/ 2", "* 0.5f")),
        cuda(helper=HELPER + "#if __CUDA_ARCH__ >= 800\n__device__ void on_ampere();\n#endif\n"),
        cuda(defines=("TWICE",)),
        cuda(defines=("UNUSED",)),
        cuda(target="sm_90a"),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_the_key_of_triton_is_what_its_compiler_sees(triton):
    same = {
        triton().digest("sm_80"),
        triton(TRITON.replace("    x = ", "    # a comment\n    x = ")).digest("sm_80"),
        triton(TRITON.replace("    x = ", '    """What it does."""\n    x = ')).digest("sm_80"),
        triton(TRITON.replace("FACTOR =", "# a comment\n\nFACTOR =")).digest("sm_80"),
        triton(TRITON.replace("x * FACTOR", "x * FACTOR  # a comment")).digest("sm_80"),
    }
    assert len(same) == 1
    others = [
        triton(TRITON.replace("tl.sum", "tl.max")).digest("sm_80"),
        triton(TRITON.replace("x * FACTOR", "x + FACTOR")).digest("sm_80"),
        triton(TRITON.replace("2.0", "3.0")).digest("sm_80"),
        triton(size=2048).digest("sm_80"),
        triton(dtype=torch.float16).digest("sm_80"),
        triton(num_warps=8).digest("sm_80"),
        triton().digest("sm_90a"),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_a_changed_kernel_is_compiled_again(triton, locked, monkeypatch, tmp_path):
    monkeypatch.setattr(artefacts, "FOLDER", tmp_path / "store")
    unit = triton()
    found = gate(unit).read(unit.compile("sm_80"), "sm_80")
    # a sum over four warps goes through shared memory
    assert 0 < found.dynamic_shared_bytes < 1024
    locked(gate(unit), found=replace(found, registers=1))
    assert gate(triton(TRITON.replace("x * FACTOR", "x * FACTOR  # a comment"))).measure("sm_80").registers == 1
    assert not (tmp_path / "store").exists()
    with pytest.warns(UserWarning, match="lacks"):
        assert gate(triton(TRITON.replace("tl.sum", "tl.max"))).measure("sm_80").registers > 1
    assert gate(unit).measure("sm_80", anew=True) == found


def test_a_unit_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setattr(artefacts, "FOLDER", tmp_path)
    compilations = []

    class Counted(Sourceless):
        def compile(self, target):
            compilations.append((self.text, target))
            return Compiled(b"machine code", 7)

    for _ in range(2):
        assert Counted().compiled("sm_80") == Compiled(b"machine code", 7)
        Counted().compiled("sm_90a")
        Counted("another kernel").compiled("sm_80")
    assert compilations == [("a kernel", "sm_80"), ("a kernel", "sm_90a"), ("another kernel", "sm_80")]


def test_an_interpreted_kernel_is_refused():
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1 .* unset it"):
        triton_aot.Triton(Launch(object(), (1,), (), 4)).digest("sm_80")


def test_the_file_has_a_line_an_entry(locked):
    written = locked(gate(variant="2²"), gate(Sourceless("another"), variant="1"))
    lines = written.dump().splitlines()
    assert len(lines) == 2 + 1 + 6
    assert lines[2:-1] == sorted(lines[2:-1])
    assert '"an_op none-total-2² sm_80": {"key": "' in written.dump()
    assert '"registers": 40, "stack": 0, "static shared": 128, "dynamic shared": 4096, "tensor cores": 3}' in lines[2]
    assert lock.load(written.dump()) == written


def test_differences_name_the_command_that_mends_them(locked):
    written = locked(gate())
    assert written.difference(gate(), "sm_80", FOUND) is None
    for other, found, words in (
        (gate(variant="new"), FOUND, ("an_op none-total-new sm_80", "missing", "tests.budgets.lock`")),
        (gate(Sourceless("changed")), FOUND, ("of another source", "tests.budgets.lock`")),
        (gate(), replace(FOUND, registers=41), ("registers 40 → 41", "tests.budgets.lock --full`")),
        (gate(), replace(FOUND, instructions={}), ("tensor cores 3 → 0", "tests.budgets.lock --full`")),
    ):
        for word in words:
            assert word in written.difference(other, "sm_80", found)
    assert not written.stale([gate()])
    assert written.stale([gate(targets=("sm_80",))]) == [
        "an_op none-total-plain sm_100a",
        "an_op none-total-plain sm_90a",
    ]


def test_update_measures_what_is_lacking(locked, monkeypatch):
    measured = []
    after = replace(FOUND, registers=50)
    kept, moved, new = gate(), gate(variant="renamed"), gate(Sourceless("new"), variant="new", targets=("sm_80",))

    def measure(units, full):
        for unit in units:
            measured.extend(unit)
            yield {(kept, moved, new)[number].key(target): after for number, target in unit}

    monkeypatch.setattr(lock, "_measure", measure)
    before = locked(kept, gate(Sourceless("gone"), variant="gone", targets=("sm_80",)))
    updated = lock.updated(before, [kept, moved, new], full=False)
    assert measured == [(2, "sm_80")]
    assert {label: entry.found.registers for label, entry in updated.entries.items() if label.endswith("sm_80")} == {
        "an_op none-total-plain sm_80": 40,
        "an_op none-total-renamed sm_80": 40,
        "an_op none-total-new sm_80": 50,
    }
    assert lock.changes(before, updated) == [
        "an_op none-total-gone sm_80: gone",
        "an_op none-total-new sm_80: new",
        *(f"an_op none-total-renamed {target}: new" for target in ("sm_100a", "sm_80", "sm_90a")),
    ]
    measured.clear()
    full = lock.updated(before, [kept], full=True)
    assert measured == [(0, target) for target in kept.targets]
    assert "an_op none-total-plain sm_80: registers 40 → 50" in lock.changes(before, full)
