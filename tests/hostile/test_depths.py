"""Trees as deep as jax itself can flatten: nothing of ours needs more of Python's stack."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH = 1000
SLACK = 150
"""Frames for what jax and optax do below and above a flattening of the tree."""


@jax.tree_util.register_pytree_node_class
class Keyless:
    def __init__(self, child):
        self.child = child

    def tree_flatten(self):
        return (self.child,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["child"], meta_fields=["name"])
@dataclasses.dataclass
class Named:
    child: Any
    name: str = "n"


class Wrap:
    """One level of a deep tree, its key, and how to go down one level."""

    def __init__(self, up: Callable[[Any], Any], key: str, down: Callable[[Any], Any]):
        self.up, self.key, self.down = up, key, down

    def tree(self, bottom: Any) -> Any:
        for _ in range(DEPTH):
            bottom = self.up(bottom)
        return bottom

    def bottom(self, tree: Any) -> Any:
        for _ in range(DEPTH):
            tree = self.down(tree)
        return tree

    @property
    def path(self) -> str:
        return "/".join([self.key] * DEPTH)


DICT = Wrap(lambda t: {"k": t}, "k", lambda t: t["k"])
WRAPS = {
    "dict": DICT,
    "list": Wrap(lambda t: [t], "0", lambda t: t[0]),
    "tuple": Wrap(lambda t: (t,), "0", lambda t: t[0]),
    "dataclass": Wrap(Named, "child", lambda t: t.child),
    "no keys": Wrap(Keyless, "0", lambda t: t.child),
}
A, B = f"{DICT.path}/a", f"{DICT.path}/b"
BOTTOM = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0, 5.0])}
PARAMS = DICT.tree(BOTTOM)


def depth_here() -> int:
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@pytest.fixture(autouse=True)
def tight() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(depth_here() + DEPTH + SLACK)
    yield
    sys.setrecursionlimit(before)


def loss(params: Any) -> jax.Array:
    bottom = DICT.bottom(params)
    return (bottom["a"] ** 2).sum() * (bottom["b"] ** 2).sum()


def assert_same(tree: Any, expected: Any) -> None:
    for name, leaf in expected.items():
        np.testing.assert_array_equal(DICT.bottom(tree)[name], leaf)


SPECS = {
    "path": f"{DICT.path}/a",
    "stars": "**/a",
    "regex": fo.regex(".*/a"),
    "layers": fo.layers("**/[ab]")[0],
    "where": fo.where(lambda path, leaf: path.endswith("/a")),
    "labelled": fo.labelled(DICT.tree({"a": "x", "b": "y"}), "x"),
    "mask": DICT.tree({"a": True, "b": False}),
    "function": lambda tree: jax.tree.map(lambda x: x.shape == (2,), tree),
    "algebra": fo.everything - ~fo.path("**/a"),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_spec_finds_a_leaf_a_thousand_levels_down(name):
    spec = SPECS[name]
    assert DICT.bottom(fo.mask(spec, PARAMS)) == {"a": True, "b": False}
    assert DICT.bottom(fo.labels(spec, PARAMS)) == {"a": "frozen", "b": "trainable"}


@pytest.mark.parametrize("name", WRAPS)
def test_containers_of_every_kind_may_be_nested_a_thousand_times(name):
    wrap = WRAPS[name]
    params = wrap.tree(BOTTOM)
    state = fo.freezable(optax.sgd(0.1, momentum=0.9), f"{wrap.path}/a").init(params)
    state = fo.set_frozen(state, params, f"{wrap.path}/b")
    assert wrap.bottom(fo.mask(state, params)) == {"a": False, "b": True}
    trace = wrap.bottom(optax.tree_utils.tree_get(state, "trace"))
    assert (trace["a"].shape, trace["b"]) == ((2,), optax.MaskedNode())


@pytest.mark.parametrize("wrap", [Named, Keyless])
def test_a_module_a_thousand_levels_down_is_found(wrap):
    params = WRAPS["dataclass" if wrap is Named else "no keys"].tree({"k": BOTTOM})
    everything = fo.mask(fo.of_type(wrap), params)
    assert jax.tree.leaves(everything) == [True, True]
    asked = []
    fo.mask(fo.by_module(lambda module, path: bool(asked.append(path))), params)
    assert [path.count("/") + bool(path) for path in asked] == list(range(DEPTH))


def test_gradient_update_and_sum_are_those_of_the_trainable_leaf_alone():
    tx, bare = fo.freezable(optax.adam(0.1), A), optax.adam(0.1)

    def of_b(b: Any) -> jax.Array:
        return (BOTTOM["a"] ** 2).sum() * (b**2).sum()

    value, gradient = jax.value_and_grad(of_b)(BOTTOM["b"])
    state = tx.init(PARAMS)
    found, grads = fo.value_and_grad(loss, state)(PARAMS)
    assert found == value
    assert_same(grads, {"a": jnp.zeros(2), "b": gradient})
    holes = fo.grad(loss, state, holes=True)(PARAMS)
    assert DICT.bottom(holes)["a"] == optax.MaskedNode()
    for compiled in (lambda update: update, jax.jit):
        moved, _ = compiled(bare.update)(gradient, bare.init(BOTTOM["b"]))
        updates, _ = compiled(tx.update)(grads, state, PARAMS)
        assert_same(updates, {"a": jnp.zeros(2), "b": moved})
    applied = fo.apply_updates(PARAMS, updates, state)
    assert DICT.bottom(applied)["a"] is BOTTOM["a"]
    assert_same(applied, {"b": BOTTOM["b"] + moved})
    fo.testing.assert_frozen(PARAMS, applied, A)


def test_edits_move_the_leaves_they_name_and_keep_the_buffers_of_the_others():
    tx, bare = fo.freezable(optax.adam(0.1), A), optax.adam(0.1)
    start = tx.init(PARAMS)
    _, start = tx.update(PARAMS, start, PARAMS)
    mu = DICT.bottom(optax.tree_utils.tree_get(start, "mu"))["b"]
    thawed = fo.thaw(start, PARAMS, A)
    assert DICT.bottom(fo.mask(thawed, PARAMS)) == {"a": False, "b": False}
    moments = DICT.bottom(optax.tree_utils.tree_get(thawed, "mu"))
    assert moments["b"] is mu
    np.testing.assert_array_equal(moments["a"], jnp.zeros(2))
    first, _ = jax.jit(bare.update)(BOTTOM, bare.init(BOTTOM))
    updates, _ = jax.jit(tx.update)(PARAMS, thawed, PARAMS)
    assert_same(updates, {"a": first["a"]})
    parked = fo.freeze(thawed, PARAMS, B, keep_state=True)
    again = fo.set_frozen(parked, PARAMS, fo.nothing)
    assert DICT.bottom(optax.tree_utils.tree_get(again, "mu"))["b"] is mu
    whole = fo.release(fo.freeze(thawed, PARAMS, A), PARAMS)
    assert jax.tree.structure(whole) == jax.tree.structure(bare.init(PARAMS))
    adopted = fo.adopt(tx, whole, PARAMS)
    assert DICT.bottom(fo.mask(adopted, PARAMS)) == {"a": False, "b": False}


def test_phases_inside_and_outside_of_one_program_reach_down():
    phases = fo.Phases({0: A, 1: fo.nothing})
    phases.validate(PARAMS)
    tx = fo.scheduled(optax.sgd(0.1), phases)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    grads = fo.grad(loss, state)(PARAMS)
    updates, state = update(grads, state, PARAMS)
    assert_same(updates, {"a": jnp.zeros(2), "b": -0.1 * DICT.bottom(grads)["b"]})
    updates, _ = update(PARAMS, state, PARAMS)
    assert_same(updates, {name: -0.1 * leaf for name, leaf in BOTTOM.items()})


def test_an_export_comes_back_with_every_array_it_had():
    tx = fo.freezable(optax.adam(0.1), A)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    state = fo.thaw(state, PARAMS, A)
    back = fo.import_state(tx, PARAMS, fo.export_state(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, old)


def test_splitting_holding_setting_and_tying_reach_down():
    trainable, rest = fo.partition(PARAMS, A)
    assert DICT.bottom(trainable)["a"] == optax.MaskedNode()
    merged = DICT.bottom(fo.merge(trainable, rest))
    assert all(merged[name] is BOTTOM[name] for name in "ab")
    other = DICT.tree({"a": jnp.zeros(2), "b": jnp.zeros(3)})
    assert DICT.bottom(fo.hold(other, PARAMS, B))["b"] is BOTTOM["b"]
    assert_same(fo.assign(PARAMS, {B: 7.0}), {"a": BOTTOM["a"], "b": jnp.full(3, 7.0)})
    shared = DICT.tree({"a": BOTTOM["a"], "b": BOTTOM["a"]})
    assert fo.tied_paths(shared) == [(A, B)]
    tx = fo.tie(optax.sgd(0.1), *fo.tied_paths(shared))
    updates, _ = tx.update(shared, tx.init(shared), shared)
    assert_same(updates, dict.fromkeys("ab", -0.1 * (BOTTOM["a"] + BOTTOM["a"])))


def test_a_scan_over_layers_far_down_is_that_of_jax():
    layers = DICT.tree({"w": jnp.array([1.0, 2.0, 3.0])})

    def body(carry: Any, layer: Any) -> tuple[Any, Any]:
        return carry * DICT.bottom(layer)["w"], carry

    expected = jax.lax.scan(body, 2.0, layers)
    found = fo.scan(body, 2.0, layers, fo.rows("**/w", [0, 1]))
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_summary_opens_a_thousand_levels_in_every_form():
    summary = fo.summary(PARAMS, A, optax.adam(0.1))
    assert (summary.frozen, summary.trainable) == (2, 3)
    assert [row.path for row in summary.rows[-2:]] == [A, B]
    assert len(summary.rows) == DEPTH + 2
    assert str(summary).endswith("\ntrainable: 3 of 5 parameters (60.00%)")
    assert summary.to_markdown().count("\n| `") == DEPTH + 2


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda: fo.mask("**/c", PARAMS), "selects no leaf"),
        (lambda: fo.mask({"a": True}, PARAMS), "and 'a', which the tree does not have"),
        (lambda: fo.assign(PARAMS, {"k/k": 0.0}), "'k/k', which is no leaf; it is a node"),
        (lambda: fo.hold(PARAMS, BOTTOM, A), "only in `old`: 'a', 'b'"),
        (lambda: fo.freezable(optax.sgd(0.1), {A: True, B: 0}).init(PARAMS), "/b' is int"),
    ],
)
def test_errors_name_paths_of_any_depth(ask, match):
    with pytest.raises((ValueError, TypeError), match=match):
        ask()


def raised_in_a_thread(call: Callable[[], Any]) -> BaseException | None:
    """What it raises; in a thread, as jax takes the stack that it ran out of from its caller."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001
            raised.append(error)
        else:
            raised.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


