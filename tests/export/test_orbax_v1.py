"""Orbax's API `experimental.v1`; and what both APIs do if the target has another plan."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import freeze_optax as fo
from tests.export.test_orbax import (
    ARGS,
    EACH_FORM,
    FORMS,
    TX,
    VERSION,
    make_params,
    on_mesh,
    plan_text,
    runs,
    step,
    target,
)
from tests.support.memories import assert_same_bits
from tests.support.sampling import cases

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Orbax warns of its own defaults.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(VERSION < (0, 12), reason="save, load and metadata are of Orbax 0.12"),
]


def saved_at_once(path: Any, tree: Any) -> Any:
    v1.save(path, tree)
    return functools.partial(v1.load, path)


def saved_behind(path: Any, tree: Any) -> Any:
    response = v1.save_async(path, tree)
    assert response.result() is None
    return functools.partial(v1.load, path)


def saved_as_steps(path: Any, tree: Any) -> Any:
    policy = v1.training.preservation_policies.LatestN(2)
    with v1.training.Checkpointer(path, preservation_policy=policy) as checkpointer:
        for i, earlier in enumerate(runs()[:2]):
            checkpointer.save(i, earlier)
        checkpointer.save_async(2, tree)
    checkpointer = v1.training.Checkpointer(path)
    assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [1, 2]
    return functools.partial(checkpointer.load, None)


@pytest.mark.parametrize("saved", [saved_at_once, saved_behind, saved_as_steps])
@EACH_FORM
def test_a_run_goes_on_bitwise(form, saved, tmp_path):
    stored, made_again, targets = FORMS[form]
    tree = made_again(saved(tmp_path / "run", stored(runs()[2]))(*targets()))
    assert_same_bits(tree, runs()[2])
    assert_same_bits(step(tree), runs()[3])


def test_the_metadata_hold_the_text_of_the_plan_and_the_shapes(tmp_path):
    state = runs()[2]["state"]
    v1.save(tmp_path / "run", state, custom_metadata={"plan": plan_text(state)})
    about = v1.metadata(tmp_path / "run")
    assert about.custom_metadata == {"plan": plan_text(state)}
    shapes = [x.shape for x in jax.tree.leaves(about.metadata["ages"])]
    assert shapes == [x.shape for x in state.ages]
    restored = v1.load(tmp_path / "run", target()["state"])
    assert plan_text(restored) == about.custom_metadata["plan"]


def test_the_params_alone_are_loaded_in_three_ways(tmp_path):
    alone, tree = {"params": target()["params"]}, runs()[2]
    v1.save_checkpointables(tmp_path / "apart", tree)
    v1.save(tmp_path / "whole", tree)
    placeholders = jax.tree.map(lambda _: v1.PLACEHOLDER, target()["state"])
    loading = v1.options.PyTreeOptions.Loading(partial_load=True)
    with v1.Context(pytree_options=v1.options.PyTreeOptions(loading=loading)):
        in_part = v1.load(tmp_path / "whole", alone)
    for loaded in (
        v1.load_checkpointables(tmp_path / "apart", alone),
        v1.load(tmp_path / "whole", {**alone, "state": placeholders}),
        in_part,
    ):
        assert_same_bits(loaded["params"], tree["params"])
    with pytest.raises(ValueError, match="do not match:\nstate:\n    - Source: MISSING"):
        v1.load(tmp_path / "whole", alone)


def test_an_edit_and_donated_steps_after_save_do_not_change_what_is_stored(tmp_path):
    tree = jax.tree.map(jnp.copy, runs()[2])
    response = v1.save_async(tmp_path / "run", tree)
    params, state = tree["params"], fo.thaw(tree["state"], tree["params"], "encoder")
    jax.block_until_ready(jax.jit(step, donate_argnums=0)({"params": params, "state": state}))
    response.result()
    assert_same_bits(v1.load(tmp_path / "run", target()), runs()[2])


def test_a_target_with_shardings_places_each_leaf_on_other_devices(tmp_path):
    v1.save(tmp_path / "run", on_mesh(AxisType.Auto, (4, 2), runs()[2]))
    expected = on_mesh(AxisType.Auto, (2, 2), runs()[2])
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
    tree = v1.load(tmp_path / "run", wanted)
    for x, asked in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(asked.sharding, x.ndim)
    assert_same_bits(tree, runs()[2])
    assert_same_bits(step(tree), step(expected))


def test_a_train_state_keeps_the_python_int_of_its_step(tmp_path):
    params, state = runs()[2].values()
    stored = TrainState.create(apply_fn=None, params=params, tx=TX).replace(opt_state=state)
    v1.save(tmp_path / "run", stored)
    # Under eval_shape the step becomes an array, and Orbax looks in vain for its sharding.
    loaded = v1.load(tmp_path / "run", jax.eval_shape(lambda: stored).replace(step=0))
    assert (type(loaded.step), loaded.step) == (int, 0)
    assert_same_bits((loaded.params, loaded.opt_state), (params, state))


def test_each_api_reads_what_the_other_stored(tmp_path):
    tree = runs()[2]
    with ocp.CheckpointManager(tmp_path / "old") as manager:
        manager.save(2, args=ocp.args.StandardSave(tree))
    assert_same_bits(v1.load(tmp_path / "old" / "2", target()), tree)
    with v1.training.Checkpointer(tmp_path / "new") as checkpointer:
        checkpointer.save(2, tree)
    with ocp.CheckpointManager(tmp_path / "new") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target()))
        assert_same_bits(manager.restore(2, args=args)["state"], tree)


# What Orbax does if the plan of the target is not that of the state.
PLAIN = make_params()
ADAM, MOMENTUM = optax.adam(0.1), optax.sgd(0.1, momentum=0.9)


def init(frozen: Any, parked: Any = fo.nothing, inner: Any = ADAM) -> Any:
    state = fo.freezable(inner, frozen).init(PLAIN)
    return fo.freeze(state, PLAIN, parked, keep_state=True)


def thawed(*cohorts: Any) -> Any:
    return functools.reduce(
        lambda state, where: fo.thaw(state, PLAIN, where), cohorts, init([A, B])
    )


def rows(*numbers: int) -> Any:
    # One array: Orbax stops at the first of another shape, and drops the reads that have begun.
    return init(["encoder", "head", fo.rows("embed", list(numbers))], inner=MOMENTUM)


A, B = "encoder/a", "encoder/b"
TAKEN, NONE, SHAPE = "as the target has it", "None for its moments", "arrays of other shapes"
LACKING, OTHER_SHAPE = "Structure mismatch: Target path", "Requested shape"
DIFFERENT = "structures do not match:\nages"
# What was stored, and the target; then what StandardRestore, PyTreeRestore and the newer API do. A
# cohort has counters of its own: leaves that were thawed together, or parked out of a cohort.
PLANS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[str, ...]]] = {
    "frozen in the target": (lambda: init(A), lambda: init([A, B]), (TAKEN, TAKEN, TAKEN)),
    "trains in the target": (lambda: init([A, B]), lambda: init(A), (LACKING, NONE, NONE)),
    "another one frozen": (lambda: init(A), lambda: init(B), (LACKING, NONE, NONE)),
    "another one parked": (lambda: init([], A), lambda: init([], B), (TAKEN, TAKEN, TAKEN)),
    "two cohorts, one": (lambda: init([], A), lambda: init([]), (DIFFERENT,) * 3),
    "one cohort, two": (lambda: init([]), lambda: init([], A), (LACKING, DIFFERENT, DIFFERENT)),
    "a whole cohort parked": (
        lambda: fo.freeze(thawed(A), PLAIN, A, keep_state=True),
        lambda: thawed(A),
        (TAKEN, TAKEN, TAKEN),
    ),
    "parked, without counters": (
        lambda: init([], A, MOMENTUM),
        lambda: init([], inner=MOMENTUM),
        (TAKEN, TAKEN, TAKEN),
    ),
    "other cohorts": (lambda: thawed(A, B), lambda: thawed(B, A), (TAKEN, TAKEN, TAKEN)),
    "other rows": (lambda: rows(0, 1), lambda: rows(2, 3), (TAKEN, TAKEN, TAKEN)),
    "fewer rows": (lambda: rows(0, 1), lambda: rows(2), (OTHER_SHAPE, SHAPE, OTHER_SHAPE)),
    "no arrays": (
        lambda: init(A, inner=optax.sgd(0.1)),
        lambda: init(B, inner=optax.sgd(0.1)),
        (TAKEN, TAKEN, TAKEN),
    ),
}


def numbered(state: Any) -> Any:
    """The state with other values in each array, as after some steps."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten([x + jnp.asarray(i + 1, x.dtype) for i, x in enumerate(leaves)])


