"""Tables for the terminal and for Markdown."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"|-|[+-]?\d[\d.]*(e[+-]?\d+)?[×%]?")


def text_table(headers: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Aligned columns; numbers to the right; the last column wraps within ``width`` (default: the terminal's)."""
    cells = [[str(cell) for cell in row] for row in rows]
    width = width or max(80, shutil.get_terminal_size((120, 24)).columns)
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    start = sum(widths[:-1]) + 2 * (len(widths) - 1)
    widths[-1] = min(widths[-1], max(20, width - start))
    to_right = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first, *rest = textwrap.wrap(row[-1], widths[-1]) or [""]
        aligned = [
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip([*row[:-1], first], widths, to_right, strict=True)
        ]
        return "\n".join(["  ".join(aligned).rstrip(), *(" " * start + more for more in rest)])

    return "\n".join([line(headers), line(["─" * w for w in widths]), *(line(row) for row in cells)])


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same table in Markdown."""

    def line(row: Iterable[object]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"

    return "\n".join([line(headers), line("---" for _ in headers), *(line(row) for row in rows)])


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None
