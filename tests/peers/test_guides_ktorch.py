"""What ktorch freezes: everything, names, and names with the values that they get."""

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
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = np.array([[1.0, -2.0, 0.5], [0.5, 1.5, -1.0], [-1.0, 0.25, 2.0], [2.0, 1.0, 0.0]])
BATCH = jnp.asarray(X, jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.Dense(3, name="fc")(x))


def fresh() -> dict[str, Any]:
    return Net().init(jax.random.key(0), BATCH)["params"]


def loss_of(params: Any) -> jax.Array:
    return (Net().apply({"params": params}, BATCH) ** 2).mean()


def train(tx: Any, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    @jax.jit
    def step(params, state):
        updates, state = tx.update(fo.grad(loss_of, frozen=state)(params), state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


def test_ktorch_freezes_everything_with_true_and_thaws_it_again():
    params = fresh()
    tx = fo.freezable(optax.adamw(0.1))
    state = tx.init(params)
    frozen = fo.freeze(state, params, True, keep_state=True)
    assert fo.mask(frozen, params) == {
        name: {"bias": True, "kernel": True} for name in ("fc", "head")
    }
    still, frozen = train(tx, params, frozen, 3)
    assert bits(still) == bits(params)
    # Three steps of AdamW with everything frozen have left no trace.
    went_on, _ = train(tx, still, fo.thaw(frozen, still, True), 3)
    expected, plain = params, optax.adamw(0.1)
    plain_state = plain.init(expected)
    for _ in range(3):
        updates, plain_state = plain.update(jax.grad(loss_of)(expected), plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert jax.tree.structure(went_on) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), went_on, expected
    )


def test_ktorch_a_new_optimizer_with_everything_frozen_warns_and_keeps_no_moments():
    with pytest.warns(UserWarning, match="all 4 leaves are frozen, nothing is left to train"):
        state = fo.freezable(optax.adam(0.1), True).init(fresh())
    # Only the count is left.
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("fc/kernel", {"fc/kernel"}),
        (["fc/kernel", "fc/bias"], {"fc/kernel", "fc/bias"}),
        (["fc", "head/bias"], {"fc/kernel", "fc/bias", "head/bias"}),
    ],
)
def test_ktorch_freezes_by_name_and_the_rest_steps(names, expected):
    params = fresh()
    tx = fo.freezable(optax.sgd(0.1))
    state = fo.freeze(tx.init(params), params, names)
    grads = jax.grad(loss_of)(params)
    updates, state = tx.update(fo.grad(loss_of, frozen=state)(params), state, params)
    new = fo.apply_updates(params, updates, frozen=state)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for layer, leaves in params.items():
        for name, leaf in leaves.items():
            if f"{layer}/{name}" in expected:
                assert new[layer][name] is leaf
                continue
            stepped = np.asarray(leaf) - 0.1 * np.asarray(grads[layer][name])
            np.testing.assert_allclose(new[layer][name], stepped, rtol=1e-5, atol=1e-7)
            assert (new[layer][name] != leaf).all()


VALUES = {"fc/kernel": np.eye(3), "fc/bias": 0.0}


