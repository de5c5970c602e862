"""States with frozen rows stored, followed by phases, and in NNX."""

import json
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADAM = optax.adam(0.1)


def params() -> dict[str, Any]:
    values = jnp.arange(1, 13, dtype=jnp.float32).reshape(6, 2) / 8
    return {"embed": values, "head": jnp.array([1.0, -2.0, 3.0])}


def rows(*indices: int) -> fo.Selector:
    return fo.rows("embed", list(indices))


def step_of(tx: Any) -> Any:
    def step(tree, state, value):
        grads = jax.tree.map(lambda x: x * x * value, tree)
        updates, state = tx.update(grads, state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    return step


def run(tx: Any, tree: Any, state: Any, *values: float) -> tuple[Any, Any]:
    step = jax.jit(step_of(tx))
    for value in values:
        tree, state = step(tree, state, value)
    return tree, state


def same(expected: Any, new: Any) -> None:
    assert jax.tree.structure(expected) == jax.tree.structure(new)
    fo.testing.assert_frozen(expected, new, True)


def trained(inner: Any = ADAM) -> tuple[Any, Any, Any]:
    """A state with three cohorts in one leaf, one of them parked."""
    tx, tree = fo.freezable(inner, rows(0, 1, 2)), params()
    tree, state = run(tx, tree, tx.init(tree), 0.5, -0.2)
    tree, state = run(tx, tree, fo.thaw(state, tree, rows(1)), 0.3)
    return tx, *run(tx, tree, fo.freeze(state, tree, rows(4, 5), keep_state=True), 0.7)


def stored(state: Any) -> Any:
    exported = flax.serialization.msgpack_serialize(fo.export_state(state))
    return flax.serialization.msgpack_restore(exported)


def test_a_stored_state_goes_on_bitwise():
    tx, tree, state = trained()
    restored = fo.import_state(fo.freezable(ADAM), tree, stored(state))
    same(state, restored)
    for edit in (lambda s: s, lambda s: fo.thaw(s, tree, rows(0, 4))):
        same(run(tx, tree, edit(state), 0.4, 0.1), run(tx, tree, edit(restored), 0.4, 0.1))


@pytest.mark.parametrize("frozen", [rows(0), rows(1, 4), "embed", fo.nothing])
def test_a_stored_state_moves_to_other_rows_on_the_way(frozen):
    tx, tree, state = trained()
    restored = fo.import_state(tx, tree, stored(state), frozen=frozen)
    same(fo.set_frozen(state, tree, frozen), restored)


def with_parts(change: Any) -> Any:
    exported = fo.export_state(trained(optax.sgd(0.1))[2])
    about = json.loads(exported["about"].tobytes())
    about = {**about, **change(about["parts"])}
    return {**exported, "about": np.frombuffer(json.dumps(about).encode(), np.uint8)}


def first(rows: Any) -> Any:
    return lambda parts: {"parts": [[0, rows], *parts[1:]]}


DAMAGES = {
    "another number of rows": first([7, "1c"]),
    "bits that are too many": first([6, "1c00"]),
    "no hex": first([6, "zz"]),
    "no text": first([6, 28]),
    "a negative count": first([-7, ""]),
    "a huge count": first([2**70, "1c"]),
    "a fractional count": first([6.5, "1c"]),
    "all rows": first([6, "fc"]),
    "no rows": first([6, "00"]),
    "no pair": first([6]),
    "a whole leaf beside its rows": first(None),
    "a negative leaf": lambda parts: {"parts": [[-1, parts[0][1]], *parts[1:]]},
    "a huge leaf": lambda parts: {"parts": [[2**70, parts[0][1]], *parts[1:]]},
    "an infinite leaf": lambda parts: {"parts": [[float("inf"), parts[0][1]], *parts[1:]]},
    "a leaf that is text": lambda parts: {"parts": [["x", parts[0][1]], *parts[1:]]},
    "rows in two parts": lambda parts: {"parts": [parts[0], parts[0], *parts[2:]]},
    "leaves in disorder": lambda parts: {"parts": parts[::-1]},
    "too few": lambda parts: {"parts": parts[1:]},
    "none": lambda parts: {"parts": None},
    "a dict": lambda parts: {"parts": {str(i): part for i, part in enumerate(parts)}},
    "a number": lambda parts: {"parts": 3},
    "a leaf twice": lambda parts: {
        "parts": [[0, None], [0, None], [1, None]],
        "frozen": [False] * 3,
        "cohorts": [0] * 3,
    },
    "rows of a vector's leaf": lambda parts: {"parts": [*parts[:-1], [1, [6, "1c"]]]},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_parts_is_an_error(damage):
    exported = with_parts(DAMAGES[damage])
    with pytest.raises(ValueError, match="export"):
        fo.import_state(fo.freezable(optax.sgd(0.1)), params(), exported)


def test_the_damages_begin_with_an_export_that_is_sound():
    _, tree, state = trained(optax.sgd(0.1))
    same(state, fo.import_state(fo.freezable(optax.sgd(0.1)), tree, with_parts(lambda parts: {})))


PHASES = fo.Phases(
    {
        0: rows(0, 1, 2),
        2: (rows(0), "head"),
        4: rows(0, 3),
        6: "embed",
        7: rows(0),
    }
)
VALUES = [0.3, -0.2, 0.5, 0.1, -0.7, 0.4, 0.9, -0.6, 0.2]


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(optax.adam(0.01), marks=pytest.mark.exhaustive),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01, weight_decay=0.1)),
        optax.sgd(0.01, momentum=0.9),
    ],
    ids=["adam", "clip and adamw", "momentum"],
)
def test_a_scan_over_phases_of_rows_equals_the_host_loop_that_keeps_state(inner):
    tree, tx = params(), fo.scheduled(inner, PHASES)

    def loss(tree, value):
        return value * (tree["embed"] ** 2).sum() * tree["head"].sum()

    def step_with(tx):
        def step(carry, value):
            tree, state = carry
            grads = fo.grad(loss, frozen=state)(tree, value)
            updates, state = tx.update(grads, state, tree)
            tree = fo.apply_updates(tree, updates, frozen=state)
            return (tree, state), tree

        return step

    scan = jax.jit(lambda carry: jax.lax.scan(step_with(tx), carry, jnp.array(VALUES)))
    (_, state), history = scan((tree, tx.init(tree)))
    host = fo.freezable(inner, PHASES.at(0))
    carry, step = (tree, host.init(tree)), jax.jit(step_with(host))
    for i, value in enumerate(VALUES):
        before, host_state = carry
        carry, _ = step(
            (before, fo.set_frozen(host_state, before, PHASES.at(i), keep_state=True)), value
        )
        now = jax.tree.map(lambda x, i=i: x[i], history)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), carry[0], now)
        if i:
            earlier = jax.tree.map(lambda x, i=i: x[i - 1], history)
            fo.testing.assert_frozen(earlier, now, PHASES.at(i))
    sizes = {x.shape[0] for x in jax.tree.leaves(state) if getattr(x, "shape", ())[1:] == (2,)}
    kept = sum(x.shape[0] for x in jax.tree.leaves(state) if getattr(x, "shape", ())[1:] == (2,))
    assert max(sizes) < 6
    assert kept % 5 == 0  # the row that no phase trains keeps no state
    same(state, fo.import_state(tx, tree, stored(state)))
    fo.testing.assert_frozen(params(), now, rows(0))


