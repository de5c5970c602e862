"""openpi's freeze filters, its cast of what is frozen, and its EMA, in plain Python and NumPy.

Physical-Intelligence/openpi at 15a9616a: src/openpi/models/pi0_config.py (`get_freeze_filter`),
src/openpi/shared/nnx_utils.py (`PathRegex`, a full match on names with slashes), scripts/train.py
(`init_train_state`, `train_step`), src/openpi/training/optimizer.py. If the language model has
adapters, it is frozen but for these and for the action expert (names with `_1`); if the action
expert has adapters, that is frozen too, or alone. Everything else trains: images, projections. What
is frozen becomes bfloat16. Clip and AdamW get what trains; the EMA gets everything.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support.by_name import Flat, as_params, assert_close, draw, nested

pytestmark = pytest.mark.usefixtures("standard_promotion")

LANGUAGE = (
    "PaliGemma/llm/embedder/input_embedding",
    "PaliGemma/llm/final_norm/scale",
    "PaliGemma/llm/layers/attn/q_einsum/w",
    "PaliGemma/llm/layers/mlp/gating_einsum",
)
EXPERT = (
    "PaliGemma/llm/final_norm_1/scale",
    "PaliGemma/llm/layers/attn/q_einsum_1/w",
    "PaliGemma/llm/layers/mlp_1/gating_einsum",
)
LANGUAGE_LORA = (
    "PaliGemma/llm/layers/attn/q_einsum/lora_a",
    "PaliGemma/llm/layers/mlp/gating_einsum_lora_b",
)
EXPERT_LORA = (
    "PaliGemma/llm/layers/attn/q_einsum_1/lora_b",
    "PaliGemma/llm/layers/mlp_1/gating_einsum_lora_a",
)
OTHERS = (
    "PaliGemma/img/Transformer/encoder_norm/scale",
    "action_in_proj/kernel",
    "state_proj/bias",
)

CASES = {  # whether the language model and the expert have adapters: what is frozen
    (True, True): {*LANGUAGE, *EXPERT},
    (True, False): {*LANGUAGE},
    (False, True): {*EXPERT},
    (False, False): set(),
}


def names_of(lora: tuple[bool, bool]) -> tuple[str, ...]:
    adapters = (LANGUAGE_LORA if lora[0] else ()) + (EXPERT_LORA if lora[1] else ())
    return tuple(sorted((*LANGUAGE, *EXPERT, *adapters, *OTHERS)))


def theirs(lora: tuple[bool, bool], name: str) -> bool:
    """Whether their filter freezes a name, by the three regular expressions that it is made of."""
    in_llm = re.fullmatch(".*llm.*", name) is not None
    in_expert = re.fullmatch(".*llm.*_1.*", name) is not None
    is_adapter = re.fullmatch(".*lora.*", name) is not None
    if lora == (True, True):
        return in_llm and not is_adapter
    if lora == (True, False):
        return in_llm and not in_expert and not is_adapter
    return lora == (False, True) and in_expert and not is_adapter


def ours(lora: tuple[bool, bool]) -> Any:
    """The same as a spec of globs."""
    llm, expert = fo.path("PaliGemma/llm"), fo.path("PaliGemma/llm/**/*_1")
    adapters = fo.path("**/*lora*")
    return {
        (True, True): llm - adapters,
        (True, False): llm - expert - adapters,
        (False, True): expert - adapters,
        (False, False): fo.nothing,
    }[lora]


@pytest.mark.parametrize("lora", CASES)
def test_the_filter_of_openpi_is_a_spec(lora):
    names = names_of(lora)
    expected = {name: name in CASES[lora] for name in names}
    assert {name: theirs(lora, name) for name in names} == expected
    assert_close(fo.mask(ours(lora), as_params(draw(names, seed=0))), expected)


def test_the_trainable_filter_of_openpi_is_wrt_of_a_spec():
    # nnx.All(nnx.Param, nnx.Not(freeze_filter)), on a model whose variables have these names.
    lora = (True, False)
    names = names_of(lora)
    model = build(nested(dict.fromkeys(names)))
    model.count = nnx.Variable(jnp.zeros((), "int32"))
    wanted = nnx.All(
        nnx.Param, nnx.Not(lambda path, _: theirs(lora, "/".join(str(part) for part in path)))
    )

    def paths(where: Any) -> set[str]:
        found = nnx.to_flat_state(nnx.state(model, where))
        return {"/".join(str(part) for part in path) for path, _ in found}

    assert paths(wanted) == paths(fnnx.wrt(model, ours(lora))) == set(names) - CASES[lora]


class Node(nnx.Module):
    pass


def build(tree: Any) -> Any:
    node = Node()
    for key, below in tree.items():
        setattr(node, key, nnx.Param(jnp.zeros(2)) if below is None else build(below))
    return node


class Theirs:
    """`init_train_state` and `train_step`: clip, AdamW with b2 0.95, and the EMA of everything."""

    def __init__(self, values: Flat, frozen: set[str], rate: float, decay: float):
        self.frozen, self.rate, self.decay, self.t = frozen, rate, decay, 0
        self.values: Flat = {
            name: x.astype(ml_dtypes.bfloat16 if name in frozen else np.float32)
            for name, x in values.items()
        }
        self.ema = dict(self.values)
        self.m, self.v = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0)

    def step(self, grads: Flat) -> None:
        live = [name for name in self.values if name not in self.frozen]
        norm = np.sqrt(sum((grads[name] ** 2).sum() for name in live))
        self.t += 1
        for name in live:
            g = grads[name] * min(1.0, 1.0 / norm)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.95 * self.v[name] + 0.05 * g**2
            square = np.sqrt(self.v[name] / (1 - 0.95**self.t)) + 1e-8
            step = self.m[name] / (1 - 0.9**self.t) / square + 0.1 * self.values[name]
            self.values[name] = (self.values[name] - self.rate * step).astype(np.float32)
        for name, x in self.values.items():
            # A Python number takes the dtype of the array: 0.99 is 0.98828125 in bfloat16.
            decay, rest = (np.asarray(c, x.dtype) for c in (self.decay, 1 - self.decay))
            self.ema[name] = decay * self.ema[name] + rest * x


def same_bits(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_step_of_openpi_with_its_cast_and_its_average_of_everything():
    lora, rate, decay = (True, False), 0.05, 0.99
    names, frozen, spec = names_of(lora), CASES[lora], ours(lora)
    reference = Theirs(draw(names, seed=0), frozen, rate, decay)
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    tx = fo.freezable(optax.chain(optax.clip_by_global_norm(1.0), adamw), spec)

    params = as_params(draw(names, seed=0))
    params = jax.tree.map(lambda x, f: x.astype("bfloat16") if f else x, params, spec(params))
    start, ema, held, state = params, params, params, tx.init(params)

    @jax.jit
    def step(params, ema, held, grads, state):
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        ema, held = (optax.incremental_update(params, old, 1 - decay) for old in (ema, held))
        return params, ema, fo.hold(held, params, spec), state

    for n in range(4):
        grads = draw(names, seed=n + 1)
        reference.step(grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), as_params(grads), params)
        params, ema, held, state = step(params, ema, held, grads, state)
        assert_close(params, reference.values)
        # Of a leaf of bfloat16 the last bit may differ, as the compiler keeps more bits between.
        assert_close(ema, reference.ema, rtol=2**-7)
        live = {name: x for name, x in reference.ema.items() if name not in frozen}
        assert_close(held, {**reference.values, **live})
    for kept in (params, held):
        expected = {name: name in frozen for name in names}
        assert_close(jax.tree.map(same_bits, start, kept), expected)
    mu = optax.tree_utils.tree_get(state, "mu")
    assert len(jax.tree.leaves(mu)) == len(names) - len(frozen)


@pytest.mark.parametrize(("decay", "shrinks_by"), [(0.99, 0.141), (0.999, 0.0)])
def test_an_average_in_bfloat16_drifts_away_from_a_frozen_leaf_that_does_not_move(
    decay, shrinks_by
):
    # decay * x + (1 - decay) * x of a constant x. 0.99 and 0.01 are 0.98828125 and 0.01000977 in
    # bfloat16, with the sum 0.9983; 0.999 is 1. Configs with adapters have no EMA there.
    bfloat = ml_dtypes.bfloat16
    x = np.linspace(0.5, 1.0, 64).astype(bfloat)
    theirs, everything, held = x, {"w": jnp.asarray(x)}, {"w": jnp.asarray(x)}
    params = everything
    for _ in range(300):
        theirs = bfloat(decay) * theirs + bfloat(1 - decay) * x
        everything = optax.incremental_update(params, everything, 1 - decay)
        held = fo.hold(optax.incremental_update(params, held, 1 - decay), params, "w")
    lost = 1 - theirs.astype(np.float64) / x.astype(np.float64)
    assert lost.max() == pytest.approx(shrinks_by, abs=1e-3)
    assert same_bits(everything["w"], theirs)
    assert same_bits(held["w"], x)
