"""`measured`: running averages of the norms of gradients and updates, in the state."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from freeze_optax._select.specs import is_function, match_by_path
from freeze_optax._state.mapped_state import mapped_state
from freeze_optax._state.measured_state import LENGTH, MeasuredState, measured_in
from freeze_optax._state.whole_params import whole_leaves
from freeze_optax._transform.inner_transformation import as_transformation
from freeze_optax._transform.leaf_scalars import mapped_scalars, tree_of_scalars
from freeze_optax._transform.scaling import factor_dtype, is_real
from freeze_optax._tree.holes import is_hole, is_placeholder
from freeze_optax._tree.kinds import can_train, is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies
from freeze_optax._tree.messages import quoted_list


def measured(
    inner: optax.GradientTransformation, decay: float = 0.9, by: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps running averages of the norms of what goes into `inner` and of what comes out of it.

    It changes no update. For each leaf that trains its state has the averages of the norm of the
    gradient and of the update, and of the change of each from one step to the next, as one vector
    of seven numbers. `freeze_optax.scores` reads them. It goes inside of `freeze_optax.freezable`,
    around the optimizer: `fo.freezable(fo.measured(optax.adamw(1e-3)), frozen)`. A leaf that is
    frozen has none, a parked one keeps them, and one that was thawed begins anew.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"encoder": jnp.ones(4), "head": jnp.ones(4)}
      >>> tx = fo.freezable(fo.measured(optax.sgd(0.5)), frozen="encoder")
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> fo.scores(state)["head"].gradient, fo.scores(state)["head"].update
      (2.0, 1.0)

    Args:
      inner: Any optax transformation. A gradient is what it is given, so clipping before `measured`
        counts, and clipping in `inner` does not.
      decay: How much of an average stays at each step, 0 or more and less than 1, as of the moments
        of Adam. An average over n steps is debiased as these are. At 0 it is the norm of the last
        step.
      by: Groups of leaves, for norms of a group in place of those of each leaf: a tree of labels,
        of the structure of the params or a prefix of it (matched by key path), or a function that
        takes the params and returns such a tree, as `optax.partition` takes them. The norm of a
        group is that over its leaves that train. After a thaw the update of a group is measured
        with the step count of its first leaves, unless `measured` is around the `freezable`.

    Returns:
      A transformation. Its state, a `MeasuredState`, has the fields `norms` and `state`, the state
      of `inner`. A norm is the Euclidean norm of all of a leaf: on a mesh too, for any dtype in
      float32, and for complex numbers by their modulus. Of a leaf that trains in part it is the
      norm of what trains. Inside of `jax.shard_map` it is that of the part on the device.

      A step in which the gradient or the update of a leaf is not finite, or its norm is not, is
      left out for this leaf: its averages and its number of steps stay as they were. So a step that
      `optax.apply_if_finite` skips leaves no trace.

      `init` and `update` raise ValueError if the labels do not fit the params.

    Raises:
      TypeError: If `inner` is not a transformation, or `decay` is no number.
      ValueError: If `decay` is negative, or 1 or more.
    """
    inner = as_transformation("measured", inner)
    _check_decay(decay)
    # Traced once for all leaves of one shape. A step that is not jitted compiles them.
    sums_of_squares = jax.jit(_sums_of_squares, inline=True)
    next_vector = jax.jit(functools.partial(_next_vector, decay=decay), inline=True)

    def init_fn(params: optax.Params) -> Any:
        if is_placeholder(params):
            norms = mapped_scalars([x.norms for x in measured_in(mapped_state())])
        else:
            norms = _first_norms(params, by)
        return MeasuredState(norms, inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        new_updates, inner_state = inner.update(updates, state.state, params, **extra)
        # Of a lookahead the first copy is what the gradient is of.
        trees = [param_copies(tree)[0] for tree in (updates, new_updates)]
        triples, treedef = (
            _by_leaf(state.norms, trees) if by is None else _by_group(state.norms, trees, by)
        )
        vectors = [vector for vector, _, _ in triples]
        squares: dict[int, Any] = {}
        for i, (vector, *trees) in enumerate(triples):
            grads, new = ([x for x in arrays if can_train(x)] for arrays in trees)
            if not is_hole(vector) and grads and new:
                squares[i] = sums_of_squares(grads, new)
        for indices in _of_one_type(vectors, squares):
            stacked = [(vectors[i], *squares[i]) for i in indices]
            for i, vector in zip(indices, _next_vectors(next_vector, stacked), strict=True):
                vectors[i] = vector
        norms = jax.tree.unflatten(treedef, vectors)
        return new_updates, MeasuredState(norms, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_decay(decay: Any) -> None:
    if isinstance(decay, Tracer):  # optax.inject_hyperparams
        return
    if not is_real(decay) or np.shape(decay):
        raise TypeError(f"the decay of fo.measured is a number, not {decay!r}")
    if not 0 <= decay < 1:
        raise ValueError(
            f"the decay of fo.measured is {decay!r}, but it is 0 or more and less than 1; 0.9 "
            "averages over about ten steps"
        )


def _first_norms(params: optax.Params, by: Any) -> Any:
    """Returns the norms before the first step: a vector of zeros for each leaf or label."""
    copy = param_copies(params)[0]
    leaves = Leaves(copy)
    if by is None:
        trains = [not is_hole(x) and can_train(x) for x in leaves.values]
        return tree_of_scalars(copy, [_zeros() if flag else None for flag in trains])
    whole = whole_leaves(leaves)
    if is_function(by) and all(map(is_hole, whole.values)):
        # A function gives no labels for holes. The layout of a state asks for the norms of holes
        # alone, and takes any tree in the place of this array.
        return _zeros()
    labels = _labels(by, whole)
    return {label: _zeros() for label in dict.fromkeys(labels) if not is_hole(label)}


def _zeros() -> jax.Array:
    return jnp.zeros((LENGTH,), jnp.float32)


def _labels(by: Any, leaves: Leaves) -> list[Any]:
    """Returns the label of each leaf."""
    pairs = match_by_path(by(leaves.tree) if is_function(by) else by, leaves, "label tree")
    for path, label in pairs:
        if is_array(label):
            raise TypeError(
                f"fo.measured has for {path!r} an array as its label, not a name or another key"
            )
    return [label for _, label in pairs]


Triples = Sequence[tuple[Any, list[Any], list[Any]]]
"""For each vector of norms, the vector, its gradients and its updates."""


def _by_leaf(norms: Any, trees: Sequence[Any]) -> tuple[Triples, Any]:
    """Returns the vector, gradients and updates of each leaf, and the structure of the norms."""
    vectors, treedef = jax.tree.flatten(norms, is_leaf=is_hole)
    # A leaf of the norms may stand for an NNX Variable or a box, with one array in it.
    columns = zip(vectors, *map(treedef.flatten_up_to, trees), strict=True)
    triples = [(x, jax.tree.leaves(grad), jax.tree.leaves(update)) for x, grad, update in columns]
    return triples, treedef


def _by_group(norms: Any, trees: Sequence[Any], by: Any) -> tuple[Triples, Any]:
    """Returns the vector, gradients and updates of each group, and the structure of the norms."""
    grads, updates = map(Leaves, trees)
    groups: dict[Any, tuple[Any, list[Any], list[Any]]] = {k: (x, [], []) for k, x in norms.items()}
    columns = zip(_labels(by, grads), grads.values, updates.values, strict=True)
    for label, grad, update in columns:
        if is_hole(grad) or is_hole(update):
            continue
        if label not in groups:
            raise ValueError(
                f"the labels of fo.measured have {label!r} for the gradients, but for the params "
                f"{quoted_list(list(map(str, norms)))} alone; label each leaf by its path"
            )
        groups[label][1].append(grad)
        groups[label][2].append(update)
    # In the order of the structure, which is not that of the dict.
    labels, treedef = jax.tree.flatten({label: label for label in norms})
    return [groups[label] for label in labels], treedef


def _sums_of_squares(grads: list[Any], updates: list[Any]) -> tuple[Any, Any]:
    """Returns the sums of the squares of the gradient and of the update of a step, of one dtype."""
    sums = _sum_of_squares(grads), _sum_of_squares(updates)
    widest = jnp.promote_types(sums[0].dtype, sums[1].dtype)
    return sums[0].astype(widest), sums[1].astype(widest)


def _of_one_type(vectors: Sequence[Any], squares: dict[int, Any]) -> list[list[int]]:
    """Returns the indices of the vectors that `_next_vectors` may stack, in lists."""
    lists: dict[Any, list[int]] = {}
    for i, sums in squares.items():
        kinds = [_kind_of_tracer(x) for x in (vectors[i], *sums)]
        # Eager arrays may be on different devices.
        lists.setdefault(i if None in kinds else tuple(kinds), []).append(i)
    return list(lists.values())


def _kind_of_tracer(x: Any) -> Any:
    """Returns what two tracers have in common that may be stacked; None for an eager array.

    A stack of which `jax.vmap` maps one array is mapped as a whole, and with it those that are not.
    Their types do not tell.
    """
    if not isinstance(x, Tracer):
        return None
    return jax.typeof(x), type(x), id(getattr(x, "_trace", None))


def _next_vectors(
    next_vector: Callable[..., Any], stacked: Sequence[tuple[Any, Any, Any]]
) -> Sequence[Any]:
    """Returns the vectors of norms after a step, each from a vector and two sums of squares.

    They are computed as one array. XLA compiles a few kernels for each array, which would be
    thousands for hundreds of leaves.
    """
    if len(stacked) == 1:
        return [next_vector(*stacked[0])]
    new = jax.vmap(next_vector)(*map(jnp.stack, zip(*stacked, strict=True)))
    return [new[i] for i in range(len(stacked))]


def _next_vector(vector: Any, grads: Any, updates: Any, decay: Any) -> Any:
    """Returns the vector of norms after a step, of which the sums of squares are known."""
    squares = jnp.stack([grads, updates])
    # The slope of the root is infinite at 0, where it would meet the zeros of other leaves.
    is_zero = squares == 0
    last = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares))).astype(jnp.float32)
    steps, averages, changes, before = vector[:1] + 1, vector[1:3], vector[3:5], vector[5:]
    averages = averages + _weight(steps, decay) * (last - averages)
    # The first step has nothing to change from.
    weight = jnp.where(steps > 1, _weight(jnp.maximum(steps - 1, 1), decay), 0)
    changes = changes + weight * (jnp.abs(last - before) - changes)
    new = jnp.concatenate([steps, averages, changes, last])
    return jnp.where(jnp.isfinite(last).all(), new, vector)


