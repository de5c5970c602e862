"""A language model of 12 layers, stacked in one array each, with embeddings and a head."""

import jax
import jax.numpy as jnp
import optax

import freeze_optax as fo

LAYERS, WIDTH, TOKENS = 12, 128, 256

_keys = jax.random.split(jax.random.key(0), 4)
params = {
    "embed": jax.random.normal(_keys[0], (TOKENS, WIDTH)),
    "layers": {
        "kernel": jax.random.normal(_keys[1], (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5,
        "bias": jnp.zeros((LAYERS, WIDTH)),
    },
    "head": jax.random.normal(_keys[2], (WIDTH, TOKENS)) / WIDTH**0.5,
}
batch = jax.random.randint(_keys[3], (2, 16), 0, TOKENS)


def block(x, layer):
    return x + jnp.tanh(x @ layer["kernel"] + layer["bias"]), None


def loss_fn(params, tokens):
    x = params["embed"][tokens]
    x, _ = fo.scan(jax.checkpoint(block), x, params["layers"])  # in place of jax.lax.scan
    logits = (x @ params["head"])[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
