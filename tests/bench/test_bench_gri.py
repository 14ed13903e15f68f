"""``python -m bench gri-scaling | gri-fidelity`` and the plain compositions that ``bench op gri_attention`` times."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench import gri_fidelity, gri_scaling, harness
from bench.__main__ import main
from bench.kernels import bench_gri_attention as bench
from bench.op import arithmetic
from fastsd_kernels import gri_attention
from fastsd_kernels.gri_attention import op


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("composition", 4),
        ("composition", 16),
        ("merge", 4),
        pytest.param("flex", 4, marks=pytest.mark.long),
        pytest.param("flex", 16, marks=pytest.mark.long),
    ],
)
def test_compositions_are_gri(name, window):
    given = bench.sample_of(bench.Case(2, 3, 16, 8, window, 4), "small", torch.device("cpu"), torch.float32).kwargs
    actual = bench.others(torch.device("cpu"), with_compile=True)[name](**given)
    torch.testing.assert_close(actual, gri_attention(**given))


def test_merge_counts_cells_beside_a_window_that_is_the_map():
    given = bench.sample_of(bench.Case(2, 3, 16, 8, 16, 4), "small", torch.device("cpu"), torch.float32).kwargs
    assert not torch.allclose(bench.merge(**given), gri_attention(**given))


def test_cases_count_what_they_do():
    sample = bench.sample_of(bench.Case(1, 2, 16, 8, 4, 8), "small", torch.device("cpu"), torch.float32)
    assert arithmetic(op, bench, sample) == 2 * 2 * 2 * 256 * 8 * (16 + 4)
    assert all(case.side % case.window == case.side % case.pool == 0 for case in bench.CASES.values())
    assert all(case.window < case.side for case in bench.CASES.values())


def test_scaling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gri_scaling, "SIDES", (8, 16))
    path = tmp_path / "scaling.json"
    assert main(["gri-scaling", "--device", "cpu", "--repeats", "1", "--json", str(path)]) == 0
    assert [row["side"] for row in json.loads(path.read_text())["rows"]] == [8, 16]
    assert "16x16" in capsys.readouterr().out


def test_slope():
    rows = [gri_scaling.Row(side, full_s=1e-9 * side**4, gri_s=3e-7 * side**2) for side in (8, 16, 64)]
    assert gri_scaling.slope(rows, "full_s") == pytest.approx(2)
    assert gri_scaling.slope(rows, "gri_s") == pytest.approx(1)


@pytest.fixture
def small_fidelity(monkeypatch):
    for name, value in {"SIDE": 16, "SIZES": (4, 8), "HEADS": 2, "WIDTH": 8}.items():
        monkeypatch.setattr(gri_fidelity, name, value)


@pytest.mark.usefixtures("small_fidelity")
def test_fidelity(tmp_path, capsys):
    path = tmp_path / "fidelity.json"
    assert main(["gri-fidelity", "--json", str(path)]) == 0
    assert "w8 s4" in capsys.readouterr().out
    rows = {(row["field"], row["method"]): row for row in json.loads(path.read_text())["rows"]}
    for field in ("pink", "white"):
        # more keys, less error; and cells are better than nothing
        assert rows[field, "GRI w8 s4"]["error"] < rows[field, "GRI w8 s8"]["error"]
        assert rows[field, "GRI w8 s8"]["error"] < rows[field, "windows w8 alone"]["error"]
        assert 0 < rows[field, "GRI w4 s4"]["mass"] < rows[field, "GRI w8 s4"]["mass"] < 1
        assert rows[field, "GRI w4 s4"]["macs"] == (16 + 16) / 256


@pytest.mark.usefixtures("small_fidelity")
def test_masses_add_up():
    q = torch.zeros(1, 2, 256, 8)  # every key has the same weight
    assert gri_fidelity.own_mass(q, q, (16, 16)) == pytest.approx({4: 16 / 256, 8: 64 / 256})


@pytest.mark.usefixtures("small_fidelity")
def test_merging():
    x = gri_fidelity.noise(1.0, 16)
    q, k, v = gri_fidelity.projections(x)
    full = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(gri_fidelity.attend_merged(x, q, k, v, 0), full)
    some, many = (gri_fidelity.distance(gri_fidelity.attend_merged(x, q, k, v, n), full) for n in (40, 200))
    assert 0 < some < many

    # tokens that are alike within blocks lose nothing but their number, which equal tokens do not need
    blocks = x.view(4, 4, 4, 4, 16)[:, :1, :, :1].expand(4, 4, 4, 4, 16).reshape(256, 16)
    q, k, v = gri_fidelity.projections(blocks)
    merged = gri_fidelity.attend_merged(blocks, q, k, v, 240)
    torch.testing.assert_close(merged, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_fidelity")
def test_noise_is_what_it_is_called():
    for fall, smooth in ((1.0, True), (0.0, False)):
        fields = gri_fidelity.noise(fall, 64).T.reshape(64, 16, 16)
        assert fields.std((1, 2)).sub(1).abs().max() < 1e-5
        neighbours = (fields[:, 1:] * fields[:, :-1]).mean()
        assert (neighbours > 0.5) == smooth


@pytest.mark.parametrize("command", ["gri-scaling", "gri-fidelity"])
@pytest.mark.parametrize("suffix", harness.PLOT_SUFFIXES)
@pytest.mark.usefixtures("small_fidelity")
def test_plots(command, suffix, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gri_scaling, "SIDES", (8, 16))
    result, plot = tmp_path / "result.json", tmp_path / "new" / f"plot{suffix}"
    repeats = ["--repeats", "1", "--device", "cpu"] if command == "gri-scaling" else []
    assert main([command, *repeats, "--json", str(result)]) == 0
    monkeypatch.setattr(gri_scaling, "measure_all", None)
    monkeypatch.setattr(gri_fidelity, "compute", None)
    assert main([command, "--from", str(result), "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("command", ["gri-scaling", "gri-fidelity"])
def test_refused_requests(command, capsys):
    assert main([command, "--plot", "plot.doc"]) == 2
    assert ".png" in capsys.readouterr().err
    assert main([command, "--from", __file__]) == 2
    assert f"bench {command} --json" in capsys.readouterr().err
