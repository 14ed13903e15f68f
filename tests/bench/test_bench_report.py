"""``python -m bench report``: every step within its time, and a summary that is whole after each."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import report
from bench.__main__ import main, parser
from bench.providers import check_providers
from fastsd_kernels.conv2d import measured


def test_steps_end_in_every_way(tmp_path):
    steps = (
        report.Step("prints", ("platform",), 30),
        report.Step("fails", ("no_such_module",), 30),
        report.Step("hangs", ("timeit", "-n", "1", "-r", "1", "__import__('time').sleep(60)"), 1),
    )
    outcomes = report.run_steps(steps, tmp_path, time.monotonic() + 60)
    assert [outcome.status for outcome in outcomes] == ["done", "failed with exit status 1", "cut off after 1 s"]
    assert 1 <= outcomes[2].seconds < 20
    summary = (tmp_path / "report.md").read_text()
    assert "| hangs | cut off after 1 s |" in summary
    assert outcomes[0].output.strip() in summary
    assert "No module named no_such_module" in summary
    assert "No module named no_such_module" in (tmp_path / "fails.txt").read_text()


def test_what_does_not_fit_is_said(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path), "--minutes", "0"]) == 0
    summary = (tmp_path / "report.md").read_text()
    assert summary.count("not run: out of time") >= 5
    assert capsys.readouterr().out.startswith(str(tmp_path / "report.md"))


def test_summary_is_whole_before_the_last_step():
    steps = report.steps_for(has_gpu=False)
    summary = report.markdown(steps, [report.Outcome("done", 3.0, "torch 2")], "fastsd is installed.")
    assert "| environment | done | 3 |" in summary
    assert summary.count("not run yet") == len(steps) - 1
    assert all(step.name in summary for step in steps)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_every_step_is_a_command_that_exists(has_gpu, tmp_path):
    steps = report.steps_for(has_gpu)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        module, *arguments = step.command(tmp_path)[2:]
        assert importlib.util.find_spec(module) is not None
        if module == "bench":
            options = parser().parse_args(arguments)
            assert getattr(options, step.option.removeprefix("--")) == tmp_path / step.result
            if arguments[0] == "unet" and not has_gpu:
                check_providers(options.providers.split(","), options.device)


def test_what_was_tuned_serves_the_steps_behind_it(tmp_path, monkeypatch):
    tune, use = (step for step in report.steps_for(has_gpu=True) if "tune" in step.name)
    assert (tune.option, tune.variable) == ("--into", measured.ENVIRONMENT_VARIABLE)
    assert "fastsd-channels_last" in " ".join(use.arguments)  # the choices are of such maps

    program = tmp_path / "writes_and_prints.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "print('found', os.environ.get('FASTSD_MEASURED'))\n"
        "if '--into' in sys.argv: pathlib.Path(sys.argv[-1]).write_text('{}')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    steps = (
        report.Step("before", ("writes_and_prints",), 30),
        report.Step("tune", ("writes_and_prints",), 30, "m.json", option="--into", variable="FASTSD_MEASURED"),
        report.Step("behind", ("writes_and_prints",), 30),
    )
    outcomes = report.run_steps(steps, tmp_path, time.monotonic() + 60)
    assert [o.output.strip() for o in outcomes] == ["found None", "found None", f"found {tmp_path / 'm.json'}"]


def test_a_cpu_has_its_algorithms_and_the_blocks_of_a_vae():
    only = {"crossover", "blocks-sd15-float32", "blocks-vae-sd-float32"}
    assert only <= {step.name for step in report.steps_for(has_gpu=False)}
    assert not only & {step.name for step in report.steps_for(has_gpu=True)}


def test_checkout_that_is_not_installed(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "cuda_sources" in name else found(name))
    environment, note = report.import_environment(tmp_path)
    assert "fastsd is not installed" in note
    program = (
        # as if it had not been installed in editable mode either
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')];"
        "import fastsd, fastsd_kernels, importlib.resources as r;"
        "print(fastsd_kernels.__file__, [f.name for f in r.files('fastsd_kernels.cuda_sources').iterdir()])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(str(tmp_path))
    assert "device.cuh" in printed
    assert Path(environment["PYTHONPATH"].split(os.pathsep)[1]) == report.ROOT
