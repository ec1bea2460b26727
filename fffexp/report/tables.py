"""Rows as a table of text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = 120


def table(
    rows: Sequence[Mapping[str, Any]],
    formats: Mapping[str, str] | None = None,
    width: int | None = None,
    wrap: Sequence[str] = (),
) -> str:
    """The rows under the names of their columns; numbers to the right, a column without any value left out.

    The first row has all names, in order. Formats are of a column's numbers, such as {"mean": ".2f"}. What is wider
    than a width is wrapped, at first in the columns that `wrap` names.
    """
    if not rows:
        return ""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="", show_edge=False)
    names = [name for name in rows[0] if any(row.get(name) is not None for row in rows)]
    for name in names:
        numbers = all(isinstance(row.get(name), int | float | None) for row in rows)
        made.add_column(Text(name), justify="right" if numbers else "left", no_wrap=name not in wrap, overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(row.get(name), (formats or {}).get(name, ""))) for name in names))
    file = io.StringIO()
    Console(file=file, width=width or 10_000, color_system=None, legacy_windows=False).print(made)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _cell(value: Any, spec: str) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return format("" if value is None else value, spec if number else "")
