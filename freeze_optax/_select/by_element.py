"""The selector of single elements of a leaf."""

from collections.abc import Callable
from typing import Any, final

import jax
import numpy as np
from jax.core import Tracer

from freeze_optax._rows.flags import Flag, flag_and, flag_from_mask
from freeze_optax._select.selector import Selector
from freeze_optax._select.specs import Spec, as_selector
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves


@final
class _Elements(Selector):
    def __init__(self, spec: Spec, mask: np.ndarray | Callable[[Any], Any]):
        self._selector, self._mask = as_selector(spec), mask

    def flags(self, leaves: Leaves) -> list[Flag]:
        triples = zip(leaves.paths, leaves.values, self._selector.flags(leaves), strict=True)
        return [self._flag(*triple) for triple in triples]

    def _flag(self, path: str, leaf: Any, flag: Flag) -> Flag:
        if flag is False or is_hole(leaf) or not can_train(leaf):
            return False
        mask = self._mask if isinstance(self._mask, np.ndarray) else self._mask(leaf)
        mask = _as_bools(mask, f"{self!r}: the mask of {path!r}")
        shape = np.shape(leaf)
        if mask.shape != shape:
            raise ValueError(
                f"{self!r}: the leaf {path!r} is of shape {shape}, but the mask of its elements is "
                f"of shape {mask.shape}; it takes one bool for each element"
            )
        return flag_and(flag, flag_from_mask(mask), shape)

    def __repr__(self) -> str:
        mask = self._mask
        text = f"bools of shape {mask.shape}" if isinstance(mask, np.ndarray) else _name(mask)
        return f"elements({self._selector!r}, {text})"


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))


def _as_bools(mask: Any, what: str) -> np.ndarray:
    """Returns a mask as a NumPy array of bools; `what` begins the error if it is none."""
    if isinstance(mask, Tracer):
        raise TypeError(f"{what} is traced, but what is frozen is settled before tracing")
    try:
        array = np.array(mask)
    except ValueError:  # lists of several lengths
        array = np.asarray(None)
    if array.dtype != bool:
        raise TypeError(f"{what} holds bools, not {array.dtype} ({type(mask).__name__})")
    return array


def elements(spec: Spec, mask: np.ndarray | jax.Array | Callable[[Any], Any]) -> Selector:
    """Selects single elements of each leaf that a spec selects.

    Use it for sparse fine-tuning, which trains some per cent of the weights and freezes all others:
    `frozen=~fo.elements("**/kernel", mask)` trains the elements of the kernels at which the mask is
    True.

    The optimizer gets the elements that train as one vector for each leaf, in the order of the
    leaf, and keeps state for these alone. An optimizer that treats each element alone (Adam,
    momentum, Lion) updates them as it would in the whole leaf. One with a norm for each leaf (LAMB,
    LARS) takes the norm of the vector. One that computes along the axes of a leaf (Muon, factored
    Adafactor, SM3) has no meaning for a vector, so `init` and edits raise.

    A compiled step holds the indices of the elements that train: four bytes for each element and
    axis. `freeze_optax.summary` counts them. On a mesh each device has the whole vector.

    Elements that turn out to be rows along one axis, or all or none of a leaf, are treated as such.

    Examples:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import optax
      >>> import freeze_optax as fo
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> trained = fo.elements("kernel", np.array([[True, False, False], [False, True, True]]))
      >>> state = fo.freezable(optax.adam(1e-3), ~trained).init(params)
      >>> optax.tree_utils.tree_get(state, "mu")
      {'bias': MaskedNode(), 'kernel': Array([0., 0., 0.], dtype=float32)}
      >>> positive = fo.elements("**", lambda leaf: np.asarray(leaf) > 0)

    Args:
      spec: Which leaves: any spec, see `freeze_optax.mask`.
      mask: A bool for each element, an array of the shape of the leaves; or a function that takes a
        leaf and returns such an array. A function is called for the leaves that can train.

    Returns:
      The selector. In its mask each such leaf has a NumPy array of bools of the leaf's shape; of
      fewer bools where they are rows along one axis, see `freeze_optax.rows`. Applied to a tree, it
      raises ValueError, naming the path and both shapes, if the mask has another shape than a leaf,
      and TypeError if a function returns anything but bools.

    Raises:
      TypeError: If `mask` is neither bools nor a function, or is traced.
    """
    if callable(mask):
        return _Elements(spec, mask)
    return _Elements(spec, _as_bools(mask, "the mask of elements"))
