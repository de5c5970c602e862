"""`streamed`: weights in host memory come to the device for one call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._params.layer_passes import (
    LayerPasses,
    Static,
    instantiated,
    with_constants,
)
from freeze_optax._params.layer_reading import host_arrays
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import copied_to_device, memory_of, put_in_memory


def streamed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `f`, with the weights that are in host memory on the device during the call.

    In the backward pass they are copied to the device again. So between the two nothing of them
    fills the memory of the device, and neither does what `f` computes of its weights alone (the
    floats of quantized weights, the sum of a weight and its adapter). `freeze_optax.scan` does the
    same for stacked layers, with `stream=True`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import freeze_optax as fo
      >>> params = {"layer_0": jnp.eye(2), "layer_1": 2 * jnp.eye(2), "head": jnp.ones(2)}
      >>> params = fo.place(params, "layer_*")
      >>> layer = fo.streamed(lambda w, x: x @ w)
      >>> def loss(params, x):
      ...     for name in ("layer_0", "layer_1"):
      ...         x = layer(params[name], x)
      ...     return x @ params["head"]
      >>> grads = jax.jit(fo.grad(loss, "layer_*"))(params, jnp.ones(2))
      >>> grads["head"]
      Array([2., 2.], dtype=float32)

    Args:
      f: A function whose first argument is a pytree of weights. `module.apply` of Linen is one.

    Returns:
      A function that takes and returns what `f` does. It returns the very same numbers. What
      trains, on the device or in host memory, has its gradient there. Forward-mode differentiation
      (`jax.jvp`) of the function is an error of JAX; `jax.grad`, also twice, is not.
    """

    @functools.wraps(f)
    def streamed_fn(weights: Any, /, *args: Any, **kwargs: Any) -> Any:
        leaves = Leaves(weights)
        on_host = host_arrays(leaves.values)
        if not any(on_host):
            return f(weights, *args, **kwargs)

        def of_arrays(_: Any, arrays: Sequence[Any]) -> Any:
            remaining = iter(arrays)
            whole = leaves.rebuild(next(remaining) if _is_array(x) else x for x in leaves.values)
            return f(whole, *args, **kwargs)

        pairs = [pair for pair in zip(leaves.values, on_host, strict=True) if _is_array(pair[0])]
        return _call_streamed(of_arrays, *map(list, zip(*pairs, strict=True)))

    return streamed_fn


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def _call_streamed(f: Callable[[Any, Any], Any], weights: list[Any], on_host: list[bool]) -> Any:
    def fetch(weights: Sequence[Any]) -> list[Any]:
        pairs = zip(weights, on_host, strict=True)
        return [copied_to_device(x) if flag else x for x, flag in pairs]

    # What `f` closes over, its other arguments among it, is the "carry" of these passes.
    body, constants = with_constants(f, (), fetch(weights))

    def of_constants(constants: Any, arrays: Any) -> Any:
        return body((), arrays, *constants)

    @jax.custom_vjp
    def call(weights: Any, constants: Any) -> Any:
        return of_constants(constants, fetch(weights))

    def forward(weights: Any, constants: Any) -> Any:
        perturbed, closed_over = ([x.perturbed for x in tree] for tree in (weights, constants))
        weights, constants = [x.value for x in weights], [x.value for x in constants]
        arrays = fetch(weights)
        passes = LayerPasses(of_constants, (), constants, arrays, ((), perturbed, closed_over))
        outputs, kept = passes.forward((), arrays, constants)
        return outputs, (weights, kept, Static((passes, perturbed)))

    def backward(saved: Any, cotangents: Any) -> Any:
        weights, kept, static = saved
        passes, perturbed = static.value
        pairs = zip(weights, on_host, strict=True)
        # Or XLA would find the copies of the forward pass again, and keep them until here.
        again = [jax.lax.optimization_barrier(x) if flag else x for x, flag in pairs]
        _, to_arrays, to_constants = passes.backward(
            (), fetch(again), kept, instantiated(cotangents)
        )
        triples = zip(to_arrays, weights, perturbed, strict=True)
        to_weights = [put_in_memory(x, memory_of(w)) if flag else None for x, w, flag in triples]
        return to_weights, to_constants

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call(weights, constants)
