"""Factors and counts of `rates` and `since_thaw` through checkpoints: all as it was, every bit."""

import functools
import io
import pickle
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

import freeze_optax as fo
import freeze_optax.linen
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
RULES = {"encoder/a": 0.5, "head": 0.25}
WARMUP = optax.linear_schedule(0.0, 1.0, 8)
INNER = optax.chain(optax.adam(0.1), fo.since_thaw(WARMUP), fo.rates(RULES))
TX = fo.freezable(INNER)


def make_params() -> Any:
    return {
        "encoder": {"a": jnp.ones((4, 2)), "b/c": jnp.ones(2, jnp.bfloat16)},
        "head": jnp.ones(3),
        "steps": jnp.arange(2),
    }


PARAMS = make_params()


def update(state: Any, steps: int = 1) -> Any:
    updates = None
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 1 + i), PARAMS)
        updates, state = TX.update(grads, state, PARAMS)
    return updates, state


@functools.cache
def trained() -> Any:
    """A state with cohorts, a leaf in parts, a parked one, and factors that were adjusted."""
    state = fo.freezable(INNER, fo.rows("encoder/a", [0, 1])).init(PARAMS)
    state = fo.adjust(state, PARAMS, ["encoder/a", "head"], 0.75)
    _, state = update(state, 2)
    _, state = update(fo.thaw(state, PARAMS, fo.rows("encoder/a", [0])))
    state = fo.freeze(state, PARAMS, "head", keep_state=True)
    return fo.adjust(state, PARAMS, "encoder/b/c", 0.0)


def factors(state: Any) -> Any:
    found = optax.tree_utils.tree_get(state, "factors")
    return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def through_orbax(exported: Any, folder: Any) -> Any:
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(folder / "exported", exported)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / "exported")


def through_msgpack(exported: Any, _: Any) -> Any:
    return flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(exported))


def through_numpy(exported: Any, _: Any) -> Any:
    file = io.BytesIO()
    np.savez(file, **flax.traverse_util.flatten_dict(exported, sep="//"))
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return flax.traverse_util.unflatten_dict(dict(arrays), sep="//")


def test_the_state_is_what_the_edits_made_it():
    assert jax.tree.leaves(factors(trained())) == [0.75, 0.5, 0.0, 0.75]
    assert len(trained().ages) == 2  # of Adam, and of since_thaw


@pytest.mark.parametrize("through", [through_orbax, through_msgpack, through_numpy])
def test_an_export_comes_back_with_every_factor_and_count(through, tmp_path):
    exported = through(fo.export_state(trained()), tmp_path)
    # Other rules than those of the run: what was exported counts.
    other = fo.freezable(optax.chain(optax.adam(0.1), fo.since_thaw(WARMUP), fo.rates({"head": 9})))
    for tx in (TX, other):
        restored = fo.import_state(tx, PARAMS, exported)
        assert_same_bits(restored, trained())
        assert_same_bits(update(restored), update(trained()))
    edits = [lambda s: fo.thaw(s, PARAMS, "head"), lambda s: fo.adjust(s, PARAMS, "head", 0.125)]
    for edit in edits:
        assert_same_bits(edit(fo.import_state(TX, PARAMS, exported)), edit(trained()))


def test_on_the_way_to_another_set_parked_factors_come_back_and_fresh_leaves_get_their_rule():
    exported = fo.export_state(fo.freeze(trained(), PARAMS, "encoder/b/c"))
    moved = fo.import_state(TX, PARAMS, exported, frozen="encoder/a")
    assert_same_bits(
        moved, fo.set_frozen(fo.import_state(TX, PARAMS, exported), PARAMS, "encoder/a")
    )
    assert factors(moved)["encoder"] == {"a": HOLE, "b/c": 1.0}
    assert factors(moved)["head"] == 0.75


def test_a_checkpoint_from_before_the_rates_names_what_it_lacks():
    plain = fo.freezable(optax.chain(optax.adam(0.1), fo.since_thaw(WARMUP)))
    for source, target in ((plain, TX), (TX, plain)):
        exported = fo.export_state(source.init(PARAMS))
        with pytest.raises(ValueError, match="factors/encoder/a"):
            fo.import_state(target, PARAMS, exported)


def test_release_and_adopt_keep_the_factors_and_the_first_count():
    state = fo.thaw(trained(), PARAMS, fo.everything)
    plain = fo.release(state, PARAMS)
    assert jax.tree.structure(plain) == jax.tree.structure(INNER.init(PARAMS))
    assert jax.tree.leaves(factors(plain)) == [0.75, 0.0, 0.75]
    adopted = fo.adopt(TX, plain, PARAMS)
    assert jax.tree.leaves(factors(adopted)) == [0.75, 0.0, 0.75]
    updates, _ = INNER.update(PARAMS, plain, PARAMS)
    for ours, bare in zip(
        jax.tree.leaves(TX.update(PARAMS, adopted, PARAMS)[0])[:3],
        jax.tree.leaves(updates)[:3],
        strict=True,
    ):
        np.testing.assert_array_equal(ours, bare)


def test_pickle_and_flax_serialization_bring_back_every_bit():
    assert_same_bits(pickle.loads(pickle.dumps(trained())), trained())
    bare = INNER.init(PARAMS)
    assert_same_bits(pickle.loads(pickle.dumps(bare)), bare)
    for state in (trained(), bare):
        data = flax.serialization.to_bytes(state)
        target = jax.tree.map(jnp.zeros_like, state)
        assert_same_bits(flax.serialization.from_bytes(target, data), state)


def test_boxed_params_export_as_unboxed_ones_and_unbox_keeps_the_state():
    kernel = nn.Partitioned(jnp.ones((4, 2)), names=("x", None))
    boxed = {"encoder": {"a": kernel, "b/c": PARAMS["encoder"]["b/c"]}, "head": jnp.ones(3)}
    plain = nn.meta.unbox(boxed)
    tx = fo.freezable(INNER, "head")
    state = fo.adjust(tx.init(boxed), boxed, "encoder/a", 0.125)
    expected = fo.adjust(tx.init(plain), plain, "encoder/a", 0.125)
    assert_same_bits(nn.meta.unbox(state), expected)
    exported, unboxed = fo.export_state(state), fo.export_state(expected)
    assert_same_bits(exported, unboxed)
    assert_same_bits(fo.import_state(TX, boxed, unboxed), state)
    assert_same_bits(
        fo.thaw(fo.import_state(TX, plain, exported), plain, "head"),
        fo.thaw(expected, plain, "head"),
    )
