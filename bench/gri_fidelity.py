"""``python -m bench gri-fidelity``: how far GRI and token merging are from full attention, against what they cost.

Nothing here is an image: features are random fields on a map, of pink noise (smooth, as latents are) or of white noise,
and projections are random, with queries and keys alike in part. So the numbers compare methods; they do not foretell
what a model does.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from fastsd.cli.table import text_table
from fastsd_kernels import gri_attention
from fastsd_kernels.gri_attention.geometry import cell_count

SIDE, HEADS, WIDTH = 64, 8, 40
SIZES = (4, 8, 16, 32)
FIELDS = {"pink": 1.0, "white": 0.0}  # by how the amplitude falls with frequency
SHARPNESS = 2.0  # standard deviation of the scores before softmax
LIKENESS = 0.7  # correlation of a token's query with its own key
BLOCK = 4  # token merging keeps at least one token of a block of so many by so many
MATCHING = (1 - 1 / BLOCK**2) / BLOCK**2 / 2  # what it pays for finding out which, of full attention's MACs
LABELS = {"GRI": "GRI", "windows": "windows alone", "merging": "token merging"}


@dataclass(frozen=True)
class Row:
    """One method on one kind of field.

    Attributes:
        macs: products of queries and keys, and of weights and values, relative to full attention; of token merging also
            those of sources and destinations, of which there are as many numbers as a query has in all heads.
        error: relative L2 distance of the result from full attention.
        mass: how much of full attention's weight falls on keys that the method reads one by one; ``None`` where these
            are not the same for all heads.
    """

    field: str
    method: str
    macs: float
    error: float
    mass: float | None


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("gri-fidelity", help="how far GRI and token merging are from full attention")
    harness.add_result_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    if options.plot:
        harness.check_plot(options.plot)
    rows = read(options.source) if options.source else list(compute())
    if options.json:
        harness.write_json(options.json, {"commit": harness.commit(), "rows": list(map(asdict, rows))})
    print(f"{SIDE}x{SIDE} tokens, {HEADS} heads of {WIDTH}, scores of standard deviation {SHARPNESS:g}, float32")
    print(table(rows))
    if options.plot:
        plot(options.plot, rows)
    return 0


def read(path: Path) -> list[Row]:
    """The rows of a result file."""
    try:
        return [Row(**row) for row in json.loads(path.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--from: expected a file of `bench gri-fidelity --json`; {path}: {error!r}") from error


@torch.no_grad()
def compute() -> Iterator[Row]:
    grid, tokens = (SIDE, SIDE), SIDE**2
    for field, fall in FIELDS.items():
        x = noise(fall, HEADS * WIDTH)
        q, k, v = projections(x)
        full = F.scaled_dot_product_attention(q, k, v)
        weights = own_mass(q, k, grid)
        for window in tqdm(SIZES, desc=field, leave=False, disable=None):
            for pool in SIZES:
                y = gri_attention(q, k, v, grid=grid, window=window, pool=pool)
                keys = window**2 + cell_count(grid, (pool, pool))
                yield Row(field, f"GRI w{window} s{pool}", keys / tokens, distance(y, full), weights[window])
                kept = max(math.ceil(math.sqrt(tokens * keys)), tokens // BLOCK**2)
                merged = attend_merged(x, q, k, v, tokens - kept)
                yield Row(field, f"merging to {kept}", (kept / tokens) ** 2 + MATCHING, distance(merged, full), None)
            alone = gri_attention(q, k, v, grid=grid, window=window, pool=None)
            yield Row(field, f"windows w{window} alone", window**2 / tokens, distance(alone, full), weights[window])


def noise(fall: float, channels: int, seed: int = 0) -> Tensor:
    """``[N, channels]``: random fields whose amplitude falls with frequency to this power, of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(channels, SIDE, SIDE, generator=generator, dtype=torch.float64)
    frequency = torch.hypot(torch.fft.fftfreq(SIDE)[:, None], torch.fft.fftfreq(SIDE)[None, :]).double()
    frequency[0, 0] = 1 / SIDE
    fields = torch.fft.ifft2(torch.fft.fft2(white) * frequency**-fall).real
    fields = (fields - fields.mean((1, 2), keepdim=True)) / fields.std((1, 2), keepdim=True)
    return fields.flatten(1).T.float()


