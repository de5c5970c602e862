"""Random edits of rows along any axis and of elements, and steps, against a reference in NumPy.

The reference keeps for each single element a value, moments and a step count of its own.
"""

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
from freeze_optax._rows.subset import Subset
from freeze_optax._state.plan import DROPPED
from tests.support.sampling import examples

F = np.float32
RATE, MOMENTUM, B1, B2, EPS = F(0.1), F(0.9), F(0.9), F(0.999), F(1e-8)
SHAPES = {"cube": (2, 3, 2), "table": (3, 4), "vector": (4,)}


@dataclasses.dataclass
class Elements:
    """The elements of a leaf. Without state, moments are dropped."""

    value: np.ndarray
    moments: list[np.ndarray]
    frozen: np.ndarray
    has_state: np.ndarray
    count: np.ndarray

    def freeze(self, chosen: np.ndarray, keep_state: bool) -> None:
        if not keep_state:
            self.has_state &= ~(chosen & ~self.frozen)
        self.frozen |= chosen

    def thaw(self, chosen: np.ndarray) -> None:
        self.frozen &= ~chosen
        fresh = chosen & ~self.has_state
        self.has_state |= fresh
        self.count[fresh] = 0
        for moment in self.moments:
            moment[fresh] = 0

    def adopt(self, count: int) -> None:
        """Trains all with one step count, as `release` and `adopt` do."""
        for moment in self.moments:
            moment[~self.has_state] = 0
        self.frozen[...], self.has_state[...], self.count[...] = False, True, count


def momentum(own: Elements, grad: np.ndarray) -> None:
    (trace,), live = own.moments, ~own.frozen
    trace[live] = (grad + MOMENTUM * trace)[live]
    own.value[live] -= RATE * trace[live]


def adam(own: Elements, grad: np.ndarray) -> None:
    (mu, nu), live = own.moments, ~own.frozen
    mu[live] = (B1 * mu + (1 - B1) * grad)[live]
    nu[live] = (B2 * nu + (1 - B2) * grad**2)[live]
    own.count[live] += 1
    n = own.count[live]
    mu_hat, nu_hat = mu[live] / F(1 - B1**n), nu[live] / F(1 - B2**n)
    own.value[live] -= RATE * mu_hat / (np.sqrt(nu_hat) + EPS)


CASES = {
    "momentum": (optax.sgd(0.1, momentum=0.9), momentum, ["trace"]),
    "adam": (optax.adam(0.1), adam, ["mu", "nu"]),
}


def _atoms(name: str) -> Any:
    """Specs of one leaf, each with its full mask."""
    shape = SHAPES[name]
    size = int(np.prod(shape))

    def rows(axis: int, bits: int) -> Any:
        chosen = [bool(bits >> i & 1) for i in range(shape[axis])]
        mask = np.zeros(shape, bool)
        np.moveaxis(mask, axis, 0)[chosen] = True
        return fo.rows(name, chosen, axis=axis), mask

    def elements(bits: int) -> Any:
        mask = np.array([bits >> i & 1 for i in range(size)], bool).reshape(shape)
        return fo.elements(name, mask), mask

    return st.one_of(
        st.builds(rows, st.integers(-len(shape), len(shape) - 1), st.integers(1, 14)),
        st.builds(elements, st.integers(0, 2**size - 1)),
        st.just((fo.path(name), np.ones(shape, bool))),
    )


def _combined(choices: list[tuple[str, Any, Any, str]]) -> Any:
    """A spec of some leaves, and the full mask of each leaf."""
    masks, specs = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}, []
    for name, (first, of_first), (second, of_second), how in choices:
        spec, mask = {
            "alone": (first, of_first),
            "or": (first | second, of_first | of_second),
            "minus": (first - second, of_first & ~of_second),
        }[how]
        specs.append(spec)
        masks[name] |= mask
    return specs, masks


CHOICES = st.sampled_from(list(SHAPES)).flatmap(
    lambda name: st.tuples(
        st.just(name), _atoms(name), _atoms(name), st.sampled_from(["alone", "or", "minus"])
    )
)
SPECS = st.lists(CHOICES, min_size=1, max_size=3).map(_combined)
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 2**32 - 1), st.booleans()),
    st.tuples(st.sampled_from(["freeze", "thaw", "set_frozen"]), SPECS, st.booleans()),
    st.tuples(st.just("export"), st.none(), st.booleans()),
    st.tuples(st.just("adopt"), SPECS, st.booleans()),
)


def draw_grads(seed: int) -> dict[str, np.ndarray]:
    """Gradients away from zero, where Adam divides rounding by rounding."""
    rng = np.random.default_rng(seed)
    sizes = {path: rng.uniform(0.1, 2.0, shape) for path, shape in SHAPES.items()}
    return {path: F(x * rng.choice([-1.0, 1.0], x.shape)) for path, x in sizes.items()}


