"""A state as plain arrays, through three checkpointers."""

import functools
import io
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support import former_run

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params() -> dict[str, Any]:
    return {
        "encoder": {"a/b": jnp.ones((2, 3)), "x.y\"z'": jnp.ones(4, jnp.bfloat16)},
        "head": {"w": jnp.ones((3, 2)), "empty": jnp.zeros((0, 2)), "": jnp.ones(())},
    }


INNER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.add_noise(0.01, 0.55, key=jax.random.key(7)),
    optax.adam(optax.cosine_decay_schedule(0.1, 20)),
)


@functools.cache
def transformation() -> optax.GradientTransformation:
    return fo.freezable(INNER, "encoder")


def run(tx: Any, tree: Any, state: Any, steps: int) -> tuple[Any, Any]:
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.3 + i) * x, tree)
        updates, state = jax.jit(tx.update)(grads, state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    return tree, state


@functools.cache
def trained(tx: Any) -> tuple[Any, Any]:
    """A state with three cohorts, one of them parked."""
    tree, state = run(tx, params(), tx.init(params()), 2)
    tree, state = run(tx, tree, fo.thaw(state, tree, "encoder/a/b"), 1)
    tree, state = run(tx, tree, fo.thaw(state, tree, "encoder"), 1)
    return run(tx, tree, fo.freeze(state, tree, "encoder/a/b", keep_state=True), 1)


def through_orbax(exported: Any, folder: Any) -> Any:
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(folder / "exported", exported)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / "exported")


def through_msgpack(exported: Any, _folder: Any) -> Any:
    return flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(exported))


def through_numpy(exported: Any, _folder: Any) -> Any:
    file = io.BytesIO()
    np.savez(file, **flax.traverse_util.flatten_dict(exported, sep="/"))
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


@pytest.mark.parametrize("through", [through_orbax, through_msgpack, through_numpy])
# Orbax warns of its own defaults.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_goes_on_bitwise(through, tmp_path):
    tx = transformation()
    tree, state = trained(tx)
    restored = fo.import_state(tx, tree, through(fo.export_state(state), tmp_path))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    fo.testing.assert_frozen(state, restored, True)
    for edit in (lambda s: s, lambda s: fo.thaw(s, tree, "encoder/a/b")):
        expected, last = run(tx, tree, edit(state), 2)
        new, new_last = run(tx, tree, edit(restored), 2)
        fo.testing.assert_frozen(expected, new, True)
        fo.testing.assert_frozen(last, new_last, True)


def test_it_is_a_nested_dict_of_strings_and_plain_arrays():
    _, state = trained(transformation())
    exported = fo.export_state(state)

    def check(node):
        if isinstance(node, dict):
            assert all(type(key) is str and key.isalnum() for key in node)
            for value in node.values():
                check(value)
        else:
            assert isinstance(node, jax.Array | np.ndarray)
            assert node.dtype.isbuiltin == 1
            assert node.size > 0

    check(exported)
    assert type(exported) is dict
    moments = {id(x) for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))}
    assert moments & {id(x) for x in exported["leaves"].values()}


@pytest.mark.parametrize(
    "dtype",
    [
        *("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"),
        *("int8", "int4", "uint4", "int2", "bool"),
    ],
)
def test_every_dtype_survives(dtype):
    values = jnp.array([0, 1, 1, 0, 1]).astype(dtype)
    inner = optax.GradientTransformation(
        lambda params: {"statistics": params, "counter": values}, lambda u, s, p=None: (u, s)
    )
    tx = fo.freezable(inner)
    state = tx.init({"w": jnp.ones(2)})
    exported = through_numpy(fo.export_state(state), None)
    restored = fo.import_state(tx, {"w": jnp.ones(2)}, exported)
    fo.testing.assert_frozen(state, restored, True)


STORED = {
    "float32": "float32",
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float4_e2m1fn": "uint8",
    "int2": "int8",
    "int4": "int8",
    "uint4": "uint8",
}


@pytest.mark.parametrize(("dtype", "stored"), STORED.items(), ids=STORED)
def test_dtypes_that_numpy_lacks_are_stored_as_their_bits_and_short_integers_as_numbers(
    dtype, stored
):
    values = jnp.array([0, 1, 1, 0, 1]).astype(dtype)
    inner = optax.GradientTransformation(lambda params: values, lambda u, s, p=None: (u, s))
    state = fo.freezable(inner).init({"w": jnp.ones(2)})
    (array,) = fo.export_state(state)["leaves"].values()
    assert array.dtype == stored
    if "int" in dtype:
        assert array.tolist() == [0, 1, 1, 0, 1]


def test_survivors_carry_to_another_frozen_set_and_the_rest_starts_fresh():
    tx = transformation()
    tree, state = trained(tx)
    exported = fo.export_state(state)
    expected = fo.set_frozen(state, tree, "head/w")
    restored = fo.import_state(tx, tree, exported, frozen="head/w")
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    fo.testing.assert_frozen(expected, restored, True)


def test_a_chain_around_it_is_stored_whole():
    tx = optax.chain(optax.trace(0.9), fo.freezable(optax.adam(0.1), "encoder"))
    tree, state = run(tx, params(), tx.init(params()), 2)
    restored = fo.import_state(tx, tree, through_numpy(fo.export_state(state), None))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    fo.testing.assert_frozen(state, restored, True)


