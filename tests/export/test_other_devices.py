"""A state that was exported on some devices is imported on those of the params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import freeze_optax as fo
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {
    "encoder": jnp.linspace(-1.0, 1.0, 128).reshape(16, 8),
    "head": jnp.linspace(-2.0, 2.0, 128).reshape(16, 8),
}
ADAM = optax.adam(0.1)
# Around a `freezable`, the count of the schedule is beside its state.
TRANSFORMATIONS = {
    "a whole leaf": fo.freezable(ADAM, "encoder"),
    "rows": fo.freezable(ADAM, fo.rows("encoder", range(8))),
    "too few rows for the mesh": fo.freezable(ADAM, fo.rows("encoder", range(13))),
    "a schedule around it": optax.chain(
        fo.freezable(ADAM, "encoder"), optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 9))
    ),
    "norms": fo.freezable(fo.measured(ADAM), "encoder"),
    "factors": fo.freezable(optax.chain(ADAM, fo.rates({"head": 0.5})), "encoder"),
}


def on_mesh(kind, count, tree):
    mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=jax.devices()[:count])
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("x")))


def stepped(tx, params, state):
    grads = jax.tree.map(lambda x: x * 0.5, params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    return updates, state


HOMES = {
    "Auto": lambda: on_mesh(AxisType.Auto, 4, PARAMS),
    "Explicit": lambda: on_mesh(AxisType.Explicit, 4, PARAMS),
    "one device": lambda: jax.device_put(PARAMS, SingleDeviceSharding(jax.devices()[1])),
    "no device in particular": lambda: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), PARAMS),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_state_is_the_same_and_goes_on_on_the_devices_of_the_params(name, home, kind):
    tx, old = TRANSFORMATIONS[name], on_mesh(kind, 8, PARAMS)
    _, state = stepped(tx, old, tx.init(old))
    state = fo.thaw(state, old, "encoder")
    _, state = stepped(tx, old, state)
    assert any(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))

    new = HOMES[home]()
    devices = new["head"].sharding.device_set
    imported = fo.import_state(tx, new, fo.export_state(state))
    assert_same_bits(imported, state)
    for x in jax.tree.leaves(imported):
        assert x.sharding.device_set == devices or not x.committed
    expected, _ = stepped(tx, old, state)
    updates, after = stepped(tx, new, imported)
    # XLA fuses the programs of other devices otherwise, which rounds the last bit otherwise.
    for ours, theirs in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert {d for x in jax.tree.leaves(after) for d in x.sharding.device_set} == devices


def test_statistics_of_rows_are_sharded_as_their_leaf_where_the_mesh_divides_them():
    tx, old = TRANSFORMATIONS["rows"], on_mesh(AxisType.Auto, 8, PARAMS)
    new = on_mesh(AxisType.Auto, 4, PARAMS)
    exported = fo.export_state(stepped(tx, old, tx.init(old))[1])
    moments = optax.tree_utils.tree_get(fo.import_state(tx, new, exported), "mu")
    (rows,) = jax.tree.leaves(moments["encoder"])
    assert rows.shape == (8, 8)
    assert rows.sharding.spec == PartitionSpec("x")
