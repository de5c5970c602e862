"""Training steps of decoders whose frozen base is in device memory or in host memory.

They import nothing but JAX, optax and the package, and are lowered for abstract arrays.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import freeze_optax as fo
from benchmarks import models
from benchmarks.cases import CLIPPED, Optimizer

ON_DEVICE, STREAMED = "on the device", "on the host, streamed"
MOVED = "on the host, moved whole"
PUT_BEFORE = "on the host, `jax.device_put` before each layer"
PUT_INSIDE = "on the host, `jax.device_put` inside of `jax.checkpoint`"
RANK, IN_TURNS, HEAD_WIDTH = 8, 2, 128
KERNELS = ("qkv", "out", "up", "down")
ADAPTERS = fo.path("layers/**/qkv_{a,b}")
# The compiler for a TPU does not slice a stack of bfloat16 vectors in host memory ("Sublane slicing
# size must be multiple of element packing factor"). So the scales of the norms are on the device.
BASE = fo.path(f"layers/**/{{{','.join(KERNELS)}}}")
PACKED, IN_INT32 = 4, ", packed in int32"
"""How many int8 an int32 holds; how cases are named where it does."""
Loss = Callable[[Any, jax.Array, str, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder in bfloat16, and of its batch."""

    depth: int
    width: int
    vocabulary: int = 32_000
    batch: tuple[int, int] = (4, 1_024)

    def of_model(self, rank: int = 0) -> tuple[Any, ...]:
        """The arguments of the functions that make the params."""
        return self.depth, self.width, self.vocabulary, jnp.bfloat16, rank


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder, what of it is frozen, and what may be in host memory.

    Attributes:
      sizes: Its sizes.
      params: Makes its params.
      base: What is in host memory unless the way is `ON_DEVICE`, a spec.
      tx: The optimizer, which freezes.
      loss: Takes params, tokens, the way, and the state.
      ways: The ways to compile it.
      layers_apart: Whether each layer has arrays of its own.
    """

    sizes: Sizes
    params: Callable[[], Any]
    base: Any
    tx: Optimizer
    loss: Loss
    ways: tuple[str, ...] = (ON_DEVICE, STREAMED, MOVED)
    layers_apart: bool = False

    def step(self, way: str) -> Callable[[Any, Any, jax.Array], Any]:
        """A training step, as users write it."""

        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                return self.loss(params, tokens, way, state)

            value, grads = fo.value_and_grad(loss, frozen=state)(params)
            updates, state = self.tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state, value

        return step

    def arguments(self, way: str, device: Any, host: Any) -> tuple[Any, Any, Any]:
        """Abstract params, state and tokens, with these shardings for the two memories."""
        params = jax.eval_shape(self.params)
        # Not the mask of nothing, in which integers are frozen.
        flags = fo.nothing(params) if way == ON_DEVICE else fo.mask(self.base, params)
        params = jax.tree.map(
            lambda x, flag: with_sharding(x, host if flag else device), params, flags
        )
        state = jax.eval_shape(self.tx.init, params)
        rows, tokens = self.sizes.batch
        batch = jax.ShapeDtypeStruct((rows, tokens + 1), jnp.int32)
        on_device = partial(jax.tree.map, lambda x: with_sharding(x, device))
        return params, on_device(state), on_device(batch)


def with_sharding(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def to_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def block(x: jax.Array, layer: Any) -> jax.Array:
    """A layer, with heads as wide as the tiles of a TPU."""
    return models.block(x, layer, HEAD_WIDTH)


def floats(kernel: Any, dtype: Any) -> jax.Array:
    """A kernel out of int8, or of int8 packed in int32, and scales."""
    stored = kernel["qvalue"]
    if stored.dtype == jnp.int32:
        stored = jax.lax.bitcast_convert_type(stored, jnp.int8)
        stored = stored.reshape(len(stored), -1)
    return stored.astype(dtype) * kernel["scale"]


def int8_block(x: jax.Array, layer: Any) -> jax.Array:
    """A layer that makes its kernels of int8."""
    return block(x, {k: floats(w, x.dtype) if k in KERNELS else w for k, w in layer.items()})


def int8_params(sizes: Sizes, packed: bool) -> Any:
    """A stack whose kernels are int8, with a scale for each column."""

    def quantized(x: jax.Array) -> dict[str, jax.Array]:
        scale = jnp.abs(x).max(1, keepdims=True) / 127
        stored = (x / scale).astype(jnp.int8)
        if packed:
            stored = stored.reshape(*x.shape[:-1], -1, PACKED)
            stored = jax.lax.bitcast_convert_type(stored, jnp.int32)
        return {"qvalue": stored, "scale": scale}

    params = models.stacked_transformer(*sizes.of_model(RANK))
    layers = {k: quantized(x) if k in KERNELS else x for k, x in params["layers"].items()}
    return {**params, "layers": layers}


def last_layers_apart(sizes: Sizes, last: int) -> Any:
    params = models.stacked_transformer(*sizes.of_model())
    layers = params["layers"]
    return {
        **params,
        "layers": jax.tree.map(lambda x: x[:-last], layers),
        "last_layers": jax.tree.map(lambda x: x[-last:], layers),
    }


def stacked_loss(
    params: Any, tokens: jax.Array, way: str, state: Any, block: Any = block
) -> jax.Array:
    flags = fo.mask(state, params)["layers"]
    if way == MOVED:
        params = {**params, "layers": to_device(params["layers"])}
    scan = partial(fo.scan, frozen=flags, stream=way == STREAMED)
    return models.stacked_transformer_loss(params, tokens, scan, block)


def turns_loss(params: Any, tokens: jax.Array, way: str, _state: Any) -> jax.Array:
    scan = partial(fo.scan, stream=way == STREAMED)
    return models.stacked_transformer_loss(params, tokens, scan, block)


def loop_loss(params: Any, tokens: jax.Array, way: str, _state: Any) -> jax.Array:
    """Of layers in a loop of Python."""

    def layer(weights: Any, x: jax.Array) -> jax.Array:
        return block(x, to_device(weights) if way == PUT_INSIDE else weights)

    def put_before(weights: Any, x: jax.Array) -> jax.Array:
        return jax.checkpoint(layer)(to_device(weights), x)

    calls = {STREAMED: fo.streamed(jax.checkpoint(layer)), PUT_BEFORE: put_before}
    call = calls.get(way, jax.checkpoint(layer))
    return models.transformer_loss(params, tokens, lambda x, weights: call(weights, x))


def lora(sizes: Sizes) -> Case:
    params = partial(models.stacked_transformer, *sizes.of_model(RANK))
    return Case(sizes, params, BASE, fo.freezable(CLIPPED, ~ADAPTERS), stacked_loss)


def int8_lora(sizes: Sizes, packed: bool) -> Case:
    return dataclasses.replace(
        lora(sizes),
        params=partial(int8_params, sizes, packed),
        base=fo.path("layers/*/qvalue"),
        loss=partial(stacked_loss, block=int8_block),
    )


def last_layers(sizes: Sizes, last: int) -> Case:
    tx = fo.freezable(CLIPPED, ("embed", "norm", "layers"))
    return Case(sizes, partial(last_layers_apart, sizes, last), BASE, tx, stacked_loss)


def in_turns(sizes: Sizes) -> Case:
    still = ("embed", "norm")
    tx = fo.rotating(CLIPPED, "layers", IN_TURNS, 100, order="descending", frozen=still)
    params = partial(models.stacked_transformer, *sizes.of_model())
    return Case(sizes, params, BASE, tx, turns_loss, (ON_DEVICE, STREAMED))


def loop(sizes: Sizes) -> Case:
    return dataclasses.replace(
        lora(sizes),
        params=partial(models.transformer, *sizes.of_model(RANK)),
        loss=loop_loss,
        ways=(ON_DEVICE, STREAMED, PUT_BEFORE, PUT_INSIDE),
        layers_apart=True,
    )


def tpu_cases(tiny: bool) -> dict[str, Case]:
    """All of them, by name."""
    if tiny:
        small = middle = large = few = Sizes(3, 256, 256, (2, 128))
    else:
        small, middle, large = Sizes(26, 3_072), Sizes(32, 4_096), Sizes(40, 5_120)
        few = Sizes(6, 4_096)
    last = max(middle.depth // 10, 1)
    return {
        f"LoRA, {small.depth} layers": lora(small),
        f"LoRA, {middle.depth} layers": lora(middle),
        f"LoRA, {large.depth} layers": lora(large),
        f"LoRA on int8, {middle.depth} layers": int8_lora(middle, packed=False),
        f"LoRA on int8{IN_INT32}, {middle.depth} layers": int8_lora(middle, packed=True),
        f"{IN_TURNS} of {small.depth} layers in turns": in_turns(small),
        f"the last {last} of {middle.depth} layers": last_layers(middle, last),
        f"LoRA, {few.depth} layers in a loop of Python": loop(few),
    }
