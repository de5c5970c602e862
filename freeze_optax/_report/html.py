"""A summary as a table in HTML, for notebooks and web pages."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from freeze_optax._report.counts import Status

# All styles are inline, because notebooks remove stylesheets. A page may be white or black: each of
# these colours has a contrast of 4.5 with both. Other text keeps the colour of the page.
_COLOURS: dict[Status, str] = {"trainable": "#1e8744", "frozen": "#13828b", "partial": "#9e6b00"}
_TABLE = "border-collapse: collapse; font-variant-numeric: tabular-nums"
_CELL = "padding: 0.15em 0.8em; white-space: pre; border: none; text-align: "
_HEADER = f"{_CELL}%s; border-bottom: 1px solid"
_INDENT = 1.5
"""How far a level of the tree is to the right of the level above it, in em."""
_MARGIN = 0.4


class TableRow(NamedTuple):
    """A row of the table.

    Attributes:
      level: How many nodes are above the subtree; it says how far the name is to the right.
      name: The name of the subtree.
      path: Its whole path, which the page shows to a pointer that rests on the name.
      same_as: The path that it shares a buffer with, or "".
      status: Whether it trains; None in a table without a column for it.
      numbers: The cells after the status.
    """

    level: int
    name: str
    path: str
    same_as: str
    status: Status | None
    numbers: Sequence[str]


def table_as_html(
    columns: Sequence[str],
    rows: Iterable[TableRow],
    notes: Iterable[str],
    headline: str,
    has_status: bool = True,
) -> str:
    """Returns a table, and lines below it, as HTML.

    A table that is wider than the page scrolls by itself.

    Args:
      columns: The headers of the cells after the name: that of the status, then those of numbers.
      rows: The rows.
      notes: The lines below the table.
      headline: The last line, which is bold.
      has_status: Whether there is a column of the status.
    """
    headers = [f'<th scope="col" aria-label="subtree" style="{_HEADER % "left"}"></th>']
    if has_status:
        status, *columns = columns
        style = _HEADER % "left"
        headers += [f'<th scope="col" aria-label="status" style="{style}">{_text(status)}</th>']
    headers += [f'<th scope="col" style="{_HEADER % "right"}">{_text(x)}</th>' for x in columns]
    lines = [_text(note) for note in notes] + [f"<strong>{_text(headline)}</strong>"]
    parts = [
        '<div style="overflow-x: auto">',
        f'<table class="freeze-optax-summary" style="{_TABLE}">',
        f"<thead><tr>{''.join(headers)}</tr></thead>",
        "<tbody>",
        *map(_row, rows),
        "</tbody>",
        "</table>",
        "</div>",
        *(f'<p style="margin: 0.3em 0">{line}</p>' for line in lines),
    ]
    return "\n".join(parts)


def _row(row: TableRow) -> str:
    """Returns a row of the table as HTML."""
    left = _MARGIN + _INDENT * max(row.level, 0)
    name = _text(row.name)
    if row.same_as:
        name += f'<span style="opacity: 0.7"> = {_text(row.same_as)}</span>'
    title = f' title="{_text(row.path)}"' if row.path != row.name else ""
    style = f"{_CELL}left; padding-left: {left:g}em; font-weight: normal"
    cells = [f'<th scope="row"{title} style="{style}">{name}</th>']
    if row.status:
        cells += [f'<td style="{_CELL}left; color: {_COLOURS[row.status]}">{row.status}</td>']
    cells += [f'<td style="{_CELL}right">{_text(number)}</td>' for number in row.numbers]
    return f"<tr>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
