"""What a plan takes for a tree of its params, and what it remembers of those it saw."""

import dataclasses
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._state.plan import Plan
from freeze_optax._tree.leaves import Leaves

PARAMS = {"a": jnp.ones(2), "embed": jnp.ones((5, 2)), "z": jnp.ones((7, 2))}


@pytest.mark.parametrize(("path", "rows"), [("embed", 5), ("z", 7)])
def test_an_error_names_the_leaf_where_another_has_none_for_a_gradient(path, rows):
    tx = fo.freezable(optax.adam(0.1), fo.path("a") | fo.rows("embed", [0]) | fo.rows("z", [0]))
    grads = {**PARAMS, "a": None, path: jnp.ones((3, 2))}
    message = f"'{path}' is of shape (3, 2), but the optimizer state is for all {rows} rows"
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(grads, tx.init(PARAMS), PARAMS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counted:
    w: jax.Array
    step: int = dataclasses.field(metadata={"static": True})


def test_params_whose_static_field_changes_at_each_step_are_known_without_end():
    tx = fo.freezable(optax.sgd(0.1))
    state = tx.init(Counted(jnp.ones(2), 0))
    kept = []
    for step in range(40):
        params = Counted(jnp.ones(2), step)
        updates, state = tx.update(params, state, params)
        assert updates.step == step
        kept.append(len(state.plan.context.treedefs))
    assert max(kept) < 10
    assert kept[20:] == kept[19:-1]


def test_a_container_that_was_seen_once_is_known_until_seven_others_have_been():
    state = fo.freezable(optax.sgd(0.1)).init(Counted(jnp.ones(2), 0))
    seen = [Leaves(Counted(jnp.ones(2), step)) for step in range(20)]
    for i, leaves in enumerate(seen):
        state.plan.flags(leaves, "params")
        known = [j for j in range(20) if state.plan.knows_structure(seen[j])]
        assert known == [0, *range(max(1, i - 6), i + 1)]


def unpickled(tx):
    return pickle.loads(pickle.dumps(tx.init(PARAMS)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("with_params", [True, False])
def test_an_unpickled_state_takes_none_for_the_gradient_of_a_frozen_leaf(with_params):
    tx = fo.freezable(optax.adam(0.1), "a")
    grads = {**PARAMS, "a": None}
    params = PARAMS if with_params else None
    updates, state = tx.update(grads, unpickled(tx), params)
    bare, own = optax.adam(0.1), {"embed": PARAMS["embed"], "z": PARAMS["z"]}
    expected, _ = bare.update(own, bare.init(own))
    for path, update in expected.items():
        np.testing.assert_array_equal(updates[path], update)
    thawed = fo.thaw(state, PARAMS, "a")
    assert not any(jax.tree.leaves(fo.mask(thawed, PARAMS)))


def test_an_update_that_raises_gives_an_unpickled_state_nothing():
    tx = fo.freezable(optax.adam(0.1), "a")
    state = unpickled(tx)
    with pytest.raises(ValueError, match="no gradient at 'z'"):
        tx.update({**PARAMS, "z": None}, state, PARAMS)
    with pytest.raises(ValueError, match="was unpickled"):
        fo.thaw(state, PARAMS, "a")


@pytest.mark.usefixtures("standard_promotion")
def test_an_unpickled_state_takes_its_transformation_from_a_trace_unless_it_holds_tracers():
    def make(learning_rate):
        return fo.freezable(optax.sgd(learning_rate, momentum=0.9), "a")

    for tx, can_edit in [(make(0.1), True), (optax.inject_hyperparams(make)(0.1), False)]:
        _, state = jax.jit(tx.update)(PARAMS, unpickled(tx), PARAMS)
        if can_edit:
            assert not any(jax.tree.leaves(fo.mask(fo.thaw(state, PARAMS, "a"), PARAMS)))
        else:
            with pytest.raises(ValueError, match=r"was unpickled.*outside of jit"):
                fo.thaw(state, PARAMS, "a")
            _, state = tx.update(PARAMS, state, PARAMS)
            assert not any(jax.tree.leaves(fo.mask(fo.thaw(state, PARAMS, "a"), PARAMS)))


def test_what_an_unknown_plan_was_asked_is_forgotten_once_it_is_known():
    state = fo.freezable(optax.adam(0.1), ("a", fo.rows("z", [0]))).init(PARAMS)
    known, unknown = fo.freeze(state, PARAMS, "embed", keep_state=True).plan, Plan.unknown()
    assert (unknown.live, unknown.parked, unknown.mask) == ([], frozenset(), ())
    assert unknown == known
    assert (unknown.live, unknown.parked, unknown.mask) == (known.live, known.parked, known.mask)
    assert known.parked
    assert known.live == [0]


def test_a_plan_is_equal_to_itself_and_to_no_other_thing():
    plan = fo.freezable(optax.adam(0.1), "a").init(PARAMS).plan
    assert plan == plan
    assert plan != "a"
    assert Plan.unknown() != ()


def test_a_plan_says_how_many_leaves_are_frozen_in_part_and_parked():
    state = fo.freezable(optax.adam(0.1), "a").init(PARAMS)
    assert repr(state.plan) == "Plan(1 of 3 leaves frozen)"
    state = fo.freeze(state, PARAMS, fo.rows("z", [0]))
    assert repr(state.plan) == "Plan(1 of 3 leaves frozen, 1 in part)"
    state = fo.freeze(state, PARAMS, "embed", keep_state=True)
    assert repr(state.plan) == "Plan(2 of 3 leaves frozen, 1 in part, 1 of them parked)"


def test_what_is_known_of_rows_that_were_frozen_once_is_forgotten():
    tree = {"w": jnp.ones((16, 2))}
    state = fo.freezable(optax.adam(0.1)).init(tree)
    counts = []
    for row in range(14):
        state = fo.set_frozen(state, tree, fo.rows("w", [row]))
        counts.append(len(state.plan.context._layouts))
    assert max(counts) == counts[-1] == counts[-5]
