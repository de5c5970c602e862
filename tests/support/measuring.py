"""The norms of recorded gradients and updates, and their averages, by NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo


def norm(*arrays: Any) -> float:
    """The norm of all numbers of some arrays, in double precision."""
    wide = [np.asarray(x).astype(np.complex128).ravel() for x in arrays]
    return float(np.linalg.norm(np.concatenate(wide)))


def average(values: Sequence[float], decay: float) -> float:
    """The debiased running average: the newest counts 1, the one before it `decay`, and so on."""
    if not values:
        return float("nan")
    weights = np.asarray([decay**i for i in reversed(range(len(values)))], np.float64)
    return float((weights * values).sum() / weights.sum())


def score(grads: Sequence[float], updates: Sequence[float], decay: float = 0.9) -> fo.Score:
    """The score of the norms of all steps of a leaf."""
    changes = [list(np.abs(np.diff(x))) for x in (grads, updates)]
    norms = [average(x, decay) for x in (grads, updates, *changes)]
    return fo.Score(*norms, steps=len(grads))


def by_hand(
    history: Sequence[tuple[Any, Any]], decay: float = 0.9, since: Mapping[str, int] | None = None
) -> dict[str, fo.Score]:
    """The score of each leaf from the recorded gradients and updates, from a step on."""
    names = [path for path, _ in paths(history[0][0])]
    columns: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for step, (grads, updates) in enumerate(history):
        both = zip(paths(grads), jax.tree.leaves(updates), strict=True)
        for (name, grad), update in both:
            if step >= (since or {}).get(name, 0):
                columns[name][0].append(norm(grad))
                columns[name][1].append(norm(update))
    return {name: score(*column, decay) for name, column in columns.items()}


def paths(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of nested dicts by their paths."""
    key = lambda keys: "/".join(str(k.key) for k in keys)  # noqa: E731
    return [(key(keys), x) for keys, x in jax.tree.leaves_with_path(tree)]


def assert_close(found: Mapping[str, fo.Score], expected: Mapping[str, fo.Score]) -> None:
    """Compares all scores, to a millionth; NaN is equal to NaN."""
    assert set(found) == set(expected)
    for name, one in expected.items():
        scale = max(one.gradient, one.update, 1e-30)
        assert found[name].steps == one.steps, name
        np.testing.assert_allclose(found[name][:2], one[:2], rtol=1e-6, err_msg=name)
        # A change is a difference of norms, each of which is rounded.
        np.testing.assert_allclose(
            found[name][2:4], one[2:4], rtol=1e-6, atol=1e-6 * scale, err_msg=name
        )


# A run of Adam.

ADAM = optax.adam(0.1)
TX = fo.freezable(fo.measured(ADAM))


def make_params() -> Any:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": draw(4, 2), "b/c": draw(3), "d": {"kernel": draw(2, 2), "steps": jnp.arange(2)}}


PARAMS = make_params()
NAMES = ["a", "b/c", "d/kernel"]


def gradient(step: int, params: Any = PARAMS) -> Any:
    return jax.tree.map(lambda x: x * jnp.asarray(1 + step % 3, x.dtype), params)


class Run:
    """A run that records the gradient and the update of each step."""

    def __init__(self, tx: Any = TX, params: Any = PARAMS, state: Any = None):
        self.tx, self.params = tx, params
        self.state = tx.init(params) if state is None else state
        self.history: list[Any] = []

    def train(self, steps: int) -> Any:
        for _ in range(steps):
            grads = gradient(len(self.history), self.params)
            updates, self.state = self.tx.update(grads, self.state, self.params)
            self.history.append((grads, updates))
        return self

    def check(self, *names: str, **since: int) -> None:
        """Compares the scores of these leaves, each since the step in which it began."""
        expected = by_hand(self.history, since={k.replace("_", "/"): x for k, x in since.items()})
        assert_close(fo.scores(self.state), {name: expected[name] for name in names})
