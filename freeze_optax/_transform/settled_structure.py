"""Inner states that `update` gives another structure than `init`."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from freeze_optax._tree.lookahead import param_copies


def with_settled_structure(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation with an `init` that gives the structure that `update` gives.

    `optax.monitor` makes its measurements at the first update, in a dict that is empty until then.
    Edits, cohorts and `scheduled` need one structure. Measurements that are not made yet are zeros.
    """

    # Not named `init`, because errors name the innermost transformation whose `init` fails.
    def make_state(params: optax.Params) -> Any:
        return settled_state(inner, inner.init(params), params)

    return optax.GradientTransformationExtraArgs(make_state, inner.update)


def settled_state(
    inner: optax.GradientTransformationExtraArgs, state: Any, params: Any
) -> optax.OptState:
    """Returns the state with zeros for the arrays that the first update adds to it.

    Args:
      inner: The transformation of the state.
      state: The state, before or after the first update.
      params: The params, or params with holes, as `init` got them.
    """
    # A trace of `update` takes time, so it is made only where a state has room to grow.
    if not any(map(_is_empty, jax.tree.leaves(state, is_leaf=_is_empty))):
        return state

    def next_shapes(state: Any) -> Any:
        grads = param_copies(params)[0]
        return jax.eval_shape(lambda grads, s: inner.update(grads, s, params)[1], grads, state)

    # An update that fails here may need extra arguments. If it does change the structure, the error
    # of the edit says so.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = next_shapes(state)
            if jax.tree.structure(after) == jax.tree.structure(state):
                return state
            grown = _filled(after, state)
            is_settled = jax.tree.structure(next_shapes(grown)) == jax.tree.structure(after)
    except Exception:  # noqa: BLE001
        return state
    return grown if is_settled else state


def _is_empty(x: Any) -> bool:
    return x is None or (_may_grow(type(x)) and not x)


@functools.cache  # as a check against an abstract class takes time, and there is one for each node
def _may_grow(cls: type) -> bool:
    return issubclass(cls, Mapping | list)


def _filled(after: Any, state: Any) -> Any:
    """Returns the state with the structure of the next one, and zeros where it has no array."""
    old = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    new, treedef = jax.tree_util.tree_flatten_with_path(after)
    values = [old.pop(keys, None) for keys, _ in new]
    if old or any(
        x is not None and np.shape(x) != like.shape
        for x, (_, like) in zip(values, new, strict=True)
    ):
        raise ValueError("the state does not grow, it changes")
    zeros = (jnp.zeros(like.shape, like.dtype) for _, like in new)
    pairs = zip(values, zeros, strict=True)
    return jax.tree.unflatten(treedef, [zero if x is None else x for x, zero in pairs])
