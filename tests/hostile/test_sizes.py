"""Trees of very many leaves, of one and of none, and arrays without elements."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
ODD = "w*[13579]"


# A hundred thousand leaves.


@pytest.fixture(scope="module")
def vast() -> dict[str, Any]:
    return {f"w{i}": np.full(1, i, np.float32) for i in range(100_000)}


@pytest.mark.exhaustive
def test_a_hundred_thousand_leaves_are_selected_split_and_merged(vast):
    expected = {name: name[-1] in "13579" for name in vast}
    assert fo.mask(ODD, vast) == expected
    assert fo.mask(fo.layers("w*")[-1], vast) == {name: name == "w99999" for name in vast}
    trainable, rest = fo.partition(vast, ODD)
    merged = fo.merge(trainable, rest)
    assert all(merged[name] is leaf for name, leaf in vast.items())
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(rest)) == 50_000


@pytest.mark.exhaustive
def test_a_hundred_thousand_leaves_are_trained_and_edited(vast):
    tx = fo.freezable(optax.sgd(0.5), "w*[!0]")
    still = {name: leaf for name, leaf in vast.items() if name[-1] != "0"}
    state = tx.init(vast)
    updates, state = tx.update({**vast, **dict.fromkeys(still, HOLE)}, state, vast)
    moved = fo.apply_updates(vast, updates, state)
    assert all(moved[name] is leaf for name, leaf in still.items())
    assert all(moved[name] == leaf / 2 for name, leaf in vast.items() if name not in still)
    state = fo.set_frozen(state, vast, "w5*")
    assert fo.mask(state, vast) == {name: name[1] == "5" for name in vast}


@pytest.mark.exhaustive
def test_a_hundred_thousand_leaves_are_summed_up(vast):
    summary = fo.summary(vast, "w5*")
    assert (summary.total, summary.frozen) == (100_000, 11_111)
    assert str(summary).endswith("\ntrainable: 88,889 of 100,000 parameters (88.89%)")


# One leaf, and none.


@pytest.mark.parametrize("leaf", [jnp.ones((2, 3)), jnp.ones(()), np.ones(2, np.float32), 1.5])
def test_one_leaf_that_is_the_whole_tree_trains_as_the_bare_optimizer_does(leaf):
    bare, tx = optax.adam(0.1), fo.freezable(optax.adam(0.1))
    updates, after = tx.update(leaf, tx.init(leaf), leaf)
    expected, inner = bare.update(leaf, bare.init(leaf), leaf)
    np.testing.assert_array_equal(updates, expected)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(inner), strict=True):
        np.testing.assert_array_equal(new, old)
    parked = fo.freeze(after, leaf, True, keep_state=True)
    assert fo.mask(parked, leaf) is True
    assert fo.apply_updates(leaf, updates, parked) is leaf
    np.testing.assert_array_equal(tx.update(leaf, parked, leaf)[0], jnp.zeros(np.shape(leaf)))
    back = fo.import_state(tx, leaf, fo.export_state(fo.thaw(parked, leaf, "*")))
    assert jax.tree.structure(back) == jax.tree.structure(after)
    assert jax.tree.structure(fo.release(back, leaf)) == jax.tree.structure(inner)
    np.testing.assert_array_equal(fo.assign(leaf, {"": 7.0}), np.full(np.shape(leaf), 7.0))
    assert fo.merge(*fo.partition(leaf, True)) is leaf
    assert [row.path for row in fo.summary(leaf).rows] == [""]
    assert "(the params)" in str(fo.summary(leaf))


EMPTY = [{}, [], (), {"a": None}, {"a": {}}, [[], {}], {"a": optax.MaskedNode()}]


@pytest.mark.parametrize("tree", EMPTY, ids=str)
def test_a_tree_without_leaves_is_itself_wherever_a_tree_is_given_back(tree):
    assert fo.mask(fo.everything, tree) == tree
    assert fo.mask(tree, tree) == tree
    assert fo.labels(~fo.nothing, tree) == tree
    assert fo.partition(tree, True) == (tree, tree)
    assert fo.merge(tree, tree) == tree
    assert fo.hold(tree, tree, True) == tree
    assert fo.apply_updates(tree, tree) == tree
    assert fo.assign(tree, {}) == tree
    assert fo.grad(lambda tree: 1.0, True)(tree) == tree
    assert fo.value_and_grad(lambda tree: 1.0, False, holes=True)(tree) == (1.0, tree)
    assert fo.tied_paths(tree) == []
    fo.testing.assert_frozen(tree, tree, True)
    fo.Phases({0: True}).validate(tree)


@pytest.mark.parametrize("tree", EMPTY, ids=str)
def test_a_tree_without_leaves_is_optimized_with_a_warning(tree):
    tx, bare = fo.freezable(optax.adam(0.1)), optax.adam(0.1)
    with pytest.warns(UserWarning, match="nothing is left to train"):
        state = tx.init(tree)
    assert state.inner == bare.init(tree)
    updates, after = tx.update(tree, state, tree)
    assert updates == tree
    assert after.inner[0].count == 1
    assert fo.thaw(state, tree, True) is state
    assert fo.set_frozen(state, tree, []) is state
    assert fo.release(state, tree) == bare.init(tree)
    back = fo.import_state(tx, tree, fo.export_state(after))
    assert jax.tree.structure(back) == jax.tree.structure(after)


@pytest.mark.parametrize("tree", EMPTY, ids=str)
def test_a_tree_without_leaves_goes_through_phases(tree):
    tx = fo.scheduled(optax.adam(0.1), fo.Phases({0: True, 1: False}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = tx.init(tree)
    updates, state = tx.update(tree, state, tree)
    assert updates == tree
    assert state.step == 1
    assert fo.grad(lambda tree: 1.0, state)(tree) == tree


@pytest.mark.parametrize("tree", EMPTY, ids=str)
def test_the_summary_of_a_tree_without_leaves_says_so_in_every_form(tree):
    summary = fo.summary(tree, True, optax.sgd(0.1, momentum=0.9))
    assert (summary.total, summary.frozen, summary.saved_bytes) == (0, 0, 0)
    line = "trainable: 0 of 0 parameters (0.00%)"
    assert summary.rows == []
    assert str(summary).endswith(line)
    assert summary.to_markdown().endswith(line)
    assert line in summary._repr_html_()


@pytest.mark.parametrize("tree", [*EMPTY[:-1], None], ids=str)
@pytest.mark.parametrize("spec", ["**", fo.layers("*")[:], fo.regex(".*")])
def test_what_has_to_select_something_says_that_there_are_no_leaves(spec, tree):
    with pytest.raises(ValueError, match="the tree has no leaves"):
        fo.mask(spec, tree)


# Arrays without elements.


def test_arrays_without_elements_train_freeze_and_come_back():
    params = {"a": jnp.ones((0, 3)), "b": jnp.ones((2, 0)), "c": jnp.ones(2)}
    tx, bare = fo.freezable(optax.adam(0.1), "a"), optax.adam(0.1)
    alone = {"b": params["b"], "c": params["c"]}
    updates, state = tx.update(params, tx.init(params), params)
    expected, _ = bare.update(alone, bare.init(alone), alone)
    for name in alone:
        np.testing.assert_array_equal(updates[name], expected[name])
    assert (updates["a"].shape, updates["a"].dtype) == ((0, 3), jnp.float32)
    state = fo.set_frozen(state, params, "b")
    back = fo.import_state(tx, params, fo.export_state(state))
    assert [x.shape for x in jax.tree.leaves(back)] == [x.shape for x in jax.tree.leaves(state)]
    assert fo.tied_paths({"a": params["a"], "b": params["a"]}) == []
    assert fo.assign(params, {"a": 1.0})["a"].shape == (0, 3)
    assert fo.mask(fo.rows("a", []), params) == dict.fromkeys("abc", False)
    assert fo.summary(params, "a").total == 2
    fo.testing.assert_frozen(params, {**params, "a": jnp.ones((0, 3))}, "a")
    with pytest.raises(AssertionError, match=r"a: float32\[0, 3\] became float32\[0, 4\]"):
        fo.testing.assert_frozen(params, {**params, "a": jnp.ones((0, 4))}, "a")


@pytest.mark.parametrize("frozen", [True, False])
def test_a_scan_over_no_layers_is_that_of_jax(frozen):
    layers = {"w": jnp.ones((0, 2))}

    def body(carry: Any, layer: Any) -> tuple[Any, Any]:
        return carry + layer["w"].sum(), layer["w"]

    carry, outputs = fo.scan(body, 0.0, layers, frozen)
    assert (carry, outputs.shape) == (0.0, (0, 2))
