"""Which implementation of a convolution is the fastest on a CUDA device: data, measured by ``python -m bench tune``.

``measured.json`` of this package holds what has been measured so far; a file that ``$FASTSD_MEASURED`` names, read
once, goes first. A convolution that nobody has measured is left to the order of the backends, which begins with
``"direct"``: cuDNN between this library's passes. A file looks like this::

    {"cuda:9.0": [{"kernel": 3, "stride": 1, "channels": 320, "out_channels": 320, "height": 64, "width": 64,
                   "fastest": "triton 128x64"}]}

with the size of the result, and one of :data:`IMPLEMENTATIONS`. It speaks of channels-last maps of float16 or bfloat16
at the batch that was measured, 2 unless that was chosen otherwise; it is used for any batch.
"""

import functools
import json
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels.conv2d.triton_tiles import TILES, Tile
from fastsd_kernels.layout import is_channels_last, output_size

ENVIRONMENT_VARIABLE = "FASTSD_MEASURED"
PACKAGE_FILE = Path(__file__).with_name("measured.json")

DIRECT, IMPLICIT_GEMM, TRITON = "direct", "implicit_gemm", "triton "
# The first two are algorithms of the CUDA backend
IMPLEMENTATIONS = (DIRECT, IMPLICIT_GEMM, *(TRITON + name for name in TILES))
MOST = 1 << 20  # of any size


class Shape(NamedTuple):
    """A convolution, apart from its batch; height and width are the result's."""

    kernel: int
    stride: int
    channels: int
    out_channels: int
    height: int
    width: int


Table = dict[Shape, str]
_forced: ContextVar[str | None] = ContextVar("forced", default=None)


def fastest(
    x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], upsample_size: Sequence[int] | None
) -> str | None:
    """The one of :data:`IMPLEMENTATIONS` that was measured to be the fastest, ``None`` where nobody has measured."""
    if x.element_size() != 2:
        return None
    if (name := _forced.get()) is not None:
        return name
    if x.device.type != "cuda" or not (table := _table_of(x.device)) or not is_channels_last(x):
        return None
    height, width = output_size(upsample_size or x.shape[2:], weight.shape[2], stride, padding)
    return table.get(Shape(weight.shape[2], stride, weight.shape[1], weight.shape[0], height, width))


def fastest_of_block(x: Tensor, *weights: Tensor | None) -> list[str | None]:
    """:func:`fastest` of each convolution of a residual block, whose map keeps its size."""
    return [fastest(x, w, 1, [w.shape[2] // 2] * 4, None) for w in weights if w is not None]


def tile(name: str | None) -> Tile | None:
    """The tile of an implementation in Triton, ``None`` of any other."""
    return TILES[name.removeprefix(TRITON)] if name is not None and name.startswith(TRITON) else None


def backend(name: str | None) -> str | None:
    """The backend of an implementation."""
    return None if name is None else "cuda" if tile(name) is None else "triton"


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Meanwhile ``name`` counts as the fastest for every convolution, on any device: to measure and to test it."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def key(capability: tuple[int, int]) -> str:
    """What a file calls the devices of a compute capability."""
    return "cuda:{}.{}".format(*capability)


def read(path: Path) -> dict[str, Table]:
    """The tables of a file, by :func:`key`.

    Raises:
        ValueError: it is none of ``python -m bench tune --into``.
        OSError: it cannot be read.
    """
    try:
        devices = json.loads(path.read_text())
        return {_checked_key(name): _checked_rows(rows) for name, rows in devices.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a file of `python -m bench tune --into`; {type(error).__name__}: {error}"
        ) from None


def as_json(tables: dict[str, Table]) -> dict[str, list[dict[str, Any]]]:
    """What :func:`read` reads."""
    return {
        name: [{**shape._asdict(), "fastest": fastest} for shape, fastest in sorted(table.items())]
        for name, table in sorted(tables.items())
    }


@functools.cache
def _table_of(device: torch.device) -> Table:
    name = key(torch.cuda.get_device_capability(device))
    table = read(PACKAGE_FILE).get(name, {})
    if own := os.environ.get(ENVIRONMENT_VARIABLE):
        try:
            table = table | read(Path(own)).get(name, {})
        except (OSError, ValueError) as error:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}: {error}") from None
    return table


def _checked_key(name: str) -> str:
    if not re.fullmatch(r"cuda:[0-9]{1,2}\.[0-9]", name):
        raise ValueError(f"expected a device like 'cuda:9.0'; got {reprlib.repr(name)}")
    return name


def _checked_rows(rows: list[dict[str, Any]]) -> Table:
    table = dict(map(_checked_row, rows))
    if len(table) != len(rows):
        raise ValueError("expected each convolution once")
    return table


def _checked_row(row: dict[str, Any]) -> tuple[Shape, str]:
    sizes = {name: row[name] for name in Shape._fields}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= MOST:
            raise ValueError(f"{name}: expected an integer from 1 to {MOST}; got {reprlib.repr(size)}")
    if row["fastest"] not in IMPLEMENTATIONS:
        raise ValueError(f"fastest: expected one of {', '.join(IMPLEMENTATIONS)}; got {reprlib.repr(row['fastest'])}")
    return Shape(**sizes), row["fastest"]
