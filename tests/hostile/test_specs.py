"""Specs that are none, wherever a spec goes: an error that says which, and nothing has changed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"encoder": {"bias": jnp.ones(2), "kernel": jnp.ones(2)}, "head": jnp.ones(2)}
INNER = optax.sgd(0.5, momentum=0.9)
TX = fo.freezable(INNER, "encoder/bias")
STATE = TX.init(PARAMS)
OTHER = fo.freezable(INNER).init({"other": jnp.ones(2)})


def loss(params: Any) -> jax.Array:
    return sum(x.sum() for x in jax.tree.leaves(params))


def body(carry: Any, layer: Any) -> tuple[Any, Any]:
    return carry, layer["head"]


# Everything that takes a spec.
TAKES_A_SPEC: dict[str, Callable[[Any], Any]] = {
    "mask": lambda spec: fo.mask(spec, PARAMS),
    "labels": lambda spec: fo.labels(spec, PARAMS),
    "rows": lambda spec: fo.mask(fo.rows(spec, [0]), PARAMS),
    "a list": lambda spec: fo.mask(["head", spec], PARAMS),
    "partition": lambda spec: fo.partition(PARAMS, spec),
    "hold": lambda spec: fo.hold(PARAMS, PARAMS, spec),
    "grad": lambda spec: fo.grad(loss, spec)(PARAMS),
    "value_and_grad": lambda spec: fo.value_and_grad(loss, spec, holes=True)(PARAMS),
    "apply_updates": lambda spec: fo.apply_updates(PARAMS, PARAMS, spec),
    "scan": lambda spec: fo.scan(body, 0.0, PARAMS, spec),
    "freezable": lambda spec: fo.freezable(INNER, spec).init(PARAMS),
    "freeze": lambda spec: fo.freeze(STATE, PARAMS, spec),
    "thaw": lambda spec: fo.thaw(STATE, PARAMS, spec),
    "set_frozen": lambda spec: fo.set_frozen(STATE, PARAMS, spec),
    "Phases": lambda spec: fo.Phases({0: spec}).validate(PARAMS),
    "scheduled": lambda spec: fo.scheduled(INNER, fo.Phases({0: spec})).init(PARAMS),
    "import_state": lambda spec: fo.import_state(TX, PARAMS, fo.export_state(STATE), spec),
    "summary": lambda spec: fo.summary(PARAMS, spec),
    "assert_frozen": lambda spec: fo.testing.assert_frozen(PARAMS, PARAMS, spec),
}
IS_NO_SPEC = "the mask at '' is {}, not a bool; a spec is a path glob, a selector"
NO_SPECS: dict[str, tuple[Any, str]] = {
    "int": (3, IS_NO_SPEC.format("int")),
    "zero": (0, IS_NO_SPEC.format("int")),
    "float": (math.nan, IS_NO_SPEC.format("float")),
    "bytes": (b"head", IS_NO_SPEC.format("bytes")),
    "set": ({"head"}, IS_NO_SPEC.format("set")),
    "range": (range(2), IS_NO_SPEC.format("range")),
    "slice": (slice(1), IS_NO_SPEC.format("slice")),
    "ellipsis": (..., "Ellipsis is an NNX filter, which selects Variables, but the tree, a dict"),
    "package": (jax, IS_NO_SPEC.format("module")),
    "array": (np.ones(2), IS_NO_SPEC.format(r"ndarray\(2,\)")),
    "phases": (fo.Phases({0: "head"}), IS_NO_SPEC.format("Phases")),
    "summary": (fo.summary(PARAMS), IS_NO_SPEC.format("Summary")),
    "plan": (STATE.plan, IS_NO_SPEC.format("Plan")),
    "params": (PARAMS, r"the mask at 'encoder/bias' is ArrayImpl\(2,\), not a bool"),
    "rows of bools": (
        {"encoder": True, "head": np.ones((2, 3), bool)},
        r"the mask at 'head' is of shape \(2, 3\), but the leaf",
    ),
    "numbers": ({"encoder": 0, "head": 1}, "the mask at 'encoder' is int, not a bool"),
    "words": ({"encoder": "yes", "head": True}, r"'encoder' is str.*write fo\.labelled\("),
    "labels": (fo.labels("head", PARAMS), r"'encoder/bias' is str.*write fo\.labelled\("),
    "square": ({"encoder": True, "head": np.ones((2, 2), bool)}, r"'head' is of shape \(2, 2\)"),
    "objects": ({"encoder": True, "head": np.array([True, None])}, r"'head' is ndarray\(2,\)"),
    "hole": ({"encoder": True, "head": optax.MaskedNode()}, "'head' is MaskedNode, not a bool"),
    "abstract": (
        {"encoder": True, "head": jax.ShapeDtypeStruct((), bool)},
        "the mask at 'head' is ShapeDtypeStruct",
    ),
    "vector": ({"encoder": True, "head": np.ones(3, bool)}, "'head' has 3 bools, one for each row"),
    "None at a leaf": ({"encoder": None, "head": True}, "nothing for 'encoder/bias', 'encoder/k"),
    "too shallow": ({"encoder": True}, "nothing for 'head' of the tree"),
    "too deep": ({"encoder": True, "head": {"x": True}}, "'head/x', which the tree does not have"),
    "one too many": ({"encoder": True, "head": True, "tail": True}, "it has 'tail', which the"),
    "empty": ({}, "nothing for 'encoder/bias'"),
    "export": (fo.export_state(STATE), "'about', 'leaves/000000'"),
    "other state": (OTHER, "only in the state: 'other'"),
    "two states": ((STATE, STATE), "2 FreezeStates does not say which to follow"),
    "pattern": ("tail", "pattern 'tail' selects no leaf; "),
    "empty pattern": ("", "pattern '' selects no leaf; "),
    "slash before": ("/head", "pattern '/head' selects no leaf; nearest: 'head'"),
    "slash behind": ("head/", "pattern 'head/' selects no leaf; nearest: 'head'"),
    "two slashes": ("encoder//bias", "'encoder//bias' selects no leaf; nearest: 'encoder/bias'"),
    "regex": (fo.regex("hea"), "regex 'hea' selects no leaf; nearest: 'head'"),
    "layers": (fo.layers("tail")[:0], r"layers\('tail'\) names no node"),
    "label": (fo.labelled({"encoder": "x", "head": "y"}, "z"), "label 'z' is at no leaf"),
    "label tree": (fo.labelled({"encoder": "x"}, "x"), "the label tree.* nothing for 'head'"),
    "module": (fo.by_module(lambda module, path: True), r"the tree, a dict, holds none.*modules="),
    "type": (fo.of_type(list), r"of_type\(list\)"),
    "predicate": (fo.where(lambda path, leaf: 1), "gave 1 at 'encoder/bias'; it must give True"),
    "row": (fo.rows("head", [2]), r"the leaf 'head' is of shape \(2,\), so row 2 is out of range"),
    "sum": (fo.everything - fo.path("tail"), "pattern 'tail' selects no leaf"),
}
# In a list several states are their union, and a tree without leaves is no mask of a leaf.
IN_A_LIST = {"two states", "empty"}
CASES = [
    (takes, name)
    for takes in TAKES_A_SPEC
    for name in NO_SPECS
    if takes != "a list" or name not in IN_A_LIST
]


def refused(takes: str, match: str, spec: Any) -> None:
    """Asserts that it is, and that the state is what it was, and goes on."""
    before, structure = jax.tree.leaves(STATE), jax.tree.structure(STATE)
    with pytest.raises((ValueError, TypeError), match=match):
        TAKES_A_SPEC[takes](spec)
    assert all(x is y for x, y in zip(jax.tree.leaves(STATE), before, strict=True))
    assert jax.tree.structure(STATE) == structure
    updates, _ = TX.update(PARAMS, STATE, PARAMS)
    assert updates["head"].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(("takes", "name"), CASES)
def test_what_is_no_spec_is_named_and_changes_nothing(takes, name):
    spec, match = NO_SPECS[name]
    refused(takes, match, spec)


# What a function gives is a mask, nothing else.
@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "nothing for 'encoder/bias'"),
        (3, "the mask at '' is int"),
        ("head", r"the mask at '' is str, not a bool; for labels write fo\.labelled\("),
        (fo.path("head"), "the mask at '' is Path, not a bool; a spec is a path glob"),
        (len, "the mask at '' is builtin_function_or_method, not a bool"),
        (STATE, "which the tree does not have"),
        (PARAMS, "the mask at 'encoder/bias' is ArrayImpl"),
    ],
    ids=str,
)
@pytest.mark.parametrize("takes", TAKES_A_SPEC)
def test_a_function_that_gives_no_mask_is_named_and_changes_nothing(takes, given, match):
    refused(takes, match, lambda tree: given)


@pytest.mark.parametrize("takes", TAKES_A_SPEC)
@pytest.mark.parametrize(
    "error", [KeyError("mine"), UnicodeDecodeError("utf8", b"x", 0, 1, "mine")]
)
def test_an_error_of_a_users_function_reaches_the_user(takes, error):
    def fails(tree: Any) -> Any:
        raise error

    with pytest.raises(type(error), match="mine") as caught:
        TAKES_A_SPEC[takes](fails)
    assert caught.value is error
    TX.update(PARAMS, STATE, PARAMS)


# What is likely passed by mistake: the error has to say what to pass instead.


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (None, r"fo\.nothing"),
        (TX, "transformation"),
        (INNER, "transformation"),
        (INNER.init(PARAMS), "FreezeState"),
        (optax.masked(INNER, True).init(PARAMS), "FreezeState"),
    ],
    ids=["None", "a freezable", "an optimizer", "its state", "the state of masked"],
)
def test_a_likely_mistake_is_told_what_to_write_instead(spec, match):
    with pytest.raises((ValueError, TypeError), match=match):
        fo.grad(loss, frozen=spec)(PARAMS)


@pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")
def test_a_generator_is_no_spec():
    with pytest.raises(TypeError, match="the mask at '' is generator, not a bool; a spec is"):
        fo.mask((name for name in ["head"]), PARAMS)


def test_labels_that_are_arrays_are_named_by_their_path():
    labels = {"encoder": np.arange(2), "head": "hot"}
    with pytest.raises((ValueError, TypeError), match="'encoder"):
        fo.mask(fo.labelled(labels, "hot"), PARAMS)


@pytest.mark.parametrize("index", [slice("a", "b"), slice(1.5), slice(None, None, 0)], ids=str)
def test_layers_name_themselves_where_a_slice_is_none_of_ints(index):
    with pytest.raises((ValueError, TypeError), match=r"layers"):
        fo.mask(fo.layers("*")[index], PARAMS)


@pytest.mark.parametrize("predicate", [None, "head", 3, PARAMS])
def test_where_names_itself_where_its_predicate_is_no_function(predicate):
    with pytest.raises(TypeError, match=r"fo\.where"):
        fo.mask(fo.where(predicate), PARAMS)


# As many selectors as there are layers in a model, or more.


@pytest.mark.parametrize("operator", ["__or__", "__and__", "__sub__"])
def test_thousands_of_selectors_may_be_joined(operator):
    names = ["head", *["head" if operator == "__and__" else "encoder/bias"] * 2000]
    joined = functools.reduce(lambda a, b: getattr(a, operator)(b), map(fo.path, names))
    expected = {"encoder": {"bias": operator == "__or__", "kernel": False}, "head": True}
    assert fo.mask(joined, PARAMS) == expected
    assert repr(joined).count("path(") == 2001


def test_a_list_of_thousands_of_patterns_is_their_union():
    expected = {"encoder": {"bias": True, "kernel": False}, "head": True}
    assert fo.mask(["head", *["encoder/bias"] * 2000], PARAMS) == expected
