"""An edit that a loop repeats in each step is resolved once, and never where it could differ."""

import enum
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._select.selector import Path

PARAMS = {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "d": jnp.ones(3)}}
TX = fo.freezable(optax.adam(0.1), "a")
STANDS = {
    "a string": lambda: "a",
    "a path": lambda: fo.path("a"),
    "a list": lambda: ["a"],
    "a difference": lambda: fo.everything - "b",
    "a complement": lambda: ~fo.path("b"),
    "a union with dots": lambda: fo.dotted("a") | fo.path("a"),
}


@pytest.fixture
def resolved(monkeypatch):
    """The number of times that a glob was looked up in the paths."""
    calls, flags = [], Path.flags
    monkeypatch.setattr(Path, "flags", lambda *args: calls.append(args) or flags(*args))
    return calls


@pytest.mark.parametrize("edit", [fo.set_frozen, fo.freeze], ids=["set_frozen", "freeze"])
@pytest.mark.parametrize("spec", STANDS.values(), ids=STANDS)
def test_a_spec_by_path_is_resolved_in_the_first_step_alone(edit, spec, resolved):
    params, state = PARAMS, TX.init(PARAMS)
    step = jax.jit(lambda params, state: (jax.tree.map(jnp.copy, params), state))
    for i in range(4):
        assert edit(state, params, spec()) is state
        if not i:
            count = len(resolved)
            assert count > 0
        params, state = step(params, state)
    assert len(resolved) == count


def test_thawing_what_trains_is_resolved_in_the_first_step_alone(resolved):
    state = TX.init(PARAMS)
    resolved.clear()
    for _ in range(3):
        assert fo.thaw(state, PARAMS, "b") is state
    assert len(resolved) == 1


def test_a_predicate_that_reads_leaves_is_called_in_each_step():
    state = TX.init(PARAMS)
    threshold = [1.5]
    spec = fo.where(lambda path, leaf: bool((leaf < threshold[0]).all()) and path == "a")
    assert fo.set_frozen(state, PARAMS, spec) is state
    threshold[0] = 0.5
    assert fo.mask(fo.set_frozen(state, PARAMS, spec), PARAMS)["a"] is False


def test_a_mask_that_was_changed_in_place_is_read_again():
    state, mask = TX.init(PARAMS), {"a": True, "b": False}
    assert fo.set_frozen(state, PARAMS, mask) is state
    mask["b"] = True
    after = fo.set_frozen(state, PARAMS, mask)
    assert fo.mask(after, PARAMS) == {"a": True, "b": {"c": True, "d": True}}


def test_params_of_another_tree_are_still_refused():
    state = TX.init(PARAMS)
    for _ in range(2):
        fo.set_frozen(state, PARAMS, "a")
    with pytest.raises(ValueError, match="different params: only in the params: 'e'"):
        fo.set_frozen(state, {**PARAMS, "e": jnp.ones(2)}, "a")


def test_params_of_another_name_are_still_refused():
    state = TX.init(PARAMS)
    for _ in range(2):
        fo.set_frozen(state, PARAMS, "a")
    with pytest.raises(ValueError, match="different params: only in the params: 'b/e'"):
        fo.set_frozen(state, {**PARAMS, "b": {"c": jnp.ones(3), "e": jnp.ones(3)}}, "a")


class Duck:
    """An array of a class that JAX does not know, and whose dtype may change."""

    def __init__(self, dtype):
        self.shape, self.dtype = (3,), np.dtype(dtype)


@pytest.mark.parametrize("of", [jnp.ones, np.ones, None], ids=["JAX", "NumPy", "another"])
def test_a_leaf_that_became_an_integer_is_resolved_anew(of):
    c = Duck(np.float32) if of is None else of(3, np.float32)
    params = {"a": PARAMS["a"], "b": {"c": c, "d": jnp.ones(3)}}
    state = fo.freezable(optax.adam(0.1), ["a", "b/c"] if of is None else "a").init(params)
    state = fo.FreezeState(state.inner, state.ages, TX.init(PARAMS).plan)
    for _ in range(2):
        assert fo.set_frozen(state, params, "a") is state
    if of is None:
        c.dtype = np.dtype(np.int32)
    else:
        params["b"]["c"] = of(3, np.int32)
    after = fo.set_frozen(state, params, "a")
    assert fo.mask(after, PARAMS) == {"a": True, "b": {"c": True, "d": False}}


def test_an_edit_is_not_taken_for_another_of_the_same_spec():
    state = fo.freeze(TX.init(PARAMS), PARAMS, "b/c")
    for _ in range(2):
        assert fo.freeze(state, PARAMS, "a") is state
    assert fo.mask(fo.set_frozen(state, PARAMS, "a"), PARAMS) == fo.mask("a", PARAMS)


def test_the_same_edit_counts_again_after_another():
    state = TX.init(PARAMS)
    assert fo.set_frozen(state, PARAMS, "a") is state
    other = fo.set_frozen(state, PARAMS, "b/c")
    assert fo.set_frozen(other, PARAMS, "b/c") is other
    back = fo.set_frozen(other, PARAMS, "a")
    assert fo.mask(back, PARAMS) == fo.mask(state, PARAMS)
    assert fo.mask(fo.freeze(back, PARAMS, "b/c"), PARAMS) == {
        "a": True,
        "b": {"c": True, "d": False},
    }


def test_leaves_that_are_frozen_in_part_are_resolved_in_each_step(resolved):
    state = fo.freeze(TX.init(PARAMS), PARAMS, fo.rows("b/c", [0]))
    resolved.clear()
    for _ in range(2):
        assert fo.freeze(state, PARAMS, "a") is state
    assert len(resolved) == 2


def test_trees_of_numpy_arrays_numbers_and_functions_are_known_again(resolved):
    params = {"a": np.ones(2, np.float32), "b": 1.0, "c": jnp.tanh, "d": jnp.ones(2)}
    state = TX.init(params)
    resolved.clear()
    for _ in range(3):
        assert fo.set_frozen(state, params, "a") is state
    assert len(resolved) == 1


def test_a_state_that_was_pickled_remembers_nothing_and_goes_on(resolved):
    state = TX.init(PARAMS)
    fo.set_frozen(state, PARAMS, "a")
    loaded = pickle.loads(pickle.dumps(state))
    resolved.clear()
    for _ in range(2):
        assert fo.set_frozen(loaded, PARAMS, "a") is loaded
    assert len(resolved) == 1


def test_the_last_eight_edits_are_kept():
    state = TX.init(PARAMS)
    for i in range(50):
        assert fo.set_frozen(state, PARAMS, ["a"] * (i + 1)) is state
    assert len(state.plan.context._masks) == 8


def test_strings_of_enums_with_one_name_are_different_specs():
    class A(enum.StrEnum):
        NAME = "a"

        def __repr__(self):
            return self.name

    class B(enum.StrEnum):
        NAME = "b"

        def __repr__(self):
            return self.name

    assert repr(A.NAME) == repr(B.NAME)
    state = TX.init(PARAMS)
    assert fo.set_frozen(state, PARAMS, A.NAME) is state
    assert fo.mask(fo.set_frozen(state, PARAMS, B.NAME), PARAMS) == fo.mask("b", PARAMS)
    layers = [fo.set_frozen(state, PARAMS, fo.layers(x.NAME)) for x in (A, B)]
    assert fo.mask(layers[1], PARAMS) == fo.mask("b", PARAMS)
    regexes = [fo.set_frozen(state, PARAMS, fo.regex(x.NAME)) for x in (A,)]
    assert fo.mask(regexes[0], PARAMS) == fo.mask("a", PARAMS)
