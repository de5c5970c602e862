"""`since_thaw`: each leaf is at its own place in the schedule, through all edits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.memories import assert_same_bits
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

F = np.float32
HOLE = optax.MaskedNode()
LEAVES = ["a", "b", "c", "d"]
ROWS = 3
RATE, B1, B2, EPS = F(0.1), F(0.9), F(0.999), F(1e-8)
WARMUP = optax.linear_schedule(0.0, 1.0, 4)
RULES = {"a": 0.5, "b": 0.25}


@dataclasses.dataclass
class Row:
    """One row of a leaf, with moments, a step count and a factor of its own."""

    rule: float
    frozen: bool = False
    has_state: bool = True
    mu: Any = 0
    nu: Any = 0
    count: int = 0
    factor: Any = None

    def reset(self) -> None:
        self.mu = self.nu = F(0)
        self.count, self.has_state, self.factor = 0, True, F(self.rule)

    def update(self, grad: Any, adam: bool) -> Any:
        """Adam or none, then the schedule at the row's own count, then its factor."""
        warm = F(min(self.count / 4, 1.0))
        self.count += 1
        if not adam:
            return -RATE * grad * warm * self.factor
        self.mu, self.nu = B1 * self.mu + (1 - B1) * grad, B2 * self.nu + (1 - B2) * grad**2
        mu_hat, nu_hat = self.mu / (1 - B1**self.count), self.nu / (1 - B2**self.count)
        return -RATE * mu_hat / (np.sqrt(nu_hat) + EPS) * warm * self.factor


class Reference:
    """Every row of every leaf by itself, in plain loops."""

    def __init__(self, frozen: set[tuple[str, int]], adam: bool = True):
        self.adam = adam
        self.rows = {(name, i): Row(RULES.get(name, 1)) for name in LEAVES for i in range(ROWS)}
        for key, row in self.rows.items():
            row.reset()
            row.frozen, row.has_state = key in frozen, key not in frozen

    def set_frozen(self, frozen: set[tuple[str, int]], keep_state: bool) -> None:
        for key, row in self.rows.items():
            if key in frozen:
                row.has_state = row.has_state and (row.frozen or keep_state)
            elif not row.has_state:
                row.reset()
            row.frozen = key in frozen

    def updates(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(
                [
                    -0.0 if row.frozen else row.update(grads[name][i], self.adam)
                    for i, row in enumerate(self.rows[name, i] for i in range(ROWS))
                ],
                F,
            )
            for name in LEAVES
        }

    @property
    def frozen(self) -> set[tuple[str, int]]:
        return {key for key, row in self.rows.items() if row.frozen}


def mask_of(keys: set[tuple[str, int]]) -> Any:
    return {name: np.asarray([(name, i) in keys for i in range(ROWS)]) for name in LEAVES}


def draw_keys(random: Any, rows: bool) -> set[tuple[str, int]]:
    if not rows:
        return {(name, i) for name in LEAVES if random.integers(2) for i in range(ROWS)}
    # Of the first two leaves, so that there are few parts.
    whole = {(name, i) for name in "cd" if random.integers(2) for i in range(ROWS)}
    return whole | {(name, i) for name in "ab" for i in range(ROWS) if random.random() < 0.3}


def make_tx(spec: Any = fo.nothing, adam: bool = True) -> Any:
    inner = optax.adam(0.1) if adam else optax.sgd(0.1)
    return fo.freezable(optax.chain(inner, fo.since_thaw(WARMUP), fo.rates(RULES)), spec)


PARAMS = {name: jnp.zeros(ROWS) for name in LEAVES}


