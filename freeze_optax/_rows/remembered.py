"""Arrays that were made of a compact array and zeros, with that compact array.

A step makes the whole gradient of a leaf out of what trains of it, and zeros. `update` then takes
what trains out of it again. XLA can't see that a gather undoes a scatter, so it would do both, with
the zeros. Here the array itself tells: while it exists, its compact array is known, and a whole
array that nothing else reads is never made.
"""

import weakref
from typing import Any

import jax

from freeze_optax._tree.memory import memory_of

# By identity, as a function of the whole array (a clipped gradient) has other values. The
# references to whole arrays are weak, as they may be tracers.
_made: dict[int, tuple[weakref.ref[Any], Any, Any]] = {}


def remember_compact(whole: Any, subset: Any, compact: Any) -> None:
    """Remembers, while it exists, what an array was made of.

    Args:
      whole: The array, which has zeros outside of the subset.
      subset: The subset: a `Subset`, or a `RowsByValue`.
      compact: Its compact array.
    """
    # What is taken out of an array in host memory is there too.
    if not isinstance(whole, jax.Array) or memory_of(whole) or memory_of(compact):
        return
    if compact.dtype != whole.dtype:
        return
    key = id(whole)
    # An entry goes when its array goes, before another array can have the same id.
    reference = weakref.ref(whole, lambda _: _made.pop(key, None))
    _made[key] = reference, subset, compact


def remembered_compact(whole: Any, subset: Any) -> Any:
    """Returns the compact array of a subset if the array was made of it; None if not."""
    known, compact = remembered_parts(whole)
    return compact if known is not None and known == subset else None


def remembered_parts(whole: Any) -> tuple[Any, Any]:
    """Returns the subset that an array was made of, and its compact array; None for both if none.

    Args:
      whole: Any array.
    """
    reference, subset, compact = _made.get(id(whole), (None, None, None))
    return (subset, compact) if reference is not None and reference() is whole else (None, None)
