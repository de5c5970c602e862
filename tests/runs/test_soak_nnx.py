"""Hundreds of edits of an `nnx.Optimizer` in place: nothing grows, and each number stays right."""

import collections
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.edit.test_model import CASES, Reference, draw_grads, flat, nested
from tests.runs.test_soak import objects
from tests.support.nnx_models import params_of, plain

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Looked at when each plan has been there, and at the end.
WARM, EDITS = 100, 200
LAYERS = {"low": {"low/kernel", "low/bias"}, "high": {"high/kernel", "high/bias"}}


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.low, self.high, self.head = (nnx.Linear(2, 3, rngs=rngs) for _ in range(3))


def edit(numbers: random.Random, optimizer: Any, model: Any, reference: Reference) -> None:
    """One edit at random, of the optimizer and of the reference."""
    layer, keep_state = numbers.choice(list(LAYERS)), numbers.random() < 0.5
    verb = numbers.choice(["freeze", "thaw", "set_frozen"])
    if verb == "thaw":
        fnnx.thaw(optimizer, model, layer)
    else:
        getattr(fnnx, verb)(optimizer, model, layer, keep_state=keep_state)
    if verb == "set_frozen":
        reference.set_frozen(LAYERS[layer], keep_state)
        return
    for path in LAYERS[layer]:
        reference.thaw(path) if verb == "thaw" else reference.freeze(path, keep_state)


@pytest.mark.exhaustive
def test_two_hundred_edits_in_place_leave_nothing_behind_and_every_number_right():
    case, numbers, model = CASES["adam"], random.Random(1), Net()
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1)), wrt=nnx.Param)
    values = {path: np.asarray(x) for path, x in flat(plain(params_of(model))).items()}
    assert len(values) == 6
    reference = Reference(case, values, set())
    traces, kinds, held = [], {}, []

    @nnx.jit
    def step(model: Any, optimizer: Any, grads: Any) -> None:
        traces.append(optimizer.opt_state.plan)

        def loss(model: Any) -> Any:
            params = jax.tree.leaves(plain(params_of(model)))
            return sum((x * g).sum() for x, g in zip(params, jax.tree.leaves(grads), strict=True))

        optimizer.update(model, fnnx.grad(loss, frozen=optimizer)(model))

    for i in range(1, EDITS + 1):
        edit(numbers, optimizer, model, reference)
        grads = draw_grads(values, i)
        reference.step(grads)
        step(model, optimizer, jax.tree.map(jnp.asarray, nested(grads)))
        state = optimizer.opt_state
        seen = kinds.setdefault(state.plan, set())
        seen.add((jax.tree.structure(state), tuple(map(jnp.shape, jax.tree.leaves(state)))))
        for path, value in flat(plain(params_of(model))).items():
            np.testing.assert_allclose(
                value, reference.leaves[path].value, rtol=2e-5, atol=2e-5, err_msg=path
            )
        if i in (WARM, EDITS):
            needed = len(jax.tree.leaves((nnx.state(model), nnx.state(optimizer))))
            left = objects()
            held.append((len(kinds), len(jax.live_arrays()) - needed, left))

    (early_plans, early_arrays, early), (plans, arrays, late) = held
    assert early_plans == plans
    assert 8 <= plans <= 25
    assert collections.Counter(traces) == collections.Counter(kinds.keys())
    assert all(len(seen) == 1 for seen in kinds.values())
    assert arrays == early_arrays
    assert late - early - collections.Counter({"all": 50}) == {}
    assert early.total() - early["all"] >= plans
