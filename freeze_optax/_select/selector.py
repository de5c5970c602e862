"""The base class of selectors, their algebra, and the selector by path."""

import abc
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, final

from freeze_optax._rows.flags import (
    Flag,
    combine_flags,
    flag_and,
    flag_minus,
    flag_not,
    flag_or,
    flags_to_masks,
)
from freeze_optax._rows.subset import Shape, Subset
from freeze_optax._select.untrainable import check_not_lost, with_untrainable
from freeze_optax._tree.globs import compile_glob, with_slashes
from freeze_optax._tree.holes import is_placeholder
from freeze_optax._tree.key_paths import dots_as_slashes, nodes_of
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names
from freeze_optax._tree.quantized import quantized_nodes

Combination: TypeAlias = Callable[[Flag, Flag, Shape], Flag]
"""How two flags of a leaf give one; the shape is that of the leaf."""


class Selector(abc.ABC):
    """Selects leaves of a tree: a call on a tree returns the mask, `True` where selected.

    Selectors compose: `a | b`, `a & b`, `a - b`, `~a`. A string on either side means
    `freeze_optax.path` of it. A selector is a function from a tree to a mask of Python bools, so
    optax takes it wherever it takes such a function.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": {"bias": 3.0}}
      >>> (fo.path("encoder") - fo.path("**/bias"))(params)
      {'encoder': {'bias': False, 'kernel': True}, 'head': {'bias': False}}
      >>> decay = optax.add_decayed_weights(1e-2, mask=~fo.path("**/bias"))
    """

    @property
    def is_by_path(self) -> bool:
        """Whether its text, with the paths and kinds of the leaves, says all that it selects."""
        return False

    @abc.abstractmethod
    def flags(self, leaves: Leaves) -> Sequence[Flag]:
        """Returns for each leaf, of any dtype, whether it is selected, or which part of it is."""

    def __call__(self, tree: Any) -> Any:
        """Returns the raw mask: the structure of `tree`, with a Python bool at each leaf.

        Examples:
          >>> import freeze_optax as fo
          >>> fo.path("encoder")({"encoder": 1.0, "steps": 3})
          {'encoder': True, 'steps': False}

        Args:
          tree: Any pytree; leaves may be abstract (`jax.ShapeDtypeStruct`).

        Returns:
          The mask, True where selected. Where only some rows of a leaf are selected, it has a NumPy
          vector of bools, one for each row. Leaves that cannot be trained get no special treatment
          here; `freeze_optax.mask` marks them as frozen. `tree` is unchanged.

        Raises:
          ValueError: If a pattern selects nothing, or a mask or state does not fit the tree.
          IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
          TypeError: If a mask or predicate gives anything but bools.
        """
        if is_placeholder(tree):
            return tree
        leaves = Leaves(tree)
        return leaves.fill_leaves(flags_to_masks(self.flags(leaves), leaves.values))

    def labels(self, tree: Any) -> Any:
        """Returns the label `"frozen"` or `"trainable"` for each leaf of `tree`.

        The method is a label function for `optax.partition`. A leaf that cannot be trained (an
        integer, a PRNG key) is always `"frozen"`. A leaf that is frozen in part
        (`freeze_optax.rows`, `freeze_optax.elements`) has no label, and is an error.

        Examples:
          >>> import optax
          >>> import freeze_optax as fo
          >>> params = {"encoder": 1.0, "head": 2.0, "steps": 3}
          >>> fo.path("encoder").labels(params)
          {'encoder': 'frozen', 'head': 'trainable', 'steps': 'frozen'}
          >>> tx = optax.partition(
          ...     {"trainable": optax.adam(1e-3), "frozen": optax.set_to_zero()},
          ...     fo.path("encoder").labels,
          ... )

        Args:
          tree: Any pytree; leaves may be abstract (`jax.ShapeDtypeStruct`).

        Returns:
          A tree of the structure of `tree`, with a label at each leaf. `tree` is unchanged.

        Raises:
          ValueError: As a call on the tree; also if a leaf is frozen in part.
          IndexError: As a call on the tree.
          TypeError: As a call on the tree.
        """
        if is_placeholder(tree):
            return tree
        leaves = Leaves(tree)
        selected = self.flags(leaves)
        frozen = with_untrainable(selected, leaves, quantized_nodes(leaves))
        check_not_lost(selected, frozen, leaves)
        for path, flag in zip(leaves.paths, frozen, strict=True):
            if isinstance(flag, Subset):
                raise ValueError(
                    f"{path!r} is frozen in part ({flag!r}), but a label is for a whole leaf; "
                    "freeze_optax.freezable takes such a spec"
                )
        return leaves.fill_leaves("frozen" if flag else "trainable" for flag in frozen)

    def __or__(self, other: "Selector | str") -> "Selector":
        """Selects what either side selects: `a | b`."""
        return _combine("|", flag_or, self, other)

    def __ror__(self, other: str) -> "Selector":
        return _combine("|", flag_or, other, self)

    def __and__(self, other: "Selector | str") -> "Selector":
        """Selects what both sides select: `a & b`."""
        return _combine("&", flag_and, self, other)

    def __rand__(self, other: str) -> "Selector":
        return _combine("&", flag_and, other, self)

    def __sub__(self, other: "Selector | str") -> "Selector":
        """Selects what the left side selects and the right side does not: `a - b`."""
        return _combine("-", flag_minus, self, other)

    def __rsub__(self, other: str) -> "Selector":
        return _combine("-", flag_minus, other, self)

    def __invert__(self) -> "Selector":
        """Selects all other leaves: `~a`."""
        return _Not(self)

    def __bool__(self) -> bool:
        # Or `not a` would be False, and `a or b` would be `a`, with no error.
        raise TypeError(
            f"{self!r} is neither true nor false, as it selects leaves of any tree; write ~a for "
            "`not a`, a | b for `a or b`, a & b for `a and b`"
        )


