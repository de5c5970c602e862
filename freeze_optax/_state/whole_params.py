"""The params that a state is made for, without holes, for the transformations inside of it.

`freezable` gives its inner transformation params with holes. A rule of `fo.rates` that reads leaves
(`freeze_optax.where`) would not see what is frozen, so whether it wins a leaf would depend on what
is frozen.
"""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.lookahead import param_leaves

_whole: ContextVar[Leaves | None] = ContextVar("_whole", default=None)


@contextlib.contextmanager
def making_state_for(params: Any) -> Generator[None, None, None]:
    """Tells each `init` in the `with` block the whole params; the outermost block counts."""
    token = _whole.set(_whole.get() or param_leaves(params))
    try:
        yield
    finally:
        _whole.reset(token)


def whole_leaves(leaves: Leaves) -> Leaves:
    """Returns the leaves of the whole params, if these are some of them; else `leaves`."""
    whole = _whole.get()
    return whole if whole and set(leaves.paths) <= set(whole.paths) else leaves
