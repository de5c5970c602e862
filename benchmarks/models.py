"""Small models, as plain functions of dicts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def layered(depth: int, width: int) -> dict[str, Any]:
    """Dense layers."""
    keys = jax.random.split(jax.random.key(0), depth)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, (width, width)) * jnp.float32(width**-0.5),
            "bias": jnp.zeros(width),
        }
        for i, key in enumerate(keys)
    }


def layered_loss(params: Any, batch: jax.Array) -> jax.Array:
    for layer in params.values():
        batch = jnp.tanh(batch @ layer["kernel"] + layer["bias"])
    return (batch**2).mean()


def adapted(depth: int, width: int, rank: int) -> dict[str, Any]:
    """Dense layers, with two thin matrices beside each kernel."""
    keys = jax.random.split(jax.random.key(1), depth)
    return {
        name: {
            **layer,
            "lora_a": jax.random.normal(key, (width, rank)) * jnp.float32(width**-0.5),
            "lora_b": jnp.zeros((rank, width)),
        }
        for key, (name, layer) in zip(keys, layered(depth, width).items(), strict=True)
    }


def adapted_loss(params: Any, batch: jax.Array) -> jax.Array:
    for layer in params.values():
        low = (batch @ layer["lora_a"]) @ layer["lora_b"]
        batch = jnp.tanh(batch @ layer["kernel"] + low + layer["bias"])
    return (batch**2).mean()


def stacked(depth: int, width: int) -> dict[str, Any]:
    """Dense layers in one array, adapters in another, and layers of their own behind."""
    layers = layered(depth, width)
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers.values())
    return {"blocks": blocks, "adapter": jax.tree.map(jnp.zeros_like, blocks), "head": layers}


def stacked_loss(params: Any, batch: jax.Array) -> jax.Array:
    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        blocks, adapter = layer
        x = x @ blocks["kernel"] + x @ adapter["kernel"] + blocks["bias"] + adapter["bias"]
        return jnp.tanh(x), None

    x, _ = jax.lax.scan(block, batch, (params["blocks"], params["adapter"]))
    return layered_loss(params["head"], x)


def transformer(
    depth: int, width: int, vocabulary: int, dtype: Any = jnp.float32, rank: int = 0
) -> Any:
    """A causal language model, with `12 * width**2` params in a layer; its embedding is tied.

    With a `rank`, each layer also has two thin matrices beside `qkv`.
    """
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    if rank:
        shapes |= {"qkv_a": (width, rank), "qkv_b": (rank, 3 * width)}
    keys = iter(jax.random.split(jax.random.key(0), 1 + len(shapes) * depth))

    def normal(shape: tuple[int, ...], scale: float) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype) * jnp.asarray(scale, dtype)

    def layer() -> dict[str, jax.Array]:
        kernels = {name: normal(shape, shape[0] ** -0.5) for name, shape in shapes.items()}
        return {**kernels, "norm_1": jnp.ones(width, dtype), "norm_2": jnp.ones(width, dtype)}

    return {
        "embed": normal((vocabulary, width), width**-0.5),
        "norm": jnp.ones(width, dtype),
        "layers": {f"layer_{i}": layer() for i in range(depth)},
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + jnp.asarray(1e-6, x.dtype))


def block(x: jax.Array, layer: Any, head_width: int = 64) -> jax.Array:
    """A layer of the transformer."""
    h = norm(x, layer["norm_1"])
    qkv = h @ layer["qkv"]
    if "qkv_a" in layer:
        qkv = qkv + (h @ layer["qkv_a"]) @ layer["qkv_b"]
    q, k, v = jnp.split(qkv.reshape(*x.shape[:2], -1, head_width), 3, axis=2)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + y.reshape(x.shape) @ layer["out"]
    return x + jax.nn.gelu(norm(x, layer["norm_2"]) @ layer["up"]) @ layer["down"]


def transformer_loss(params: Any, tokens: jax.Array, block: Any = block) -> jax.Array:
    x = params["embed"][tokens[:, :-1]]
    for layer in params["layers"].values():
        x = block(x, layer)
    return _token_loss(params, x, tokens)


def _token_loss(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = norm(x, params["norm"]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def stacked_transformer(
    depth: int, width: int, vocabulary: int, dtype: Any = jnp.float32, rank: int = 0
) -> dict[str, Any]:
    """The transformer with its layers in one array."""
    params = transformer(depth, width, vocabulary, dtype, rank)
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"].values())
    return {**params, "layers": layers}


def stacked_transformer_loss(
    params: Any, tokens: jax.Array, scan: Any = jax.lax.scan, block: Any = block
) -> jax.Array:
    """The loss of the stacked transformer, whose layers are rematerialised.

    Params may have the last layers in a stack of their own, `"last_layers"`.
    """

    @jax.checkpoint
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return block(x, layer), None

    x, _ = scan(step, params["embed"][tokens[:, :-1]], params["layers"])
    if "last_layers" in params:
        x, _ = jax.lax.scan(step, x, params["last_layers"])
    return _token_loss(params, x, tokens)
