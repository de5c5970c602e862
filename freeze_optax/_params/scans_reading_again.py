"""Scans whose backward pass reads the layers again: of layers in turns, and in host memory."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from freeze_optax._params.layer_loop import Layers, scan_layers
from freeze_optax._params.layer_reading import (
    LayerReader,
    axes_and_length,
    concatenate_outputs,
    in_front,
    layers_between,
    streamed_arrays,
)
from freeze_optax._params.layer_stack import is_layer_stack, report_scanned
from freeze_optax._rows.flags import Flag
from freeze_optax._select.specs import Spec, resolve, state_in_spec
from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import memory_of, put_in_memory
from freeze_optax._tree.messages import quoted_list


class Stack(NamedTuple):
    """A stack of layers.

    Attributes:
      leaves: Its leaves.
      flags: Which of them are frozen.
      axes: The axis of the layers in each of them.
    """

    leaves: Leaves
    flags: Sequence[Flag]
    axes: Sequence[int]


class Options(NamedTuple):
    """The arguments `unroll`, `axis` and `stream` of `scan`."""

    unroll: int | bool
    axis: int
    stream: bool


def flags_of_arrays(frozen: Spec, xs: Any) -> list[Flag]:
    """Returns which of the arrays in a tree are frozen; its holes are no arrays."""
    leaves = Leaves(xs)
    try:
        resolved = resolve(frozen, leaves)
    except ValueError as error:
        if state_in_spec(frozen) is None:
            raise
        raise ValueError(
            f"{error}; fo.scan takes what is frozen of its layers alone, as "
            "fo.mask(state, params)['layers']"
        ) from None
    pairs = zip(leaves.values, resolved, strict=True)
    return [flag for x, flag in pairs if not is_hole(x)]


def scan_streamed(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    stack: Stack,
    runs: Sequence[tuple[bool, int]],
    unroll: int | bool,
) -> tuple[Any, Any]:
    """Scans over stacks of which what is frozen comes to the device layer by layer.

    Args:
      f: The function of carry and layer.
      init: The first carry.
      stack: The stack.
      runs: For each run of layers whether it is frozen, and its length.
      unroll: As for `jax.lax.scan`.
    """
    leaves, flags, axes = stack
    constants = list(map(jax.lax.stop_gradient, leaves.values))
    carry, start, outputs = init, 0, list[Any]()
    triples = zip(leaves.paths, leaves.values, flags, strict=True)
    hosted = {path: flag for path, x, flag in triples if memory_of(x) is not None}
    if hosted and True not in hosted.values() and not any(is_frozen for is_frozen, _ in runs):
        warnings.warn(
            f"fo.scan(…, stream=True) brings {quoted_list(hosted)} to the device as a whole, as "
            "`frozen` selects none of it: say what is frozen of the layers (frozen=True: all), or "
            "bring what trains to the device before the step, params = fo.place(params, state)",
            stacklevel=3,
        )
    for run_is_frozen, count in runs:
        stop = start + count
        constant = [run_is_frozen or flag is True for flag in flags]
        triples = zip(constants, leaves.values, axes, constant, strict=True)
        arrays = [
            c if flag else put_in_memory(layers_between(start, stop, x, axis), None)
            for c, x, axis, flag in triples
        ]
        pairs = zip(axes, constant, strict=True)
        places = [(axis, 0) if flag else (0, start) for axis, flag in pairs]
        streamed = streamed_arrays(leaves.paths, leaves.values, axes, constant)
        reader = LayerReader(leaves.of_types(leaves.values).rebuild, places, streamed)
        none: list[Any] = [None] * len(arrays)
        layers = Layers(arrays, none, None, start, stop, places, reader, len(runs) == 1)
        carry, output = scan_layers(f, carry, layers, unroll)
        outputs.append(output)
        start = stop
    return carry, concatenate_outputs(outputs)


def scan_rotating(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    leaves: Leaves,
    frozen: Spec,
    options: Options,
) -> tuple[Any, Any]:
    """Scans where the layers that train are known as values, see `freeze_optax.rotating`."""
    whole = [x.whole if is_layer_stack(x) else x for x in leaves.values]
    unroll, axis, stream = options
    axes, length = axes_and_length(leaves.paths, whole, axis)
    flags = flags_of_arrays(frozen, leaves.rebuild(whole))
    stacks = [x for x in leaves.values if is_layer_stack(x)]
    for stack, a in zip(leaves.values, axes, strict=True):
        if is_layer_stack(stack) and stack.axis != a:
            raise ValueError(
                f"the layers of {stack.path!r} take turns along axis {stack.axis}, but fo.scan was "
                f"given axis {axis}"
            )
    for stack in stacks:
        if stack.length != length:
            raise ValueError(
                f"fo.scan was given {length} of the {stack.length} layers of "
                f"{stack.path!r}, which take turns (fo.rotating); it needs all of them"
            )
        report_scanned(stack)

    pairs = list(zip(leaves.values, flags, strict=True))
    constant = [is_layer_stack(x) or flag is True for x, flag in pairs]
    has_live = [is_layer_stack(x) and flag is not True for x, flag in pairs]
    arrays = [
        jax.lax.stop_gradient(x) if flag else x for x, flag in zip(whole, constant, strict=True)
    ]
    triples = zip(leaves.values, axes, has_live, strict=True)
    live = [in_front(x.live, a) if own else None for x, a, own in triples]
    places = [(a, 0) for a in axes]
    streamed = [False] * len(arrays)
    if stream:
        arrays = [
            x if flag else put_in_memory(x, None) for x, flag in zip(arrays, constant, strict=True)
        ]
        streamed = streamed_arrays(leaves.paths, whole, axes, constant)
    reader = LayerReader(leaves.of_types(whole).rebuild, places, streamed)
    layers = Layers(arrays, live, stacks[0].rows, 0, length, places, reader)
    return scan_layers(f, init, layers, unroll)
