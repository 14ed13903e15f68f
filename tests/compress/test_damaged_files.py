"""Files that are damaged by chance: one clear error, or the same model, and never anything else."""

import json
import shutil

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import fastsd
from fastsd.compress.storage import PLAN_FILE, WEIGHTS_FILE
from tests.combinations import order
from tests.compress.models import EVERYTHING, SMALLEST, build
from tests.compress.test_storage import STOCK_INDEX, signed

MANY = settings(max_examples=2 * settings.default.max_examples)
VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 3.5, 10**6, 10**30, "", "two", "../x", [], [3], ["mid_block"], [[]], {}, {"a": 1}]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A compressed model and a stock one, and their weights."""
    folder, unet = tmp_path_factory.mktemp("saved"), build(SMALLEST)
    small = fastsd.compress(unet, EVERYTHING)
    small.save_pretrained(folder / "compressed")
    unet.save_pretrained(folder / "stock", max_shard_size="100KB")
    return folder, {"compressed": small.state_dict(), "stock": unet.state_dict()}


def loaded(folder):
    """The weights in a folder, or ``None`` where it is refused."""
    try:
        return fastsd.load(folder).state_dict()
    except fastsd.CheckpointError as error:
        assert str(folder) in str(error)  # noqa: PT017 - where there is one
        return None


def are_equal(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], value) for name, value in expected.items())


def damage(data, content):
    """``content``, cut off somewhere, or with some byte changed, added or taken out."""
    at = data.draw(st.integers(0, len(content) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    ways = [content[:at], content[:at] + byte + content[at:], content[:at] + byte + content[at + 1 :]]
    return data.draw(st.sampled_from([*ways, content[:at] + content[at + 1 :]]))


def folder_of(saved, kind, tmp_path):
    folder = tmp_path / kind
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(saved[0] / kind, folder)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("compressed", PLAN_FILE), ("compressed", WEIGHTS_FILE), ("stock", "config.json"), ("stock", STOCK_INDEX)],
)
@MANY
@given(data=st.data())
@seed(order("bytes"))
def test_bytes(saved, tmp_path, kind, pattern, data):
    path = folder_of(saved, kind, tmp_path) / pattern
    path.write_bytes(damage(data, path.read_bytes()))
    state = loaded(path.parent)
    # a stock model has no signature: its configuration may be that of one with the same weights
    assert state is None or are_equal(state, saved[1][kind])


@MANY
@given(data=st.data())
@seed(order("stock weights"))
def test_bytes_of_stock_weights(saved, tmp_path, data):
    """Numbers may be others; which there are, and of which shapes, may not."""
    folder = folder_of(saved, "stock", tmp_path)
    path = data.draw(st.sampled_from(sorted(folder.glob("*-of-*"))))
    path.write_bytes(damage(data, path.read_bytes()))
    state, expected = loaded(folder), saved[1]["stock"]
    assert state is None or {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in expected.items()}


def places(value, path=()):
    """Where in nested dictionaries and lists there is anything."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in places(inner, (*path, key)))]


def change(data, tree):
    """Something in ``tree`` becomes something else, or is gone."""
    *way, last = data.draw(st.sampled_from([place for place in places(tree) if place]))
    for key in way:
        tree = tree[key]
    if data.draw(st.booleans()) or isinstance(tree, list):
        tree[last] = data.draw(VALUES)
    else:
        del tree[last]


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
@MANY
@given(data=st.data())
@seed(order("values of a plan"))
def test_values_of_a_plan(saved, tmp_path, is_signed, data):
    """Also by somebody who knows how files are signed."""
    folder = folder_of(saved, "compressed", tmp_path)
    before = json.loads((folder / PLAN_FILE).read_text())
    if is_signed:
        signed(folder, lambda content: change(data, content))
    else:
        content = json.loads((folder / PLAN_FILE).read_text())
        change(data, content)
        (folder / PLAN_FILE).write_text(json.dumps(content))
    state = loaded(folder)
    assert state is None or are_equal(state, saved[1]["compressed"])
    assert is_signed or state is None or json.loads((folder / PLAN_FILE).read_text()) == before


@pytest.mark.parametrize("file", ["config.json", STOCK_INDEX])
@MANY
@given(data=st.data())
@seed(order("values of a stock model"))
def test_values_of_a_stock_model(saved, tmp_path, file, data):
    path = folder_of(saved, "stock", tmp_path) / file
    content = json.loads(path.read_text())
    change(data, content)
    path.write_text(json.dumps(content))
    state = loaded(path.parent)
    assert state is None or are_equal(state, saved[1]["stock"])
