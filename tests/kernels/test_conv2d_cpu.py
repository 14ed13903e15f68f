"""What only the CPU backend promises: the choice of an algorithm, any number of threads, real sizes, NaN and Inf."""

import errno
import mmap

import pytest
import torch

from fastsd_kernels import conv2d, cpu_runtime
from fastsd_kernels.conv2d import cpu_costs, cpu_impl, op, packed_weights
from fastsd_kernels.conv2d.packed_weights import WeightBudget
from fastsd_kernels.dispatch import BackendUnavailable
from fastsd_kernels.testing import feature_map

LIKE = {"device": "cpu", "dtype": torch.float32}
WINOGRAD = ("winograd2", "winograd4")


def relative_l2(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("algorithm", ["product", *WINOGRAD])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(layout, algorithm):
    x, skip = (feature_map((3, channels, 40, 33), layout, **LIKE, seed=1) for channels in (96, 64))
    weight = feature_map((72, 160, 3, 3), "contiguous", **LIKE) / 38
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            given = {"padding": 1, "skip": skip, "num_groups": 32, "activation": "silu", "algorithm": algorithm}
            results.append(conv2d(x, weight, backend="cpu", **given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("shape", [(2, 320, 64, 64, 320), (1, 2560, 16, 16, 1280), (1, 1280, 8, 8, 1280)], ids=str)
def test_error_at_real_sizes(shape, algorithm):
    batch, channels, height, width, out_channels = shape
    x = feature_map((batch, channels, height, width), "channels_last", **LIKE)
    weight = feature_map((out_channels, channels, 3, 3), "contiguous", **LIKE)[:64] / (3 * channels**0.5)
    given = {"padding": 1, "num_groups": 32, "activation": "silu"}
    exact = conv2d(x.double(), weight.double(), **given, backend="reference")
    assert relative_l2(conv2d(x, weight, **given, algorithm=algorithm, backend="cpu"), exact) <= 3e-5


def test_a_large_map_is_cut_into_blocks():
    """More tiles than a block holds, in rows of more tiles than a strip, and a map that no tile divides."""
    x = feature_map((1, 48, 301, 421), "channels_last", **LIKE)
    weight = feature_map((40, 48, 3, 3), "contiguous", **LIKE) / 20
    exact = conv2d(x.double(), weight.double(), padding=1, backend="reference")
    for algorithm in WINOGRAD:
        assert relative_l2(conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu"), exact) <= 3e-5


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_tiles(value, algorithm):
    """Winograd's tiles share their sums: NaN and infinities make NaN of whole tiles, and of nothing else."""
    x = feature_map((1, 16, 24, 24), "channels_last", **LIKE).clone()
    x[0, 3, 9, 9] = value
    weight = feature_map((8, 16, 3, 3), "contiguous", **LIKE)
    y = conv2d(x, weight, padding=1, algorithm=algorithm, backend="cpu")
    plain = conv2d(x, weight, padding=1, backend="reference")
    assert not torch.isfinite(y[~torch.isfinite(plain)]).any()
    tile = int(algorithm[-1])
    spread = torch.isfinite(y[0]).all(0).logical_not().nonzero()
    assert spread.min() >= (8 // tile) * tile
    assert spread.max() < (10 // tile + 1) * tile


def call(channels, side, kernel=3, stride=1):
    return cpu_costs.Call(1, channels, channels, side, side, kernel, stride, 0)


@pytest.mark.parametrize(
    ("channels", "side", "kept"),
    [(320, 64, "winograd4"), (640, 32, "winograd4"), (1280, 16, "winograd2"), (1280, 8, "product")],
)
def test_choice_with_copies(channels, side, kept):
    assert cpu_costs.cheapest(call(channels, side), None, 10**10) == kept


def test_choice_without_copies():
    """Packing for one call pays on large maps and not on small ones."""
    assert cpu_costs.cheapest(call(320, 64)) == "winograd4"
    assert cpu_costs.cheapest(call(1280, 8)) == "product"
    assert cpu_costs.cheapest(call(320, 8)) != "direct"


def test_a_copy_that_is_there_is_preferred():
    costs = cpu_costs.costs(call(1280, 16), 4, 0)
    assert costs["winograd4"] < costs["winograd2"]
    assert cpu_costs.costs(call(1280, 16), 2, 0)["winograd2"] < costs["winograd2"]


def test_only_plain_float32_is_transformed(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu_costs, "cheapest", lambda *args: seen.append(args) or "winograd2")
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
    conv2d(x.bfloat16(), weight.bfloat16(), padding=1)
    conv2d(x[:0], weight, padding=1)
    mkldnn = torch.backends.mkldnn
    for setting in (mkldnn.matmul, mkldnn.conv):
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            conv2d(x, weight, padding=1)
        finally:
            setting.fp32_precision = before
    assert not seen
    conv2d(x, weight, padding=1)
    assert len(seen) == 1


def test_refusals():
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3)
    with pytest.raises(BackendUnavailable, match="float64"):
        conv2d(x.double(), weight.double(), backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"stride is 2; winograd4 takes stride 1, use algorithm='product'"):
        conv2d(x, weight, stride=2, algorithm="winograd4", backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"\(8, 8, 1, 1\); winograd2 takes 3×3"):
        conv2d(x, weight[..., :1, :1], algorithm="winograd2", backend="cpu")
    with pytest.raises(BackendUnavailable, match="'implicit_gemm'; the cpu backend has direct"):
        conv2d(x, weight, algorithm="implicit_gemm", backend="cpu")
    meta = op.backends["cpu"].reject(x.to("meta"), weight.to("meta"), None, 1, None)
    assert "needs CPU tensors" in meta


class TestBudget:
    @pytest.mark.parametrize("isa", cpu_runtime.ISAS)
    def test_digest(self, isa):
        """Every bit counts, and so do changes that cancel in a sum: of signs, of exponents, of places."""
        index = cpu_runtime.ISAS.index(isa)
        if index > cpu_runtime.isa():
            pytest.skip(f"this processor has no {isa}")

        def digest(weight):
            return torch.ops.fastsd_cpu.digest.default(weight, index)

        weight = feature_map((128, 128, 3, 3), "contiguous", **LIKE)
        seen = {digest(weight)}
        assert digest(weight.clone()) in seen
        negated, doubled, half, row, column = (weight.clone() for _ in range(5))
        negated.neg_()
        doubled.mul_(2)
        half[:64].neg_()
        row[0].neg_()
        column[:, 0].neg_()
        swapped = weight.flatten()[[1, 0, *range(2, weight.numel())]].view_as(weight)
        changed = [negated, doubled, half, row, column, swapped, weight.flatten()[:-1], weight.flatten()[1:]]
        words = weight.view(torch.int32).view(-1)
        for at in range(0, words.numel(), 9973):
            for bit in (1, 1 << 13, 1 << 30, -(1 << 31)):
                flipped = words.clone()
                flipped[at] ^= bit
                changed.append(flipped)
        for other in changed:
            found = digest(other)
            assert found not in seen
            seen.add(found)

    def test_an_edit_during_packing_is_not_lost(self):
        budget = packed_weights.WeightBudget(10**6)
        weight = torch.randn(8, 8, 3, 3)
        budget.admit(weight)

        def pack_and_edit(weight, tile):
            made = cpu_impl._pack(weight, tile)
            weight.data.mul_(3)
            return made

        packed_weights.packed(weight, 2, 1, pack_and_edit)
        assert torch.equal(packed_weights.packed(weight, 2, 1, cpu_impl._pack), cpu_impl._pack(weight, 2))

    @pytest.mark.parametrize(
        "weight",
        [
            torch.randn(8, 16, 3, 3)[:, ::2],
            torch.randn(1, 8, 3, 3).expand(8, -1, -1, -1),
            torch.randn(8, 8, 3, 3).transpose(0, 1),
            torch.randn(8, 8, 3, 3).half(),
        ],
        ids=["gaps", "expanded", "transposed", "half"],
    )
    def test_what_cannot_be_digested_is_packed_for_the_call(self, weight):
        budget = packed_weights.WeightBudget(10**6)
        budget.admit(weight)
        packed_weights.packed(weight, 2, 1, cpu_impl._pack)
        assert budget.used_bytes == 0

    def test_a_copy_that_is_not_used_is_freed(self):
        budget = packed_weights.WeightBudget(10**6)
        x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3)
        budget.admit(weight)
        conv2d(x, weight, padding=1, algorithm="winograd2")
        assert budget.used_bytes > 0
        conv2d(x, weight, padding=1, algorithm="direct")
        assert budget.used_bytes == 0

    def test_a_weight_without_a_budget_is_packed_for_the_call(self):
        weight = torch.randn(8, 8, 3, 3)
        assert packed_weights.budget_of(weight) is None
        first, second = (packed_weights.packed(weight, 2, 1, cpu_impl._pack) for _ in range(2))
        assert first is not second
        assert torch.equal(first, second)

    def test_copies_end_with_the_weight_and_the_budget(self):
        budget = packed_weights.WeightBudget(10**6)
        weight = torch.randn(8, 8, 3, 3)
        budget.admit(weight)
        assert packed_weights.packed(weight, 2, 1, cpu_impl._pack) is packed_weights.packed(
            weight, 2, 1, cpu_impl._pack
        )
        assert budget.used_bytes == budget.bytes_of(weight) == 16 * 8 * 32 * 4
        assert packed_weights.kept(weight).tile == 2
        other = torch.randn(8, 8, 3, 3)
        budget.admit(other)
        packed_weights.packed(other, 2, 1, cpu_impl._pack)
        del other
        assert budget.used_bytes == budget.bytes_of(weight)
        del budget
        assert packed_weights.budget_of(weight) is None

    def test_negative_bound(self):
        with pytest.raises(ValueError, match="max_bytes: expected a number that is not negative; got -1"):
            packed_weights.WeightBudget(-1)


@torch.no_grad()
def test_a_weight_that_several_convolutions_share():
    """A copy that one keeps is no choice for another that it cannot serve."""
    weight, budget = torch.randn(64, 64, 3, 3) / 24, WeightBudget(1 << 30)
    budget.admit(weight)
    small, large = torch.randn(1, 64, 32, 32), torch.randn(1, 64, 64, 64)
    conv2d(small, weight, padding=1)
    assert packed_weights.kept(weight) is not None
    y = conv2d(large, weight, stride=2, padding=1)
    torch.testing.assert_close(y, torch.conv2d(large, weight, stride=2, padding=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_system_without_large_pages(monkeypatch):
    class Pages(mmap.mmap):
        def madvise(self, *args):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(cpu_impl.mmap, "mmap", Pages)
    x, weight = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3) / 24
    y = conv2d(x, weight, padding=1, algorithm="winograd4")
    torch.testing.assert_close(y, torch.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
