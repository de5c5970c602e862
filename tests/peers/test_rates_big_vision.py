"""The optimizer config of big_vision, against its rules written in plain Python and NumPy.

google-research/big_vision at 0127fb6b: big_vision/optax.py (`make`), big_vision/utils.py
(`make_mask_trees`, `check_and_compile_patterns`). A table is a list of pairs of a regular
expression and a value. For a param the first pattern that matches its whole name, with slashes,
counts.
`schedule` must have a match for each param, and None there freezes; `lr_mults` and `wd_mults` need
none, and are 1 and 0 without. The step of a param is

    -schedule(t) * (lr * lr_mult * direction + wd * wd_mult * param)

so a multiplier of the rate leaves the decay alone, and neither `lr` nor `lr_mult` is in the decay.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.by_name import Flat, as_params, assert_close, draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

NAMES = (
    "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias",
    "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel",
    "img/embedding/kernel",
    "img/pos_embedding",
    "t",
    "txt/Embed_0/embedding",
    "txt/head/bias",
    "txt/head/kernel",
)
Rules = Sequence[tuple[str, Any]]


class Config(NamedTuple):
    schedule: Rules
    lr: float = 0.02
    lr_mults: Rules = ()
    wd: float = 0.0
    wd_mults: Rules = ((".*/kernel$", 1.0),)
    grad_clip_norm: float = 1e9


def first(rules: Rules, name: str, default: Any) -> Any:
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    return default


# Theirs


def check(config: Config) -> None:
    """What they assert."""
    for pattern, _ in [*config.schedule, *config.lr_mults, *config.wd_mults]:
        assert not pattern.startswith("/")
    uncovered = [name for name in NAMES if first(config.schedule, name, "nothing") == "nothing"]
    assert not uncovered, uncovered
    assert all(mult > 0 for _, mult in config.lr_mults)


class Theirs:
    """Adam by their config."""

    def __init__(self, config: Config):
        check(config)
        self.config, self.steps = config, 0
        self.m, self.v = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)

    def step(self, values: Flat, grads: Flat) -> Flat:
        config, t = self.config, self.steps
        schedules = {name: first(config.schedule, name, None) for name in NAMES}
        live = [name for name in NAMES if schedules[name] is not None]
        norm = np.sqrt(sum((grads[name] ** 2).sum() for name in live))
        clip = min(1.0, config.grad_clip_norm / norm)
        self.steps += 1
        new = dict(values)
        for name in live:
            g, p = grads[name] * clip, values[name]
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            mean = self.m[name] / (1 - 0.9**self.steps)
            square = self.v[name] / (1 - 0.999**self.steps)
            rate = config.lr * first(config.lr_mults, name, 1.0)
            decay = config.wd * first(config.wd_mults, name, 0.0)
            step = rate * mean / (np.sqrt(square) + 1e-8) + decay * p
            new[name] = p - float(schedules[name](t)) * step
        return new


# Ours


def as_specs(rules: Rules, label: Callable[[int, Any], Any] = lambda i, x: x) -> Any:
    return [(fo.regex(pattern), label(i, value)) for i, (pattern, value) in enumerate(rules)]


def ours(config: Config) -> optax.GradientTransformationExtraArgs:
    clock = fo.groups(
        as_specs(config.schedule, lambda i, x: "frozen" if x is None else f"rule {i}")
    )
    schedules = {
        f"rule {i}": optax.scale_by_schedule(schedule)
        for i, (_, schedule) in enumerate(config.schedule)
        if schedule is not None
    }
    decays = {mult: optax.add_decayed_weights(config.wd * mult) for _, mult in config.wd_mults}
    decay = optax.partition(
        {**decays, 0.0: optax.identity()}, fo.groups(as_specs(config.wd_mults), default=0.0)
    )
    inner = optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        optax.scale_by_adam(),
        optax.scale(config.lr),
        fo.rates(as_specs(config.lr_mults)),
        decay,
        optax.partition({**schedules, "frozen": optax.set_to_zero()}, clock),
        optax.scale(-1.0),
    )
    has_frozen = any(schedule is None for _, schedule in config.schedule)
    return fo.freezable(inner, fo.labelled(clock, "frozen") if has_frozen else fo.nothing)


WARMUP, CONSTANT = optax.linear_schedule(0.0, 1.0, 2), optax.constant_schedule(1.0)
CONFIGS = {
    # As in proj/image_text/siglip_lit_coco.py: the image tower is frozen.
    "the frozen image tower of lit": Config(
        [("img/.*", None), (".*", WARMUP)], wd=0.1, grad_clip_norm=0.5
    ),
    # As in proj/uvim: multipliers of the rate; and in proj/scaling_laws, of the decay.
    "the multipliers of uvim and of scaling laws": Config(
        [(".*", WARMUP)],
        lr_mults=[("img/pos_embedding.*", 0.1), ("img/.*", 0.5), ("txt/.*", 1.0)],
        wd=0.1,
        wd_mults=[(".*head/kernel", 10.0), (".*/kernel", 1.0)],
    ),
    # The first match counts in each table: the block is not frozen, the rest of the tower is.
    "all at once": Config(
        [("img/Transformer/.*", CONSTANT), ("img/.*", None), ("txt/.*|t", WARMUP)],
        lr_mults=[(".*/bias", 2.0), ("txt/.*", 0.25)],
        wd=0.1,
        wd_mults=[("txt/head/.*", 3.0), (".*", 0.5)],
        grad_clip_norm=0.5,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.exhaustive if "lit" in name else ()) for name in CONFIGS],
)
def test_a_config_of_big_vision_trains_as_it_does_there(name):
    config, values = CONFIGS[name], draw(NAMES, seed=0)
    theirs, tx, params = Theirs(config), ours(config), as_params(values)
    start, state, update = params, tx.init(params), jax.jit(tx.update)
    for n in range(4):
        grads = draw(NAMES, seed=n + 1)
        values = theirs.step(values, grads)
        updates, state = update(as_params(grads), state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        assert_close(params, values)
    frozen = {x for x in NAMES if first(config.schedule, x, None) is None}
    assert_close(fo.mask(state, params), {x: x in frozen for x in NAMES})
    kept = jax.tree.map(lambda a, b: a is b, start, params)
    assert_close(kept, {x: x in frozen for x in NAMES})
    # Adam keeps state for the others alone, as under the mask that they put around it.
    mu = optax.tree_utils.tree_get(state, "mu")
    assert len(jax.tree.leaves(mu)) == len(NAMES) - len(frozen)


@pytest.mark.parametrize(
    "rules",
    [
        [("img/.*", 0.1), (".*kernel", 0.2), (".*", 0.3)],
        [(".*/kernel$", 0.1), ("txt/head/.*|t", 0.2), ("img/.*embedding", 0.3)],
        # Not the whole name: "head" is in two, "txt" begins three, and neither matches.
        [(".*embedding", 0.1), ("img/.*_0/.*(bias|kernel)", 0.2), ("t|txt", 0.3)],
        [(r".*block_\d+/.*", 0.1), (".*(/kernel|/bias)", 0.2)],
    ],
)
def test_the_first_pattern_that_matches_a_whole_name_gives_the_factor_and_the_label(rules):
    params = as_params(draw(NAMES, seed=0))
    expected = {name: first(rules, name, 1.0) for name in NAMES}
    assert len(set(expected.values())) > 2
    factors = fo.rates(as_specs(rules)).init(params).factors
    assert_close(factors, expected)
    assert_close(fo.groups(as_specs(rules), default=1.0)(params), expected)


def test_a_param_that_no_rule_matches_is_an_error_that_names_it():
    config = Config([("img/.*", None), ("txt/.*", CONSTANT)])
    with pytest.raises(AssertionError, match=r"\['t'\]"):
        check(config)
    with pytest.raises(ValueError, match=r"no rule of fo\.groups selects 't'"):
        ours(config).init(as_params(draw(NAMES, seed=0)))


def test_rules_that_do_nothing_are_silent_there_and_errors_here():
    params = as_params(draw(NAMES, seed=0))
    misspelt = Config([(".*", CONSTANT)], lr_mults=[("img/Transfromer/.*", 0.1)])
    shadowed = Config([(".*", CONSTANT)], lr_mults=[("img/.*", 0.1), ("img/pos_embedding", 0.5)])
    for config in (misspelt, shadowed):
        check(config)
    with pytest.raises(ValueError, match="Transfromer"):
        ours(misspelt).init(params)
    with pytest.raises(ValueError, match=r"wins no leaf.*img/pos_embedding.*narrower rule first"):
        ours(shadowed).init(params)
    # A leading slash, and freezing by a multiplier, are errors there. Here the first matches
    # nothing, and the second is allowed: the moments move on, and the decay stays.
    leading = Config([(".*", CONSTANT)], lr_mults=[("/img/.*", 0.1)])
    zero = Config([(".*", CONSTANT)], lr_mults=[("img/.*", 0.0)])
    for config in (leading, zero):
        with pytest.raises(AssertionError):
            check(config)
    with pytest.raises(ValueError, match="/img/"):
        ours(leading).init(params)
    ours(zero).init(params)
