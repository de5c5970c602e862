"""`adjust!` of Optimisers.jl, also on what `freeze!` froze, against its `Leaf` written in NumPy.

Optimisers.jl 0.4.8 at b3595f5c: src/adjust.jl, src/interface.jl (`Leaf`, `update!`) and the rules
in src/rules.jl. There each leaf has its rule, with a rate `eta`, its state and a flag; `adjust!`
replaces the rule and leaves state and flag alone. Here the rates are the factors of `fo.rates`
where the rule applies `eta`: in front of the momentum, or behind Adam.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.by_name import as_params, assert_close, draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

ETA, RHO, BETA, LAMBDA = 0.05, 0.9, (0.9, 0.999), 0.1
NAMES = ("layers/0/weight", "layers/0/bias", "layers/1/weight")
FIRST, LAST = NAMES[:2], NAMES[2:]


class Leaf:
    """What `setup` makes for one array: its rule as data, its state, and whether it is frozen."""

    def __init__(self, rule: str, like: np.ndarray, eta: float = ETA):
        self.rule, self.eta, self.frozen, self.steps = rule, eta, False, 0
        self.first, self.second = np.zeros_like(like), np.zeros_like(like)

    def step(self, value: np.ndarray, grad: np.ndarray) -> np.ndarray:
        return value if self.frozen else value - self.change(value, grad)

    def change(self, value: np.ndarray, grad: np.ndarray) -> np.ndarray:
        if self.rule == "Momentum":  # the velocity remembers the rates that it was fed with
            self.first = RHO * self.first + self.eta * grad
            return self.first
        if self.rule == "Nesterov":
            old, self.first = self.first, RHO * self.first - self.eta * grad
            return (1 + RHO) * self.eta * grad - RHO**2 * old
        self.steps += 1
        self.first = BETA[0] * self.first + (1 - BETA[0]) * grad
        self.second = BETA[1] * self.second + (1 - BETA[1]) * grad**2
        mean, square = (
            m / (1 - b**self.steps) for m, b in zip((self.first, self.second), BETA, strict=True)
        )
        direction, decay = mean / (np.sqrt(square) + 1e-8), LAMBDA * value
        return {
            "Adam": self.eta * direction,
            "AdamW(couple = true)": self.eta * (direction + decay),
            "AdamW(couple = false)": self.eta * direction + decay,
        }[self.rule]


def ours(rule: str, eta: float = ETA) -> optax.GradientTransformationExtraArgs:
    """The same rule; its factors are the very rates of the leaves."""
    rates, down, decay = fo.rates([], eta), optax.scale(-1.0), optax.add_decayed_weights(LAMBDA)
    chains = {
        "Momentum": (rates, optax.trace(RHO)),
        "Nesterov": (rates, optax.trace(RHO, nesterov=True)),
        "Adam": (optax.scale_by_adam(*BETA), rates),
        "AdamW(couple = true)": (optax.scale_by_adam(*BETA), decay, rates),
        "AdamW(couple = false)": (optax.scale_by_adam(*BETA), rates, decay),
    }
    return fo.freezable(optax.chain(*chains[rule], down))


def factors(state: Any) -> Any:
    return optax.tree_utils.tree_get(state, "factors")


def nbytes(leaf: Any) -> bytes:
    return np.asarray(leaf).tobytes()


# What happens before a step: (verb, the leaves, the rate).
EVENTS: dict[int, list[tuple[str, Any, float]]] = {
    1: [("adjust!", FIRST, 0.2)],
    2: [("freeze!", FIRST, 0)],
    3: [("adjust!", FIRST, 0.01), ("adjust!", LAST, 0.0)],
    5: [("adjust!", NAMES, 0.1)],
    6: [("thaw!", FIRST[:1], 0)],
    7: [("thaw!", FIRST, 0), ("freeze!", LAST, 0), ("adjust!", LAST, 0.3)],
    8: [("thaw!", NAMES, 0)],
}


@pytest.mark.parametrize(
    "rule",
    [
        "Momentum",
        pytest.param("Nesterov", marks=pytest.mark.exhaustive),
        "Adam",
        pytest.param("AdamW(couple = true)", marks=pytest.mark.exhaustive),
        "AdamW(couple = false)",
    ],
)
def test_adjust_and_freeze_and_thaw_in_any_order_do_what_they_do_to_a_leaf(rule):
    values = draw(NAMES, seed=0)
    leaves = {name: Leaf(rule, value) for name, value in values.items()}
    params, tx = as_params(values), ours(rule)
    update, state = jax.jit(tx.update), tx.init(params)
    for n in range(10):
        for verb, names, eta in EVENTS.get(n, []):
            for name in names:
                if verb == "adjust!":
                    leaves[name].eta = eta
                else:
                    leaves[name].frozen = verb == "freeze!"
            where = list(names)
            if verb == "adjust!":
                state = fo.adjust(state, params, where, eta)
            elif verb == "freeze!":
                state = fo.freeze(state, params, where, keep_state=True)
            else:
                state = fo.thaw(state, params, where)
        grads, before = draw(NAMES, seed=n + 1), params
        values = {name: leaves[name].step(value, grads[name]) for name, value in values.items()}
        updates, state = update(as_params(grads), state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        assert_close(params, values)
        # A rate of zero is no frozen leaf: only those of `freeze!` are the same objects.
        frozen = {name for name in NAMES if leaves[name].frozen}
        is_same = jax.tree.map(lambda a, b: a is b, before, params)
        assert {name for name in NAMES if _at(is_same, name)} == frozen
    assert_close(factors(state), {name: leaf.eta for name, leaf in leaves.items()})


def _at(tree: Any, name: str) -> Any:
    for key in name.split("/"):
        tree = tree[key]
    return tree


def test_freeze_stops_the_momentum_of_a_part_of_the_model_at_the_numbers_of_its_manual():
    # m = (x = ([1.0], 2.0), y = [3.0]), Momentum(0.01, 0.9), freeze!(s.x), gradients of pi.
    params = {"x": (jnp.ones(1), jnp.asarray(2.0)), "y": jnp.asarray([3.0])}
    grads = {
        "x": (jnp.asarray([math.pi]), jnp.asarray(10 * math.pi)),
        "y": jnp.asarray([100 * math.pi]),
    }
    tx = ours("Momentum", eta=0.01)
    state = fo.freeze(tx.init(params), params, "x", keep_state=True)
    updates, state = tx.update(grads, state, params)
    new = fo.apply_updates(params, updates, frozen=state)
    assert_close(new, {"x/0": 1.0, "x/1": 2.0, "y": -0.14159265358979312})
    trace = optax.tree_utils.tree_get(fo.thaw(state, params, "x"), "trace")
    assert_close(trace, {"x/0": 0.0, "x/1": 0.0, "y": 3.14159})


def test_adjust_leaves_the_stored_momentum_untouched():
    # Nesterov(0.001, 0.9) after the gradients 16 and 88 has stored -0.016 and -0.088; adjust!(st,
    # 0.123) changes the rate alone. The momentum of optax has the other sign.
    params, tx = {"vec": jnp.asarray([0.5, 0.25])}, ours("Nesterov", eta=0.001)
    _, state = tx.update({"vec": jnp.asarray([16.0, 88.0])}, tx.init(params), params)
    assert_close(optax.tree_utils.tree_get(state, "trace"), {"vec": [0.016, 0.088]})
    adjusted = fo.adjust(state, params, True, 0.123)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(adjusted), strict=True)
    assert [a is b for a, b in pairs].count(False) == 1
    assert_close(factors(adjusted), {"vec": 0.123})
    assert_close(factors(state), {"vec": 0.001})  # `adjust` without a mark, too


@pytest.mark.parametrize(("rule", "coasts"), [("Momentum", True), ("Adam", False)])
def test_a_rate_of_zero_stops_adam_but_lets_momentum_run_out(rule, coasts):
    # One gradient of 1, then the rate 0: a velocity of 0.05 goes on as 0.045, 0.0405, …
    params, tx = {"w": jnp.ones(())}, ours(rule)
    grads, leaf, value = {"w": jnp.ones(())}, Leaf(rule, np.ones(())), np.ones(())
    updates, state = tx.update(grads, tx.init(params), params)
    params, value = fo.apply_updates(params, updates), leaf.step(value, np.ones(()))
    state, leaf.eta = fo.adjust(state, params, True, 0.0), 0.0
    stopped = nbytes(params["w"])
    updates, state = tx.update(grads, state, params)
    params, value = fo.apply_updates(params, updates), leaf.step(value, np.ones(()))
    assert_close(params, {"w": value})
    assert (nbytes(params["w"]) != stopped) == coasts
    np.testing.assert_allclose(params["w"], 1 - 0.05 - 0.045 if coasts else 0.95, rtol=1e-6)


def test_adjust_of_a_shared_array_is_for_all_its_places():
    # Arrays that are one object have one Leaf in Optimisers.jl, which gets the sum of gradients.
    table = jnp.asarray([1.0, -2.0])
    params = {"embed": table, "unembed": table}
    groups = fo.tied_paths(params)
    assert groups == [("embed", "unembed")]
    adam = optax.chain(optax.scale_by_adam(*BETA), fo.rates([], ETA), optax.scale(-1.0))
    tx = fo.freezable(fo.tie(adam, *groups))
    leaf, value = Leaf("Adam", np.zeros(2)), np.asarray(table, np.float64)
    state = tx.init(params)
    for n in range(3):
        if n == 1:
            state, leaf.eta = fo.adjust(state, params, ["embed", "unembed"], 0.3), 0.3
        grads = draw(("embed", "unembed"), seed=n)
        value = leaf.step(value, grads["embed"] + grads["unembed"])
        updates, state = tx.update(as_params(grads), state, params)
        params = fo.apply_updates(params, updates)
        assert_close(params, {"embed": value, "unembed": value})


def test_a_leaf_whose_state_was_dropped_has_no_rate_to_adjust():
    # There `freeze!` keeps the Leaf, and its rate with it: here that is keep_state=True.
    params, tx = as_params(draw(NAMES, seed=0)), ours("Adam")
    parked = fo.freeze(tx.init(params), params, "layers/0", keep_state=True)
    thawed = fo.thaw(fo.adjust(parked, params, "layers/0", 0.3), params, "layers/0")
    expected = {**dict.fromkeys(FIRST, 0.3), **dict.fromkeys(LAST, ETA)}
    assert_close(factors(thawed), expected)
    dropped = fo.freeze(tx.init(params), params, "layers/0")
    with pytest.raises(ValueError, match=r"layers/0/bias.* has no factor"):
        fo.adjust(dropped, params, "layers/0", 0.3)
    assert_close(factors(fo.thaw(dropped, params, "layers/0")), dict.fromkeys(NAMES, ETA))
