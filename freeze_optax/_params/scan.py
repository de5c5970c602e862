"""Scan over stacked layers, with no backward pass for the frozen ones."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeze_optax._params.layer_reading import (
    axes_and_length,
    can_gather,
    concatenate_outputs,
    gather_layers,
    in_front,
    layer_at,
    layers_between,
)
from freeze_optax._params.layer_stack import is_layer_stack
from freeze_optax._params.reading_again import reading_again
from freeze_optax._params.scans_reading_again import (
    Options,
    Stack,
    flags_of_arrays,
    scan_rotating,
    scan_streamed,
)
from freeze_optax._rows.flags import flag_along
from freeze_optax._select.selector import nothing
from freeze_optax._select.specs import Spec
from freeze_optax._state.memories import explain_memories_of_layers
from freeze_optax._tree.kinds import can_train
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import put_tree_in_memory


def scan(  # noqa: PLR0913
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    frozen: Spec = nothing,
    unroll: int | bool = 1,
    axis: int = 0,
    *,
    stream: bool = False,
) -> tuple[Any, Any]:
    """Scans over stacked layers as `jax.lax.scan`, without a backward pass for frozen layers.

    One scan over all layers computes the gradients of all of them, the frozen ones too. So this
    function runs one scan for each run of consecutive frozen layers, and one for each run of
    consecutive layers that train. The result is the same. The backward pass stops at the first
    layer that trains. For frozen layers above it, the backward pass computes only the gradient of
    the carry, not that of their weights, which it reads again. Compared with a stack that was split
    by hand, the cost is one copy of the layers that train.

    The axis of the layers may be sharded over explicit mesh axes, which `jax.lax.scan` does not
    take. Then each device gets a frozen layer just before it is used, and a copy of all layers
    that train.

    With `stream=True`, what is frozen may be in host memory (see `freeze_optax.place`). Each frozen
    layer is copied to the device while the layer before it is computed, and once more in the
    backward pass. So at most two layers are on the device at a time. Nothing of frozen weights is
    kept for the backward pass (on a GPU, the last layer, with which it begins; in a loop around,
    one for each step that is not rematerialised), nor what `f` computes of them alone: of quantized
    layers the stored integers travel, and no floats are kept. Only what `f` mixes with the carry
    may be kept (in a `jax.lax.cond` on it, say): rematerialise `f` there (`jax.checkpoint`). A
    layer may have weights that train, adapters say, in device memory; those of its leaves that are
    frozen are streamed.

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
      f: A function as for `jax.lax.scan`: takes the carry and one layer, and returns the next
        carry and an output.
      init: The first carry.
      xs: The stacked layers: a pytree of arrays with an axis of the same length, one row for each
        layer.
      frozen: Which layers, the rows of `xs`, are frozen: any spec for `xs`, see
        `freeze_optax.mask`. A layer counts as frozen if all its leaves that can train are frozen.
        Where layers take turns (`freeze_optax.rotating`), `xs` itself tells which of them train.
      unroll: As for `jax.lax.scan`.
      axis: The axis of the layers in each array of `xs`; a negative one is counted from the last.
        MaxText and `nn.scan(variable_axes={"params": 1})` stack layers along axis 1. The layers
        that train are copied, with this axis in front, as `jax.lax.scan` needs them.
      stream: Whether to copy frozen leaves that are in host memory to the device layer by layer.
        JAX can't differentiate the result in forward mode then (`jax.jvp`). A leaf in host memory
        that `frozen` does not select goes to the device as a whole.

    Returns:
      A pair of the last carry and the outputs, stacked along a leading axis, as `jax.lax.scan`
      gives them.

    Raises:
      ValueError: If the spec does not fit `xs`, or the leaves do not have such an axis of the same
        length; or if a leaf that is streamed is sharded along that axis.
      IndexError: If a layer is not there (`fo.layers(pattern)[i]`).
      TypeError: If a mask holds anything but bools, or `axis` is not an integer.
    """
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"the axis of the layers is an integer, not {axis!r}")
    # A hole is a node without leaves here, as it is for `jax.lax.scan`.
    leaves = Leaves(xs, stop=is_layer_stack)
    if any(map(is_layer_stack, leaves.values)):
        return scan_rotating(f, init, leaves, frozen, Options(unroll, axis, stream))
    axes, count = axes_and_length(leaves.paths, leaves.values, axis)
    if count == 0:
        on_device = put_tree_in_memory(xs, None) if stream else xs
        empty = jax.tree.map(in_front, on_device, leaves.rebuild(axes))
        return jax.lax.scan(f, init, empty, unroll=unroll)
    is_frozen = np.ones(count, bool)
    flags = flags_of_arrays(frozen, xs)
    for leaf, a, flag in zip(leaves.values, axes, flags, strict=True):
        if can_train(leaf):
            is_frozen &= flag_along(flag, a, np.shape(leaf))
    runs = [(flag, len(list(run))) for flag, run in itertools.groupby(is_frozen.tolist())]
    stack = Stack(leaves, flags, axes)
    if stream:
        return scan_streamed(f, init, stack, runs, unroll)
    try:
        return _scan_in_runs(f, init, stack, runs, unroll)
    except (ValueError, TypeError) as error:
        explain_memories_of_layers(error, leaves)
        raise


def _scan_in_runs(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    stack: Stack,
    runs: Sequence[tuple[bool, int]],
    unroll: int | bool,
) -> tuple[Any, Any]:
    """Scans over runs of frozen layers, and of layers that train.

    Args:
      f: The function of carry and layer.
      init: The first carry.
      stack: The stack.
      runs: For each run of layers whether it is frozen, and its length.
      unroll: As for `jax.lax.scan`.
    """
    leaves, _, axes = stack
    xs, axis_of = leaves.tree, leaves.rebuild(axes)
    is_frozen = np.concatenate([np.full(count, flag) for flag, count in runs])
    constants = jax.lax.stop_gradient(xs)

    # Frozen layers are read by index, as a slice would copy them.
    def read(i: Any) -> Any:
        return jax.tree.map(lambda x, a: layer_at(x, i, a), constants, axis_of)

    def apply_frozen(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        return f(carry, read(i))

    step: Callable[[Any, Any], Any] = apply_frozen
    if is_frozen.any():
        step = reading_again(apply_frozen, f, (init, read(0)), leaves, axes)

    live, live_start, is_taken = xs, 0, False
    if sum(not flag for flag, _ in runs) > 1 and can_gather(leaves.values, axes):
        # One gather, as the sum of the gradients of several slices would be of the whole stack.
        take = functools.partial(gather_layers, np.flatnonzero(~is_frozen))
        live, is_taken = jax.tree.map(take, xs), True
    outputs: list[Any] = []
    carry, start = init, 0
    for run_is_frozen, count_of_run in runs:
        stop = start + count_of_run
        if run_is_frozen:
            indices = jnp.arange(start, stop)
            carry, output = jax.lax.scan(step, carry, indices, unroll=unroll)
        else:
            first = live_start if is_taken else start
            select = functools.partial(layers_between, first, first + count_of_run)
            layers = jax.tree.map(select, live, axis_of)
            carry, output = jax.lax.scan(f, carry, layers, unroll=unroll)
            live_start += count_of_run
        outputs.append(output)
        start = stop
    return carry, concatenate_outputs(outputs)
