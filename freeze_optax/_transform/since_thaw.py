"""`since_thaw`: a schedule that each leaf begins when it begins to train."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from freeze_optax._state.mapped_state import mapped_state
from freeze_optax._transform.scaling import scale_update
from freeze_optax._tree.holes import HOLE, is_hole, is_placeholder
from freeze_optax._tree.lookahead import param_copies
from freeze_optax._tree.node_types import nodes_of_type
from freeze_optax._tree.variables import is_variable_or_box


class SinceThawState(NamedTuple):
    """State of `freeze_optax.since_thaw`.

    Attributes:
      count: How many steps the leaves have trained, an int32 scalar. In a `FreezeState` this is the
        count of the first cohort; the later ones have theirs in `FreezeState.ages`.
      leaves: A tree like the params that holds nothing: a hole for each leaf. A node with such a
        tree starts again with a leaf, which is how each cohort gets its own count.
    """

    count: Any
    leaves: Any


def since_thaw(schedule: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by `schedule(n)`, where n counts the steps that the leaf has trained.

    A group of leaves that is thawed at step 500 begins the schedule there, with n = 0, so it warms
    up while the others are at their full rate. A parked group goes on where it stopped. It goes
    into the chain inside `freeze_optax.freezable`; outside of it n counts all steps.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> warmup = optax.linear_schedule(0.0, 1.0, transition_steps=2)
      >>> tx = fo.freezable(optax.chain(optax.sgd(1.0), fo.since_thaw(warmup)), frozen="body")
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> state = fo.thaw(state, params, "body")
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> updates["body"], updates["head"]
      (Array([-0.5], dtype=float32), Array([-1.], dtype=float32))

    Args:
      schedule: A function from a number of steps, an int32 scalar, to a real number, as the
        schedules of optax are.

    Returns:
      A transformation. Its state is one int32 scalar for all leaves that were thawed together. The
      update keeps its dtype. Where the schedule gives 0, the update is -0.0, also where it was NaN.

    Raises:
      TypeError: If `schedule` is not callable.
    """
    if not callable(schedule):
        raise TypeError(
            f"fo.since_thaw takes a schedule, a function from steps to a factor, not {schedule!r}; "
            "write fo.since_thaw(optax.linear_schedule(0.0, 1.0, 100)); a number goes to fo.rates"
        )

    def init_fn(params: optax.Params) -> Any:
        count = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            states = nodes_of_type(SinceThawState, mapped_state())
            # Of several states any will do: all have holes for the leaves that train or are parked.
            return SinceThawState(count, states[0].leaves if states else params)
        return SinceThawState(count, _holes_like(param_copies(params)[0]))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra
        factor = jnp.asarray(schedule(state.count))
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            factor = factor.astype(jnp.float32)
        scaled = jax.tree.map(lambda update: scale_update(update, factor), updates)
        count: Any = optax.safe_increment(state.count)
        return scaled, SinceThawState(count, state.leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _holes_like(tree: Any) -> Any:
    """Returns the containers of a tree, with a hole for each leaf, each Variable and each box."""
    return jax.tree.map(lambda _: HOLE, tree, is_leaf=lambda x: is_hole(x) or is_variable_or_box(x))
