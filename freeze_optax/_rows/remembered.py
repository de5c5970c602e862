"""Arrays that were made of a compact array and zeros, with that compact array.

A step makes the whole gradient of a leaf out of what trains of it, and zeros. `update` then takes
what trains out of it again. XLA can't see that a gather undoes a scatter, so it would do both, with
the zeros. Here the array itself tells: while it exists, its compact array is known, and a whole
array that nothing else reads is never made.
"""

import weakref
from typing import Any

import jax

from freeze_optax._rows.subset import Subset
from freeze_optax._tree.memory import memory_of

# By identity, as a function of the whole array (a clipped gradient) has other values. The
# references to whole arrays are weak, as they may be tracers.
_made: dict[int, tuple[weakref.ref[Any], Subset, Any]] = {}


def remember_compact(whole: Any, subset: Subset, compact: Any) -> None:
    """Remembers, while it exists, what an array was made of.

    Args:
      whole: The array, which has zeros outside of the subset.
      subset: The subset.
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


def remembered_compact(whole: Any, subset: Subset) -> Any:
    """Returns the compact array of a subset if the array was made of it; None if not."""
    reference, known, compact = _made.get(id(whole), (None, None, None))
    is_same = reference is not None and reference() is whole and known == subset
    return compact if is_same else None
