"""Models of Flax NNX, filters as a user writes them, and comparisons of whole states."""

import jax
import jax.numpy as jnp
from flax import nnx

import freeze_optax as fo

BATCH = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.backbone = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(jnp.tanh(self.norm(self.backbone(x)))))


class Tied(nnx.Module):
    """Its `a/kernel` is `head/kernel` too; an `nnx.State` has the first only."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.head, self.out = (nnx.Linear(3, 3, rngs=rngs) for _ in range(3))
        self.head.kernel = self.a.kernel

    def __call__(self, x):
        return self.out(self.head(jnp.tanh(self.a(x))))


def loss(model, x=BATCH):
    return (model(x) ** 2).mean()


def by_hand(*frozen):
    """The filter that a user writes: all params but those at or below some paths."""

    def is_trained(path, value):
        text = "/".join(map(str, path))
        return not any(text == node or text.startswith(node + "/") for node in frozen)

    return nnx.All(nnx.Param, is_trained)


def params_of(model):
    return nnx.state(model, nnx.Param)


def plain(tree):
    return nnx.to_pure_dict(tree if isinstance(tree, nnx.State) else nnx.state(tree))


def paths_of(state):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def trained(filter_, model):
    return paths_of(nnx.state(model, filter_))


def assert_same(actual, expected):
    actual, expected = plain(actual), plain(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    fo.testing.assert_frozen(expected, actual, True)


def assert_gradient(actual, expected, model):
    """That it has what NNX gave, and at all other params of the model zeros of their dtype."""
    own = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(expected)}
    rows = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(actual)}
    assert set(rows) == paths_of(params_of(model))
    for path, variable in nnx.to_flat_state(params_of(model)):
        text = "/".join(map(str, path))
        fo.testing.assert_frozen(own.get(text, jnp.zeros_like(variable[...])), rows[text], True)
