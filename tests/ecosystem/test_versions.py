"""The lane tests the versions that it pins, and the page names these."""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LINES = (TESTS / "ecosystem.txt").read_text(encoding="utf-8").splitlines()
PINNED = dict(line.split("==") for line in LINES if not line.startswith("#"))


# Elsewhere a library that is absent skips its tests. Here it must not.
@pytest.mark.skipif("FREEZE_OPTAX_LANE" not in os.environ, reason="of make lane-ecosystem alone")
@pytest.mark.parametrize("name", PINNED)
def test_the_lane_has_each_library_at_the_version_that_it_pins(name):
    assert importlib.metadata.version(name) == PINNED[name]


def test_each_row_of_the_page_is_a_test_at_the_version_that_is_pinned():
    page = TESTS.parent / "docs" / "reference" / "libraries.md"
    if not page.exists():
        pytest.skip("in a checkout alone")
    names = {
        "Flax Linen": "flax",
        "Flax NNX": "flax",
        "Haiku": "dm-haiku",
        "Orbax": "orbax-checkpoint",
    }
    row = re.compile(r"^\| (\w[^|]*) \| (\d\S*) \|.*\| `(\S+\.py)(?: -k (\w+))?` \|$", re.MULTILINE)
    rows = row.findall(page.read_text(encoding="utf-8"))
    assert len(rows) > 12
    for library, version, file, word in rows:
        assert PINNED[names.get(library, library.lower())] == version, library
        assert re.search(rf"def test_\w*{word}", (TESTS / file).read_text(encoding="utf-8")), file
