"""The search for the one `FreezeState` in a tree: a chain's state, a `TrainState` and so on."""

from typing import Any

import jax
import numpy as np
import optax

from freeze_optax._state.freeze_state import FreezeState, states_in
from freeze_optax._state.rotation import RotatingState
from freeze_optax._tree.node_types import nodes_of_type, replace_node


def only_state(verb: str, tree: Any) -> FreezeState:
    """Returns the one `FreezeState` in a tree; raises if there is none, or if there are several."""
    if isinstance(tree, optax.GradientTransformation):
        raise TypeError(
            f"{verb} takes an optimizer state, not a transformation; to choose what a new "
            "state freezes write fo.freezable(inner, frozen); for a state that exists already "
            f"write fo.{_example_call(verb, 'opt_state')}"
        )
    states = states_in(tree)
    if not states:
        raise TypeError(
            f"{verb} was given a {type(tree).__name__} for its state, which holds no FreezeState; "
            f"the order is {_example_call(verb, 'state')}, with a state of fo.freezable"
        )
    if len(states) > 1:
        raise ValueError(
            f"{verb} was given a {type(tree).__name__} with {len(states)} FreezeStates, not one; "
            "edit one of them alone and put the result in its place"
        )
    return states[0]


def _example_call(verb: str, state: str) -> str:
    """Returns the code of a call of `verb`, for error messages."""
    arguments = {
        "Convergence.at": f"step, {state}, params",
        "export_state": state,
        "import_state": "tx, params, exported",
        "place_state": state,
    }
    return f"{verb}({arguments.get(verb, f'{state}, params, ...')})"


def editable_state(verb: str, tree: Any) -> FreezeState:
    """Returns the one `FreezeState` in a tree; raises also if it is one of `scheduled`."""
    state = only_state(verb, tree)
    if state.plan.schedule:
        raise ValueError(
            f"the state of fo.scheduled follows its phases; it can't be edited by {verb}"
        )
    return state


def params_of_state(tree: Any, params: Any) -> Any:
    """Returns the params as the state in a tree has them.

    Where layers take turns (`freeze_optax.rotating`), these are the layers that train now in place
    of the stack.
    """
    states = nodes_of_type(RotatingState, tree)
    if not states:
        return params
    state, rows = states[0], states[0].rows
    if isinstance(rows, jax.ShapeDtypeStruct):  # then only the shapes and the devices count
        rows = np.arange(state.rotation.count, dtype=np.int32)
    return state._replace(rows=rows).take(params)


def replace_state(tree: Any, state: Any) -> Any:
    """Returns the tree with `state` in the place of its `FreezeState`."""
    return replace_node(FreezeState, tree, state)