def norm_of(arrays: Sequence[Any]) -> Any:
    """Returns the norm of all numbers in some arrays, in float32."""
    return jnp.sqrt(_sum_of_squares(arrays)).astype(jnp.float32)


def _sum_of_squares(arrays: Sequence[Any]) -> Any:
    """Returns the sum of the squares of all numbers in some arrays, in float32 or float64."""
    sums = [square for x in arrays for square in _squares_of(x)]
    widest = jnp.float64 if any(x.dtype == jnp.float64 for x in sums) else jnp.float32
    return sum((x.astype(widest) for x in sums[1:]), sums[0].astype(widest))


def _squares_of(x: Any) -> list[Any]:
    """Returns the sum of the squares of an array; of complex numbers, those of both parts."""
    parts = (x.real, x.imag) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,)
    return [jnp.sum(jnp.square(_widened(part))) for part in parts]


def _widened(x: Any) -> Any:
    """Returns an array in float32, or in float64 for doubles.

    In float16 the square of 256 is infinite. XLA leaves a conversion to a narrow dtype and back
    out, so the norm would be of numbers that were never rounded to it.
    """
    if x.dtype in (jnp.bfloat16, jnp.float16):
        kind = jnp.finfo(x.dtype)
        return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)
    is_narrow = x.dtype.itemsize < np.dtype(np.float32).itemsize
    return (jax.lax.optimization_barrier(x) if is_narrow else x).astype(factor_dtype(x))


def _weight(count: Any, decay: Any) -> Any:
    """Returns the weight of the newest of `count` values in their debiased average.

    With it the state holds the debiased average itself, and reading it needs no decay. `expm1`, as
    1 - 0.999 ** n has few digits in float32.
    """
    if isinstance(decay, Tracer):
        weight = (1 - decay) / -jnp.expm1(count * jnp.log(decay))
    else:
        log = math.log(decay) if decay else -math.inf
        weight = float(1 - decay) / -jnp.expm1(count * log)
    return jnp.where(count > 1, weight, 1)  # which the quotient is but for its rounding
