"""Patterns that would take a matcher for ever, and those that are too deep, too long or empty."""

import contextlib
import gc
import itertools
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import freeze_optax as fo
from freeze_optax._tree.globs import compile_glob, expand_braces

SECONDS = 5


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends what would not end: by the time of the processor, so that a busy machine is no error."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"still at it after {SECONDS} seconds of the processor")

    before = signal.signal(signal.SIGVTALRM, stop)
    gc.disable()  # what is raised in a callback of the collector goes nowhere
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        gc.enable()


def is_match(pattern: str, text: str) -> bool:
    """Whether a component matches: by a table of the places where a part of the pattern ends."""
    ends = {0}
    for char in pattern:
        if char == "*":
            ends = set(range(min(ends), len(text) + 1)) if ends else ends
        else:
            ends = {i + 1 for i in ends if i < len(text) and char in ("?", text[i])}
    return len(text) in ends


# Each may split a long name in more ways than could ever be tried.
STARS = {
    "stars": "*a" * 12 + "*b",
    "many stars": "*a" * 30 + "b",
    "star and mark": "?*" * 15 + "b",
    "stars alone": "*?*?*?*?*?*?*?*?*?*?*?*?*?*?*?*b",
    "words": "*ab" * 12 + "*c",
    "a hit": "*a" * 30 + "*",
}
NAMES = ["a" * 100, "ab" * 50, "a" * 99 + "b", "b" * 100, "ab" * 49 + "ac", "aab" * 33]


@pytest.mark.parametrize("where", ["{}", "encoder/{}", "**/{}", "{}/encoder"])
@pytest.mark.parametrize("name", STARS)
def test_stars_in_a_component_end_on_names_of_a_hundred_letters(name, where):
    pattern = STARS[name]
    expected = {where.replace("**/", "a/b/").format(key): is_match(pattern, key) for key in NAMES}
    with watched():
        flags = fo.mask([where.format(pattern), "hit"], dict.fromkeys([*expected, "hit"], 1.0))
    assert flags == {**expected, "hit": True}


@pytest.mark.parametrize("name", STARS)
def test_stars_that_name_no_node_are_an_error_in_the_end(name):
    pattern = STARS[name] + "!"
    for spec in (pattern, fo.layers(pattern)):
        with watched(), pytest.raises(ValueError, match=re.escape(repr(pattern))):
            fo.mask(spec, dict.fromkeys(NAMES, 1.0))


@pytest.mark.parametrize("alternatives", ["{a,aa}", "{a,aa,aaa}", "[a]", "{[a],?}"])
def test_alternatives_between_stars_end_too(alternatives):
    params = {"a" * 60: 1.0, "a" * 60 + "b": 1.0, "head": 1.0}
    with watched():
        flags = fo.mask(f"*{alternatives}" * 4 + "*b", params)
    assert flags == {"a" * 60: False, "a" * 60 + "b": True, "head": False}


DEEP = "/".join(["a"] * 300)


@pytest.mark.parametrize(
    "pattern",
    [
        "/".join(["**", "a"] * 60 + ["b"]),
        "/".join(["**", "*"] * 60 + ["b"]),
        "/".join(["**"] * 100 + ["b"]),
        "/".join(["**", "*a*"] * 20 + ["b"]),
        "**/" + "*/" * 200 + "b",
        "**/a/**/*/**/a/**/?/**/[a]/**/{a,b}/**/b",
    ],
    ids=range(6),
)
def test_double_stars_everywhere_end_on_a_path_of_hundreds_of_components(pattern):
    params = {DEEP: 1.0, f"{DEEP}/b": 1.0}
    with watched():
        selected = [fo.mask(spec, params) for spec in (pattern, fo.layers(pattern)[:])]
    assert selected == [{DEEP: False, f"{DEEP}/b": True}] * 2
    with watched(), pytest.raises(ValueError, match="selects no leaf"):
        fo.mask(pattern, {DEEP: 1.0})


def test_braces_may_be_nested_by_the_hundred():
    assert expand_braces("{" * 200 + "a,b" + "}" * 200) == ["a", "b"]


@pytest.mark.parametrize("around", ["{}", "{,x}", "{a{b,c},}"], ids=repr)
def test_braces_beyond_what_can_be_nested_are_refused(around):
    opening, closing = around[:-1], around[-1]
    with pytest.raises(ValueError, match="pattern"):
        compile_glob(opening * 2000 + "a" + closing * 2000)


@pytest.mark.parametrize("pattern", ["{", "{" * 5000, "a" + "{b,c" * 900, "[" * 5000, "[a" * 5000])
def test_thousands_that_are_not_closed_are_named(pattern):
    with pytest.raises(ValueError, match=r"pattern '.*`[\[{]` without `[\]}]`"):
        compile_glob(pattern)


NINES = "9" * 5000


@pytest.mark.parametrize(
    "inside", [f"0..{NINES}", f"{NINES}..0", f"{NINES}..{NINES}", f"{'0' * 5000}1..3"], ids=range(4)
)
def test_a_range_of_thousands_of_digits_is_refused_by_its_own_name(inside):
    with pytest.raises(ValueError, match=re.escape(inside)):
        compile_glob(f"layer_{{{inside}}}")


def test_a_range_padded_to_thousands_of_zeros_is_refused_before_it_is_written_out():
    with watched(), pytest.raises(ValueError, match="too long"):
        compile_glob(f"{{{'0' * 4200}..9000}}")


@pytest.mark.parametrize("digits", ["\u0663..\u0665", "\u0969..\u096b"])
def test_a_range_in_other_digits_is_no_trap(digits):
    """Either a range of the numbers that they are, or plain text."""
    found = expand_braces(f"{{{digits}}}")
    assert found in (["3", "4", "5"], [digits])


ATOMS = ["*", "?", "[a]", "{a,b}", "{0..2}", "a", "/", "**", "[!a]", "-", "]", "}", "[", "{"]


def test_any_few_signs_are_a_pattern_or_an_error_that_names_it():
    tree = {"a": {"b": 1.0}, "0": 2.0}
    for signs in itertools.product(ATOMS, repeat=3):
        pattern = "".join(signs)
        try:
            fo.mask(pattern, tree)
        except ValueError as error:
            said = str(error)
            assert repr(pattern) in said, (pattern, said)