def _combine(symbol: str, function: Combination, left: Any, right: Any) -> Any:
    if not all(isinstance(side, Selector | str) for side in (left, right)):
        types = " and ".join(repr(type(side).__name__) for side in (left, right))
        raise TypeError(
            f"unsupported operand type(s) for {symbol}: {types}; selectors compose with selectors "
            "and strings. A list is the union of any specs: [selector, state]. Of masks and states "
            "combine the masks, jax.tree.map(operator.and_, fo.mask(a, params), fo.mask(b, params))"
        )
    left, right = (Path((side,)) if isinstance(side, str) else side for side in (left, right))
    return _Combined(symbol, function, left, right)


@final
class _Combined(Selector):
    def __init__(
        self,
        symbol: str,
        function: Combination,
        left: Selector,
        right: Selector,
    ):
        self._symbol, self._function, self._left, self._right = symbol, function, left, right

    @property
    def is_by_path(self) -> bool:
        first, others = self._chain()
        return first.is_by_path and all(other._right.is_by_path for other in others)

    def flags(self, leaves: Leaves) -> list[Flag]:
        first, others = self._chain()
        flags = list(first.flags(leaves))
        for other in others:
            right = other._right.flags(leaves)
            flags = combine_flags(other._function, flags, right, leaves.values)
        return flags

    def _chain(self) -> tuple[Selector, list["_Combined"]]:
        """Returns the leftmost selector of a chain, and the combinations with it in their order."""
        # A loop of `|=` makes chains of thousands. Recursion would exceed Python's limit there.
        chain: list[_Combined] = [self]
        while isinstance(chain[-1]._left, _Combined):
            chain.append(chain[-1]._left)
        return chain[-1]._left, chain[::-1]

    def __repr__(self) -> str:
        first, others = self._chain()
        text = "(" * len(others) + repr(first)
        return text + "".join(f" {other._symbol} {other._right!r})" for other in others)


