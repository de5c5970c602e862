"""Tells a chain of two `freezable`s in which nothing trains.

`optax.chain(optax.masked(a, x), optax.masked(b, y))` gives each leaf to one optimizer. With two
`freezable`s in their place, the second one gets zeros for the gradients of what the first one
froze, and its own updates of all that the first one trained are zeros.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import jax

from freeze_optax._rows.flags import Flag, flag_minus, flag_not
from freeze_optax._state.plan import Plan
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list

# By identity, not by value: a gradient may well be zero, but it is no array that another
# `freezable` has made. The references are weak, as the arrays may be tracers.
_made: dict[int, tuple[weakref.ref[Any], Flag]] = {}


def remember_updates(updates: Sequence[Any], frozen: Sequence[Flag]) -> None:
    """Remembers, while they exist, the updates that have zeros for what is frozen.

    Args:
      updates: The updates of the leaves.
      frozen: For each leaf, whether its update is zero, or which part of it is.
    """
    for update, flag in zip(updates, frozen, strict=True):
        key = id(update)
        if flag is False or key in _made or not isinstance(update, jax.Array):
            continue
        # An entry goes when its array goes, before another array can have the same id.
        _made[key] = weakref.ref(update, lambda _, key=key: _made.pop(key, None)), flag


def check_not_chained(grads: Leaves, plan: Plan) -> None:
    """Raises if all that trains has zeros for gradients that another `freezable` has made."""
    trained: list[str] = []
    for path, grad, frozen in zip(plan.paths, grads.values, plan.mask, strict=True):
        if frozen is True:
            continue
        reference, zero = _made.get(id(grad), (None, False))
        if reference is None or reference() is not grad:
            return
        if flag_minus(flag_not(frozen), zero, grad.shape) is not False:
            return
        trained.append(path)
    if trained:
        raise ValueError(
            f"all that this freezable trains ({quoted_list(trained)}) is frozen by another one "
            "before it in the chain, so its gradients are zeros and nothing trains; two optimizers "
            "for parts of the params are one freezable: "
            "fo.freezable(optax.partition({'slow': tx_1, 'fast': tx_2}, labels), frozen)"
        )
