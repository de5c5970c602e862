"""Nodes of every kind that may hold params, also those that take no other children than arrays."""

import collections
import dataclasses
import functools
import re
import typing
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.core import FrozenDict

import freeze_optax as fo

pytestmark = pytest.mark.usefixtures("standard_promotion")

BARE = optax.adam(0.1)


class Pair(typing.NamedTuple):
    w: Any
    b: Any


class Triple(collections.namedtuple("Triple", "w b rest")):
    __slots__ = ()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["name"])
@dataclasses.dataclass
class Named:
    w: Any
    b: Any
    name: str = "static"


@struct.dataclass
class Flax:
    w: Any
    b: Any
    name: str = struct.field(pytree_node=False, default="static")


@jax.tree_util.register_pytree_node_class
class Keyless:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, ("static",)

    @classmethod
    def tree_unflatten(cls, aux, children):
        assert aux == ("static",)
        return cls(*children)


class Module(eqx.Module):
    w: Any
    b: Any
    act: Callable[..., Any] = eqx.field(static=True, default=jnp.tanh)


class Checked(eqx.Module):
    w: Any
    b: Any

    def __check_init__(self):
        assert self.w.shape == (2,)


class Variables(nnx.Module):
    def __init__(self, w, b):
        self.w, self.b = nnx.Param(w), nnx.Param(b)


def fn(*args: Any, **kwargs: Any) -> None:
    """What a `Partial` calls."""


# Of two arrays the tree that holds them, the first before the second.
NODES: dict[str, Callable[[Any, Any], Any]] = {
    "namedtuple": Pair,
    "subclass of one": lambda w, b: Triple(w, b, {}),
    "dataclass": Named,
    "flax dataclass": Flax,
    "no keys": Keyless,
    "module": Module,
    "checked module": Checked,
    "nnx.State": lambda w, b: nnx.State({"a": nnx.Param(w), "b": nnx.Param(b)}),
    "nnx.Module": lambda w, b: {"a": nnx.state(Variables(b, w))},
    "OrderedDict": lambda w, b: collections.OrderedDict([("z", w), ("a", b)]),
    "defaultdict": lambda w, b: collections.defaultdict(list, {"a": w, "z": b}),
    "FrozenDict": lambda w, b: FrozenDict({"a": {"x": w}, "z": b}),
    "Partial": lambda w, b: jax.tree_util.Partial(fn, w, k=b),
    "Partial in one": lambda w, b: jax.tree_util.Partial(fn, jax.tree_util.Partial(fn, w), b),
    "None beside": lambda w, b: [None, w, (None, {"x": b, "y": None}), []],
    "one in another": lambda w, b: Pair(Keyless(Named(w, None)), [Module(Flax(b, ()), None)]),
}
VALUES = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))


def build(name: str) -> tuple[Any, Any]:
    """The tree, and a mask of its structure that freezes its first leaf alone."""
    params = NODES[name](*VALUES)
    assert len(jax.tree.leaves(params)) == 2
    return params, jax.tree.unflatten(jax.tree.structure(params), [True, False])


def assert_like(tree: Any, params: Any, *leaves: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(tree), leaves))


@pytest.mark.parametrize("name", NODES)
def test_trees_of_any_node_keep_it_where_leaves_are_selected_split_held_and_set(name):
    params, mask = build(name)
    first, second = jax.tree.leaves(params)
    for spec in (mask, fo.where(lambda path, leaf: leaf is first)):
        assert_like(fo.mask(spec, params), params, True, False)
        assert_like(fo.labels(spec, params), params, "frozen", "trainable")
    split = fo.partition(params, mask)
    halves = [jax.tree.leaves(part) for part in split]
    assert halves[0][0] is second
    assert halves[1][0] is first
    assert_like(fo.merge(*split), params, first, second)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    assert_like(fo.hold(doubled, params, mask), params, first, 2 * second)
    path = fo.summary(params, depth=9).rows[-1].path
    assert_like(fo.assign(params, {path: 7.0}), params, first, jnp.full(2, 7.0))
    assert fo.tied_paths(params) == []
    fo.testing.assert_frozen(params, fo.assign(params, {path: 7.0}), mask)
    with pytest.raises(AssertionError, match="1 frozen leaf is not bit-identical"):
        fo.testing.assert_frozen(params, doubled, mask)


