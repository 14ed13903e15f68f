"""``python -m bench plot``: what a result file holds is what is drawn."""

import json

import pytest

from bench import harness, plot
from bench.__main__ import main

UNET = {
    **{"model": "sd15", "device": "a machine", "dtype": "float32", "batch": 1, "latent": 64},
    "providers": {
        "eager": {"median_s": 4.0, "p20_s": 3.5, "p80_s": 5.0},
        "fastsd": {"median_s": 2.0, "p20_s": 1.9, "p80_s": 2.1},
    },
}
OP = {
    **{"op": "linear", "device": "a machine", "copy_bytes_per_s": 20e9, "peak_flops_per_s": 400e9},
    "rows": [
        {"case": "a", "provider": name, "dtype": "float32", "median_s": seconds, "bytes": 1000, "flops": flops}
        for name, seconds in (("eager", 2e-6), ("fastsd", 1e-6))
        for flops in (10_000, 100_000)
    ],
}
pytest.importorskip("matplotlib", reason="plots need matplotlib")


@pytest.mark.parametrize("suffix", harness.PLOT_SUFFIXES)
@pytest.mark.parametrize("result", [UNET, OP], ids=["unet", "op"])
def test_files(result, suffix, tmp_path):
    given, into = tmp_path / "result.json", tmp_path / "new" / f"plot{suffix}"
    given.write_text(json.dumps(result))
    assert main(["plot", str(given), "--into", str(into)]) == 0
    assert into.stat().st_size > 1000


def test_bars_are_the_medians():
    (axes,) = plot.bars(UNET).axes
    assert [bar.get_width() for bar in axes.patches] == [4.0, 2.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eager", "fastsd"]


def test_points_and_the_roof():
    (axes,) = plot.roofline(OP).axes
    eager, fastsd, roof = axes.lines
    assert [line.get_label() for line in axes.lines] == ["eager", "fastsd", "roof"]
    assert list(eager.get_xdata()) == list(fastsd.get_xdata()) == [10, 100]
    assert list(fastsd.get_ydata()) == pytest.approx([10e9, 100e9])
    # 20 operations for a byte are where the machine computes as fast as it reads
    assert list(roof.get_xdata()) == [5, 20, 200]
    assert list(roof.get_ydata()) == pytest.approx([100e9, 400e9, 400e9])


@pytest.mark.parametrize("content", ["", "{}", '{"providers": {"eager": {}}}', '{"rows": []}'], ids=str)
def test_files_that_are_none(content, tmp_path, capsys):
    given = tmp_path / "result.json"
    given.write_text(content)
    assert main(["plot", str(given), "--into", str(tmp_path / "plot.svg")]) == 2
    assert "bench unet --json" in capsys.readouterr().err
    assert main(["plot", str(given), "--into", str(tmp_path / "plot.doc")]) == 2
    assert ".png" in capsys.readouterr().err
