"""The selector of the elements of a leaf that score highest."""

from typing import Any, final

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.flags import Flag, flag_and, flag_from_mask
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, as_selector, is_function, match_by_path
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train, number_kind
from freeze_optax._tree.leaves import Leaves


@final
class _TopElements(Selector):
    def __init__(self, spec: Spec, share: float, score: Any, jointly: bool):
        self._selector, self._share, self._score = as_selector(spec), share, score
        self._jointly = jointly

    def flags(self, leaves: Leaves) -> list[Flag]:
        selected = self._selector.flags(leaves)
        scores = self._scores(leaves, selected)
        ranked = _marked_jointly(scores, self._share) if self._jointly else None
        flags: list[Flag] = []
        for i, (leaf, flag) in enumerate(zip(leaves.values, selected, strict=True)):
            if i not in scores:
                flags.append(False)
                continue
            mask = ranked[i] if ranked else _marked(scores[i], self._share)
            flags.append(flag_and(flag, flag_from_mask(mask), np.shape(leaf)))
        return flags

    def _scores(self, leaves: Leaves, selected: Any) -> dict[int, np.ndarray]:
        """Returns the scores of the elements of each leaf that is selected and can train."""
        of_tree = None
        if not is_function(self._score):
            of_tree = [x for _, x in match_by_path(self._score, leaves, "tree of scores")]
        scores: dict[int, np.ndarray] = {}
        for i, (path, leaf) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
            if selected[i] is False or is_hole(leaf) or not can_train(leaf):
                continue
            what = f"{self!r}: the score of {path!r}"
            score = self._score_of(leaf, what) if of_tree is None else of_tree[i]
            scores[i] = _as_scores(score, leaf, what)
        return scores

    def _score_of(self, leaf: Any, what: str) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{what} is a function of its values, but the leaf is abstract; give a tree of "
                "scores, or use a mask that was made with arrays"
            )
        if isinstance(leaf, Tracer):
            raise TypeError(f"{what} is traced, but what is frozen is settled before tracing")
        return self._score(leaf)

    def __repr__(self) -> str:
        score = "tree of scores"
        if is_function(self._score):
            score = getattr(self._score, "__qualname__", repr(self._score))
        jointly = ", jointly=True" if self._jointly else ""
        return f"top_elements({self._selector!r}, {self._share}, {score}{jointly})"


def _as_scores(score: Any, leaf: Any, what: str) -> np.ndarray:
    """Returns the scores of the elements of a leaf as NumPy numbers; `what` begins an error."""
    if isinstance(score, Tracer):
        raise TypeError(f"{what} is traced, but what is frozen is settled before tracing")
    if number_kind(score) == "other" or isinstance(score, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{what} is a {type(score).__name__}; it takes an array with a number for each element"
        )
    array = np.asarray(score)
    if array.shape != np.shape(leaf):
        raise ValueError(
            f"{what} is of shape {array.shape}, but the leaf is of shape {np.shape(leaf)}; it "
            "takes a number for each element"
        )
    if np.iscomplexobj(array):
        raise TypeError(f"{what} is complex; it takes real numbers, as jnp.abs gives them")
    # NumPy sorts no format of less than 16 bits. Integers and float64 would be rounded.
    wide = array if array.dtype.kind in "iu" or array.itemsize > 4 else array.astype(np.float32)
    if np.isnan(wide).any():
        raise ValueError(f"{what} has NaNs, which have no order")
    return wide


def _marked(scores: np.ndarray, share: float) -> np.ndarray:
    """Returns True for the share of elements with the largest scores, the first ones of equals."""
    count = round(share * scores.size)
    mask = np.zeros(scores.size, bool)
    if count:
        flat = scores.ravel()
        least = np.partition(flat, scores.size - count)[scores.size - count]
        mask = flat > least
        equal = np.flatnonzero(flat == least)
        mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def _marked_jointly(scores: dict[int, np.ndarray], share: float) -> dict[int, np.ndarray]:
    """Returns what `_marked` does, for the elements of all leaves together."""
    if not scores:
        return {}
    mask = _marked(np.concatenate([x.ravel() for x in scores.values()]), share)
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    pieces = np.split(mask, ends)
    pairs = zip(scores.items(), pieces, strict=True)
    return {i: piece.reshape(x.shape) for (i, x), piece in pairs}


def top_elements(spec: Spec, share: float, score: Any = abs, *, jointly: bool = False) -> Selector:
    """Selects the share of elements of each leaf with the largest scores.

    Use it to choose the weights of sparse fine-tuning: `frozen=~fo.top_elements("**/kernel", 0.01)`
    trains the one per cent of each kernel that is largest. With `score=jax.tree.map(jnp.abs,
    grads)`, the gradients of some batches, it trains those with the largest gradients. The choice
    is made when the selector is applied, so `init` fixes it; apply it again
    (`freeze_optax.set_frozen`) to choose anew.

    From Sung et al., `Training Neural Networks with Fixed Sparse Masks
    <https://arxiv.org/abs/2111.09839>`_, 2021 (scores are squared gradients, ranked jointly), and
    Song et al., `Sparse is Enough in Fine-tuning Pre-trained Large Language Models
    <https://arxiv.org/abs/2312.11875>`_, 2024 (largest gradients, in each leaf).

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"kernel": jnp.array([[3.0, -4.0], [0.5, 1.0]]), "bias": jnp.ones(2)}
      >>> fo.top_elements("kernel", 0.25)(params)["kernel"].tolist()
      [[False, True], [False, False]]
      >>> grads = {"kernel": jnp.array([[0.0, 0.0], [9.0, 1.0]]), "bias": jnp.zeros(2)}
      >>> fo.top_elements("kernel", 0.25, score=jnp.square)(grads)["kernel"].tolist()
      [[False, False], [True, False]]

    Args:
      spec: Which leaves: any spec, see `freeze_optax.mask`.
      share: The share of the elements, from 0 to 1. The number of elements is rounded.
      score: A function that takes a leaf and returns a real number for each element; or a tree of
        such arrays, with the structure of the params or a prefix of it. It is matched by key path;
        its numbers are taken as they are, so of gradients take the size. Among equal scores the
        first elements are selected.
      jointly: Whether the elements of all these leaves are ranked together, so that one leaf has
        more of them than another.

    Returns:
      The selector. Its mask is as that of `freeze_optax.elements`. Leaves that cannot be trained
      have no elements in it. Applied to a tree, it raises TypeError if a leaf is abstract, and
      ValueError, naming the path, if a score has another shape than its leaf, or has NaNs.

    Raises:
      TypeError: If `share` is not a number.
      ValueError: If `share` is not from 0 to 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float | np.number):
        raise TypeError(f"the share of the elements is a number from 0 to 1, not {share!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the elements is from 0 to 1, not {share!r}")
    return _TopElements(spec, float(share), score, jointly)
