"""Octo's `frozen_keys` and optimizer, against what they mean, written in plain Python and NumPy.

octo-models/octo at 241fb351: octo/utils/train_utils.py (`freeze_weights`, `create_optimizer`), keys
from scripts/configs/{finetune_config,octo_pretrain_config}.py and from
examples/02_finetune_new_observation_action.py. A key is for `fnmatch`, on the whole name with dots;
so `*` also stands for dots, and crosses levels. Clip and AdamW are inside, and see what trains
alone. A param decays if "kernel" is anywhere in its path. (AdamW has its first moments in bfloat16
there. That has nothing to do with rates, and is left out.)
"""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.by_name import Flat, as_params, assert_close, draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

BLOCK = "octo_transformer/BlockTransformer_0/Transformer_0"
HEAD = "heads_action/map_head"
NAMES = (
    f"{HEAD}/MultiHeadDotProductAttention_0/query/kernel",
    f"{HEAD}/probe",
    "heads_action/mean_proj/bias",
    "heads_action/mean_proj/kernel",
    f"{BLOCK}/encoderblock_0/LayerNorm_0/scale",
    f"{BLOCK}/encoderblock_0/MlpBlock_0/Dense_0/kernel",
    "octo_transformer/task_language_pos_embedding",
    "octo_transformer/task_tokenizers_language/hf_model/encoder/block_0/kernel",
    "octo_transformer/task_tokenizers_language/hf_model/shared/embedding",
)


def matches(name: str, key: str) -> bool:
    """Whether a key with stars, and nothing else special, matches a name: fnmatch in our words."""
    name = name.replace("/", ".")
    if "*" not in key:
        return name == key
    head, *middle, tail = key.split("*")
    if not (name.startswith(head) and name.endswith(tail) and len(name) >= len(head + tail)):
        return False
    place, end = len(head), len(name) - len(tail)
    for part in middle:
        found = name.find(part, place, end)
        if found < 0:
            return False
        place = found + len(part)
    return True


def frozen_by(keys: Sequence[str]) -> set[str]:
    return {name for name in NAMES if any(matches(name, key) for key in keys)}


def translated(keys: Sequence[str]) -> Any:
    """The keys as a spec, by rule: the same regular expressions, with slashes for dots."""
    return fo.regex(*(fnmatch.translate(key.replace(".", "/")) for key in keys))


MODES = {
    "head_only": (("octo_transformer.*",), fo.path("octo_transformer")),
    "head_mlp_only": (
        (
            "octo_transformer.*",
            "heads_*.map_head.probe",
            "heads_*.map_head.MultiHeadDotProductAttention_0.*",
        ),
        fo.path(
            "octo_transformer",
            "heads_*/**/map_head/probe",
            "heads_*/**/map_head/MultiHeadDotProductAttention_0",
        ),
    ),
    "pretraining": (("*hf_model*",), fo.path("**/*hf_model*")),
    "by the end of the name": (
        ("*kernel", "octo_transformer.*.scale"),
        fo.path("**/kernel", "octo_transformer/**/scale"),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_keys_of_octo_are_specs_by_translation_and_by_hand(mode):
    keys, by_hand = MODES[mode]
    params = as_params(draw(NAMES, seed=0))
    expected = {name: name in frozen_by(keys) for name in NAMES}
    assert 0 < sum(expected.values()) < len(NAMES)
    assert_close(fo.mask(translated(keys), params), expected)
    assert_close(fo.mask(by_hand, params), expected)
    # And the words above are those of the standard library.
    for name in NAMES:
        found = any(fnmatch.fnmatchcase(name.replace("/", "."), key) for key in keys)
        assert found == expected[name]


def test_a_star_of_octo_crosses_levels_and_a_star_here_does_not():
    params = as_params(draw(NAMES, seed=0))
    keys = ["heads_*.kernel"]
    assert frozen_by(keys) == {NAMES[0], NAMES[3]}
    assert_close(fo.mask(translated(keys), params), {x: x in frozen_by(keys) for x in NAMES})
    # The glob that looks like it matches no leaf, and one level deeper only one of the two.
    with pytest.raises(ValueError, match=r"heads_\*/kernel"):
        fo.mask("heads_*/kernel", params)
    assert_close(fo.mask("heads_*/*/kernel", params), {x: x == NAMES[3] for x in NAMES})
    assert_close(fo.mask("heads_*/**/kernel", params), {x: x in frozen_by(keys) for x in NAMES})


def test_a_key_that_freezes_nothing_is_silent_there_and_an_error_here():
    # The example for new observations and actions appends this key, without stars: no name is it.
    params, keys = as_params(draw(NAMES, seed=0)), ["BlockTransformer_0"]
    assert frozen_by(keys) == set()
    with pytest.raises(ValueError, match="BlockTransformer_0"):
        fo.mask(translated(keys), params)
    meant = fo.mask("**/BlockTransformer_0", params)
    assert_close(meant, {name: name.startswith(BLOCK) for name in NAMES})


class Theirs:
    """`create_optimizer`: a clip over what trains, and AdamW, which decays by name."""

    def __init__(self, frozen: set[str], rate: Any, weight_decay: float, clip: float):
        self.live = [name for name in NAMES if name not in frozen]
        self.rate, self.weight_decay, self.clip, self.t = rate, weight_decay, clip, 0
        self.m, self.v = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)

    def step(self, values: Flat, grads: Flat) -> Flat:
        norm = np.sqrt(sum((grads[name] ** 2).sum() for name in self.live))
        rate, new = float(self.rate(self.t)), dict(values)
        self.t += 1
        for name in self.live:
            g = grads[name] * min(1.0, self.clip / norm)
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            square = np.sqrt(self.v[name] / (1 - 0.999**self.t))
            step = self.m[name] / (1 - 0.9**self.t) / (square + 1e-8)
            decay = self.weight_decay if "kernel" in name else 0.0
            new[name] = values[name] - rate * (step + decay * values[name])
        return new


def test_octo_clips_and_decays_what_trains_alone():
    keys, spec = MODES["head_mlp_only"]
    rate = optax.linear_schedule(0.0, 0.1, 2)
    theirs = Theirs(frozen_by(keys), rate, weight_decay=0.5, clip=0.5)
    adamw = optax.adamw(rate, weight_decay=0.5, mask=fo.path("**/*kernel*"))
    tx = fo.freezable(optax.chain(optax.clip_by_global_norm(0.5), adamw), spec)
    values = draw(NAMES, seed=0)
    params = as_params(values)
    start, state, update = params, tx.init(params), jax.jit(tx.update)
    for n in range(4):
        grads = draw(NAMES, seed=n + 1)
        # In a norm over all gradients the frozen ones would outweigh the others.
        grads = {name: g * (1000 if name in frozen_by(keys) else 1) for name, g in grads.items()}
        values = theirs.step(values, grads)
        updates, state = update(as_params(grads), state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        assert_close(params, values)
    same = jax.tree.map(lambda a, b: a is b, start, params)
    assert_close(same, {name: name in frozen_by(keys) for name in NAMES})


@pytest.mark.parametrize("name", ["kernel_net/bias", "dense/kernel", "dense/qkv_kernel"])
def test_kernel_anywhere_in_the_path_decays(name):
    params = as_params(draw(("dense/bias", name), seed=0))
    assert_close(fo.path("**/*kernel*")(params), {"dense/bias": False, name: "kernel" in name})
