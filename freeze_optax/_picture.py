"""A picture of a tree of params."""

from typing import Any

from freeze_optax._outline import Line, Node, walk
from freeze_optax._tally import Status

# Blue and orange, for those who tell few colours apart; partial nodes stay in the background.
_COLOURS: dict[Status, str] = {"trainable": "#f0a04b", "frozen": "#8fb3d9", "partial": "#e4e4e4"}
_LEVEL_WIDTH, _LEAST_WIDTH, _LEAF_HEIGHT, _HEIGHTS = 1.7, 5.0, 0.03, (7.0, 11.0)
"""Inches."""
_MARGINS = {"left": 0.01, "right": 0.99, "bottom": 0.07, "top": 0.94}
_POINTS, _FONT, _LEAST_FONT, _EDGE = 72, 8.0, 5.0, 0.8
"""Points: those in an inch, the sizes of letters, and of the lines between blocks."""
_LINE, _CHARACTER = 1.3, 0.58
"""How much room a line and a letter take, in sizes of the letters."""


def draw(root: Node, depth: int | None, title: str, ax: Any) -> Any:
    """Draws the nodes of an outline as blocks: height means parameters, colour what is frozen.

    A column is a level, and what is right of a block is below it in the tree. A name is written
    where there is room for it.

    Args:
      root: Of the outline.
      depth: How many levels to draw, None for all.
      title: What to write above.
      ax: The matplotlib axes, None for new ones.

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
    shown = [line for line in walk(root) if depth is None or line.level < depth]
    levels = max((line.level for line in shown), default=0) + 1
    total = max(root.tally.total, 1)
    if ax is None:
        height = min(max(_LEAF_HEIGHT * len(shown), _HEIGHTS[0]), _HEIGHTS[1])
        size = (max(_LEAST_WIDTH, _LEVEL_WIDTH * levels), height)
        _, ax = plt.subplots(figsize=size, gridspec_kw=_MARGINS)
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    per_parameter, width = _POINTS * box.height / total, _POINTS * box.width / levels
    ground = ax.get_facecolor()
    tops = [0] * (levels + 1)
    for line in shown:
        level, height = max(line.level, 0), line.tally.total
        top = tops[level]
        tops[level], tops[level + 1] = top + height, top
        points = height * per_parameter
        edge = min(_EDGE, points / 4)
        colour = _COLOURS[line.tally.status]
        ax.add_patch(Rectangle((level, top), 1, height, fc=colour, ec=ground, lw=edge))
        font = min(_FONT, points / _LINE)
        if font >= _LEAST_FONT:
            place = (level + 4 / width, top + height / 2)
            label = _label(line, int((width - 8) / (_CHARACTER * font)))
            ax.text(*place, label, fontsize=font, color="black", va="center", parse_math=False)
    ax.set(xlim=(0, levels), ylim=(total, 0))
    ax.set_title(title, loc="left")
    ax.axis("off")
    statuses = {line.tally.status for line in shown if line.tally.total}
    patches = [Patch(color=c, label=status) for status, c in _COLOURS.items() if status in statuses]
    ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, 0), ncols=3, frameon=False)
    return ax


def _label(line: Line, room: int) -> str:
    """The name, and the number of parameters if both fit into so many characters."""
    name, count = line.node.name, _short(line.tally.total)
    if len(name) + len(count) + 2 <= room:
        return f"{name}  {count}"
    return name if len(name) <= room else name[: max(room - 1, 1)] + "…"


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)
