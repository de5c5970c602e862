"""The inner state that `init` makes for some parts of the params alone."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._state.plan import Plan
from freeze_optax._tree.kinds import is_numpy_only, number_kind
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_copies, rewrap_copies
from freeze_optax._tree.memory import put_tree_in_memory


def init_leaves(plan: Plan, params: Any, wanted: Sequence[bool]) -> Any:
    """Returns the inner state of the wanted parts alone, in the containers that `init` saw.

    It is in device memory, also where a parameter is in host memory: see `init_in_memory`.
    """
    copies = param_copies(params)
    rebuilt: list[Any] = []
    for i, containers in enumerate(param_copies(plan.context.skeleton)):
        param_values = Leaves(copies[min(i, len(copies) - 1)])
        leaves = Leaves(containers)
        leaves.values = plan.in_plan_order(param_values, param_values.values)
        live = plan.drop_parts(leaves, [not flag for flag in wanted])
        rebuilt.append(put_tree_in_memory(live, None))
    return plan.context.init(rewrap_copies(plan.context.skeleton, rebuilt))


def abstract_init(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns the state that `init` would make, as `jax.ShapeDtypeStruct`s, with its plans."""
    leaves = Leaves(params)
    array_types = jax.Array | jax.ShapeDtypeStruct
    traced = [
        isinstance(x, array_types) or (number_kind(x) != "other" and not is_numpy_only(x))
        for x in leaves.values
    ]

    def of_arrays(arrays: list[Any]) -> Any:
        values = iter(arrays)
        pairs = zip(leaves.values, traced, strict=True)
        return init(leaves.rebuild(next(values) if flag else x for x, flag in pairs))

    # This is no `init` of the user, so the warning that nothing is left to train would be wrong.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jax.eval_shape(
            of_arrays, [x for x, f in zip(leaves.values, traced, strict=True) if f]
        )
