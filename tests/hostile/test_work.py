"""Twice the leaves are twice the work: calls and comparisons are counted, nothing is timed."""

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import freeze_optax as fo
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

INNER = optax.sgd(0.1, momentum=0.9)
ODD = "w*[13579]"
Prepared = Callable[[], Any]


def wide(count: int) -> dict[str, Any]:
    return {f"w{i}": np.full(1, i, np.float32) for i in range(count)}


def work(call: Prepared) -> int:
    """How many functions are called, of Python and of C."""
    count = 0

    def on_event(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        with contextlib.suppress(ValueError, AssertionError):
            call()
    finally:
        sys.setprofile(None)
    return count


def of(call: Callable[[Any], Any], tree: Callable[[int], Any] = wide) -> Callable[[int], Prepared]:
    return lambda count: functools.partial(call, tree(count))


def edited(call: Callable[[Any, Any, Any], Any]) -> Callable[[int], Prepared]:
    """With params, a transformation, and its state, in which some leaves are parked."""

    def prepare(count: int) -> Prepared:
        tx, params = fo.freezable(INNER, ODD), wide(count)
        state = fo.freeze(tx.init(params), params, "w*0", keep_state=True)
        return functools.partial(call, tx, params, state)

    return prepare


def with_none(tx: Any, params: Any, state: Any) -> None:
    grads = {name: leaf if name[-1] in "2468" else None for name, leaf in params.items()}
    tx.update(grads, state, params)


def shown(form: Callable[[Any], Any], *arguments: Any) -> Callable[[int], Prepared]:
    return of(lambda params: form(fo.summary(params, ODD, *arguments, depth=1)))


def norms(count: int) -> list[Any]:
    return [eqx.nn.LayerNorm(1) for _ in range(count // 4)]


NORM = eqx.nn.LayerNorm
WORK = {
    "mask": of(lambda params: fo.mask(ODD, params)),
    "labels": of(lambda params: fo.labels(ODD, params)),
    "layers": of(lambda params: fo.mask(fo.layers("w*")[:-2], params)),
    "where": of(lambda params: fo.mask(fo.where(lambda path, leaf: True), params)),
    "labelled": of(lambda params: fo.mask(fo.labelled(fo.labels(ODD, params), "frozen"), params)),
    "rows": of(lambda params: fo.mask(fo.rows(ODD, [0]), params)),
    "of_type": of(lambda model: fo.mask(fo.of_type(NORM), model), norms),
    "fields": of(lambda model: fo.mask(fo.of_type(NORM, fields=("bias",)), model), norms),
    "by_module": of(
        lambda model: fo.mask(fo.by_module(lambda module, path: ("bias",)), model), norms
    ),
    "declared": of(lambda model: fo.mask(fo.declared(), model), norms),
    "a mask of another type": of(lambda params: fo.mask(fo.mask(ODD, params), FrozenDict(params))),
    "a mask of other names": of(
        lambda params: fo.mask({f"v{name}": True for name in params}, params)
    ),
    "a pattern in vain": of(lambda params: fo.mask("v3", params)),
    "partition": of(lambda params: fo.merge(*fo.partition(params, ODD))),
    "hold": of(lambda params: fo.hold(params, params, ODD)),
    "apply_updates": of(lambda params: fo.apply_updates(params, params, ODD)),
    "tied_paths": of(fo.tied_paths),
    "one buffer": of(lambda params: fo.tied_paths(dict.fromkeys(params, params["w0"]))),
    "init": of(lambda params: fo.freezable(INNER, ODD).init(params)),
    "update": edited(lambda tx, params, state: tx.update(params, state, params)),
    "update with None": edited(with_none),
    "freeze": edited(lambda tx, params, state: fo.freeze(state, params, "w*2")),
    "thaw": edited(lambda tx, params, state: fo.thaw(state, params, True)),
    "set_frozen": edited(lambda tx, params, state: fo.set_frozen(state, params, "w*2")),
    "params in another order": edited(
        lambda tx, params, state: fo.thaw(state, OrderedDict(reversed(params.items())), True)
    ),
    "release": edited(lambda tx, params, state: fo.release(state, params)),
    "export_state": edited(lambda tx, params, state: fo.export_state(state)),
    "import_state": edited(
        lambda tx, params, state: fo.import_state(tx, params, fo.export_state(state))
    ),
    "repr": edited(lambda tx, params, state: repr(state)),
    "assert_frozen": of(
        lambda params: fo.testing.assert_frozen(params, dict.fromkeys(params, params["w0"]), True)
    ),
    "summary": of(lambda params: str(fo.summary(params, ODD, INNER))),
    "text": shown(str),
    "markdown": shown(lambda summary: summary.to_markdown()),
    "dict": shown(lambda summary: summary.to_dict()),
    "text with an optimizer": shown(str, INNER),
}


# Those that call others of the table, each.
MOST = ["layers", "labelled", "rows", "of_type", "declared", "a mask of another type", "partition"]
MOST += [
    "hold",
    "tied_paths",
    "update",
    "thaw",
    "release",
    "import_state",
    "text with an optimizer",
]
MOST += ["a pattern in vain", "params in another order"]


@pytest.mark.parametrize("name", cases({name: name for name in WORK}, MOST))
def test_twice_the_leaves_are_no_more_than_twice_the_work(name):
    prepare, count = WORK[name], 200
    work(prepare(8))  # what jax compiles and caches once
    once, twice = work(prepare(count)), work(prepare(2 * count))
    assert once > count
    assert twice < 2.3 * once


class Compared(str):
    """A string that counts how often it is compared."""

    __slots__ = ()
    count = 0

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def in_pairs(paths: list[str]) -> list[tuple[str, str]]:
    return list(zip(paths[::2], paths[1::2], strict=True))


COMPARING = {
    "assign": lambda params, paths: fo.assign(params, dict.fromkeys(paths, 0.0)),
    "tie of pairs": lambda params, paths: fo.tie(INNER, *in_pairs(paths)).init(params),
    "tie of one group": lambda params, paths: fo.tie(INNER, paths),
}


@pytest.mark.parametrize("name", COMPARING)
def test_a_path_that_is_given_is_not_compared_with_every_leaf(name):
    count = 400
    params = wide(count)
    paths = list(map(Compared, params))
    Compared.count = 0
    COMPARING[name](params, paths)
    assert Compared.count < 20 * count
