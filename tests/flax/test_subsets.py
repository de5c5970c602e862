"""Rows of an inner axis and elements in Flax's own training loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (3, 4)
RATE = 0.05


def _rows(axis, indices):
    mask = np.zeros(SHAPE, bool)
    np.moveaxis(mask, axis, 0)[indices] = True
    return mask


COLUMNS, ELEMENTS = _rows(1, [0, 2]), np.random.default_rng(0).random(SHAPE) < 0.5
FROZEN = {
    "columns": (lambda path: fo.rows(path, [0, 2], axis=1), COLUMNS),
    "elements": (lambda path: fo.elements(path, ELEMENTS), ELEMENTS),
}
ANY = pytest.mark.parametrize(("spec", "mask"), FROZEN.values(), ids=FROZEN)
LIVES = pytest.mark.parametrize(
    ("spec", "mask", "keep_state"),
    cases(
        {
            f"{name}, {what}": (*pair, keep_state)
            for name, pair in FROZEN.items()
            for what, keep_state in (("dropped", False), ("kept", True))
        },
        ["columns, dropped", "elements, kept"],
    ),
)
X = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)


class PerElement:
    """Adam with a step count for each element; without a state its moments are dropped."""

    def __init__(self, kernel, frozen):
        self.value, self.frozen = np.array(kernel), frozen.copy()
        self.mu, self.nu = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
        self.count, self.has_state = np.zeros(SHAPE, int), ~frozen

    def step(self, bias):
        """One step of the loss of the tests: the mean square of what a layer gives."""
        out = X @ self.value + bias
        grad, live = 2 * X.T @ out / out.size, ~self.frozen
        self.count[live] += 1
        self.mu[live] = (0.9 * self.mu + 0.1 * grad)[live]
        self.nu[live] = (0.999 * self.nu + 0.001 * grad**2)[live]
        n = np.maximum(self.count, 1)
        step = RATE * (self.mu / (1 - 0.9**n)) / (np.sqrt(self.nu / (1 - 0.999**n)) + 1e-8)
        self.value = np.where(live, self.value - step, self.value)

    def set_frozen(self, frozen, keep_state):
        if not keep_state:
            self.has_state &= ~(frozen & ~self.frozen)
        fresh = ~frozen & ~self.has_state
        for x in (self.mu, self.nu, self.count):
            x[fresh] = 0
        self.has_state |= fresh
        self.frozen = frozen.copy()


def _check(kernel, before, own):
    kernel, before = np.asarray(kernel), np.asarray(before)
    np.testing.assert_allclose(kernel, own.value, rtol=1e-4, atol=1e-5)
    assert kernel[own.frozen].tobytes() == before[own.frozen].tobytes()


class Net(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(*SHAPE, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x)


def _nnx_loss(model):
    return (model(X) ** 2).mean()


@LIVES
def test_an_nnx_optimizer_follows_adam_for_each_element_through_edits(spec, mask, keep_state):

    model = Net()
    frozen = spec("dense/kernel") | fo.path("dense/bias")
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(RATE), frozen), wrt=nnx.Param)
    own = PerElement(model.dense.kernel[...], mask)
    bias = np.asarray(model.dense.bias[...])

    def steps(count):
        for _ in range(count):
            before = np.asarray(model.dense.kernel[...])
            optimizer.update(model, fnnx.grad(_nnx_loss, frozen=optimizer)(model))
            own.step(bias)
            _check(model.dense.kernel[...], before, own)

    steps(2)
    assert (
        optax.tree_utils.tree_get(optimizer.opt_state, "mu")["dense"]["kernel"][...].size
        == (~mask).sum()
    )
    # Freeze along the other axis too, thaw some elements, then set all anew.
    fnnx.freeze(optimizer, model, fo.rows("dense/kernel", [1]), keep_state=keep_state)
    own.set_frozen(own.frozen | _rows(0, [1]), keep_state)
    steps(2)
    fnnx.thaw(optimizer, model, fo.elements("dense/kernel", ~ELEMENTS))
    own.set_frozen(own.frozen & ELEMENTS, keep_state)
    steps(2)
    rows = fo.rows("dense/kernel", [0]) | fo.path("dense/bias")
    fnnx.set_frozen(optimizer, model, rows, keep_state=keep_state)
    own.set_frozen(_rows(0, [0]), keep_state)
    steps(2)


@LIVES
def test_a_linen_train_state_does_too(spec, mask, keep_state):
    module = nn.Dense(SHAPE[1])
    params = module.init(jax.random.key(0), X)["params"]
    frozen = spec("kernel") | fo.path("bias")
    tx = fo.freezable(optax.adam(RATE), frozen)
    train = TrainState.create(apply_fn=module.apply, params=params, tx=tx)
    own = PerElement(params["kernel"], mask)

    @jax.jit
    def step(train):
        def loss(params):
            return (train.apply_fn({"params": params}, X) ** 2).mean()

        return train.apply_gradients(grads=fo.grad(loss, train)(train.params))

    def steps(train, count):
        for _ in range(count):
            before = train.params["kernel"]
            train = step(train)
            own.step(np.zeros(4, np.float32))
            _check(train.params["kernel"], before, own)
        return train

    train = steps(train, 2)
    train = fo.freeze(train, train.params, fo.rows("kernel", [1]), keep_state=keep_state)
    own.set_frozen(own.frozen | _rows(0, [1]), keep_state)
    train = steps(train, 2)
    train = fo.thaw(train, train.params, fo.elements("kernel", ~ELEMENTS))
    own.set_frozen(own.frozen & ELEMENTS, keep_state)
    steps(train, 2)


@ANY
def test_a_part_of_a_variable_is_no_filter(spec, mask):
    del mask
    with pytest.raises(ValueError, match="NNX takes a Variable as a whole, but of 'dense/kernel'"):
        fnnx.wrt(Net(), spec("dense/kernel"))


def test_layers_stacked_along_axis_1_as_maxtext_stacks_them():
    """`nn.scan(variable_axes={"params": 1})` in Linen: the layers are rows of axis 1."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(3, name="dense")(x)), None

    stack = nn.scan(
        Block,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        length=4,
        in_axes=nn.broadcast,
    )()
    params = stack.init(jax.random.key(0), X, None)["params"]
    assert params["dense"]["kernel"].shape == (3, 4, 3)
    frozen = fo.rows("**", slice(0, 3), axis=1)
    tx = fo.freezable(optax.adam(RATE), frozen)
    state = tx.init(params)
    assert optax.tree_utils.tree_get(state, "mu")["dense"]["kernel"].shape == (3, 1, 3)

    def loss(params):
        return (stack.apply({"params": params}, X, None)[0] ** 2).mean()

    def by_scan(params):
        def layer(x, dense):
            return jnp.tanh(x @ dense["kernel"] + dense["bias"]), None

        return (
            fo.scan(layer, X, params["dense"], fo.rows("**", slice(0, 3), axis=1), axis=1)[0] ** 2
        ).mean()

    whole = jax.grad(loss)(params)
    for fun in (loss, by_scan):
        grads = fo.grad(fun, frozen)(params)
        for leaf in ("kernel", "bias"):
            expected = np.array(whole["dense"][leaf])
            expected[:, :3] = 0
            np.testing.assert_allclose(grads["dense"][leaf], expected, rtol=1e-5, atol=1e-7)
