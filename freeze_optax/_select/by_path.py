"""The selectors by key path: `path`, `regex` and `layers`."""

import operator
import re
from typing import final

from freeze_optax._select.selector import Path, Selector, glob_dots_hint, mark_matches
from freeze_optax._select.slices import checked_slice, ends_of
from freeze_optax._tree.globs import compile_glob, with_slashes
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import natural_order, nodes_of
from freeze_optax._tree.kinds import number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names, quoted_list


def path(*patterns: str) -> Selector:
    """Selects the leaves at, or anywhere below, each node that one of the globs names.

    A key path is a text of components joined by `/`: `encoder/layer_0/kernel`, `layers/0/weight`.
    A pattern matches component by component, from the root, and never a substring: `layer_1` is not
    `layer_10`. Every argument that takes a spec reads a plain string as `path` of it.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"encoder": {"layer_0": 1.0, "layer_1": 2.0, "layer_10": 3.0}, "head": 4.0}
      >>> fo.path("encoder/layer_{0..1}")(params)
      {'encoder': {'layer_0': True, 'layer_1': True, 'layer_10': False}, 'head': False}

    Args:
      *patterns: Globs. `*`, `?`, `[abc]` and `[!abc]` match within a component. `**` matches any
        number of components (also none). `{a,b}` and `{0..9}` match any of their alternatives. A
        bracket makes any of these characters plain: `[*]`.

    Returns:
      The selector. Applied to a tree, it raises ValueError, with the nearest paths, if a pattern
      selects no leaf. This holds for the pattern as a whole, not for each alternative in braces.

    Raises:
      ValueError: If there is no pattern, or a pattern is malformed.
      TypeError: If a pattern is not a string.
    """
    return Path(check_patterns(patterns, "path"))


