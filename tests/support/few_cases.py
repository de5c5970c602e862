"""A plugin for pytest that runs a few cases of each test: `-p tests.support.few_cases`.

FREEZE_OPTAX_CASES says how many. They are drawn by a hash of their names: the same ones in each
run, and others in each test, so that every optimizer, dtype and wrapper is among those of some
test. For `make wheel`, where a missing file or import shows in any case, and for the other
versions.
"""

import collections
import os
import zlib

import pytest


@pytest.hookimpl(trylast=True)  # after the marks have had their say
def pytest_collection_modifyitems(config, items):
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    count = int(os.environ["FREEZE_OPTAX_CASES"])
    drawn = [
        sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[:count]
        for cases in tests.values()
    ]
    kept = {id(item) for cases in drawn for item in cases}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
