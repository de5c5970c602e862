"""Arguments that are mixed up or of another kind: errors that say what to pass instead."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
INNER = optax.adam(0.1)
TX = fo.freezable(INNER, "encoder")
STATE = TX.init(PARAMS)
PLAIN = INNER.init(PARAMS)
EXPORT = fo.export_state(STATE)
PHASES = fo.Phases({0: "encoder"})

NO_TRANSFORMATIONS = {
    "None": None,
    "a spec": "encoder",
    "a factory that was not called": optax.adam,
    "params": PARAMS,
    "a FreezeState": STATE,
    "a plain state": PLAIN,
    "phases": PHASES,
}
TAKES_A_TRANSFORMATION = {
    "freezable": lambda tx: fo.freezable(tx, "encoder").init(PARAMS),
    "tie": lambda tx: fo.tie(tx, ("encoder", "head")).init(PARAMS),
    "scheduled": lambda tx: fo.scheduled(tx, PHASES).init(PARAMS),
    "adopt": lambda tx: fo.adopt(tx, PLAIN, PARAMS),
    "import_state": lambda tx: fo.import_state(tx, PARAMS, EXPORT),
    "summary": lambda tx: fo.summary(PARAMS, "encoder", tx),
}


@pytest.mark.parametrize(
    ("takes", "name"),
    [
        (takes, name)
        for takes in TAKES_A_TRANSFORMATION
        for name in NO_TRANSFORMATIONS
        # The one asks for no optimizer state, the other gives a tree like the exported one.
        if (takes, name) not in (("summary", "None"), ("import_state", "a FreezeState"))
    ],
)
def test_what_is_no_transformation_is_an_error_that_asks_for_one(takes, name):
    with pytest.raises(TypeError, match="transformation"):
        TAKES_A_TRANSFORMATION[takes](NO_TRANSFORMATIONS[name])


NO_STATES = {
    "None": (None, "NoneType"),
    "params": (PARAMS, "dict"),
    "a plain state": (PLAIN, "tuple"),
    "a spec": ("encoder", "str"),
    "an export": (EXPORT, "dict"),
    "a transformation": (TX, "[tT]ransformation"),
    "an optimizer": (INNER, "[tT]ransformation"),
}
TAKES_A_STATE = {
    "freeze": lambda state: fo.freeze(state, PARAMS, "head"),
    "thaw": lambda state: fo.thaw(state, PARAMS, "head"),
    "set_frozen": lambda state: fo.set_frozen(state, PARAMS, "head"),
    "release": lambda state: fo.release(state, PARAMS),
    "export_state": fo.export_state,
    "update": lambda state: TX.update(PARAMS, state, PARAMS),
}


@pytest.mark.parametrize("name", NO_STATES)
@pytest.mark.parametrize("takes", TAKES_A_STATE)
def test_what_is_no_state_is_an_error_that_asks_for_one(takes, name):
    state, kind = NO_STATES[name]
    with pytest.raises(
        TypeError, match=f"{takes} .*(given a {kind}|not a {kind}|{kind})"
    ) as caught:
        TAKES_A_STATE[takes](state)
    assert "state" in str(caught.value)


@pytest.mark.parametrize("name", ["params", "a transformation"])
@pytest.mark.parametrize("takes", [name for name in TAKES_A_STATE if name != "update"])
def test_the_call_that_an_error_advises_is_one_that_can_be_written(takes, name):
    with pytest.raises(TypeError, match=takes) as caught:
        TAKES_A_STATE[takes](NO_STATES[name][0])
    advised = str(caught.value).rpartition(f"{takes}(")[2].partition(")")[0]
    names = list(inspect.signature(getattr(fo, takes)).parameters)
    given = advised.replace("opt_state", "state").replace("...", "").split(", ")
    assert [name for name in given if name] == names[: len([name for name in given if name])]


def test_an_import_with_another_transformation_advises_no_call_that_can_not_be_written():
    with pytest.raises(TypeError, match="FreezeState") as caught:
        fo.import_state(INNER, PARAMS, EXPORT)
    assert "import_state(state, params" not in str(caught.value)
    assert "freezable" in str(caught.value)


@pytest.mark.parametrize("phases", [{0: "encoder"}, "encoder", None, TX, [(0, "encoder")]])
def test_scheduled_asks_for_phases(phases):
    with pytest.raises(TypeError, match="Phases"):
        fo.scheduled(INNER, phases)


@pytest.mark.parametrize("specs", ["encoder", ["encoder"], [(0, "encoder")], fo.nothing, 3, PHASES])
def test_phases_ask_for_a_dict(specs):
    with pytest.raises(TypeError, match="Phases"):
        fo.Phases(specs)


@pytest.mark.parametrize("group", [3, None, fo.path("encoder"), ("encoder", 3), [("a", "b")]])
def test_tie_names_itself_where_a_group_is_none_of_paths(group):
    with pytest.raises(TypeError, match=r"fo\.tie"):
        fo.tie(INNER, group)


OTHERS = {"other": jnp.ones(2)}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: TX.update(STATE, PARAMS, PARAMS), r"the order is update\(gradients, state, param"),
        (lambda: TX.update(PARAMS, STATE, STATE), "only in the params: 'inner/0/count'"),
        (lambda: TX.update(PARAMS, STATE, TX), "only in the params: 'init', 'update'"),
        (lambda: TX.update(None, STATE, PARAMS), "only in the state: 'encoder', 'head'"),
        (lambda: TX.update(PARAMS, (STATE,), PARAMS), "a tuple for its state, not the FreezeState"),
        (lambda: TX.init(None), "the params are missing: None was given"),
        (lambda: TX.init(STATE), "selects no leaf; nearest: 'inner/0/nu/encoder'"),
        (lambda: fo.freeze(PARAMS, STATE, "head"), r"the order is freeze\(state, params"),
        (lambda: fo.freeze(STATE, "head", PARAMS), "only in the params: ''"),
        (lambda: fo.freeze(STATE, None, "head"), "the params are missing"),
        (lambda: fo.freeze(STATE, STATE, "head"), "only in the params: 'inner/0/count'"),
        (lambda: fo.freeze(STATE, OTHERS, "other"), "only in the params: 'other'"),
        (lambda: fo.freeze((STATE, STATE), PARAMS, "head"), "a tuple with 2 FreezeStates"),
        (
            lambda: fo.adopt(fo.freezable(INNER), PARAMS, PLAIN),
            "the inner state, a dict, does not have",
        ),
        (
            lambda: fo.adopt(TX, STATE, PARAMS),
            "the inner state, a FreezeState, does not have",
        ),
        (lambda: fo.adopt(INNER, PLAIN, PARAMS), "pass the freezable itself"),
        (
            lambda: fo.adopt(TX, None, PARAMS),
            "the inner state, a NoneType, does not have",
        ),
        (lambda: fo.adopt(TX, PLAIN, None), "the params are missing"),
        (lambda: fo.release(STATE, None), "the params are missing"),
        (lambda: fo.merge(PARAMS, PARAMS), "both parts have a leaf at 'encoder', 'head'"),
        (lambda: fo.merge(fo.partition(PARAMS, "head"), PARAMS), "only in `trainable`: '0/enc"),
        (lambda: fo.merge(None, PARAMS), "only in `rest`: 'encoder', 'head'"),
        (lambda: fo.hold(PARAMS, "head", PARAMS), "only in `new`: 'encoder', 'head'"),
        (lambda: fo.apply_updates(PARAMS, STATE, "head"), "only in the updates: 'inner/0/count'"),
        (lambda: fo.apply_updates(PARAMS, (PARAMS, STATE)), "only in the updates: '0/encoder'"),
        (lambda: fo.assign(PARAMS, [("head", 1.0)]), r"takes a dict \{path: value\}, not a list"),
        (lambda: fo.assign({"head": 1.0}, PARAMS), "'encoder', which is no leaf"),
        (lambda: fo.assign(PARAMS, {"*": 0.0}), r"'\*', which is no leaf"),
        (lambda: fo.assign(PARAMS, {0: 0.0}), "but got the key 0"),
        (lambda: fo.import_state(TX, EXPORT, PARAMS), "this is no export of fo.export_state"),
        (lambda: fo.import_state(TX, PARAMS, STATE), "this is no export of fo.export_state"),
        (lambda: fo.import_state(TX, OTHERS, EXPORT), "'other'"),
        (lambda: fo.summary("encoder", PARAMS), "it has nothing for ''"),
        (lambda: fo.summary(None), "the params are missing"),
        (lambda: fo.summary(PARAMS, "encoder", 2), "the optimizer is a int, not a transformation"),
        (lambda: fo.scan(lambda c, x: (c, x), 0.0, {}, True), "same leading axis"),
        (lambda: fo.scan(lambda c, x: (c, x), 0.0, "layers", True), "same leading axis"),
        (lambda: fo.path(["encoder"]), r"strings, one argument each, but got \['encoder'\]"),
        (lambda: fo.regex(None), "strings, one argument each, but got None"),
        (lambda: fo.layers(3), "strings, one argument each, but got 3"),
        (lambda: fo.layers("*")["a"], "an int or a slice, not 'a'"),
        (lambda: fo.of_type("Dense"), "takes classes, one argument each, but got 'Dense'"),
        (lambda: fo.by_module("Dense"), "takes a function of a module and its path, not 'Dense'"),
        (lambda: fo.declared("Dense"), r"a table \{path: module\}, not a str"),
        (lambda: fo.labelled("encoder"), "needs the labels to select"),
        (lambda: fo.rows("head", "0"), "a slice, ints or a vector of bools, not '0'"),
        (lambda: fo.rows("head", [2**70]), "a slice, ints or a vector of bools"),
    ],
)
def test_arguments_that_are_mixed_up_are_told_apart_and_change_nothing(call, match):
    before = jax.tree.leaves(STATE)
    with pytest.raises((ValueError, TypeError), match=match):
        call()
    assert all(x is y for x, y in zip(jax.tree.leaves(STATE), before, strict=True))
    assert fo.mask(STATE, PARAMS) == {"encoder": True, "head": False}
    updates, _ = TX.update(PARAMS, STATE, PARAMS)
    assert updates["encoder"].tolist() == [0.0, 0.0]


def test_an_optimizer_that_was_not_called_is_told_to_be():
    said = "freezable takes a transformation first, as optax.adam(1e-3) is one, but was given "
    with pytest.raises(TypeError) as error:
        fo.freezable(optax.adam)
    assert str(error.value) == said + "function (call it: optax.adam(1e-3))"
    with pytest.raises(TypeError) as error:
        fo.freezable({"lr": 0.1})
    assert str(error.value) == said + "dict"
