"""What Flux's guide freezes, as users of JAX write it; gradients and optimizers in NumPy beside."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import freeze_optax as fo
from freeze_optax import linen
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.array([[1.0, -2.0], [0.5, 1.5], [-1.0, 0.25], [2.0, 1.0]])
Y = np.array([[1.0], [-0.5], [0.75], [2.0]])


class Leaf:
    """One leaf with an optimizer of its own, as a `Leaf` of Optimisers.jl."""

    def __init__(self, value: Any):
        self.value = np.asarray(value, np.float64)
        self.restart()

    def restart(self) -> None:
        self.count, self.mu, self.nu = 0, np.zeros(self.value.shape), np.zeros(self.value.shape)

    def momentum(self, grad: np.ndarray) -> None:
        self.mu = 0.9 * self.mu + grad
        self.value = self.value - 0.02 * self.mu

    def adam(self, grad: np.ndarray) -> None:
        self.count += 1
        self.mu = 0.9 * self.mu + 0.1 * grad
        self.nu = 0.999 * self.nu + 0.001 * grad**2
        mu, nu = self.mu / (1 - 0.9**self.count), self.nu / (1 - 0.999**self.count)
        self.value = self.value - 0.05 * mu / (np.sqrt(nu) + 1e-8)


OPTIMIZERS = {"momentum": optax.sgd(0.02, momentum=0.9), "adam": optax.adam(0.05)}


def linear_gradients(leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
    """Of the mean squared error of two linear layers."""
    hidden = X @ leaves["encoder/kernel"].value + leaves["encoder/bias"].value
    error = hidden @ leaves["head/kernel"].value + leaves["head/bias"].value - Y
    error = 2 * error / error.size
    back = error @ leaves["head/kernel"].value.T
    return {
        "encoder/kernel": X.T @ back,
        "encoder/bias": back.sum(0),
        "head/kernel": hidden.T @ error,
        "head/bias": error.sum(0),
    }


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.encoder(x))


def mean_squared_error(model: Any) -> jax.Array:
    return ((model(jnp.asarray(X, jnp.float32)) - jnp.asarray(Y, jnp.float32)) ** 2).mean()


def leaves_of(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


@pytest.mark.parametrize("keep_state", [True, False], ids=["moments kept", "moments fresh"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_flux_freezes_and_thaws_inside_the_training_loop(optimizer, keep_state):
    model = Model(nnx.Rngs(0))
    opt = nnx.Optimizer(model, fo.freezable(OPTIMIZERS[optimizer]), wrt=nnx.Param)
    leaves = {path: Leaf(value) for path, value in leaves_of(model).items()}
    traces = []

    @nnx.jit
    def step(model, opt):
        traces.append(1)
        opt.update(model, fnnx.grad(mean_squared_error, frozen=opt)(model))

    frozen = set()
    for epoch in range(10):
        if epoch == 3:
            fnnx.freeze(opt, model, "encoder", keep_state=keep_state)
            frozen = {"encoder/kernel", "encoder/bias"}
        if epoch == 5:
            fnnx.thaw(opt, model, "encoder/bias")
            frozen = {"encoder/kernel"}
        if epoch == 7:
            fnnx.thaw(opt, model, True)
            frozen = set()
        kept = {path: leaves_of(model)[path].tobytes() for path in frozen}
        step(model, opt)

        for path, grad in linear_gradients(leaves).items():
            if path not in frozen:
                getattr(leaves[path], optimizer)(grad)
            elif not keep_state:
                leaves[path].restart()
        now = leaves_of(model)
        assert now.keys() == leaves.keys()
        for path, leaf in leaves.items():
            np.testing.assert_allclose(now[path], leaf.value, rtol=1e-4, atol=1e-5)
        assert {path: now[path].tobytes() for path in frozen} == kept
    # Momentum counts no steps, so the last plan is the first again; Adam then has three counts.
    assert len(traces) == (3 if optimizer == "momentum" else 4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_flux_freezes_everything_and_thaws_one_layer(optimizer):
    model = eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.nn.Identity()])
    tx = fo.freezable(OPTIMIZERS[optimizer])
    state = fo.freeze(tx.init(model), model, True)
    state = fo.thaw(state, model, "layers/0/bias")

    def loss(model):
        return (jax.vmap(model)(jnp.asarray(X, jnp.float32)) ** 2).mean()

    new, bias = model, Leaf(model.layers[0].bias)
    weight = np.asarray(model.layers[0].weight, np.float64)
    for _ in range(3):
        updates, state = tx.update(fo.grad(loss, frozen=state)(new), state, new)
        new = fo.apply_updates(new, updates, frozen=state)
        error = X @ weight.T + bias.value
        getattr(bias, optimizer)(2 * error.sum(0) / error.size)
    assert jax.tree.structure(new) == jax.tree.structure(model)
    assert new.layers[0].weight is model.layers[0].weight
    np.testing.assert_allclose(new.layers[0].bias, bias.value, rtol=1e-5)


# A layer that adds a mask which is never trained: its class says so, whoever trains it.

KERNEL, BIAS, MASK = np.array([[0.5, -1.0], [0.25, 2.0]]), np.array([0.1, -0.2]), np.array([1.0, 0])


def masked_by_hand() -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias after three steps, in which both decay."""
    kernel, bias = KERNEL, BIAS
    for _ in range(3):
        error = 2 * (X @ kernel + bias + X + MASK) / X.size
        step = X.T @ error + 0.5 * kernel, error.sum(0) + 0.5 * bias
        kernel, bias = kernel - 0.1 * step[0], bias - 0.1 * step[1]
    return kernel, bias


