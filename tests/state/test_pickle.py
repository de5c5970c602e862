"""States that are pickled in one process and used in another."""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

PARAMS = {"embed": jnp.ones((4, 2)), "head": jnp.ones(2)}
SPECS = {"a leaf": "head", "rows": fo.rows("embed", [1, 2])}


def state_of(name):
    tx = fo.freezable(optax.adam(0.1), SPECS[name])
    return tx, tx.init(PARAMS)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", SPECS)
def test_a_state_of_another_process_has_the_structure_of_one_made_here(name):
    # Strings and bytes have another hash in each process.
    code = (
        "import pickle, sys\n"
        "from tests.state.test_pickle import state_of\n"
        f"_, state = state_of({name!r})\n"
        "hash(state.plan)\n"
        "sys.stdout.buffer.write(pickle.dumps(state))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    restored = pickle.loads(output)
    tx, own = state_of(name)
    assert jax.tree.structure(restored) == jax.tree.structure(own)
    assert hash(restored.plan) == hash(own.plan)
    traces = []

    @jax.jit
    def update(state):
        traces.append(1)
        return tx.update(PARAMS, state, PARAMS)

    expected, got = update(own), update(restored)
    assert len(traces) == 1
    fo.testing.assert_frozen(expected, got, True)
