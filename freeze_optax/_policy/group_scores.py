"""What a policy compares of groups of leaves: their scores, and the norms of their params."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from freeze_optax._report.scores import Score, scores
from freeze_optax._rows.flags import Flag, flag_not
from freeze_optax._rows.subset import Subset
from freeze_optax._rows.take_put import take
from freeze_optax._transform.measured import norm_of
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import put_in_memory
from freeze_optax._tree.messages import quoted_list
from freeze_optax._tree.variables import unwrap_variable


def inclusive_quantile(ordered: Sequence[float], share: float) -> float:
    """Returns a quantile as `np.quantile`, which has no number for it beside two infinite ones."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (place - math.floor(place)) * (high - low)


_norm = jax.jit(norm_of)


def norms_of_training(
    leaves: Leaves, frozen: Sequence[Flag], groups: Sequence[Sequence[int]]
) -> dict[int, float]:
    """Returns the norm of what trains of each leaf in the groups."""
    arrays = {i: unwrap_variable(leaves.values[i]) for i in itertools.chain(*groups)}
    for x in arrays.values():
        if isinstance(x, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                "Convergence.at reads numbers, but the params are traced, or shapes alone; call it "
                "outside of jax.jit, on the params that the step returns"
            )
    # One by one, as leaves may be on different devices.
    norms: dict[int, Any] = {}
    for i, x in arrays.items():
        on_device, trains = put_in_memory(x, None), flag_not(frozen[i])
        norms[i] = _norm([take(on_device, trains) if isinstance(trains, Subset) else on_device])
    return {i: float(x) for i, x in jax.device_get(norms).items()}


def joined_score(measured: Sequence[Score]) -> Score:
    """Returns the score of several leaves together, with the steps of the last measured one."""
    *columns, steps = zip(*measured, strict=True)
    return Score(*(math.hypot(*column) for column in columns), steps=min(steps))


def scores_by_leaf(state: Any, leaves: Leaves) -> dict[int, Score]:
    """Returns the score of each leaf that trains, by its index; raises if they are of groups."""
    found = scores(state)
    index = {path: i for i, path in enumerate(leaves.paths)}
    unknown = [path for path in found if path not in index]
    if unknown:
        raise ValueError(
            f"the norms in the state are those of {quoted_list(map(str, unknown))}, which are no "
            "leaves of the params; measure each leaf, with fo.measured(optimizer) and no by=, and "
            "give the groups to Convergence(order=…)"
        )
    return {index[path]: score for path, score in found.items()}
