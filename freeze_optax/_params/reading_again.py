"""Layers that the backward pass reads again, in place of a copy that JAX keeps of each.

JAX keeps for the backward pass what was computed in the forward pass, and a layer that was read out
of a stack is computed. So the weights of all layers would be kept a second time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._tree.leaves import Leaves

_REMATERIALISED = ("checkpoint", "remat", "remat2")
_READS = ("dynamic_slice", "gather", "squeeze", "reshape")
Policy = Callable[..., bool]


def reading_again(
    apply: Callable[[Any, Any], Any],
    f: Callable[[Any, Any], Any],
    example: tuple[Any, Any],
    leaves: Leaves,
    axes: Sequence[int],
) -> Callable[[Any, Any], Any]:
    """Returns `apply`, so that it keeps for the backward pass what `f` does, without the layer.

    Args:
      apply: A function of carry and index, which reads the layer and calls `f`.
      f: The function of carry and layer.
      example: A carry and a layer.
      leaves: The leaves of the stack.
      axes: The axis of the layers in each of them.
    """
    jaxpr = jax.make_jaxpr(f)(*example).jaxpr
    if _refuses_checkpoint(jaxpr):
        return apply
    eqns = jaxpr.eqns
    while len(eqns) == 1 and (inner := _inner_jaxprs(eqns[0])) and not _is_rematerialised(eqns[0]):
        eqns = inner[0].eqns
    is_kept: Policy | None = _everything
    if len(eqns) == 1 and _is_rematerialised(eqns[0]):
        is_kept = eqns[0].params.get("policy")
    elif any(map(_has_rematerialised, eqns)):
        # The policy around it would hold inside of `jax.checkpoint` too, and keep what is to be
        # computed again there.
        return apply
    policy = None if is_kept is None else _without_reads(is_kept, leaves, axes)
    return jax.checkpoint(apply, policy=policy, prevent_cse=False)


def _refuses_checkpoint(jaxpr: Any) -> bool:
    """Returns whether `jax.checkpoint` can't differentiate a function (JAX 0.7.1 to 0.12.0.1).

    It takes no effects but those of debugging, and with a policy it rounds what it keeps by
    `reduce_precision`, which takes no complex numbers. Then a copy of the layers is kept.
    """
    is_io = any("IOEffect" in type(effect).__name__ for effect in jaxpr.effects)
    return is_io or _has_complex(jaxpr)


def _has_complex(jaxpr: Any) -> bool:
    made = [x.aval for eqn in jaxpr.eqns for x in eqn.outvars]
    types = [getattr(x, "dtype", None) for x in [*(v.aval for v in jaxpr.invars), *made]]
    inner = (one for eqn in jaxpr.eqns for one in _inner_jaxprs(eqn))
    is_complex = any(x is not None and jnp.issubdtype(x, jnp.complexfloating) for x in types)
    return is_complex or any(map(_has_complex, inner))


def _everything(*_: Any, **__: Any) -> bool:
    return True


def _without_reads(is_kept: Policy, leaves: Leaves, axes: Sequence[int]) -> Policy:
    """Returns a policy for `jax.checkpoint` that does not keep what was read of the stack.

    It tells these by their shapes. To name them (`checkpoint_name`) does not serve: what comes
    before the name would be kept.
    """
    shapes = set[tuple[int, ...]]()
    for x, axis in zip(leaves.values, axes, strict=True):
        shape = np.shape(x)
        shapes |= {shape, (*shape[:axis], 1, *shape[axis + 1 :])}

    def policy(primitive: Any, *types: Any, **params: Any) -> bool:
        reads = primitive.name in _READS and types and types[0].shape in shapes
        return not reads and is_kept(primitive, *types, **params)

    return policy


def _is_rematerialised(eqn: Any) -> bool:
    return eqn.primitive.name in _REMATERIALISED


def _has_rematerialised(eqn: Any) -> bool:
    inner = (one for jaxpr in _inner_jaxprs(eqn) for one in jaxpr.eqns)
    return _is_rematerialised(eqn) or any(map(_has_rematerialised, inner))


def _inner_jaxprs(eqn: Any) -> list[Any]:
    """Returns the jaxprs that an equation calls."""
    flat = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
    jaxprs = [getattr(x, "jaxpr", x) for x in flat]
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]
