"""The nodes of a tree of params, repeated layers folded into one, and which of them tell."""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from freeze_optax._report.counts import LeafCounts
from freeze_optax._tree.globs import MOST_ALTERNATIVES, MOST_DIGITS, expand_braces
from freeze_optax._tree.key_paths import natural_order

_NUMBERED = re.compile(rf"(.*?)(\d{{1,{MOST_DIGITS}}})(\D*)", re.DOTALL)
_SPECIAL = re.compile(r"[*?\[\]{}]")


class Entry(NamedTuple):
    """A leaf to be shown.

    Attributes:
      path: Its key path.
      tally: What it comes to.
      kind: Layers are alike if this is equal for the leaves at each place of them.
      note: What to say beside its name.
    """

    path: str
    tally: LeafCounts
    kind: Hashable
    note: str = ""


class Node:
    """A node of the outline, or several that are alike.

    Attributes:
      name: The last component of its path; a glob where it stands for several.
      count: How many it stands for.
      tally: What they come to, together.
      note: What to say beside the name.
      children: The nodes below one of them.
    """

    def __init__(self, name: str):
        self.name, self.count, self.note = name, 1, ""
        self.children: list[Node] = []
        self.tallies: list[LeafCounts] = []
        self.kinds: list[Hashable] = []
        self.tally = LeafCounts()

    @property
    def stem(self) -> Hashable:
        """What the names of repeated layers have in common: all but the last number in them."""
        match = _NUMBERED.fullmatch(self.name)
        return (match[1], match[3]) if match else id(self)


class Line(NamedTuple):
    """A node in its place.

    Attributes:
      level: How many nodes are above it, less the root.
      node: The node.
      tally: What all nodes of this path come to, together.
      is_only: Whether neither it nor a node above it has another beside it.
      parents: How many nodes the path above it stands for.
      text: Its key path, not a glob unless a component of it is.
      glob: The same as a glob.
    """

    level: int
    node: Node
    tally: LeafCounts
    is_only: bool = True
    parents: int = 1
    text: str = ""
    glob: str = ""

    @property
    def path(self) -> str:
        """Its key path; where it stands for several nodes, a glob that matches these alone."""
        return self.glob if self.parents * self.node.count > 1 else self.text


def build_outline(entries: Iterable[Entry], folded: bool) -> Node:
    """The nodes above the entries, in natural order: `layer_2` before `layer_10`.

    Args:
      entries: The leaves, in the order of the tree.
      folded: Whether nodes side by side that differ in a number alone, and have the same below
        them, become one.

    Returns:
      The root.
    """
    # No recursion anywhere here: a tree may be deeper than Python's stack.
    nodes = {"": Node("")}
    for entry in entries:
        node, path = nodes[""], ""
        for component in entry.path.split("/") if entry.path else ():
            path = f"{path}/{component}"
            if path not in nodes:
                nodes[path] = Node(component)
                node.children.append(nodes[path])
            node = nodes[path]
        # Several leaves may have one path, as a slash in a key separates components too.
        node.tallies.append(entry.tally)
        node.kinds.append(entry.kind)
        node.note = entry.note
    numbers: dict[Hashable, int] = {}
    for node in reversed(nodes.values()):
        node.children = _arrange(node.children, folded)
        node.tally = LeafCounts.sum([*node.tallies, *(child.tally for child in node.children)])
        below = tuple((child.name, *child.kinds) for child in node.children)
        # A number for each kind that there is, or kinds would grow with the depth.
        node.kinds = [numbers.setdefault((*node.kinds, below), len(numbers))]
    return nodes[""]


def _arrange(nodes: Sequence[Node], folded: bool) -> list[Node]:
    series: dict[str, list[Node]] = {}
    for node in nodes:
        series.setdefault(re.sub(r"\d+", "0", node.name), []).append(node)
    arranged: list[Node] = []
    for group in series.values():
        group.sort(key=lambda node: natural_order(node.name))
        kinds: dict[Hashable, list[Node]] = {}
        for node in group:
            alike = (node.stem, *node.kinds) if folded else id(node)
            kinds.setdefault(alike, []).append(node)
        for alike in kinds.values():
            for i in range(0, len(alike), MOST_ALTERNATIVES):
                arranged += _fold(alike[i : i + MOST_ALTERNATIVES])
    return arranged


def _fold(alike: list[Node]) -> list[Node]:
    name = _glob([node.name for node in alike])
    if len(alike) == 1 or name is None:
        return alike
    one = Node(name)
    one.count, one.tally = len(alike), LeafCounts.sum(node.tally for node in alike)
    one.note, one.children, one.kinds = alike[0].note, alike[0].children, alike[0].kinds
    return [one]


def _glob(names: list[str]) -> str | None:
    """The glob for names that differ in their last number, ascending; None if there is none."""
    parts = [match.groups() for match in map(_NUMBERED.fullmatch, names) if match]
    if not parts or _SPECIAL.search(parts[0][0] + parts[0][2]):
        return None
    runs: list[list[str]] = []
    for _, digits, _ in parts:
        if runs and int(digits) == int(runs[-1][-1]) + 1:
            runs[-1].append(digits)
        else:
            runs.append([digits])
    pieces = [f"{{{run[0]}..{run[-1]}}}" if len(run) > 1 else run[0] for run in runs]
    inside = pieces[0] if len(pieces) == 1 else f"{{{','.join(pieces)}}}"
    glob = f"{parts[0][0]}{inside}{parts[0][2]}"
    return glob if expand_braces(glob) == names else None  # their digits may be of several widths


def walk_lines(root: Node) -> Iterator[Line]:
    """All nodes below the root, or the root if there are none, each before those below it."""
    stack = [Line(-1, root, root.tally)]
    while stack:
        line = stack.pop()
        if line.level >= 0 or not root.children:
            yield line
        parents, siblings = line.parents * line.node.count, len(line.node.children)
        stack += [
            Line(
                line.level + 1,
                child,
                child.tally.times(parents),
                line.is_only and siblings == 1,
                parents,
                _below(line, line.text, child.name),
                _below(line, line.glob, child.name if child.count > 1 else _literal(child.name)),
            )
            for child in reversed(line.node.children)
        ]


def _below(line: Line, path: str, name: str) -> str:
    return f"{path}/{name}" if line.level >= 0 else name


def _literal(name: str) -> str:
    """The glob that matches a name and nothing else."""
    return _SPECIAL.sub(r"[\g<0>]", name)


def shown_lines(root: Node, depth: int | None) -> list[Line]:
    """The nodes to show, in order, each before those below it.

    Args:
      root: Of an outline.
      depth: How many levels to show whole. None for what tells: nodes with params, and what is
        below them if only a part of it trains, or if there is but one node to begin with.
    """
    if depth is not None:
        return [line for line in walk_lines(root) if line.level < depth]
    shown: list[Line] = []
    closed: int | None = None
    for line in walk_lines(root):
        if closed is not None and line.level > closed:
            continue
        has_params = line.tally.live or line.tally.still
        if has_params:
            shown.append(line)
        is_open = line.tally.status == "partial" or line.is_only
        closed = None if has_params and is_open else line.level
    return shown
