"""Random edits of rows and steps, against a reference that keeps each row by itself in NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.sampling import examples

F = np.float32
RATE, MOMENTUM, B1, B2, EPS, NORM = F(0.1), F(0.9), F(0.9), F(0.999), F(1e-8), F(1.0)
SHAPES = {"cube": (3, 2, 2), "table": (5, 2), "vector": (4,)}
ROWS = [(path, i) for path, shape in SHAPES.items() for i in range(shape[0])]


@dataclasses.dataclass
class Row:
    """One row with moments and a step count of its own; without moments they are dropped."""

    value: np.ndarray
    frozen: bool = False
    moments: list[np.ndarray] | None = None
    count: int = 0

    def freeze(self, keep_state: bool) -> None:
        if not (self.frozen or keep_state):
            self.moments = None
        self.frozen = True

    def thaw(self, moments: int) -> None:
        self.frozen = False
        if self.moments is None:
            self.moments, self.count = [np.zeros_like(self.value) for _ in range(moments)], 0


def momentum(row: Row, grad: np.ndarray) -> None:
    row.moments = [grad + MOMENTUM * row.moments[0]]
    row.value = row.value - RATE * row.moments[0]


def adam(row: Row, grad: np.ndarray) -> None:
    mu, nu = row.moments
    mu, nu = B1 * mu + (1 - B1) * grad, B2 * nu + (1 - B2) * grad**2
    row.moments, row.count = [mu, nu], row.count + 1
    mu_hat, nu_hat = mu / (1 - B1**row.count), nu / (1 - B2**row.count)
    row.value = row.value - RATE * mu_hat / (np.sqrt(nu_hat) + EPS)


CASES = {
    "momentum": (optax.sgd(0.1, momentum=0.9), momentum, 1, False),
    "adam": (optax.adam(0.1), adam, 2, False),
    "clip and adam": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        adam,
        2,
        True,
    ),
}

BITS = st.integers(0, 2 ** len(ROWS) - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 2**32 - 1), st.booleans()),
    st.tuples(st.sampled_from(["freeze", "thaw", "set_frozen"]), BITS, st.booleans()),
)


def picked(bits: int) -> set[tuple[str, int]]:
    return {row for i, row in enumerate(ROWS) if bits >> i & 1}


def mask(chosen: set[tuple[str, int]]) -> dict[str, np.ndarray]:
    return {
        path: np.array([(path, i) in chosen for i in range(shape[0])])
        for path, shape in SHAPES.items()
    }


def selector(chosen: set[tuple[str, int]]) -> fo.Selector:
    parts = [fo.rows(path, np.flatnonzero(flags)) for path, flags in mask(chosen).items()]
    return parts[0] | parts[1] | parts[2]


def draw_grads(seed: int) -> dict[str, np.ndarray]:
    """Gradients away from zero, where Adam divides rounding by rounding."""
    rng = np.random.default_rng(seed)
    sizes = {path: rng.uniform(0.1, 2.0, shape) for path, shape in SHAPES.items()}
    return {path: F(x * rng.choice([-1.0, 1.0], x.shape)) for path, x in sizes.items()}


def take_step(reference: dict[Any, Row], grads: Any, step: Any, clip: bool) -> None:
    live = {(p, i): grads[p][i] for p, i in ROWS if not reference[p, i].frozen}
    norm = np.sqrt(sum((np.sum(g**2) for g in live.values()), F(0)))
    scale = NORM / norm if clip and norm > NORM else F(1)
    for row, grad in live.items():
        step(reference[row], grad * scale)


def check_state(state: Any, reference: dict[Any, Row], moments: int) -> None:
    kept = [row for row in reference.values() if row.moments is not None]
    counters = 4 * (1 + (state.ages[0].shape[0] if state.ages else 0)) * (moments == 2)
    expected = sum(row.value.nbytes for row in kept) * moments
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == expected + counters
    if moments == 2:
        cohorts = {(row.count, row.frozen) for row in kept}
        assert counters >= 4 * len({count for count, _ in cohorts})


@pytest.mark.parametrize("name", CASES)
@examples(25)
@given(frozen=BITS, actions=st.lists(ACTIONS, min_size=4, max_size=14))
def test_random_edits_and_steps_agree_with_a_reference_for_each_row(name, frozen, actions):
    inner, step, moments, clip = CASES[name]
    values = {path: np.full(shape, 0.5 + i, F) for i, (path, shape) in enumerate(SHAPES.items())}
    reference = {(path, i): Row(values[path][i], True) for path, i in ROWS}
    start = picked(frozen) if frozen != 2 ** len(ROWS) - 1 else set()
    for row in set(ROWS) - start:
        reference[row].thaw(moments)
    tx = fo.freezable(inner, mask(start))
    params = jax.tree.map(jnp.asarray, values)
    state = tx.init(params)
    # Without compiling for each plan; optax mixes floats with integer counters.
    with jax.numpy_dtype_promotion("standard"):
        for action, number, flag in actions:
            still = {row for row, own in reference.items() if own.frozen}
            if action == "step":
                grads, before = draw_grads(number), params
                take_step(reference, grads, step, clip)
                given = {p: np.array(g) for p, g in grads.items()}
                for path, i in still:
                    given[path][i] = np.nan
                given = jax.tree.map(jnp.asarray, given)
                given = fo.partition(given, state)[0] if flag else given
                updates, state = tx.update(given, state, params)
                params = fo.apply_updates(params, updates, frozen=state)
                fo.testing.assert_frozen(before, params, mask(still))
            else:
                chosen = picked(number)
                where = selector(chosen) if flag else mask(chosen)
                keep = bool(number % 2)
                for row in ROWS:
                    if row in chosen and action != "thaw":
                        reference[row].freeze(keep)
                    elif (row in chosen) == (action == "thaw") and action != "freeze":
                        reference[row].thaw(moments)
                options = {} if action == "thaw" else {"keep_state": keep}
                state = getattr(fo, action)(state, params, where, **options)
            now = mask({row for row, own in reference.items() if own.frozen})
            for path, flags in fo.mask(state, params).items():
                np.testing.assert_array_equal(np.broadcast_to(flags, len(now[path])), now[path])
            check_state(state, reference, moments)
            for path in SHAPES:
                expected = np.stack([reference[path, i].value for i in range(len(now[path]))])
                np.testing.assert_allclose(params[path], expected, rtol=1e-5, atol=2e-5)