def by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path): x for path, x in pairs}


def assert_restored(case: str, expected: str, restore: Callable[[Any], Any]) -> None:
    """Compares the whole of what a restore gives with what was stored, and its plan."""
    stored, wanted = numbered(PLANS[case][0]()), jax.eval_shape(PLANS[case][1])
    if expected not in {TAKEN, NONE, SHAPE}:
        with pytest.raises(ValueError, match=expected):
            restore(wanted)
        return
    restored = restore(wanted)
    assert restored.plan == wanted.plan != stored.plan
    assert plan_text(wanted) != plan_text(stored)
    found, values, asked = map(by_path, (restored, stored, wanted))
    assert_same_bits(found, {path: values.get(path) for path in asked})
    lacks = any(x is None for x in found.values())
    differs = any(
        found[path] is not None and found[path].shape != asked[path].shape for path in asked
    )
    assert (lacks, differs) == (expected == NONE, expected == SHAPE)


APIS = ["StandardRestore", "PyTreeRestore", "v1"]


TARGETS = {f"{case}-{api}": (case, api) for case in PLANS for api in APIS}
# StandardRestore and PyTreeRestore differ in what they do with a lack and with a shape.
ALWAYS = [
    *(x for x in TARGETS if x.endswith("v1")),
    *(f"{case}-{api}" for case in ("another one frozen", "fewer rows") for api in APIS[:2]),
    *(f"{case}-{api}" for case, api in zip(PLANS, APIS[:2] * 6, strict=True)),
]


