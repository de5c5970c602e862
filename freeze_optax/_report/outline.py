"""The outline of a tree of params: its nodes, with repeated layers folded, and which to show."""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from freeze_optax._former_names import with_present_names
from freeze_optax._report.counts import LeafCounts
from freeze_optax._tree.globs import MOST_ALTERNATIVES, MOST_DIGITS, expand_braces
from freeze_optax._tree.key_paths import natural_order

_NUMBERED = re.compile(rf"(.*?)(\d{{1,{MOST_DIGITS}}})(\D*)", re.DOTALL)
_SPECIAL = re.compile(r"[*?\[\]{}]")


class Entry(NamedTuple):
    """A leaf for the outline.

    Attributes:
      path: Its key path.
      counts: Its counts.
      kind: Two layers are alike if the kinds of the leaves at each of their places are equal.
      same_as: The path of the leaf that it shares its buffer with, to show beside its name.
    """

    path: str
    counts: LeafCounts
    kind: Hashable
    same_as: str = ""


class Node:
    """A node of the outline. It may stand for several nodes of the tree that are alike.

    Attributes:
      name: The last component of its path; a glob if it stands for several nodes.
      count: How many nodes it stands for.
      counts: The sum of the counts of these nodes.
      same_as: The path to show beside the name, see `Entry`.
      children: The nodes below one of them.
      leaf_counts: The counts of the leaves at its path.
      kinds: The kinds of these leaves; later one number for all that is in the node.
    """

    def __init__(self, name: str):
        self.name, self.count, self.same_as = name, 1, ""
        self.children: list[Node] = []
        self.leaf_counts: list[LeafCounts] = []
        self.kinds: list[Hashable] = []
        self.counts = LeafCounts()

    def __setstate__(self, state: dict[str, Any]) -> None:
        former = {"note": "same_as", "tallies": "leaf_counts", "tally": "counts"}
        self.__dict__.update(with_present_names(state, former))

    @property
    def stem(self) -> Hashable:
        """The name without its last number, which repeated layers have in common."""
        match = _NUMBERED.fullmatch(self.name)
        return (match[1], match[3]) if match else id(self)


class Line(NamedTuple):
    """A node with its place in the outline.

    Attributes:
      level: How many nodes are above it, not counting the root.
      node: The node.
      counts: The sum of the counts of all nodes that its path stands for.
      is_only: Whether the node and all nodes above it are without siblings.
      parents: How many nodes the path above it stands for.
      text: Its key path; a component of it is a glob if it stands for several nodes.
      glob: The same as a glob: it matches also where a name has special characters.
    """

    level: int
    node: Node
    counts: LeafCounts
    is_only: bool = True
    parents: int = 1
    text: str = ""
    glob: str = ""

    @property
    def path(self) -> str:
        """Its key path; if it stands for several nodes, a glob that matches these alone."""
        return self.glob if self.parents * self.node.count > 1 else self.text


def build_outline(entries: Iterable[Entry], folded: bool) -> Node:
    """Builds the outline of some leaves, in natural order: `layer_2` before `layer_10`.

    Args:
      entries: The leaves, in the order of the tree.
      folded: Whether siblings become one node if their names differ only in a number and the same
        is below them.

    Returns:
      The root.
    """
    # Nothing here is recursive, because a tree may be deeper than Python's stack.
    nodes = {"": Node("")}
    for entry in entries:
        node, path = nodes[""], ""
        for component in entry.path.split("/") if entry.path else ():
            path = f"{path}/{component}"
            if path not in nodes:
                nodes[path] = Node(component)
                node.children.append(nodes[path])
            node = nodes[path]
        # Several leaves may have one path, because a slash in a key separates components too.
        node.leaf_counts.append(entry.counts)
        node.kinds.append(entry.kind)
        node.same_as = entry.same_as
    numbers: dict[Hashable, int] = {}
    for node in reversed(nodes.values()):
        node.children = _arrange(node.children, folded)
        node.counts = LeafCounts.sum(
            [*node.leaf_counts, *(child.counts for child in node.children)]
        )
        below = tuple((child.name, *child.kinds) for child in node.children)
        # Each different kind gets a number. Nested tuples would grow with the depth.
        node.kinds = [numbers.setdefault((*node.kinds, below), len(numbers))]
    return nodes[""]


def _arrange(nodes: Sequence[Node], folded: bool) -> list[Node]:
    """Sorts siblings in natural order; folds those that are alike if `folded`."""
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
    """Returns one node for nodes that are alike; the nodes themselves if no glob fits."""
    name = _glob([node.name for node in alike])
    if len(alike) == 1 or name is None:
        return alike
    folded = Node(name)
    folded.count, folded.counts = len(alike), LeafCounts.sum(node.counts for node in alike)
    first = alike[0]
    folded.same_as, folded.children, folded.kinds = first.same_as, first.children, first.kinds
    return [folded]


def _glob(names: list[str]) -> str | None:
    """Returns the glob of names that differ in their last number, in order; None if none fits."""
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
    # The braces give other names if the numbers have different widths, such as 9 and 010.
    return glob if expand_braces(glob) == names else None


def walk_lines(root: Node) -> Iterator[Line]:
    """Yields all nodes below the root, parents first; only the root if it has no children."""
    stack = [Line(-1, root, root.counts)]
    while stack:
        line = stack.pop()
        if line.level >= 0 or not root.children:
            yield line
        parents, siblings = line.parents * line.node.count, len(line.node.children)
        stack += [
            Line(
                line.level + 1,
                child,
                child.counts.times(parents),
                line.is_only and siblings == 1,
                parents,
                _below(line, line.text, child.name),
                _below(line, line.glob, child.name if child.count > 1 else _literal(child.name)),
            )
            for child in reversed(line.node.children)
        ]


def _below(line: Line, path: str, name: str) -> str:
    """Returns the path of a node below a line."""
    return f"{path}/{name}" if line.level >= 0 else name


def _literal(name: str) -> str:
    """Returns the glob that matches a name and nothing else."""
    return _SPECIAL.sub(r"[\g<0>]", name)


def shown_lines(root: Node, depth: int | None) -> list[Line]:
    """Returns the lines to show, parents first.

    Args:
      root: The root of an outline.
      depth: How many levels to show. If None, only nodes with params are shown. Then what is below
        a node is shown if only a part of it trains, if it has several factors, if only a part of it
        is in host memory, or if neither it nor a node above it has siblings.
    """
    if depth is not None:
        return [line for line in walk_lines(root) if line.level < depth]
    shown: list[Line] = []
    closed: int | None = None
    for line in walk_lines(root):
        if closed is not None and line.level > closed:
            continue
        has_params = line.counts.trainable_with_aliases or line.counts.frozen_with_aliases
        if has_params:
            shown.append(line)
        counts = line.counts
        is_mixed = counts.status == "partial" or len(counts.factors) > 1 or counts.is_partly_on_host
        is_open = is_mixed or line.is_only
        closed = None if has_params and is_open else line.level
    return shown
