"""gri_attention in Triton: interpreted on the CPU, compiled for cards that are not here, and run on one that is."""

import functools
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastsd_kernels import gri_attention
from fastsd_kernels.attention import triton_impl as attention_impl
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.gri_attention import cases, op, reference, triton_backward
from fastsd_kernels.testing import Sample, check_op, named
from fastsd_kernels.testing.contract import FLOOR_ULPS
from fastsd_kernels.testing.inputs import random_tensor
from tests.proving import interpreter

triton_impl = op.backends["triton"].module
# as a program it is its own child, which interprets the gradients
if __name__ != "__main__" and os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile; unset it", allow_module_level=True)
triton_aot = pytest.importorskip("tests.budgets.triton_aot", reason="Triton is not installed")


ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLES = [sample.name for sample in cases.samples("cpu", torch.float32)]
# These take the interpreter a minute in the steps that a card takes
MANY_KEYS = tuple(name for name in SAMPLES if name.startswith("many_keys"))
LARGE_TILES = {
    "attention.MOST_M": 512,
    "attention.MOST_N": 512,
    "attention.MOST_Q_ELEMENTS": 1 << 16,
    "attention.MOST_K_ELEMENTS": 1 << 16,
}

# With tiles this small a few hundred elements take the paths of large maps: several tiles of queries and of keys in
# each window, tiles of keys that are masked whole, cells added up in several steps
SMALL_TILES = {
    "attention.MOST_M": 32,
    "attention.MOST_N": 32,
    "attention.MOST_Q_ELEMENTS": 1,
    "attention.MOST_K_ELEMENTS": 1,
    "POOLED_ELEMENTS": 32,
}
SMALL_TILE_SAMPLES = (
    "packed",
    "width_40",
    "oblong_gated_masked",
    "pool_of_one_gated_masked",
    "one_cell_masked",
    "window_is_the_map",
    "only_cells",
    "only_regions",
    "ragged_agent",
    "large_scores",
    "nan_in_k",
    "inf_in_v",
)


def sample_launches(sample: Sample):
    """The launches of one call of the public function, its tensors on ``meta``."""
    given = {"interaction": "joint", "mask_own_window": False, "gate": None, "scale": None}
    given |= sample.map_tensors(lambda tensor: tensor.to("meta")).kwargs
    for name in ("window", "pool"):
        given[name] = (given[name],) * 2 if isinstance(given[name], int) else given[name]
    return [step for step in triton_impl.launches(**given)[1] if isinstance(step, triton_impl.Launch)]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype, name):
    if name in MANY_KEYS:
        results = interpreter.failures("gri_attention", dtype, names=MANY_KEYS, constants=tuple(LARGE_TILES.items()))
    else:
        others = tuple(name for name in SAMPLES if name not in MANY_KEYS)
        results = interpreter.failures("gri_attention", dtype, names=others)
    assert results[name] is None, results[name]


@pytest.mark.parametrize("name", SMALL_TILE_SAMPLES)
def test_interpreted_in_small_tiles(name):
    small = tuple(SMALL_TILES.items())
    results = interpreter.failures("gri_attention", "float32", names=SMALL_TILE_SAMPLES, constants=small, twice=True)
    assert results[name] is None, results[name]


def test_small_tiles_take_the_paths_of_large_maps(monkeypatch):
    for name, value in SMALL_TILES.items():
        owner, _, constant = name.rpartition(".")
        monkeypatch.setattr(attention_impl if owner else triton_impl, constant, value)
    monkeypatch.setattr(triton_impl, "tile", triton_impl.tile.__wrapped__)
    *_, pooling, attend = sample_launches(named(cases.samples("cpu", torch.float32), "one_cell_masked"))
    assert pooling.args[-1] < 30
    assert attend.args[-3:-1] == (16, 16)


def test_interpreter_refuses_bfloat16():
    failure = interpreter.failures("gri_attention", "bfloat16", names=("contiguous",))["contiguous"]
    for words in ("BackendUnavailable", "bfloat16", "TRITON_INTERPRET"):
        assert words in failure


def test_large_batches_stay_on_the_one_long_grid_axis():
    for sample in cases.large_samples("meta", torch.float16):
        for launch in sample_launches(sample):
            (programs,) = launch.grid
            assert 2 * 65_537 <= programs < 2**31


def test_nothing_is_copied_but_rows_of_scattered_elements():
    *_, attend = sample_launches(named(cases.samples("meta", torch.float16), "packed"))
    for x in attend.args[:3]:
        assert x.stride() == (8 * 8 * 3 * 2 * 8, 8, 3 * 2 * 8, 1)
    *_, attend = sample_launches(named(cases.samples("meta", torch.float16), "strided_width"))
    assert attend.args[0].is_contiguous()