def random_run(seed: int, rows: bool, adam: bool, length: int) -> None:
    """Random edits and steps; whole updates against the reference after each step."""
    random = np.random.default_rng(seed)
    start = draw_keys(random, rows) - {("d", 0)}
    reference, tx = Reference(start, adam), make_tx(mask_of(start), adam)
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(length):
        action = random.choice(["step", "step", "freeze", "thaw", "set", "adjust", "export"])
        keys, keep = draw_keys(random, rows), bool(random.integers(2))
        if action == "step":
            grads = {name: random.uniform(0.5, 2.0, ROWS).astype(F) for name in LEAVES}
            updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, params)
            expected = reference.updates(grads)
            for name in LEAVES:
                np.testing.assert_allclose(updates[name], expected[name], rtol=2e-5, atol=1e-7)
            continue
        if action == "adjust":
            # The factor of a part is one for all its rows: adjust whole leaves.
            names = {n for n in LEAVES if any(reference.rows[n, i].has_state for i in range(ROWS))}
            names &= {name for name, _ in keys}
            factor = float(random.choice([0.0, 0.5, 2.0]))
            for key, row in reference.rows.items():
                if key[0] in names and row.has_state:
                    row.factor = F(factor)
            state = fo.adjust(state, params, list(names), factor) if names else state
            continue
        frozen = reference.frozen
        if action == "freeze":
            after, state = frozen | keys, fo.freeze(state, params, mask_of(keys), keep_state=keep)
        elif action == "thaw":
            after, state = frozen - keys, fo.thaw(state, params, mask_of(keys))
        elif action == "set":
            after = keys
            state = fo.set_frozen(state, params, mask_of(keys), keep_state=keep)
        else:
            exported = jax.tree.map(np.asarray, fo.export_state(state))
            after, keep = keys if keep else frozen, False
            spec = mask_of(keys) if after is keys else None
            state = fo.import_state(make_tx(adam=adam), params, exported, frozen=spec)
        reference.set_frozen(after, keep)
        np.testing.assert_equal(
            {k: np.broadcast_to(x, ROWS) for k, x in fo.mask(state, params).items()},
            mask_of(reference.frozen),
        )


RUNS = {
    "leaves": (False, True, range(1, 2)),
    "rows": (True, False, range(1)),
    "leaves, more": (False, True, range(2, 27)),
    "rows, more": (True, True, range(25)),
}


@pytest.mark.parametrize(("rows", "adam", "seeds"), cases(RUNS, {"leaves", "rows"}))
def test_random_edits_leave_each_leaf_at_its_own_place_in_the_schedule(rows, adam, seeds):
    with jax.disable_jit():
        for seed in seeds:
            random_run(seed, rows, adam, 20)


def counts(state: Any) -> list[int]:
    """The count of each cohort."""
    (found,) = [x for x in jax.tree.leaves(state, is_leaf=_is_node) if _is_node(x)]
    assert jax.tree.leaves(found.leaves) == []
    return [int(found.count), *([] if not state.ages else state.ages[-1].tolist())]


def _is_node(x: Any) -> bool:
    return type(x).__name__ == "SinceThawState"


def test_the_schedule_is_called_with_zero_at_the_first_update_of_a_leaf_and_counts_its_steps():
    table = jnp.asarray([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    tx = fo.freezable(fo.since_thaw(lambda n: table[n]), "b")
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state, seen = tx.init(params), []

    def step() -> None:
        nonlocal state
        updates, state = tx.update(params, state, params)
        seen.append((float(updates["a"][0]), float(updates["b"][0])))

    step()
    state = fo.thaw(state, params, "b")
    step()
    step()
    state = fo.freeze(state, params, "a", keep_state=True)
    step()
    state = fo.thaw(state, params, "a")
    step()
    state = fo.set_frozen(state, params, "b")
    step()
    state = fo.thaw(state, params, "b")
    step()
    assert seen == [(2, 0), (3, 2), (5, 3), (0, 5), (7, 7), (11, 0), (13, 2)]
    assert counts(state) == [6, 1]


def test_scheduled_counts_the_steps_that_each_phase_trains_a_leaf_in_one_program():
    phases = fo.Phases({0: ["b", "c"], 2: ["a", "c"], 3: "c", 5: fo.nothing})
    chain = optax.chain(optax.adam(0.1), fo.since_thaw(WARMUP), fo.rates(RULES))
    tx = fo.scheduled(chain, phases)
    traces: list[int] = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(grads: Any, state: Any) -> Any:
        traces.append(1)
        return tx.update(grads, state, PARAMS)

    state, reference = tx.init(PARAMS), Reference(set())
    all_of = lambda names: {(name, i) for name in names for i in range(ROWS)}  # noqa: E731
    for step in range(7):
        frozen = [name for name, flag in fo.mask(phases.at(step), PARAMS).items() if flag]
        reference.set_frozen(all_of(frozen), True)
        grads = {name: np.full(ROWS, 1.0 + step, F) for name in LEAVES}
        updates, state = update(grads, state)
        expected = reference.updates(grads)
        for name in LEAVES:
            np.testing.assert_allclose(updates[name], expected[name], rtol=2e-5, atol=1e-7)
    assert len(traces) == 1


def test_outside_of_freezable_it_counts_all_steps():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.chain(fo.freezable(optax.sgd(1.0), "b"), fo.since_thaw(lambda n: n))
    state = tx.init(params)
    for n in range(3):
        state = fo.thaw(state, params, "b") if n == 2 else state
        updates, state = tx.update(params, state, params)
        expected = {"a": -F(n) * np.ones(2, F), "b": (-F(n) if n == 2 else -0.0) * np.ones(2, F)}
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"]


def test_an_update_keeps_its_dtype_and_is_negative_zero_where_the_schedule_is_zero():
    params = {name: jnp.asarray([1.5, -0.5, jnp.nan], jnp.dtype(name)) for name in DTYPES}
    tx = fo.since_thaw(lambda n: n)  # integers
    with jax.numpy_dtype_promotion("strict"):
        state, update = tx.init(params), jax.jit(tx.update)
        updates, state = update(params, state)
        zero = lambda x: np.full(3, complex(-0.0, -0.0) if x.dtype.kind == "c" else -0.0, x.dtype)  # noqa: E731
        assert_same_bits(updates, jax.tree.map(zero, params))
        _, state = update(params, state)
        updates, state = update(params, state)
    for name in DTYPES:
        assert updates[name].dtype == name
        as_wide = np.complex64 if name == "complex64" else np.float32
        expected = np.asarray([3.0, -1.0, np.nan]).astype(as_wide)
        np.testing.assert_array_equal(np.asarray(updates[name]).astype(as_wide), expected)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 5),
        lambda n: 0.5,
        lambda n: np.float64(0.5),
        lambda n: jnp.asarray(0.5, jnp.bfloat16),
        lambda n: jnp.where(n < 2, 1, 2),
    ],
    ids=["optax", "float", "NumPy", "bfloat16", "integer"],
)
def test_a_schedule_may_give_any_real_number(schedule):
    tx, params = fo.freezable(fo.since_thaw(schedule)), {"a": jnp.full(2, 3.0)}
    state = tx.init(params)
    for n in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        expected = F(np.asarray(schedule(jnp.asarray(n))).astype(F)) * F(3)
        np.testing.assert_allclose(updates["a"], np.full(2, expected), rtol=1e-6)


