"""What every op launches, as a function of shapes: looked at without running anything."""

import pytest
import torch

from fastsd_kernels import triton_runtime
from fastsd_kernels.dispatch import ops
from tests.contract import covering
from tests.contract.patterns import patterns
from tests.runners import RUNNERS

OPS = pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
LAUNCHERS = pytest.mark.parametrize("runner", [RUNNERS["interpreter"], RUNNERS["host"]], ids=lambda runner: runner.name)

MAX_GRID = 2**31 - 1
MAX_THREADS = 1024
SHARED_BYTES = 99 * 1024  # of a block on the cards from compute capability 8.0 on that have least


def grid(launch) -> tuple[int, ...]:
    return launch["grid"] if isinstance(launch, dict) else launch.grid


@OPS
@LAUNCHERS
def test_large_batches_stay_on_the_one_long_grid_axis(op, runner):
    launches = [run for sample in op.cases.large_samples("cpu", torch.float16) for run in runner.launches(op, sample)]
    assert launches
    for programs, *others in map(grid, launches):
        assert 1 <= programs <= MAX_GRID
        assert set(others) <= {1}


@OPS
@LAUNCHERS
def test_nothing_is_launched_for_an_empty_result(op, runner):
    empty = [s for n, s in covering.samples(op, "cpu", torch.float16).items() if n.startswith("empty_batch")]
    assert empty
    for sample in empty:
        assert not runner.launches(op, sample)


@OPS
def test_blocks_of_whole_warps_in_the_shared_memory_of_any_card(op):
    runner = RUNNERS["host"]
    for name in covering.served(op, runner, torch.float16):
        for launch in runner.launches(op, covering.samples(op, "cpu", torch.float16)[name]):
            threads, *others = launch["block"]
            assert 0 < threads <= MAX_THREADS
            assert threads % 32 == 0
            assert set(others) == {1}
            assert 0 <= launch["shared_bytes"] <= SHARED_BYTES


@OPS
@LAUNCHERS
def test_launches_depend_on_the_call_alone(op, runner):
    def described(launch):
        if isinstance(launch, dict):
            return {key: value for key, value in launch.items() if key != "args"}, [type(arg) for arg in launch["args"]]
        return launch.kernel.__name__, launch.grid, launch.num_warps, [type(arg) for arg in launch.args]

    for name in patterns(op):
        if name in covering.served(op, runner, torch.float16):
            sample = covering.samples(op, "cpu", torch.float16)[name]
            first, second = ([described(launch) for launch in runner.launches(op, sample)] for _ in range(2))
            assert first == second


@OPS
def test_ahead_of_time_specialisation_is_tritons_own(op):
    """So that the kernels whose cubins are inspected are those that a launch would compile."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from tests.budgets import triton_aot

    runner, seen = RUNNERS["interpreter"], set()
    for name in patterns(op):
        if name not in covering.served(op, runner, torch.float16):
            continue
        for launch in runner.launches(op, covering.samples(op, "cpu", torch.float16)[name]):
            if not isinstance(launch, triton_runtime.Launch):
                continue
            ours = triton_aot.specialise(launch.kernel, launch.args)
            bind = create_function_from_signature(
                launch.kernel.signature, launch.kernel.params, make_backend(GPUTarget("cuda", 80, 32))
            )
            _, theirs, _ = bind(*launch.args)
            assert list(ours.signature.values()) == [kind for kind, _ in theirs]
            for argument, (kind, key) in zip(launch.kernel.arg_names, theirs, strict=True):
                if kind != "constexpr":
                    assert (argument in ours.divisible_by_16) == ("D" in (key or ""))
            seen.add(launch.kernel.__name__)
    assert seen
