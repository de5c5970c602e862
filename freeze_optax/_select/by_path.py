"""The selectors that users write."""

import operator
import re
from typing import final

from freeze_optax._select.selector import Path, Selector, mark_matches
from freeze_optax._select.slices import checked_slice, ends_of
from freeze_optax._tree.globs import compile_glob
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import natural_order, nodes_of
from freeze_optax._tree.kinds import number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names, quoted_list


def path(*patterns: str) -> Selector:
    """Selects the leaves at, or anywhere below, each node that one of the globs names.

    A key path is text, components joined by `/`: `encoder/layer_0/kernel`, `layers/0/weight`.
    Patterns match component by component, from the root, never by substring: `layer_1` is not
    `layer_10`. Wherever a spec is expected, a plain string means the same.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"encoder": {"layer_0": 1.0, "layer_1": 2.0, "layer_10": 3.0}, "head": 4.0}
      >>> fo.path("encoder/layer_{0..1}")(params)
      {'encoder': {'layer_0': True, 'layer_1': True, 'layer_10': False}, 'head': False}

    Args:
      *patterns: Globs. `*`, `?`, `[abc]` and `[!abc]` match within a component, `**` any number
        of components (also none), `{a,b}` and `{0..9}` either alternative. A bracket makes
        any of these characters plain: `[*]`.

    Returns:
      The selector. Applied to a tree, it raises ValueError if a pattern (as a whole, not each
      alternative in braces) selects no leaf, with the nearest paths.

    Raises:
      ValueError: If there is no pattern, or one is malformed.
      TypeError: If a pattern is not a string.
    """
    return Path(check_patterns(patterns, "path"))


def check_patterns(patterns: tuple[str, ...], name: str) -> tuple[str, ...]:
    if not patterns:
        raise ValueError(f"fo.{name}() needs a pattern; to select no leaf write fo.nothing")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"fo.{name} takes strings, one argument each, but got {pattern!r}; "
                "unpack a list with *, join selectors with |"
            )
    return patterns


@final
class _Regex(Selector):
    def __init__(self, patterns: tuple[str, ...]):
        self._regexes = [re.compile(pattern) for pattern in patterns]

    def flags(self, leaves: Leaves) -> list[bool]:
        selected = [False] * len(leaves.paths)
        for regex in self._regexes:
            mark_matches(selected, regex.fullmatch, leaves, "regex", regex.pattern)
        return selected

    def __repr__(self) -> str:
        return f"regex({', '.join(repr(regex.pattern) for regex in self._regexes)})"


def regex(*patterns: str) -> Selector:
    r"""Selects the leaves whose whole path text one of the regular expressions matches.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.regex(r"layer_\d+/bias")({"layer_0": {"bias": 1.0, "kernel": 2.0}})
      {'layer_0': {'bias': True, 'kernel': False}}

    Args:
      *patterns: Regular expressions for `re.fullmatch`.

    Returns:
      The selector. Applied to a tree, it raises ValueError if a pattern matches no leaf.

    Raises:
      ValueError: If there is no pattern.
      TypeError: If a pattern is not a string.
      re.error: If one is malformed.
    """
    return _Regex(check_patterns(patterns, "regex"))


@final
class Layers(Selector):
    """The nodes that a glob names, in natural order, to be indexed or sliced like a list.

    `freeze_optax.layers` makes it, and says which nodes count.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.layers("layer_*")({"layer_0": 1.0, "layer_1": 2.0, "head": 3.0})
      {'head': False, 'layer_0': True, 'layer_1': True}
    """

    def __init__(self, pattern: str, index: int | slice | None = None):
        self._pattern, self._index = pattern, index
        self._regex = compile_glob(pattern, whole=True)

    def __getitem__(self, index: int | slice) -> Selector:
        """Selects some of the nodes, by their rank.

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
          TypeError: If `index` is anything else, or these are indexed already.
          ValueError: If it is a slice with a step of 0.
        """
        if self._index is not None:
            raise TypeError(f"{self!r} is indexed already; join two with |")
        if isinstance(index, slice):
            return Layers(self._pattern, checked_slice(index, "layers are indexed with"))
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"layers are indexed with an int or a slice, not {index!r}")
        return Layers(self._pattern, operator.index(index))

    # How many there are depends on the tree; without this, Python would try 0, 1, 2 … for ever.
    __iter__ = None

    def flags(self, leaves: Leaves) -> list[bool]:
        # An activation function among the layers is a leaf, but nothing that a layer has learned;
        # the integers of a quantised one are.
        learned = [is_hole(x) or number_kind(x) != "other" for x in leaves.values]
        nodes = nodes_of(path for path, i in leaves.all_paths() if learned[i])
        matched = sorted(filter(self._regex.match, nodes), key=natural_order)
        if not matched:
            raise ValueError(
                f"layers({self._pattern!r}) names no node; {nearest_names(self._pattern, nodes)}"
            )
        chosen = matched
        if isinstance(self._index, slice):
            chosen = matched[self._index]
        elif self._index is not None:
            if not -len(matched) <= self._index < len(matched):
                raise IndexError(
                    f"{self!r} is out of range: {self._pattern!r} names {len(matched)} nodes, "
                    f"{quoted_list(matched)}"
                )
            chosen = [matched[self._index]]
        return leaves.flags_below(set(chosen))

    def __repr__(self) -> str:
        index = self._index
        if isinstance(index, slice):
            text = ":".join("" if end is None else str(end) for end in ends_of(index))
            return f"layers({self._pattern!r})[{text}]"
        return f"layers({self._pattern!r})" + ("" if index is None else f"[{index}]")


def layers(pattern: str) -> Layers:
    """Selects nodes by their rank: all that the glob names, in natural order, then `[i:j]`.

    Natural order puts `layer_2` before `layer_10`. A node counts if there is a number or an array
    of numbers in it, be they integers (a quantised layer is one), or a hole where one was; so
    one that is empty, or holds nothing but functions, text or PRNG keys (dropout), does not.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {"layer_2": 1.0, "layer_9": 2.0, "layer_10": 3.0}
      >>> fo.layers("layer_*")[:-1](params)  # all but the last
      {'layer_10': False, 'layer_2': True, 'layer_9': True}

    Args:
      pattern: A glob, as for `freeze_optax.path`, that names the nodes themselves.

    Returns:
      A selector of all these nodes, which can be indexed with an int or a slice like a list.
      Applied to a tree, it raises ValueError if the pattern names no node, and IndexError
      if an int is out of range; an empty slice selects nothing.

    Raises:
      ValueError: If the pattern is malformed.
      TypeError: If it is not a string.
    """
    return Layers(check_patterns((pattern,), "layers")[0])
