"""The inner state as `init` makes it, for some parts of the params alone."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._state.plan import Plan
from freeze_optax._tree.kinds import is_numpy_only, number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, rewrap_copies


def init_leaves(plan: Plan, params: Any, wanted: Sequence[bool]) -> Any:
    """The inner state as `init` makes it for the wanted parts alone, in its own containers."""
    copies = param_copies(params)
    rebuilt: list[Any] = []
    for i, containers in enumerate(param_copies(plan.context.skeleton)):
        given = Leaves(copies[min(i, len(copies) - 1)])
        leaves = Leaves(containers)
        leaves.values = plan.in_own_order(given, given.values)
        rebuilt.append(plan.drop_parts(leaves, [not flag for flag in wanted]))
    return plan.context.init(rewrap_copies(plan.context.skeleton, rebuilt))


def abstract_init(init: Callable[[Any], Any], params: Any) -> Any:
    """The state that `init` would make, as shapes, with its plans."""
    leaves = Leaves(params)
    known = jax.Array | jax.ShapeDtypeStruct
    traced = [
        isinstance(x, known) or (number_kind(x) != "other" and not is_numpy_only(x))
        for x in leaves.values
    ]

    def of_arrays(arrays: list[Any]) -> Any:
        given = iter(arrays)
        both = zip(leaves.values, traced, strict=True)
        return init(leaves.rebuild(next(given) if flag else x for x, flag in both))

    with warnings.catch_warnings():  # of nothing left to train, which is not settled here
        warnings.simplefilter("ignore")
        return jax.eval_shape(
            of_arrays, [x for x, f in zip(leaves.values, traced, strict=True) if f]
        )
