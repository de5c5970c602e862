"""`adjust` where states lie on a mesh, in host memory, or are of several models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.adjusting import (
    INNER,
    PARAMS,
    as_numbers,
    counted_step,
    factors,
)
from tests.support.memories import HOST, assert_same_bits, jit_keeps_memory, kinds, on_host

MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_it_compiles_nothing_again_and_each_factor_lies_where_it_lay(kind):
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), (MESHES[kind],))
    split, whole = (NamedSharding(mesh, PartitionSpec(*x)) for x in (["x"], []))
    params = {name: jax.device_put(np.asarray(x), split) for name, x in PARAMS.items()}
    params["b"] = jax.device_put(np.asarray(PARAMS["b"]), whole)
    tx = fo.freezable(INNER, "d")
    state, (step, traces) = tx.init(params), counted_step(tx, donated=False)
    for _ in range(2):
        params, state = step(params, state, params)
    count, before = (len(traces), step._cache_size()), factors(state)
    for factor in (0.3, np.float64(0.7), jnp.float32(0.9)):
        state = fo.adjust(state, params, ["a", "b"], factor)
        for name in ("a", "b"):
            old, new = before[name], factors(state)[name]
            assert (new.sharding, new.committed) == (old.sharding, old.committed)
            assert (new.dtype, new.weak_type) == (old.dtype, old.weak_type)
            assert new.tolist() == np.float32(factor)
        params, state = step(params, state, params)
        assert (len(traces), step._cache_size()) == count
    # Committed to the whole mesh, as a checkpoint is restored.
    state = jax.tree.map(lambda x: jax.device_put(x, whole) if not x.ndim else x, state)
    params, state = step(params, state, params)
    params, state = step(params, state, params)
    count = len(traces), step._cache_size()
    state = fo.adjust(state, params, "c", 0.125)
    step(params, state, params)
    assert (len(traces), step._cache_size()) == count


def test_the_factor_of_a_thawed_leaf_lies_with_the_others_so_the_step_compiles_once():
    split = NamedSharding(jax.make_mesh((8,), ("x",), (AxisType.Auto,)), PartitionSpec("x"))
    params = {name: jax.device_put(np.asarray(x), split) for name, x in PARAMS.items()}
    tx = fo.freezable(INNER, ["c", "d"])
    state, (step, _) = tx.init(params), counted_step(tx, donated=False)
    params, state = step(params, state, params)
    params, state = step(params, state, params)
    state = fo.thaw(state, params, "d")
    others = factors(state)["a"]
    for new in (factors(state)["d"], factors(fo.adjust(state, params, "d", 2.0))["d"]):
        assert (new.sharding, new.committed) == (others.sharding, others.committed)
        assert len(new.sharding.device_set) == 8
    count = step._cache_size()
    for _ in range(3):
        params, state = step(params, state, params)
        state = fo.adjust(state, params, "d", 0.5)
    assert step._cache_size() == count + 1


def test_a_state_of_several_models_takes_one_factor_or_one_for_each():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)
    tx = fo.freezable(INNER, "d")
    state = jax.vmap(tx.init)(stacked)
    each = jnp.asarray([0.1, 0.2, 0.0])
    adjusted = fo.adjust(state, stacked, ["a", "b"], each)
    member = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    singles = [
        fo.adjust(member(state, i), member(stacked, i), ["a", "b"], each[i]) for i in range(3)
    ]
    assert_same_bits(adjusted, jax.tree.map(lambda *xs: jnp.stack(xs), *singles))
    inside = jax.vmap(lambda s, p, f: fo.adjust(s, p, ["a", "b"], f))(state, stacked, each)
    assert_same_bits(inside, adjusted)
    assert_same_bits(
        fo.adjust(state, stacked, "c", 0.3), fo.adjust(state, stacked, "c", np.full(3, 0.3))
    )
    updates, _ = jax.vmap(tx.update)(stacked, adjusted, stacked)
    expected = [tx.update(member(stacked, i), singles[i], member(stacked, i))[0] for i in range(3)]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        updates,
        jax.tree.map(lambda *xs: jnp.stack(xs), *expected),
    )
    for wrong in (jnp.ones(2), jnp.ones((3, 1)), np.ones(1)):
        with pytest.raises(
            ValueError, match=r"factors of shape .* has factors of shape \(3,\) for"
        ):
            fo.adjust(state, stacked, "a", wrong)
    with pytest.raises(ValueError, match=r"of shape \(3,\), but the state has .* \(\) for 'a'"):
        fo.adjust(member(state, 0), member(stacked, 0), "a", each)
    with pytest.raises(ValueError, match="0 or more"):
        fo.adjust(state, stacked, "a", np.asarray([0.1, -0.1, 0.1]))


def test_where_rows_are_frozen_a_state_of_several_models_is_adjusted_under_vmap():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    tx = fo.freezable(INNER, fo.rows("a", [0]))
    state, each = jax.vmap(tx.init)(stacked), jnp.asarray([0.75, 2.0])
    adjusted = jax.vmap(lambda s, p, f: fo.adjust(s, p, "a", f))(state, stacked, each)
    assert as_numbers(adjusted)["a"] == [0.75, 2.0]
    with pytest.raises(ValueError, match=r"use jax\.vmap"):
        fo.adjust(state, stacked, "a", each)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_factors_in_host_memory_stay_there(jit):
    tx = fo.freezable(INNER, "d")
    state = on_host(tx.init(PARAMS))
    adjusted = jit(lambda s: fo.adjust(s, PARAMS, ["a", "c"], 0.75))(state)
    assert_same_bits(adjusted, fo.adjust(tx.init(PARAMS), PARAMS, ["a", "c"], 0.75))
    if jit is not jax.jit or jit_keeps_memory():
        assert set(jax.tree.leaves(kinds(adjusted))) == {HOST}
