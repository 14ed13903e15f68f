"""``python -m bench op``: rows, traffic, and the numerical contract."""

import importlib
import json

import pytest
import torch

from bench import op as op_bench
from bench.__main__ import main
from bench.kernels import bench_cond_conv2d, bench_group_norm_silu
from bench.op import MOST_CALLS
from fastsd_kernels.dispatch import ops
from fastsd_kernels.group_norm_silu import cpu_impl, reference
from fastsd_kernels.testing import assert_contract
from tests.combinations import order

CASE = "1x1280x8x8 contiguous"


def bench(*arguments):
    return main(["op", "group_norm_silu", "--device", "cpu", "--repeats", "2", *arguments])


def test_result_file(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert bench("--cases", CASE, "--json", str(path)) == 0
    result = json.loads(path.read_text())
    assert list(result) == [
        *("op", "device", "cache", "copy_bytes_per_s", "peak_flops_per_s"),
        *("commit", "versions", "rows"),
    ]
    assert (result["op"], result["cache"]) == ("group_norm_silu", "warm")
    eager, fast = result["rows"]
    assert list(eager) == ["case", "provider", "dtype", "median_s", "bytes", "flops", "speedup"]
    assert (eager["provider"], fast["provider"]) == ("eager", "fastsd")
    assert (eager["case"], eager["dtype"], eager["speedup"]) == (CASE, "float32", 1.0)
    assert fast["speedup"] == pytest.approx(eager["median_s"] / fast["median_s"])
    # a map in, a map out, a weight and a bias
    assert fast["bytes"] == 4 * (2 * 1280 * 64 + 2 * 1280)
    assert fast["flops"] == 12 * 1280 * 64
    assert "GB/s" in capsys.readouterr().out


@pytest.mark.usefixtures("known_ceilings")
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_cold_calls_have_arguments_of_their_own(cache, tmp_path, monkeypatch):
    seen = set()
    function = bench_group_norm_silu.eager
    monkeypatch.setattr(
        bench_group_norm_silu,
        "eager",
        lambda x, *rest, **kwargs: seen.add(x.data_ptr()) or function(x, *rest, **kwargs),
    )
    path = tmp_path / "result.json"
    assert bench("--cases", CASE, "--cache", cache, "--json", str(path)) == 0
    assert json.loads(path.read_text())["cache"] == cache
    assert len(seen) == (1 if cache == "warm" else 1 + MOST_CALLS)  # the sample itself, and its copies


def test_a_cold_clock_flushes_before_each_run(monkeypatch):
    log = []
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: log.append("flush"))
    for cold, expected in ((True, ["flush", "run"]), (False, ["run"])):
        clock = op_bench._clock(torch.device("cpu"), cold)
        log.clear()
        clock(lambda: log.append("run"))
        assert log == expected


@pytest.mark.usefixtures("known_ceilings")
def test_result_outside_the_contract_is_not_timed(tmp_path, capsys, monkeypatch):
    right = reference.run
    monkeypatch.setenv("FASTSD_BACKEND", "reference")
    calls = iter([right])  # the first call is the op's, the later ones are the measure
    monkeypatch.setattr(reference, "run", lambda *arguments: right(*arguments) * (1.01 if next(calls, None) else 1.0))
    path = tmp_path / "result.json"
    assert bench("--cases", CASE, "--json", str(path)) == 1
    assert f"fastsd is outside the numerical contract on {CASE}" in capsys.readouterr().err
    assert [row["provider"] for row in json.loads(path.read_text())["rows"]] == ["eager"]


@pytest.mark.usefixtures("known_ceilings")
def test_a_backend_that_fails_leaves_eager(capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of order")

    monkeypatch.setenv("FASTSD_BACKEND", "reference")
    monkeypatch.setattr(reference, "run", broken)
    assert bench("--cases", CASE) == 1
    captured = capsys.readouterr()
    assert f"fastsd failed on {CASE}: out of order" in captured.err
    assert "eager" in captured.out


@pytest.mark.usefixtures("known_ceilings")
def test_a_case_that_is_not_served_is_said(capsys, monkeypatch):
    monkeypatch.setenv("FASTSD_BACKEND", "cpu")
    monkeypatch.setattr(cpu_impl, "unavailable", lambda: None)
    monkeypatch.setattr(cpu_impl, "reject", lambda *arguments: "not this one")
    assert bench("--cases", CASE) == 0
    assert f"{CASE}: group_norm_silu: backend 'cpu' cannot be used: not this one" in capsys.readouterr().err


def test_unknown_case(capsys):
    assert bench("--cases", "7x7") == 2
    assert "7x7" in capsys.readouterr().err


@pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)
def test_eager_is_the_function_of_the_op(op, monkeypatch, request):
    # the smallest of its own takes ten seconds in float64
    monkeypatch.setattr(bench_cond_conv2d, "CASES", {"2x32x8x8 e3": bench_cond_conv2d.Case(2, 32, 8, 3)})
    file = importlib.import_module(f"bench.kernels.bench_{op.name}")
    public = getattr(importlib.import_module("fastsd_kernels"), op.name)
    kinds = {}
    for name in file.CASES:
        kwargs = file.sample(name, torch.device("meta"), torch.float32).kwargs
        size = max(value.numel() for value in kwargs.values() if isinstance(value, torch.Tensor))
        kind = tuple(value is None for value in kwargs.values())
        kinds[kind] = min(kinds.get(kind, (size, name)), (size, name))
    smallest = list(kinds.values())  # the smallest case of every set of optional arguments
    if not request.config.getoption("--full"):
        smallest = [smallest[order(op.name) % len(smallest)]]
    for _, name in smallest:
        sample = file.sample(name, torch.device("cpu"), torch.float32)
        plain = public(**sample.kwargs, backend="reference")
        exact = public(**sample.map_tensors(torch.Tensor.double).kwargs, backend="reference")
        # where eager is another function, there are others that are the op's
        others = file.others(torch.device("cpu")).values() if hasattr(file, "others") else [file.eager]
        for function in others:
            assert_contract(function(**sample.kwargs), exact, plain, sample.relative_l2)
        assert op_bench.arithmetic(op, file, sample) > 0
