"""gri_attention on the backends that run on the host, against its reference; and the reference against its oracles."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastsd_kernels import gri_attention
from fastsd_kernels.gri_attention import cases, op
from tests.proving.op_suite import OpSuite

LIKE = {"device": "cpu", "dtype": torch.float64}
INTERACTIONS = ("joint", "gated", "agent")


class TestGriAttention(OpSuite):
    op = op


def drawn(grid, heads=2, width=8, batch=2, **like):
    return cases.tokens(batch, heads, grid[0] * grid[1], width, "contiguous", **LIKE | like)


def where(grid):
    """Row and column of every token."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return rows.flatten(), columns.flatten()


def as_mask(grid, window, pool, mask_own_window=False):
    """The definition a second time, by token: who is in whose window [N, N], how tokens are pooled [G, N], and which
    cells a token sees [N, G]."""
    rows, columns = where(grid)
    window_of = rows // window[0] * grid[1] + columns // window[1]
    same_window = window_of[:, None] == window_of
    cell_of = rows // pool[0] * math.ceil(grid[1] / pool[1]) + columns // pool[1]
    members = (torch.arange(int(cell_of.max()) + 1)[:, None] == cell_of).double()
    seen = torch.ones(len(rows), len(members), dtype=torch.bool)
    if mask_own_window:
        seen = (~same_window).double() @ members.T > 0  # some token of the cell is elsewhere
    return same_window, members, seen


@pytest.mark.parametrize("mask_own_window", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize(("grid", "window", "pool"), [((8, 8), (4, 4), (2, 2)), ((7, 9), (4, 3), (3, 2))])
def test_reference_against_dense_masks(grid, window, pool, interaction, mask_own_window):
    q, k, v = drawn(grid)
    gate = torch.tensor([0.3, -1.2], **LIKE) if interaction == "gated" else None
    same_window, members, seen = as_mask(grid, window, pool, mask_own_window)
    counts = members.sum(1)
    mean = members / counts[:, None]
    s = 1 / math.sqrt(8)
    regional = (q @ k.mT * s).masked_fill(~same_window, -math.inf)
    of_cells = (q @ (mean @ k).mT * s + counts.log()).masked_fill(~seen, -math.inf)
    v_cells = mean @ v
    if interaction == "agent":
        v_cells = F.softmax(mean @ q @ k.mT * s, -1) @ v
    if interaction == "gated":
        share = torch.sigmoid(gate)[:, None, None]
        expected = share * (F.softmax(regional, -1) @ v) + (1 - share) * (F.softmax(of_cells, -1) @ v_cells)
    else:
        weights = F.softmax(torch.cat([regional, of_cells], -1), -1)
        expected = weights @ torch.cat([v, v_cells], 2)
    given = {"interaction": interaction, "mask_own_window": mask_own_window, "gate": gate}
    actual = gri_attention(q, k, v, grid=grid, window=window, pool=pool, **given, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
class TestOracles:
    @pytest.fixture(autouse=True)
    def _dtype(self, backend):
        self.like = LIKE | ({} if backend == "reference" else {"dtype": torch.float32})
        self.close = {"rtol": 0, "atol": 1e-12 if backend == "reference" else 2e-6}

    def test_window_that_covers_the_map_is_full_attention(self, backend):
        q, k, v = drawn((6, 5), **self.like)
        for interaction in INTERACTIONS:
            gate = torch.zeros(2, **self.like) if interaction == "gated" else None
            for window in ((6, 5), 8):
                actual = gri_attention(
                    q, k, v, grid=(6, 5), window=window, pool=2, interaction=interaction, gate=gate, backend=backend
                )
                torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v), **self.close)

    def test_pool_of_one_without_regions_is_full_attention(self, backend):
        q, k, v = drawn((6, 5), **self.like)
        actual = gri_attention(q, k, v, grid=(6, 5), window=None, pool=1, backend=backend)
        torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v), **self.close)

    def test_pool_of_one_without_the_own_window_is_full_attention(self, backend):
        """Every token is then seen once: those of the window as they are, all others as cells of one."""
        q, k, v = drawn((6, 5), **self.like)
        actual = gri_attention(q, k, v, grid=(6, 5), window=3, pool=1, mask_own_window=True, backend=backend)
        torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v), **self.close)

    def test_constant_keys_and_values_in_each_cell(self, backend):
        """Cells stand for their tokens: where these are alike, nothing is lost but the own window's second count."""
        grid, pool = (8, 8), 2
        q, k, v = drawn(grid, **self.like)
        coarse = lambda x: (  # noqa: E731
            x.unflatten(2, grid)[:, :, ::pool, ::pool]
            .repeat_interleave(pool, 2)
            .repeat_interleave(pool, 3)
            .flatten(2, 3)
        )
        k, v = coarse(k), coarse(v)
        actual = gri_attention(q, k, v, grid=grid, window=4, pool=pool, mask_own_window=True, backend=backend)
        torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v), **self.close)

    @pytest.mark.parametrize("mask_own_window", [False, True])
    def test_joint_is_the_merge_of_both_branches(self, backend, mask_own_window):
        """softmax over both kinds of keys = the branches weighted by their sums of exponentials."""
        grid, window, pool = (7, 9), (4, 3), (3, 2)
        q, k, v = drawn(grid, **self.like)
        same_window, members, seen = as_mask(grid, window, pool, mask_own_window)
        counts = members.sum(1)
        s = 1 / math.sqrt(8)
        k_cells = (members / counts[:, None]).to(k.dtype) @ k
        regional = (q @ k.mT * s).masked_fill(~same_window, -math.inf).logsumexp(-1)
        global_ = (q @ k_cells.mT * s + counts.log().to(k.dtype)).masked_fill(~seen, -math.inf).logsumexp(-1)
        share = torch.sigmoid(regional - global_)[..., None]
        given = {"grid": grid, "window": window, "pool": pool, "mask_own_window": mask_own_window, "backend": backend}
        branches = {}
        for name, gate in (("regional", 60.0), ("global", -60.0)):  # a gate that is open to one side alone
            branches[name] = gri_attention(
                q, k, v, **given, interaction="gated", gate=torch.full((2,), gate, **self.like)
            )
        expected = share * branches["regional"] + (1 - share) * branches["global"]
        torch.testing.assert_close(gri_attention(q, k, v, **given), expected, **self.close)

    def test_windows_may_be_permuted(self, backend):
        """Without cells, windows know nothing of each other."""
        grid, window = (8, 8), 4
        q, k, v = drawn(grid, **self.like)
        order = torch.tensor([2, 0, 3, 1])
        index = torch.arange(64).view(2, 4, 2, 4).transpose(1, 2).reshape(4, 16)
        permuted = torch.empty(64, dtype=torch.long)
        permuted[index.flatten()] = index[order].flatten()
        given = {"grid": grid, "window": window, "pool": None, "backend": backend}
        plain = gri_attention(q, k, v, **given)
        moved = gri_attention(*(x[:, :, permuted] for x in (q, k, v)), **given)
        assert torch.equal(moved, plain[:, :, permuted])

    def test_cells_may_be_permuted_within(self, backend):
        """Without regions, only the means of cells matter."""
        q, k, v = drawn((4, 6), **self.like)
        given = {"grid": (4, 6), "window": None, "pool": (2, 6), "backend": backend}
        plain = gri_attention(q, k, v, **given)
        order = torch.cat([torch.randperm(12), 12 + torch.randperm(12)])
        moved = gri_attention(q, k[:, :, order], v[:, :, order], **given)
        torch.testing.assert_close(moved, plain, **self.close)


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(1, 2, 6, 3, **like) for _ in range(3))
    gate = torch.randn(2, **like)
    for interaction in INTERACTIONS:
        given = {"grid": (2, 3), "window": (1, 2), "pool": (2, 2), "interaction": interaction}
        if interaction == "gated":
            torch.autograd.gradgradcheck(
                lambda q, k, v, g, a=given: gri_attention(q, k, v, gate=g, **a), (q, k, v, gate)
            )
        else:
            torch.autograd.gradgradcheck(lambda q, k, v, a=given: gri_attention(q, k, v, **a), (q, k, v))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_gradients_of_16_bits(dtype, most, size):
    """They are computed in float32: products of numbers around 100 overflow float16 before they are scaled."""
    values = [x.to(dtype) for x in drawn((8, 8), dtype=torch.float32)]
    values = [values[0] * size, values[1] * size, values[2]]
    given = {"grid": (8, 8), "window": 4, "pool": 2, "scale": 8**-0.5 / size**2}
    gradients = []
    for as_dtype in (dtype, torch.float64):
        leaves = [x.detach().to(as_dtype, copy=True).requires_grad_() for x in values]
        gri_attention(*leaves, **given).backward(values[2].to(as_dtype))
        gradients.append([x.grad.double() for x in leaves])
    for actual, exact in zip(*gradients, strict=True):
        assert (actual - exact).norm() <= most * exact.norm()


