"""A state that was exported on some devices is imported on those of the params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import freeze_optax as fo
from tests.support.memories import assert_same_bits
from tests.support.sampling import cases

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
    "a noise with a key": fo.freezable(
        optax.chain(optax.add_noise(0.0, 0.5, jax.random.key(0)), ADAM), "encoder"
    ),
    "one vector of all leaves": fo.freezable(optax.flatten(ADAM)),
    "factors": fo.freezable(optax.chain(ADAM, fo.rates({"head": 0.5})), "encoder"),
}


def on_mesh(kind, count, tree, reverse=False):
    devices = jax.devices()[:count][:: -1 if reverse else 1]
    mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=devices)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("x")))


def stepped(tx, params, state):
    grads = jax.tree.map(lambda x: x * 0.5, params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    return updates, state


HOMES = {
    "Auto": lambda: on_mesh(AxisType.Auto, 4, PARAMS),
    "Explicit": lambda: on_mesh(AxisType.Explicit, 4, PARAMS),
    "one device": lambda: jax.device_put(PARAMS, SingleDeviceSharding(jax.devices()[1])),
    "the same devices in another order": lambda: on_mesh(AxisType.Auto, 8, PARAMS, reverse=True),
}


KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
MOVES = {
    f"{name}-{home}-{kind}": (name, home, KINDS[kind])
    for name in TRANSFORMATIONS
    for home in HOMES
    for kind in KINDS
}
# Each state on one way, of which no two in a row are the same, and rows on all ways.
ALWAYS = {*list(MOVES)[:: len(HOMES) * len(KINDS) + 1], *(x for x in MOVES if x.startswith("rows"))}


@pytest.mark.parametrize(("name", "home", "kind"), cases(MOVES, ALWAYS))
def test_a_state_is_the_same_and_goes_on_on_the_devices_of_the_params(name, home, kind):
    tx, old = TRANSFORMATIONS[name], on_mesh(kind, 8, PARAMS)
    _, state = stepped(tx, old, tx.init(old))
    if name != "one vector of all leaves":
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spec",
    [fo.rows("encoder", range(8)), fo.elements("encoder", np.eye(16, 8, dtype=bool))],
    ids=["rows", "elements"],
)
def test_moments_of_a_part_that_were_stored_by_numpy_go_where_init_makes_them(spec, kind):
    params, tx = on_mesh(KINDS[kind], 8, PARAMS), fo.freezable(ADAM, spec)
    made = tx.init(params)
    imported = fo.import_state(tx, params, jax.device_get(fo.export_state(made)))
    for path in ("encoder", "head"):
        for a, b in zip(
            *(jax.tree.leaves(s.inner[0].mu[path]) for s in (imported, made)), strict=True
        ):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
    update = jax.jit(tx.update)
    update(params, made, params)
    update(params, imported, params)
    assert update._cache_size() == 1


def uncommitted(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def with_shardings(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.parametrize("name", ["a whole leaf", "rows", "a noise with a key"])
@pytest.mark.parametrize("form", [uncommitted, jax.device_get, with_shardings])
def test_beside_params_that_are_on_no_device_arrays_stay_where_the_export_has_them(form, name):
    tx, old = TRANSFORMATIONS[name], on_mesh(AxisType.Auto, 8, PARAMS)
    _, state = stepped(tx, old, tx.init(old))
    imported = fo.import_state(tx, form(old), fo.export_state(state))
    assert_same_bits(imported, state)
    for x, before in zip(*map(jax.tree.leaves, (imported, state)), strict=True):
        assert x.sharding == before.sharding


@pytest.mark.parametrize("home", ["Auto", "Explicit", "one device"])
def test_parked_moments_stay_in_host_memory_on_the_devices_of_the_params(home):
    tx, old, new = fo.freezable(ADAM), on_mesh(AxisType.Auto, 8, PARAMS), HOMES[home]()
    state = fo.freeze(tx.init(old), old, "encoder", keep_state=True)
    exported = fo.export_state(fo.place_state(state))
    moments = optax.tree_utils.tree_get(fo.import_state(tx, new, exported), "mu")
    kinds = {name: x.sharding.memory_kind for name, x in moments.items()}
    assert kinds == {"encoder": "pinned_host", "head": "device"}
    for x in moments.values():
        assert x.sharding.device_set == new["head"].sharding.device_set


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_moments_of_rows_go_to_the_host_memory_that_their_param_is_in(kind):
    tx, old = TRANSFORMATIONS["rows"], on_mesh(AxisType.Auto, 8, PARAMS)
    exported = fo.export_state(stepped(tx, old, tx.init(old))[1])
    hosted = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")),
        on_mesh(kind, 4, PARAMS),
    )
    moments = optax.tree_utils.tree_get(fo.import_state(tx, hosted, exported), "mu")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(moments)} == {"pinned_host"}


def test_sums_beside_the_state_are_sharded_as_the_params_of_their_names():
    tx = optax.MultiSteps(fo.freezable(ADAM, "encoder"), 2)
    old, new = on_mesh(AxisType.Auto, 8, PARAMS), on_mesh(AxisType.Auto, 4, PARAMS)
    _, state = stepped(tx, old, tx.init(old))
    imported = fo.import_state(tx, new, fo.export_state(state))
    assert_same_bits(imported, state)
    for name, x in imported.acc_grads.items():
        assert x.sharding == new[name].sharding


def test_the_export_of_an_abstract_state_has_the_shardings_of_the_state():
    params = on_mesh(AxisType.Auto, 8, {**PARAMS, "half": PARAMS["head"].astype(jnp.bfloat16)})
    state = TRANSFORMATIONS["a noise with a key"].init(params)
    exported = fo.export_state(with_shardings(state))
    expected = fo.export_state(state)
    assert (exported["about"] == expected["about"]).all()
    for number, x in expected["leaves"].items():
        found = exported["leaves"][number]
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert found.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_beside_the_state_a_shape_or_a_sharding_of_its_own_counts_more_than_a_name():
    tx = TRANSFORMATIONS["a whole leaf"]
    old, new = on_mesh(AxisType.Auto, 8, PARAMS), on_mesh(AxisType.Auto, 4, PARAMS)
    beside = {"column": {"head": old["head"][:, 0]}, "average": {"head": old["head"]}}
    exported = fo.export_state({"state": tx.init(old), **beside})
    mesh = new["head"].sharding.mesh
    across = NamedSharding(mesh, PartitionSpec(None, "x"))
    like = {
        "state": tx.init(new),
        "column": {"head": jax.ShapeDtypeStruct((16,), jnp.float32)},
        "average": {"head": jax.device_put(jnp.zeros((16, 8)), across)},
    }
    imported = fo.import_state(like, new, exported)
    assert_same_bits({name: imported[name] for name in beside}, beside)
    assert imported["column"]["head"].sharding == NamedSharding(mesh, PartitionSpec())
    assert imported["average"]["head"].sharding == across
