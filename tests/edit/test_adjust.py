"""`adjust`: other factors, and nothing else; no trace, no compilation, no copied array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import freeze_optax as fo
from tests.support.memories import HOST, assert_same_bits, jit_keeps_memory, kinds, on_host

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
NAMES = ["a", "b", "c", "d"]


def make_params() -> Any:
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.normal(size=(8, 2)), jnp.float32) for name in NAMES}


PARAMS = make_params()
INNER = optax.chain(optax.adam(0.1), fo.rates({"a": 0.5, "b": 0.25}))


def factors(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "factors")


def as_numbers(state: Any) -> Any:
    return jax.tree.map(lambda x: x.tolist(), factors(state))


def counted_step(tx: Any, donated: bool = True) -> tuple[Any, list[int]]:
    """A jitted step, and a list that grows with each trace of it."""
    traces: list[int] = []

    @functools.partial(jax.jit, donate_argnums=(0, 1) if donated else ())
    def step(params: Any, state: Any, grads: Any) -> Any:
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step, traces


FACTORS: dict[str, Any] = {
    "float": 0.1,
    "int": 3,
    "zero": 0.0,
    "NumPy": np.float64(0.3),
    "0-d array": np.asarray(0.4),
    "JAX": jnp.float32(0.6),
    "bfloat16": jnp.bfloat16(0.5),
}


def test_it_never_retraces_nor_compiles_again_and_the_next_step_has_the_factor():
    tx, params = fo.freezable(INNER, "d"), make_params()
    state, (step, traces) = tx.init(params), counted_step(tx)
    plain, twin, by_hand = optax.adam(0.1), make_params(), {"a": 0.5, "b": 0.25, "c": 1.0}
    bare = plain.init({k: twin[k] for k in "abc"})
    jitted = jax.jit(lambda state, params, factor: fo.adjust(state, params, ["a", "c"], factor))
    edits = [
        *(lambda s, p, f=f: fo.adjust(s, p, ["a", "c"], f) for f in FACTORS.values()),
        lambda s, p: jitted(s, p, 0.7),  # a Python float, which jit makes weakly typed
        lambda s, p: jitted(s, p, np.float32(0.8)),
    ]
    numbers = [*FACTORS.values(), 0.7, 0.8]
    for edit, factor in zip([None, *edits], [None, *numbers], strict=True):
        if edit:
            state = edit(state, params)
            by_hand |= {"a": float(factor), "c": float(factor)}
        grads = jax.tree.map(jnp.sin, twin)
        params, state = step(params, state, grads)
        live = [{k: tree[k] for k in "abc"} for tree in (grads, twin)]
        updates, bare = plain.update(live[0], bare, live[1])
        twin = {**twin, **{k: twin[k] + updates[k] * np.float32(by_hand[k]) for k in "abc"}}
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, twin
        )
    assert len(traces) == step._cache_size() == 1
    assert jitted._cache_size() == 2  # for a weak type and a strong one


def test_neither_before_the_first_step_nor_after_other_edits_does_it_retrace():
    tx, params = fo.freezable(INNER, ["b", "d"]), make_params()
    step, traces = counted_step(tx)
    state = fo.adjust(tx.init(params), params, "a", 0.1)
    edits = [
        lambda s, p: fo.thaw(s, p, "b"),
        lambda s, p: fo.freeze(s, p, "a", keep_state=True),
        lambda s, p: fo.set_frozen(s, p, fo.rows("c", [0, 3])),
        lambda s, p: fo.import_state(tx, p, jax.tree.map(np.asarray, fo.export_state(s))),
    ]
    for edit in [None, *edits]:
        state = edit(state, params) if edit else state
        params, state = step(params, state, PARAMS)
        params, state = step(params, state, PARAMS)
        count = len(traces), step._cache_size()
        for factor in (0.3, jnp.float32(0.6)):
            state = fo.adjust(state, params, ["c"], factor)
            params, state = step(params, state, PARAMS)
        assert (len(traces), step._cache_size()) == count


MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


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


def pointers(tree: Any) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("committed", [False, True])
def test_it_replaces_the_named_factors_alone_and_shares_no_buffer(committed):
    place = SingleDeviceSharding(jax.devices()[2])
    params = jax.device_put(PARAMS, place) if committed else PARAMS
    tx = fo.freezable(optax.chain(optax.clip(1.0), INNER), "d")
    state = (tx.init(params), {"step": jnp.zeros(())})  # any tree with one
    state = jax.device_put(state, place) if committed else state
    host, device = np.full((), 0.75, np.float32), jnp.float32(0.75)
    for factor in (0.75, host, device):
        adjusted = fo.adjust(state, params, ["a", "c"], factor)
        assert jax.tree.structure(adjusted) == jax.tree.structure(state)
        pairs = zip(*map(jax.tree.leaves_with_path, (state, adjusted)), strict=True)
        changed = {jax.tree_util.keystr(key[-1:]) for (key, x), (_, y) in pairs if x is not y}
        assert changed == {"['a']", "['c']"}
        assert as_numbers(adjusted) == {"a": 0.75, "b": 0.25, "c": 0.75, "d": HOLE}
        taken = [*pointers(state), *pointers(device), host.ctypes.data]
        new = pointers([factors(adjusted)["a"], factors(adjusted)["c"]])
        assert len(set(taken + new)) == len(taken) + 2
        assert {x.committed for x in jax.tree.leaves(factors(adjusted))} == {committed}
    host[...] = 2.0  # the caller's array is the caller's
    assert as_numbers(adjusted)["a"] == 0.75


def test_a_state_in_which_all_factors_were_set_at_once_can_be_donated():
    tx, params = fo.freezable(INNER), make_params()
    step, _ = counted_step(tx)
    state = fo.adjust(tx.init(params), params, fo.everything, jnp.float32(0.5))
    _, state = step(params, state, PARAMS)
    assert as_numbers(state) == dict.fromkeys(NAMES, 0.5)


def test_in_jit_it_does_no_work_for_leaves_that_are_not_named():
    tx = fo.freezable(INNER, "d")
    state = tx.init(PARAMS)

    def operations(where: Any) -> int:
        edit = lambda s, factor: fo.adjust(s, PARAMS, where, factor)  # noqa: E731
        jaxpr = jax.make_jaxpr(edit)(state, jnp.float32(0.3))
        by_hand = jax.make_jaxpr(lambda s, _: s)(state, jnp.float32(0.3))
        same = zip(jaxpr.jaxpr.outvars, jaxpr.jaxpr.invars, strict=False)
        assert len(by_hand.jaxpr.outvars) == len(jaxpr.jaxpr.outvars)
        changed = sum(out is not given for out, given in same)
        assert changed == (1 if isinstance(where, str) else len(where))
        return len(jaxpr.eqns)

    assert operations("a") <= 1
    assert operations(["a", "b", "c"]) <= 3


def test_a_parked_leaf_keeps_its_factor_and_takes_another_and_a_fresh_one_gets_its_rule():
    tx = fo.freezable(INNER)
    state = fo.adjust(tx.init(PARAMS), PARAMS, ["a", "b", "c"], 0.7)
    parked = fo.freeze(state, PARAMS, ["a", "b"], keep_state=True)
    parked = fo.adjust(parked, PARAMS, "b", 0.125)
    parked = fo.freeze(parked, PARAMS, "c")
    back = fo.thaw(parked, PARAMS, ["a", "b", "c"])
    f = np.float32(0.7).item()
    assert as_numbers(back) == {"a": f, "b": 0.125, "c": 1.0, "d": 1.0}
    restored = fo.import_state(tx, PARAMS, fo.export_state(parked))
    assert as_numbers(fo.thaw(restored, PARAMS, ["a", "b"])) == {**as_numbers(back), "c": HOLE}
    adopted = fo.adopt(tx, fo.release(back, PARAMS), PARAMS)
    assert as_numbers(adopted) == as_numbers(back)
    # Of a dropped leaf `release` makes a fresh state.
    assert as_numbers(fo.release(parked, PARAMS)) == as_numbers(back)


def test_rows_that_train_have_the_factor_of_their_part():
    frozen = fo.rows("a", [0, 1])
    tx = fo.freezable(INNER, frozen)
    state = fo.adjust(tx.init(PARAMS), PARAMS, "a", 0.75)
    assert as_numbers(state)["a"] == 0.75
    state = fo.thaw(state, PARAMS, fo.rows("a", [0]))  # a part with its rule's factor
    assert [x.tolist() for x in jax.tree.leaves(factors(state)["a"])] == [0.75, 0.5]
    fresh = fo.adjust(state, PARAMS, fo.rows("a", [0]), 0.0)
    assert [x.tolist() for x in jax.tree.leaves(factors(fresh)["a"])] == [0.75, 0.0]
    grads = {name: jnp.ones((8, 2)) for name in NAMES}
    updates, _ = tx.update(grads, fresh, PARAMS)
    by_row = np.repeat(np.float32([-0.0, -0.0, *[-0.075] * 6])[:, None], 2, 1)
    np.testing.assert_allclose(updates["a"], by_row, rtol=1e-4)
    assert np.signbit(updates["a"]).all()
    both = fo.adjust(state, PARAMS, "a", 0.25)
    assert [x.tolist() for x in jax.tree.leaves(factors(both)["a"])] == [0.25, 0.25]
    for some in ([2, 3], [0, 2], range(3)):
        with pytest.raises(ValueError, match=r"of 'a', but all of .*has one factor; select all"):
            fo.adjust(fresh, PARAMS, fo.rows("a", list(some)), 0.5)
    # Frozen rows may be named beside those that train.
    assert as_numbers(fo.adjust(tx.init(PARAMS), PARAMS, "a", 2.0))["a"] == 2.0


def test_a_part_that_an_edit_splits_gives_its_factor_to_both_in_buffers_of_their_own():
    tx, params = fo.freezable(INNER), make_params()
    state = fo.adjust(tx.init(params), params, "a", 0.75)
    split = fo.freeze(state, params, fo.rows("a", slice(0, 3)), keep_state=True)
    parts = jax.tree.leaves(factors(split)["a"])
    assert [x.tolist() for x in parts] == [0.75, 0.75]
    assert len(set(pointers(parts))) == 2
    parked = fo.adjust(split, params, fo.rows("a", slice(0, 3)), 0.25)
    back = fo.thaw(parked, params, "a")
    assert sorted(x.tolist() for x in jax.tree.leaves(factors(back)["a"])) == [0.25, 0.75]
    step, _ = counted_step(tx)
    step(params, back, PARAMS)
    elements = ~fo.elements("b", np.arange(16).reshape(8, 2) % 3 == 0)
    tx = fo.freezable(INNER, elements - fo.path("a", "c", "d"))
    state = fo.adjust(tx.init(PARAMS), PARAMS, "b", 0.5)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    expected = np.where(np.arange(16).reshape(8, 2) % 3 == 0, np.float32(-0.05), np.float32(-0.0))
    np.testing.assert_allclose(updates["b"], expected, rtol=1e-4)


def test_on_a_scheduled_state_it_holds_for_every_phase_without_a_trace():
    phases = fo.Phases({0: ["a", "d"], 2: ["b", "d"]})
    tx = fo.scheduled(INNER, phases)
    state, (step, traces), params = tx.init(PARAMS), counted_step(tx, donated=False), PARAMS
    assert as_numbers(state) == {"a": 0.5, "b": 0.25, "c": 1.0, "d": HOLE}
    host, twin = fo.freezable(INNER, phases.at(0)), PARAMS
    other = host.init(twin)
    for i in range(4):
        state = fo.adjust(state, params, ["b", "a", "c"], 0.1 * i)  # one of them is parked
        params, state = step(params, state, PARAMS)
        other = fo.set_frozen(other, twin, phases.at(i), keep_state=True)
        trained = ["b", "c"] if i < 2 else ["a", "c"]
        other = fo.adjust(other, twin, trained, 0.1 * i)
        updates, other = host.update(PARAMS, other, twin)
        twin = fo.apply_updates(twin, updates, frozen=other)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, twin
        )
    assert len(traces) == step._cache_size() == 1
    with pytest.raises(ValueError, match="'d', which has no factor in the state"):
        fo.adjust(state, params, "d", 0.1)


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


def test_tied_leaves_have_the_factor_of_the_first():
    shared = jnp.ones(2)
    params = {"a": shared, "b": jnp.ones(2), "h": shared}
    inner = optax.chain(optax.sgd(1.0), fo.rates({"a": 0.5}))
    tx = fo.freezable(fo.tie(inner, ["a", "h"]))
    state = fo.adjust(tx.init(params), params, ["a", "h"], 0.25)
    assert as_numbers(state) == {"a": 0.25, "b": 1.0, "h": HOLE}
    updates, _ = tx.update({"a": shared, "b": shared, "h": 2 * shared}, state, params)
    expected = {"a": -0.75 * shared, "b": -1.0 * shared, "h": -0.75 * shared}
    assert_same_bits(updates, expected)
    with pytest.raises(ValueError, match=r"'h \(tied to a\)', which has no factor"):
        fo.adjust(state, params, "h", 0.25)
    everything = fo.adjust(state, params, fo.everything, 0.125)
    assert as_numbers(everything) == {"a": 0.125, "b": 0.125, "h": HOLE}


TX = fo.freezable(INNER, "d")
STATE = TX.init(PARAMS)
OTHER_STATE = fo.freezable(optax.adam(0.1)).init(PARAMS)
LOUD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no rates": ((OTHER_STATE, PARAMS, "a", 0.1), TypeError, "a FreezeState .* no state of fo"),
    "a transformation": (
        (TX, PARAMS, "a", 0.1),
        TypeError,
        "a GradientTransformationExtraArgs for",
    ),
    "the params first": ((PARAMS, STATE, "a", 0.1), TypeError, "was given a dict for its state"),
    "None": ((None, PARAMS, "a", 0.1), TypeError, "was given a NoneType for its state"),
    "two": (
        (fo.freezable(optax.chain(INNER, fo.rates({}))).init(PARAMS), PARAMS, "a", 0.1),
        ValueError,
        "with 2 states of fo.rates",
    ),
    "frozen": ((STATE, PARAMS, "d", 0.1), ValueError, "'d', which has no factor in the state"),
    "frozen, among others": (
        (STATE, PARAMS, fo.everything, 0.1),
        ValueError,
        "fo.adjust .* 'd', w",
    ),
    "nothing": ((STATE, PARAMS, fo.nothing, 0.1), ValueError, "selects no leaf that can be train"),
    "no such leaf": ((STATE, PARAMS, "e", 0.1), ValueError, "pattern 'e' selects no leaf"),
    "no params": ((STATE, None, "a", 0.1), TypeError, "the params are missing"),
    "fewer params": ((STATE, {"a": PARAMS["a"]}, "a", 0.1), ValueError, "only in the state: 'b'"),
    "more params": ((STATE, {**PARAMS, "e": 1.0}, "a", 0.1), ValueError, "only in the params"),
    "more params of a bare chain": (
        (INNER.init(PARAMS), {**PARAMS, "e": 1.0}, "a", 0.1),
        ValueError,
        "only in the params: 'e'",
    ),
    "shape": ((STATE, PARAMS, "a", jnp.ones(2)), ValueError, r"of shape \(2,\), but the state has"),
}


@pytest.mark.parametrize("name", LOUD)
def test_misuse_is_an_error_that_changes_nothing(name):
    arguments, error, text = LOUD[name]
    before = jax.tree.map(lambda x: x, STATE)
    with pytest.raises(error, match=text):
        fo.adjust(*arguments)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(STATE), strict=True):
        assert old is new
    assert as_numbers(STATE) == {"a": 0.5, "b": 0.25, "c": 1.0, "d": HOLE}
