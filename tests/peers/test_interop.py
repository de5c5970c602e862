"""Works where JAX users are: Flax, Equinox, Haiku, Orbax, scan, shard_map, sharded arrays."""

import functools
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.core import freeze as frozen_dict
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def adam_by_hand(params: Any, grads_of, steps: int) -> Any:
    """The bare optimizer on a flat list of leaves: what trainable leaves should become."""
    tx = optax.adam(0.1)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads_of(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="head")(linen.tanh(linen.Dense(4, name="backbone")(x)))


@pytest.mark.parametrize("container", [dict, frozen_dict], ids=["dict", "FrozenDict"])
def test_a_linen_train_state(container):
    model = Mlp()
    params = container(model.init(jax.random.key(0), BATCH)["params"])
    tx = optax.chain(optax.clip(1.0), fo.freezable(optax.adam(0.1), "backbone"))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss = lambda params: (state.apply_fn({"params": params}, BATCH) ** 2).mean()  # noqa: E731
        return state.apply_gradients(grads=fo.grad(loss, frozen=state)(state.params))

    for _ in range(3):
        state = step(state)
    fo.testing.assert_frozen(params, state.params, "backbone")

    def loss_of_head(head):
        whole = {"params": {"backbone": params["backbone"], "head": head}}
        return (model.apply(whole, BATCH) ** 2).mean()

    def grads_of(head):
        return jax.tree.map(lambda g: jnp.clip(g, -1.0, 1.0), jax.grad(loss_of_head)(head))

    expected = adam_by_hand(dict(params["head"]), grads_of, 3)
    for name, leaf in expected.items():
        np.testing.assert_allclose(state.params["head"][name], leaf, rtol=1e-6, atol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.backbone = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.backbone(x)))


def test_an_nnx_optimizer_under_nnx_jit():
    model, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1), "backbone"), wrt=nnx.Param)
    bare = nnx.Optimizer(twin, optax.adam(0.1), wrt=nnx.PathContains("head"))
    before = nnx.to_pure_dict(nnx.state(model))
    traces = []

    def loss(model):
        return (model(BATCH) ** 2).mean()

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(loss)(model))

    @nnx.jit
    def bare_step(model, optimizer):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.PathContains("head")))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
        bare_step(twin, bare)
    assert len(traces) == 1
    after, expected = (nnx.to_pure_dict(nnx.state(m)) for m in (model, twin))
    fo.testing.assert_frozen(before, after, "backbone")
    fo.testing.assert_frozen(expected, after, True)


def test_an_equinox_module():
    model = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    tx = fo.freezable(optax.adam(0.1), "layers/{0,1}")
    state = tx.init(model)

    def loss(model):
        return (jax.vmap(model)(BATCH) ** 2).mean()

    @eqx.filter_jit
    def step(model, state):
        grads = fo.grad(loss, frozen=state)(model)
        updates, state = tx.update(grads, state, model)
        return fo.apply_updates(model, updates, frozen=state), state

    new = model
    for _ in range(3):
        new, state = step(new, state)
    fo.testing.assert_frozen(model, new, "layers/{0,1}")

    def grads_of(last):
        return jax.grad(lambda x: loss(eqx.tree_at(lambda m: m.layers[2], model, x)))(last)

    expected = adam_by_hand(model.layers[2], grads_of, 3)
    np.testing.assert_allclose(new.layers[2].weight, expected.weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.layers[2].bias, expected.bias, rtol=1e-5, atol=1e-6)


def test_haiku_params():
    forward = hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(2, name="head")(jnp.tanh(hk.nets.MLP([4, 4])(x))))
    )
    params = forward.init(jax.random.key(0), BATCH)
    assert "mlp/~/linear_0" in params
    tx = fo.freezable(optax.adam(0.1), "mlp/~/linear_*")
    state = tx.init(params)
    grads = fo.grad(lambda p: (forward.apply(p, BATCH) ** 2).mean(), frozen=state)(params)
    updates, _ = tx.update(grads, state, params)
    new = fo.apply_updates(params, updates, frozen=state)
    fo.testing.assert_frozen(params, new, "mlp")
    assert not np.array_equal(new["head"]["w"], params["head"]["w"])


