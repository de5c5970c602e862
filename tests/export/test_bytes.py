"""Exports of which a byte or a bit has changed: in the text, in an archive and in MessagePack."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.broken_exports import (
    OURS,
    Case,
    about_of,
    bits,
    case,
    odd_exports,
    packed,
    replaced,
    telling,
    without,
)
from tests.support.checkpoints import flips
from tests.support.sampling import examples, stride

pytestmark = pytest.mark.usefixtures("standard_promotion")


def _archive(exported: Any, save: Any = np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **flax.traverse_util.flatten_dict(exported, sep="/"))
    return file.getvalue()


def _of_archive(data: bytes) -> Any:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")


def _of_msgpack(data: bytes) -> Any:
    return flax.serialization.msgpack_restore(data)


FILES = {
    "npz": (_archive, _of_archive),
    "compressed npz": (lambda exported: _archive(exported, np.savez_compressed), _of_archive),
    "msgpack": (flax.serialization.msgpack_serialize, _of_msgpack),
}
EACH = pytest.mark.parametrize("form", FILES)


def _what(loaded: Any) -> Any:
    """All that is in a loaded file, to tell it from others."""
    if isinstance(loaded, dict):
        return tuple(sorted((str(key), type(key), _what(x)) for key, x in loaded.items()))
    return (str(type(loaded)), bits(loaded) if isinstance(loaded, np.ndarray) else repr(loaded))


def _loaded(read: Any, files: Any) -> dict[Any, tuple[int, Any]]:
    """What the files hold that can be loaded, each thing once, and by how many of them."""
    found: dict[Any, Any] = {}
    for i, data in enumerate(files):
        try:
            loaded = read(data)
        except Exception:  # noqa: BLE001
            continue  # the loader's own error
        found.setdefault(_what(loaded), (i, loaded))
    return found


@EACH
def test_a_flipped_bit_in_a_stored_state_is_an_error_or_another_number(form):
    whole = case("small")
    write, read = FILES[form]
    data = write(whole.exported)
    found = _loaded(read, flips(data, range(8 * len(data))))
    found.pop(_what(read(data)), None)
    assert odd_exports(whole, [("whole", read(data)), *found.values()]) == {}


@EACH
def test_a_stored_state_that_is_cut_is_an_error(form):
    whole = case("small")
    write, read = FILES[form]
    data = write(whole.exported)
    found = _loaded(read, (data[:size] for size in range(len(data))))
    if found:  # one byte may be all of a file of MessagePack: a number
        assert odd_exports(whole, list(found.values()), may_be_read=False) == {}


def test_a_number_of_which_a_bit_has_changed_is_read_as_it_stands():
    whole = case("cohorts")
    for name, array in whole.exported["leaves"].items():
        for flipped in flips(array.tobytes(), [0, 8 * array.nbytes - 1]):
            changed = np.frombuffer(flipped, array.dtype).reshape(array.shape)
            arrays = {**whole.exported["leaves"], name: changed}
            given = {**whole.exported, "leaves": arrays}
            again = fo.export_state(fo.import_state(whole.tx, whole.params, given))
            stored = {name: bits(np.asarray(x)) for name, x in again["leaves"].items()}
            assert stored == {name: bits(x) for name, x in arrays.items()}


# What means something in JSON, in a path, in a number or in a dtype.
CHARACTERS = b'0129-.eE+"\\/[]{}:, \n\tntf\x00\x7f\xff'


def _changed(text: bytes, characters: bytes) -> Any:
    for i, old in enumerate(text):
        for new in characters:
            if new != old:
                yield text[:i] + bytes([new]) + text[i + 1 :]


def _texts(whole: Case, texts: Any) -> Iterator[tuple[bytes, Any]]:
    """Exports with these texts, and with those that have the right checksum in its place."""
    for text in texts:
        yield text, {**whole.exported, "about": packed(text)}
        with contextlib.suppress(ValueError, RecursionError):
            about = json.loads(text)
            yield b"sealed " + text, telling(whole.exported, about)


def test_a_changed_byte_of_the_text_is_refused_or_read_as_it_stands():
    whole = case("small")
    text = whole.exported["about"].tobytes()
    assert odd_exports(whole, _texts(whole, _changed(text, CHARACTERS))) == {}


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["cohorts", "rows", "phases"])
def test_a_flipped_bit_of_the_text_is_refused_or_read_as_it_stands(name):
    whole = case(name)
    text = whole.exported["about"].tobytes()
    flipped = flips(text, range(0, 8 * len(text), stride(2)))
    assert odd_exports(whole, _texts(whole, flipped)) == {}


CHANGES = st.lists(
    st.tuples(st.integers(0, 900), st.integers(0, 8), st.binary(max_size=8)), min_size=1
)


@examples(150)
@given(changes=CHANGES)
def test_any_damage_to_the_text_is_refused_or_read_as_it_stands(changes):
    whole = case("cohorts")
    text = whole.exported["about"].tobytes()
    for start, count, new in changes:
        text = text[:start] + new + text[start + count :]
    assert odd_exports(whole, _texts(whole, [text])) == {}


def _digits(about: Any) -> Any:
    """The text with one digit of a cohort, or of the rows of a part, changed."""
    for i, cohort in enumerate(about["cohorts"]):
        for digit in range(10):
            if digit != cohort:
                yield replaced(about, ("cohorts", i), digit)
    for i, (_, rows) in enumerate(about["parts"] or ()):
        for place, old in enumerate(rows[1] if rows else ""):
            for new in "0123456789abcdef".replace(old, ""):
                other = rows[1][:place] + new + rows[1][place + 1 :]
                yield replaced(about, ("parts", i, 1, 1), other)


@pytest.mark.parametrize("name", ["cohorts", "rows"])
def test_a_changed_digit_does_not_make_another_plan(name):
    # A leaf of another cohort, or other rows, would go on with counters that are not its own.
    whole, others = case(name), []
    abouts = list(_digits(about_of(whole.exported)))
    assert len(abouts) > 20
    for about in abouts:
        try:
            changed = {**whole.exported, "about": packed(json.dumps(about))}
            state = fo.import_state(whole.tx, whole.params, changed)
        except ValueError as error:
            assert OURS.match(str(error))  # noqa: PT017
        else:
            if jax.tree.structure(state) != jax.tree.structure(whole.state):
                others.append((about["cohorts"], about["parts"]))
    assert others == []


def test_another_checksum_and_none_are_refused():
    whole = case("cohorts")
    text = about_of(whole.exported)
    (name,) = text.keys() - whole.about.keys()
    others = [without(text, (name,))]
    others += [{**text, name: x} for x in (0, -1, text[name] + 1, str(text[name]), None, [], True)]
    texts = [json.dumps(about) for about in others]
    versions = [(text, {**whole.exported, "about": packed(text)}) for text in texts]
    assert odd_exports(whole, versions, may_be_read=False) == {}


class _Bomb:
    """Writes a file when it is unpickled, or made a number."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))

    def _explode(self) -> int:
        self.marker.touch()
        return 0

    __int__ = __index__ = __float__ = __complex__ = _explode