def test_empty_results_need_no_launch():
    for name in ("empty_batch", "no_heads"):
        assert not sample_launches(named(cases.samples("cpu", torch.float32), name))


@pytest.mark.parametrize("name", ["contiguous", "oblong_gated_masked", "window_of_one", "one_column", "only_regions"])
def test_ahead_of_time_specialisation_is_tritons_own(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    for launch in sample_launches(named(cases.samples("cpu", torch.float16), name)):
        ours = triton_aot.specialise(launch.kernel, launch.args)
        bind = create_function_from_signature(
            launch.kernel.signature, launch.kernel.params, make_backend(GPUTarget("cuda", 80, 32))
        )
        _, theirs, _ = bind(*launch.args)
        assert list(ours.signature.values()) == [kind for kind, _ in theirs]
        for argument, (kind, key) in zip(launch.kernel.arg_names, theirs, strict=True):
            if kind != "constexpr":
                assert (argument in ours.divisible_by_16) == ("D" in (key or ""))


@pytest.mark.parametrize(
    ("shape", "grid", "window", "pool", "refused"),
    [
        ((1, 1, 2**31 - 1, 1), (1, 2**31 - 1), (1, 1), None, False),
        ((1, 1, 2**31, 1), (2**16, 2**15), (1, 1), None, True),
        ((2**27, 16, 1, 1), (1, 1), None, (1, 1), True),
        ((2**15, 1, 2**16, 1), (2**8, 2**8), (16, 16), (4, 4), False),
        ((2**15, 1, 2**16, 1), (2**8, 2**8), (16, 16), (1, 1), True),
        ((0, 1, 4, 1), (2, 2), (1, 1), None, False),
    ],
    ids=str,
)
def test_more_programs_than_a_launch_has_are_refused(shape, grid, window, pool, refused):
    q = torch.empty(shape, device="meta", dtype=torch.float16)
    given = (q, grid, window, pool, "joint", False, None, None)
    steps = [*triton_impl.launches(q, q, *given)[1], *triton_backward.steps(q, q, q, *given)[1]]
    most = max((step.grid[0] for step in steps if isinstance(step, triton_impl.Launch)), default=0)
    assert refused or most < 2**31
    with FakeTensorMode():
        q = torch.empty(shape, device="cuda", dtype=torch.float16)
        sentence = triton_impl.reject(q, q, q, grid, window, pool, "joint", False, None, None)
    assert (sentence is not None) == refused
    if refused:
        for word in ("q", str(2**31 - 1), str(2**31), "backend='reference'"):
            assert word in sentence


@pytest.mark.parametrize(
    ("dtype", "width", "gate", "words"),
    [
        (torch.float64, 8, None, ("q", "float16, bfloat16 or float32", "torch.float64", "backend='reference'")),
        (torch.float16, 8, torch.float8_e5m2, ("gate", "float64", "torch.float8_e5m2", "cast")),
        (torch.float16, 513, None, ("q", "512", "513", "backend='reference'")),
        (torch.float16, 8, None, ("q", "GPU", "cpu", "backend='cpu'")),
    ],
    ids=("float64", "float8_gate", "wide", "on_the_cpu"),
)
def test_refusals(dtype, width, gate, words):
    q = torch.ones(1, 2, 4, width, dtype=dtype)
    given = ("joint", False, None) if gate is None else ("gated", False, torch.ones(2).to(gate))
    sentence = triton_impl.reject(q, q, q, (2, 2), (1, 1), (1, 1), *given, None)
    for word in words:
        assert word in sentence


def test_forced_on_the_cpu():
    q = torch.ones(1, 2, 4, 8)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot be used: .*GPU.*backend='cpu'"):
        gri_attention(q, q, q, grid=(2, 2), window=1, pool=1, backend="triton")


def test_missing_triton_is_a_refusal():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from fastsd_kernels.gri_attention import op
        print(op.backends["triton"].reject(torch.ones(1, 2, 4, 8)))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)], capture_output=True, text=True, check=True
    )
    assert "pip install triton" in child.stdout


def device_samples(dtype: torch.dtype):
    """The samples of the contract, and maps of U-Nets."""
    like = {"device": "cuda", "dtype": dtype}
    yield from cases.samples("cuda", dtype)
    yield from cases.large_samples("cuda", dtype)
    for heads, width, side, window, pool in (
        (8, 40, 64, 16, 4),
        (8, 40, 72, 16, 8),
        (10, 64, 64, 8, 8),
        (8, 80, 32, 8, 4),
        (8, 160, 16, 8, 2),
        (1, 512, 32, 8, 4),
    ):
        q, k, v = cases.tokens(2, heads, side * side, width, "packed", **like)
        given = {"q": q, "k": k, "v": v, "grid": (side, side), "window": window, "pool": pool}
        gate = random_tensor((heads,), **like)
        name = f"{heads}x{width}_{side}_{window}_{pool}"
        yield Sample(name, given)
        yield Sample(f"{name}_masked", given | {"mask_own_window": True})
        yield Sample(f"{name}_gated", given | {"interaction": "gated", "gate": gate})
        yield Sample(f"{name}_agent", given | {"interaction": "agent"})


