"""The run whose state version 0.1.0 stored in `tests/data`, and what NumPy says of its moments."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo

DATA = Path(__file__).parents[1] / "data"
SPEC = ["encoder", fo.rows("embed", [1, 2])]
PHASES = fo.Phases(
    {
        0: "encoder",
        2: fo.path("encoder/layer_0") | fo.rows("embed", [0]),
        3: fo.layers("encoder/layer_*")[:1],
        4: fo.regex(".*/layer_0"),
        5: fo.nothing,
    }
)
TX = fo.freezable(optax.adam(0.1), SPEC)


def params() -> dict[str, Any]:
    return {
        "embed": jnp.arange(8.0).reshape(4, 2),
        "encoder": {"layer_0": jnp.ones(2), "layer_1": jnp.full(2, 2.0)},
        "head": jnp.ones(3),
    }


def gradients() -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, 0.5), params())


def state() -> fo.FreezeState:
    """A state with everything that one may have: rows, three cohorts that train, and one parked."""
    state = TX.init(params())
    _, state = TX.update(gradients(), state, params())
    state = fo.thaw(state, params(), "encoder/layer_1")
    state = fo.thaw(state, params(), fo.rows("embed", [1]))
    _, state = TX.update(gradients(), state, params())
    state = fo.freeze(state, params(), "head", keep_state=True)
    _, state = TX.update(gradients(), state, params())
    return state


def check(state: fo.FreezeState) -> None:
    """Compares the moments, and what is frozen, with those of the same run in NumPy."""
    mask = fo.mask(state, params())
    assert mask["embed"].tolist() == [False, False, True, False]
    assert (mask["encoder"], mask["head"]) == ({"layer_0": True, "layer_1": False}, True)
    first, thawed = moment(3), moment(2)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mu["encoder"]["layer_1"], np.full(2, thawed), rtol=1e-6)
    np.testing.assert_allclose(mu["head"], np.full(3, moment(2)), rtol=1e-6)
    rows = jax.tree.leaves(mu["embed"])
    assert sorted(x.shape for x in rows) == [(1, 2), (2, 2)]
    for x in rows:
        np.testing.assert_allclose(x, np.full(x.shape, first if len(x) == 2 else thawed), rtol=1e-6)


def moment(steps: int) -> float:
    """Adam's first moment after so many gradients of 0.5."""
    return 0.5 * (1 - 0.9**steps)
