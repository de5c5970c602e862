"""Runs of rows that train, over a mesh: whatever ends in which shard, the others keep every bit."""

import itertools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.sampling import cases

ROWS, DEVICES = 8, 4
VALUES = np.arange(1, 4 * ROWS + 1, dtype=np.float32).reshape(ROWS, 4)
VALUES[:, 0] = -0.0
RUNS = {f"{i}:{j}": range(i, j) for i, j in itertools.combinations(range(ROWS + 1), 2)}
RUNS |= {"0:3, 4:7": [0, 1, 2, 4, 5, 6], "0:2, 3:8": [0, 1, 3, 4, 5, 6, 7]}
del RUNS[f"0:{ROWS}"]
# XLA writes zeros over the frozen rows behind the first of these, where it replaces them in place.
ALWAYS = ["0:6", "0:7", "0:5", "1:8", "0:3, 4:7"]


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("run", cases(RUNS, ALWAYS))
def test_a_jitted_step_changes_the_rows_of_a_run_and_no_others(run, kind, axis):
    mesh = jax.make_mesh((DEVICES, 2), ("x", "y"), axis_types=(kind, kind))
    values = VALUES if axis == 0 else VALUES.T
    spec = PartitionSpec("x", "y") if axis == 0 else PartitionSpec("y", "x")
    frozen = [i for i in range(ROWS) if i not in run]
    tx = fo.freezable(optax.sgd(0.125), fo.rows("w", frozen, axis=axis))

    def step(params, state):
        grads = fo.grad(lambda params: params["w"].sum(), frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state)

    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(values, NamedSharding(mesh, spec))}
        after = jax.jit(step)(params, tx.init(params))["w"]
    expected = np.moveaxis(values, axis, 0) - np.float32(0.125)
    expected[frozen] = np.moveaxis(values, axis, 0)[frozen]
    found = np.moveaxis(np.asarray(after), axis, 0)
    assert found.tobytes() == expected.tobytes(), found
    assert after.sharding.is_equivalent_to(params["w"].sharding, 2)
