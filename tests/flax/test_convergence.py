"""`Convergence` with the optimizers of Flax, as with a loop by hand on the same arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

ORDER = ["linear_0", "linear_1"]
TX = fo.freezable(fo.measured(optax.sgd(0.05)))
POLICY = fo.Convergence(ORDER, threshold=0.4, patience=3, every=4)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear_0, self.linear_1 = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.linear_1(jnp.tanh(self.linear_0(x)))))


X = jax.random.normal(jax.random.key(1), (8, 4))
Y = jnp.sin(X.sum(axis=1, keepdims=True))


def apply(params, x):
    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    x = jnp.tanh(dense(params["linear_0"], x))
    return dense(params["head"], jnp.tanh(dense(params["linear_1"], x)))


def by_hand(params, steps):
    state, decisions = TX.init(params), []
    for step in range(steps):
        decisions.append(POLICY.at(step, state, params))
        state = fo.set_frozen(state, params, decisions[-1])
        grads = fo.grad(lambda p: ((apply(p, X) - Y) ** 2).mean(), frozen=state)(params)
        updates, state = TX.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params, [(x.froze, x.thawed) for x in decisions]


def as_dict(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_nnx_decides_and_trains_as_a_loop_by_hand():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    expected, decisions = by_hand(as_dict(model), 20)
    assert sum(x != ((), ()) for x in decisions) == 2
    found = []
    for step in range(20):
        params = nnx.state(model, optimizer.wrt)
        decision = POLICY.at(step, optimizer.opt_state, params)
        found.append((decision.froze, decision.thawed))
        fnnx.set_frozen(optimizer, model, decision)
        grads = fnnx.grad(lambda model: ((model(X) - Y) ** 2).mean(), frozen=optimizer)(model)
        optimizer.update(model, grads)
    assert found == decisions
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), as_dict(model), expected)


def test_a_train_state_decides_as_a_loop_by_hand():
    params = as_dict(Model(nnx.Rngs(0)))
    _, decisions = by_hand(params, 20)
    state = TrainState.create(apply_fn=apply, params=params, tx=TX)
    found = []
    for step in range(20):
        decision = POLICY.at(int(state.step), state, state.params)
        found.append((decision.froze, decision.thawed))
        assert state.step == step
        state = fo.set_frozen(state, state.params, decision)
        grads = fo.grad(lambda p: ((apply(p, X) - Y) ** 2).mean(), frozen=state)(state.params)
        state = state.apply_gradients(grads=grads)
    assert found == decisions
