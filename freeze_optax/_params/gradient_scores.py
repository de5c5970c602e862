"""`gradient_scores`: a number for each leaf, from the gradients of a few batches."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._params.gradients import grad
from freeze_optax._params.partition import partition
from freeze_optax._params.root_mean_square import (
    in_wide_dtype,
    product,
    root_mean_square,
    scale_and_rest,
)
from freeze_optax._params.scored_leaves import scored_leaves
from freeze_optax._rows.flags import flags_to_masks
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.kinds import can_train, is_array, is_numpy_only, number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import put_in_memory

_SCORES = ("norm", "relative", "fisher")


def gradient_scores(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    score: str = "norm",
    frozen: Spec = nothing,
) -> dict[str, float]:
    """Scores each leaf by the gradients of a few batches, without a step of training.

    Give the scores to `freeze_optax.top_leaves`, which selects the leaves that score highest. One
    program is compiled, for all batches of one shape. Frozen leaves have no backward pass.

    From Saket, `Aletheia: Gradient-Guided Layer Selection <https://arxiv.org/abs/2604.15351>`_,
    2026 (norms of gradients), Lee et al., `Surgical Fine-Tuning Improves Adaptation to Distribution
    Shifts <https://arxiv.org/abs/2210.11466>`_, 2022 (relative to the weights), and Sung et al.,
    `Training Neural Networks with Fixed Sparse Masks <https://arxiv.org/abs/2111.09839>`_, 2021
    (Fisher information).

    Examples:
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"a": jnp.full(4, 2.0), "b": jnp.full(1, 0.5)}
      >>> loss = lambda params, x: (params["a"] * x).sum() + 3.0 * params["b"][0]
      >>> batches = [jnp.ones(4), -jnp.ones(4)]
      >>> fo.gradient_scores(loss, params, batches)  # the gradients of `a` cancel each other
      {'a': 0.0, 'b': 3.0}
      >>> fo.gradient_scores(loss, params, batches, "fisher")
      {'a': 1.0, 'b': 9.0}
      >>> fo.gradient_scores(loss, params, batches, "relative", frozen="a")
      {'b': 6.0}

    Args:
      loss: A function of the params and a batch that returns a real scalar. It is compiled.
      params: The params.
      batches: The batches: a list, a loader. `loss` gets each as it is. Every batch counts alike.
      score: `"norm"`: the root mean square of the elements of the mean gradient, which is its norm
        over the square root of its size, so leaves of all sizes compare. `"relative"`: the norm of
        the mean gradient over the norm of the weights; infinite where all weights are zero, as in a
        new bias, and 0 where the gradient is zero too. `"fisher"`: the mean, over elements and
        batches, of the squared gradient of a batch. With batches of one example that is the
        diagonal of the empirical Fisher information.
      frozen: Which leaves get no score, and no backward pass: any spec, see `freeze_optax.mask`. Of
        a leaf that is frozen in part, what trains is scored.

    Returns:
      The score of each leaf that trains by its path, in the order of the params. It warns if there
      is none. A gradient that contains NaN gives the score NaN.

    Raises:
      TypeError: If `batches` is one array or mapping, or if a leaf is traced or abstract.
      ValueError: If there is no score of this name, if there are no batches, if two leaves have the
        same path, or if the spec does not fit the params.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
    """
    if score not in _SCORES:
        raise ValueError(f"score is one of {', '.join(map(repr, _SCORES))}, not {score!r}")
    if is_array(batches) or isinstance(batches, Mapping | str):
        raise TypeError(
            f"batches is a list of batches, or a loader, not one {type(batches).__name__}; for one "
            "batch write [batch]"
        )
    leaves = Leaves(params)
    flags = resolve(frozen, leaves)
    _check_values(leaves)
    chosen = scored_leaves(leaves, flags, "gradient_scores", [0] * len(flags))
    if not chosen:
        return {}
    mask = leaves.fill_leaves(flags_to_masks(flags, leaves.values))
    if score == "fisher":
        values = _fisher(_of_batches(loss, leaves, mask, chosen, _all_scales), batches)
    else:
        values = _norms(_of_batches(loss, leaves, mask, chosen, list), batches)
    if score == "relative":
        live = Leaves(partition(params, mask)[0]).values
        weights = [root_mean_square(put_in_memory(live[i], None)) for i in chosen]
        values = list(map(_ratio, values, weights))
    return {leaves.paths[i]: value for i, value in zip(chosen, values, strict=True)}


def _check_values(leaves: Leaves) -> None:
    for path, leaf in zip(leaves.paths, leaves.values, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"fo.gradient_scores computes the loss, but {path!r} is abstract; give it params "
                "with values"
            )


def _of_batches(
    loss: Callable[[Any, Any], Any],
    leaves: Leaves,
    mask: Any,
    chosen: Sequence[int],
    finish: Callable[[list[jax.Array]], Any],
) -> Callable[[Any], Any]:
    """Returns a compiled function of a batch: `finish` of the gradients of the chosen leaves."""
    arguments = [i for i, x in enumerate(leaves.values) if _is_argument(x)]

    @jax.jit
    def of_batch(arrays: list[Any], batch: Any) -> Any:
        given = dict(zip(arguments, arrays, strict=True))
        params = leaves.rebuild(given.get(i, x) for i, x in enumerate(leaves.values))
        live = Leaves(grad(loss, mask, holes=True)(params, batch)).values
        return finish([in_wide_dtype(put_in_memory(live[i], None)) for i in chosen])

    return functools.partial(of_batch, [leaves.values[i] for i in arguments])


def _is_argument(leaf: Any) -> bool:
    """Whether a leaf is an argument of the program: not an int that the loss may need as it is."""
    if isinstance(leaf, np.ndarray | np.generic):
        return number_kind(leaf) != "other" and not is_numpy_only(leaf)
    return isinstance(leaf, jax.Array) or can_train(leaf)


def _all_scales(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return list(map(scale_and_rest, arrays))


@jax.jit
def _sum(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(left, right, strict=True)]


@jax.jit
def _scales_of_mean(total: list[jax.Array], count: float) -> list[tuple[jax.Array, jax.Array]]:
    return _all_scales([x / jnp.asarray(count, x.dtype) for x in total])


def _norms(gradients_of: Callable[[Any], list[jax.Array]], batches: Iterable[Any]) -> list[float]:
    total, count = None, 0
    for batch in batches:
        one = gradients_of(batch)
        total = one if total is None else _sum(total, one)
        count += 1
    if total is None:
        raise ValueError(_NO_BATCHES)
    return list(map(product, _scales_of_mean(total, float(count))))


def _fisher(scales_of: Callable[[Any], Any], batches: Iterable[Any]) -> list[float]:
    rows = [[product(pair) ** 2 for pair in scales_of(batch)] for batch in batches]
    if not rows:
        raise ValueError(_NO_BATCHES)
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


_NO_BATCHES = "batches is empty, so there are no gradients; a loader that was read to its end is so"


def _ratio(gradient: float, weight: float) -> float:
    if weight == 0 and gradient > 0:
        return math.inf
    return gradient / weight if weight else gradient
