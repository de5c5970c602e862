"""A plugin for pytest that runs the first case of each test alone: `-p tests.support.first_cases`.

For `make wheel`: a file that the wheel lacks, or an import that only an extra has, shows in any
case.
"""

import pytest


@pytest.hookimpl(trylast=True)  # after the marks have had their say
def pytest_collection_modifyitems(config, items):
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}.values()
    kept = set(map(id, first))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