def loss(params: Any) -> Any:
    first, second = jax.tree.leaves(params)
    return (first**2 * second**3).sum()


@pytest.mark.parametrize("name", NODES)
def test_trees_of_any_node_train_and_thaw_as_by_the_bare_optimizer(name):
    params, mask = build(name)
    first, second = jax.tree.leaves(params)
    tx = fo.freezable(BARE, mask)
    state = tx.init(params)
    grads = fo.grad(loss, state)(params)
    assert_like(grads, params, jnp.zeros(2), 3 * first**2 * second**2)
    alone = BARE.init(second)
    expected, alone = BARE.update(jax.tree.leaves(grads)[1], alone, second)
    updates, state = tx.update(grads, state, params)
    assert_like(updates, params, jnp.zeros(2), expected)
    applied = fo.apply_updates(params, updates, state)
    assert_like(applied, params, first, second + expected)
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(alone)))
    state = fo.thaw(state, params, True)
    updates, state = tx.update(params, state, params)
    # Of as many leaves as train here: of one alone optax compiles another division.
    both, adam = [first, second], alone[0]
    fresh, _ = BARE.update(both, BARE.init(both), both)
    twice = adam._replace(mu=[adam.mu] * 2, nu=[adam.nu] * 2)
    going, _ = BARE.update(both[1:] * 2, (twice, *alone[1:]), both)
    assert_like(updates, params, fresh[0], going[1])


# With the state that one has, the optimizer that takes it, and what it has to be.
MADE_ANEW = {
    "import_state": lambda tx, state, params: (
        fo.import_state(tx, params, fo.export_state(state)),
        tx,
        state,
    ),
    "parked and back": lambda tx, state, params: (
        fo.set_frozen(fo.freeze(state, params, True, keep_state=True), params, state),
        tx,
        state,
    ),
    "release": lambda tx, state, params: (
        fo.release(tx.init(params), params),
        BARE,
        BARE.init(params),
    ),
    "adopt": lambda tx, state, params: (
        fo.adopt(tx, BARE.init(params), params),
        fo.freezable(BARE),
        fo.freezable(BARE).init(params),
    ),
}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("way", MADE_ANEW)
def test_a_run_on_trees_of_any_node_goes_on_with_a_state_made_anew(way, name):
    params, mask = build(name)
    tx = fo.freezable(BARE, mask)
    _, state = tx.update(params, tx.init(params), params)
    found, optimizer, expected = MADE_ANEW[way](tx, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
    steps = [optimizer.update(params, before, params) for before in (found, expected)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, steps)))


@pytest.mark.parametrize("name", NODES)
def test_a_summary_of_trees_of_any_node_counts_their_leaves_and_state(name):
    params, mask = build(name)
    summary = fo.summary(params, mask, BARE)
    assert (summary.total, summary.frozen, summary.state_bytes) == (4, 2, 4 + 16)
    state = fo.freezable(BARE, mask).init(params)
    assert fo.summary(params, state).rows == summary.rows


# Nodes that refuse to be made of anything but arrays, which jax asks its users not to have.


@jax.tree_util.register_pytree_node_class
class Strict:
    def __init__(self, *arrays):
        for x in arrays:
            if not hasattr(x, "dtype"):
                raise TypeError(f"Strict takes arrays, not {type(x).__name__}")
        self.arrays = arrays

    def tree_flatten(self):
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def strict() -> tuple[Any, Any]:
    params = {"head": jnp.ones(2), "strict": Strict(*VALUES)}
    return params, fo.freezable(BARE, "head")


