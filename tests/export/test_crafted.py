"""Exports of other runs, and crafted ones: no state that its transformation could not have made."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.broken_exports import (
    ADAM,
    MAKERS,
    OURS,
    Case,
    about_of,
    bits,
    case,
    odd_exports,
    telling,
)
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"a": jnp.ones(2), "b": jnp.full((2, 3), 2.0)}
INNERS = {
    "momentum": optax.trace(0.9),
    "adam": ADAM,
    "amsgrad": optax.scale_by_amsgrad(),
    "factored": optax.scale_by_factored_rms(),
    "clip before adam": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "clip after adam": optax.chain(ADAM, optax.clip_by_global_norm(1.0)),
    "momentum before adam": optax.chain(optax.trace(0.9), ADAM),
    "momentum after adam": optax.chain(ADAM, optax.trace(0.9)),
    "adam twice": optax.chain(ADAM, ADAM),
    "a schedule before adam": optax.chain(optax.scale_by_schedule(lambda count: 0.1), ADAM),
    "a schedule after adam": optax.chain(ADAM, optax.scale_by_schedule(lambda count: 0.1)),
    "a named chain": optax.named_chain(("adam", ADAM)),
    "injected": optax.inject_hyperparams(optax.sgd)(0.1),
    "injected with momentum": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
    "injected by a schedule": optax.inject_hyperparams(optax.sgd)(lambda count: 0.1),
    "two groups": optax.partition({"a": ADAM, "b": optax.trace(0.9)}, {"a": "a", "b": "b"}),
    "the groups changed": optax.partition({"a": optax.trace(0.9), "b": ADAM}, {"a": "a", "b": "b"}),
    "masked": optax.masked(ADAM, {"a": True, "b": False}),
    "if finite": optax.apply_if_finite(ADAM, 3),
    "every second step": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "noise": optax.add_noise(0.1, 0.5, key=jax.random.key(1)),
    "noise of another kind": optax.add_noise(0.1, 0.5, key=jax.random.key(1, impl="rbg")),
}
TRANSFORMATIONS = {
    **{name: fo.freezable(inner, "a") for name, inner in INNERS.items()},
    "momentum around": optax.chain(optax.trace(0.9), fo.freezable(ADAM, "a")),
    "phases": fo.scheduled(ADAM, fo.Phases({0: "a", 3: fo.nothing})),
    "other phases": fo.scheduled(ADAM, fo.Phases({0: "a", 4: fo.nothing})),
    "phases of other leaves": fo.scheduled(ADAM, fo.Phases({0: "b", 3: fo.nothing})),
}


@pytest.fixture(scope="module")
def exports():
    return {name: fo.export_state(tx.init(PARAMS)) for name, tx in TRANSFORMATIONS.items()}


@pytest.mark.parametrize("name", cases({x: x for x in TRANSFORMATIONS}, [*TRANSFORMATIONS][::3]))
def test_the_export_of_any_other_transformation_is_refused(name, exports):
    tx = TRANSFORMATIONS[name]
    own = Case(tx, PARAMS, None, exports[name])
    assert odd_exports(own, [(name, exports[name])]) == {}
    others = [(other, given) for other, given in exports.items() if other != name]
    assert odd_exports(own, others, may_be_read=False) == {}


X, Y = jnp.ones(2), jnp.ones((2, 3))
OTHERS = {
    "renamed": ({"a": X, "c": Y}, "only in it: 'b'; only in the params: 'c'"),
    "fewer": ({"a": X}, "only in it: 'b'"),
    "more": ({"a": X, "b": Y, "c": X}, "only in the params: 'c'"),
    "none": ({}, "only in it: 'a', 'b'"),
    "deeper": ({"a": {"x": X}, "b": Y}, "only in it: 'a'; only in the params: 'a/x'"),
    "a list": ([X, Y], "only in it: 'a', 'b'; only in the params: '0', '1'"),
    "one array": (Y, "only in it: 'a', 'b'; only in the params: ''"),
    "reshaped": ({"a": X, "b": Y.T}, r"mu/b' is \(\[2, 3\], 'float32'\), not \(\[3, 2\]"),
    "flattened": ({"a": X, "b": Y.ravel()}, r"mu/b' is \(\[2, 3\], 'float32'\), not \(\[6\]"),
    "complex": (
        {"a": X, "b": Y.astype("complex64")},
        r"mu/b' is .*'float32'\), .*'complex64'",
    ),
    "changed": ({"a": Y, "b": X}, r"mu/a' is \(\[2\], 'float32'\), not \(\[2, 3\]"),
    "abstract": ({"a": X, "c": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "only in it: 'b'"),
}


@pytest.mark.parametrize(("params", "said"), OTHERS.values(), ids=OTHERS)
def test_the_export_of_other_params_is_refused_with_the_paths_of_both(params, said):
    tx = fo.freezable(ADAM)
    exported = fo.export_state(tx.init(PARAMS))
    with pytest.raises(
        ValueError, match=rf"the export is .*{said.replace('inner/', '')}"
    ) as caught:
        fo.import_state(tx, params, exported)
    assert "\n" not in str(caught.value)


CANNOT_TRAIN = {
    "integers": jnp.arange(2),
    "bools": jnp.ones(2, bool),
    "a key": jax.random.key(0),
    "text": "relu",
    "a function": jax.nn.relu,
}


@pytest.mark.parametrize("leaf", CANNOT_TRAIN.values(), ids=CANNOT_TRAIN)
def test_a_leaf_that_cannot_be_trained_never_trains(leaf):
    # Of plain SGD nothing but the plan is in the export: no shape or dtype tells of other params.
    tx = fo.freezable(optax.sgd(0.1))
    exported = fo.export_state(tx.init({"n": jnp.ones(2), "w": jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"the export is .*'n'"):
        fo.import_state(tx, {"n": leaf, "w": jnp.ones(2)}, exported)


def test_leaves_that_share_a_buffer_are_not_parted():
    apart = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = fo.freezable(ADAM, "a")
    exported = fo.export_state(tx.init(apart))
    shared = dict.fromkeys(apart, jnp.ones(2))
    with pytest.raises(ValueError, match="'a' would be frozen and 'b' trained") as by_init:
        tx.init(shared)
    with pytest.raises(ValueError, match="'a' would be frozen and 'b' trained") as by_import:
        fo.import_state(tx, shared, exported)
    assert str(by_import.value) == str(by_init.value)


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.trace(0.9)], ids=["sgd", "momentum"])
def test_cohorts_without_a_counter_to_tell_them_apart_are_refused(inner):
    tx = fo.freezable(inner)
    exported = fo.export_state(tx.init(PARAMS))
    about = {**about_of(exported), "cohorts": [0, 1]}
    whole = Case(tx, PARAMS, None, exported)
    assert odd_exports(whole, [("cohorts", telling(exported, about))], may_be_read=False) == {}


def test_leaves_said_to_be_cut_but_whole_are_refused():
    whole = case("cohorts")
    about = {**whole.about, "parts": [[0, None], [1, None], [2, None]]}
    version = telling(whole.exported, about)
    assert odd_exports(whole, [("parts", version)], may_be_read=False) == {}


def test_rows_that_a_leaf_has_not_are_refused():
    whole = case("rows")
    (_, (count, text)), *others = whole.about["parts"]
    assert (count, len(text)) == (8, 2)
    rows = {
        "more rows": [16, text + "00"],
        "fewer rows": [4, text],
        "bits beyond the rows": [7, text],
        "all": [8, "ff"],
        "none": [8, "00"],
        "as many, of the other part": others[0][1],
        "no text": [8, ""],
        "no hex": [8, "🔥"],
        "an expression": [8, "__import__('os')"],
        "a huge count": [10**12, text],
        "a negative count": [-8, text],
    }
    parts = {name: [[0, given], *others] for name, given in rows.items()}
    # Row 3, of the first part, in the place of row 1: as many as before.
    assert (text, others[0]) == ("17", [0, [8, "40"]])
    parts["a row of two parts"] = [[0, [8, text]], [0, [8, "10"]], *others[1:]]
    parts["a leaf beyond the last"] = [*whole.about["parts"][:-1], [10**12, None]]
    parts["a leaf before the first"] = [[-1, whole.about["parts"][0][1]], *others]
    texts = [(name, {**whole.about, "parts": given}) for name, given in parts.items()]
    versions = [(name, telling(whole.exported, about)) for name, about in texts]
    assert odd_exports(whole, versions, may_be_read=False) == {}


def test_a_whole_leaf_that_is_said_to_be_frozen_as_well_is_refused():
    whole = case("rows")
    more = {"parts": whole.about["parts"][-1], "frozen": True, "cohorts": -1}
    assert more["parts"][1] is None
    about = {**whole.about, **{name: [*whole.about[name], x] for name, x in more.items()}}
    version = telling(whole.exported, about)
    assert odd_exports(whole, [("twice", version)], may_be_read=False) == {}


COHORTS = [[-2, 0, 0], [0, 0, -2], [1, 1, 1], [0, 2, 0], [1, 2, 3], [3, 0, -1], [10**12, 0, 0]]


@pytest.mark.parametrize("cohorts", COHORTS, ids=str)
def test_cohorts_that_are_not_numbered_from_zero_are_refused(cohorts):
    whole = case("cohorts")
    versions = []
    for frozen in itertools.product([False, True], repeat=3):
        about = {**whole.about, "frozen": frozen, "cohorts": cohorts}
        versions.append((frozen, telling(whole.exported, about)))
    assert odd_exports(whole, versions, may_be_read=False) == {}


@pytest.mark.parametrize("frozen", [[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]], ids=str)
def test_no_cohort_both_trains_and_is_parked(frozen):
    whole = case("cohorts")
    assert whole.about["cohorts"] == [0, 1, 0]
    about = {**whole.about, "frozen": list(map(bool, frozen))}
    version = telling(whole.exported, about)
    assert odd_exports(whole, [("frozen", version)], may_be_read=False) == {}


def test_state_that_is_parked_must_be_there():
    whole = case("cohorts")
    assert (whole.about["frozen"], whole.about["cohorts"]) == ([False, True, False], [0, 1, 0])
    dropped = {**whole.about, "cohorts": [0, -1, 0]}
    arrays = dict(whole.exported["leaves"])
    parked = [i for i, x in enumerate(whole.about["leaves"]) if x["path"].endswith("mu/b")]
    del arrays[f"{parked[0]:06d}"]
    versions = [
        ("the plan has it not", telling(whole.exported, dropped)),
        ("the arrays have it not", {**whole.exported, "leaves": arrays}),
    ]
    assert odd_exports(whole, versions, may_be_read=False) == {}
    fewer = [x for x in whole.about["leaves"] if x["path"] != "inner/1/mu/b"]
    neither = telling(whole.exported, {**whole.about, "leaves": fewer})
    assert odd_exports(whole, [("entries", neither)], may_be_read=False) == {}


def test_numbers_do_not_become_a_key():
    whole = case("small")
    (entry,) = whole.about["leaves"]
    about = {**whole.about, "leaves": [{**entry, "key": "threefry2x32"}]}
    keys = np.zeros((*entry["shape"], 2), np.uint32)
    version = {**telling(whole.exported, about), "leaves": {"000000": keys}}
    assert odd_exports(whole, [("key", version)], may_be_read=False) == {}


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_a_key_does_not_become_one_of_another_kind(impl):
    tx = fo.freezable(optax.add_noise(0.1, 0.5, key=jax.random.key(1, impl=impl)))
    exported = fo.export_state(tx.init(PARAMS))
    about = about_of(exported)
    kinds = ["rbg", "unsafe_rbg", "threefry2x32", "fry", "", "os.system", None, 3, True, [impl], {}]
    versions = []
    for kind in kinds:
        if kind == impl:
            continue
        entries = [{**x, "key": kind} if "key" in x else x for x in about["leaves"]]
        versions.append((repr(kind), telling(exported, {**about, "leaves": entries})))
    whole = Case(tx, PARAMS, None, exported)
    assert odd_exports(whole, [("own", exported)]) == {}
    assert odd_exports(whole, versions, may_be_read=False) == {}


VERSIONS = [0, 3, 10, "1.0", "1 ", "one", None]


@pytest.mark.parametrize("version", VERSIONS, ids=repr)
def test_another_version_is_told_by_its_name_whatever_else_it_has(version):
    whole = case("small")
    name = f"freeze_optax state, version {version}"
    for others in (whole.about, {}, {"data": [1]}, {**whole.about, "paths": {"w": 0}}):
        with pytest.raises(ValueError, match=OURS) as caught:
            fo.import_state(
                whole.tx, whole.params, telling(whole.exported, {**others, "format": name})
            )
        assert repr(name) in str(caught.value)
        assert "'freeze_optax state, version 1'" in str(caught.value)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_of_this_version_is_not_told_to_be_of_another(name):
    whole = case(name)
    for key in ("frozen", "cohorts"):
        about = {**whole.about, key: whole.about[key][1:]}
        with pytest.raises(ValueError, match=OURS) as caught:
            fo.import_state(whole.tx, whole.params, telling(whole.exported, about))
        assert "version 1', not" not in str(caught.value)


def test_names_that_are_code_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "__import__('pathlib').Path('evil').touch()"
    tree = {evil: jnp.ones(2), "{0.__class__}": jnp.ones(2), "%s%n": jnp.ones(2)}
    tx = fo.freezable(ADAM, fo.where(lambda path, leaf: path == evil))
    state = tx.init(tree)
    restored = fo.import_state(tx, tree, fo.export_state(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    with pytest.raises(ValueError, match=r"only in it: '%s%n', \"__import__\('pathlib'\)"):
        fo.import_state(tx, {"w": jnp.ones(2)}, fo.export_state(state))
    assert list(tmp_path.iterdir()) == []


def test_two_entries_that_change_their_arrays_keep_their_places():
    whole = case("cohorts")
    entries = whole.about["leaves"]
    alike = [i for i, x in enumerate(entries) if x["path"] in ("inner/1/mu/a", "inner/1/nu/a")]
    first, second = (f"{i:06d}" for i in alike)
    arrays = whole.exported["leaves"]
    swapped = {**arrays, first: arrays[second], second: arrays[first]}
    state = fo.import_state(whole.tx, whole.params, {**whole.exported, "leaves": swapped})
    mu, nu = (optax.tree_utils.tree_get(state, name)["a"] for name in ("mu", "nu"))
    assert (bits(mu), bits(nu)) == (bits(arrays[second]), bits(arrays[first]))
    assert Case(whole.tx, whole.params, state, fo.export_state(state)).about == whole.about
