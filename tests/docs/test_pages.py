"""The pages: code runs, links lead somewhere, and the tests and files that they name exist.

`make docs` runs the code of all pages. Here it is that of the pages on which the others stand, so
that it runs with each version of JAX and Flax that is tested.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_modules import fresh_page_modules

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
}
RUN_HERE = [
    "README.md",
    *(f"docs/how-to/{x}.md" for x in ("choose-what-to-freeze", "rows", "freeze-and-thaw")),
    *(f"docs/how-to/{x}.md" for x in ("gradual-unfreezing", "flax-linen", "flax-nnx")),
]

SETUP_OR_CODE = re.compile(
    r"^<!-- setup\n(.*?)^-->|^```(?:python|\{code-cell\}[^\n]*)\n(?::[^\n]*\n)*(.*?)^```",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?)\)")
FOLDERS = "tests|docs|benchmarks|examples|freeze_optax"
NAMED_PATH = re.compile(rf"\b(?:{FOLDERS})/[\w./-]+\.\w+")
PYTEST = re.compile(r"`pytest (\S+\.py)(?: -k (\w+))?`")


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python of a page, hidden setup included: the place and the text of each block."""
    found = [(match.start(match.lastindex), match) for match in SETUP_OR_CODE.finditer(text)]
    return [(text.count("\n", 0, start), match[match.lastindex]) for start, match in found]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|^<!--.*?^-->$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> list[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links(name: str) -> Iterator[tuple[str, str]]:
    """The relative links and images of a page: the file from the root, and the anchor."""
    for target in LINK.findall(without_code(PAGES[name])):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            yield path.resolve().relative_to(ROOT.resolve()).as_posix(), anchor


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", RUN_HERE)
def test_the_code_of_a_page_runs_from_top_to_bottom(name):
    found = blocks(PAGES[name])
    assert len(found) > 1
    namespace = {}
    with fresh_page_modules():
        for line, code in found:
            # With its line numbers those of the page, for tracebacks.
            exec(compile("\n" * line + code, ROOT / name, "exec"), namespace)


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/")])
def test_the_code_of_a_page_is_executed_when_the_site_is_built(name):
    # Python that is in no cell would be shown and never run. Only a page with a kernel runs.
    text = PAGES[name]
    assert "```python" not in text
    assert ("{code-cell}" in text) == text.startswith("---\nfile_format: mystnb\n")


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name):
    for path, anchor in links(name):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(PAGES[path]), f"{path}#{anchor}"


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/")])
def test_a_page_shows_the_files_that_its_code_imports(name):
    for file in (ROOT / "docs" / "code").glob("*.py"):
        if re.search(rf"^(?:from|import) {file.stem}\b", PAGES[name], re.MULTILINE):
            assert f"code/{file.stem}." in PAGES[name]


def test_each_notebook_is_linked_from_the_readme():
    notebooks = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/notebooks/*.ipynb")}
    assert len(notebooks) > 3
    assert notebooks <= {path for path, _ in links("README.md")}


@pytest.mark.parametrize("name", PAGES)
def test_the_files_that_a_page_names_exist(name):
    missing = [path for path in NAMED_PATH.findall(PAGES[name]) if not (ROOT / path).exists()]
    assert not missing


def test_the_tests_that_the_pages_name_exist():
    named = [found for text in PAGES.values() for found in PYTEST.findall(text)]
    assert len(named) > 4
    for path, word in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not word or word == "NAME" or re.search(rf"def test_\w*{word}", text), (path, word)


def test_each_row_of_the_table_of_other_ways_is_a_test():
    (page,) = (text for text in PAGES.values() if "| today | this library | NAME |" in text)
    (file,) = re.findall(r"Each row is a test: `pytest (\S+) -k NAME`", page)
    peers = (ROOT / file).read_text(encoding="utf-8")
    names = re.findall(r"\| `(\w+)` \|$", page, re.MULTILINE)
    assert len(names) > 7
    for name in names:
        assert re.search(rf"def test_\w*{name}", peers), name


def test_the_readme_is_one_page():
    assert len(PAGES["README.md"].splitlines()) < 170
