"""``python -m bench crossover``: what is measured, shown again, and drawn."""

import importlib.util
import json

import pytest

from bench import crossover, harness
from bench.__main__ import main

RESULT = {
    "device": "a slide rule",
    "commit": "0123456789ab",
    "rows": [
        {"channels": channels, "side": side, "seconds": {"direct": 2e-3, "winograd2": 1e-3}, "chosen": "direct"}
        for channels in (16, 32)
        for side in (4, 8)
    ],
}


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(RESULT))
    return path


@pytest.fixture
def measures_nothing(monkeypatch):
    def measure(*arguments):
        raise AssertionError("nothing was to be measured")

    monkeypatch.setattr(crossover, "measure", measure)


def test_crossover(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crossover, "CHANNELS", (16,))
    monkeypatch.setattr(crossover, "SIDES", (4, 8))
    path = tmp_path / "crossover.json"
    assert main(["crossover", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["channels"], row["side"]) for row in rows] == [(16, 4), (16, 8)]
    assert set(rows[0]["seconds"]) == {"direct", "product", "winograd2", "winograd4"}
    assert rows[0]["chosen"] in rows[0]["seconds"]
    assert "loses" in capsys.readouterr().out


@pytest.mark.usefixtures("measures_nothing")
def test_result_is_shown_again(measured, capsys):
    assert main(["crossover", "--from", str(measured)]) == 0
    printed = capsys.readouterr().out
    assert "a slide rule" in printed
    assert printed.count("100%") == len(RESULT["rows"])


@pytest.mark.usefixtures("measures_nothing")
@pytest.mark.parametrize("suffix", harness.PLOT_SUFFIXES)
def test_plot(suffix, measured, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / f"plot{suffix}"
    assert main(["crossover", "--from", str(measured), "--plot", str(path)]) == 0
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix])


@pytest.mark.usefixtures("measures_nothing")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--plot", "plot.doc"), ("plot.doc", ".png", ".svg")),
        (("--from", "nowhere.json"), ("nowhere.json", "bench crossover --json")),
        (("--from", __file__), ("test_bench_crossover.py", "bench crossover --json")),
    ],
)
def test_refused_requests(arguments, says, capsys):
    assert main(["crossover", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert all(words in captured.err for words in says)


def test_result_of_another_command(tmp_path, capsys):
    path = tmp_path / "unet.json"
    path.write_text(json.dumps({"device": "a slide rule", "providers": {}}))
    assert main(["crossover", "--from", str(path)]) == 2
    assert "expected a file of `bench crossover --json`" in capsys.readouterr().err


@pytest.mark.usefixtures("measures_nothing")
def test_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["crossover", "--plot", "plot.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
