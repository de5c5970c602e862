"""The selectors of the leaves whose scores are highest or lowest: `top_leaves`, `bottom_leaves`."""

import itertools
import math
import operator
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, final

import numpy as np
from jax.core import Tracer

from freeze_optax._select.first_match import FirstMatch
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, is_function
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import check_unique, natural_order
from freeze_optax._tree.kinds import is_array, number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import nearest_names, quoted_list

Within: TypeAlias = str | Sequence[Spec] | Callable[[str], Hashable] | None
"""Which leaves compete with each other."""


@final
class _RankedLeaves(Selector):
    """Selects the leaves that come first when the leaves of each group are ordered by score."""

    def __init__(
        self, name: str, scores: Mapping[str, Any], share: float, within: Within, count: str
    ):
        self._name, self._scores, self._share = name, scores, share
        self._within, self._count = within, count
        self._table = None
        if isinstance(within, Sequence) and not isinstance(within, str):
            self._table = FirstMatch(name, "group", [(spec, i) for i, spec in enumerate(within)])

    def flags(self, leaves: Leaves) -> list[bool]:
        selected = [False] * len(leaves.values)
        scores = self._scores_by_leaf(leaves)
        groups: dict[Hashable, list[int]] = {}
        for i, group in self._group_by_leaf(leaves, scores).items():
            if group is not None:
                groups.setdefault(group, []).append(i)
        is_bottom = self._name == "bottom_leaves"
        for group in groups.values():
            # Sorting is stable, so leaves of equal scores stay in natural order.
            group.sort(key=lambda i: natural_order(leaves.paths[i]))
            group.sort(key=lambda i: scores[i], reverse=not is_bottom)
            for i in group[: self._length(group, leaves)]:
                selected[i] = True
        return selected

    def _scores_by_leaf(self, leaves: Leaves) -> dict[int, Any]:
        check_unique([path for path in leaves.paths if path in self._scores], "scores")
        by_path = dict(leaves.all_paths())
        unknown = [path for path in self._scores if path not in by_path]
        if unknown:
            raise ValueError(
                f"fo.{self._name} has scores for {quoted_list(unknown)}, but the tree has no such "
                f"leaf; {nearest_names(unknown[0], by_path)}. Scores are by the path of a leaf, "
                "and of the tree that the selector is applied to"
            )
        return {by_path[path]: score for path, score in self._scores.items()}

    def _group_by_leaf(self, leaves: Leaves, scores: dict[int, Any]) -> dict[int, Hashable]:
        """Returns the group of each leaf that has a score; None if it is in no group."""
        if self._table is not None:
            winners = self._table.winners(leaves)
            return {i: winners[i] for i in scores}
        if self._within is None:
            return dict.fromkeys(scores, "all")
        function: Any = _kind_of if self._within == "kind" else self._within
        groups: dict[int, Any] = {i: function(leaves.paths[i]) for i in scores}
        for i, group in groups.items():
            if not isinstance(group, Hashable):
                raise TypeError(
                    f"fo.{self._name}: within gives {group!r} for {leaves.paths[i]!r}, but a group "
                    "is named by a hashable value, a text say; None leaves the leaf out"
                )
        return groups

    def _length(self, group: list[int], leaves: Leaves) -> int:
        """Returns how many leaves, of an ordered group, make up the share."""
        if self._count == "leaves":
            return round(self._share * len(group))
        sizes = (_count_elements(leaves.values[i]) for i in group)
        sums = list(itertools.accumulate(sizes, initial=0))
        target = self._share * sums[-1]
        return min(range(len(sums)), key=lambda length: abs(sums[length] - target))

    def __repr__(self) -> str:
        within = "" if self._within is None else f", within={_text(self._within)}"
        count = "" if self._count == "leaves" else f", count={self._count!r}"
        scores = f"scores of {len(self._scores)} leaves"
        return f"{self._name}({scores}, {self._share}{within}{count})"


def _kind_of(path: str) -> str:
    """Returns a path without its numbers, which is that of all leaves of its kind."""
    return re.sub(r"[0-9]+", "", path)


def _text(within: Any) -> str:
    return getattr(within, "__qualname__", repr(within)) if is_function(within) else repr(within)


def _count_elements(leaf: Any) -> int:
    if is_hole(leaf):
        return 0
    return math.prod(map(operator.index, leaf.shape)) if is_array(leaf) else 1


