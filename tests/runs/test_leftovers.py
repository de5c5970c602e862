"""What a state remembers to be quick stays small, whatever it has seen."""

import collections
import dataclasses
import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.runs.test_soak import objects

# Far more than a loop goes to and fro between.
FEW = 64


def own_objects() -> int:
    # JAX keeps the structures of what it traced for itself, up to a bound.
    jax.clear_caches()
    return sum((objects() - collections.Counter({"all": 10**9})).values())


@pytest.mark.exhaustive
def test_rows_that_are_drawn_anew_at_each_edit_leave_nothing_behind():
    numbers, count = np.random.default_rng(0), 24
    params = {"table": jnp.ones((count, 2)), "head": jnp.ones(2)}
    state = fo.freezable(optax.sgd(0.1, momentum=0.9)).init(params)
    held = []
    for _ in range(3):
        for _ in range(FEW):
            rows = fo.rows("table", numbers.choice(count, count // 2, replace=False))
            # As shapes, as each of these edits would be compiled.
            edit = functools.partial(fo.set_frozen, params=params, frozen=rows)
            state = jax.eval_shape(edit, state)
        held.append(own_objects())
    # One for each edit would be twice as many at the least.
    assert held[2] - held[1] < FEW / 2


class Tag:
    """Something of the user's, maybe large."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """With a part that is static, as Equinox modules have."""

    w: Any
    tag: Any = dataclasses.field(metadata={"static": True})


USES = {
    "update": lambda tx, state, model: tx.update(model, state, model)[1],
    "apply_updates": lambda tx, state, model: fo.apply_updates(model, model, frozen=state),
    "mask": lambda tx, state, model: fo.mask(state, model),
    "edit": lambda tx, state, model: fo.freeze(state, model, "w"),
}


@pytest.mark.parametrize("use", USES)
def test_models_that_differ_in_their_static_parts_alone_are_not_kept_alive(use):
    tx, alive = fo.freezable(optax.sgd(0.1)), weakref.WeakSet()
    state = tx.init(Model(jnp.ones(2), Tag()))
    for _ in range(3 * FEW):
        model = Model(jnp.ones(2), Tag())
        alive.add(model.tag)
        USES[use](tx, state, model)
    jax.clear_caches()
    gc.collect()
    assert 1 <= len(alive) <= FEW
