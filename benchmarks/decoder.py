"""A decoder of a billion params, of which most are frozen, and the ways to train it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import freeze_optax as fo
from benchmarks import rotation, streaming
from benchmarks.cases import ADAMW, CLIPPED, Case, language_model
from benchmarks.models import stacked_transformer, stacked_transformer_loss
from benchmarks.steps import BY_HAND, DROP_IN, Parts, by_hand, drop_in, optax_partition

PARTITION = "optax.partition"
Ways = dict[str, Callable[[Case], Parts]]
WAYS: Ways = {BY_HAND: partial(by_hand, whole=True), DROP_IN: drop_in, PARTITION: optax_partition}
TURNS = "trained in turns"
FACTORS = "a factor for each of the layers trained"
FIRST = "last tenth of the layers trained, clip outside"


class Decoder:
    """The sizes, and the model that they give; tiny for a CPU."""

    def __init__(self, tiny: bool):
        self.depth, self.width, self.vocabulary = (4, 64, 256) if tiny else (20, 2_048, 32_000)
        self.batch = (2, 16) if tiny else (4, 1_024)
        # The first has more to compute in a layer than to copy, the second less.
        self.streamed = ((4, 16), (1, 8)) if tiny else ((16, 1_024), (1, 256))
        # A CPU takes long to compile for bfloat16.
        self.dtype = jnp.float32 if tiny else jnp.bfloat16
        self.embedding = 1_024 if tiny else 131_072
        # Layers, counted from the last one. Those of the phases lead to those of the cohorts.
        self.phases = (1, 2, 3, 4) if tiny else (2, 3, 6, 9)
        self.in_cohorts, self.cohorts = (3, (1, 3)) if tiny else (9, (1, 3, 9))
        self.every = (1, 3) if tiny else (9, 19)

    def case(self, rank: int = 0) -> Case:
        """With a last tenth of the layers trained; with a rank, it has adapters too."""
        sizes = (self.depth, self.width, self.vocabulary, self.batch, self.dtype)
        return replace(language_model(*sizes, rank), frozen=self.frozen(self.last(self.phases[0])))

    def streamings(self) -> dict[str, streaming.Streaming]:
        """The cases whose base may be on the host."""
        sizes = (self.depth, self.width, self.vocabulary, self.dtype)
        return streaming.streamings(sizes, self.streamed)

    def last(self, count: int) -> list[int]:
        """The last layers."""
        return list(range(self.depth - count, self.depth))

    def frozen(self, trained: list[int]) -> Any:
        """All but some layers."""
        still = ",".join(str(i) for i in range(self.depth) if i not in trained)
        # Braces around nothing are no glob.
        return ("embed", "norm", f"layers/layer_{{{still}}}") if still else ("embed", "norm")

    def described(self) -> dict[str, Any]:
        """What the page says of it."""
        case = self.case()
        params = jax.eval_shape(case.params)
        trains = jax.tree.leaves(fo.partition(params, case.frozen)[0])
        return {
            "params": sum(x.size for x in jax.tree.leaves(params)),
            "trained": sum(x.size for x in trains),
            "layers": self.depth,
            "width": self.width,
            "batch": list(self.batch),
            "dtype": jnp.dtype(self.dtype).name,
        }


def cohorts(case: Case, groups: list[Any]) -> Parts:
    """Ours, with groups of layers that were thawed one after the other."""
    parts = drop_in(case)
    state = fo.freeze(parts.state, parts.params, groups[1:])
    for group in groups[1:]:
        state = fo.thaw(state, parts.params, group)
    return parts._replace(state=state)


def scheduled(case: Case, phases: fo.Phases) -> Parts:
    tx = case.around(fo.scheduled(case.inner, phases))

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    parts = drop_in(case)
    return parts._replace(state=tx.init(parts.params), update=update)


def rows_by_hand(case: Case, new: int) -> Parts:
    """The embedding as two arrays, the second of which trains with the layers that do."""
    params = case.params()
    old, fresh = params["embed"][:-new], params["embed"][-new:]
    flags = {**fo.mask(case.frozen, params), "embed": False}
    trainable, rest = fo.partition({**params, "embed": fresh}, flags)
    tx = case.around(case.inner)

    def grad(params: Any, _: Any, __: Any, batch: Any) -> Any:
        trainable, rest, old = params

        def of_trainable(trainable: Any) -> Any:
            merged = fo.merge(trainable, rest)
            merged["embed"] = jnp.concatenate([old, merged["embed"]])
            return case.loss(merged, batch)

        return jax.value_and_grad(of_trainable)(trainable)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params[0])
        return (optax.apply_updates(params[0], updates), *params[1:]), state

    return Parts((trainable, rest, old), tx.init(trainable), (), grad, update)


def each_way(decoder: Decoder) -> dict[str, tuple[Case, Ways]]:
    """What all ways can do: three choices of what trains, with the clip at two places."""
    found = {}
    for name, case in {
        "last tenth of the layers trained": decoder.case(),
        "LoRA": replace(decoder.case(rank=8), frozen=~fo.path("**/qkv_{a,b}")),
        "every tenth layer trained": replace(
            decoder.case(), frozen=decoder.frozen(list(decoder.every))
        ),
    }.items():
        inside = replace(case, inner=CLIPPED, around=lambda tx: tx)
        found[f"{name}, clip outside"] = case, WAYS
        found[f"{name}, clip inside"] = inside, WAYS
    return found


def of_ours(decoder: Decoder) -> dict[str, tuple[Case, Ways]]:
    """What only this package does, against the split by hand that computes as much."""
    layers = decoder.last(decoder.in_cohorts)
    names = [f"layers/layer_{i}" for i in layers]
    in_cohorts: Ways = {BY_HAND: WAYS[BY_HAND]}
    for count in decoder.cohorts:
        size = len(names) // count
        groups = [tuple(names[i : i + size]) for i in range(0, len(names), size)]
        in_cohorts[f"{count} cohort{'s' if count > 1 else ''}"] = partial(cohorts, groups=groups)

    phases = {
        1_000 * i: decoder.frozen(decoder.last(count)) for i, count in enumerate(decoder.phases)
    }
    in_phases: Ways = {
        BY_HAND: WAYS[BY_HAND],
        "scheduled, first of four phases": partial(scheduled, phases=fo.Phases(phases)),
    }

    new = 100
    sizes = (4, decoder.width, decoder.embedding, decoder.batch, decoder.dtype)
    frozen = (fo.rows("embed", slice(None, -new)), "norm", "layers/layer_{0..2}")
    by_rows: Ways = {BY_HAND: partial(rows_by_hand, new=new), DROP_IN: drop_in}
    return {
        f"{new} rows of {decoder.embedding:,}": (
            replace(language_model(*sizes), frozen=frozen),
            by_rows,
        ),
        f"{len(layers)} layers trained, in cohorts": (
            replace(decoder.case(), frozen=decoder.frozen(layers)),
            in_cohorts,
        ),
        "four phases in one program": (decoder.case(), in_phases),
    }


def of_stack(decoder: Decoder) -> dict[str, tuple[Case, Ways]]:
    """Layers in one array, of which two train in turns; and a factor for each layer."""
    depth, width = decoder.depth, decoder.width
    stacked = Case(
        partial(stacked_transformer, depth, width, decoder.vocabulary, decoder.dtype),
        stacked_transformer_loss,
        decoder.case().batch,
        ("embed", "norm"),
        inner=CLIPPED,
    )
    last, apart = (depth - 2, depth - 1), (depth // 2 - 1, depth - 1)
    layers = decoder.last(decoder.in_cohorts)
    trained = replace(decoder.case(), frozen=decoder.frozen(layers))
    factors = optax.chain(ADAMW, fo.rates(fo.layerwise("layers/layer_*", 0.9)))
    return {
        f"the last 2 of {depth} layers {TURNS}": (stacked, rotation.ways(last)),
        f"layers {apart[0]} and {apart[1]} of {depth} {TURNS}": (stacked, rotation.ways(apart)),
        FACTORS: (
            trained,
            {
                "no factors": drop_in,
                "rates": lambda case: drop_in(replace(case, inner=factors)),
            },
        ),
    }


def step_cases(decoder: Decoder) -> dict[str, tuple[Case, Ways]]:
    """All of them. The most wanted come first, as the last are left out where time ends."""
    outside, inside, lora, lora_inside, every, every_inside = each_way(decoder).items()
    assert outside[0] == FIRST
    ours = of_ours(decoder).items()
    stack = of_stack(decoder).items()
    on_host = [(name, (x.case, streaming.WAYS)) for name, x in decoder.streamings().items()]
    last = lora_inside, every_inside
    return dict([outside, inside, lora, every, *ours, *on_host, *stack, *last])
