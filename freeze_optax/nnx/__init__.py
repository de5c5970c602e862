"""Flax NNX: freezing with the model at hand, and editing an optimizer in place.

NNX keeps a state in Variables of its own. So to continue with an exported state, let the optimizer
start with it. Its `step` belongs to NNX and is not exported: set `optimizer.step[...] = step`.

    >>> import optax
    >>> import freeze_optax as fo
    >>> from flax import nnx
    >>> model, tx = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), fo.freezable(optax.adam(1e-3), "kernel")
    >>> exported = fo.export_state(nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state)
    >>> resumed = tx._replace(init=lambda params: fo.import_state(tx, params, exported))
    >>> optimizer = nnx.Optimizer(model, resumed, wrt=nnx.Param)
    >>> optimizer.tx = tx  # which does not hold the export
"""

from freeze_optax.nnx._edits import adjust, freeze, set_frozen, thaw
from freeze_optax.nnx._gradients import grad, value_and_grad
from freeze_optax.nnx._modules import modules
from freeze_optax.nnx._place import place, place_state
from freeze_optax.nnx._wrt import TrainableVariables, wrt

__all__ = [
    "adjust",
    "freeze",
    "grad",
    "modules",
    "place",
    "place_state",
    "set_frozen",
    "thaw",
    "value_and_grad",
    "wrt",
]

_Variables = TrainableVariables
"""The name under which pickles of version 0.1.0 look for the filter that `wrt` gives."""
