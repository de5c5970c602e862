"""What is frozen, and what that saves, to be looked at."""

import dataclasses
import functools
import io
import operator
import re
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.table import Table
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from freeze_optax._report.counts import Counts, LeafCounts, Status
from freeze_optax._report.outline import Entry, Line, Node, build_outline, shown_lines
from freeze_optax._report.plot import draw_outline
from freeze_optax._report.state_bytes import StateBytes, state_bytes
from freeze_optax._rows.rows import Flag
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._state.shared_buffers import check_ties, first_of_buffer
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves
from freeze_optax._tree.messages import printable

_STYLES: dict[Status, str] = {"trainable": "green", "frozen": "cyan", "partial": "yellow"}

# For notebooks, where a page may be white or black: green, yellow and cyan to be read on both. No
# other of the eight is in a summary. What is dim is half-way between the page and its text.
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_ANSI = [*[_BLACK] * 2, (30, 140, 70), (170, 115, 0), *[_BLACK] * 2, (20, 140, 150), _BLACK]
_THEME = TerminalTheme(_WHITE, _BLACK, _ANSI)
_HTML = '<pre style="line-height: normal; white-space: pre; overflow-x: auto">{code}</pre>'
_HTML_WIDTH = 100
_LEAST_NAME, _LONGEST, _PADDING = 20, 40, 3
_ROOT = "(the params)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Counts):
    """A subtree of the params in a `Summary`; of optimizer state it has the statistics alone.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layer_0": jnp.ones(3), "layer_1": jnp.ones(3), "head": jnp.ones(2)}
      >>> [(row.path, row.status, row.total) for row in fo.summary(params, "layer_*").rows]
      [('head', 'trainable', 2), ('layer_{0..1}', 'frozen', 6)]

    Attributes:
      path: Its key path; where repeated layers are folded, a glob that matches them all.
      status: `"trainable"`, `"frozen"` or `"partial"`.
      same_as: The path of the leaf with which it shares its buffer, and which counts for both.
    """

    path: str
    status: Status
    same_as: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Summary(Counts):
    """What is frozen, subtree by subtree; a table for terminals and notebooks.

    `freeze_optax.summary` makes it. It has the counts of all params, with counters and clocks in
    `state_bytes`, and is equal to another with the same counts and rows.

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(3), "head": jnp.ones(2)}
      >>> fo.summary(params, "encoder")
                            parameters      bytes
      ───────────────────────────────────────────
      encoder   frozen               3   12 bytes
      head      trainable            2    8 bytes
      <BLANKLINE>
      parameters: 20 bytes, of which 8 bytes train
      trainable: 2 of 5 parameters (40.00%)

    Attributes:
      total: How many parameters there are, as every element of an array counts as one.
      trainable: How many of them train.
      frozen: How many don't.
      trainable_bytes: Bytes of those that train.
      frozen_bytes: Bytes of those that don't.
      state_bytes: Bytes of the optimizer state; None if not known.
      saved_bytes: Bytes more that it would take with nothing frozen; None if not known.
      rows: The subtrees, each a `Row`, before those in it.
    """

    rows: list[Row]
    _root: Node = dataclasses.field(compare=False)
    _lines: list[Line] = dataclasses.field(compare=False)
    _depth: int | None = dataclasses.field(compare=False)

    @property
    def headline(self) -> str:
        """The last line of the table: how many parameters train, of how many.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder").headline
          'trainable: 2 of 5 parameters (40.00%)'
        """
        percent = 100 * self.trainable / max(self.total, 1)
        return f"trainable: {self.trainable:,} of {self.total:,} parameters ({percent:.2f}%)"

    def to_dict(self) -> dict[str, Any]:
        """The attributes by their names, the rows as dicts: ready for JSON.

        Examples:
          >>> import json
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> summary = fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder")
          >>> json.loads(json.dumps(summary.to_dict()))["rows"][0]["path"]
          'encoder'

        Returns:
          A dict of numbers, of None for what is not known, and of `rows`, a list of dicts.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        public = {name: value for name, value in fields.items() if not name.startswith("_")}
        rows = [{"path": row.path, **dataclasses.asdict(row)} for row in self.rows]
        return {**public, "rows": rows}

    def to_markdown(self) -> str:
        """The table in Markdown, paths written in full.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> params = {"encoder": jnp.ones(3), "head": jnp.ones(2)}
          >>> print(fo.summary(params, "encoder").to_markdown())
          |  |  | parameters | bytes |
          | --- | --- | ---: | ---: |
          | `encoder` | frozen | 3 | 12 bytes |
          | `head` | trainable | 2 | 8 bytes |
          <BLANKLINE>
          parameters: 20 bytes, of which 8 bytes train
          <BLANKLINE>
          trainable: 2 of 5 parameters (40.00%)

        Returns:
          A table, and below it the lines that the printed one ends with.
        """
        header = ["", *self._columns]
        cells = [[_named(row), *self._cells(row)] for row in self.rows]
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        table = ["| " + " | ".join(row) + " |" for row in [header, rule, *cells]]
        return "\n\n".join(["\n".join(table), *self._notes(), self.headline])

    def plot(self, ax: Any = None) -> Any:
        """Draws the params: height means parameters, colour what is frozen.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> axes = fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder").plot()
          >>> axes.get_title(loc="left")
          'trainable: 2 of 5 parameters (40.00%)'

        Args:
          ax: The matplotlib axes to draw into; None for new ones.

        Returns:
          The axes.

        Raises:
          ImportError: If matplotlib, the extra `freeze_optax[plot]`, is not installed.
        """
        return draw_outline(self._root, self._depth, self.headline, ax)

    @functools.cached_property
    def _columns(self) -> list[str]:
        state = [] if all(row.state_bytes is None for row in self.rows) else ["optimizer state"]
        return ["", "parameters", "bytes", *state]

    def _cells(self, row: Row) -> list[str]:
        size = decimal(row.trainable_bytes + row.frozen_bytes)
        state = "" if row.state_bytes is None else decimal(row.state_bytes)
        return [row.status, f"{row.total:,}", size, state][: len(self._columns)]

    def _notes(self) -> list[str]:
        parts = [decimal(self.trainable_bytes + self.frozen_bytes), decimal(self.trainable_bytes)]
        notes = [f"parameters: {parts[0]}, of which {parts[1]} train"]
        if self.state_bytes is not None:
            # After a thaw it may be a few bytes more: the counters of another cohort.
            saved = self.saved_bytes or 0
            less = f", {decimal(saved)} less than with nothing frozen" if saved > 0 else ""
            notes.append(f"optimizer state: {decimal(self.state_bytes)}{less}")
        return notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column(overflow="fold")
        for i, name in enumerate(self._columns):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row, line in zip(self.rows, self._lines, strict=True):
            name = Text("  " * max(line.level, 0) + _name(line))
            name.append(f" = {printable(row.same_as)}" if row.same_as else "", "dim")
            status, *rest = self._cells(row)
            table.add_row(name, Text(status, _STYLES[row.status]), *rest)
        yield table
        yield Text()
        for note in self._notes():
            yield Text(note)
        yield Text(self.headline, "bold", overflow="fold")

    def render(self, console: Console) -> str:
        """What a console would print, in its colours; lines longer than it, if it is too narrow.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> from rich.console import Console
          >>> summary = fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder")
          >>> summary.render(Console(color_system=None)) == str(summary)
          True

        Args:
          console: A console of rich. It is made as wide as the table needs.

        Returns:
          The text, without a line break at its end.
        """
        cells = [self._columns, *map(self._cells, self.rows)]
        widths = [max(map(len, column)) + _PADDING for column in zip(*cells, strict=True)]
        console.width = max(console.width, _LEAST_NAME + sum(widths), len(self.headline))
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __repr__(self) -> str:
        return self.render(Console(color_system=None, force_jupyter=False))

    def _repr_html_(self) -> str:
        options: dict[str, Any] = {"force_jupyter": False, "color_system": "standard"}
        console = Console(file=io.StringIO(), record=True, width=_HTML_WIDTH, **options)
        console.print(self)
        return console.export_html(theme=_THEME, code_format=_HTML, inline_styles=True)


def _named(row: Row) -> str:
    return _code(row.path) + (f" = {_code(row.same_as)}" if row.same_as else "")


def _code(path: str) -> str:
    """A path as code in Markdown: between more backticks than there are in it."""
    path = printable(path) or _ROOT
    fence = "`" * (1 + max(map(len, re.findall("`+", path)), default=0))
    space = " " if path.startswith("`") or path.endswith("`") else ""
    return f"{fence}{space}{path}{space}{fence}".replace("|", "\\|")


def _name(line: Line) -> str:
    if line.level < 0:
        return _ROOT
    name = printable(line.node.name) or '""'
    # A glob may list hundreds of numbers: every other layer, say. The row has them all.
    is_long = line.node.count > 1 and len(name) > _LONGEST
    return f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 4 :]}" if is_long else name


def summary(
    params: Any, frozen: Spec = nothing, optimizer: Any = None, depth: int | None = None
) -> Summary:
    """Counts what is frozen and what trains, subtree by subtree, and what that saves.

    Every element of an array counts as a parameter; leaves that share a buffer count once, and
    leaves that cannot be trained (integers, PRNG keys) as frozen. Nothing is computed and no
    memory taken: leaves may be abstract, and states are.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> layer = {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)}
      >>> encoder = {f"layer_{i}": layer for i in range(12)}
      >>> params = {"encoder": encoder, "head": {"kernel": jnp.zeros((768, 2))}}
      >>> fo.summary(params, "encoder/layer_{0..9}", optax.adamw(1e-3))
                                     parameters     bytes   optimizer state
      ─────────────────────────────────────────────────────────────────────
      encoder            partial      7,077,888   28.3 MB            9.4 MB
        layer_{0..9}     frozen       5,898,240   23.6 MB           0 bytes
        layer_{10..11}   trainable    1,179,648    4.7 MB            9.4 MB
      head               trainable        1,536    6.1 kB           12.3 kB
      <BLANKLINE>
      parameters: 28.3 MB, of which 4.7 MB train
      optimizer state: 9.4 MB, 47.2 MB less than with nothing frozen
      trainable: 1,181,184 of 7,079,424 parameters (16.68%)
      >>> fo.summary(params, "encoder").trainable
      1536

    Args:
      params: The params, a pytree of arrays; `jax.ShapeDtypeStruct` will do.
      frozen: What is frozen: any spec, see `freeze_optax.mask`. Of an optimizer state, or a tree
        or list with one, the bytes are counted as they are, parked leaves and cohorts included, and
        the step of `freeze_optax.scheduled`; what else stands around the `freezable` (an
        accumulator, say) counts if `optimizer` is given.
      optimizer: The optimizer whose state is to be counted: a plain one, or one with a `freezable`
        in it, whose own spec does not count here. Not needed where `frozen` is a state.
      depth: How many levels of the tree to show, every node of them in a row of its own. Without
        it repeated layers are folded, and a subtree is opened where only a part of it trains.

    Returns:
      The summary: printed, a table; see its attributes, `to_dict`, `to_markdown` and `plot`.

    Raises:
      ValueError: If the spec does not fit the params, or freezes one of two leaves that share a
        buffer, if `depth` is negative, if the optimizer holds several `freezable`s, or if
        `frozen` is a state that is not one of the optimizer.
      IndexError: If the spec is one of the layers, by an index that is out of range.
      TypeError: If the params are None, a mask holds anything but bools, `optimizer` is no
        transformation, or `depth` no integer.
    """
    depth = None if depth is None else _levels(depth)
    leaves = param_leaves(params)
    flags = resolve(frozen, leaves)
    check_ties(leaves, flags)
    now, whole = state_bytes(params, frozen, flags, optimizer)
    root = build_outline(_entries(leaves, flags, now, whole), folded=depth is None)
    shown = shown_lines(root, depth)
    counts = root.tally.to_dict()
    counts["state_bytes"] = now.total if now else None
    counts["saved_bytes"] = whole.total - now.total if now and whole else None
    rows = [
        Row(**x.tally.to_dict(), path=x.path, status=x.tally.status, same_as=x.node.note)
        for x in shown
    ]
    return Summary(**counts, rows=rows, _root=root, _lines=shown, _depth=depth)


def _levels(depth: Any) -> int:
    if isinstance(depth, bool) or not hasattr(depth, "__index__"):
        raise TypeError(f"depth is a number of levels, an int, not {depth!r}")
    if depth < 0:
        raise ValueError(f"depth is a number of levels, 0 or more, not {depth!r}")
    return operator.index(depth)


def _entries(
    leaves: Leaves, flags: list[Flag], now: StateBytes | None, whole: StateBytes | None
) -> Iterator[Entry]:
    same = first_of_buffer(leaves)
    unknown: list[int | None] = [None] * len(leaves.values)
    state = now.by_leaf if now else unknown
    unfrozen = whole.by_leaf if whole else unknown
    for i, (path, leaf, flag) in enumerate(zip(leaves.paths, leaves.values, flags, strict=True)):
        kept, most = state[i], unfrozen[i]
        saved = None if kept is None or most is None else most - kept
        tally = LeafCounts.of_leaf(leaf, flag, i in same).with_state(kept, saved)
        kind = (leaf.shape, leaf.dtype) if is_array(leaf) else type(leaf)
        note = leaves.paths[same[i]] if i in same else ""
        yield Entry(path, tally, (tally, kind, note), note)
