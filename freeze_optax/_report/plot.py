"""The plot of a tree of params."""

from collections.abc import Iterable, Iterator
from typing import Any

from freeze_optax._report.counts import Status
from freeze_optax._report.outline import Line, Node, shown_lines, walk_lines

# Colour-blind readers can distinguish blue and orange. Partial nodes are a light grey.
_COLOURS: dict[Status, str] = {"trainable": "#f0a04b", "frozen": "#8fb3d9", "partial": "#e4e4e4"}
_LEVEL_WIDTH, _LEAST_WIDTH, _BLOCK_HEIGHT, _HEIGHTS = 1.7, 5.0, 0.03, (7.0, 11.0)
"""In inches; `_HEIGHTS` is the least and the greatest height of the figure."""
_MOST_NAMES = 350
_MARGINS = {"left": 0.01, "right": 0.99, "bottom": 0.07, "top": 0.94}
_INCH, _TITLE, _FONT, _LEAST_FONT, _INDENT, _EDGE = 72, 11.0, 8.0, 5.0, 4.0, 0.8
"""In points: an inch, the font sizes, the space beside a name, the lines between blocks."""
_LINE, _CHARACTER = 1.3, 0.6
"""The height of a line and the width of a character, as multiples of the font size."""


def draw_outline(root: Node, depth: int | None, title: str, ax: Any) -> Any:
    """Draws the nodes of an outline as blocks: the height is the parameters, the colour the status.

    Each column is a level of the tree. The blocks right of a block are the nodes below it. A name
    is written where there is room for it.

    Args:
      root: The root of the outline.
      depth: How many levels to draw; None for all.
      title: The title.
      ax: The matplotlib axes to draw into; None for new ones.

    Returns:
      The axes.
    """
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415
        from matplotlib.patches import Patch, Rectangle  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib; install it with: pip install 'freeze_optax[plot]'"
        ) from error
    blocks = list(walk_lines(root)) if depth is None else shown_lines(root, depth)
    levels = max((max(block.level, 0) for block in blocks), default=0) + 1
    total = max(root.counts.total, 1)
    if ax is None:
        _, ax = plt.subplots(figsize=_size(levels, len(blocks)), gridspec_kw=_MARGINS)
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    scale, room = _INCH * box.height / total, _INCH * box.width / levels - 2 * _INDENT
    for line, top in _tops(blocks, levels):
        level, height, colour = max(line.level, 0), line.counts.total, _COLOURS[line.counts.status]
        edge: dict[str, Any] = {"ec": ax.get_facecolor(), "lw": min(_EDGE, height * scale / 8)}
        ax.add_patch(Rectangle((level, top), 1, height, fc=colour, **edge))
        font = min(_FONT, height * scale / _LINE)
        if font >= _LEAST_FONT:
            place = (level + _INDENT * levels / (_INCH * box.width), top + height / 2)
            label = _label(line, int(room / (_CHARACTER * font)))
            ax.text(*place, label, fontsize=font, color="black", va="center", parse_math=False)
    ax.set(xlim=(0, levels), ylim=(total, 0))
    fit = _INCH * box.width / (_CHARACTER * len(title))
    ax.set_title(title, loc="left", fontsize=min(_TITLE, fit))
    ax.axis("off")
    statuses = {block.counts.status for block in blocks if block.counts.total}
    handles = [Patch(color=colour, label=s) for s, colour in _COLOURS.items() if s in statuses]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=3, frameon=False)
    return ax


def _size(levels: int, count: int) -> tuple[float, float]:
    """Returns the width and height of a new figure, in inches."""
    least, most = _HEIGHTS
    block = _BLOCK_HEIGHT
    if levels == 1:  # each block needs its name here, for no other column shows what it is
        block = 1.2 * _LINE * _LEAST_FONT / _INCH
        most = block * _MOST_NAMES
    return max(_LEAST_WIDTH, _LEVEL_WIDTH * levels), min(max(block * count, least), most)


def _tops(blocks: Iterable[Line], levels: int) -> Iterator[tuple[Line, int]]:
    """Yields each block with its top: at the end of its column, or at the top of its parent."""
    tops = [0] * (levels + 1)
    for line in blocks:
        level = max(line.level, 0)
        top = tops[level]
        tops[level], tops[level + 1] = top + line.counts.total, top
        yield line, top


def _label(line: Line, room: int) -> str:
    """Returns the name, with the number of parameters if both fit into `room` characters."""
    name, count = line.node.name, _short(line.counts.total)
    if len(name) + len(count) + 2 <= room:
        return f"{name}  {count}"
    return name if len(name) <= room else name[: max(room - 1, 1)] + "…"


def _short(count: int) -> str:
    """Returns a number with at most three digits and a unit: 14.8M."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= 0.9995 * unit:  # three digits round this up to the unit
            return f"{count / unit:.3g}{name}"
    return str(count)