def test_what_is_no_schedule_is_an_error_at_once():
    for schedule in (0.5, None, "cosine", jnp.ones(3)):
        with pytest.raises(TypeError, match=r"fo\.since_thaw takes a schedule, a function"):
            fo.since_thaw(schedule)


def test_its_state_is_one_counter_for_each_cohort_and_no_params_to_optax():
    tx = make_tx("b", adam=False)
    state = fo.thaw(tx.init(PARAMS), PARAMS, "b")
    assert [x.shape for x in jax.tree.leaves(state)] == [(), (), (), (), (), (1,)]
    kinds = optax.tree_map_params(tx, lambda x: "P", state, transform_non_params=lambda x: "N")
    assert jax.tree.leaves(kinds) == ["N"] * 6
    assert jax.tree.structure(kinds) == jax.tree.structure(state)


def test_two_of_them_in_one_chain_count_alike():
    tx = fo.freezable(optax.chain(fo.since_thaw(lambda n: n + 1), fo.since_thaw(lambda n: n)), "b")
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = tx.init(params)
    for n in range(4):
        state = fo.thaw(state, params, "b") if n == 1 else state
        updates, state = tx.update(params, state, params)
        assert updates["a"].tolist() == [(n + 1) * n]
        assert updates["b"].tolist() == ([n * (n - 1)] if n else [0])


def test_it_follows_the_leaves_of_a_group_that_optax_masks_and_steps_that_it_skips():
    labels = {"a": "x", "b": "y", "c": "x", "d": "y"}
    inner = optax.partition(
        {"x": optax.chain(optax.sgd(1.0), fo.since_thaw(lambda n: n)), "y": optax.sgd(1.0)}, labels
    )
    tx = fo.freezable(inner, ["c"])
    ones = {name: jnp.ones(1) for name in LEAVES}
    state = tx.init(ones)
    for n in range(4):
        state = fo.thaw(state, ones, "c") if n == 2 else state
        updates, state = tx.update(ones, state, ones)
        found = {name: float(x[0]) for name, x in updates.items()}
        assert found == {"a": -n, "b": -1, "c": -(n - 2) if n > 2 else 0, "d": -1}
    skipping = optax.apply_if_finite(optax.chain(optax.sgd(1.0), fo.since_thaw(lambda n: n)), 5)
    tx = fo.freezable(skipping, ["b", "c", "d"])
    state = tx.init(ones)
    for n, grads in enumerate([ones, jax.tree.map(lambda x: x * jnp.nan, ones), ones, ones]):
        updates, state = tx.update(grads, state, ones)
        assert float(updates["a"][0]) == -[0, 0, 1, 2][n]
