"""Which leaves of the params get a score."""

import math
import operator
import warnings
from collections.abc import Sequence

import jax
from jax.core import Tracer

from freeze_optax._rows.flags import Flag
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.key_paths import check_unique
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.overwritten import overwritten


def scored_leaves(
    leaves: Leaves, frozen: Sequence[Flag], name: str, least_ranks: Sequence[int]
) -> list[int]:
    """Returns the indices of the leaves that get a score.

    These are the leaves that are not frozen as a whole, and have enough axes. What a step of Flax
    overwrites (the scales of fp8 layers) is no weight. Leaves without values, and without elements,
    have no score: a warning names the former.

    Args:
      leaves: The leaves of the params.
      frozen: What is frozen of each.
      name: The name of the public function, for errors.
      least_ranks: For each leaf, how many axes it needs.

    Raises:
      TypeError: If a leaf is traced.
      ValueError: If two leaves have the same path.
    """
    columns = zip(leaves.values, frozen, overwritten(leaves), least_ranks, strict=True)
    found = [
        i
        for i, (leaf, flag, is_overwritten, rank) in enumerate(columns)
        if not (flag is True or is_hole(leaf) or is_overwritten) and _size(leaf, rank)
    ]
    check_unique([leaves.paths[i] for i in found], "scores")
    traced = [leaves.paths[i] for i in found if isinstance(leaves.values[i], Tracer)]
    if traced:
        raise TypeError(
            f"fo.{name} gives numbers of Python, but {quoted_list(traced)} is traced; call it "
            "outside of jit"
        )
    abstract = [i for i in found if isinstance(leaves.values[i], jax.ShapeDtypeStruct)]
    without = quoted_list(leaves.paths[i] for i in abstract)
    chosen = sorted(set(found).difference(abstract))
    if abstract:
        warnings.warn(f"fo.{name} gives no score to leaves without values: {without}", stacklevel=3)
    elif not chosen:
        axes = f", or has fewer than {max(least_ranks)} axes" if any(least_ranks) else ""
        warnings.warn(
            f"fo.{name} finds no leaf to score: each of the {len(leaves.values)} leaves is frozen, "
            f"or holds no floating-point numbers{axes}",
            stacklevel=3,
        )
    return chosen


def _size(leaf: object, rank: int) -> int:
    """Returns the number of elements of a leaf; 0 if it has fewer axes than `rank`."""
    shape = getattr(leaf, "shape", ()) if is_array(leaf) else ()
    return math.prod(map(operator.index, shape)) if len(shape) >= rank else 0