def top_leaves(
    scores: Mapping[str, Any],
    share: float,
    within: Within = None,
    count: str = "leaves",
    what: str | None = None,
) -> Selector:
    """Selects the leaves with the highest scores.

    Use it to train what scores highest: `frozen=~fo.top_leaves(scores, 0.25)`. This freezes the
    leaves without a score too, since none of them is selected. The scores are given, so it works on
    abstract params, and gives the same leaves however the params change.

    From Hartford et al., `Spectrum <https://arxiv.org/abs/2406.06623>`_, 2024, which lets the
    leaves of one kind compete, and Saket, `Aletheia <https://arxiv.org/abs/2604.15351>`_, 2026,
    which lets all.

    Examples:
      >>> import freeze_optax as fo
      >>> params = {f"layer_{i}": {"up": 1.0, "down": 1.0} for i in range(2)}
      >>> scores = {"layer_0/up": 9.0, "layer_1/up": 8.0, "layer_0/down": 1.0, "layer_1/down": 2.0}
      >>> fo.top_leaves(scores, 0.5)(params)
      {'layer_0': {'down': False, 'up': True}, 'layer_1': {'down': False, 'up': True}}
      >>> fo.top_leaves(scores, 0.5, within="kind")(params)
      {'layer_0': {'down': False, 'up': True}, 'layer_1': {'down': True, 'up': False}}

    Args:
      scores: A mapping from the path of a leaf to a real number, as `freeze_optax.weight_scores`
        and `freeze_optax.gradient_scores` give it. Leaves without a score are not selected.
      share: The share of the leaves that have a score, from 0 to 1. The number of leaves is
        rounded, so half of one leaf is none. Among equal scores the first in natural order win.
      within: Which leaves compete with each other, so that the share is one of each group. None:
        all of them. `"kind"`: those whose paths differ in numbers only, such as
        `layer_0/attention/query/kernel` and `layer_11/attention/query/kernel`. A list of patterns
        or other specs: those below each; the first that selects a leaf counts, and a leaf that none
        selects is not selected here. A function of the path: those for which it returns the same
        value; with None the leaf is not selected.
      count: What the share is one of. `"leaves"`, or `"parameters"`: as many of the highest leaves
        as come nearest to the share of the parameters in the group. A hole has no parameters.
      what: The attribute of a score to take, if the scores are no numbers, such as `"gradient"`.

    Returns:
      The selector. Applied to a tree, it raises ValueError if the tree lacks a leaf that has a
      score, or if a pattern of `within` selects none.

    Raises:
      TypeError: If the scores are no mapping from texts to real numbers, `share` is no number, or
        `within` is none of these.
      ValueError: If there are no scores, or one of them is NaN; if `share` is not from 0 to 1; or
        if `count` is something else.
    """
    return _ranked("top_leaves", scores, share, within, count, what)


def bottom_leaves(
    scores: Mapping[str, Any],
    share: float,
    within: Within = None,
    count: str = "leaves",
    what: str | None = None,
) -> Selector:
    """Selects the leaves with the lowest scores.

    Use it to freeze what scores lowest: `frozen=fo.bottom_leaves(scores, 0.25)`. The leaves without
    a score then train, since none of them is selected.

    Examples:
      >>> import freeze_optax as fo
      >>> fo.bottom_leaves({"a": 3.0, "b": 1.0}, 0.5)({"a": 1.0, "b": 1.0, "c": 1.0})
      {'a': False, 'b': True, 'c': False}

    Args:
      scores: As for `top_leaves`.
      share: As for `top_leaves`. Of equal scores the first in natural order win here too, so the
        complement of the top is `~fo.top_leaves(scores, share)`.
      within: As for `top_leaves`.
      count: As for `top_leaves`, of the lowest leaves.
      what: As for `top_leaves`.

    Returns:
      The selector, as of `top_leaves`.

    Raises:
      TypeError: As `top_leaves`.
      ValueError: As `top_leaves`.
    """
    return _ranked("bottom_leaves", scores, share, within, count, what)


def _ranked(
    name: str, scores: Any, share: Any, within: Any, count: Any, what: str | None
) -> Selector:
    if isinstance(share, bool) or not isinstance(share, int | float | np.number):
        raise TypeError(f"the share of the leaves is a number from 0 to 1, not {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the leaves is from 0 to 1, not {share!r}")
    if count not in ("leaves", "parameters"):
        raise ValueError(f"count is 'leaves' or 'parameters', not {count!r}")
    is_list = isinstance(within, list | tuple)
    if not (within is None or is_list or within == "kind" or is_function(within)):
        raise TypeError(
            "within is None, 'kind', a list of patterns or a function of the path, not "
            f"{within!r}" + (f"; write [{within!r}]" if isinstance(within, str) else "")
        )
    if is_list and not within:
        raise ValueError("within is an empty list, so no leaf would be selected; give it patterns")
    return _RankedLeaves(name, _checked_scores(name, scores, what), float(share), within, count)


def _checked_scores(name: str, scores: Any, what: str | None) -> dict[str, Any]:
    """Returns the scores as numbers of Python."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"fo.{name} takes a mapping from path to score, not a {type(scores).__name__}"
        )
    if not scores:
        raise ValueError(f"fo.{name} has no scores; to select no leaf write fo.nothing")
    return {path: _checked_score(name, path, score, what) for path, score in scores.items()}


def _checked_score(name: str, path: Any, score: Any, what: str | None) -> Any:
    if not isinstance(path, str):
        raise TypeError(f"fo.{name} takes scores by the path of a leaf, a text, not by {path!r}")
    value: Any = score if what is None else getattr(score, what, None)
    if isinstance(value, Tracer):
        raise TypeError(
            f"fo.{name}: the score of {path!r} is traced, but what is frozen is settled before "
            "tracing; make the selector outside of jit"
        )
    number: Any = np.asarray(value).item() if np.ndim(value) == 0 and is_array(value) else value
    is_real = number_kind(number) != "other" and not isinstance(number, bool)
    if not is_real or np.ndim(number) or np.iscomplexobj(number):
        raise TypeError(
            f"fo.{name}: the score of {path!r} is {score!r}, not a real number"
            + (f", and neither is its attribute {what!r}" if what is not None else _hint(score))
        )
    if math.isnan(number):
        raise ValueError(
            f"fo.{name}: the score of {path!r} is NaN, which has no order; leave it out, or mend "
            "what it was measured from"
        )
    return number


def _hint(score: Any) -> str:
    if isinstance(score, Mapping):
        return "; scores are by the whole path, as {'encoder/kernel': 1.0}"
    fields = [f for f in getattr(score, "_fields", ()) if number_kind(getattr(score, f)) != "other"]
    return f"; say which of its numbers counts: what={fields[0]!r}" if fields else ""
