"""The README's code runs, from top to bottom."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.usefixtures("standard_promotion")
def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```|<!-- setup\n(.*?)-->", README.read_text(), re.DOTALL)
    assert len(blocks) > 8
    source = "\n".join(code or setup for code, setup in blocks)
    exec(compile(source, str(README), "exec"), {})


def test_the_tests_that_the_readme_names_exist():
    text = README.read_text()
    peers = (Path(__file__).parent / "test_peers.py").read_text()
    names = re.findall(r"\| `(\w+)` \|$", text, re.MULTILINE)
    assert len(names) > 7
    for name in names:
        assert re.search(rf"def test_\w*{name}", peers), name
    for path in re.findall(r"tests/\w+\.py|docs/\w+\.png", text):
        assert (README.parent / path).exists(), path