def projections(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[1, heads, N, d]`` of random matrices; scores have the standard deviation SHARPNESS."""
    generator = torch.Generator().manual_seed(1)
    shared, other, values = (torch.randn(x.shape[1], HEADS * WIDTH, generator=generator) for _ in range(3))
    mixed = LIKENESS * shared + math.sqrt(1 - LIKENESS**2) * other
    q, k, v = ((x @ w).unflatten(1, (HEADS, WIDTH)).transpose(0, 1)[None] for w in (shared, mixed, values))
    some = q[:, :, ::7] @ k[:, :, ::7].mT / math.sqrt(WIDTH)
    return q * (SHARPNESS / some.std()), k, v / v.std()


def own_mass(q: Tensor, k: Tensor, grid: tuple[int, int]) -> dict[int, float]:
    """By the side of the windows, how much of full attention's weight falls into a query's own."""
    row, column = (i.flatten() for i in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    sums = dict.fromkeys(SIZES, 0.0)
    for head in range(q.shape[1]):
        weights = torch.softmax(q[0, head] @ k[0, head].T / math.sqrt(q.shape[3]), -1)
        for window in SIZES:
            own = row // window * grid[1] + column // window
            sums[window] += weights[own[:, None] == own].sum().item() / weights.shape[0] / q.shape[1]
    return sums


def attend_merged(x: Tensor, q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Attention among tokens of which ``count`` were merged into the token of ``x`` that each is most like.

    Bipartite soft matching (Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", 2023): one token of each
    block of BLOCK by BLOCK is a destination, and the sources with the largest cosine similarity to theirs are merged
    into them by the mean. Afterwards every source gets its destination's result.
    """
    index = torch.arange(x.shape[0]).view(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK).transpose(1, 2)
    blocks = index.reshape(-1, BLOCK**2)
    pick = torch.randint(BLOCK**2, (len(blocks), 1), generator=torch.Generator().manual_seed(2))
    destinations = blocks.gather(1, pick).flatten()
    is_source = torch.ones(x.shape[0], dtype=torch.bool)
    is_source[destinations] = False
    sources = is_source.nonzero().flatten()

    unit = F.normalize(x, dim=1)
    likeness, target = (unit[sources] @ unit[destinations].T).max(1)
    order = likeness.argsort(descending=True)
    goes, stays = order[:count], order[count:]
    # where each token's result is found among those that are left
    place = torch.empty(x.shape[0], dtype=torch.long)
    place[destinations] = torch.arange(len(destinations))
    place[sources[stays]] = len(destinations) + torch.arange(len(stays))
    place[sources[goes]] = target[goes]

    def merged(y: Tensor) -> Tensor:
        sums = y.new_zeros(*y.shape[:2], len(destinations) + len(stays), y.shape[3]).index_add_(2, place, y)
        return sums / torch.bincount(place)[:, None]

    return F.scaled_dot_product_attention(merged(q), merged(k), merged(v))[:, :, place]


def distance(y: Tensor, exact: Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def table(rows: list[Row]) -> str:
    def mass(row: Row) -> str:
        return "-" if row.mass is None else f"{row.mass:.0%}"

    return text_table(
        ("field", "method", "MACs", "relative error", "read one by one"),
        ((row.field, row.method, f"{row.macs:.1%}", f"{row.error:.3f}", mass(row)) for row in rows),
    )


def plot(path: Path, rows: list[Row]) -> None:
    """Error over cost, one panel for each kind of field."""
    from matplotlib.figure import Figure  # and no pyplot, which would choose a display for the whole process

    fields = list(dict.fromkeys(row.field for row in rows))
    figure = Figure(figsize=(5 * len(fields), 4.5), layout="constrained")
    panels = figure.subplots(1, len(fields), sharey=True, squeeze=False)[0]
    for axes, field in zip(panels, fields, strict=True):
        shown = [row for row in rows if row.field == field]
        for method, marker, line in (("GRI", "o", ""), ("windows", "s", ":"), ("merging", "x", ":")):
            points = sorted((row.macs, row.error) for row in shown if row.method.startswith(method))
            axes.plot(*zip(*points, strict=True), marker=marker, linestyle=line, label=LABELS[method])
        for row in shown:
            if row.method.startswith("GRI"):
                place = (row.macs, row.error)
                axes.annotate(row.method[4:], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlabel("MACs, of full attention's")
        axes.set_title(f"{field} noise")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the result")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