BEYOND = DICT.tree(DICT.tree(BOTTOM))
TOO_DEEP = {
    "jax": lambda: jax.tree.leaves(BEYOND),
    "mask": lambda: fo.mask("**/a", BEYOND),
    "init": lambda: fo.freezable(optax.sgd(0.1), "**/a").init(BEYOND),
    "partition": lambda: fo.partition(BEYOND, True),
    "grad": lambda: fo.grad(loss, fo.nothing)(BEYOND),
    "apply_updates": lambda: fo.apply_updates(BEYOND, BEYOND),
    "assign": lambda: fo.assign(BEYOND, {A: 0.0}),
    "tied_paths": lambda: fo.tied_paths(BEYOND),
    "summary": lambda: fo.summary(BEYOND),
    "mask of it": lambda: fo.mask(BEYOND, BOTTOM),
}


@pytest.mark.parametrize("name", TOO_DEEP)
def test_a_tree_too_deep_for_jax_is_said_to_be_and_nothing_crashes(name):
    if raised_in_a_thread(TOO_DEEP["jax"]) is None:
        pytest.skip("this jax has no limit that is near")
    error = raised_in_a_thread(TOO_DEEP[name])
    # Without a function for its leaves, jax wraps the error of Python in one of its own.
    errors = [error, getattr(error, "__cause__", None)]
    assert any(isinstance(e, RecursionError) and "recursion" in str(e) for e in errors)
    assert fo.mask("a", BOTTOM) == {"a": True, "b": False}
