"""`scan_indices`: a scan over indices of layers, some of which may be in host memory."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

# XLA for GPUs of these versions takes the count of a loop for the index of a slice in host memory,
# whatever function of it the index is: each step would get another layer (openxla/xla#46231, mended
# in #46308). An index that is read from an array is not known as a function of the count.
_MISREADS_COUNTS = ("0.10.2", "0.11.0")
# Private, so it may be gone from a later JAX.
_has_started: Any = getattr(
    importlib.import_module("jax._src.xla_bridge"), "backends_are_initialized", None
)


def is_for_gpu() -> bool:
    """Returns whether a GPU is what JAX computes on by default; False while that is not settled."""
    # To ask would start a backend, and after that no other process can be joined
    # (`jax.distributed.initialize`). Abstract params are often made before.
    return (_has_started is None or _has_started()) and jax.default_backend() == "gpu"


def needs_linear_indices() -> bool:
    """Returns whether XLA needs linear indices to copy a layer out of host memory by itself.

    On a GPU it does. At another index, a kernel reads the layer, and few kernels run beside those
    that compute.
    """
    return not jaxlib.version.__version__.startswith(_MISREADS_COUNTS) and is_for_gpu()


def scan_indices(
    step: Callable[[Any, Any], Any], state: Any, indices: range, unroll: int | bool, *, linear: bool
) -> tuple[Any, Any]:
    """Scans over indices as `jax.lax.scan`.

    Args:
      step: The function of state and index, an int32 scalar.
      state: The first state.
      indices: The indices.
      unroll: As for `jax.lax.scan`.
      linear: Whether to count them, so that XLA knows that they are linear in the count of the
        loop; else they are read from an array.
    """
    if not linear:
        values = jnp.arange(indices.start, indices.stop, indices.step, dtype=jnp.int32)
        return jax.lax.scan(step, state, values, unroll=unroll)

    def counting(pair: Any, _: Any) -> Any:
        state, i = pair
        state, output = step(state, i)
        return (state, i + indices.step), output

    first = state, jnp.asarray(indices.start, jnp.int32)
    (state, _), outputs = jax.lax.scan(counting, first, None, len(indices), unroll=unroll)
    return state, outputs


def together(*values: Any) -> tuple[Any, ...]:
    """Returns what a step of a loop computes and the next layer, as XLA has all of it at one time.

    Or XLA for GPUs writes the next layer over this one, to save a copy on the device. So it brings
    it in only when this one is computed, and nothing runs beside that. XLA for TPUs does what it
    does with or without this.
    """
    if not needs_linear_indices():
        return values
    after = jax.lax.optimization_barrier(values)
    # Up to JAX 0.10, all values get the varying axes of any of them (`jax.shard_map`). But the
    # carry of a loop keeps its type.
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(after), strict=True)
    return after if all(jax.typeof(x) == jax.typeof(y) for x, y in pairs) else values
