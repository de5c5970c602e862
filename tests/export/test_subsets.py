"""Exports of states in which leaves are cut along any axis, or into elements."""

import json
import time
import zlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._export.restore_state import restore_state
from tests.support.broken_exports import OURS, about_of, telling
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (4, 6)
ELEMENTS = np.random.default_rng(0).random(SHAPE) < 0.5
PARAMS = {"cube": jnp.ones((2, 3, 2)), "v": jnp.ones(3), "w": jnp.ones(SHAPE)}
INNER = optax.adam(0.1)
FROZEN = {
    "an inner axis": [fo.rows("w", [0, 3], axis=1), fo.rows("cube", [1], axis=-1)],
    "elements": fo.elements("w", ELEMENTS),
    "each kind": [fo.elements("w", ELEMENTS), fo.rows("cube", [0], axis=1), fo.rows("v", [2])],
}


def _life(frozen):
    """A state with parts of several kinds and ages, some of them parked."""
    tx = fo.freezable(INNER, frozen)
    state = _steps(tx, PARAMS, tx.init(PARAMS))[1]
    state = fo.thaw(state, PARAMS, fo.rows("w", [1]) | fo.rows("cube", [0]))
    state = _steps(tx, PARAMS, state)[1]
    return tx, fo.freeze(state, PARAMS, fo.rows("w", [5], axis=1), keep_state=True)


def _steps(tx, params, state, count=2):
    for i in range(count):
        grads = jax.tree.map(
            lambda x, i=i: jnp.cos(jnp.arange(x.size) + i).reshape(x.shape), params
        )
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
    return params, state


def _through_npz(exported, folder):
    flat, treedef = jax.tree.flatten(exported)
    np.savez(folder / "state.npz", *flat)
    with np.load(folder / "state.npz", allow_pickle=False) as stored:
        return jax.tree.unflatten(treedef, [stored[name] for name in stored.files])


def _through_msgpack(exported, folder):
    del folder
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(exported))


def _through_orbax(exported, folder):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", exported)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", exported)


THROUGH = {"npz": _through_npz, "msgpack": _through_msgpack, "orbax": _through_orbax}


_RUNS = {
    f"{name}, {way}": (frozen, through)
    for name, frozen in FROZEN.items()
    for way, through in THROUGH.items()
}


@pytest.mark.parametrize(
    ("frozen", "through"),
    # Each set through one way of storing, and the first set through all of them.
    cases(_RUNS, [*list(_RUNS)[: len(THROUGH)], *list(_RUNS)[:: len(THROUGH) + 1]]),
)
def test_a_run_goes_on_bitwise_from_a_file(frozen, through, tmp_path):
    tx, state = _life(frozen)
    exported = jax.tree.map(np.asarray, fo.export_state(state))
    back = fo.import_state(tx, PARAMS, through(exported, tmp_path))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    ours, theirs = _steps(tx, PARAMS, back), _steps(tx, PARAMS, state)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # Thawed, what was parked goes on where it stopped.
    back, state = (fo.thaw(x, PARAMS, "w") for x in (back, state))
    jax.tree.map(np.testing.assert_array_equal, _steps(tx, PARAMS, back), _steps(tx, PARAMS, state))


