"""A small NNX model: a backbone with a BatchNorm, and a head."""

import jax
import jax.numpy as jnp
from flax import nnx


class NormModel(nnx.Module):
    def __init__(self, rngs):
        self.backbone = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.backbone(x)))


images = jax.random.normal(jax.random.key(0), (8, 4))


def norm_loss(model):
    return (model(images) ** 2).mean()


def values(model, kind=nnx.Param):
    """Copies of the values of one kind: nnx.Param, or nnx.BatchStat for the statistics."""
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, kind)))
