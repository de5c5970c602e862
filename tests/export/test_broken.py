"""Exports with entries missing, added or changed: an error that says so, and nothing is built."""

import json
import math
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.broken_exports import (
    MAKERS,
    OURS,
    at,
    bits,
    case,
    odd_exports,
    packed,
    places,
    replaced,
    telling,
    without,
)
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

EACH = pytest.mark.parametrize("name", MAKERS)


@EACH
def test_each_state_is_read_as_it_was(name):
    whole = case(name)
    # Written anew it is read too, so what is changed below is not refused for its checksum.
    for exported in (whole.exported, telling(whole.exported, whole.about)):
        state = fo.import_state(whole.tx, whole.params, exported)
        assert jax.tree.structure(state) == jax.tree.structure(whole.state)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True)
        assert all(bits(new) == bits(old) for new, old in pairs)
    assert odd_exports(whole, [("whole", whole.exported)]) == {}


@EACH
def test_without_any_one_of_its_arrays_it_is_refused(name):
    whole = case(name)
    versions = [(place, without(whole.exported, place)) for place in places(whole.exported)]
    if name == "stateless":  # then there are no arrays to miss
        versions.remove((("leaves",), {"about": whole.exported["about"]}))
    assert odd_exports(whole, versions, may_be_read=False) == {}


@EACH
def test_without_any_one_entry_of_its_text_it_is_refused(name):
    whole = case(name)
    texts = [(place, without(whole.about, place)) for place in places(whole.about)]
    versions = [(place, telling(whole.exported, about)) for place, about in texts]
    assert odd_exports(whole, versions, may_be_read=False) == {}


@EACH
def test_entries_that_are_added_are_refused_or_change_nothing(name):
    whole = case(name)
    dicts = [place for place in [(), *places(whole.about)] if type(at(whole.about, place)) is dict]
    texts = [replaced(whole.about, (*place, "more"), 3) for place in dicts]
    versions = [(place, telling(whole.exported, x)) for place, x in zip(dicts, texts, strict=True)]
    for key in ("000099", "0", "more", "-00001", "../about", "__class__"):
        arrays = {**whole.exported["leaves"], key: np.ones(2, np.float32)}
        versions.append((key, {**whole.exported, "leaves": arrays}))
    versions.append(("step", {**whole.exported, "step": np.int32(7), "params": whole.params}))
    assert odd_exports(whole, versions) == {}


@EACH
def test_an_entry_too_many_in_a_list_is_refused(name):
    whole = case(name)
    lists = [place for place in places(whole.about) if type(at(whole.about, place)) is list]
    versions = []
    for place in lists:
        entries = at(whole.about, place)
        longer = [*entries, entries[-1] if entries else 0]
        versions.append((place, telling(whole.exported, replaced(whole.about, place, longer))))
    assert odd_exports(whole, versions, may_be_read=False) == {}


EVIL = "__import__('os').system('touch evil')"
VALUES = [None, True, -1, math.nan, EVIL, [0], {"a": 0}]
MORE = [0, 2, 1.5, math.inf, "", "0", [], {}]


