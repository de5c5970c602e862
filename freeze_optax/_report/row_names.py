"""The names of the rows of a summary: in the table, and in Markdown."""

import re

from freeze_optax._report.outline import Line
from freeze_optax._tree.messages import printable

ROOT = "(the params)"
_LONGEST = 40


def name_in_markdown(path: str, same_as: str) -> str:
    """Returns the path of a row in Markdown, and the path that it shares a buffer with."""
    return _code(path) + (f" = {_code(same_as)}" if same_as else "")


def _code(path: str) -> str:
    """Returns a path as code in Markdown, between more backticks than it contains."""
    path = printable(path) or ROOT
    fence = "`" * (1 + max(map(len, re.findall("`+", path)), default=0))
    space = " " if path.startswith("`") or path.endswith("`") else ""
    return f"{fence}{space}{path}{space}{fence}".replace("|", "\\|")


def name_in_table(line: Line) -> str:
    """Returns the name of a line for the table, shortened if it is a long glob."""
    if line.level < 0:
        return ROOT
    name = printable(line.node.name) or '""'
    # A glob may list hundreds of numbers, of every other layer say. `Row.path` has all of them.
    is_long = line.node.count > 1 and len(name) > _LONGEST
    return f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 4 :]}" if is_long else name