def _bombs(marker: Path) -> np.ndarray:
    bombs = np.empty(2, object)
    bombs[0] = bombs[1] = _Bomb(marker)
    return bombs


@pytest.mark.parametrize("place", ["about", "leaves/000000"])
def test_nothing_in_an_archive_is_unpickled(place, tmp_path):
    whole = case("small")
    flat = flax.traverse_util.flatten_dict(whole.exported, sep="/")
    file, marker = tmp_path / "state.npz", tmp_path / "marker"
    np.savez(file, **{**flat, place: _bombs(marker)})
    assert not marker.exists()
    with np.load(file) as arrays:
        assert set(arrays) == set(flat)
        with pytest.raises(ValueError, match="allow_pickle=False"):
            arrays[place]
    # An archive that is handed over as it is has no dict of arrays in it.
    with np.load(file) as arrays, pytest.raises(ValueError, match=r"allow_pickle=False|the export"):
        fo.import_state(whole.tx, whole.params, arrays)
    assert not marker.exists()
    with np.load(file, allow_pickle=True) as arrays:
        np.asarray(arrays[place])
    assert marker.exists()


@pytest.mark.parametrize("place", ["about", "leaves"])
def test_objects_in_an_array_are_not_asked_what_they_are(place, tmp_path):
    whole, bombs = case("small"), _bombs(tmp_path / "marker")
    given = {**whole.exported, place: bombs if place == "about" else {"000000": bombs}}
    with pytest.raises(ValueError, match=OURS):
        fo.import_state(whole.tx, whole.params, given)
    assert list(tmp_path.iterdir()) == []


def test_the_text_is_json_and_no_python():
    whole = case("small")
    about = json.dumps(whole.about)
    python = [
        repr(whole.about),
        about.replace("[2]", "[1+1]"),
        about.replace("[2]", "(2,)"),
        about.replace('"inner', '"inner" "'),
        about.replace("false", "False"),
        f"# a comment\n{about}",
        f"{about};",
        f"{about}{about}",
        f"json.loads({about!r})",
    ]
    versions = _texts(whole, [text.encode() for text in python])
    assert odd_exports(whole, versions, may_be_read=False) == {}
