"""Runs that Orbax stores and restores: exports, states as they are, and a target of another plan.

`test_orbax_v1` has the same for Orbax's newer API.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.memories import assert_same_bits

VERSION = tuple(int(x) for x in ocp.__version__.split(".")[:3])

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Orbax warns of its own defaults.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(VERSION < (0, 11, 33), reason="StandardRestore checks less before 0.11.33"),
]

ARGS = {
    "StandardSave": (ocp.args.StandardSave, ocp.args.StandardRestore),
    "PyTreeSave": (ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
}
EACH_API = pytest.mark.parametrize("api", ARGS)

NOISE = optax.add_noise(0.01, 0.5, jax.random.key(1))  # a typed key in the state
TX = fo.freezable(optax.chain(NOISE, optax.adam(0.1)), "encoder")
OLD_ROWS = fo.rows("embed", [0, 1, 2, 3, 4, 5, 6, 7])


def make_params() -> Any:
    draw = np.random.default_rng(0).normal
    return {
        "embed": jnp.asarray(draw(size=(16, 8)), jnp.float32),
        "encoder": {name: jnp.asarray(draw(size=(8, 8)), jnp.float32) for name in "ab"},
        "head": jnp.asarray(draw(size=(8, 8)), jnp.float32),
    }


@jax.jit
def step(tree: Any) -> Any:
    grads = jax.tree.map(jnp.sin, tree["params"])
    updates, state = TX.update(grads, tree["state"], tree["params"])
    return {"params": fo.apply_updates(tree["params"], updates, frozen=state), "state": state}


def edited(params: Any) -> Any:
    """A state with a hole, a second cohort, and a leaf in parts of which one is parked."""
    state = fo.freeze(TX.init(params), params, OLD_ROWS, keep_state=True)
    return fo.thaw(state, params, "encoder/a")


@functools.cache
def runs() -> list[Any]:
    """The params and the state of one run after each step, the last edit after the second."""
    tree = {"params": make_params(), "state": edited(make_params())}
    trees = [tree := step(tree) for _ in range(5)]
    assert len({tuple(np.asarray(x["state"].ages[0])) for x in trees}) == len(trees)
    return trees


def target() -> Any:
    return jax.eval_shape(lambda p: {"params": p, "state": edited(p)}, make_params())


def plan_text(state: Any) -> str:
    """The plan of a state as text, as docs/how-to/orbax.md stores it beside the state."""
    return bytes(fo.export_state(state)["about"]).decode()


def as_export(tree: Any) -> Any:
    return {**tree, "state": fo.export_state(tree["state"])}


def from_export(tree: Any) -> Any:
    params = jax.tree.map(jnp.asarray, tree["params"])
    return {"params": params, "state": fo.import_state(TX, params, tree["state"])}


def same(tree: Any) -> Any:
    return tree


# How a tree is made for the file, and made again; and the target that a restore takes.
FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], list[Any]]]] = {
    "an export": (as_export, from_export, list),
    "as it is": (same, same, lambda: [target()]),
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)


@EACH_API
@EACH_FORM
def test_a_run_goes_on_bitwise_from_the_last_of_the_checkpoints_kept(form, api, tmp_path):
    save, restore = ARGS[api]
    stored, made_again, targets = FORMS[form]
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for i, tree in enumerate(runs()[:3]):
            manager.save(i, args=save(stored(tree)))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        assert manager.all_steps() == [1, 2]
        tree = made_again(manager.restore(manager.latest_step(), args=restore(*targets())))
    assert_same_bits(tree, runs()[2])
    for expected in runs()[3:]:
        tree = step(tree)
        assert_same_bits(tree, expected)


def test_items_are_restored_one_by_one_with_the_text_of_the_plan_beside_the_state(tmp_path):
    args, tree = ocp.args, runs()[2]
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        params, state = map(args.StandardSave, (tree["params"], tree["state"]))
        plan = args.JsonSave({"text": plan_text(tree["state"])})
        manager.save(2, args=args.Composite(params=params, state=state, plan=plan))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        wanted = args.Composite(params=args.StandardRestore(target()["params"]))
        alone = manager.restore(2, args=wanted)
        assert set(alone.keys()) == {"params"}
        assert_same_bits(alone.params, tree["params"])
        wanted = args.Composite(
            state=args.StandardRestore(target()["state"]), plan=args.JsonRestore()
        )
        restored = manager.restore(2, args=wanted)
    assert_same_bits(restored.state, tree["state"])
    assert restored.plan["text"] == plan_text(restored.state)


def train_state(tree: Any) -> TrainState:
    state = TrainState.create(apply_fn=None, params=tree["params"], tx=TX)
    return state.replace(opt_state=tree["state"], step=jnp.asarray(3))


def test_a_train_state_comes_back_as_an_export_and_as_it_is(tmp_path):
    stored = train_state(runs()[2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "export", fo.export_state(stored))
        checkpointer.save(tmp_path / "state", stored)
        checkpointer.wait_until_finished()
        like = train_state(jax.eval_shape(lambda: runs()[0]))
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: stored))
        exported = checkpointer.restore(tmp_path / "export")
    assert_same_bits(restored, stored)
    assert_same_bits(fo.import_state(like, stored.params, exported), stored)


@pytest.mark.parametrize("api", ["manager", "AsyncCheckpointer"])
def test_an_edit_and_donated_steps_after_save_do_not_change_what_is_stored(api, tmp_path):
    tx = fo.freezable(optax.adam(0.1), "base")

    @functools.partial(jax.jit, donate_argnums=0)
    def next_tree(tree: Any) -> Any:
        updates, state = tx.update(tree["params"], tree["state"], tree["params"])
        return {"params": optax.apply_updates(tree["params"], updates), "state": state}

    def begun() -> Any:
        # Large enough that the save goes on while the next steps run.
        params = {"base": jnp.ones(8), "w": jnp.linspace(-1.0, 1.0, 1 << 20)}
        return next_tree({"params": params, "state": tx.init(params)})

    tree, path = begun(), tmp_path / "run"
    target = jax.eval_shape(begun)
    saver: Any = (
        ocp.CheckpointManager(path)
        if api == "manager"
        else ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    )
    with saver:
        where = 0 if api == "manager" else path
        saver.save(where, args=ocp.args.StandardSave(tree))
        tree = next_tree(tree)
        tree["state"] = fo.thaw(tree["state"], tree["params"], "base")
        tree["state"] = fo.freeze(tree["state"], tree["params"], "w")
        jax.block_until_ready(next_tree(tree))
        saver.wait_until_finished()
        restored = saver.restore(where, args=ocp.args.StandardRestore(target))
    assert_same_bits(restored, begun())


@EACH_API
def test_the_params_alone_come_out_of_a_checkpoint_of_params_and_state(api, tmp_path):
    save, restore = ARGS[api]
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(2, args=save(runs()[2]))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        alone = {"params": target()["params"]}
        placeholders = jax.tree.map(lambda _: ocp.PLACEHOLDER, target()["state"])
        for wanted, options in [
            (alone, {"partial_restore": True}),
            ({**alone, "state": placeholders}, {}),
        ]:
            args = ocp.checkpoint_utils.construct_restore_args(wanted)
            wanted_args = ocp.args.PyTreeRestore(wanted, restore_args=args, **options)
            restored = manager.restore(2, args=wanted_args)
            assert_same_bits(restored["params"], runs()[2]["params"])
    with (
        ocp.CheckpointManager(tmp_path / "run") as manager,
        pytest.raises(ValueError, match="do not match:\nstate:\n    - Source: MISSING"),
    ):
        manager.restore(2, args=restore(alone))


def test_the_trainable_leaves_alone_make_the_params_of_the_run_with_the_base(tmp_path):
    tree = runs()[2]
    with ocp.StandardCheckpointer() as checkpointer:
        trainable, _ = fo.partition(tree["params"], tree["state"])
        checkpointer.save(tmp_path / "trainable", trainable)
        checkpointer.wait_until_finished()
        # The base is that of before the training.
        like, rest = fo.partition(make_params(), edited(make_params()))
        restored = checkpointer.restore(tmp_path / "trainable", jax.eval_shape(lambda: like))
    assert "'b'" not in str(jax.tree.leaves_with_path(restored))
    assert_same_bits(fo.merge(restored, rest), tree["params"])


def on_mesh(kind: AxisType, shape: tuple[int, int], tree: Any) -> Any:
    """The tree on a mesh of the first devices; each of them has scalars and counters whole."""
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(kind, kind), devices=devices)
    specs = [PartitionSpec(), PartitionSpec(), PartitionSpec("x", "y")]
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])), tree)


EACH_KIND = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@EACH_KIND
def test_a_run_goes_on_bitwise_on_other_devices_with_the_shardings_of_the_target(kind, tmp_path):
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, on_mesh(kind, (2, 2), runs()[0]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", on_mesh(kind, (4, 2), runs()[2]))
        checkpointer.wait_until_finished()
        tree = checkpointer.restore(tmp_path / "run", wanted)
    assert_same_bits(tree, runs()[2])
    for x, asked in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(asked.sharding, x.ndim)
    assert_same_bits(step(tree), step(on_mesh(kind, (2, 2), runs()[2])))


@EACH_KIND
def test_an_export_read_as_numpy_arrays_goes_on_bitwise_on_other_devices(kind, tmp_path):
    exported = as_export(on_mesh(kind, (4, 2), runs()[2]))["state"]
    params = on_mesh(kind, (2, 2), runs()[2]["params"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", exported)
        checkpointer.wait_until_finished()
        about = checkpointer.metadata(tmp_path / "run").item_metadata.tree
        wanted = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), about)
        read = checkpointer.restore(tmp_path / "run", wanted)
    assert {type(x) for x in jax.tree.leaves(read)} == {np.ndarray}
    tree = {"params": params, "state": fo.import_state(TX, params, read)}
    assert_same_bits(tree["state"], runs()[2]["state"])
    assert_same_bits(step(tree), step(on_mesh(kind, (2, 2), runs()[2])))