def model() -> nnx.Module:
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(6, 2, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(2, 2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(self.embed(x))

    return Model()


def loss_of(model: Any) -> Any:
    return (model(jnp.arange(6)) ** 2).mean()


OLD = fo.rows("embed", slice(0, 4))


def nnx_step(model: Any, optimizer: Any) -> None:
    optimizer.update(model, fnnx.grad(loss_of, frozen=optimizer)(model))


def copied(model: Any) -> Any:
    return jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
@pytest.mark.parametrize("keep_state", [False, True], ids=["drop", "park"])
def test_nnx_rows_are_frozen_and_thawed_in_place(keep_state, wrap):
    net, step = model(), wrap(nnx_step)
    optimizer = nnx.Optimizer(net, fo.freezable(optax.adam(0.1)), wrt=nnx.Param)
    plain, tx = copied(net), fo.freezable(optax.adam(0.1))
    graph, _ = nnx.split(net, nnx.Param)
    state = tx.init(plain)

    def functional(tree, state):
        grads = jax.grad(lambda tree: loss_of(nnx.merge(graph, tree)))(tree)
        updates, state = tx.update(grads, state, tree)
        return fo.apply_updates(tree, updates, frozen=state), state

    step(net, optimizer)
    plain, state = functional(plain, state)
    fnnx.freeze(optimizer, net, OLD, keep_state=keep_state)
    state = fo.freeze(state, plain, OLD, keep_state=keep_state)
    before = copied(net)
    for _ in range(2):
        step(net, optimizer)
        plain, state = functional(plain, state)
    fo.testing.assert_frozen(before, nnx.state(net, nnx.Param), OLD)
    assert np.all(before["embed"]["embedding"][...][4:] != net.embed.embedding[...][4:])
    fnnx.thaw(optimizer, net, fo.rows("embed", [1, 3]))
    state = fo.thaw(state, plain, fo.rows("embed", [1, 3]))
    step(net, optimizer)
    plain, state = functional(plain, state)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        plain,
        nnx.state(net, nnx.Param),
    )
    fo.testing.assert_frozen(before, nnx.state(net, nnx.Param), fo.rows("embed", [0, 2]))


def test_nnx_gradients_are_zero_at_frozen_rows_and_right_at_the_others():
    net = model()
    expected = nnx.grad(loss_of)(net)["embed"]["embedding"][...]
    grads = fnnx.grad(loss_of, frozen=OLD)(net)["embed"]["embedding"][...]
    np.testing.assert_array_equal(grads[:4], 0)
    np.testing.assert_allclose(grads[4:], expected[4:], rtol=1e-6)


def test_an_nnx_filter_cannot_hold_back_rows_and_says_so():
    with pytest.raises(ValueError, match="embed/embedding"):
        fnnx.wrt(model(), OLD)
    whole = fo.rows("embed", slice(None))
    assert fnnx.wrt(model(), whole) == fnnx.wrt(model(), "embed")


def test_other_rows_are_another_plan_even_if_they_are_as_many():
    tree = {"embed": jnp.ones((4, 2)), "head": jnp.ones(2)}
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        updates, _ = fo.freezable(optax.sgd(1.0)).update(tree, state, tree)
        return updates["embed"]

    states = [
        fo.freezable(optax.sgd(1.0), fo.rows("embed", rows)).init(tree)
        for rows in ([0, 1], [1, 2], [0, 1])
    ]
    moved = [np.flatnonzero(step(state).any(axis=1)).tolist() for state in states]
    assert moved == [[2, 3], [0, 3], [2, 3]]
    assert len(traces) == 2
    first, second, third = map(jax.tree.structure, states)
    assert first == third != second
