"""A small model: an encoder of three layers, and a head."""

import jax.numpy as jnp

layers = {f"layer_{i}": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)} for i in range(3)}
params = {"encoder": layers, "head": {"kernel": jnp.ones((4, 1))}}
batch = jnp.ones((2, 4))


def loss_fn(params, batch):
    for layer in params["encoder"].values():
        batch = jnp.tanh(batch @ layer["kernel"] + layer["bias"])
    return ((batch @ params["head"]["kernel"]) ** 2).mean()