def test_an_import_moves_to_another_frozen_set():
    tx, state = _life(FROZEN["each kind"])
    exported = fo.export_state(state)
    for frozen in (
        fo.rows("w", [0], axis=1),
        fo.elements("w", ~ELEMENTS) | fo.path("v"),
        fo.nothing,
    ):
        moved = fo.import_state(tx, PARAMS, exported, frozen)
        expected = fo.set_frozen(state, PARAMS, frozen)
        assert jax.tree.structure(moved) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_a_scheduled_state_goes_on_in_its_phase():
    phases = fo.Phases({0: fo.rows("w", [0, 3], axis=1), 3: fo.elements("w", ELEMENTS)})
    tx = fo.scheduled(INNER, phases)
    params, state = PARAMS, tx.init(PARAMS)

    def run(params, state):
        for i in range(2):
            grads = jax.tree.map(lambda x, i=i: x + i, params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = run(params, state)
    exported = jax.tree.map(np.asarray, fo.export_state(state))
    back = fo.import_state(tx, params, exported)
    jax.tree.map(np.testing.assert_array_equal, run(params, back), run(params, state))


def test_leading_rows_are_written_as_in_the_first_version():
    """So that version 0.1.0 reads what it knows."""
    state = fo.freezable(INNER, fo.rows("w", [0])).init(PARAMS)
    about = about_of(fo.export_state(state))
    (entry,) = [part for part in about["parts"] if part[1] is not None]
    assert entry[1] == [4, np.packbits([0, 1, 1, 1]).tobytes().hex()]
    inner = fo.freezable(INNER, fo.rows("w", [0], axis=1)).init(PARAMS)
    other = about_of(fo.export_state(inner))
    (entry,) = [part for part in other["parts"] if part[1] is not None]
    assert entry[1] == [6, np.packbits([0, 1, 1, 1, 1, 1]).tobytes().hex(), 1]
    assert other["format"] != about["format"]


def test_the_elements_of_a_large_leaf_take_few_bytes():
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    mask = np.zeros((1024, 1024), bool)
    mask[::64, ::64] = True
    state = jax.eval_shape(fo.freezable(optax.sgd(0.1, 0.9), ~fo.elements("w", mask)).init, params)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    text = json.dumps(about_of(fo.export_state(state))["parts"])
    assert len(text) < 1024 * 1024 // 8


def _elements_export():
    tx = fo.freezable(INNER, fo.elements("w", ELEMENTS))
    state = tx.init(PARAMS)
    exported = jax.tree.map(np.asarray, fo.export_state(state))
    about = about_of(exported)
    (index,) = [i for i, part in enumerate(about["parts"]) if part[1] is not None]
    return tx, exported, about, index


def _packed(bits):
    return zlib.compress(np.packbits(bits).tobytes()).hex()


BIG = zlib.compress(bytes(1 << 24))
DAMAGE = {
    "a shape of other params": [[6, 4], _packed(~ELEMENTS)],
    "a smaller shape": [[2, 6], _packed(~ELEMENTS[:2])],
    "one axis": [[24], _packed(~ELEMENTS)],
    "more axes": [[4, 6, 1], _packed(~ELEMENTS)],
    "no axes": [[], _packed(~ELEMENTS)],
    "a length of zero": [[4, 0], _packed(np.zeros(0, bool))],
    "a negative length": [[-4, -6], _packed(~ELEMENTS)],
    "a huge shape": [[1 << 40, 1 << 40], _packed(~ELEMENTS)],
    "a huge shape of huge bits": [[1 << 20, 1 << 20], BIG.hex()],
    "too many bits": [[4, 6], zlib.compress(bytes(4)).hex()],
    "too few bits": [[4, 6], zlib.compress(b"\x11").hex()],
    "a bomb": [[4, 6], BIG.hex()],
    "a stream that is cut off": [[4, 6], _packed(~ELEMENTS)[:-8]],
    "no stream": [[4, 6], "00" * 9],
    "bytes behind the stream": [[4, 6], _packed(~ELEMENTS) + "00"],
    "no hexadecimal digits": [[4, 6], "xyz"],
    "odd digits": [[4, 6], _packed(~ELEMENTS)[:-1]],
    "all elements": [[4, 6], _packed(np.ones(24, bool))],
    "no elements": [[4, 6], _packed(np.zeros(24, bool))],
    "other elements, of another number": [[4, 6], _packed(ELEMENTS & (np.indices(SHAPE)[0] > 1))],
    "elements that are rows": [[4, 6], _packed(np.indices(SHAPE)[0] < 2)],
    "bits behind the last": [[3, 5], zlib.compress(b"\x11\x01").hex()],
    "rows along an axis that is not there": [6, np.packbits([0, 1, 1, 1, 1, 1]).tobytes().hex(), 2],
    "rows along a huge axis": [6, np.packbits([0, 1, 1, 1, 1, 1]).tobytes().hex(), 1 << 70],
    "rows along a negative axis": [6, np.packbits([0, 1, 1, 1, 1, 1]).tobytes().hex(), -1],
    "rows along axis 0 by name": [4, np.packbits([0, 1, 1, 1]).tobytes().hex(), 0],
    "rows of another length": [5, np.packbits([0, 1, 1, 1, 1]).tobytes().hex(), 1],
    "an axis that is a bool": [6, np.packbits([0, 1, 1, 1, 1, 1]).tobytes().hex(), True],
    "an axis that is text": [6, "7c", "1"],
    "too many entries": [6, "7c", 1, 1],
    "a shape of floats": [[4.0, 6.0], _packed(~ELEMENTS)],
    "a shape of lists": [[[4], [6]], _packed(~ELEMENTS)],
    "a shape and an axis": [[4, 6], _packed(~ELEMENTS), 1],
    "a shape of bools": [[True, True], _packed(~ELEMENTS)],
}


@pytest.mark.parametrize("entry", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_subset_is_refused_before_it_is_unpacked(entry):
    tx, exported, about, index = _elements_export()
    parts = [list(part) for part in about["parts"]]
    parts[index][1] = entry
    start = time.process_time()
    with pytest.raises(ValueError, match=OURS):
        fo.import_state(tx, PARAMS, telling(exported, {**about, "parts": parts}))
    assert time.process_time() - start < 60  # and not the hours, or the memory, of a bomb


def _two_parts():
    tx = fo.freezable(INNER, fo.elements("w", ELEMENTS))
    state = fo.thaw(
        tx.init(PARAMS), PARAMS, fo.elements("w", ELEMENTS & (np.indices(SHAPE)[0] < 2))
    )
    return tx, jax.tree.map(np.asarray, fo.export_state(state))


def test_parts_that_overlap_are_refused():
    tx, exported = _two_parts()
    about = about_of(exported)
    cut = [i for i, part in enumerate(about["parts"]) if part[1] is not None]
    assert len(cut) == 2
    first, second = (about["parts"][i][1] for i in cut)
    size = int((ELEMENTS & (np.indices(SHAPE)[0] < 2)).sum())
    overlapping = np.zeros(24, bool)
    overlapping[np.flatnonzero(~ELEMENTS.ravel())[:size]] = True
    for i, entry in ((1, first), (1, [list(SHAPE), _packed(overlapping)]), (0, second)):
        parts = [list(part) for part in about["parts"]]
        parts[cut[i]][1] = entry
        with pytest.raises(ValueError, match=OURS):
            fo.import_state(tx, PARAMS, telling(exported, {**about, "parts": parts}))


def test_parts_of_several_axes_that_overlap_are_refused():
    tx, exported = _two_parts()
    about = about_of(exported)
    cut = [i for i, part in enumerate(about["parts"]) if part[1] is not None]
    for entry in ([4, "90"], [6, "a0", 1]):
        for other in ([4, "60"], [6, "50", 1]):
            parts = [list(part) for part in about["parts"]]
            parts[cut[0]][1], parts[cut[1]][1] = entry, other
            with pytest.raises(ValueError, match=OURS):
                fo.import_state(tx, PARAMS, telling(exported, {**about, "parts": parts}))


def test_the_former_format_has_no_axis_and_no_elements():
    tx, exported, about, _ = _elements_export()
    state = fo.freezable(INNER, fo.rows("w", [0])).init(PARAMS)
    former = about_of(fo.export_state(state))["format"]
    with pytest.raises(ValueError, match=OURS):
        fo.import_state(tx, PARAMS, telling(exported, {**about, "format": former}))


@pytest.mark.parametrize("kind", ["elements", "rows along axis 1", "rows"])
def test_a_state_is_restored_onto_the_same_part_of_a_leaf_alone(kind):
    """Also where two parts read alike: as many elements, or the same first rows."""
    shape = (9, 9)
    first, other = np.zeros((2, 9), bool)
    first[:7], other[:6], other[7] = True, True, True
    spec = {
        "elements": lambda rows: fo.elements("w", np.outer(rows, first)),
        "rows along axis 1": lambda rows: fo.rows("w", rows, axis=1),
        "rows": lambda rows: fo.rows("w", rows),
    }[kind]
    params = {"w": jnp.ones(shape)}
    state, target = (fo.freezable(INNER, ~spec(rows)).init(params) for rows in (first, other))
    saved = fo.export_state(state)
    back = restore_state(state, saved)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    with pytest.raises(ValueError, match=r"the saved state has another plan: 'w' .* in others in"):
        restore_state(target, saved)


@pytest.mark.parametrize("entry", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_subset_is_not_restored(entry):
    _, exported, about, index = _elements_export()
    target = fo.freezable(INNER, fo.elements("w", ELEMENTS)).init(PARAMS)
    parts = [list(part) for part in about["parts"]]
    parts[index][1] = entry
    with pytest.raises(ValueError, match=r"the export is|the saved state has another plan"):
        restore_state(target, telling(exported, {**about, "parts": parts}))
