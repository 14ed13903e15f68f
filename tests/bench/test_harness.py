"""Interleaved timing with a clock that the tests wind."""

import json

import pytest
import torch

from bench import harness


class FakeTime:
    """A time that stands still until somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_runs_take_turns_and_warmup_does_not_count():
    time = FakeTime()
    turns = []
    durations = {"a": iter([50.0, 1.0, 2.0, 3.0]), "b": iter([70.0, 10.0, 30.0, 20.0])}

    def run(name):
        turns.append(name)
        time.now += next(durations[name])

    heard, rounds = [], []
    timings = harness.interleaved(
        {"a": lambda: run("a"), "b": lambda: run("b")},
        harness.host_clock(time),
        repeats=3,
        warmup=1,
        on_run=heard.append,
        on_round=rounds.append,
    )
    assert turns == ["a", "b"] * 4
    assert heard == turns
    assert [timings["a"].seconds for timings in rounds] == [(1.0,), (1.0, 2.0), (1.0, 2.0, 3.0)]
    assert timings["a"].seconds == (1.0, 2.0, 3.0)
    assert timings["b"].seconds == (10.0, 30.0, 20.0)
    assert timings["b"].summary() == {"median_s": 20.0, "p20_s": pytest.approx(14.0), "p80_s": pytest.approx(26.0)}


def test_median_ignores_one_slow_run():
    assert harness.Timing((1.0, 1.0, 1.0, 1.0, 900.0)).median == 1.0


def test_relative_l2():
    exact = torch.tensor([3.0, 4.0])
    assert harness.relative_l2(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert harness.relative_l2(torch.tensor([3.0, torch.nan]), exact) == float("inf")
    assert harness.relative_l2(torch.ones(2), torch.zeros(2)) == float("inf")


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "result.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