def test_ktorch_freezes_names_and_sets_them_from_one_dictionary():
    before = fresh()
    params = fo.assign(before, VALUES)
    tx = fo.freezable(optax.sgd(0.1, momentum=0.9), list(VALUES))
    state = tx.init(params)
    # A layer that does nothing, so the network is its head.
    head = {name: np.asarray(leaf, np.float64) for name, leaf in before["head"].items()}
    out = Net().apply({"params": params}, BATCH)
    np.testing.assert_allclose(out, X @ head["kernel"] + head["bias"], rtol=1e-5)

    new, _ = train(tx, params, state, 4)
    moments = {name: np.zeros_like(leaf) for name, leaf in head.items()}
    for _ in range(4):
        error = 2 * (X @ head["kernel"] + head["bias"]) / len(X)
        for name, grad in (("kernel", X.T @ error), ("bias", error.sum(0))):
            moments[name] = 0.9 * moments[name] + grad
            head[name] = head[name] - 0.1 * moments[name]
    fc = {"bias": np.zeros(3, np.float32), "kernel": np.eye(3, dtype=np.float32)}
    assert bits(new["fc"]) == bits(fc)
    np.testing.assert_allclose(new["head"]["kernel"], head["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["head"]["bias"], head["bias"], rtol=1e-4, atol=1e-6)


def test_ktorch_sets_and_freezes_mid_training_with_the_rest_undisturbed():
    params = fresh()
    tx = fo.freezable(optax.adam(0.1))
    params, state = train(tx, params, tx.init(params), 2)
    old = jax.tree.map(np.array, params)
    moments = optax.tree_utils.tree_get(state, "mu")
    params = fo.assign(params, VALUES)
    state = fo.freeze(state, params, list(VALUES))
    assert bits(params["head"]) == bits(old["head"])
    now = optax.tree_utils.tree_get(state, "mu")
    assert now["head"] == moments["head"]
    assert all(isinstance(hole, optax.MaskedNode) for hole in now["fc"].values())
    params, state = train(tx, params, state, 2)
    assert bits(params["fc"]["kernel"]) == bits(np.eye(3, dtype=np.float32))
    # The second moments of the head have seen four gradients, the count too.
    assert optax.tree_utils.tree_get(state, "count") == 4


def test_ktorch_a_value_takes_the_dtype_and_the_device_of_its_leaf():
    device = jax.devices()[2]
    linear = eqx.nn.Linear(3, 3, key=jax.random.key(0), dtype=jnp.bfloat16)
    linear = jax.device_put(linear, device)
    new = fo.assign(linear, {"weight": np.eye(3), "bias": 0.25})
    assert jax.tree.structure(new) == jax.tree.structure(linear)
    assert bits(new.weight) == bits(np.eye(3).astype(jnp.bfloat16))
    assert bits(new.bias) == bits(np.full(3, 0.25).astype(jnp.bfloat16))
    assert {new.weight.dtype, new.bias.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert new.weight.devices() == new.bias.devices() == {device}


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc = nnx.Linear(3, 3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)


def nnx_leaves(model: nnx.Module) -> dict[str, bytes]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(leaf[...]).tobytes() for path, leaf in flat}


def test_ktorch_sets_and_freezes_an_nnx_model_in_place():
    model = NnxNet()
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1)), wrt=nnx.Param)
    before = nnx_leaves(model)
    nnx.update(model, fo.assign(nnx.state(model, nnx.Param), VALUES))
    fnnx.freeze(optimizer, model, list(VALUES))
    loss = lambda model: (model.head(model.fc(BATCH)) ** 2).mean()  # noqa: E731
    for _ in range(2):
        optimizer.update(model, fnnx.grad(loss, frozen=optimizer)(model))
    after = nnx_leaves(model)
    assert after["fc/kernel"] == np.eye(3, dtype=np.float32).tobytes()
    assert after["fc/bias"] == np.zeros(3, np.float32).tobytes()
    assert all(after[name] != before[name] for name in ("head/kernel", "head/bias"))
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    "verb", [fo.freeze, fo.thaw, fo.set_frozen], ids=lambda verb: verb.__name__
)
def test_ktorch_an_unknown_name_among_known_ones_is_an_error_and_nothing_changes(verb):
    params = fresh()
    state = fo.freezable(optax.adam(0.1), "head").init(params)
    leaves = jax.tree.leaves(state)
    with pytest.raises(ValueError, match="'fc/wieght' selects no leaf; nearest: 'fc/"):
        verb(state, params, ["fc/bias", "fc/wieght"])
    assert fo.mask(state, params) == {
        "fc": {"bias": False, "kernel": False},
        "head": {"bias": True, "kernel": True},
    }
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(state), strict=True))


def test_ktorch_an_unknown_name_leaves_an_nnx_optimizer_as_it_was():
    model = NnxNet()
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1)), wrt=nnx.Param)
    state = optimizer.opt_state
    for verb in (fnnx.freeze, fnnx.thaw, fnnx.set_frozen):
        with pytest.raises(ValueError, match="'fc/wieght' selects no leaf"):
            verb(optimizer, model, ["fc/bias", "fc/wieght"])
        assert optimizer.opt_state is state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fc/wieght": 1.0}, "'fc/wieght', which is no leaf; nearest: 'fc/"),
        ({"fc": 1.0}, "'fc', which is no leaf; it is a node, with 'fc/bias', 'fc/kernel'"),
        ({"fc/*": 1.0}, r"'fc/\*', which is no leaf"),
        (
            {"head/kernel": np.eye(3)},
            r"'head/kernel' is float32\[3, 1\], the value float64\[3, 3\]",
        ),
    ],
    ids=["unknown", "a node", "a glob", "a shape"],
)
def test_ktorch_one_wrong_value_in_a_dictionary_is_an_error_and_none_is_set(wrong, message):
    params = fresh()
    before = bits(params)
    model = NnxNet()
    model_before = nnx_leaves(model)
    for values in ({**VALUES, **wrong}, {**wrong, **VALUES}):
        with pytest.raises(ValueError, match=message):
            fo.assign(params, values)
        with pytest.raises(ValueError, match=message):
            fo.assign(nnx.state(model), values)
    assert bits(params) == before
    assert nnx_leaves(model) == model_before


def test_ktorch_a_dictionary_of_values_is_no_mask():
    tx = fo.freezable(optax.adam(0.1), VALUES)
    with pytest.raises(ValueError, match="has nothing for 'head/bias', 'head/kernel' of the tree"):
        tx.init(fresh())
    with pytest.raises(TypeError, match="the mask at 'fc/bias' is float, not a bool"):
        tx.init({"fc": fresh()["fc"]})
