"""The catalogue suits the source, and the runner tells a fault that the tests notice from one that they do not."""

import subprocess
from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS, Mutant
from tests.mutants.parts import NEW, OLD, OPS
from tests.mutants.runner import Copy, copy_tree, faults_of

ROOT = Path(__file__).resolve().parents[2]
AREAS = {"cuda": 9, "triton": 8, "cpu": 7, "host": 5, "core": 4, "patch": 8, "compress": 4, "adapters": 1, "cli": 1}
TEST = "from sums import double\ndef test_double(): assert double(2) == 4\n"


def test_every_fault_can_be_planted():
    assert faults_of(MUTANTS, ROOT) == []
    assert all(mutant.old != mutant.new for mutant in MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_part_is_known():
    parts = {mutant.part for mutant in MUTANTS}
    assert parts <= OLD.keys()
    assert parts <= NEW.keys()


def test_faults_are_spread():
    for area, least in AREAS.items():
        assert sum(mutant.area == area for mutant in MUTANTS) >= least, area
    for op in OPS:
        assert len({m.part for m in MUTANTS if m.part.partition("/")[0] == op}) >= 2, op


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of a tree with a function of two lines and a test of it."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    tree, folder = tmp_path / "tree", tmp_path / "copy"
    (tree / "tests").mkdir(parents=True)
    (tree / "sums.py").write_text("def double(n):\n    if n < 0: return n - -n\n    return n + n\n")
    (tree / "tests/test_sums.py").write_text(TEST)
    (tree / "untracked.py").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "sums.py", "tests"], cwd=tree, check=True)
    copy_tree(tree, folder)
    return Copy(folder, {"sums": ("tests/test_sums.py",)}, limit=60)


def mutant(name, old, new):
    return Mutant(name, "core", "sums", "sums.py", old, new, "")


def test_runner_tells_caught_from_survived(copy):
    before = (copy.folder / "sums.py").read_text()
    seen, unseen = copy.run([mutant("seen", "n + n", "n * n * n"), mutant("unseen", "n - -n", "n")])
    assert (seen.outcome, seen.by) == ("caught", "tests/test_sums.py::test_double")
    assert (unseen.outcome, unseen.by) == ("SURVIVED", "")
    assert (copy.folder / "sums.py").read_text() == before
    assert not (copy.folder / "untracked.py").exists()


def test_no_tests_notice_nothing(copy):
    (copy.folder / "tests/test_sums.py").write_text("")
    assert copy.why_not_clean("sums") == "INVALID: no tests ran"


def test_a_fault_whose_source_has_moved_on_is_named(copy):
    assert faults_of([mutant("gone", "n ** n", "n")], copy.folder) == [
        "gone: expected its text once in sums.py; found it 0 times"
    ]