@final
class _Not(Selector):
    def __init__(self, inner: Selector):
        self._inner = inner

    @property
    def is_by_path(self) -> bool:
        return self._inner.is_by_path

    def flags(self, leaves: Leaves) -> list[Flag]:
        return list(map(flag_not, self._inner.flags(leaves)))

    def __repr__(self) -> str:
        return f"~{self._inner!r}"


@final
class _All(Selector):
    """Selects all leaves (`freeze_optax.everything`), or no leaf (`freeze_optax.nothing`).

    Examples:
      >>> import freeze_optax as fo
      >>> (fo.everything - "head")({"encoder": 1.0, "head": 2.0})
      {'encoder': True, 'head': False}
      >>> fo.nothing({"encoder": 1.0, "head": 2.0})
      {'encoder': False, 'head': False}
    """

    def __init__(self, selected: bool):
        self._selected = selected

    @property
    def is_by_path(self) -> bool:
        return True

    def flags(self, leaves: Leaves) -> list[bool]:
        return [self._selected] * len(leaves.values)

    def __repr__(self) -> str:
        return "everything" if self._selected else "nothing"


everything = _All(True)
"""Selects all leaves. `fo.everything - "head"` is all but the head."""

nothing = _All(False)
"""Selects no leaf: what is frozen if nothing is said. Leaves that cannot train are frozen still."""


@final
class Path(Selector):
    """Selects the leaves at or below the nodes that globs name."""

    def __init__(self, patterns: tuple[str, ...]):
        # A string of a class of its own, as of an enum, may have any repr.
        self._patterns = tuple(map(str.__str__, patterns))
        self._regexes = [compile_glob(pattern) for pattern in self._patterns]

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs."""
        return self._patterns

    @property
    def is_by_path(self) -> bool:
        return True

    def flags(self, leaves: Leaves) -> list[bool]:
        selected = [False] * len(leaves.paths)
        for pattern, regex in zip(self._patterns, self._regexes, strict=True):
            mark_matches(selected, regex.match, leaves, "pattern", pattern)
        return selected

    def __repr__(self) -> str:
        return f"path({', '.join(map(repr, self._patterns))})"


def mark_matches(
    selected: list[bool],
    match: Callable[[str], re.Match[str] | None],
    leaves: Leaves,
    kind: str,
    pattern: str,
) -> None:
    """Sets the flags of the leaves whose path matches, and raises if no path does."""
    matching = [i for path, i in leaves.all_paths() if match(path)]
    if not matching:
        # A regex has to match the path of a leaf. A glob may also name a node above a leaf.
        paths = [path for path, _ in leaves.all_paths()]
        nodes = paths if kind == "regex" else nodes_of(paths)
        if kind == "regex":
            hint = dots_hint(pattern, match, paths, "fo.regex({!r})")
        else:
            hint = glob_dots_hint(pattern, paths, "fo.path({!r})")
        hint = hint or nearest_names(pattern, nodes)
        raise ValueError(f"{kind} {pattern!r} selects no leaf; {hint}")
    for i in matching:
        selected[i] = True


def glob_dots_hint(pattern: str, paths: Iterable[str], code: str) -> str:
    """Returns a clause for an error if a glob would match with other separators, else "".

    Args:
      pattern: The glob, whose dots may be meant as separators too.
      paths: The paths that it does not match.
      code: The code that makes the selector, with `{!r}` for the glob.
    """
    paths, slashed = list(paths), with_slashes(pattern)
    try:
        match = compile_glob(slashed).match
    except ValueError:  # without its dots it is no glob: `name.`, `[.]`
        return ""
    if any(map(match, paths)):
        return f"slashes separate components in a pattern: write {slashed!r}"
    return dots_hint(slashed, match, paths, code)


def dots_hint(pattern: str, match: Callable[[str], Any], paths: Iterable[str], code: str) -> str:
    """Returns a clause for an error if a pattern would match with dots as separators, else ""."""
    dotted = next((p for p in paths if "." in p and match(dots_as_slashes(p))), None)
    if dotted is None:
        return ""
    remedy = code.format(pattern)
    return f"with the dots of {dotted!r} as separators it does: write fo.dotted({remedy})"