@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
# Orbax warns of its own defaults.
@pytest.mark.filterwarnings("ignore")
def test_an_orbax_round_trip(tmp_path, checkpointer):
    params = Mlp().init(jax.random.key(0), BATCH)["params"]
    tx = optax.chain(optax.clip(1.0), fo.freezable(optax.adam(0.1), "backbone"))
    _, state = tx.update(params, tx.init(params), params)
    saver = checkpointer()
    saver.save(tmp_path / "state", state)
    if hasattr(saver, "wait_until_finished"):
        saver.wait_until_finished()
    target = jax.eval_shape(tx.init, params)
    if checkpointer is ocp.StandardCheckpointer:
        restored = saver.restore(tmp_path / "state", target)
    else:
        restored = saver.restore(tmp_path / "state", item=target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    fo.testing.assert_frozen(state, restored, True)
    expected, _ = tx.update(params, state, params)
    updates, _ = tx.update(params, restored, params)
    fo.testing.assert_frozen(expected, updates, True)


def tree_of_arrays() -> dict[str, Any]:
    return {
        "encoder": {"w": jnp.arange(32.0).reshape(8, 4)},
        "head": {"w": jnp.ones((4, 8)), "b": jnp.zeros(8)},
    }


def tree_loss(params):
    return (
        (jnp.tanh(params["encoder"]["w"]) @ params["head"]["w"] + params["head"]["b"]) ** 2
    ).sum()


def test_a_scan_over_steps_equals_a_loop():
    tx, params = fo.freezable(optax.adamw(0.1), "encoder"), tree_of_arrays()

    def step(carry, _):
        params, state = carry
        value, grads = fo.value_and_grad(tree_loss, frozen=state, holes=True)(params)
        updates, state = tx.update(grads, state, params)
        return (fo.apply_updates(params, updates, frozen=state), state), value

    start = (params, tx.init(params))
    (scanned, _), values = jax.jit(lambda c: jax.lax.scan(step, c, length=3))(start)
    looped = start
    for _ in range(3):
        looped, _ = jax.jit(step)(looped, None)
    fo.testing.assert_frozen(params, scanned, "encoder")
    np.testing.assert_allclose(scanned["head"]["w"], looped[0]["head"]["w"], rtol=1e-6, atol=1e-6)
    assert values[0] > values[2]


@functools.cache
def mesh() -> jax.sharding.Mesh:
    # Auto axes in any version of jax: make_mesh has changed its default.
    return jax.sharding.Mesh(np.array(jax.devices()), ("data",))


def sharded(tree: Any) -> Any:
    def place(x):
        axis = next((i for i, n in enumerate(x.shape) if n % 8 == 0), None)
        spec = [None] * x.ndim
        if axis is not None:
            spec[axis] = "data"
        return jax.device_put(x, NamedSharding(mesh(), PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_sharded_arrays_over_eight_devices(jit):
    assert jax.device_count() == 8
    params = sharded(tree_of_arrays())
    tx = fo.freezable(optax.adam(0.1), "encoder")
    state = tx.init(params)
    grads = fo.grad(tree_loss, frozen=state)(params)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(grads, state, params)
    new = fo.apply_updates(params, updates, frozen=state)
    for tree in (state.inner[0].mu["head"], state.inner[0].nu["head"], new["head"]):
        for name, leaf in params["head"].items():
            assert tree[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert new["encoder"]["w"] is params["encoder"]["w"]
    local = tree_of_arrays()
    expected, _ = tx.update(jax.grad(tree_loss)(local), tx.init(local), local)
    np.testing.assert_allclose(updates["head"]["w"], expected["head"]["w"], rtol=1e-5, atol=1e-6)


def test_zeros_made_outside_jit_have_the_sharding_of_their_leaf():
    params = sharded(tree_of_arrays())
    tx = fo.freezable(optax.sgd(0.1), "encoder")
    updates, _ = tx.update(params, tx.init(params), params)
    expected = params["encoder"]["w"].sharding
    assert updates["encoder"]["w"].sharding.is_equivalent_to(expected, 2)


def test_inside_shard_map():
    params, tx = tree_of_arrays(), fo.freezable(optax.adam(0.1), "encoder")
    state = tx.init(params)

    def step(params, state, scale):
        grads = fo.grad(lambda p: tree_loss(p) * scale[0], frozen=state)(params)
        grads = jax.lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    replicated, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        step, mesh=mesh(), in_specs=(replicated, replicated, split), out_specs=replicated
    )
    new, new_state = jax.jit(mapped)(params, state, jnp.ones(8))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    fo.testing.assert_frozen(params, new, "encoder")
    grads = jax.grad(tree_loss)(params)
    expected, _ = optax.adam(0.1).update(grads["head"], optax.adam(0.1).init(params["head"]))
    np.testing.assert_allclose(new["head"]["w"], 1.0 + expected["w"], rtol=1e-5)


def test_vmap_over_an_ensemble():
    tx = fo.freezable(optax.adam(0.1), "encoder")
    ensemble = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree_of_arrays())

    def step(params):
        state = tx.init(params)
        updates, _ = tx.update(fo.grad(tree_loss, frozen=state)(params), state, params)
        return fo.apply_updates(params, updates, frozen=state)

    new = jax.vmap(step)(ensemble)
    for i in range(2):
        expected = step(jax.tree.map(lambda x, i=i: x[i], ensemble))
        np.testing.assert_allclose(new["head"]["w"][i], expected["head"]["w"], rtol=1e-6, atol=1e-6)
