"""The host harness: it computes what a card computes, and it catches the errors that it is there to catch."""

import re

import pytest
import torch

from tests.harness import host

# One process that forks for each write: torch takes long to import under AddressSanitizer.
PLANTED = """
import os, sys, torch
from tests.harness import host
probes = host.HostKernels("probes.cu")
for line in sys.argv[1:]:
    kernel, index, shared_bytes = line.split()
    child = os.fork()
    if child == 0:
        to = torch.zeros(8)
        args = [to, int(index), 1] if "shared" in kernel else [torch.zeros(8), to, int(index), 1]
        probes.launch(kernel, grid=(1, 1, 1), block=(1, 1, 1), shared_bytes=int(shared_bytes), args=args)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(line, "caught" if status else "finished", flush=True)
    print("end of", line, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def probes():
    return host.HostKernels("probes.cu")


def run(probes, kernel, *args, grid=1, block=32, shared_bytes=0, seed=0):
    probes.launch(kernel, grid=(grid, 1, 1), block=(block, 1, 1), shared_bytes=shared_bytes, args=args, seed=seed)


def test_indices(probes):
    grid, block = (3, 2, 2), (5, 4, 1)
    values = torch.full((12, 4, 5), torch.nan)
    probes.launch("indices", grid=grid, block=block, shared_bytes=0, args=[values])
    expected = (
        10000 * torch.arange(12.0)[:, None, None] + 100 * torch.arange(4.0)[:, None] + torch.arange(5.0)
    )  # fmt: skip
    assert torch.equal(values, expected)


def test_arguments(probes):
    x, y = torch.randn(100), torch.full((100,), torch.nan)
    run(probes, "scale", x, y, 100, 2.5, grid=4)
    assert torch.equal(y, x * 2.5)
    run(probes, "scale", None, y, 100, 2.5, grid=4)
    assert torch.equal(y, torch.full((100,), 2.5))


@pytest.mark.parametrize(
    ("kernel", "args", "error", "says"),
    [
        ("scale", [None, None, 1], TypeError, "expected 4 arguments; got 3"),
        ("scale", [1, None, 1, 1.0], TypeError, r"args\[0\]: expected a Tensor or None; got int"),
        ("scale", [None, None, 1.0, 1.0], TypeError, r"args\[2\]: expected an int; got float"),
        ("scale", [None, None, 1, 1], TypeError, r"args\[3\]: expected a float; got int"),
        ("nothing", [], ValueError, "no kernel nothing"),
    ],
)
def test_wrong_arguments(probes, kernel, args, error, says):
    with pytest.raises(error, match=says):
        run(probes, kernel, *args)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "says"),
    [
        ((0, 1, 1), (32, 1, 1), 0, "grid"),
        ((1, 65536, 1), (32, 1, 1), 0, "grid"),
        ((1, 1, 1), (1025, 1, 1), 0, "block"),
        ((1, 1, 1), (64, 32, 1), 0, "block"),
        ((1, 1, 1), (32, 1, 1), 228 * 1024, "shared_bytes"),
    ],
)
def test_launch_limits(probes, grid, block, shared_bytes, says):
    with pytest.raises(ValueError, match=says):
        probes.launch("barrier_for_some", grid=grid, block=block, shared_bytes=shared_bytes, args=[2000])


# kernel, arguments behind the tensors, threads of a block, blocks: the lines of the two accesses
RACES = {
    "no barrier": ("neighbour", [0], 64, 1, "neighbour.write", "neighbour.read"),
    "a barrier too early": ("neighbour", [2], 64, 1, "neighbour.write", "neighbour.read"),
    "no barrier of the warp": ("neighbour", [0], 32, 1, "neighbour.write", "neighbour.read"),
    "a barrier of the warp for the block": ("neighbour", [3], 64, 1, "neighbour.write", "neighbour.read"),
    "a barrier of half the warp": ("neighbour", [4], 32, 1, "neighbour.write", "neighbour.read"),
    "a shuffle for a barrier": ("neighbour", [5], 32, 1, "neighbour.write", "neighbour.read"),
    "a write over what others read": ("overwrite", [0], 64, 1, "overwrite.write", "overwrite.read"),
    "a write over what other lanes read": ("overwrite", [0], 32, 1, "overwrite.write", "overwrite.read"),
    "stores of 2 bytes": ("exchange_vectors", [1, 0], 32, 1, "exchange.write", "exchange.read"),
    "stores of 4 bytes": ("exchange_vectors", [2, 0], 32, 1, "exchange.write", "exchange.read"),
    "stores of 8 bytes": ("exchange_vectors", [4, 0], 32, 1, "exchange.write", "exchange.read"),
    "stores of 16 bytes": ("exchange_vectors", [8, 0], 32, 1, "exchange.write", "exchange.read"),
    "memcpy": ("exchange_block", [0], 64, 1, "block.write", "block.read"),
    "two blocks write a byte": ("blocks_meet", [1], 1, 3, "blocks.write", "blocks.write"),
    "a block reads another's byte": ("blocks_meet", [2], 1, 3, "blocks.write", "blocks.read"),
    "no wait": ("copies", [1], 32, 1, "copies.copy", "copies.read"),
    "a wait behind the barrier": ("copies", [2], 64, 1, "copies.copy", "copies.read"),
    "waits of all lanes behind the barrier": ("copies", [5], 32, 1, "copies.copy", "copies.read"),
    "a copy that its thread reads": ("copies", [3], 32, 1, "copies.copy", "copies.early_read"),
    "a write to what is copied": ("copies", [4], 32, 1, "copies.copy", "copies.write"),
    "a copy onto what others read": ("stages", [0], 64, 1, "stages.copy", "stages.read"),
    "a copy for other lanes": ("copy_for_the_warp", [0], 32, 1, "warp.copy", "warp.read"),
}
# the last of the arguments that makes it right
RIGHT = {
    "neighbour": ([1], 64),
    "neighbour of one warp": ([3], 32),
    "overwrite": ([1], 64),
    **{f"exchange_vectors of {width}": ([width, 1], 64) for width in (1, 2, 4, 8)},
    "exchange_block": ([1], 64),
    "blocks_meet": ([0], 1),
    "copies": ([0], 64),
    "stages": ([1], 64),
    "copy_for_the_warp": ([1], 32),
}
REPORT = re.compile(
    r"(?P<kernel>\w+), block \(\d, 0, 0\): race on bytes \d+ to \d+ of .*: "
    r"thread (?P<thread>\d+) (?:reads|writes) in probes\.cu:(?P<line>\d+); "
    r"(?:the asynchronous copy (?:to|from) there that )?thread (?P<other_thread>\d+)(?P<block> of block \d)? "
    r"(?:read|wrote|started) in probes\.cu:(?P<other_line>\d+)"
)


def meet(probes, kernel, args, block, grid, seed):
    tensors = [torch.ones(1024), torch.zeros(1024)] if kernel in ("copies", "stages", "copy_for_the_warp") else []
    dtype = {"exchange_vectors": torch.float16, "blocks_meet": torch.uint8}.get(kernel, torch.float32)
    tensors = tensors or [torch.zeros(1024, dtype=dtype)]
    run(probes, kernel, *tensors, *args, grid=grid, block=block, shared_bytes=4096, seed=seed)


def line_of(mark):
    lines = (host.HARNESS / "probes.cu").read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if text.endswith(f"// {mark}")]
    return line


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mistake", RACES)
def test_races_are_reported(probes, mistake, seed):
    kernel, args, block, grid, *marks = RACES[mistake]
    with pytest.raises(RuntimeError, match="race") as error:
        meet(probes, kernel, args, block, grid, seed)
    report = REPORT.match(str(error.value))
    assert report, str(error.value)
    assert report["kernel"] == kernel
    assert sorted([int(report["line"]), int(report["other_line"])]) == sorted(map(line_of, marks))
    # a thread can race with its own copy
    assert kernel == "copies" or report["thread"] != report["other_thread"] or report["block"]
    meet(probes, "neighbour", [1], 64, 1, seed)  # the harness is as new afterwards


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RIGHT)
def test_ordered_accesses_pass(probes, name, seed):
    args, block = RIGHT[name]
    meet(probes, name.split()[0], args, block, 3 if name == "blocks_meet" else 1, seed)


def test_seeds(probes):
    def report(seed):
        with pytest.raises(RuntimeError, match="race") as error:
            meet(probes, "blocks_meet", [1], 1, 8, seed)
        return str(error.value)

    assert "block (1, 0, 0)" in report(0)
    assert "thread 0 of block 0 wrote" in report(0)
    assert "block (6, 0, 0)" in report(1)
    assert "thread 0 of block 7 wrote" in report(1)
    assert [report(seed) for seed in range(2, 12)] == [report(seed) for seed in range(2, 12)]
    assert len({report(seed) for seed in range(2, 12)}) > 4


@pytest.mark.parametrize("write", [0, 1])
@pytest.mark.parametrize("index", [-1, 8])
@pytest.mark.parametrize("memory", ["global", "dynamic_shared", "static_shared"])
def test_accesses_out_of_bounds(probes, memory, index, write):
    def access(index):
        to, storage = torch.zeros(1), torch.ones(8)
        # a tensor's storage is all that is known: its other elements are in bounds
        args = [storage[2:3], to, index - 2, write] if memory == "global" else [to, index, write]
        run(probes, f"access_{memory}", *args, block=1, shared_bytes=32)

    access(0), access(7)
    mark = f"{memory.split('_')[0]}.{'write' if write else 'read'}"
    says = (
        rf"access_{memory}, block \(0, 0, 0\): thread 0 {mark.split('.')[1]}s 4 bytes outside every tensor and shared "
        rf"memory in probes\.cu:{line_of(mark)}: byte {4 * index} of .*, which has 32"
    )
    with pytest.raises(RuntimeError, match=says):
        access(index)


def test_constants_may_be_read(probes):
    to = torch.zeros(4)
    run(probes, "read_constants", to, 1, block=4)
    assert to.tolist() == [2, 4, 8, 1]


def test_barrier_that_some_threads_miss(probes):
    with pytest.raises(RuntimeError, match=r"barrier_for_some, block \(0, 0, 0\): .*thread 0-4 waits at __sync") as e:
        run(probes, "barrier_for_some", 5)
    assert "probes.cu:" in str(e.value)
    assert "thread 5-31 has finished" in str(e.value)
    run(probes, "barrier_for_some", 32)  # the harness is as new afterwards


def test_different_barriers(probes):
    with pytest.raises(RuntimeError, match=r"thread 0-6 waits at .*; thread 7-31 waits at"):
        run(probes, "different_barriers", 7)


def test_shuffle_that_some_lanes_miss(probes):
    with pytest.raises(RuntimeError, match=r"thread 0-29 waits in __shfl_xor_sync for the lanes 0xc0000000"):
        run(probes, "shuffle_for_some", torch.zeros(32), 30)


def test_shuffle_from_a_lane_outside_the_mask(probes):
    with pytest.raises(RuntimeError, match="__shfl_sync reads lane 20, which is not in the mask 0xffff"):
        run(probes, "shuffle_from_outside", torch.zeros(32))


@pytest.mark.parametrize("seed", range(5))
def test_shuffles(probes, seed):
    x = torch.randn(96)
    to = torch.full((8, 96), torch.nan)
    run(probes, "shuffles", x, to, block=96, seed=seed)
    thread = torch.arange(96)
    warp, lane = thread // 32 * 32, thread % 32
    sources = [
        warp + 5,
        warp + (lane ^ 3),
        warp + torch.where(lane + 4 < 32, lane + 4, lane),
        warp + torch.where(lane >= 4, lane - 4, lane),
        warp + lane // 8 * 8 + 2,
        warp + (lane ^ 8),
    ]
    for row, source in zip(to, sources, strict=False):
        assert torch.equal(row, x[source])
    assert torch.equal(to[6], (x > 0).float())
    assert torch.equal(to[7], torch.full((96,), 7.0))


@pytest.mark.parametrize("seed", range(5))
def test_reductions(probes, seed):
    x = torch.randn(96)
    to = torch.full((2, 96), torch.nan)
    run(probes, "reductions", x, to, block=96, shared_bytes=12, seed=seed)
    torch.testing.assert_close(to[0], x.view(3, 32).sum(1).repeat_interleave(32))
    torch.testing.assert_close(to[1], x.sum().expand(96))
    assert to[1].unique().numel() == 1


def test_silu(probes):
    x = torch.cat([torch.linspace(-87, 30, 250), torch.tensor([-0.0, -torch.inf, torch.inf, torch.nan, 1e30, -1e30])])
    to = torch.zeros(256)
    run(probes, "activations", x, to, block=256)
    torch.testing.assert_close(to, (x.double() / (1 + (-x.double()).exp())).float(), rtol=5e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", range(5))
def test_copies(probes, seed):
    x = torch.randn(2, 32, 4)
    to = torch.full_like(x, torch.nan)
    run(probes, "copies", x, to, 0, shared_bytes=1024, seed=seed)
    x[1, 1::2] = 0
    assert torch.equal(to, x)


@pytest.mark.parametrize("seed", range(5))
def test_stages(probes, seed):
    x = torch.randn(3, 64, 4)
    to = torch.full_like(x, torch.nan)
    run(probes, "stages", x, to, 1, block=64, shared_bytes=2048, seed=seed)
    assert torch.equal(to, x.roll(-32, 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_cores(probes, dtype, seed):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    product = torch.randn(16, 8)
    expected = torch.matmul(a.double(), b.double()) + product
    kernel = f"multiply_{dtype}".replace("torch.", "")
    run(probes, kernel, a, b, product, shared_bytes=2 * (16 * 16 + 16 * 8), seed=seed)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)


def test_shared_memory_is_poisoned_before_each_block(probes):
    for _ in range(2):
        to = torch.zeros(6)
        run(probes, "read_unwritten_shared", to, grid=3, block=1, shared_bytes=4)
        assert to.isnan().all()


def test_dynamic_shared_memory_that_was_not_asked_for(probes):
    with pytest.raises(RuntimeError, match="uses dynamic shared memory; the launch gave it none"):
        run(probes, "read_unwritten_shared", torch.zeros(2), block=1)


def test_misaligned_vector(probes):
    x, to = torch.randn(8), torch.zeros(4)
    run(probes, "load_misaligned", x, to, 4, block=1)
    assert torch.equal(to, x[4:])
    with pytest.raises(RuntimeError, match=r"thread 0: address .* is not aligned to 16 bytes"):
        run(probes, "load_misaligned", x, to, 1, block=1)


def test_sanitizer_catches_planted_writes():
    reports = {
        "access_global": (0, "heap-buffer-overflow"),
        "access_dynamic_shared": (32, "heap-buffer-overflow"),
        "access_static_shared": (0, "global-buffer-overflow"),
    }
    lines = [f"{kernel} {index} {shared}" for kernel, (shared, _) in reports.items() for index in (7, 8)]
    done = host.run_sanitized(PLANTED, *lines)
    assert done.returncode == 0, done.stderr
    expected = [f"{line} {outcome}" for line, outcome in zip(lines, ("finished", "caught") * 3, strict=True)]
    assert done.stdout.splitlines() == expected
    for line, (kernel, (_, report)) in zip(lines[1::2], reports.items(), strict=True):
        text = done.stderr[: done.stderr.index(f"end of {line}")]
        text = text[text.rindex("end of") :]
        assert f"AddressSanitizer: {report}" in text
        assert "WRITE of size 4" in text
        assert f"in {kernel}" in text


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    host._compiler.cache_clear()
    with pytest.raises(host.HarnessError, match=r"g\+\+ is needed"):
        host._compiler()


def test_compile_errors_are_shown():
    with pytest.raises(host.HarnessError, match="DTYPE"):
        host.HostKernels("group_norm_silu.cu")


def test_unknown_source():
    with pytest.raises(host.HarnessError, match=r"nothing\.cu is neither in"):
        host.HostKernels("nothing.cu")
