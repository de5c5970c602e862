"""`weight_scores`: a number for each weight matrix, from its values alone."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track

from freeze_optax._params.marchenko_pastur import noise_edge
from freeze_optax._params.root_mean_square import in_wide_dtype, root_mean_square
from freeze_optax._params.scored_leaves import scored_leaves
from freeze_optax._rows.subset import Subset
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, as_selector, resolve
from freeze_optax._tree.kinds import is_numpy_only, number_kind, rank
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import memory_of, put_in_memory

Score: TypeAlias = str | Callable[[jax.Array], Any]
"""How a matrix is scored: the name of a score, or a function of the matrix."""


def weight_scores(
    params: Any,
    score: Score = "snr",
    frozen: Spec = nothing,
    *,
    stacked: Spec = nothing,
    progress: bool = False,
) -> dict[str, float]:
    """Scores each weight matrix by its values alone, without data and without gradients.

    Give the scores to `freeze_optax.top_leaves`, which selects the leaves that score highest. One
    leaf at a time is computed with, in float32 or wider, on one device: a leaf in host memory is
    copied to the device for it, and one on a mesh to one of its devices.

    From Hartford et al., `Spectrum: Targeted Training on Signal to Noise Ratio
    <https://arxiv.org/abs/2406.06623>`_, 2024. Their threshold is that of noise whose deviation is
    the interquartile range of the singular values over 1.349, as if these were normal. With it a
    fourth of the singular values of a random square matrix count as signal, and nearly all of a
    random matrix of 64 by 16. Here the deviation comes from the median by the law of Marchenko and
    Pastur, so a random matrix has no signal.

    Examples:
      >>> import jax
      >>> import freeze_optax as fo
      >>> noise, up, down = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(3))
      >>> low_rank = up[:, :2] @ down[:2] / 4
      >>> params = {"layer_0": {"kernel": noise}, "layer_1": {"kernel": noise + low_rank}}
      >>> scores = fo.weight_scores(params)
      >>> scores["layer_0/kernel"], round(scores["layer_1/kernel"], 4)
      (0.0, 0.0045)
      >>> trained = fo.top_leaves(scores, 0.5)
      >>> trained(params)
      {'layer_0': {'kernel': False}, 'layer_1': {'kernel': True}}

    Args:
      params: The params. A leaf of more than two axes counts as the matrix whose rows are its first
        axes and whose columns are its last ones, split where the two sides differ least: so a
        kernel of shape (3, 3, 64, 128) is a matrix of 576 by 128, and one of attention, of shape
        (512, 8, 64), is one of 512 by 512.
      score: `"snr"`: the sum of the singular values above the largest that noise would have, over
        the sum of the others, over the largest one. 0 if there is no signal, infinite if there is
        no noise. `"stable_rank"`: the squared Frobenius norm over the squared spectral norm.
        `"norm"`: the root mean square of the elements. Or a function that takes the matrix and
        returns a real number.
      frozen: Which leaves get no score: any spec, see `freeze_optax.mask`. A leaf that is frozen in
        part is scored as a whole.
      stacked: Which leaves hold a layer at each index of their first axis, as `freeze_optax.scan`
        takes them: any spec. Each layer is a matrix of its own, and the leaf has the mean of their
        scores. For a score for each layer, score what `freeze_optax.unstack_layers` gives.
      progress: Whether to show a progress bar on stderr.

    Returns:
      The score of each leaf by its path, in the order of the params. These are the floating-point
      and complex leaves with two axes or more that are not frozen. Abstract leaves are left out
      with a warning that names them, and it warns if no leaf is left. A leaf that contains NaN has
      the score NaN.

    Raises:
      TypeError: If `score` is neither a name nor a function; if the function returns anything but a
        real number; or if a leaf is traced.
      ValueError: If there is no score of this name, if two leaves have the same path, or if the
        spec does not fit the params.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
    """
    measure = _measure_of(score)
    leaves = Leaves(params)
    in_stack = _whole_leaves(stacked, leaves)
    ranks = [3 if is_stacked else 2 for is_stacked in in_stack]
    chosen = scored_leaves(leaves, resolve(frozen, leaves), "weight_scores", ranks)
    scores: dict[str, float] = {}
    # Not `disable`, with which rich 13.0 prints an empty line.
    console = Console(stderr=True)
    for i in track(chosen, "scores of weights", console=console) if progress else chosen:
        leaf = _on_one_device(leaves.values[i])
        matrices = leaf if in_stack[i] else [leaf]
        values = [measure(_as_matrix(x), leaves.paths[i]) for x in matrices]
        scores[leaves.paths[i]] = math.fsum(values) / len(values)
    return scores


def _whole_leaves(spec: Spec, leaves: Leaves) -> list[bool]:
    flags = as_selector(spec).flags(leaves)
    for path, leaf, flag in zip(leaves.paths, leaves.values, flags, strict=True):
        if isinstance(flag, Subset):
            raise ValueError(
                f"stacked selects a part of {path!r} ({flag!r}), but a leaf is stacked as a whole"
            )
        if flag and number_kind(leaf) == "inexact" and not rank(leaf):
            raise ValueError(f"stacked selects {path!r}, which has no axis, so it holds no layers")
    return [flag is True for flag in flags]


def _on_one_device(leaf: Any) -> jax.Array:
    """Returns the values of a leaf on one device, in the memory of the device."""
    if is_numpy_only(leaf):
        return jnp.asarray(leaf.astype(np.complex128 if leaf.dtype.kind == "c" else np.float64))
    if not isinstance(leaf, jax.Array):
        return jnp.asarray(leaf)
    is_on_mesh = len(leaf.sharding.device_set) > 1
    if not is_on_mesh and not memory_of(leaf):
        return leaf
    if not leaf.is_fully_addressable:
        mesh: Any = getattr(leaf.sharding, "mesh", None)
        leaf = put_in_memory(leaf, None)
        leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(leaf)
        leaf = leaf.addressable_data(0)
    # By way of NumPy it is committed to no device, and a mesh in the context takes no other array.
    return jnp.asarray(np.asarray(leaf))


def _as_matrix(x: jax.Array) -> jax.Array:
    """Returns an array of two axes or more as the matrix whose sides differ least."""
    sides = [(math.prod(x.shape[:i]), math.prod(x.shape[i:])) for i in range(1, x.ndim)]
    # The last of equal ones: its columns are the outputs of a dense layer.
    rows, columns = min(reversed(sides), key=lambda side: max(side) / min(side))
    return in_wide_dtype(x).reshape(rows, columns)


Measure: TypeAlias = Callable[[jax.Array, str], float]


def _measure_of(score: Any) -> Measure:
    if isinstance(score, str) and score in _MEASURES:
        measure = _MEASURES[score]
        return lambda matrix, _: measure(matrix)
    if callable(score):
        return lambda matrix, path: _checked(score(matrix), path)
    names = ", ".join(map(repr, _MEASURES))
    error = ValueError if isinstance(score, str) else TypeError
    raise error(f"score is one of {names} or a function of a matrix, not {score!r}")


def _checked(value: Any, path: str) -> float:
    is_real = number_kind(value) != "other" and not np.iscomplexobj(value)
    if not is_real or np.ndim(value) or isinstance(value, bool):
        raise TypeError(
            f"the score of {path!r} is {value!r}; the function returns one real number for a matrix"
        )
    return float(value)


def _singular_values(matrix: jax.Array) -> np.ndarray:
    values: Any = jnp.linalg.svd(matrix, compute_uv=False)
    return np.asarray(values, np.float64)


def _signal_to_noise(matrix: jax.Array) -> float:
    values = _singular_values(matrix)
    if np.isnan(values).any():
        return math.nan
    rows, columns = matrix.shape
    # What rounding leaves of a zero is no noise (the limit of `numpy.linalg.matrix_rank`).
    limit = values[0] * max(rows, columns) * jnp.finfo(matrix.dtype).eps
    values = np.where(values > limit, values, 0.0)
    is_signal = values > noise_edge(values, (rows, columns))
    signal, noise = float(values[is_signal].sum()), float(values[~is_signal].sum())
    if not signal:
        return 0.0
    return signal / noise / float(values[0]) if noise else math.inf


def _stable_rank(matrix: jax.Array) -> float:
    values = _singular_values(matrix)
    return 0.0 if values[0] == 0 else float(np.square(values / values[0]).sum())


_MEASURES: dict[str, Callable[[jax.Array], float]] = {
    "snr": _signal_to_noise,
    "stable_rank": _stable_rank,
    "norm": root_mean_square,
}