# With programs enough for one card each of these samples has a program for every tile of queries of its cells; with so
# few a program walks over several, and there are two parts, or one
FEW_PROGRAMS = 4
FEW_PROGRAMS_SAMPLES = ("packed", "oblong_gated_masked", "only_cells")
GRADIENT_SAMPLES = {
    "float32": (
        "three_heads",
        "width_40",
        "ragged_masked",
        "oblong_gated_masked",
        "one_cell_gated",
        "window_is_the_map_gated",
        "only_cells",
        "only_regions",
        "one_token",
        "large_scores",
        "gate_of_another_dtype",
        "empty_batch",
        "layouts_that_differ",
        "key_of_minus_infinity",
        *(f"{name}_in_few_programs" for name in FEW_PROGRAMS_SAMPLES),
    ),
    "float16": ("ragged_gated",),
}


def gradient_sample(name: str, dtype: torch.dtype) -> Sample:
    def drawn(name: str) -> Sample:
        return named(cases.samples("cpu", dtype), name)

    if name == "layouts_that_differ":
        layouts = {"q": "token_major", "k": "expanded_heads", "v": "strided_width"}
        return Sample(name, drawn("packed").kwargs | {x: drawn(layout).kwargs[x] for x, layout in layouts.items()})
    if name == "key_of_minus_infinity":
        # 9 queries in a tile of 16
        q, k, v = cases.tokens(1, 2, 9, 4, "contiguous", device="cpu", dtype=dtype)
        k[0, 1, 4] = -torch.inf
        return Sample(name, {"q": q.abs(), "k": k, "v": v, "grid": (3, 3), "window": (3, 3), "pool": None})
    return drawn(name.removesuffix("_in_few_programs"))


def gradient_failure(sample: Sample) -> str | None:
    """What is wrong with the gradients of one sample on the Triton backend: by the rule of the contract.

    Some of the gradients cancel to nothing, so the floor is that of the largest.
    """
    given = {"interaction": "joint", "mask_own_window": False, "gate": None, "scale": None} | sample.kwargs
    for name in ("window", "pool"):
        given[name] = (given[name],) * 2 if isinstance(given[name], int) else given[name]
    q, dtype = given["q"], given["q"].dtype
    upstream = random_tensor(tuple(q.shape), q.device, dtype, seed=5)
    if sample.name == "layouts_that_differ":
        upstream = upstream[:1, :1].expand(q.shape)  # of a loss that is a sum over samples and heads
    names = [name for name in ("q", "k", "v", "gate") if given[name] is not None]

    def of_reference(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = {name: given[name].to(dtype).detach().requires_grad_() for name in names}
        y = reference.gri_attention(**given | inputs)
        result = torch.autograd.grad(y, list(inputs.values()), upstream.to(dtype), allow_unused=True)
        # a window that is the map leaves the gate unused
        return [torch.zeros_like(given[n]) if g is None else g for n, g in zip(names, result, strict=True)]

    actual = [g for g in triton_backward.gradients(upstream, **given) if g is not None]
    again = [g for g in triton_backward.gradients(upstream, **given) if g is not None]
    exact, plain = of_reference(torch.float64), of_reference(dtype)
    largest = max((g[g.isfinite()].abs().max().item() for g in exact if g.numel()), default=0.0)
    floor = FLOOR_ULPS * torch.finfo(dtype).eps * largest
    for name, *gradients in zip(names, actual, again, exact, plain, strict=True):
        if gradients[0].shape != given[name].shape or gradients[0].dtype != given[name].dtype:
            return f"the gradient of {name} is {gradients[0].dtype} {tuple(gradients[0].shape)}"
        if not torch.equal(*(g.nan_to_num() for g in gradients[:2])):
            return f"two runs differ in the gradient of {name}"
        finite = gradients[2].isfinite()
        if not torch.equal(gradients[0].isfinite(), finite):
            return f"the gradient of {name} differs in being finite"
        if not finite.any():
            continue
        error, plain_error = ((g - gradients[2])[finite].abs().max().item() for g in (gradients[0], gradients[3]))
        if not error <= 2 * plain_error + floor:
            return f"{name}: error {error:.3e}; plain PyTorch {plain_error:.3e}, allowed {2 * plain_error + floor:.3e}"
    return None


@functools.cache
def interpreted_gradient_failures(dtype: str) -> dict[str, str | None]:
    child = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_gri_attention_triton", dtype],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize(
    ("dtype", "name"), [(dtype, name) for dtype, names in GRADIENT_SAMPLES.items() for name in names]
)
def test_interpreted_gradient(dtype, name):
    failure = interpreted_gradient_failures(dtype)[name]
    assert failure is None, failure