@pytest.mark.parametrize(("case", "api"), cases(TARGETS, ALWAYS))
def test_onto_a_target_of_another_plan_it_is_an_error_or_the_plan_of_the_target(
    case, api, tmp_path
):
    stored, expected = numbered(PLANS[case][0]()), PLANS[case][2][APIS.index(api)]
    if api == "v1":
        v1.save(tmp_path / "run", stored)
        assert_restored(case, expected, lambda wanted: v1.load(tmp_path / "run", wanted))
        return
    save, restore = ARGS[api.replace("Restore", "Save")]
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=save(stored))
        manager.wait_until_finished()
        assert_restored(case, expected, lambda wanted: manager.restore(0, args=restore(wanted)))


@pytest.mark.parametrize("order", [1, -1])
def test_other_numbers_of_cohorts_are_restored_in_silence_by_pytree_restore(order, tmp_path):
    one, other = [thawed([A, B]), thawed(A, B)][::order]
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", one)
        restored = checkpointer.restore(tmp_path / "state", item=jax.eval_shape(lambda: other))
    assert restored.plan == other.plan != one.plan
    assert_same_bits(restored.ages, one.ages)
    assert restored.ages[0].shape != other.ages[0].shape


def with_shardings(state: Any) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


@pytest.mark.parametrize("as_target", [with_shardings, lambda x: x], ids=["shardings", "arrays"])
@pytest.mark.parametrize("case", ["trains in the target", "another one frozen"])
def test_a_target_with_shardings_gets_none_from_standard_restore_too(case, as_target, tmp_path):
    stored, wanted = numbered(PLANS[case][0]()), PLANS[case][1]()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", stored)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", as_target(wanted))
    assert restored.plan == wanted.plan
    assert plan_text(stored) != plan_text(wanted)
    assert any(x is None for x in by_path(restored).values())
    params = make_params()
    with pytest.raises(ValueError, match=r"None at .* where its plan has statistics"):
        fo.freezable(ADAM).update(params, restored, params)
