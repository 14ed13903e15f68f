"""The command ``fastsd``: info, explain, doctor, and how errors look."""

import argparse
import json

import pytest
import torch

from fastsd import models
from fastsd.cli import arguments, main, run_safely
from fastsd.cli.table import markdown_table, text_table
from fastsd_kernels.dispatch import BACKENDS, ops
from fastsd_kernels.group_norm_silu import cpu_impl, reference
from tests.processes import python


def printed_json(capsys, *given):
    status = main(given)
    return status, json.loads(capsys.readouterr().out)


def test_info_json(capsys):
    status, facts = printed_json(capsys, "info", "--json")
    assert status == 0
    assert list(facts) == ["versions", "devices", "ops", "cache"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu"
    assert list(facts["ops"]) == [op.name for op in ops()]
    for op in facts["ops"].values():
        assert list(op["backends"]) == list(BACKENDS)
        assert op["backends"]["reference"] is None
        assert op["order"]["cpu"][-1] == "reference"


def test_info_says_why_a_backend_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(cpu_impl, "unavailable", lambda: "no compiler was found")
    assert main(["info"]) == 0
    assert "no compiler was found" in capsys.readouterr().out


def test_explain(capsys):
    assert main(["explain", "tiny", "--device", "cpu", "--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    assert "ResnetBlock2D" in printed
    assert "conv2d [reference]" in printed


def test_explain_with_gri(capsys):
    assert main(["explain", "tiny", "--device", "cpu", "--gri", "4,2"]) == 0
    assert "replaced by gri_attention (approximate) → gri_attention [cpu]" in capsys.readouterr().out
    assert main(["explain", "tiny", "--gri", "4,2,7"]) == 2
    assert "got (7,)" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "recipe"), [("sd15", "a-sdm"), ("sd21", "bk-sdm-tiny"), ("sdxl", "vega")])
def test_explain_recipe(capsys, model, recipe):
    """Nothing of what a recipe leaves is left behind for want of a rule."""
    status, explained = printed_json(capsys, "explain", model, "--device", "cpu", "--recipe", recipe, "--json")
    entries = explained["parts"][0]["entries"]
    assert status == 0
    assert not [entry["path"] for entry in entries if entry["rule"] is not None and not entry["replaced"]]
    convolutions = {"Conv2d", "CondConv2d", "ResnetBlock2D", "SkippedResnet"}
    left = {entry["path"] for entry in entries if not entry["replaced"] and entry["class_name"] in convolutions}
    assert left == {"conv_in", "conv_out"}
    assert main(["explain", "tiny", "--recipe", recipe]) == 2
    assert f"recipe {recipe!r}: expected" in capsys.readouterr().err


def test_explain_json_of_a_folder(capsys, tmp_path):
    models.load("tiny").save_pretrained(tmp_path)
    status, explained = printed_json(capsys, "explain", str(tmp_path), "--device", "cpu", "--json")
    assert status == 0
    entries = explained["parts"][0]["entries"]
    # 8 residual blocks, 4 transformers with a feed-forward layer each, 2 up-blocks, 2 resamplings
    assert sum(entry["replaced"] for entry in entries) == 32


def test_doctor_finds_nothing_wrong(capsys):
    status, examined = printed_json(capsys, "doctor", "--device", "cpu", "--json")
    assert status == 0
    assert examined["healthy"]
    for finding in examined["findings"]:
        assert not finding["failures"]
        assert finding["passed"] > 0 or finding["unavailable"]
    found = {(finding["op"], finding["backend"]) for finding in examined["findings"]}
    assert found == {(op.name, backend) for op in ops() for backend in BACKENDS if backend != "reference"}


@pytest.fixture
def only_bfloat16(monkeypatch):
    monkeypatch.setattr(arguments, "DTYPES", {"bfloat16": torch.bfloat16})


def plant(monkeypatch, run):
    """Put ``run`` in the place of the CPU kernel, whether or not that was built."""
    monkeypatch.setattr(cpu_impl, "unavailable", lambda: None)
    monkeypatch.setattr(cpu_impl, "run", run)


@pytest.mark.usefixtures("only_bfloat16")
def test_doctor_finds_a_wrong_backend(capsys, monkeypatch):
    def slightly_wrong(x, *others):
        y = reference.run(x, *others)
        return y * 1.1 if x.shape[0] == 3 else y

    plant(monkeypatch, slightly_wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert all(" on cpu, cpu, bfloat16: " in line and "against float64" in line for line in failed)
    # one_pixel and no_space are the samples of batch 3, each in two layouts; resnet_block calls the op
    assert [line.split()[1] for line in failed] == ["group_norm_silu"] * 4 + ["resnet_block"] * 2
    assert "one_pixel_contiguous" in failed[0]
    assert "wrong on this machine" in printed


@pytest.mark.usefixtures("only_bfloat16")
def test_doctor_survives_a_backend_that_raises(capsys, monkeypatch):
    def broken(*arguments):
        raise IndexError("beyond\nthe end")

    plant(monkeypatch, broken)
    status, examined = printed_json(capsys, "doctor", "--device", "cpu", "--json")
    assert status == 1
    assert not examined["healthy"]
    (finding,) = (f for f in examined["findings"] if (f["op"], f["backend"]) == ("group_norm_silu", "cpu"))
    assert finding["passed"] == 0
    assert all("IndexError: beyond the end" in failure for failure in finding["failures"])


@pytest.mark.usefixtures("only_bfloat16")
def test_doctor_counts_refusals(capsys, monkeypatch):
    plant(monkeypatch, reference.run)
    monkeypatch.setattr(cpu_impl, "reject", lambda x, *others: "only batch 2" if x.shape[0] != 2 else None)
    status, examined = printed_json(capsys, "doctor", "--device", "cpu", "--json")
    assert status == 0
    (finding,) = (f for f in examined["findings"] if (f["op"], f["backend"]) == ("group_norm_silu", "cpu"))
    assert finding["refused"] > 0
    assert finding["passed"] > 0


def test_errors_of_several_lines_become_one(capsys):
    def refuse(options):
        raise OSError("no such file\n  in this folder")

    assert run_safely(argparse.Namespace(run=refuse), "fastsd") == 2
    assert capsys.readouterr().err == "fastsd: no such file in this folder\n"


def test_unknown_model_is_one_line(capsys):
    assert main(["explain", "sd99"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastsd: 'sd99' ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("doctor", "--device", "tpu"), "expected cpu, cuda or cuda:N; got 'tpu'"),
        (("doctor", "--device", "cuda:99"), "use --device cpu"),
        (("explain", "tiny", "--gri", "4"), "expected WINDOW,POOL such as 16,4; got '4'"),
        (("explain", "tiny", "--gri", "0,2"), "got '0,2' (window: expected an integer from 1 to 1048576; got 0)"),
        (("explain", "tiny", "--dtype", "float8"), "expected one of float32, float16, bfloat16; got 'float8'"),
    ],
)
def test_bad_arguments(given, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(given)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_module_can_be_run():
    assert "Traceback" not in python("-m", "fastsd.cli", "explain", "sd99", status=2).stderr


def test_text_table():
    table = text_table(("name", "ms", "why"), [("a", "1.5", "one two three four five six"), ("bcd", "-", "")], width=34)
    assert table.splitlines() == [
        "name   ms  why",
        "────  ───  ───────────────────────",
        "a     1.5  one two three four five",
        "           six",
        "bcd     -",
    ]


def test_markdown_table():
    assert markdown_table(("a", "b"), [(1, "x|y")]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
