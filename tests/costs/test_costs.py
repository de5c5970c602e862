"""Costs nothing: XLA's own analysis of the compiled step, against code split by hand."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from benchmarks.cases import ADAMW, COMPILED
from benchmarks.compiled import LIMIT, costs, limits
from benchmarks.models import layered, layered_loss
from benchmarks.steps import DROP_IN, PARTITION_STYLE, WAYS
from tests.support.compiling import OPTIMISED
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, WIDTH = 6, 64


CASES = {
    f"{name}-{way}-{'donated' if donated else 'kept'}": (name, way, donated)
    for name, way, donated in itertools.product(COMPILED, (DROP_IN, PARTITION_STYLE), (False, True))
}
NUMBERS = ("nine tenths frozen", "1 cohort", "9 cohorts")
WRAPPED = ("apply_if_finite inside", "MultiSteps outside")  # as MultiSteps and the other are
# The donated step, in which a copy would show, of each case that differs in more than a number.
FIRST = {f"{name}-{DROP_IN}-donated" for name in COMPILED} - {
    f"{name}-{DROP_IN}-donated" for name in NUMBERS + WRAPPED
}
ALWAYS = FIRST | {f"{name}-{PARTITION_STYLE}-kept" for name in ("clip inside", "3 cohorts")}


@pytest.mark.parametrize(("name", "way", "donated"), cases(CASES, ALWAYS))
def test_a_step_costs_what_code_split_by_hand_costs(name, way, donated):
    case = COMPILED[name]
    ours, limit = (
        costs(case, WAYS[way], donated, OPTIMISED),
        limits(case, WAYS[way], donated, OPTIMISED),
    )
    # Two bias corrections for each further cohort, of 64 bytes each.
    slack = {"temporary bytes": 128 * (case.cohorts - 1)}
    over = {k: (ours[k], x) for k, x in limit.items() if ours[k] > LIMIT * x + slack.get(k, 0)}
    assert not over


def test_a_peer_costs_more_once_something_else_reads_the_gradients():
    # So the gate above can fail. Where nothing reads them, XLA removes the peer's needless
    # backward pass as well.
    ways = WAYS["optax.partition"], WAYS[DROP_IN]
    peer, own = (
        costs(COMPILED["norm logged"], way, donated=True, options=OPTIMISED) for way in ways
    )
    assert peer["FLOPs"] > 1.5 * own["FLOPs"]
    assert peer["bytes accessed"] > 1.5 * own["bytes accessed"]


def pointers(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.unsafe_buffer_pointer(), tree)


@pytest.mark.parametrize("where", ["donated", "applied outside jit"])
def test_frozen_leaves_keep_their_very_buffers(where):
    params, batch = layered(DEPTH, WIDTH), jnp.ones((32, WIDTH))
    tx = fo.freezable(ADAMW, "layer_{0..4}")
    state = tx.init(params)
    before = pointers({k: v for k, v in params.items() if k != "layer_5"})

    def updates_of(params, state):
        grads = fo.grad(layered_loss, frozen=state, holes=True)(params, batch)
        return tx.update(grads, state, params)

    def whole(params, state):
        updates, state = updates_of(params, state)
        return fo.apply_updates(params, updates, frozen=state), state

    for _ in range(2):
        if where == "donated":
            params, state = jax.jit(whole, donate_argnums=(0, 1))(params, state)
        else:
            updates, state = jax.jit(updates_of)(params, state)
            params = fo.apply_updates(params, updates, frozen=state)
    assert pointers({k: v for k, v in params.items() if k != "layer_5"}) == before


def test_updates_can_be_donated_though_zeros_are_shared_under_the_trace():
    params = layered(DEPTH, WIDTH)
    tx = fo.freezable(optax.sgd(0.1), "layer_{0..4}")
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, state, params)
        apply = jax.jit(lambda u, p: fo.apply_updates(p, u), donate_argnums=0)
        new = apply(updates, params)
        fo.testing.assert_frozen(params, new, "layer_{0..4}")


def test_holes_cost_no_output():
    params, batch = layered(DEPTH, WIDTH), jnp.ones((32, WIDTH))
    grads = jax.jit(fo.grad(layered_loss, "layer_{0..4}", holes=True))
    memory = grads.lower(params, batch).compile(dict(OPTIMISED)).memory_analysis()
    trained = sum(x.nbytes for x in jax.tree.leaves(params["layer_5"]))
    # A tuple of outputs has a table of pointers on top.
    assert trained <= memory.output_size_in_bytes <= trained + 8 * len(jax.tree.leaves(params))
