"""Digests: whatever is edited shows, whichever thread or instruction set reads."""

import pytest
import torch
from torch import nn

from fastsd_kernels import cpu_runtime
from fastsd_kernels.digest import digest
from fastsd_kernels.testing.inputs import random_tensor

# elements: within a word, on both sides of what a step reads, and of what a thread is given at once
SIZES = (1, 2, 3, 63, 64, 65, 129, 32 * 1024, 100 * 1024 + 7)


def tensor(size):
    return random_tensor((size,), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("isa", cpu_runtime.ISAS)
def test_every_edit_shows(isa, size, monkeypatch):
    index = cpu_runtime.ISAS.index(isa)
    if index > cpu_runtime.isa():
        pytest.skip(f"this processor has no {isa}")
    x = tensor(size)
    widest = digest(x)
    monkeypatch.setattr(cpu_runtime, "isa", lambda: index)
    assert digest(x) == widest == digest(x.clone())
    seen = {widest}
    places = range(size) if size < 200 else (0, 1, 31, 64, size // 2, size - 2, size - 1)
    for place in places:
        # the last bit alone
        x.view(torch.int32)[place] ^= 1
        seen.add(digest(x))
    assert len(seen) == len(places) + 1
    for place in places:
        x.view(torch.int32)[place] ^= 1
    assert digest(x) == widest


@pytest.mark.parametrize(
    "edit",
    [
        # of elements a step, or what a thread is given at once, apart
        lambda x: x.index_copy_(0, torch.tensor([2, 66]), x[[66, 2]]),
        lambda x: x.index_copy_(0, torch.tensor([5, 32 * 1024 + 5]), x[[32 * 1024 + 5, 5]]),
        lambda x: x[3:68:64].neg_(),
        lambda x: x.neg_(),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.copy_(x.roll(64)),
        lambda x: x.copy_(x.roll(32 * 1024)),
        lambda x: x.add_(1e-6),
    ],
    ids=["swap", "swap_far", "two_signs", "signs", "flip", "roll", "roll_far", "add"],
)
def test_edits_of_several_elements(edit):
    x = tensor(96 * 1024)
    before = digest(x)
    edit(x)
    assert digest(x) != before


def test_sums_that_cancel():
    """The words of a column add up to what they did."""
    x = torch.zeros(64 * 1024)
    seen = {digest(x)}
    for places in ((0, 64), (0, 128), (1, 65), (0, 1)):
        x.view(torch.int32)[list(places)] = torch.tensor([1, -1], dtype=torch.int32)
        seen.add(digest(x))
        x.zero_()
    assert len(seen) == 5


@pytest.mark.parametrize("bit", range(0, 64, 3))
def test_a_change_is_not_undone_by_one_known_beforehand(bit):
    """Of a word, and of what would undo it in the next word of the lane if products carried it one way alone."""
    highest = bit == 63
    x = torch.randint(-(2**63), 2**63 - 1, (1000, 256), generator=torch.Generator().manual_seed(bit))
    for row in x:
        before = digest(row.view(torch.float32))
        row[1] ^= -(2**63) if highest else 2**bit
        for undone in (2**34, -(2**63), -(2**63) ^ 2**34, -(2**63) ^ 2**31, 2**bit if not highest else 1):
            row[33] ^= undone
            assert digest(row.view(torch.float32)) != before
            row[33] ^= undone


def test_shape_and_dtype_belong_to_it():
    x = torch.zeros(2, 12)
    tensors = (
        x,
        x.view(4, 6),
        x.flatten(),
        torch.zeros(0),
        torch.zeros(2, 0),
        x.view(torch.float64),
        x.half(),
        x.bfloat16(),
    )
    assert len({digest(each) for each in tensors}) == len(tensors)


def test_any_number_of_threads_reads_the_same():
    x = tensor(100 * 1024)
    before = torch.get_num_threads()
    try:
        digests = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            digests.append(digest(x))
    finally:
        torch.set_num_threads(before)
    assert len(set(digests)) == 1


@torch.inference_mode()
def test_parameters_and_tensors_of_inference_mode():
    assert digest(nn.Parameter(torch.ones(3))) == digest(torch.ones(3)) is not None


class _Tensor(torch.Tensor):
    pass


def _freed(x):
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 6).mT,
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(1, 6).expand(4, 6),
        torch.zeros(4, 6, device="meta"),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_mkldnn(),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(3).as_subclass(_Tensor),
        _freed(torch.zeros(3)),
    ],
    ids=["transposed", "gaps", "expanded", "meta", "sparse", "mkldnn", "integers", "subclass", "freed"],
)
def test_what_is_not_plain_has_none(x):
    assert digest(x) is None
