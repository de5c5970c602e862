"""A reference without the package: every leaf has a bare optimizer of its own, in a plain loop."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Case(NamedTuple):
    """An optimizer as its user writes it, and the parts that it is made of.

    Attributes:
      inner: The optimizer.
      of_leaf: What keeps statistics per leaf, without the learning rate.
      rate: The learning rate at a step of the run, whenever a leaf was thawed.
      clip: The largest norm of all gradients together.
    """

    inner: optax.GradientTransformation
    of_leaf: optax.GradientTransformation
    rate: Callable[[int], Any] = lambda step: 0.1
    clip: float | None = None


COSINE = optax.cosine_decay_schedule(0.1, 10)
DECAYED_ADAM = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
CASES = {
    "adam": Case(optax.adam(0.1), optax.scale_by_adam()),
    "clip and adamw": Case(
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1)),
        DECAYED_ADAM,
        clip=0.5,
    ),
    "momentum": Case(optax.sgd(0.1, momentum=0.9), optax.trace(0.9)),
    "lion": Case(optax.lion(0.1, weight_decay=0.0), optax.scale_by_lion()),
    "cosine": Case(
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(COSINE)),
        optax.scale_by_adam(),
        COSINE,
        clip=0.5,
    ),
}


def paths(tree: Any) -> list[str]:
    entries = jax.tree.leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in entries]


def train(
    case: Case,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Sequence[Any],
    frozen: Sequence[set[str]],
    keep_state: bool,
) -> list[Any]:
    """The params before each step and after the last; `frozen` has a set of paths per step."""
    names, structure = paths(params), jax.tree.structure(params)
    states: dict[str, Any] = {}
    history = [params]
    for step, (batch, still) in enumerate(zip(batches, frozen, strict=True)):
        values = dict(zip(names, jax.tree.leaves(history[-1]), strict=True))
        gradient = jax.tree.leaves(jax.grad(loss)(history[-1], batch))
        grads = {p: g for p, g in zip(names, gradient, strict=True) if p not in still}
        if not keep_state:
            states = {path: state for path, state in states.items() if path in grads}
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads.values()))
        scale = 1.0 if case.clip is None else jnp.minimum(1.0, case.clip / norm)
        for path, grad in grads.items():
            state = states.get(path) or case.of_leaf.init(values[path])
            moved, states[path] = case.of_leaf.update(grad * scale, state, values[path])
            values[path] = values[path] - case.rate(step) * moved
        history.append(jax.tree.unflatten(structure, list(values.values())))
    return history
