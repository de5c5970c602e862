"""`summary`: a table of what is frozen and what that saves."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.text import Text

from freeze_optax._report.console import console_text, new_table
from freeze_optax._report.counts import Status
from freeze_optax._report.factors import factor_text, shows_factors
from freeze_optax._report.html import TableRow, table_as_html
from freeze_optax._report.memory import CountsByMemory
from freeze_optax._report.outline import Line, Node, build_outline, shown_lines
from freeze_optax._report.plot import draw_outline
from freeze_optax._report.resolved_params import resolve_params
from freeze_optax._report.row import Row, row_of_line
from freeze_optax._report.row_names import ROOT, name_in_markdown, name_in_table
from freeze_optax._rows.elements import Elements
from freeze_optax._select.dotted import Dotted, dotted_leaves
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, state_in_spec
from freeze_optax._state.rotation import Rotation
from freeze_optax._state.shared_buffers import check_ties
from freeze_optax._tree.messages import printable, quoted_list
from freeze_optax._tree.quantized import quantized_nodes

_STYLES: dict[Status, str] = {"trainable": "green", "frozen": "cyan", "partial": "yellow"}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Summary(CountsByMemory):
    """What is frozen, for each subtree; terminals and notebooks show it as a table.

    `freeze_optax.summary` makes it. Its counts are those of all params; `state_bytes` includes
    counters and clocks. Two summaries are equal if their counts and rows are equal.

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
      total: The number of parameters. Every element of an array counts as one.
      trainable: The number of parameters that train.
      frozen: The number of parameters that do not train.
      trainable_bytes: The bytes of the parameters that train.
      frozen_bytes: The bytes of the parameters that do not train.
      state_bytes: The bytes of the optimizer state; None if not known.
      saved_bytes: How many bytes more that state would have with nothing frozen; None if not known.
      rows: The subtrees, a `Row` for each; a subtree comes before those in it.
    """

    rows: list[Row]
    _root: Node = dataclasses.field(compare=False)
    _lines: list[Line] = dataclasses.field(compare=False)
    _depth: int | None = dataclasses.field(compare=False)
    _quantized: Sequence[str] = dataclasses.field(default=(), compare=False)
    _index_bytes: int = dataclasses.field(default=0, compare=False)
    _rotation: Rotation | None = dataclasses.field(default=None, compare=False)

    @property
    def headline(self) -> str:
        """How many parameters train, of how many, as the last line of the table says it.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder").headline
          'trainable: 2 of 5 parameters (40.00%)'
        """
        percent = 100 * self.trainable / max(self.total, 1)
        return f"trainable: {self.trainable:,} of {self.total:,} parameters ({percent:.2f}%)"

    @property
    def index_bytes(self) -> int:
        """The bytes of the indices of single elements that train; see `freeze_optax.elements`.

        The compiled step holds them, not the state. So `state_bytes` does not count them.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> frozen = ~fo.elements("w", jnp.eye(3, dtype=bool))
          >>> fo.summary({"w": jnp.ones((3, 3))}, frozen).index_bytes
          24
        """
        return self._index_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the attributes by their names, and the rows as dicts, ready for JSON.

        Examples:
          >>> import json
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> summary = fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder")
          >>> json.loads(json.dumps(summary.to_dict()))["rows"][0]["path"]
          'encoder'

        Returns:
          A dict of numbers, with None for what is not known, and of `rows`, a list of dicts.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        public = {name: value for name, value in fields.items() if not name.startswith("_")}
        rows = [
            {"path": row.path, **dataclasses.asdict(row), "factors": list(row.factors)}
            for row in self.rows
        ]
        return {**public, "rows": rows}

    def to_markdown(self) -> str:
        """Returns the table in Markdown, with all paths in full.

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
          The table, and below it the same lines that end the printed table.
        """
        header = ["", *self._columns]
        cells = [[name_in_markdown(row.path, row.same_as), *self._cells(row)] for row in self.rows]
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        table = ["| " + " | ".join(row) + " |" for row in [header, rule, *cells]]
        return "\n\n".join(["\n".join(table), *self._notes(), self.headline])

    def plot(self, ax: Any = None) -> Any:
        """Draws the params as blocks: the height shows the parameters, the colour the status.

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
        factor = ["factor"] if shows_factors(row.factors for row in self.rows) else []
        host = ["host memory"] if any(row.host_bytes for row in self.rows) else []
        return ["", "parameters", "bytes", *state, *host, *factor]

    def _cells(self, row: Row) -> list[str]:
        cells = {
            "": row.status,
            "parameters": f"{row.total:,}",
            "bytes": decimal(row.trainable_bytes + row.frozen_bytes),
            "optimizer state": "" if row.state_bytes is None else decimal(row.state_bytes),
            "host memory": decimal(row.host_bytes),
            "factor": factor_text(row.factors),
        }
        return [cells[column] for column in self._columns]

    def _notes(self) -> list[str]:
        parts = [decimal(self.trainable_bytes + self.frozen_bytes), decimal(self.trainable_bytes)]
        notes = [f"parameters: {parts[0]}, of which {parts[1]} train"]
        if self.state_bytes is not None:
            # After a thaw the state may be a few bytes larger: another cohort has its own counters.
            saved = self.saved_bytes or 0
            less = f", {decimal(saved)} less than with nothing frozen" if saved > 0 else ""
            notes.append(f"optimizer state: {decimal(self.state_bytes)}{less}")
        notes += self._memory_notes
        if self._index_bytes:
            size = decimal(self._index_bytes)
            notes.append(f"indices of single elements: {size} in the compiled step")
        if self._rotation:
            turn = self._rotation
            notes.append(f"in turns: {turn.count} of {turn.length} layers, {turn.every} steps each")
        if self._quantized:
            count = len(self._quantized)
            names = quoted_list(self._quantized, 2)
            nodes = "1 node" if count == 1 else f"{count:,} nodes"
            notes.append(f"quantized: {nodes}, frozen as a whole: {names}")
        return notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = new_table(self._columns, left=1)
        for row, line in zip(self.rows, self._lines, strict=True):
            name = Text("  " * max(line.level, 0) + name_in_table(line))
            name.append(f" = {printable(row.same_as)}" if row.same_as else "", "dim")
            status, *rest = self._cells(row)
            table.add_row(name, Text(status, _STYLES[row.status]), *rest)
        yield table
        yield Text()
        for note in self._notes():
            yield Text(note)
        yield Text(self.headline, "bold", overflow="fold")

    def render(self, console: Console) -> str:
        """Returns the text that a console would print, in its colours.

        The lines are longer than the console if it is too narrow for the table.

        Examples:
          >>> import jax.numpy as jnp
          >>> import freeze_optax as fo
          >>> from rich.console import Console
          >>> summary = fo.summary({"encoder": jnp.ones(3), "head": jnp.ones(2)}, "encoder")
          >>> summary.render(Console(color_system=None)) == str(summary)
          True

        Args:
          console: A console of rich. This sets its width to that of the table, if it is narrower.

        Returns:
          The text, without a line break at its end.
        """
        cells = [self._columns, *map(self._cells, self.rows)]
        return console_text(self, console, cells, len(self.headline))

    def __repr__(self) -> str:
        return self.render(Console(color_system=None, force_jupyter=False))

    def _repr_html_(self) -> str:
        rows: list[TableRow] = []
        for row, line in zip(self.rows, self._lines, strict=True):
            _, *numbers = self._cells(row)
            texts = (name_in_table(line), printable(row.path), printable(row.same_as))
            rows.append(TableRow(line.level, *texts, row.status, numbers))
        return table_as_html(self._columns, rows, self._notes(), self.headline)


