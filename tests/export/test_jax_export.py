"""`register_for_jax_export`: a stored step is the step, in this process and in another one."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import flatbuffers  # noqa: F401
import jax
import numpy as np
import optax
import pytest
from jax import export

import freeze_optax as fo
from tests.support import sampling
from tests.support.exported_steps import PARAMS, assert_same_bits, cases, step_of

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = Path(__file__).parents[2]
NAMES = [
    "encoder frozen",
    "nothing frozen",
    "rows",
    "rows along axis 1",
    "elements",
    "scheduled",
    "in turns",
    "in turns at random",
    "measured",
    "rates",
    "since thaw",
    "in a chain",
    "MultiSteps",
    "parked, two cohorts",
]


@functools.cache
def stored(name: str) -> bytearray:
    tx, state = cases()[name]
    fo.register_for_jax_export()
    return export.export(jax.jit(step_of(tx)))(PARAMS, state).serialize()


# Of the others, another process runs a step: see below.
ALWAYS = {
    *("encoder frozen", "rows", "elements", "scheduled", "in turns", "measured", "rates"),
    *("in a chain", "parked, two cohorts"),
}


@pytest.mark.parametrize("name", sampling.cases({x: x for x in NAMES}, ALWAYS))
def test_a_loaded_step_returns_the_bits_and_the_plan_of_the_step(name):
    tx, state = cases()[name]
    loaded = export.deserialize(stored(name))
    call, step = jax.jit(loaded.call), jax.jit(step_of(tx))
    before = expected = PARAMS, state
    for _ in range(3):
        before, expected = call(*before), step(*expected)
        assert_same_bits(before, expected)


def test_another_process_loads_all_of_them(tmp_path):
    assert list(cases()) == NAMES
    for i, name in enumerate(NAMES):
        (tmp_path / f"{i}.bin").write_bytes(stored(name))
    command = [sys.executable, "-m", "tests.support.exported_steps", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == list(cases())


def test_parts_over_several_mesh_axes_are_those_of_before():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("x", "y")))
    params = {"w": jax.device_put(np.arange(8.0, dtype=np.float32), sharding)}
    _, rest = fo.partition(params, fo.rows("w", slice(0, 4)))
    fo.register_for_jax_export()
    exported = export.export(jax.jit(lambda rest: rest))(rest)
    loaded = export.deserialize(exported.serialize())
    assert loaded.in_tree == jax.tree.structure(((rest,), {}))


def test_a_state_with_another_plan_is_refused():
    _, state = cases()["encoder frozen"]
    loaded = export.deserialize(stored("encoder frozen"))
    with pytest.raises(ValueError, match=r"Plan\(4 of 5 leaves frozen\) in the invocation"):
        loaded.call(PARAMS, fo.freeze(state, PARAMS, "head"))


def test_a_state_that_a_loaded_step_returned_can_be_stored_and_goes_on():
    tx, state = cases()["encoder frozen"]
    params, after = export.deserialize(stored("encoder frozen")).call(PARAMS, state)
    expected = jax.jit(step_of(tx))(PARAMS, state)
    resumed = fo.import_state(tx, params, fo.export_state(after))
    assert_same_bits(resumed, expected[1])
    # An update by the transformation gives the state what an edit needs.
    params, after = step_of(tx)(params, after)
    edited = fo.thaw(after, params, "encoder")
    assert edited.plan.frozen.count(True) == 1


def test_the_call_can_be_repeated_and_registers_all_states_of_optax():
    for _ in range(2):
        fo.register_for_jax_export()
    params = {"w": np.ones(4, np.float32)}
    for make in (optax.adafactor, optax.lion, optax.lbfgs, optax.rmsprop, optax.adadelta):
        tx = fo.freezable(make(1e-2))
        exported = export.export(jax.jit(lambda state: state))(tx.init(params))
        loaded = export.deserialize(exported.serialize())
        assert loaded.in_tree == exported.in_tree


def test_a_type_that_someone_else_registered_stays_theirs(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Duplicate serialization registration for type x")

    monkeypatch.setattr(export, "register_namedtuple_serialization", refuse)
    monkeypatch.setattr(export, "register_pytree_node_serialization", refuse)
    fo.register_for_jax_export()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(export, "register_namedtuple_serialization", fail)
    with pytest.raises(ValueError, match=r"something else"):
        fo.register_for_jax_export()


def test_a_damaged_plan_is_refused():
    data = bytes(stored("rows"))
    damaged = data.replace(b"encoder/bias", b"encoder/biaz")
    assert damaged != data
    with pytest.raises(ValueError, match=r"the export is damaged: .* was changed after the export"):
        export.deserialize(bytearray(damaged))
