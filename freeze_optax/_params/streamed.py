"""`streamed`: weights in host memory come to the device for one call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from freeze_optax._params.layer_passes import (
    LayerPasses,
    Static,
    instantiated,
    is_float0,
    with_constants,
)
from freeze_optax._params.layer_reading import host_arrays
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.memory import copied_to_device, memory_of, put_in_memory


def streamed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `f`, with the weights that are in host memory on the device during the call.

    In the backward pass they are copied to the device again. So between the two nothing of them
    fills the memory of the device, and neither does what `f` computes of them alone (the floats of
    quantized weights). `freeze_optax.scan` does the same for stacked layers, with `stream=True`.

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

        def of_streamed(_: Any, arrays: Sequence[Any]) -> Any:
            remaining = iter(arrays)
            pairs = zip(leaves.values, on_host, strict=True)
            whole = leaves.rebuild(next(remaining) if flag else x for x, flag in pairs)
            return f(whole, *args, **kwargs)

        hosted = [x for x, flag in zip(leaves.values, on_host, strict=True) if flag]
        return _call_streamed(of_streamed, hosted)

    return streamed_fn


def _call_streamed(f: Callable[[Any, Any], Any], hosted: list[Any]) -> Any:
    # What `f` closes over, whatever trains among it, is the "carry" of these passes.
    body, constants = with_constants(f, (), list(map(copied_to_device, hosted)))

    def of_constants(constants: Any, arrays: Any) -> Any:
        return body((), arrays, *constants)

    @jax.custom_vjp
    def call(hosted: Any, constants: Any) -> Any:
        return of_constants(constants, list(map(copied_to_device, hosted)))

    def forward(hosted: Any, constants: Any) -> Any:
        perturbed = [x.perturbed for x in hosted]
        hosted, constants = [x.value for x in hosted], [x.value for x in constants]
        arrays = list(map(copied_to_device, hosted))
        passes = LayerPasses(of_constants, (), constants, arrays)
        outputs, kept = passes.forward((), arrays, constants)
        return outputs, (hosted, kept, Static((passes, perturbed)))

    def backward(saved: Any, cotangents: Any) -> Any:
        hosted, kept, static = saved
        passes, perturbed = static.value
        leaves, structure = jax.tree.flatten(instantiated(cotangents))
        real = [x for x in leaves if not is_float0(x)]
        # Or XLA would find the copies of the forward pass again, and keep them until here.
        hosted = [jax.lax.optimization_barrier(x) for x in hosted]
        remaining = iter(real)
        cotangents = structure.unflatten(x if is_float0(x) else next(remaining) for x in leaves)
        arrays = list(map(copied_to_device, hosted))
        _, to_arrays, to_constants = passes.backward((), arrays, kept, cotangents)
        triples = zip(to_arrays, hosted, perturbed, strict=True)
        to_hosted = [put_in_memory(x, memory_of(h)) if flag else None for x, h, flag in triples]
        return to_hosted, to_constants

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call(hosted, constants)
