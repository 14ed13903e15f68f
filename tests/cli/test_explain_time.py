"""``fastsd explain --time``: the step that is timed is the one that always runs, and each second counts once."""

import json
import re
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastsd
from fastsd.cli import main
from fastsd.nn import text
from fastsd.patching import timing
from fastsd.patching.timing import NO_OP, time_step
from fastsd_kernels.dispatch import ops
from tests.combinations import each_value
from tests.patching.models import blocks, build, call, calls_of

PAUSE = 0.05


def step_of(model):
    """A call of ``model`` as it is timed; its results are kept in ``step.results``."""

    def step():
        with torch.no_grad():
            step.results.append(call(model))

    step.results = []
    return step


def pause(*_):
    time.sleep(PAUSE)


def row_of(timed, kind, replaced=True):
    (row,) = (row for row in timed.modules if (row.kind, row.replaced) == (kind, replaced))
    return row


@each_value("name,is_patched", ["unet", "linear_projections", "no_attention", "vae"], [True, False])
def test_everything_counts_once(name, is_patched):
    model = build(name)
    timed = time_step(fastsd.patch(model) if is_patched else model, step_of(model), repeats=2)
    for rows in (timed.modules, timed.ops):
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert sum(row.seconds for row in rows) == pytest.approx(timed.seconds)
        assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)
    known = {(rule.name, replaced) for rule in fastsd.registered_rules() for replaced in (True, False)}
    assert sum(row.modules for row in timed.modules) == 1 + len(fastsd.report(model).entries)
    assert all(row.replaced is is_patched for row in timed.modules if (row.kind, row.replaced) in known)
    assert (timed.replaced_share > 0.2) is is_patched
    assert (timed.fastsd_share > 0) is is_patched


@pytest.mark.parametrize(
    ("name", "gri"),
    [("unet", None), ("linear_projections", None), ("vae", None), ("unet", fastsd.GRI(4, 2))],
    ids=["unet", "linear_projections", "vae", "unet-gri"],
)
def test_the_same_ops_run_as_untimed(name, gri, monkeypatch):
    # what counts calls is a mode, under which no text is kept; a timed step is one of many with the same text
    monkeypatch.setattr(text, "_is_repeatable", lambda *args: False)
    model = fastsd.patch(build(name), gri=gri)
    step = step_of(model)
    untimed = {f"fastsd::{op.name}": calls_of(op.name, step) for op in ops()}
    timed = time_step(model, step, repeats=2)
    assert {row.op: row.calls for row in timed.ops if row.op.startswith("fastsd")} == {
        op: calls for op, calls in untimed.items() if calls
    }
    assert all(torch.equal(result, step.results[0]) for result in step.results)


def test_a_refused_block_is_not_covered():
    model = build()
    blocks(model)[0].norm1.register_forward_hook(pause)
    with pytest.warns(UserWarning, match="left 1 modules"):
        fastsd.patch(model)
    timed = time_step(model, step_of(model), repeats=1)
    refused, replaced = row_of(timed, "resnet_block", False), row_of(timed, "resnet_block")
    assert (refused.modules, refused.calls) == (1, 1)
    assert (replaced.modules, replaced.calls) == (7, 7)
    assert refused.seconds >= PAUSE
    assert timed.replaced_share == pytest.approx(1 - sum(row.share for row in timed.modules if not row.replaced))
    assert timed.replaced_share <= 1 - PAUSE / timed.seconds


def test_a_block_that_was_hooked_later_is_not_covered():
    model = fastsd.patch(build())
    blocks(model)[0].norm1.register_forward_hook(pause)
    timed = time_step(model, step_of(model), repeats=1)
    assert row_of(timed, "resnet_block", False).seconds >= PAUSE
    assert row_of(timed, "resnet_block").modules == 7


def test_time_belongs_to_the_innermost_module_that_is_called():
    """The block computes its attention without a call of that module, which is replaced as well."""
    model = fastsd.patch(build())
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.to_q.register_forward_hook(pause)
    timed = time_step(model, step_of(model), repeats=1)
    assert row_of(timed, "transformer_block").seconds >= PAUSE
    assert row_of(timed, "transformer_block").calls == 4
    assert (row_of(timed, "attention").modules, row_of(timed, "attention").calls) == (8, 0)
    attn.register_forward_hook(pause)
    timed = time_step(model, step_of(model), repeats=1)
    assert row_of(timed, "attention").seconds >= 2 * PAUSE
    assert row_of(timed, "attention").calls == 1


def test_the_op_has_what_its_backend_calls():
    model = fastsd.patch(build("no_attention"), backend="reference")
    timed = time_step(model, step_of(model), repeats=1)
    assert {"aten::native_group_norm", "aten::native_layer_norm"}.isdisjoint(row.op for row in timed.ops)
    assert not [row.op for row in timed.ops if row.op.startswith("fastsd_cpu::")]
    assert "fastsd::resnet_block" in {row.op for row in timed.ops}