def counts_of(state: Any, name: str) -> np.ndarray:
    """The step count of each element of a leaf in a state of Adam; -1 without a state."""
    plan, leaf = state.plan, list(SHAPES).index(name)
    counts = np.full(SHAPES[name], -1)
    first = int(optax.tree_utils.tree_get(state.inner, "count"))
    parts = plan.part_table.parts if plan.part_table else [(i, None) for i in range(len(SHAPES))]
    for (of_leaf, subset), cohort in zip(parts, plan.cohorts, strict=True):
        if of_leaf == leaf and cohort != DROPPED:
            where = subset.mask_of(SHAPES[name]) if isinstance(subset, Subset) else True
            assert np.all(counts[where] == -1), "two parts have the same element"
            counts[where] = int(state.ages[0][cohort - 1]) if cohort else first
    return counts


def check(state: Any, params: Any, reference: dict[str, Elements], moments: list[str]) -> None:
    released = fo.release(state, params)
    frozen = fo.mask(state, params)
    for name, own in reference.items():
        mask = frozen[name]
        if np.ndim(mask) == 1:
            mask = mask.reshape(-1, *[1] * (own.value.ndim - 1))
        np.testing.assert_array_equal(np.broadcast_to(mask, own.frozen.shape), own.frozen)
        np.testing.assert_allclose(params[name], own.value, rtol=1e-5, atol=2e-5)
        for moment, expected in zip(moments, own.moments, strict=True):
            kept = np.where(own.has_state, expected, 0)
            made = optax.tree_utils.tree_get(released, moment)[name]
            np.testing.assert_allclose(made, kept, rtol=1e-5, atol=1e-6)
        if "nu" in moments:
            counts = counts_of(state, name)
            np.testing.assert_array_equal(counts, np.where(own.has_state, own.count, -1))
    size = sum(int(own.has_state.sum()) for own in reference.values()) * len(moments) * 4
    counters = 4 * (1 + (state.ages[0].shape[0] if state.ages else 0)) * ("nu" in moments)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == size + counters


def start(inner: Any, spec: Any, masks: Any, moments: list[str]) -> Any:
    values = {path: np.full(shape, 0.5 + i, F) for i, (path, shape) in enumerate(SHAPES.items())}
    reference = {
        name: Elements(
            x.copy(),
            [np.zeros_like(x) for _ in moments],
            masks[name].copy(),
            ~masks[name],
            np.zeros(x.shape, int),
        )
        for name, x in values.items()
    }
    tx, params = fo.freezable(inner, spec), jax.tree.map(jnp.asarray, values)
    return tx, params, tx.init(params), reference


def edited(
    state: Any, params: Any, action: str, spec: Any, masks: Any, keep: bool, own: Any
) -> Any:
    for name, elements in own.items():
        if action != "thaw":
            elements.freeze(masks[name], keep)
        if action != "freeze":
            elements.thaw(masks[name] if action == "thaw" else ~masks[name])
    where = masks if keep else spec
    options = {} if action == "thaw" else {"keep_state": keep}
    return getattr(fo, action)(state, params, where, **options)


@pytest.mark.parametrize("name", CASES)
@examples(24)
@given(first=SPECS, actions=st.lists(ACTIONS, min_size=4, max_size=12))
@pytest.mark.filterwarnings("ignore:.*nothing.*train")
def test_random_edits_and_steps_agree_with_a_reference_for_each_element(name, first, actions):
    inner, step, moments = CASES[name]
    tx, params, state, reference = start(inner, *first, moments)
    # Without compiling for each plan; optax mixes floats with integer counters.
    with jax.numpy_dtype_promotion("standard"):
        for action, argument, flag in actions:
            if action == "step":
                grads, before = draw_grads(argument), params
                given = {p: np.where(reference[p].frozen, F(np.nan), g) for p, g in grads.items()}
                for path, own in reference.items():
                    step(own, grads[path])
                given = jax.tree.map(jnp.asarray, given)
                given = fo.partition(given, state)[0] if flag else given
                updates, state = tx.update(given, state, params)
                params = fo.apply_updates(params, updates, frozen=state)
                for path, own in reference.items():
                    old, new = np.asarray(before[path]), np.asarray(params[path])
                    assert old[own.frozen].tobytes() == new[own.frozen].tobytes()
            elif action == "export":
                exported = jax.tree.map(np.asarray, fo.export_state(state))
                state = fo.import_state(tx, params, exported)
            elif action == "adopt":
                released = fo.release(state, params)
                count = 0 if name == "momentum" else int(state.inner[0].count)
                for own in reference.values():
                    own.adopt(count)
                state = fo.adopt(tx, released, params)
                state = edited(state, params, "set_frozen", *argument, flag, reference)
            else:
                state = edited(state, params, action, *argument, flag, reference)
            check(state, params, reference, moments)