def decaying(frozen: Any) -> optax.GradientTransformationExtraArgs:
    return fo.freezable(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), frozen)


def train(tx: Any, params: Any, apply: Callable[[Any, jax.Array], jax.Array]) -> Any:
    state = tx.init(params)
    for _ in range(3):
        grads = fo.grad(lambda p: (apply(p, as_float32(X)) ** 2).mean(), frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params


def as_float32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def assert_masked(kernel: Any, bias: Any, mask: Any) -> None:
    expected = masked_by_hand()
    np.testing.assert_allclose(kernel, expected[0], rtol=1e-5)
    np.testing.assert_allclose(bias, expected[1], rtol=1e-5)
    assert np.asarray(mask).tobytes() == MASK.astype(np.float32).tobytes()


class MaskedLayer(eqx.Module):
    dense: eqx.nn.Linear
    mask: jax.Array
    frozen_fields = ("mask",)

    def __call__(self, x):
        return self.dense(x) + x + self.mask


class ShiftedLayer(MaskedLayer):
    shift: jax.Array
    frozen_fields = ("shift",)


def equinox_dense() -> eqx.nn.Linear:
    dense = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    values = as_float32(KERNEL.T), as_float32(BIAS)
    return eqx.tree_at(lambda dense: (dense.weight, dense.bias), dense, values)


def test_flux_a_class_declares_a_field_as_never_trained():
    layer = MaskedLayer(equinox_dense(), as_float32(MASK))
    new = train(decaying(fo.declared()), layer, lambda layer, x: jax.vmap(layer)(x))
    assert jax.tree.structure(new) == jax.tree.structure(layer)
    assert_masked(new.dense.weight.T, new.dense.bias, new.mask)


def test_flux_a_declared_field_is_frozen_wherever_the_layer_stands_and_in_subclasses():
    masked = MaskedLayer(equinox_dense(), as_float32(MASK))
    shifted = ShiftedLayer(equinox_dense(), as_float32(MASK), shift=jnp.ones(2))
    model = eqx.nn.Sequential([masked, eqx.nn.Linear(2, 2, key=jax.random.key(0)), shifted])

    def frozen(spec):
        found = jax.tree_util.tree_leaves_with_path(fo.mask(spec, model))
        return [jax.tree_util.keystr(k, simple=True, separator="/") for k, flag in found if flag]

    never = ["layers/0/mask", "layers/2/mask", "layers/2/shift"]
    assert frozen(fo.declared()) == never
    assert frozen([fo.declared(), "layers/1/bias"]) == sorted([*never, "layers/1/bias"])
    # Said by the class, but not beyond the user: the spec of a run can leave it out.
    assert frozen(fo.declared() - "layers/2") == never[:1]


class LinenMaskedLayer(nn.Module):
    frozen_fields = ("mask",)

    @nn.compact
    def __call__(self, x):
        mask = self.param("mask", nn.initializers.zeros, (2,))
        return nn.Dense(2, name="dense")(x) + x + mask


def test_flux_a_linen_module_declares_a_param_as_never_trained():
    layer = LinenMaskedLayer()
    dense = {"kernel": as_float32(KERNEL), "bias": as_float32(BIAS)}
    params = {"dense": dense, "mask": as_float32(MASK)}
    frozen = fo.declared(modules=linen.modules(layer, as_float32(X)))
    new = train(decaying(frozen), params, lambda params, x: layer.apply({"params": params}, x))
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert_masked(new["dense"]["kernel"], new["dense"]["bias"], new["mask"])


class NnxMaskedLayer(nnx.Module):
    frozen_fields = ("mask",)

    def __init__(self):
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.dense.kernel[...], self.dense.bias[...] = as_float32(KERNEL), as_float32(BIAS)
        self.mask = nnx.Param(as_float32(MASK))

    def __call__(self, x):
        return self.dense(x) + x + self.mask[...]


def test_flux_an_nnx_module_declares_a_variable_as_never_trained():
    layer = NnxMaskedLayer()
    tx = decaying(fo.declared(modules=fnnx.modules(layer)))
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    for _ in range(3):
        loss = lambda layer: (layer(as_float32(X)) ** 2).mean()  # noqa: E731
        optimizer.update(layer, fnnx.grad(loss, frozen=optimizer)(layer))
    assert_masked(layer.dense.kernel[...], layer.dense.bias[...], layer.mask[...])


def test_flux_a_declared_field_that_no_module_has_is_an_error():
    class Misspelt(MaskedLayer):
        frozen_fields = ("maks",)

    layer = Misspelt(equinox_dense(), as_float32(MASK))
    with pytest.raises(ValueError, match=r"Misspelt.frozen_fields names 'maks'.*'dense', 'mask'"):
        decaying(fo.declared()).init(layer)


class Described(eqx.Module):
    """A layer among whose leaves are a string, a function, numbers and a counter."""

    weight: jax.Array
    name: str
    activation: Callable
    width: int
    steps: jax.Array
    scale: np.ndarray

    def __call__(self, x):
        label = 1.0 if self.name == "first" else 2.0
        return label * self.width * self.activation(x @ self.weight) * self.scale


def described() -> Described:
    weight, scale = as_float32(KERNEL), MASK.astype(np.float32)
    return Described(weight, "first", jnp.tanh, 3, jnp.array(7), scale)


OTHERS = ("name", "activation", "width", "steps")


def loss_of_described(layer: Described) -> jax.Array:
    return (layer(as_float32(X)) ** 2).mean()


def described_gradients() -> tuple[np.ndarray, np.ndarray]:
    inside = np.tanh(X @ KERNEL)
    out = 3 * inside * MASK
    back = 2 * out / out.size * 3
    return X.T @ (back * MASK * (1 - inside**2)), (back * inside).sum(0)


def test_flux_fields_that_are_no_arrays_have_no_gradient_no_state_and_never_change():
    layer = described()
    tx = fo.freezable(optax.adam(0.05))
    state = tx.init(layer)
    # A count, and two moments of the two fields that train.
    assert sorted(x.shape for x in jax.tree.leaves(state)) == [(), (2,), (2,), (2, 2), (2, 2)]
    grads = fo.grad(loss_of_described, frozen=state)(layer)
    assert not any(getattr(grads, name).any() for name in OTHERS)
    holes = fo.grad(loss_of_described, frozen=state, holes=True)(layer)
    assert all(isinstance(getattr(holes, name), optax.MaskedNode) for name in OTHERS)

    d_weight, d_scale = described_gradients()
    weight, scale = Leaf(KERNEL), Leaf(MASK)
    np.testing.assert_allclose(grads.weight, d_weight, rtol=1e-5, atol=1e-7)
    weight.adam(d_weight)
    scale.adam(d_scale)
    updates, state = tx.update(grads, state, layer)
    new = fo.apply_updates(layer, updates, frozen=state)
    np.testing.assert_allclose(new.weight, weight.value, rtol=1e-5)
    np.testing.assert_allclose(new.scale, scale.value, rtol=1e-5)
    assert all(getattr(new, name) is getattr(layer, name) for name in OTHERS)


def test_flux_fields_that_are_no_arrays_stay_off_the_device():
    trainable, rest = fo.partition(described(), fo.nothing)
    device = jax.devices()[3]
    # Plain jax takes the trainable part, which would fail for a string or a function.
    trainable = jax.device_put(trainable, device)
    assert [leaf.devices() for leaf in jax.tree.leaves(trainable)] == [{device}] * 2
    assert [getattr(rest, name) for name in OTHERS[:3]] == ["first", jnp.tanh, 3]
    tx = fo.freezable(optax.adam(0.05))

    @jax.jit
    def step(trainable, state):
        loss = lambda part: loss_of_described(fo.merge(part, rest))  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return fo.apply_updates(trainable, updates), state

    moved, _ = step(trainable, tx.init(trainable))
    assert [leaf.devices() for leaf in jax.tree.leaves(moved)] == [{device}] * 2
    whole = fo.merge(moved, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(described())
    assert all(getattr(whole, name) is getattr(rest, name) for name in OTHERS)
    for name, grad in zip(("weight", "scale"), described_gradients(), strict=True):
        leaf = Leaf(getattr(described(), name))
        leaf.adam(grad)
        np.testing.assert_allclose(getattr(whole, name), leaf.value, rtol=1e-5)