@each_value("name,backend", ["unet", "no_attention"], [None, "reference"])
def test_flops_are_those_of_the_products_of_the_stock_model(name, backend):
    """Whatever runs: Winograd's algorithms have fewer."""
    model = build(name)
    with FlopCounterMode(display=False) as counter:
        step_of(model)()
    convolution = torch.ops.aten.convolution
    root = type(model).__name__
    everywhere, *of_the_root = (
        counter.get_flop_counts()[path][convolution] for path in ("Global", f"{root}.conv_in", f"{root}.conv_out")
    )
    timed = time_step(fastsd.patch(model, backend=backend), step_of(model), repeats=1)
    flops = {row.op: row.flops for row in timed.ops}
    assert sum(flops.get(f"fastsd::{op}") or 0 for op in ("resnet_block", "conv2d")) == everywhere - sum(of_the_root)
    assert all(count is None for op, count in flops.items() if not op.startswith("fastsd::"))
    assert flops.get("fastsd::group_norm_silu") is None


def test_the_median_run_is_given(monkeypatch):
    lengths = iter((3.0, 1.0, 2.0, 9.0))
    monkeypatch.setattr(timing, "_timed", lambda *_: SimpleNamespace(seconds=next(lengths)))
    assert time_step(build(), lambda: None, repeats=4).seconds == 2.0


def test_a_call_that_fails_ends_too():
    model = fastsd.patch(build())
    step = step_of(model)

    def stumbling():
        with suppress(TypeError):
            blocks(model)[0]()
        pause()
        step()

    timed = time_step(model, stumbling, repeats=1)
    assert (row_of(timed, "resnet_block").modules, row_of(timed, "resnet_block").calls) == (8, 9)
    assert row_of(timed, "UNet2DConditionModel", False).seconds >= PAUSE


def test_the_profile_of_others_is_put_back():
    def theirs(*_):
        pass

    def fail():
        if sys.getprofile() is not theirs:
            raise KeyError("in the run that is timed")

    before = sys.getprofile()
    sys.setprofile(theirs)
    try:
        with pytest.raises(KeyError, match="is timed"):
            time_step(build(), fail)
        assert sys.getprofile() is theirs
    finally:
        sys.setprofile(before)


def test_what_marks_a_range_on_a_card_is_no_kernel():
    kernels = [SimpleNamespace(name=name, duration=2.0) for name in ("fastsd.step", "fastsd.module.3", "conv2d_kernel")]
    assert timing._on_card(SimpleNamespace(kernels=kernels)) == pytest.approx(2e-6)


@pytest.mark.gpu
def test_on_a_card():
    model = fastsd.patch(build().cuda())
    timed = time_step(model, step_of(model), repeats=1)
    assert timed.device == "cuda:0"
    assert timed.fastsd_share > 0
    assert sum(row.share for row in timed.modules) == pytest.approx(1)
    # every kernel is launched by an op
    assert sum(row.seconds for row in timed.ops if row.op == NO_OP) == 0


def test_explain_time(capsys):
    assert main(["explain", "tiny", "--device", "cpu", "--time", "--repeats", "1"]) == 0
    report, summary, modules, op_rows = capsys.readouterr().out.split("\n\n")
    assert "ResnetBlock2D" in report
    assert summary.startswith("one step of UNet2DConditionModel on cpu: ")
    assert "inside replaced modules" in summary
    assert any(line.startswith("resnet_block ") and " replaced " in line for line in modules.splitlines())
    # what is small is summed up
    shares = [float(re.search(r"([\d.]+)%", line)[1]) for line in op_rows.splitlines()[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert " others " in op_rows


def test_explain_time_json(capsys):
    assert main(["explain", "tiny", "--device", "cpu", "--time", "--repeats", "1", "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert list(explained) == ["parts", "time"]
    timed = explained["time"]
    assert list(timed) == ["device", "seconds", "replaced_share", "fastsd_share", "modules", "ops"]
    assert {tuple(row) for row in timed["modules"]} == {("kind", "replaced", "modules", "calls", "seconds", "share")}
    assert {tuple(row) for row in timed["ops"]} == {("op", "calls", "seconds", "share", "flops")}
    assert 0 < timed["fastsd_share"] < timed["replaced_share"] < 1


def test_explain_without_time(capsys):
    assert main(["explain", "tiny", "--device", "cpu", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["parts"]


def test_explain_time_of_no_repeats(capsys):
    assert main(["explain", "tiny", "--device", "cpu", "--time", "--repeats", "0"]) == 2
    assert "repeats: expected at least 1; got 0" in capsys.readouterr().err
