"""A scan over stacked layers that knows which of them are frozen."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._rows.rows import flag_vector
from freeze_optax._select.specs import Spec, resolve
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    frozen: Spec,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """As `jax.lax.scan` over stacked layers, without a backward pass for those that are frozen.

    One scan over all layers computes the gradient of all: it can't tell that some rows of what it
    scans over don't matter. So this scans over each run of layers that are frozen, or are not, by
    itself. Nothing goes back through those below the first that trains, and through frozen ones
    above it only what it needs. The result is the same. What remains beside a stack that was
    split by hand is a copy of the layers that train.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layers": jnp.full((4, 2), 2.0)}
      >>> frozen = fo.rows("layers", slice(0, 3))
      >>> def loss(params, x):
      ...     layers = fo.mask(frozen, params)["layers"]  # which of them are frozen
      ...     x, _ = fo.scan(lambda x, w: (x * w, None), x, params["layers"], frozen=layers)
      ...     return x.sum()
      >>> fo.grad(loss, frozen)(params, jnp.ones(2))["layers"].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [8.0, 8.0]]

    Args:
      f: As for `jax.lax.scan`: takes the carry and one layer, gives the next carry and an output.
      init: The first carry.
      xs: The layers, stacked: a tree of arrays with the same leading axis.
      frozen: Which rows of them are frozen: any spec for `xs`, see `freeze_optax.mask`. A layer
        counts as frozen if all its leaves are.
      unroll: As for `jax.lax.scan`.

    Returns:
      The last carry, and the outputs stacked, as `jax.lax.scan` gives them.

    Raises:
      ValueError: If the spec does not fit `xs`, or the leaves have not one leading axis.
    """
    leaves = Leaves(xs)
    lengths = {np.shape(x)[:1] for x in leaves.values}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "fo.scan needs leaves with the same leading axis, but they have the shapes "
            f"{sorted({np.shape(x) for x in leaves.values})}"
        )
    ((count,),) = lengths
    if count == 0:
        return jax.lax.scan(f, init, xs, unroll=unroll)
    still = np.ones(count, bool)
    for leaf, flag in zip(leaves.values, resolve(frozen, leaves), strict=True):
        if can_train(leaf):
            still &= flag_vector(flag, count)
    constants = jax.lax.stop_gradient(xs)

    # By index, as a slice would copy the frozen layers.
    def of_frozen(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        def at_index(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

        return f(carry, jax.tree.map(at_index, constants))

    outputs: list[Any] = []
    carry, start = init, 0
    for is_still, run in itertools.groupby(still.tolist()):
        stop = start + len(list(run))
        if is_still:
            carry, output = jax.lax.scan(of_frozen, carry, jnp.arange(start, stop), unroll=unroll)
        else:
            layers = jax.tree.map(lambda x, a=start, b=stop: jax.lax.slice_in_dim(x, a, b), xs)
            carry, output = jax.lax.scan(f, carry, layers, unroll=unroll)
        outputs.append(output)
        start = stop
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *outputs)
