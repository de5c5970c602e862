"""`adjust`: other factors, and nothing else; no trace, no compilation, no copied array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import freeze_optax as fo
from tests.support.adjusting import (
    HOLE,
    INNER,
    NAMES,
    PARAMS,
    as_numbers,
    counted_step,
    factors,
    make_params,
)
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")

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
