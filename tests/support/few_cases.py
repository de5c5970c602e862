"""A plugin for pytest that runs a part of the cases: `-p tests.support.few_cases`.

FREEZE_OPTAX_CASES says how many of each test, or of each file if FREEZE_OPTAX_CASES_OF is "file".
FREEZE_OPTAX_SHARE says one in how many of all cases instead.

They are drawn by a hash of their names: the same ones in each run, and others in each test, so that
every optimizer, dtype and wrapper is among those of some test. Another FREEZE_OPTAX_SEED draws
others. For `make wheel`, where a missing file or import shows in any case, for the other versions,
and for what CI runs of the exhaustive cases.
"""

import collections
import os
import zlib

import pytest


@pytest.hookimpl(trylast=True)  # after the marks have had their say
def pytest_collection_modifyitems(config, items):
    share = os.environ.get("FREEZE_OPTAX_SHARE")
    if share:
        drawn = [item for item in items if _number(item) % int(share) == 0]
    else:
        mark = "::" if os.environ.get("FREEZE_OPTAX_CASES_OF") == "file" else "["
        count = int(os.environ["FREEZE_OPTAX_CASES"])
        groups = collections.defaultdict(list)
        for item in items:
            groups[item.nodeid.partition(mark)[0]].append(item)
        drawn = [item for group in groups.values() for item in sorted(group, key=_number)[:count]]
    kept = set(map(id, drawn))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _number(item):
    return zlib.crc32((os.environ.get("FREEZE_OPTAX_SEED", "") + item.nodeid).encode())
