"""Edits on the state inside an `nnx.Optimizer`, whose arrays stand in Variables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.backbone = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.backbone(x)))


def loss(model):
    return (model(BATCH) ** 2).mean()


def plain_params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("pure", [False, True], ids=["state of Variables", "plain dict"])
def test_thawing_and_parking_in_a_training_loop(pure):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1), "backbone"), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss)(model))

    # The reference has plain dicts, and was tested against bare optimizers.
    tx = fo.freezable(optax.adam(0.1), "backbone")
    tree = jax.tree.map(jnp.copy, plain_params(model))
    state = tx.init(tree)

    def twin_step(tree, state):
        twin = Net(nnx.Rngs(0))
        nnx.update(twin, tree)
        grads = nnx.to_pure_dict(nnx.grad(loss)(twin))
        updates, state = tx.update(grads, state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    def edit(function, *args, **kwargs):
        params = plain_params(model) if pure else nnx.state(model, nnx.Param)
        new = function(optimizer.opt_state, params, *args, **kwargs)
        optimizer.opt_state = nnx.data(new)
        return function(state, tree, *args, **kwargs)

    for change in (
        None,
        lambda: edit(fo.thaw, "backbone/kernel"),
        lambda: edit(fo.freeze, "backbone/kernel", keep_state=True),
        lambda: edit(fo.thaw, "backbone"),
        lambda: edit(fo.set_frozen, "head/bias"),
    ):
        if change:
            state = change()
        for _ in range(2):
            step(model, optimizer)
            tree, state = twin_step(tree, state)
    assert len(traces) == 5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        plain_params(model),
        tree,
    )
    assert fo.mask(optimizer, tree) == fo.mask("head/bias", tree)