def check_patterns(patterns: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Returns the patterns that were passed to `fo.name`, or raises if they are not strings."""
    if not patterns:
        raise ValueError(f"fo.{name}() needs a pattern; to select no leaf write fo.nothing")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"fo.{name} takes strings, one argument each, but got {pattern!r}; "
                "unpack a list with *, join selectors with |"
            )
    return patterns


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        message = f"fo.regex can't read {pattern!r} (fo.path takes globs): {error.msg}"
        raise re.error(message, pattern, error.pos) from None


@final
class _Regex(Selector):
    def __init__(self, patterns: tuple[str, ...]):
        self._regexes = [_compiled(str.__str__(pattern)) for pattern in patterns]

    @property
    def is_by_path(self) -> bool:
        return True

    def flags(self, leaves: Leaves) -> list[bool]:
        selected = [False] * len(leaves.paths)
        for regex in self._regexes:
            mark_matches(selected, regex.fullmatch, leaves, "regex", regex.pattern)
        return selected

    def __repr__(self) -> str:
        return f"regex({', '.join(repr(regex.pattern) for regex in self._regexes)})"


def regex(*patterns: str) -> Selector:
    r"""Selects the leaves whose whole path matches one of the regular expressions.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.regex(r"layer_\d+/bias")({"layer_0": {"bias": 1.0, "kernel": 2.0}})
      {'layer_0': {'bias': True, 'kernel': False}}

    Args:
      *patterns: Regular expressions, for `re.fullmatch` on the key path of a leaf.

    Returns:
      The selector. Applied to a tree, it raises ValueError if a pattern matches no leaf.

    Raises:
      ValueError: If there is no pattern.
      TypeError: If a pattern is not a string.
      re.error: If a pattern is malformed.
    """
    return _Regex(check_patterns(patterns, "regex"))


@final
class Layers(Selector):
    """Selects the nodes that a glob names; an index or a slice selects some of them.

    `freeze_optax.layers` makes it. See there for which nodes count and in which order.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.layers("layer_*")({"layer_0": 1.0, "layer_1": 2.0, "head": 3.0})
      {'head': False, 'layer_0': True, 'layer_1': True}
    """

    def __init__(self, pattern: str, index: int | slice | None = None):
        self._pattern, self._index = str.__str__(pattern), index
        self._regex = compile_glob(self._pattern, whole=True)

    def __getitem__(self, index: int | slice) -> Selector:
        """Selects some of the nodes, by their rank in natural order.

        Examples:
          >>> import freeze_optax as fo
          >>> params = {"layer_2": 1.0, "layer_9": 2.0, "layer_10": 3.0}
          >>> fo.layers("layer_*")[-1](params)
          {'layer_10': True, 'layer_2': False, 'layer_9': False}

        Args:
          index: An int or a slice, as for a list.

        Returns:
          The selector. Applied to a tree, it raises ValueError if the pattern names no node, and
          IndexError if an int is out of range; an empty slice selects nothing.

        Raises:
          TypeError: If `index` is neither an int nor a slice, or the layers are indexed already.
          ValueError: If `index` is a slice with a step of 0.
        """
        if self._index is not None:
            raise TypeError(f"{self!r} is indexed already; join two with |")
        if isinstance(index, slice):
            return Layers(self._pattern, checked_slice(index, "layers are indexed with"))
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"layers are indexed with an int or a slice, not {index!r}")
        return Layers(self._pattern, operator.index(index))

    # The number of nodes depends on the tree. Without this line, Python would iterate by indexing
    # with 0, 1, 2 … for ever.
    __iter__ = None

    @property
    def is_by_path(self) -> bool:
        return True

    def flags(self, leaves: Leaves) -> list[bool]:
        return leaves.flags_below(set(self.nodes(leaves)))

    def nodes(self, leaves: Leaves) -> list[str]:
        """Returns the paths of the nodes that are selected, in natural order."""
        # An activation function among the layers is a leaf, but not a param. The integers of a
        # quantised layer are params.
        is_param = [is_hole(x) or number_kind(x) != "other" for x in leaves.values]
        nodes = nodes_of(path for path, i in leaves.all_paths() if is_param[i])
        matched = sorted(filter(self._regex.match, nodes), key=natural_order)
        if not matched:
            code = f"fo.{self!r}".replace(repr(self._pattern), "{!r}", 1)
            hint = glob_dots_hint(self._pattern, nodes, code)
            hint = hint or nearest_names(self._pattern, nodes)
            raise ValueError(f"layers({self._pattern!r}) names no node; {hint}")
        if self._index is not None:
            self._check_no_tensors(matched)
        if isinstance(self._index, slice):
            return matched[self._index]
        if self._index is None:
            return matched
        if not -len(matched) <= self._index < len(matched):
            raise IndexError(
                f"{self!r} is out of range: {self._pattern!r} names {len(matched)} nodes, "
                f"{quoted_list(matched)}"
            )
        return [matched[self._index]]

    def _check_no_tensors(self, matched: list[str]) -> None:
        """Raises if the nodes are tensors of layers in a flat dict with dotted names.

        There `layers.*` names `layers.0.bias` and `layers.0.weight`, so an index would count
        tensors. A number with a dot in a name, such as `scale_1.5`, is no such case.
        """
        pieces = self._pattern.replace("..", "").rpartition("/")[2].split(".")
        count = 1 + max((i for i, x in enumerate(pieces) if re.search(r"[*?[{]", x)), default=0)
        first: dict[str, str] = {}
        for node in matched:
            above, _, name = node.rpartition("/")
            *layer, rest = name.split(".", count)
            if len(layer) < count or not all([*layer, rest]) or rest.isdigit():
                continue
            other = first.setdefault("/".join([above, *layer]), node)
            if other != node:
                pattern = with_slashes(self._pattern)
                raise ValueError(
                    f"{self!r}: the pattern names {other!r} and {node!r}, two leaves of one layer; "
                    f"read dots as separators: fo.dotted(fo.{Layers(pattern, self._index)!r})"
                )

    def __repr__(self) -> str:
        index = self._index
        if isinstance(index, slice):
            text = ":".join("" if end is None else str(end) for end in ends_of(index))
            return f"layers({self._pattern!r})[{text}]"
        return f"layers({self._pattern!r})" + ("" if index is None else f"[{index}]")


def layers(pattern: str) -> Layers:
    """Selects the nodes that the glob names; `[i]` and `[i:j]` then select some by their rank.

    The nodes are in natural order: `layer_2` comes before `layer_10`. A node counts if it holds a
    number or an array of numbers, or a hole in place of one. Integers are numbers here, as a
    quantised layer holds them. A node does not count if it is empty, or holds only functions, text
    or PRNG keys (dropout).

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"layer_2": 1.0, "layer_9": 2.0, "layer_10": 3.0}
      >>> fo.layers("layer_*")[:-1](params)  # all but the last
      {'layer_10': False, 'layer_2': True, 'layer_9': True}

    Args:
      pattern: A glob, as for `freeze_optax.path`, that names the nodes themselves.

    Returns:
      A selector of all these nodes. Index it with an int or a slice, like a list. Applied to a
      tree, it raises ValueError if the pattern names no node, and IndexError if an int is out of
      range; an empty slice selects nothing.

    Raises:
      ValueError: If the pattern is malformed.
      TypeError: If the pattern is not a string.
    """
    return Layers(check_patterns((pattern,), "layers")[0])
