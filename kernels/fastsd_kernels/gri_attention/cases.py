"""The inputs that gri_attention is tried with."""

from collections.abc import Iterator
from typing import Any

import torch

from fastsd_kernels.testing.inputs import BadSample, Sample, random_tensor
from fastsd_kernels.testing.tokens import LAYOUTS, tokens

# Constants of the Triton backend with which these samples take the paths of large inputs:
# several tiles of queries and of keys in each window, tiles of keys that are masked whole, cells added up in steps
SMALL_TILES = {
    "attention.MOST_M": 32,
    "attention.MOST_N": 32,
    "attention.MOST_Q_ELEMENTS": 1,
    "attention.MOST_K_ELEMENTS": 1,
    "POOLED_ELEMENTS": 32,
}

# As many keys as the CPU takes in several steps keep Triton's interpreter busy for a minute; long_windows have several
# tiles of queries, of their keys and of cells too
NOT_INTERPRETED = ("many_keys",)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every awkward input of the contract, small enough for an interpreter."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    def sample(
        name: str, grid: tuple[int, int], width: int = 8, heads: int = 2, batch: int = 1, layout: str = "contiguous",
        **given: Any,
    ) -> Sample:  # fmt: skip
        q, k, v = tokens(batch, heads, grid[0] * grid[1], width, layout, **like)
        return Sample(name, {"q": q, "k": k, "v": v, "grid": grid, "window": (4, 4), "pool": (2, 2)} | given)

    for layout in LAYOUTS:
        yield sample(layout, (8, 8), layout=layout, batch=2)
    for interaction, *layouts in (
        ("joint", "contiguous", "token_major", "packed"),
        ("joint", "packed", "contiguous", "token_major"),
        ("agent", "token_major", "packed", "contiguous"),
    ):
        q, k, v = (tokens(2, 2, 64, 8, layout, **like)[i] for i, layout in enumerate(layouts))
        name = f"{'_'.join(layouts)}_as_q_k_v_{interaction}"
        yield sample(name, (8, 8), q=q, k=k, v=v, interaction=interaction)
    for width in (40, 64, 80, 160, 1, 7, 33):
        yield sample(f"width_{width}", (8, 4), width)
    for name, grid, window, pool in (
        ("ragged", (7, 9), (4, 4), (2, 2)),
        ("ragged_cells", (8, 8), (4, 4), (3, 3)),
        ("oblong", (5, 12), (2, 8), (5, 3)),
        ("one_row", (1, 23), (1, 8), (1, 4)),
        ("one_column", (23, 1), (8, 1), (4, 1)),
        ("window_of_one", (3, 5), (1, 1), (2, 2)),
        ("pool_of_one", (6, 5), (3, 3), (1, 1)),
        ("one_cell", (6, 5), (3, 3), (6, 5)),
        ("window_is_the_map", (6, 5), (6, 5), (2, 2)),
        ("window_beyond_the_map", (6, 5), (64, 64), (2, 2)),
        ("long_windows", (3, 20), (2, 17), (1, 1)),
        ("many_keys", (24, 24), (17, 17), (1, 1)),
        ("only_regions", (7, 9), (4, 4), None),
        ("only_cells", (7, 9), None, (2, 2)),
        ("all_tokens_as_cells", (7, 9), None, (1, 1)),
    ):
        yield sample(name, grid, window=window, pool=pool)
        if window is not None and pool is not None:
            yield sample(f"{name}_masked", grid, window=window, pool=pool, mask_own_window=True)
            gate = random_tensor((2,), **like, seed=9)
            for masked in (False, True):
                yield sample(
                    f"{name}_gated{'_masked' * masked}", grid, window=window, pool=pool, mask_own_window=masked,
                    interaction="gated", gate=gate,
                )  # fmt: skip
        if pool is not None:
            yield sample(f"{name}_agent", grid, window=window, pool=pool, interaction="agent")
    wide_gate = random_tensor((2,), device, torch.float32, seed=9)
    yield sample("gate_of_another_dtype", (8, 8), interaction="gated", gate=wide_gate)
    yield sample("own_scale", (8, 8), scale=0.7)
    yield sample("no_scale", (8, 8), scale=0.0)
    yield sample("negative_scale", (8, 8), scale=-0.5)
    yield sample("three_heads", (8, 8), heads=3, layout="token_major")
    yield sample("one_token", (1, 1), window=(1, 1), pool=(1, 1))
    yield sample("empty_batch", (4, 4), batch=0)
    yield sample("no_heads", (4, 4), heads=0)

    far = sample("large_scores", (8, 8)).kwargs
    # a softmax that does not take the maximum off overflows, here at e^400
    yield Sample("large_scores", far | {"q": far["q"] * 100})
    yield Sample("one_key_wins", far | {"q": far["q"] * 1000})
    near = sample("equal_scores", (8, 8)).kwargs
    yield Sample("equal_scores", near | {"k": near["k"][:, :, :1].expand_as(near["k"])})
    yield Sample("large_values", near | {"v": near["v"] * 1000 + 3000})
    gated: dict[str, Any] = {"interaction": "gated", "gate": random_tensor((2,), **like, seed=9)}
    for name, value in (("nan", torch.nan), ("inf", torch.inf), ("minus_inf", -torch.inf)):
        for of in ("v", "k", "q", "gated_q"):
            if name != "minus_inf" or "q" in of:
                broken = sample(name, (8, 8), **(gated if "gated" in of else {})).kwargs
                broken[of[-1]] = broken[of[-1]].clone()
                broken[of[-1]][0, 1, 5, 3] = value
                yield Sample(f"{name}_in_{of}", broken)


