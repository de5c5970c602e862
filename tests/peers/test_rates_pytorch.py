"""PyTorch's parameter groups, with rates changed mid-run, against `torch.optim` written in NumPy.

torch/optim/{sgd,adam,adamw}.py of pytorch/pytorch at 0113c318, 005941eb and 002d2f0b. A group is a
dict, and each `step` reads its "lr" anew, so a loop or a scheduler may set it at any time; moments
and step counts are per parameter and stay. Where "lr" goes: SGD multiplies the momentum buffer by
it, Adam the whole step, and AdamW also the decay, `p *= 1 - lr * weight_decay`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.by_name import Flat, as_params, assert_close, draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

ENCODER, HEAD = ("encoder/bias", "encoder/kernel"), ("head/kernel",)
Group = dict[str, Any]


class Torch:
    """An optimizer with parameter groups. `grads` has no entry where `.grad` is None."""

    def __init__(self, kind: str, groups: list[Group]):
        self.kind, self.param_groups = kind, groups
        self.state: dict[str, dict[str, Any]] = {}

    def step(self, values: Flat, grads: Flat) -> None:
        for group in self.param_groups:
            for name in group["params"]:
                if name in grads:
                    mine = self.state.setdefault(name, {"step": 0, "m": 0.0, "v": 0.0})
                    values[name] = self.moved(values[name], grads[name], mine, **group)

    def moved(self, p, g, mine, lr, weight_decay, params):
        if self.kind == "AdamW":
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        mine["step"] += 1
        if self.kind == "SGD":
            mine["m"] = 0.9 * mine["m"] + g
            return p - lr * mine["m"]
        mine["m"] += (g - mine["m"]) * (1 - 0.9)
        mine["v"] = 0.999 * mine["v"] + (1 - 0.999) * g * g
        step_size = lr / (1 - 0.9 ** mine["step"])
        denom = np.sqrt(mine["v"]) / np.sqrt(1 - 0.999 ** mine["step"]) + 1e-8
        return p - step_size * mine["m"] / denom


def ours(kind: str, groups: list[Group], frozen: Any = fo.nothing) -> Any:
    """The same optimizer, with the same groups: a factor of `fo.rates` is the "lr" of a leaf."""
    rates = fo.rates([(list(group["params"]), group["lr"]) for group in groups], default=None)
    label = fo.groups([(list(group["params"]), f"group {i}") for i, group in enumerate(groups)])
    decays = {
        f"group {i}": optax.add_decayed_weights(group["weight_decay"])
        for i, group in enumerate(groups)
    }
    decay = optax.partition(decays, label)
    chains = {
        "SGD": (decay, optax.trace(0.9), rates),
        "Adam": (decay, optax.scale_by_adam(), rates),
        "AdamW": (optax.scale_by_adam(), decay, rates),
    }
    return fo.freezable(optax.chain(*chains[kind], optax.scale(-1.0)), frozen)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_groups_whose_rates_change_mid_run_train_as_the_groups_of_pytorch(kind):
    values = draw(ENCODER + HEAD, seed=0)
    encoder = {"params": ENCODER, "lr": 0.01, "weight_decay": 0.3}
    head = {"params": HEAD, "lr": 0.1, "weight_decay": 0.0}
    torch, tx = Torch(kind, [encoder, head]), ours(kind, [encoder, head])
    params, traces = as_params(values), []
    state = tx.init(params)

    @jax.jit
    def step(params, grads, state):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    changes = {
        2: [(encoder, 0.05)],
        4: [(encoder, 0.0), (head, 0.02)],
        7: [(encoder, 0.03)],  # the moments moved on, so it jumps
    }
    for n in range(9):
        for group, lr in changes.get(n, []):
            group["lr"] = lr
            state = fo.adjust(state, params, list(group["params"]), lr)
        grads = draw(ENCODER + HEAD, seed=n + 1)
        torch.step(values, grads)
        params, state = step(params, as_params(grads), state)
        assert_close(params, values)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", [pytest.param("SGD", marks=pytest.mark.exhaustive), "AdamW"])
def test_a_group_that_is_added_later_has_its_own_rate_and_step_counts(kind):
    # add_param_group for what was frozen, and requires_grad = False for what trains; at the end
    # every lr is multiplied, as by a scheduler.
    values = draw(ENCODER + HEAD, seed=0)
    encoder = {"params": ENCODER, "lr": 0.01, "weight_decay": 0.3}
    head = {"params": HEAD, "lr": 0.1, "weight_decay": 0.0}
    torch, tx = Torch(kind, [head]), ours(kind, [encoder, head], frozen="encoder")
    params = as_params(values)
    state, update = tx.init(params), jax.jit(tx.update)
    trains = set(HEAD)
    for n in range(9):
        if n == 2:
            torch.param_groups.append(encoder)
            trains |= set(ENCODER)
            state = fo.thaw(state, params, "encoder")
        if n == 4:
            trains -= set(HEAD)
            state = fo.freeze(state, params, "head", keep_state=True)
        if n == 5:
            encoder["lr"], head["lr"] = 0.5 * encoder["lr"], 0.5 * head["lr"]
            for group in (encoder, head):
                state = fo.adjust(state, params, list(group["params"]), group["lr"])
        if n == 6:
            trains |= set(HEAD)
            state = fo.thaw(state, params, "head")
        grads = draw(ENCODER + HEAD, seed=n + 1)
        torch.step(values, {name: grads[name] for name in trains})
        updates, state = update(as_params(grads), state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        assert_close(params, values)


def test_the_decay_of_adamw_shrinks_with_the_rate_and_that_of_another_place_does_not():
    # The weight 1 with gradient 1, lr 0.1 and weight_decay 0.1: 1 * (1 - 0.01) - 0.1 = 0.89. Then
    # the group has lr 0.01: 0.89 * (1 - 0.001) - 0.01 = 0.87911. A factor in front of the decay
    # would leave the decay as it was: 0.89 * (1 - 0.01) - 0.01 = 0.8711.
    params = {"w": jnp.ones(())}
    adam, decay = optax.scale_by_adam(), optax.add_decayed_weights(0.1)
    behind = optax.chain(optax.adamw(0.1, weight_decay=0.1), fo.rates({}))
    inside = optax.chain(adam, decay, fo.rates([], 0.1), optax.scale(-1.0))
    before = optax.chain(adam, fo.rates({}), decay, optax.scale(-0.1))
    ends = {}
    for name, inner, factor in (
        ("behind", behind, 0.1),
        ("inside", inside, 0.01),
        ("before", before, 0.1),
    ):
        tx, now = fo.freezable(inner), params
        state = tx.init(now)
        for step in range(2):
            if step == 1:
                assert_close(now, {"w": 0.89})
                state = fo.adjust(state, now, True, factor)
            updates, state = tx.update({"w": jnp.ones(())}, state, now)
            now = fo.apply_updates(now, updates)
        ends[name] = float(now["w"])
    assert ends == pytest.approx({"behind": 0.87911, "inside": 0.87911, "before": 0.8711})


def test_the_rates_of_groups_are_saved_and_loaded_with_the_state():
    # `state_dict()["param_groups"]` has the changed "lr", and `load_state_dict` brings it back,
    # also where the new optimizer was built with other rates.
    params = as_params(draw(ENCODER + HEAD, seed=0))
    groups = [
        {"params": ENCODER, "lr": 0.01, "weight_decay": 0.3},
        {"params": HEAD, "lr": 0.1, "weight_decay": 0.0},
    ]
    tx = ours("AdamW", groups)
    state = fo.adjust(tx.init(params), params, "encoder", 0.025)
    anew = ours("AdamW", [{**group, "lr": 1.0} for group in groups])
    loaded = fo.import_state(anew, params, fo.export_state(state))
    factors = optax.tree_utils.tree_get(loaded, "factors")
    assert_close(factors, {**dict.fromkeys(ENCODER, 0.025), **dict.fromkeys(HEAD, 0.1)})