def test_a_node_that_refuses_holes_trains_as_long_as_nothing_in_it_is_frozen():
    params, tx = strict()
    state = tx.init(params)
    grads = fo.grad(lambda p: sum((x**2).sum() for x in p["strict"].arrays), state)(params)
    updates, state = tx.update(grads, state, params)
    inside = params["strict"]
    expected, _ = BARE.update(grads["strict"], BARE.init(inside), inside)
    assert_like(updates["strict"], inside, *expected.arrays)
    applied = fo.apply_updates(params, updates, state)
    assert applied["head"] is params["head"]
    assert fo.tied_paths(params) == []
    fo.testing.assert_frozen(params, applied, "head")
    assert fo.summary(params, "head").trainable == 4
    assert fo.assign(params, {"strict/0": 0.0})["strict"].arrays[0].tolist() == [0.0, 0.0]


def test_the_state_beside_a_node_that_refuses_holes_is_counted():
    params, _ = strict()
    assert fo.summary(params, "head", BARE).state_bytes == 4 + 2 * 16


@pytest.mark.parametrize(
    "ask",
    [
        lambda params, state: fo.mask("head", params),
        lambda params, state: fo.partition(params, "strict/0"),
        lambda params, state: fo.hold(params, params, "strict/0"),
        lambda params, state: fo.freezable(BARE, "strict/0").init(params),
        lambda params, state: fo.grad(lambda p: 0.0, "strict", holes=True)(params),
        lambda params, state: fo.freeze(state, params, "strict/0"),
        lambda params, state: fo.thaw(state, params, "head"),
        lambda params, state: fo.release(state, params),
    ],
)
def test_what_a_node_refuses_is_explained_and_the_state_is_as_it_was(ask):
    params, tx = strict()
    state = tx.init(params)
    before = jax.tree.leaves(state)
    refused = r"in a Strict, which refuses|a Strict in them refuses"
    with pytest.raises(ValueError, match=refused) as error:
        ask(params, state)
    assert "jax asks that `tree_unflatten` accept any object" in str(error.value)
    assert re.search("Strict takes arrays, not (bool|MaskedNode)$", str(error.value))
    assert all(x is y for x, y in zip(jax.tree.leaves(state), before, strict=True))
    tx.update(params, state, params)


# Aux data that can't be hashed, or compared: what jax does with it outside of jit works here too.


def with_aux(aux: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree with a node of a class of its own, as jax compares structures of other trees too."""

    class Node:
        def __init__(self, x, aux):
            self.x, self.aux = x, aux

    jax.tree_util.register_pytree_node(
        Node, lambda node: ((node.x,), node.aux), lambda aux, children: Node(*children, aux)
    )
    return {"a": jnp.ones(3), "node": Node(VALUES[0], aux)}, lambda tree: tree["node"].x


@pytest.mark.parametrize("aux", [[1, 2], {"k": 1}, np.arange(3), {1}], ids=repr)
def test_a_node_with_aux_data_that_can_not_be_hashed_trains_eagerly(aux):
    params, inside = with_aux(aux)
    tx = fo.freezable(BARE, "a")
    updates, state = tx.update(params, tx.init(params), params)
    expected, _ = BARE.update(VALUES[0], BARE.init(VALUES[0]), VALUES[0])
    np.testing.assert_array_equal(inside(updates), expected)
    applied = fo.apply_updates(params, updates, state)
    assert applied["a"] is params["a"]
    assert jax.tree.leaves(fo.mask("a", params)) == [True, False]
    assert inside(fo.merge(*fo.partition(params, "a"))) is VALUES[0]
    gradient = fo.grad(lambda p: (inside(p) ** 2).sum(), state)(params)
    np.testing.assert_array_equal(inside(gradient), 2 * VALUES[0])
    assert fo.summary(params, "a").trainable == 2
