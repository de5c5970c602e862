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
from freeze_optax._report.outline import walk_lines
from tests.support import former_run

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


@pytest.mark.usefixtures("standard_promotion")
def test_a_pickle_of_version_0_1_0_is_loaded_and_its_run_goes_on():
    stored = pickle.loads((former_run.DATA / "pickle_0.1.0.pkl").read_bytes())
    state, params, grads = stored["state"], former_run.params(), former_run.gradients()
    former_run.check(state)
    own = former_run.state()
    assert jax.tree.structure(state) == jax.tree.structure(own)
    fo.testing.assert_frozen(own, state, True)
    updates, state = former_run.TX.update(grads, state, params)
    expected, own = former_run.TX.update(grads, own, params)
    fo.testing.assert_frozen(expected, updates, True)
    # An update has given the transformation back, so it can be edited again.
    state = fo.thaw(state, params, "head")
    fo.testing.assert_frozen(fo.thaw(own, params, "head"), state, True)


@pytest.mark.usefixtures("standard_promotion")
def test_phases_parts_and_the_state_of_phases_are_loaded_from_version_0_1_0():
    stored = pickle.loads((former_run.DATA / "pickle_0.1.0.pkl").read_bytes())
    params, grads = former_run.params(), former_run.gradients()
    phases = stored["phases"]
    assert repr(phases) == repr(former_run.PHASES)
    for step in range(6):
        loaded, own = (fo.mask(p.at(step), params) for p in (phases, former_run.PHASES))
        fo.testing.assert_frozen(own, loaded, True)
    tx = fo.scheduled(optax.adam(0.1), phases)
    _, expected = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(stored["scheduled"]) == jax.tree.structure(expected)
    fo.testing.assert_frozen(expected, stored["scheduled"], True)
    trainable, rest = fo.partition(params, fo.rows("embed", [1, 2]))
    assert jax.tree.structure(stored["rest"]) == jax.tree.structure(rest)
    fo.testing.assert_frozen(params, fo.merge(trainable, stored["rest"]), True)


def test_a_summary_and_selectors_of_version_0_1_0_are_loaded_and_used():
    stored = (former_run.DATA / "pickle_summary_0.1.0.pkl").read_bytes()
    summary, selectors = pickle.loads(stored)
    params = {"layer_0": jnp.ones(3), "layer_1": jnp.ones(3), "head": jnp.ones(2)}
    own = fo.summary(params, "layer_*", optax.adam(1e-3))
    assert str(summary) == str(own)
    assert summary.to_markdown() == own.to_markdown()
    statuses = [[line.counts.status for line in walk_lines(x._root)] for x in (summary, own)]
    assert statuses[0] == statuses[1] == ["trainable", "frozen"]
    assert (summary.host_bytes, summary.device_bytes) == (0, own.device_bytes)
    assert summary._root.children[0].counts == own._root.children[0].counts
    assert repr(selectors) == (
        "[labelled(1), of_type(dict, fields=('w',)), declared(), "
        "(~path('head') & path('layer_0')), (path('a') - path('b')), everything]"
    )
    assert selectors[3](params) == {"layer_0": True, "layer_1": False, "head": False}
