"""Assertions for tests of code that freezes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._rows.flags import Flag
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import put_bitwise, take_bitwise
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import path_differences, printable

__all__ = ["assert_frozen"]


def assert_frozen(before: Any, after: Any, frozen: Spec) -> None:
    """Asserts that each frozen leaf is bit-identical before and after.

    It compares bits, not values: -0.0 differs from 0.0, and a NaN equals only a NaN with the same
    bits. Leaves that cannot be trained (integers, bools, PRNG keys, anything that is neither an
    array nor a Python float or complex) count as frozen, whatever the spec selects. So the error
    also names a step counter that has moved on.

    Examples:
      >>> import jax.numpy as jnp
      >>> from freeze_optax.testing import assert_frozen
      >>> before = {"encoder": jnp.zeros(2), "head": jnp.zeros(2)}
      >>> assert_frozen(before, {"encoder": jnp.zeros(2), "head": jnp.ones(2)}, "encoder")
      >>> assert_frozen(before, {"encoder": -jnp.zeros(2), "head": jnp.ones(2)}, "encoder")
      Traceback (most recent call last):
      ...
      AssertionError: 1 frozen leaf is not bit-identical:
        encoder: 2 of 2 elements differ, first at (0,): 0.0 became -0.0

    Args:
      before: The params at one time.
      after: The params later, with the same structure.
      frozen: The leaves that must not have changed: any spec, see `freeze_optax.mask`.

    Raises:
      AssertionError: If a frozen leaf changed; the error names each such leaf with its first
        element that differs. Also if the trees have different leaves.
      ValueError: If the spec does not fit `before`, or a pattern selects nothing.
      IndexError: If `fo.layers(pattern)[i]` names a layer that does not exist.
      TypeError: If a mask or a predicate gives anything but bools.
    """
    old, new = Leaves(before), Leaves(after)
    flags = resolve(frozen, old)
    if old.paths != new.paths:
        differences = path_differences(old.paths, new.paths, "before", "after")
        raise AssertionError(f"the trees have different leaves; {differences}")
    entries = zip(old.paths, old.values, new.values, flags, strict=True)
    changes = [(path, _change_of(a, b, flag)) for path, a, b, flag in entries if flag]
    changed = [f"  {printable(path)}: {change}" for path, change in changes if change]
    if changed:
        count = "1 frozen leaf is" if len(changed) == 1 else f"{len(changed)} frozen leaves are"
        raise AssertionError(f"{count} not bit-identical:\n" + "\n".join(changed))


def _change_of(old: Any, new: Any, frozen: Flag) -> str | None:
    """Describes the change of the frozen part of a leaf; None if there is no change."""
    if not isinstance(frozen, Subset) or old is new:
        return _change(old, new)
    if (getattr(new, "shape", None), getattr(new, "dtype", None)) != (old.shape, old.dtype):
        return _change(old, new)
    return _change(old, put_bitwise(new, ~frozen, take_bitwise(old, ~frozen)))


def _change(old: Any, new: Any) -> str | None:
    """Describes the change of a leaf; None if it is bit-identical."""
    if old is new or (is_hole(old) and is_hole(new)):
        return None
    if not (is_array(old) and is_array(new)):
        same = type(old) is type(new) and _equal_objects(old, new)
        return None if same else f"{old!r} became {new!r}"
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{old.dtype}{list(old.shape)} became {new.dtype}{list(new.shape)}"
    old_elements, new_elements = _host(old), _host(new)
    differs = (
        old_elements != new_elements
        if old.dtype == object
        else (_bits(old_elements) != _bits(new_elements)).any(axis=-1)
    )
    # A PRNG key has several numbers, but is one element of its leaf.
    differs = differs.any(axis=tuple(range(old.ndim, differs.ndim)))
    if not differs.any():
        return None
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    values = f"{old_elements[first]} became {new_elements[first]}"
    return f"{differs.sum()} of {differs.size} elements differ, first at {first}: {values}"


def _equal_objects(old: Any, new: Any) -> bool:
    """Whether two values other than arrays are equal; floats are compared bit by bit."""
    if isinstance(old, float | complex):
        return bool((_bits(np.asarray(old)) == _bits(np.asarray(new))).all())
    return bool(old == new)


def _host(x: Any) -> np.ndarray:
    """Returns an array as a NumPy array; PRNG keys as their key data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def _bits(x: np.ndarray) -> np.ndarray:
    """Returns the bytes of each element, in a trailing axis."""
    if x.dtype == jax.dtypes.float0:
        return np.zeros((*x.shape, 0), np.uint8)
    flat = np.ascontiguousarray(x).reshape(-1)
    return flat.view(np.uint8).reshape(*x.shape, x.dtype.itemsize)
