"""Memory of large results on the CPU: kept, never shared while somebody looks, bounded, given back."""

import gc
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from fastsd_kernels import cpu_memory, linear

CPU = torch.device("cpu")
LARGE = (1024, 512)  # 2 MiB


def large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return cpu_memory.empty(LARGE, dtype=dtype, device=CPU)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    cpu_memory.release()
    yield
    cpu_memory.release()


def test_a_dead_result_gives_its_memory_to_the_next():
    x = large()
    address = x.data_ptr()
    assert cpu_memory.kept() == 0
    del x
    assert cpu_memory.kept() == 2 * 1024**2
    assert large().data_ptr() == address


def test_memory_that_somebody_looks_at_is_not_given_away():
    x = large()
    x.fill_(1.0)
    row, array = x[3], x.numpy()
    del x
    y = large().fill_(2.0)
    assert bool((row == 1.0).all())
    assert bool((array == 1.0).all())
    assert y.data_ptr() != array.ctypes.data
    del row
    assert cpu_memory.kept() == 0
    del array
    gc.collect()
    assert cpu_memory.kept() == 2 * 1024**2


def test_memory_is_poisoned_where_torchs_is():
    large().fill_(1.0)
    assert bool(large().isnan().all())
    torch.use_deterministic_algorithms(False)
    large().fill_(2.0)
    assert bool((large() == 2.0).all())


def test_small_results_are_torchs():
    x = cpu_memory.empty((4, 4), dtype=torch.float32, device=CPU)
    x.untyped_storage().resize_(128)  # what a borrowed block would refuse
    del x
    assert cpu_memory.kept() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "layout"), [((2, 64, 128, 96), (0, 2, 3, 1)), ((1, 8, 4096, 40), (0, 2, 1, 3))])
def test_strides_are_those_of_torch(shape, layout, dtype):
    x = cpu_memory.empty_permuted(shape, layout, dtype=dtype, device=CPU)
    expected = torch.empty_permuted(shape, layout, dtype=dtype)
    assert (x.shape, x.stride(), x.dtype) == (expected.shape, expected.stride(), dtype)
    assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert not x._is_view()
    x.fill_(3.0)
    assert bool((x == 3.0).all())


def test_a_saved_result_is_as_large_as_itself():
    file = io.BytesIO()
    x = large().fill_(1.0)
    torch.save(x, file)
    assert 2 * 1024**2 <= file.tell() < 2 * 1024**2 + 4096
    file.seek(0)
    assert torch.equal(torch.load(file), x)


def test_what_is_kept_is_bounded_and_was_used_last():
    torch.use_deterministic_algorithms(False)  # or filling would touch all of it
    small, first, second, third, huge = (
        cpu_memory.empty((n, 1024**2), dtype=torch.int8, device=CPU) for n in (5, 200, 201, 202, 513)
    )
    del small, first, second
    assert cpu_memory.kept() == 406 * 1024**2
    del third
    assert cpu_memory.kept() == 403 * 1024**2  # those that were given back first are gone
    del huge
    assert cpu_memory.kept() == 403 * 1024**2


def test_release_leaves_what_is_in_use():
    x, y = large().fill_(1.0), large()
    del y
    cpu_memory.release()
    assert cpu_memory.kept() == 0
    assert bool((x == 1.0).all())


def test_no_python_runs_where_a_tensor_dies():
    """A signal's exception would be raised there, and swallowed."""
    x, calls = large(), []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del x
    finally:
        sys.setprofile(None)
    assert calls == []
    assert cpu_memory.kept() == 2 * 1024**2


def test_without_memory_torch_says_so():
    program = """
import resource, torch
from fastsd_kernels import cpu_memory
def take(n): return cpu_memory.empty((n, 1024**2), dtype=torch.int8, device=torch.device("cpu"))
x = take(300)
del x
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 1024**2,) * 2)
y = take(350)
assert cpu_memory.kept() == 0, "kept ones were given back to make room"
try:
    take(600)
except RuntimeError as error:
    assert "allocate" in str(error), error
else:
    raise AssertionError("600 MiB out of 450")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_threads_never_share_a_block():
    wrong = []

    def work(mark: float) -> None:
        for _ in range(200):
            x = large().fill_(mark)
            if not bool((x == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_write_into_results():
    x = large().fill_(1.0)
    child = os.fork()
    if child == 0:
        x.numpy()[:] = 2.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((x == 1.0).all())


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert large().device == CPU


def test_an_op_leaves_earlier_results_alone():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2048, 64), torch.randn(256, 64)
    first = linear(x, weight, backend="cpu")
    copy = first.clone()
    second = linear(2 * x, weight, backend="cpu")
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, copy)
    address = first.data_ptr()
    del first
    assert linear(x, weight, backend="cpu").data_ptr() == address