@EACH
@pytest.mark.parametrize(
    "value", cases({repr(value): value for value in [*VALUES, *MORE]}, [*map(repr, VALUES)])
)
def test_another_value_anywhere_in_its_text_is_refused_or_read_as_it_stands(
    name, value, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    whole = case(name)
    texts = [(place, replaced(whole.about, place, value)) for place in [(), *places(whole.about)]]
    versions = [(place, telling(whole.exported, about)) for place, about in texts]
    assert odd_exports(whole, versions) == {}
    assert list(tmp_path.iterdir()) == []


@EACH
def test_neighbours_that_change_places_are_refused_or_read_as_they_stand(name):
    whole = case(name)
    versions = []
    for place in places(whole.about):
        entries = at(whole.about, place)
        for i in range(1, len(entries) if type(entries) is list else 0):
            swapped = [*entries[: i - 1], entries[i], entries[i - 1], *entries[i + 1 :]]
            about = replaced(whole.about, place, swapped)
            versions.append(((*place, i), telling(whole.exported, about)))
    if versions:
        assert odd_exports(whole, versions) == {}


NO_ARRAYS = {
    "None": lambda x: None,
    "text": lambda x: "000000",
    "a number": lambda x: 3,
    "a list": lambda x: x.tolist(),
    "bytes": lambda x: x.tobytes(),
    "a dict": lambda x: {"000000": x},
    "a class": lambda x: np.float32,
    "an array of text": lambda x: np.full(x.shape, "a"),
    "an array of objects": lambda x: np.full(x.shape, None),
    "an array of records": lambda x: np.zeros(x.shape, [("f", x.dtype)]),
    "an array of dates": lambda x: np.zeros(x.shape, "M8[s]"),
    "another dtype": lambda x: x.astype(np.float64),
    "of no sign": lambda x: x.astype(np.uint64),
    "half": lambda x: x.astype(np.float16),
    "of other bits": lambda x: x.astype(np.complex64),
    "one axis more": lambda x: x[None],
    "one element more": lambda x: np.append(x, x.reshape(-1)[:1]),
    "one element less": lambda x: x.reshape(-1)[1:],
    "the elements in a column": lambda x: x.reshape(-1, 1),
    "of no elements": lambda x: np.zeros((0, *x.shape), x.dtype),
}


@pytest.mark.parametrize("name", ["cohorts", "rows"])
@pytest.mark.parametrize("of", cases(NO_ARRAYS, [*NO_ARRAYS][::2]))
def test_what_is_not_the_array_that_was_exported_is_refused(of, name):
    whole = case(name)
    arrays = whole.exported["leaves"]
    versions = [
        (key, replaced(whole.exported, ("leaves", key), of(x))) for key, x in arrays.items()
    ]
    assert odd_exports(whole, versions, may_be_read=False) == {}


def test_an_array_that_is_not_what_was_exported_is_named():
    whole = case("cohorts")
    for key, entry in zip(whole.exported["leaves"], whole.about["leaves"], strict=True):
        with pytest.raises(ValueError, match=rf"the export is damaged: '{entry['path']}' is str"):
            fo.import_state(
                whole.tx, whole.params, replaced(whole.exported, ("leaves", key), "text")
            )


SAME_ARRAYS = {
    "in the other order of bytes": lambda x: x.astype(x.dtype.newbyteorder()),
    "a NumPy scalar": lambda x: x[()],
    "of jax": jnp.asarray,
    "in another order of axes": np.asfortranarray,
    "not to be written": lambda x: np.broadcast_to(x, x.shape),
    "abstract": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
}


@pytest.mark.parametrize("of", SAME_ARRAYS.values(), ids=SAME_ARRAYS)
def test_the_same_numbers_in_another_form_are_refused_or_read(of):
    whole = case("cohorts")
    arrays = {key: of(x) for key, x in whole.exported["leaves"].items()}
    assert odd_exports(whole, [("whole", {**whole.exported, "leaves": arrays})]) == {}


NO_EXPORTS = {
    "None": None,
    "a list": [],
    "a number": 3,
    "text": "about",
    "bytes": b"about",
    "an array": np.zeros(3, np.uint8),
    "a function": print,
    "an empty dict": {},
    "a dict of None": {"about": None, "leaves": None},
    "dicts in a dict": {"about": {"about": {"about": 3}}, "leaves": {}},
    "params": {"encoder": np.ones(2), "leaves": {}},
}


@pytest.mark.parametrize("given", NO_EXPORTS.values(), ids=NO_EXPORTS)
def test_what_is_no_export_is_refused(given):
    assert odd_exports(case("small"), [("given", given)], may_be_read=False) == {}


@EACH
def test_a_state_that_was_not_exported_is_refused(name):
    whole = case(name)
    versions = [("state", whole.state), ("in a dict", {"about": whole.state, "leaves": {}})]
    assert odd_exports(whole, versions, may_be_read=False) == {}


NO_LEAVES = [None, 3, "000000", [], [np.ones(2)], np.ones(1), np.ones(2), np.zeros(0), {"a": {}}]


@pytest.mark.parametrize("leaves", NO_LEAVES, ids=repr)
def test_arrays_that_are_no_dict_are_refused(leaves):
    version = {**case("small").exported, "leaves": leaves}
    assert odd_exports(case("small"), [("leaves", version)], may_be_read=False) == {}


NO_TEXT = {
    "nothing": b"",
    "a number": b"3",
    "null": b"null",
    "a list": b"[]",
    "no JSON": b"{",
    "no text": b"\xff\xfe\xfa",
    "zeros": bytes(9),
    "a pickle": b"\x80\x04N.",
    "a number of many digits": b"9" * 10_000,
    "code": EVIL.encode(),
}


@pytest.mark.parametrize("text", NO_TEXT.values(), ids=NO_TEXT)
def test_a_text_that_is_none_is_refused(text):
    version = {**case("small").exported, "about": packed(text)}
    assert odd_exports(case("small"), [("text", version)], may_be_read=False) == {}


@pytest.mark.parametrize(
    "about", [np.full(3, np.nan), np.ones(3, complex), np.full(9, "{"), np.full(3, None), 7, "{}"]
)
def test_a_text_in_another_dtype_is_refused(about):
    version = {**case("small").exported, "about": about}
    assert odd_exports(case("small"), [("about", version)], may_be_read=False) == {}


@pytest.mark.parametrize("level", ["[", '{"a":'], ids=["lists", "dicts"])
def test_a_text_that_is_nested_deep_is_refused(level):
    whole = case("small")
    text = json.dumps(whole.about)
    versions = []
    for depth in (100, *range(900, 1_000, 11), 5_000, 100_000):
        nested = level * depth + "0" + {"[": "]", "{": "}"}[level[0]] * depth
        versions.append((depth, {**whole.exported, "about": packed(nested)}))
        for key in ("format", "paths", "schedule", "parts", "leaves"):
            was = json.dumps(whole.about[key])
            about = packed(text.replace(f'"{key}": {was}', f'"{key}": {nested}', 1))
            versions.append(((depth, key), {**whole.exported, "about": about}))
        versions.append(((depth, "cut"), {**whole.exported, "about": packed(level * depth)}))
    assert odd_exports(whole, versions, may_be_read=False) == {}


def test_arrays_that_are_nested_deep_are_refused():
    nested = np.ones(2, np.float32)
    for _ in range(100_000):
        nested = {"000000": nested}
    version = {**case("small").exported, "leaves": nested}
    assert odd_exports(case("small"), [("nested", version)], may_be_read=False) == {}


@pytest.mark.parametrize("name", ["rows", "phases"])
@pytest.mark.parametrize("count", [10**12, -(10**400)], ids=["10**12", "-10**400"])
def test_a_number_that_is_huge_is_refused_and_takes_no_memory(count, name):
    whole = case(name)
    numbers = [place for place in places(whole.about) if type(at(whole.about, place)) is int]
    texts = [(place, replaced(whole.about, place, count)) for place in numbers]
    versions = [(place, telling(whole.exported, about)) for place, about in texts]
    tracemalloc.start()
    odd = odd_exports(whole, versions, may_be_read=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert odd == {}
    assert peak < 5_000_000


def test_as_many_paths_as_a_text_can_hold_take_no_more_memory_than_a_few_times_the_text():
    whole = case("small")
    many = 20_000
    about = {**whole.about, "paths": ["w"] * many, "cohorts": [0] * many, "frozen": [0] * many}
    entries = {**whole.about, "leaves": whole.about["leaves"] * many}
    for text in (about, entries):
        version = telling(whole.exported, text)
        tracemalloc.start()
        odd = odd_exports(whole, [("many", version)], may_be_read=False)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert odd == {}
        assert peak < 2_000_000 + 30 * version["about"].size


def test_an_export_may_be_any_mapping():
    whole = case("cohorts")
    arrays = types.MappingProxyType(whole.exported["leaves"])
    exported = types.MappingProxyType({**whole.exported, "leaves": arrays})
    assert odd_exports(whole, [("proxy", {**exported})]) == {}
    state = fo.import_state(whole.tx, whole.params, exported)
    assert jax.tree.structure(state) == jax.tree.structure(whole.state)


def test_a_spec_that_does_not_fit_is_refused_after_an_export_that_does():
    whole = case("small")
    with pytest.raises(ValueError, match="pattern 'v' selects no leaf"):
        fo.import_state(whole.tx, whole.params, whole.exported, frozen="v")
    cut = {**whole.exported, "leaves": {}}
    with pytest.raises(ValueError, match=OURS):
        fo.import_state(whole.tx, whole.params, cut, frozen=fo.nothing)


def test_a_transformation_that_is_not_freezable_is_told_before_the_params_are_touched():
    whole = case("small")
    with pytest.raises(TypeError, match="holds no FreezeState"):
        fo.import_state(optax.trace(0.9), whole.params, whole.exported)