def large_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Sizes where a 16-bit grid dimension would overflow."""
    for layout in ("contiguous", "token_major"):
        q, k, v = tokens(65_537, 2, 4, 2, layout, device=device, dtype=dtype)
        yield Sample(
            f"batch_65537_{layout}", {"q": q, "k": k, "v": v, "grid": (2, 2), "window": (1, 1), "pool": (1, 1)}
        )


def bad_samples(device: torch.device | str) -> Iterator[BadSample]:
    """Calls that must be refused, with what the message must name."""
    q = random_tensor((2, 3, 12, 8), device, torch.float32)
    given = {"q": q, "k": q, "v": q, "grid": (3, 4), "window": 2, "pool": 2}

    def bad(name: str, error: type[Exception], says: tuple[str, ...], **changes: Any) -> BadSample:
        return BadSample(name, given | changes, error, says)

    yield bad("three_dimensions", ValueError, ("q", "(3, 12, 8)"), q=q[0])
    yield bad("heads", ValueError, ("k", "(2, 3, 12, 8)", "(2, 2, 12, 8)"), k=q[:, :2])
    yield bad("tokens_of_v", ValueError, ("v", "(2, 3, 12, 8)", "(2, 3, 11, 8)"), v=q[:, :, 1:])
    yield bad("no_width", ValueError, ("q", "width", "(2, 3, 12, 0)"), q=q[..., :0], k=q[..., :0], v=q[..., :0])
    yield bad("grid", ValueError, ("grid", "12", "(3, 5)"), grid=(3, 5))
    yield bad("negative_grid", ValueError, ("grid", "12", "(-3, -4)"), grid=(-3, -4))
    none = q[:, :, :0]
    yield bad("no_tokens", ValueError, ("grid", "0", "(0, 4)"), q=none, k=none, v=none, grid=(0, 4))
    yield bad("window_of_0", ValueError, ("window", "at least 1", "(0, 0)"), window=0)
    yield bad("pool_of_0", ValueError, ("pool", "at least 1", "(2, 0)"), pool=(2, 0))
    yield bad("pool_beyond_the_map", ValueError, ("pool", "(3, 4)", "(4, 4)"), pool=4)
    yield bad("no_keys", ValueError, ("window, pool",), window=None, pool=None)
    yield bad("interaction", ValueError, ("interaction", "joint, gated, agent", "'both'"), interaction="both")
    yield bad("gated_without_a_gate", ValueError, ("interaction", "gate"), interaction="gated")
    yield bad("agent_without_cells", ValueError, ("interaction", "pool"), interaction="agent", pool=None)
    yield bad("gate_of_another_interaction", ValueError, ("gate", "'joint'"), gate=q.new_ones(3))
    yield bad("gate_shape", ValueError, ("gate", "(3,)", "(2,)"), interaction="gated", gate=q.new_ones(2))
    yield bad("mask_without_cells", ValueError, ("mask_own_window",), mask_own_window=True, pool=None)
    yield bad("scale", ValueError, ("scale", "nan"), scale=float("nan"))
    yield bad("integer_q", TypeError, ("q", "floating-point", "int64"), q=q.long())
    yield bad("dtype_of_k", TypeError, ("k", "float32", "float16"), k=q.half())
    yield bad("gate_dtype", TypeError, ("gate", "int32"), interaction="gated", gate=q.new_ones(3).int())
    yield bad("device_of_v", ValueError, ("v", "cpu", "meta"), v=q.to("meta"))
    yield bad("backend_name", ValueError, ("backend", "'numpy'"), backend="numpy")