def summary(
    params: Any, frozen: Spec = nothing, optimizer: Any = None, depth: int | None = None
) -> Summary:
    """Counts what is frozen and what trains, for each subtree, and the bytes that this saves.

    Every element of an array counts as a parameter. Leaves that share a buffer count once. Leaves
    that cannot be trained (integers, PRNG keys) count as frozen. Nothing is computed and no memory
    is allocated for arrays: params may be abstract, and optimizer states are made abstractly.

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
      params: The params, a pytree of arrays or `jax.ShapeDtypeStruct`s; or an NNX model. If its
        optimizer has some of its variables only, the others (BatchNorm statistics, the base of a
        LoRA) count as frozen.
      frozen: What is frozen: any spec, see `freeze_optax.mask`. If it is an optimizer state, or a
        tree or list with one, the bytes of that state are counted, with parked leaves, cohorts and
        the step of `freeze_optax.scheduled`. State around the `freezable` (an accumulator, say)
        counts only if `optimizer` is passed.
      optimizer: The optimizer whose state is counted: a plain one, or one that contains a
        `freezable`, whose own spec has no effect here. Not needed if `frozen` is a state. Where a
        factor of its `freeze_optax.rates` is not 1, the table has a column of them.
      depth: How many levels of the tree to show, with a row for every node. If None, repeated
        layers are folded, and a subtree is opened only if a part of it trains, if what trains in it
        has several factors, or if a part of it is in host memory.

    Returns:
      The summary. It prints as a table; see its attributes, `to_dict`, `to_markdown` and `plot`.
      Where something is in host memory, the table has a column of its bytes; see `host_bytes` and
      `least_seconds`.

    Raises:
      ValueError: If the spec does not fit the params or freezes only one of two leaves that share a
        buffer; if `depth` is negative; if `optimizer` contains several `freezable`s; or if `frozen`
        is a state that `optimizer` does not make.
      IndexError: If `fo.layers(pattern)[i]` names a layer that does not exist.
      TypeError: If `params` is None, a mask holds anything but bools, `optimizer` is not a
        transformation, or `depth` is not an integer.
    """
    depth = None if depth is None else _levels(depth)
    resolved = resolve_params(params, frozen, optimizer)
    state = state_in_spec(frozen)
    leaves, flags, present, unfrozen, _ = resolved
    check_ties(leaves, flags)
    shown_leaves = dotted_leaves(leaves) if isinstance(frozen, Dotted) else leaves
    root = build_outline(resolved.entries(shown_leaves), folded=depth is None)
    shown = shown_lines(root, depth)
    counts = root.counts.to_dict()
    counts["state_bytes"] = present.total if present else None
    counts["saved_bytes"] = unfrozen.total - present.total if present and unfrozen else None
    rows = [row_of_line(line) for line in shown]
    quantized = [
        printable(node.path(leaves)) or ROOT
        for node in quantized_nodes(leaves)
        if all(flags[i] is True for i in (node.stored, *node.companions))
    ]
    return Summary(
        **counts,
        rows=rows,
        _root=root,
        _lines=shown,
        _depth=depth,
        _quantized=quantized,
        _rotation=state.plan.rotation if state else None,
        _host_bytes=root.counts.param_host_bytes + (present.host if present else 0),
        _frozen_host_bytes=root.counts.frozen_host_bytes,
        _index_bytes=sum((~flag).index_bytes for flag in flags if isinstance(flag, Elements)),
    )


def _levels(depth: Any) -> int:
    """Returns `depth` as an `int`; raises unless it is a number of levels."""
    if isinstance(depth, bool) or not hasattr(depth, "__index__"):
        raise TypeError(f"depth is a number of levels, an int, not {depth!r}")
    if depth < 0:
        raise ValueError(f"depth is a number of levels, 0 or more, not {depth!r}")
    return operator.index(depth)
