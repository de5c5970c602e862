"""`groups`: labels by the first rule that selects a leaf, in optax and in our own specs."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import freeze_optax as fo
from freeze_optax.testing import assert_frozen

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {
    "embed": jnp.ones((4, 2)),
    "layer_0": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
    "layer_1": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
    "steps": jnp.arange(3),
}
RULES = {"embed": "frozen", "**/bias": "plain", fo.everything: "decayed"}
LABELS = {
    "embed": "frozen",
    "layer_0": {"bias": "plain", "kernel": "decayed"},
    "layer_1": {"bias": "plain", "kernel": "decayed"},
    "steps": "decayed",
}
SPECS: dict[str, Any] = {
    "path": fo.path("**/bias"),
    "list": ["layer_0/bias", "layer_1/bias"],
    "regex": fo.regex(".*/bias"),
    "where": fo.where(lambda path, leaf: path.endswith("bias") and leaf.ndim == 1),
    "labelled": fo.labelled(lambda tree: jax.tree.map(lambda x: x.ndim, tree), 1) - fo.path("st*"),
    "mask": fo.mask("**/bias", PARAMS) | {"steps": False},
    "algebra": ~(fo.path("**/kernel") | fo.path("embed", "steps")),
    "a state": fo.freezable(optax.sgd(0.1), ["*/bias"]).init(PARAMS),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_first_rule_that_selects_a_leaf_gives_its_label(name):
    spec = [SPECS[name]] if isinstance(SPECS[name], str) else SPECS[name]
    # A state selects what cannot be trained too.
    expected = LABELS | ({"steps": "plain"} if name == "a state" else {})
    for rules in (
        [("embed", "frozen"), (spec, "plain"), (fo.everything, "decayed")],
        [["embed", "frozen"], [spec, "plain"], [True, "decayed"]],
    ):
        assert fo.groups(rules)(PARAMS) == expected
    assert fo.groups([("embed", "frozen"), (spec, "plain")], default="decayed")(PARAMS) == expected


def test_any_hashable_value_is_a_label_and_equal_labels_may_stand_in_several_rules():
    rules = {"embed": 0, "layer_0": (1, "x"), "layer_1/bias": 0, True: False}
    expected = {
        "embed": 0,
        "layer_0": {"bias": (1, "x"), "kernel": (1, "x")},
        "layer_1": {"bias": 0, "kernel": False},
        "steps": False,
    }
    assert fo.groups(rules)(PARAMS) == expected


def test_labels_are_those_of_any_tree_abstract_ones_too():
    abstract = jax.eval_shape(lambda: PARAMS)
    assert fo.groups(RULES)(abstract) == LABELS
    assert fo.groups(RULES)(FrozenDict(PARAMS)) == FrozenDict(LABELS)
    assert fo.groups({True: "all"})(jnp.ones(2)) == "all"
    make = lambda key: eqx.nn.Linear(2, 2, key=key)  # noqa: E731
    model = jax.eval_shape(lambda key: eqx.nn.Sequential([make(key), make(key)]), jax.random.key(0))
    by_type = fo.groups({fo.of_type(eqx.nn.Linear, fields=("weight",)): "matrix"}, default="other")
    labels = by_type(model)
    assert [layer.weight for layer in labels.layers] == ["matrix"] * 2
    assert [layer.bias for layer in labels.layers] == ["other"] * 2


def test_holes_stay_and_among_them_a_rule_may_win_nothing():
    trainable, rest = fo.partition(PARAMS, "embed")
    hole = optax.MaskedNode()
    found = fo.groups(RULES)(trainable)
    assert found == {**LABELS, "embed": hole, "steps": hole}
    assert fo.groups(RULES)(rest)["embed"] == "frozen"
    only_embed = {fo.where(lambda path, leaf: leaf.shape == (4, 2)): "frozen", True: "decayed"}
    assert fo.groups(only_embed)(trainable)["layer_0"] == {"bias": "decayed", "kernel": "decayed"}


LOUD = {
    "matches nothing": (
        {"embed": "a", fo.where(lambda path, leaf: leaf.ndim == 7): "b"},
        r"rule 2 of fo.groups, where\(.*\), selects no leaf",
    ),
    "a pattern that matches nothing": ({"embd": "a"}, "pattern 'embd' selects no leaf"),
    "an empty selection": ({fo.nothing: "a", True: "b"}, "rule 1 of fo.groups, nothing, selects"),
    "shadowed": (
        {True: "a", "embed": "b"},
        r"rule 2 of fo.groups, path\('embed'\), wins no leaf: all that it selects \('embed'\) goes "
        "by rule 1 of fo.groups, everything, before it",
    ),
    "shadowed by two": (
        {"layer_0": "a", "layer_1": "b", "layer_*": "c"},
        r"rule 3 .* goes by rule 1 of .*'layer_0'\), and rule 2 of .*'layer_1'\), before it",
    ),
    "no rule": (
        {"embed": "a"},
        "no rule of fo.groups selects 'layer_0/bias', 'layer_0/kernel', .*default is None",
    ),
    "rows": ({fo.rows("embed", [0]): "a", True: "b"}, "rule 1 .* selects a part of 'embed'"),
    "elements": (
        {fo.elements("embed", np.eye(4, 2, dtype=bool)): "a", True: "b"},
        "rule 1 of .* selects a part of 'embed' .*a label is for a whole leaf",
    ),
}


@pytest.mark.parametrize("name", LOUD)
def test_rules_that_do_not_fit_the_tree_are_an_error(name):
    rules, error = LOUD[name]
    with pytest.raises(ValueError, match=error):
        fo.groups(rules)(PARAMS)


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ("embed", "takes rules, a mapping from spec to label or a list of pairs.* got 'embed'"),
        (["embed"], "got 'embed'"),
        ([("embed", "a", "b")], re.escape("got ('embed', 'a', 'b')")),
        (None, "got None"),
        ({"embed": None}, "None for path.*, but None is no label"),
    ],
)
def test_what_are_no_rules_is_an_error_at_once(rules, error):
    with pytest.raises(TypeError, match=error):
        fo.groups(rules)


GROUPS = {"plain": optax.adam(0.1), "decayed": optax.adamw(0.1, weight_decay=0.5)}


@pytest.mark.parametrize("order", ["partition inside", "partition alone"])
def test_one_table_gives_several_optimizers_and_a_frozen_group(order):
    params = {name: x for name, x in PARAMS.items() if name != "steps"}
    groups = fo.groups(RULES)
    if order == "partition inside":
        tx = fo.freezable(optax.partition(GROUPS, groups), fo.labelled(groups, "frozen"))
    else:
        tx = optax.partition({**GROUPS, "frozen": optax.set_to_zero()}, groups)
    state, trained = tx.init(params), params
    for _ in range(2):
        updates, state = tx.update(params, state, trained)
        trained = fo.apply_updates(trained, updates)

    def alone(leaf: Any, label: str) -> Any:
        if label == "frozen":
            return leaf
        state, trained = GROUPS[label].init(leaf), leaf
        for _ in range(2):
            updates, state = GROUPS[label].update(leaf, state, trained)
            trained = optax.apply_updates(trained, updates)
        return trained

    expected = {name: x for name, x in LABELS.items() if name != "steps"}
    assert_frozen(jax.tree.map(alone, params, expected), trained, True)


def test_a_group_can_be_thawed_and_frozen_by_its_name():
    groups = fo.groups(RULES)
    tx = fo.freezable(optax.partition({**GROUPS, "frozen": optax.sgd(0.1)}, groups))
    state = fo.freeze(tx.init(PARAMS), PARAMS, fo.labelled(groups, "frozen", "plain"))
    assert fo.mask(state, PARAMS) == fo.mask(["embed", "**/bias"], PARAMS)
    state = fo.thaw(state, PARAMS, fo.labelled(groups, "plain"))
    assert fo.mask(state, PARAMS) == fo.mask("embed", PARAMS)
    with pytest.raises(ValueError, match="'fine'"):
        fo.thaw(state, PARAMS, fo.labelled(groups, "fine"))


def test_the_labels_of_holes_fit_what_optax_masks():
    # A rule that reads leaves does not see those that are frozen, and is no error for it.
    by_shape = {fo.where(lambda path, leaf: leaf.shape == (4, 2)): "embed", True: "rest"}
    inner = optax.partition({"embed": optax.sgd(1.0), "rest": optax.sgd(0.5)}, fo.groups(by_shape))
    params = {name: x for name, x in PARAMS.items() if name != "steps"}
    tx = fo.freezable(inner, "embed")
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    scale = {"embed": -0.0, "layer_0": -0.5, "layer_1": -0.5}
    expected = {key: jax.tree.map(lambda x, k=key: x * scale[k], params[key]) for key in params}
    assert_frozen(expected, updates, True)
    updates, _ = tx.update(params, fo.thaw(state, params, "embed"), params)
    assert_frozen(expected | {"embed": -params["embed"]}, updates, True)