def test_autocast():
    q, k, v = drawn((4, 4), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gri_attention(q, k, v, grid=(4, 4), window=2, pool=2)
    assert y.dtype == torch.bfloat16
    expected = gri_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), grid=(4, 4), window=2, pool=2)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"window": 2.0}, r"window: .*2\.0"), ({"pool": "22"}, "pool: .*'22'"), ({"grid": (4, 4.0)}, r"grid: .*4\.0")],
)
def test_sizes_that_are_no_integers(given, says):
    q, k, v = drawn((4, 4))
    with pytest.raises(TypeError, match=says):
        gri_attention(q, k, v, **{"grid": (4, 4), "window": 2, "pool": 2} | given)


def test_sides():
    q, k, v = drawn((4, 4))
    expected = gri_attention(q, k, v, grid=(4, 4), window=(2, 2), pool=(2, 2))
    two = torch.tensor(2)
    assert torch.equal(gri_attention(q, k, v, grid=torch.Size([4, 4]), window=two, pool=2), expected)


def test_packed_projections_are_read_where_they_are():
    together = torch.randn(2, 16, 3, 4, 8)
    q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    y = gri_attention(q, k, v, grid=(4, 4), window=2, pool=2)
    assert y.transpose(1, 2).flatten(2).data_ptr() == y.data_ptr()
    torch.testing.assert_close(
        y, gri_attention(q.contiguous(), k.contiguous(), v.contiguous(), grid=(4, 4), window=2, pool=2)
    )
