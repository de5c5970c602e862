"""A table of subtrees or leaves on a console."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_LEAST_NAME, _PADDING = 20, 3


def new_table(columns: Sequence[str], left: int = 0) -> Table:
    """Returns a table without rows, with a column of names before these.

    Args:
      columns: The headers.
      left: How many of the columns are aligned at the left.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(overflow="fold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i >= left else "left", no_wrap=True)
    return table


def console_text(
    shown: Any, console: Console, rows: Sequence[Sequence[str]], least: int, name: int = _LEAST_NAME
) -> str:
    """Returns the text that a console would print, without a line break at its end.

    The lines are longer than the console if it is too narrow for the table.

    Args:
      shown: What to print.
      console: The console. Its width is set to that of the table, if it is narrower.
      rows: The rows of cells after the names, with the headers.
      least: The least width.
      name: The least width of the column of names.
    """
    widths = [max(map(len, column)) + _PADDING for column in zip(*rows, strict=True)]
    console.width = max(console.width, name + sum(widths), least)
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
