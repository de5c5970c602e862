"""Random edits and steps of random trees, against a reference written per leaf in NumPy."""

import dataclasses
from collections.abc import Callable
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
RATE, MOMENTUM, B1, B2, EPS = F(0.1), F(0.9), F(0.9), F(0.999), F(1e-8)
DECAY, NO_DECAY, NORM = F(0.1), F(0.0), F(1.0)
EVERY = 2


@dataclasses.dataclass
class Leaf:
    """A parameter with its own moments and its own step counter; no moments: they are dropped."""

    value: np.ndarray
    frozen: bool
    moments: list[np.ndarray] | None = None
    count: int = 0


def momentum(leaf: Leaf, grad: np.ndarray) -> None:
    leaf.moments = [grad + MOMENTUM * leaf.moments[0]]
    leaf.value = leaf.value - RATE * leaf.moments[0]


def adam(leaf: Leaf, grad: np.ndarray, decay: np.float32 = NO_DECAY) -> None:
    mu, nu = leaf.moments
    mu, nu = B1 * mu + (1 - B1) * grad, B2 * nu + (1 - B2) * grad**2
    leaf.moments, leaf.count = [mu, nu], leaf.count + 1
    mu_hat, nu_hat = mu / (1 - B1**leaf.count), nu / (1 - B2**leaf.count)
    leaf.value = leaf.value - RATE * (mu_hat / (np.sqrt(nu_hat) + EPS) + decay * leaf.value)


def adamw(leaf: Leaf, grad: np.ndarray) -> None:
    adam(leaf, grad, DECAY)


def accumulate(leaf: Leaf, grad: np.ndarray) -> None:
    leaf.moments, leaf.count = [leaf.moments[0] + grad], leaf.count + 1
    if leaf.count % EVERY == 0:
        leaf.value = leaf.value - RATE * leaf.moments[0] / F(EVERY)
        leaf.moments = [np.zeros_like(leaf.value)]


@dataclasses.dataclass(frozen=True)
class Case:
    inner: optax.GradientTransformation
    step: Callable[[Leaf, np.ndarray], None]
    moments: int
    counters: int
    clip: bool = False


CASES = {
    "momentum": Case(optax.sgd(0.1, momentum=0.9), momentum, moments=1, counters=0),
    "adam": Case(optax.adam(0.1), adam, moments=2, counters=1),
    "clip and adamw": Case(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
        adamw,
        moments=2,
        counters=1,
        clip=True,
    ),
    "MultiSteps": Case(
        optax.MultiSteps(optax.sgd(0.1), EVERY).gradient_transformation(),
        accumulate,
        moments=1,
        counters=2,
    ),
}


class Reference:
    """All leaves by path, each on its own; the norm alone is of several."""

    def __init__(self, case: Case, values: dict[str, np.ndarray], frozen: set[str]):
        self.case = case
        self.leaves = {path: Leaf(value, True) for path, value in values.items()}
        for path in set(values) - frozen:
            self.thaw(path)

    def thaw(self, path: str) -> None:
        leaf = self.leaves[path]
        leaf.frozen = False
        if leaf.moments is None:
            leaf.moments = [np.zeros_like(leaf.value) for _ in range(self.case.moments)]
            leaf.count = 0

    def freeze(self, path: str, keep_state: bool) -> None:
        leaf = self.leaves[path]
        if not (leaf.frozen or keep_state):
            leaf.moments = None
        leaf.frozen = True

    def set_frozen(self, paths: set[str], keep_state: bool) -> None:
        for path in self.leaves:
            self.freeze(path, keep_state) if path in paths else self.thaw(path)

    def step(self, grads: dict[str, np.ndarray]) -> None:
        live = {path: g for path, g in grads.items() if not self.leaves[path].frozen}
        norm = np.sqrt(sum((np.sum(g**2) for g in live.values()), F(0)))
        scale = NORM / norm if self.case.clip and norm > NORM else F(1)
        for path, grad in live.items():
            self.case.step(self.leaves[path], grad * scale)

    @property
    def frozen(self) -> set[str]:
        return {path for path, leaf in self.leaves.items() if leaf.frozen}

    @property
    def with_state(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves.values() if leaf.moments is not None]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *nodes, last = path.split("/")
        node = tree
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def flat(tree: Any) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


