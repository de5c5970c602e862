"""What the benchmarks train: a model, what is frozen of it, and what reads its gradients."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import freeze_optax as fo
from benchmarks.models import (
    adapted,
    adapted_loss,
    layered,
    layered_loss,
    stacked,
    stacked_loss,
    transformer,
    transformer_loss,
)

Optimizer = optax.GradientTransformation
ADAMW = optax.adamw(1e-3)
CLIP = optax.clip_by_global_norm(1.0)
CLIPPED = optax.chain(CLIP, ADAMW)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how it is trained.

    Attributes:
      params: Makes the params.
      loss: Takes the params and a batch.
      batch: Makes the batch.
      frozen: What is frozen: a spec.
      inner: The optimizer of what trains.
      around: What is put around whatever freezes.
      log_norm: Whether the step also gives the norm of the gradients.
      apart: Whether gradients and update are jitted apart.
      holes: Whether ours leaves holes in the gradients, as something outside it keeps them.
      cohorts: Into how many cohorts the layers that train were thawed.
    """

    params: Callable[[], Any]
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[], Any]
    frozen: Any
    inner: Optimizer = ADAMW
    around: Callable[[Optimizer], Optimizer] = lambda tx: tx
    log_norm: bool = False
    apart: bool = False
    holes: bool = False
    cohorts: int = 1


def clip_first(tx: Optimizer) -> Optimizer:
    return optax.chain(CLIP, tx)


def multi_steps(tx: Optimizer) -> Optimizer:
    return optax.MultiSteps(tx, 4).gradient_transformation()


def if_finite(tx: Optimizer) -> Optimizer:
    return optax.apply_if_finite(tx, 3)


SIX = Case(partial(layered, 6, 64), layered_loss, partial(jnp.ones, (32, 64)), "layer_{0..4}")
TEN = Case(partial(layered, 10, 128), layered_loss, partial(jnp.ones, (32, 128)), "layer_{0..8}")
LORA = replace(
    SIX, params=partial(adapted, 6, 64, 4), loss=adapted_loss, frozen=~fo.path("**/lora_{a,b}")
)
SCAN = replace(
    SIX, params=partial(stacked, 4, 64), loss=stacked_loss, frozen=("blocks", "head"), log_norm=True
)
# So wide that the counters of a cohort weigh nothing.
THAWED = replace(TEN, frozen="layer_0", inner=CLIPPED)

COMPILED = {
    "prefix frozen": SIX,
    "suffix frozen": replace(SIX, frozen="layer_{1..5}"),
    "nine tenths frozen": TEN,
    "biases only": replace(SIX, frozen=~fo.path("**/bias")),
    "adapters (LoRA)": LORA,
    "clip inside": replace(SIX, inner=CLIPPED),
    "clip outside": replace(SIX, around=clip_first),
    "norm logged": replace(SIX, log_norm=True),
    "MultiSteps inside": replace(SIX, inner=multi_steps(ADAMW)),
    "MultiSteps outside": replace(SIX, around=multi_steps, holes=True),
    "apply_if_finite inside": replace(SIX, inner=if_finite(ADAMW)),
    "apply_if_finite outside": replace(SIX, around=if_finite),
    "gradients jitted apart": replace(SIX, apart=True, holes=True),
    "scan, adapters trained": SCAN,
    "scan, stack trained": replace(SCAN, frozen=("adapter", "head"), log_norm=False),
    "1 cohort": THAWED,
    "3 cohorts": replace(THAWED, cohorts=3),
    "9 cohorts": replace(THAWED, cohorts=9),
}


def language_model(
    depth: int,
    width: int,
    vocabulary: int,
    batch: tuple[int, int],
    dtype: Any = jnp.float32,
    rank: int = 0,
) -> Case:
    """A transformer with a last tenth of the layers trained; `batch` is of sequences and tokens."""
    rows, tokens = batch
    trained = depth // 10
    return Case(
        partial(transformer, depth, width, vocabulary, dtype, rank),
        transformer_loss,
        lambda: jax.random.randint(jax.random.key(2), (rows, tokens + 1), 0, vocabulary),
        ("embed", "norm", f"layers/layer_{{0..{depth - trained - 1}}}"),
        around=clip_first,
    )


MLP = Case(partial(layered, 10, 512), layered_loss, partial(jnp.ones, (128, 512)), "layer_{0..8}")
TIMED = {
    "MLP": MLP,
    "MLP, clip outside": replace(MLP, around=clip_first),
    "transformer, clip outside": language_model(10, 128, 1_000, (8, 64)),
}
