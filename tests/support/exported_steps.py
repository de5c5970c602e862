"""Steps with all kinds of states, for `jax.export`; as a script it loads stored ones and runs them.

`python -m tests.support.exported_steps FOLDER` loads each step of `cases` that is stored in the
folder, calls it with a new state, and compares the result with that of the step compiled here.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo

PARAMS = {
    "encoder": {"kernel": jnp.arange(12.0).reshape(4, 3) / 10, "bias": jnp.ones(3)},
    "layers": {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 2, 2)},
    "head": jnp.linspace(0.1, 0.5, 5),
    "seen": jnp.zeros((), jnp.int32),
}
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def loss(params: Any) -> jax.Array:
    x = jnp.tanh(params["encoder"]["kernel"] @ params["encoder"]["bias"])[:2]
    x, _ = fo.scan(lambda x, layer: (jnp.tanh(layer["w"] @ x), None), x, params["layers"])
    return (x.sum() * params["head"]).sum()


def step_of(tx: Any) -> Any:
    def step(params: Any, state: Any) -> Any:
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def _parked(tx: Any) -> Any:
    """A state with a parked leaf and two cohorts."""
    params, state = step_of(tx)(PARAMS, tx.init(PARAMS))
    state = fo.freeze(state, params, "head", keep_state=True)
    return fo.thaw(state, params, "encoder/bias")


@functools.cache
def cases() -> dict[str, tuple[Any, Any]]:
    """A transformation and a state of it, by name."""
    encoder = fo.freezable(ADAM, "encoder")
    phases = fo.Phases({0: "encoder", 2: fo.nothing})
    transformations = {
        "encoder frozen": encoder,
        "nothing frozen": fo.freezable(ADAM),
        "rows": fo.freezable(ADAM, fo.rows("encoder/kernel", [0, 2])),
        "rows along axis 1": fo.freezable(ADAM, fo.rows("encoder/kernel", [1], axis=1)),
        "elements": fo.freezable(ADAM, fo.elements("head", lambda x: np.asarray(x) > 0.25)),
        "scheduled": fo.scheduled(ADAM, phases),
        "in turns": fo.rotating(ADAM, "layers", count=1, every=2, order=((0,), (2,))),
        "in turns at random": fo.rotating(ADAM, "layers", count=1, every=2, key=jax.random.key(0)),
        "measured": fo.freezable(fo.measured(ADAM), "encoder"),
        "rates": fo.freezable(optax.chain(ADAM, fo.rates({"head": 0.5}, default=1.0)), "encoder"),
        "since thaw": fo.freezable(
            optax.chain(ADAM, fo.since_thaw(optax.linear_schedule(0.0, 1.0, 4))), "encoder"
        ),
        "in a chain": optax.chain(optax.clip(1.0), encoder, optax.scale(0.5)),
        "MultiSteps": optax.MultiSteps(encoder, 2),
    }
    states = {name: (tx, tx.init(PARAMS)) for name, tx in transformations.items()}
    return states | {"parked, two cohorts": (encoder, _parked(encoder))}


def assert_same_bits(found: Any, expected: Any) -> None:
    """Raises if a number differs, also in a PRNG key."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def bits(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(bits(a), bits(b))


def main(folder: Path) -> None:
    fo.register_for_jax_export()
    for i, (name, (tx, state)) in enumerate(cases().items()):
        loaded = jax.export.deserialize(bytearray((folder / f"{i}.bin").read_bytes()))
        expected = jax.jit(step_of(tx))(PARAMS, state)
        found = jax.jit(loaded.call)(PARAMS, state)
        assert_same_bits(found, expected)
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
