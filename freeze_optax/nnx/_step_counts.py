"""The step count of an `nnx.Optimizer`, which tells a stale copy of the optimizer from the present.

`nnx.cached_partial` and `nnx.jit_partial` keep the graph of their arguments, and share the
Variables with the caller. A plan is part of the graph. So after an edit the stored function would
still follow the old plan, and nothing that it reads would differ: Flax does not look at the graph
again, only at the values of the Variables. Therefore an edit gives the optimizer a new Variable for
its step, and leaves a `StaleStep` in the old one. As this is another tree, jit traces the stored
function again. The trace reads the step in `optimizer.update`, if not earlier, and a `StaleStep`
raises.

The step was chosen because each optimizer has one. The state of `optax.sgd`, for example, has no
Variables.
"""

import dataclasses
from typing import Any, NoReturn, final

import jax

from freeze_optax._tree.variables import is_variable

_MESSAGE = (
    "this optimizer is out of date: freeze, thaw or set_frozen of freeze_optax.nnx has changed "
    "what it trains since it was stored. nnx.cached_partial and nnx.jit_partial store the "
    "optimizer as it is: call them again after an edit. After an edit the step count is another "
    "Variable: take optimizer.step again. In tree mode, an edit inside of nnx.jit does not reach "
    "the optimizer outside: edit it outside of nnx.jit"
)


def _raise(*_: Any) -> NoReturn:
    raise ValueError(_MESSAGE)


@final
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaleStep:
    """Takes the place of the number in the step count that an edit has replaced; any use raises."""

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _raise
    __truediv__ = __floordiv__ = __mod__ = __lt__ = __le__ = __gt__ = __ge__ = _raise
    __int__ = __index__ = __float__ = __bool__ = __array__ = __jax_array__ = astype = _raise
    dtype = shape = property(_raise)


def check_current(optimizer: Any) -> None:
    """Raises ValueError if an edit has replaced the step count of an optimizer."""
    steps = jax.tree.leaves(optimizer.step, is_leaf=lambda x: isinstance(x, StaleStep))
    if any(isinstance(step, StaleStep) for step in steps):
        _raise()


def renew_step_count(optimizer: Any) -> None:
    """Gives an optimizer a new Variable for its step, and makes the old one raise."""
    old = optimizer.step
    if is_variable(old):
        optimizer.step = old.copy()
        old.update_from_state(old.replace(StaleStep()))
