"""Placement of models and optimizers in place."""

from typing import Any

import jax

from freeze_optax._edit.place import place as place_params
from freeze_optax._edit.place import place_state as place_statistics
from freeze_optax._select.specs import Spec
from freeze_optax._tree.variables import is_variable
from freeze_optax.nnx._edits import check_optimizer
from freeze_optax.nnx._flax import nnx
from freeze_optax.nnx._specs import OnModel
from freeze_optax.nnx._wrt import variables_of


def place(
    model: nnx.Module, frozen: Spec, memory: str = "pinned_host", wrt: Any = nnx.Param
) -> None:
    """Moves frozen variables to host memory, in place, as `freeze_optax.place` does for a tree.

    Those that train go to the device. The inverse is `memory="device"`.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(1e-3), "kernel"), wrt=nnx.Param)
      >>> fnnx.place(model, optimizer)
      >>> model.kernel[...].sharding.memory_kind, model.bias[...].sharding.memory_kind
      ('pinned_host', 'device')

    Args:
      model: The model.
      frozen: What goes to `memory`: any spec, as for `freeze_optax.nnx.wrt`; usually the optimizer.
      memory: The kind of memory for what is frozen, as for `freeze_optax.place`.
      wrt: An NNX filter, a type of Variable for example: the variables to place. All others stay.

    Raises:
      TypeError: If `model` is not an NNX module, or as `freeze_optax.place`.
      ValueError: If no variable of the model is matched by `wrt`, or as `freeze_optax.place`. After
        an error the model is unchanged.
      IndexError: As `freeze_optax.place`.
    """
    variables = variables_of(model, wrt)
    placed = place_params(variables, OnModel(frozen, model), memory)
    if placed is not variables:
        _set_variables(variables, placed)


def place_state(optimizer: nnx.Optimizer[Any], memory: str = "pinned_host") -> None:
    """Moves the statistics of parked variables, in place, as `freeze_optax.place_state` does.

    Examples:
      >>> import optax
      >>> import freeze_optax as fo
      >>> from flax import nnx
      >>> from freeze_optax import nnx as fnnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(1e-3)), wrt=nnx.Param)
      >>> fnnx.freeze(optimizer, model, "kernel", keep_state=True)
      >>> fnnx.place_state(optimizer)
      >>> optimizer.opt_state.inner[0].mu["kernel"][...].sharding.memory_kind
      'pinned_host'

    Args:
      optimizer: An optimizer whose transformation is a `freeze_optax.freezable`, or contains one.
      memory: The kind of memory for what is parked, as for `freeze_optax.place_state`.

    Raises:
      TypeError: If `optimizer` is not an `nnx.Optimizer`, or as `freeze_optax.place_state`.
      ValueError: As `freeze_optax.place_state`. ValueError also if the optimizer is a stored copy,
        and another edit has changed the original. After an error the optimizer is unchanged.
    """
    check_optimizer("place_state", optimizer)
    state = optimizer.opt_state
    placed = place_statistics(state, memory)
    if placed is not state:
        _set_variables(state, placed)


def _set_variables(old: Any, new: Any) -> None:
    """Gives the Variables of a tree the values that they have in another tree."""
    trees = (jax.tree.leaves(x, is_leaf=is_variable) for x in (old, new))
    for variable, other in zip(*trees, strict=True):
        pairs = zip(jax.tree.leaves(variable), jax.tree.leaves(other), strict=True)
        if is_variable(variable) and any(x is not y for x, y in pairs):
            # Not `variable[...] = value`, which in Flax 0.12.8 keeps the memory of the old value.
            variable.update_from_state(other)