SHAPES = st.sampled_from([(), (2,), (2, 3), (1, 2)])
PATHS = [f"{node}{name}" for node in ("", "x/", "x/y/") for name in ("a", "b", "c10", "d1")]
# Picks leaves by bits, as how many leaves there are is drawn later.
PICK = st.integers(0, 63)
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 2**32 - 1), st.booleans()),
    st.tuples(st.just("freeze"), PICK, st.booleans()),
    st.tuples(st.just("thaw"), PICK, st.booleans()),
    st.tuples(st.just("set_frozen"), PICK, st.booleans()),
)


def draw_grads(paths: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Gradients away from zero, where Adam divides rounding by rounding."""
    rng = np.random.default_rng(seed)
    sizes = {path: rng.uniform(0.1, 2.0, value.shape) for path, value in paths.items()}
    return {p: F(x * rng.choice([-1.0, 1.0], x.shape)) for p, x in sizes.items()}


def spoil(grads: dict[str, np.ndarray], frozen: set[str]) -> dict[str, np.ndarray]:
    return {p: np.full_like(g, np.nan) if p in frozen else g for p, g in grads.items()}


def check_state(state: Any, reference: Reference) -> None:
    kept = reference.with_state
    rows = state.ages[0].shape[0] if state.ages else 0
    assert all(age.shape[0] == rows for age in state.ages)
    cohorts = 1 + rows
    assert cohorts <= max(1, len(kept))
    if reference.case.counters:
        assert cohorts >= len({leaf.count for leaf in kept})
    of_leaves = sum(leaf.value.nbytes * reference.case.moments for leaf in kept)
    of_counters = 4 * reference.case.counters * cohorts
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == of_leaves + of_counters


@pytest.mark.parametrize("name", CASES)
@examples(120)
@given(
    shapes=st.dictionaries(st.sampled_from(PATHS), SHAPES, min_size=1, max_size=6),
    frozen=PICK,
    actions=st.lists(ACTIONS, min_size=4, max_size=20),
)
def test_random_edits_and_steps_agree_with_a_reference_for_each_leaf(name, shapes, frozen, actions):
    case = CASES[name]
    values = {path: np.full(shape, 0.5 + i, F) for i, (path, shape) in enumerate(shapes.items())}
    ordered = sorted(values)

    def picked(bits: int) -> set[str]:
        return {path for i, path in enumerate(ordered) if bits >> i & 1}

    def mask(paths: set[str]) -> Any:
        return nested({path: path in paths for path in values})

    still = picked(frozen)
    if len(still) == len(values):
        still = set()  # of which freezable would warn
    reference = Reference(case, values, still)
    tx = fo.freezable(case.inner, mask(still))
    params = nested({path: jnp.asarray(value) for path, value in values.items()})
    state = tx.init(params)
    # Without compiling for each plan; optax mixes floats with integer counters.
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        for action, number, flag in actions:
            if action == "step":
                grads = draw_grads(values, number)
                reference.step(grads)
                given_grads = nested(spoil(grads, reference.frozen) if flag else grads)
                before = flat(params)
                updates, state = tx.update(jax.tree.map(jnp.asarray, given_grads), state, params)
                params = fo.apply_updates(params, updates, frozen=state)
                assert all(flat(params)[path] is before[path] for path in reference.frozen)
            else:
                paths = picked(number)
                # A selector and a mask must say the same.
                where = (fo.path(*paths) if paths else fo.nothing) if flag else mask(paths)
                if action == "thaw":
                    for path in paths:
                        reference.thaw(path)
                    state = fo.thaw(state, params, where)
                else:
                    keep = bool(number % 2) != flag
                    if action == "freeze":
                        for path in paths:
                            reference.freeze(path, keep)
                    else:
                        reference.set_frozen(paths, keep)
                    state = getattr(fo, action)(state, params, where, keep_state=keep)
            assert fo.mask(state, params) == mask(reference.frozen)
            check_state(state, reference)
            for path, value in flat(params).items():
                expected = reference.leaves[path].value
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
