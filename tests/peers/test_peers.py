"""What other ways of freezing get wrong, and what this one does.

See docs/explanation/pitfalls.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

MASK = {"encoder": True, "head": False}
LABELS = {"encoder": "frozen", "head": "trainable"}


def params():
    return {"encoder": jnp.full(4, 3.0, jnp.float32), "head": jnp.ones(4)}


def freeze_gradients(mask):
    """`optax.freeze`, which is newer than the oldest optax that we support."""
    return optax.masked(optax.set_to_zero(), mask)


def after_one_step(tx, grads, tree):
    updates, _ = tx.update(grads, tx.init(tree), tree)
    return optax.apply_updates(tree, updates)


def test_zeroed_gradients_still_decay():
    zeros_grads = jax.tree.map(jnp.zeros_like, params())
    today = optax.chain(freeze_gradients(MASK), optax.adamw(0.1, weight_decay=0.1))
    assert (after_one_step(today, zeros_grads, params())["encoder"] < 3.0).all()
    ours = fo.freezable(optax.adamw(0.1, weight_decay=0.1), "encoder")
    fo.testing.assert_frozen(params(), after_one_step(ours, params(), params()), "encoder")


def test_zeroed_gradients_still_move_by_momentum():
    grads, tree = params(), params()
    plain = optax.sgd(0.1, momentum=0.9)
    _, state = plain.update(grads, plain.init(tree))
    # Frozen after one step, by zeroing the gradient from now on.
    updates, _ = plain.update({**grads, "encoder": jnp.zeros(4)}, state)
    assert (updates["encoder"] != 0).all()


def test_zeroed_gradients_keep_state_for_what_is_frozen():
    def nbytes(tx):
        return sum(x.nbytes for x in jax.tree.leaves(tx.init(params())))

    today = optax.chain(freeze_gradients(MASK), optax.adam(0.1))
    assert nbytes(today) == 4 + 4 * 16
    assert nbytes(fo.freezable(optax.adam(0.1), "encoder")) == 4 + 2 * 16


def test_a_typo_freezes_nothing():
    def labels(tree):
        keys = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, tree)
        return jax.tree.map(lambda key: "frozen" if key == "encodr" else "trainable", keys)

    groups = {"frozen": optax.set_to_zero(), "trainable": optax.sgd(0.1)}
    today = optax.partition(groups, labels)
    assert (after_one_step(today, params(), params())["encoder"] != 3.0).all()
    with pytest.raises(ValueError, match="'encodr' selects no leaf; nearest: 'encoder'"):
        fo.freezable(optax.sgd(0.1), "encodr").init(params())


def test_clipping_counts_frozen_gradients():
    grads = {"encoder": jnp.full(4, 1e6, jnp.float32), "head": jnp.full(4, 0.25, jnp.float32)}
    clip = optax.clip_by_global_norm(1.0)
    groups = {"frozen": optax.set_to_zero(), "trainable": optax.identity()}
    today = optax.chain(clip, optax.partition(groups, LABELS))
    updates, _ = today.update(grads, today.init(params()))
    assert (abs(updates["head"]) < 1e-6).all()
    ours = fo.freezable(clip, "encoder")
    updates, _ = ours.update(grads, ours.init(params()))
    np.testing.assert_array_equal(updates["head"], grads["head"])


def test_a_nan_in_a_frozen_gradient_spoils_the_norm():
    grads = {"encoder": jnp.full(4, jnp.nan), "head": jnp.full(4, 0.25, jnp.float32)}
    clip = optax.clip_by_global_norm(1.0)
    today = optax.chain(clip, freeze_gradients(MASK))
    assert jnp.isnan(today.update(grads, today.init(params()))[0]["head"]).all()
    ours = fo.freezable(clip, "encoder")
    assert jnp.isfinite(ours.update(grads, ours.init(params()))[0]["head"]).all()


def test_adding_zero_changes_bits():
    tree = {"encoder": jnp.array([-0.0, 1e-45], jnp.float32), "head": jnp.ones(2)}
    groups = {"frozen": optax.set_to_zero(), "trainable": optax.sgd(0.1)}
    # This is optax.selective_transform, which is newer than the oldest optax that we support.
    today = optax.partition(groups, LABELS)
    with pytest.raises(AssertionError, match=r"encoder: [12] of 2 elements differ"):
        fo.testing.assert_frozen(tree, after_one_step(today, tree, tree), "encoder")
    ours = fo.freezable(optax.sgd(0.1), "encoder")
    updates, state = ours.update(tree, ours.init(tree), tree)
    new = fo.apply_updates(tree, updates, frozen=state)
    assert new["encoder"] is tree["encoder"]


def test_integer_leaves_stop_the_gradient():
    tree = {**params(), "steps": jnp.array(3)}

    def loss(tree):
        return (tree["encoder"] * tree["head"]).sum() * tree["steps"].astype(jnp.float32)

    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(loss)(tree)
    grads = fo.grad(loss, "encoder")(tree)
    np.testing.assert_array_equal(grads["head"], np.full(4, 9.0))


def test_masks_of_two_polarities():
    grads = params()
    trains = optax.masked(optax.scale(10.0), MASK).update(
        grads, optax.masked(optax.scale(10.0), MASK).init(params())
    )[0]
    frozen = freeze_gradients(MASK).update(grads, freeze_gradients(MASK).init(params()))[0]
    # One mask: with the one it makes the encoder train ten times as fast, with the other it
    # freezes it.
    assert (trains["encoder"] == 30.0).all()
    assert (frozen["encoder"] == 0.0).all()
    assert fo.mask(MASK, params()) == MASK
    assert fo.labels(MASK, params()) == LABELS


def moved(tx, grads, tree, steps):
    state = tx.init(tree)
    for _ in range(steps):
        _, state = tx.update(grads, state, tree)
    return state


def test_another_frozen_set_loses_all_moments():
    def partition(labels):
        groups = {"frozen": optax.set_to_zero(), "trainable": optax.adam(0.1)}
        return optax.partition(groups, labels)

    old = moved(partition(LABELS), params(), params(), 3)
    new = partition({"encoder": "trainable", "head": "trainable"})
    with pytest.raises((TypeError, ValueError), match=r"pytree|multiply sequence"):
        new.update(params(), old, params())
    fresh = optax.tree_utils.tree_get(new.init(params()), "mu")
    assert not fresh["head"].any()

    state = moved(fo.freezable(optax.adam(0.1), "encoder"), params(), params(), 3)
    before = optax.tree_utils.tree_get(state, "mu")["head"]
    state = fo.thaw(state, params(), "encoder")
    assert optax.tree_utils.tree_get(state, "mu")["head"] is before


def test_a_shared_count_makes_the_first_update_too_large():
    count = jnp.array(10_000, jnp.int32)
    fresh = optax.adam(0.1).init(params())
    patched = optax.tree_utils.tree_set(fresh, count=count)
    updates, _ = optax.adam(0.1).update(params(), patched)
    np.testing.assert_allclose(updates["head"], np.full(4, -0.316), rtol=1e-2)

    tx = fo.freezable(optax.adam(0.1), "head")
    state = optax.tree_utils.tree_set(tx.init(params()), count=count)
    updates, _ = tx.update(params(), fo.thaw(state, params(), "head"))
    np.testing.assert_allclose(updates["head"], np.full(4, -0.1), rtol=1e-5)