def test_a_scheduled_state_goes_on_in_its_phase():
    tx = fo.scheduled(optax.adam(0.1), fo.Phases({0: "encoder", 3: fo.nothing}))
    tree, state = run(tx, params(), tx.init(params()), 2)
    restored = fo.import_state(tx, tree, through_numpy(fo.export_state(state), None))
    expected, _ = run(tx, tree, state, 3)
    new, _ = run(tx, tree, restored, 3)
    fo.testing.assert_frozen(expected, new, True)
    others = fo.scheduled(optax.adam(0.1), fo.Phases({0: "encoder", 4: fo.nothing}))
    with pytest.raises(ValueError, match="of other phases"):
        fo.import_state(others, tree, fo.export_state(state))


def test_statistics_come_back_sharded_as_their_parameters():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    tree = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("data")))}
    tx = fo.freezable(optax.adam(0.1))
    tree, state = run(tx, tree, tx.init(tree), 2)
    restored = fo.import_state(tx, tree, through_numpy(fo.export_state(state), None))
    assert restored.inner[0].mu["w"].sharding.is_equivalent_to(tree["w"].sharding, 2)
    expected, _ = run(tx, tree, state, 1)
    new, _ = run(tx, tree, restored, 1)
    fo.testing.assert_frozen(expected, new, True)


def test_an_export_of_other_params_names_the_paths_of_both():
    tx = fo.freezable(optax.adam(0.1))
    exported = fo.export_state(tx.init({"decoder": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"only in it: 'decoder'; only in the params: 'encoder'"):
        fo.import_state(tx, {"encoder": jnp.ones(2)}, exported)


def test_an_export_of_other_shapes_names_them():
    tx = fo.freezable(optax.adam(0.1))
    exported = fo.export_state(tx.init({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"'inner/0/mu/w' is \(\[2\], 'float32'\), not \(\[3\]"):
        fo.import_state(tx, {"w": jnp.ones(3)}, exported)


def test_an_export_of_another_transformation_names_the_state_of_both():
    tree = {"w": jnp.ones(2)}
    exported = fo.export_state(fo.freezable(optax.adam(0.1)).init(tree))
    with pytest.raises(ValueError, match=r"in the export: .*mu/w.*in the state to be: .*trace/w"):
        fo.import_state(fo.freezable(optax.sgd(0.1, momentum=0.9)), tree, exported)
    with pytest.raises(TypeError, match="holds no FreezeState"):
        fo.import_state(optax.adam(0.1), tree, exported)


def test_two_leaves_that_share_a_path_keep_what_is_theirs():
    tree = {"a/b": jnp.ones(2), "a": {"b": jnp.full(2, 5.0, jnp.float32)}}
    tx = fo.freezable(optax.sgd(0.1, momentum=0.9))
    _, state = tx.update(tree, tx.init(tree), tree)
    restored = fo.import_state(tx, tree, fo.export_state(state))
    momentum = optax.tree_utils.tree_get(restored, "trace")
    np.testing.assert_array_equal(momentum["a/b"], tree["a/b"])
    np.testing.assert_array_equal(momentum["a"]["b"], tree["a"]["b"])


def test_a_rate_set_by_hand_to_a_python_number_is_edited_and_stored():
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = fo.freezable(optax.inject_hyperparams(optax.adam)(learning_rate=0.01), "a")
    state = optax.tree_utils.tree_set(tx.init(tree), learning_rate=0.5)
    restored = fo.import_state(tx, tree, fo.export_state(state))
    rate = optax.tree_utils.tree_get(restored, "learning_rate")
    assert (rate.dtype, float(rate)) == (jnp.float32, 0.5)
    thawed = fo.thaw(state, tree, "a")
    assert optax.tree_utils.tree_get(thawed, "learning_rate") == 0.5


def test_the_state_of_an_optimizer_that_cannot_be_edited_is_read():
    tree = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}
    tx = fo.freezable(optax.flatten(optax.adam(0.1)), "a")
    tree, state = run(tx, tree, tx.init(tree), 2)
    restored = fo.import_state(tx, tree, fo.export_state(state))
    fo.testing.assert_frozen(state, restored, True)


def test_arrays_from_another_device_come_to_where_the_params_are():
    tx, tree = transformation(), jax.device_put(params(), jax.devices()[0])
    _, state = run(tx, tree, tx.init(tree), 1)
    exported = fo.export_state(state)
    elsewhere = {**exported, "leaves": jax.device_put(exported["leaves"], jax.devices()[3])}
    restored = fo.import_state(tx, tree, elsewhere)
    fo.testing.assert_frozen(state, restored, True)
    expected, found = run(tx, tree, state, 1), run(tx, tree, restored, 1)
    fo.testing.assert_frozen(expected, found, True)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 63])
def test_rows_of_any_number_come_back(count):
    tree = {"w": jnp.ones((count + 1, 2))}
    tx = fo.freezable(optax.adam(0.1), fo.rows("w", [0]))
    _, state = run(tx, tree, tx.init(tree), 1)
    restored = fo.import_state(tx, tree, through_numpy(fo.export_state(state), None))
    assert restored.plan == state.plan
    fo.testing.assert_frozen(state, restored, True)


def test_an_export_of_version_0_1_0_is_imported_and_its_run_goes_on():
    with np.load(former_run.DATA / "export_0.1.0.npz") as stored:
        exported = flax.traverse_util.unflatten_dict(dict(stored), sep="/")
    state = fo.import_state(former_run.TX, former_run.params(), exported)
    former_run.check(state)
    own = former_run.state()
    assert jax.tree.structure(state) == jax.tree.structure(own)
    fo.testing.assert_frozen(own, state, True)
    arguments = former_run.gradients(), former_run.params()
    updates, _ = former_run.TX.update(arguments[0], state, arguments[1])
    expected, _ = former_run.TX.update(arguments[0], own, arguments[1])
    fo.testing.assert_frozen(expected, updates, True)
