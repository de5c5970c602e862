"""Calls of functions that move values, so that every bit is kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from freeze_optax._rows.meshes import is_on_mesh
from freeze_optax._tree.memory import run_on_device


def _any_isinstance(arrays: Sequence[Any], array_type: type) -> bool:
    return any(isinstance(x, array_type) for x in arrays)


def run_move(move: Callable[..., Any], may_sum: bool, *arrays: Any) -> Any:
    """Calls a function that moves values, on a mesh so that every bit is kept.

    Where an axis is sharded, XLA gathers from it, or concatenates along it, by a sum of the values
    of one device and the zeros of all others. This sum turns -0.0 into 0.0, and flushes subnormal
    numbers on a CPU. A sum of bits, as unsigned integers, is exact. One slice is sent, and written
    in place, as it is. As bits it would cost more: XLA does not write bits into floats in place.

    Args:
      move: The function.
      may_sum: Whether it does more than slice an array, or replace slices of it.
      *arrays: Its arguments.
    """
    if _any_isinstance(arrays, jax.ShapeDtypeStruct):
        return jax.eval_shape(move, *arrays)
    run = _move_on_mesh if may_sum else _move_plainly
    return run_on_device(functools.partial(run, move), *map(jnp.asarray, arrays))


def _move_plainly(move: Callable[..., Any], *arrays: Any) -> Any:
    return move(*arrays)


def _move_on_mesh(move: Callable[..., Any], *arrays: Any) -> Any:
    dtype, has_bits = arrays[0].dtype, False
    if any(map(is_on_mesh, arrays)):
        has_bits = jnp.issubdtype(dtype, jnp.inexact) and all(x.dtype == dtype for x in arrays)
    return _run_as_bits(move, *arrays) if has_bits else move(*arrays)


def run_bitwise(move: Callable[..., Any], may_sum: bool, *arrays: Any) -> Any:
    """Calls a function that moves values, and keeps every bit of them.

    The arguments are as for `run_move`.
    """
    if _any_isinstance(arrays, jax.ShapeDtypeStruct):
        return jax.eval_shape(move, *arrays)
    run = functools.partial(_move_bitwise, move, may_sum)
    return run_on_device(run, *map(jnp.asarray, arrays))


def run_in_place(move: Callable[..., Any], *arrays: Any) -> Any:
    """Calls a function that replaces slices, in the memory of the arrays, and keeps every bit.

    These may differ: the function does nothing that JAX can't do in the memory of each.
    """
    return _move_bitwise(move, False, *arrays)


def _move_bitwise(move: Callable[..., Any], may_sum: bool, *arrays: Any) -> Any:
    dtype = arrays[0].dtype
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != jnp.float16
    if may_sum and any(map(is_on_mesh, arrays)):
        return _move_on_mesh(move, *arrays)
    if not is_narrow or any(x.dtype != dtype for x in arrays):
        return move(*arrays)
    # On a CPU, XLA widens these formats even to copy them, and then a NaN loses its payload.
    as_bits = functools.partial(_run_as_bits, move)
    return jax.lax.platform_dependent(*arrays, cpu=as_bits, default=move)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_as_bits(move: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
    """Calls a function that moves values on the bits of the arrays, as unsigned integers."""
    dtype = arrays[0].dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = [[part(x) for x in arrays] for part in (jax.lax.real, jax.lax.imag)]
        return jax.lax.complex(*(_run_as_bits(move, *part) for part in parts))
    unsigned = f"uint{jnp.finfo(dtype).bits}"
    moved = move(*(jax.lax.bitcast_convert_type(x, unsigned) for x in arrays))
    return jax.lax.bitcast_convert_type(moved, dtype)


@_run_as_bits.defjvp
def _run_as_bits_jvp(move: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    # Moving values is linear, but reading bits as an integer has no derivative.
    return _run_as_bits(move, *primals), move(*tangents)