def test_the_op_takes_this_gradient():
    """Where Triton serves; not for "agent", for rows too wide, nor for a gradient that is itself differentiated."""
    program = """
        import json, torch
        from fastsd_kernels import gri_attention
        from fastsd_kernels.gri_attention import reference, triton_backward
        calls, fused = [], triton_backward.gradients
        triton_backward.gradients = lambda *args: calls.append(1) or fused(*args)
        found = []
        for interaction, twice, width in (
            ("gated", False, 4), ("agent", False, 4), ("joint", True, 4), ("joint", False, 257)
        ):
            q, k, v = (torch.randn(1, 1, 6, width, requires_grad=True) for _ in range(3))
            gate = torch.randn(1, requires_grad=True) if interaction == "gated" else None
            wanted = [x for x in (q, k, v, gate) if x is not None]
            y = gri_attention(q, k, v, grid=(2, 3), window=2, pool=2, interaction=interaction, gate=gate)
            actual = torch.autograd.grad(y.square().sum(), wanted, create_graph=twice)
            y = reference.gri_attention(q, k, v, (2, 3), (2, 2), (2, 2), interaction, False, gate, None)
            exact = torch.autograd.grad(y.square().sum(), wanted)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(actual, exact))
            found.append((len(calls), error))
        print(json.dumps(found))
    """
    child = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(program)],
        env=os.environ | {"TRITON_INTERPRET": "1", "FASTSD_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert [calls for calls, _ in found] == [1, 1, 1, 1]
    assert max(error for _, error in found) < 1e-5


def test_gradient_of_a_gate_on_the_largest_maps():
    """The statistics of the second softmax begin at twice ``plane``, which 32 bits may not hold."""
    q = torch.empty(1, 1, 2**30, 1, device="meta", dtype=torch.float16)
    given = ((2**15, 2**15), (8, 8), (8, 8), "gated", False, q.new_empty(1), None)
    for launch in triton_backward.steps(q, q, q, q, *given)[1]:
        if isinstance(launch, triton_impl.Launch) and launch.kernel.__name__ == "gradient":
            ttir = triton_aot.Triton(launch).ttir()
            assert re.search(r"%plane\b", ttir)
            assert not re.search(r"arith\.(muli|addi) .*%plane\b.* : i32", ttir)


@pytest.mark.parametrize(
    ("dtype", "width", "interaction", "words"),
    [
        (torch.float32, 256, "joint", None),
        (torch.float16, 512, "gated", None),
        (torch.float32, 257, "joint", ("q", "256", "257", "float32", "reference")),
        (torch.float32, 8, "agent", ("agent", "reference")),
    ],
    ids=str,
)
def test_refused_gradients(dtype, width, interaction, words):
    q = torch.empty(1, 1, 16, width, dtype=dtype, device="meta")
    given = (q, q, q, (4, 4), (2, 2), (2, 2), interaction, False, None if interaction != "gated" else q[0, 0, :1, 0])
    sentence = triton_backward.reject(*given, None)
    if words is None:
        assert sentence is None
        return
    for word in words:
        assert word in sentence
    with pytest.raises(NotImplementedError, match=re.escape(sentence)):
        triton_backward.gradients(q, *given, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_on_the_device(dtype):
    for sample in device_samples(dtype):
        q = sample.kwargs["q"]
        served = sample.kwargs.get("interaction") != "agent" and "nan" not in sample.name and "inf" not in sample.name
        served &= q.shape[3] * q.element_size() <= triton_backward.WIDEST_BYTES
        failure = gradient_failure(sample) if served else None
        assert failure is None, f"{sample}: {failure}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_device(dtype):
    for sample in device_samples(dtype):
        try:
            check_op(op, sample, "triton")
            first, second = (gri_attention(**sample.kwargs, backend="triton") for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except Exception as error:
            raise AssertionError(f"{sample}: {error}") from error


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    failures, programs = {}, triton_backward.FEWEST_PROGRAMS
    for name in GRADIENT_SAMPLES[sys.argv[1]]:
        triton_backward.FEWEST_PROGRAMS = FEW_PROGRAMS if name.endswith("_in_few_programs") else programs
        failures[name] = gradient_failure(gradient_sample(name, getattr(torch, sys.argv[1])))
    json.dump(failures, sys.stdout)
