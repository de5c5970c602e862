"""A selector reads as one would write it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo

PARAMS = {
    "encoder": {f"layer_{i}": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))} for i in range(12)},
    "it's": jnp.ones(3),
    "head": {"kernel": jnp.ones((2, 3))},
}


def is_matrix(path: str, leaf: Any) -> bool:
    return leaf.ndim > 1


# Those whose text is Python for the selector itself, with that text.
ROUND_TRIPS = [
    (fo.path("encoder"), "path('encoder')"),
    (fo.path("encoder/layer_{0..9}", "**/bias"), "path('encoder/layer_{0..9}', '**/bias')"),
    (fo.path("it's"), 'path("it\'s")'),
    (fo.regex(r".*layer_\d+/bias"), r"regex('.*layer_\\d+/bias')"),
    (fo.regex("encoder.*", "head.*"), "regex('encoder.*', 'head.*')"),
    (fo.layers("encoder/*"), "layers('encoder/*')"),
    (fo.layers("encoder/*")[0], "layers('encoder/*')[0]"),
    (fo.layers("encoder/*")[-3], "layers('encoder/*')[-3]"),
    (fo.layers("encoder/*")[np.int64(2)], "layers('encoder/*')[2]"),
    (fo.layers("encoder/*")[:-2], "layers('encoder/*')[:-2]"),
    (fo.layers("encoder/*")[3:], "layers('encoder/*')[3:]"),
    (fo.layers("encoder/*")[:], "layers('encoder/*')[:]"),
    (fo.layers("encoder/*")[1:9:3], "layers('encoder/*')[1:9:3]"),
    (fo.layers("encoder/*")[::-1], "layers('encoder/*')[::-1]"),
    (fo.layers("encoder/*")[np.int64(1) :], "layers('encoder/*')[1:]"),
    (fo.rows("encoder", slice(np.int64(0), 2, 2)), "rows(path('encoder'), slice(0, 2, 2))"),
    (fo.where(is_matrix), "where(is_matrix)"),
    (fo.everything, "everything"),
    (fo.nothing, "nothing"),
    (~fo.path("head"), "~path('head')"),
    (~~fo.path("head"), "~~path('head')"),
    ("encoder" - fo.path("**/bias"), "(path('encoder') - path('**/bias'))"),
    (~("head" | fo.nothing), "~(path('head') | nothing)"),
    (
        fo.path("head") | "encoder" & fo.regex(".*bias"),
        "(path('head') | (path('encoder') & regex('.*bias')))",
    ),
    (
        (fo.path("head") - "**/bias") - "head/kernel",
        "((path('head') - path('**/bias')) - path('head/kernel'))",
    ),
    (fo.rows("head", slice(0, 1)), "rows(path('head'), slice(0, 1))"),
    (
        fo.rows(fo.path("head") | "it's", slice(None, -1)),
        "rows((path('head') | path(\"it's\")), slice(None, -1))",
    ),
    (fo.rows("head", slice(None, None, 2)), "rows(path('head'), slice(None, None, 2))"),
    (fo.rows(["head", "it's"], slice(0, 1)), "rows([path('head'), path(\"it's\")], slice(0, 1))"),
]


@pytest.mark.parametrize(("selector", "text"), ROUND_TRIPS, ids=[text for _, text in ROUND_TRIPS])
def test_what_is_written_makes_the_same_selector(selector, text):
    assert repr(selector) == text
    assert str(selector) == text
    again = eval(text, {**vars(fo), "is_matrix": is_matrix})
    assert plain(again(PARAMS)) == plain(selector(PARAMS))


def plain(mask: Any) -> Any:
    return jax.tree.map(lambda flag: np.asarray(flag).tolist(), mask)


class Counter:
    def __call__(self, path: str, leaf: Any) -> bool:
        return False

    def __repr__(self) -> str:
        return "Counter()"


OTHERS = [
    (fo.labelled({"encoder": "cold", "head": "hot"}, "cold"), "labelled('cold')"),
    (fo.labelled({}, "cold", 0, None), "labelled('cold', 0, None)"),
    (fo.of_type(eqx.nn.Linear), "of_type(Linear)"),
    (fo.of_type(eqx.nn.Linear, eqx.nn.Conv2d), "of_type(Linear, Conv2d)"),
    (
        fo.of_type(eqx.nn.Linear, fields=["bias", "weight"]),
        "of_type(Linear, fields=('bias', 'weight'))",
    ),
    (fo.of_type(eqx.nn.Linear, modules={"a": 1}), "of_type(Linear)"),
    (fo.by_module(is_matrix), "by_module(is_matrix)"),
    (fo.declared(), "declared()"),
    (fo.where(Counter()), "where(Counter())"),
    (fo.rows("head", [0, -1]), "rows(path('head'), 2 indices)"),
    (fo.rows("head", np.zeros(5, bool)), "rows(path('head'), 5 bools)"),
    (fo.rows({"head": True, "encoder": False}, [0]), "rows(mask of 2 leaves, 1 indices)"),
    (~fo.declared() & fo.of_type(eqx.nn.Linear), "(~declared() & of_type(Linear))"),
    (fo.Phases({0: "encoder", 9: ~fo.path("head")}), "Phases({0: 'encoder', 9: ~path('head')})"),
]


@pytest.mark.parametrize(("selector", "text"), OTHERS, ids=[text for _, text in OTHERS])
def test_what_cannot_be_written_is_named(selector, text):
    assert repr(selector) == text


@pytest.mark.parametrize(
    "selector",
    [
        fo.where(lambda path, leaf: True),
        fo.by_module(lambda module, path: True),
        fo.rows(lambda tree: tree, [0]),
    ],
    ids=["where", "by_module", "rows"],
)
def test_a_repr_is_one_short_line_that_no_run_of_python_changes(selector):
    assert len(repr(selector)) < 100
    assert "\n" not in repr(selector)
    assert " at 0x" not in repr(selector)
