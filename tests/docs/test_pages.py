"""The pages: their code runs, their links lead somewhere, and the tests that they name exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
WITHOUT_CODE = {
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docs/costs.md", "docs/index.md", "docs/pitfalls.md", "docs/savings.md"),
}
WITH_CODE = sorted(PAGES.keys() - WITHOUT_CODE)

SETUP_OR_CODE = re.compile(
    r"^<!-- setup\n(.*?)^-->|^```python\n(.*?)^```", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?)\)")
FOLDERS = "tests|docs|benchmarks|examples|notebooks|freeze_optax"
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


def test_a_page_has_code_or_is_listed_as_having_none():
    assert {name for name, text in PAGES.items() if blocks(text)} == set(WITH_CODE)
    assert {"README.md", "docs/selecting.md", "docs/editing.md"} <= set(WITH_CODE)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs_from_top_to_bottom(name):
    namespace = {}
    for line, code in blocks(PAGES[name]):
        # With its line numbers those of the page, for tracebacks.
        exec(compile("\n" * line + code, ROOT / name, "exec"), namespace)


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name):
    for path, anchor in links(name):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(PAGES[path]), f"{path}#{anchor}"


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_each_page_of_the_documentation_is_linked(name):
    linked = {path for path, _ in links(name)}
    assert {page for page in PAGES if page.startswith("docs/")} - {name} <= linked
    notebooks = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb")}
    assert len(notebooks) > 3
    assert notebooks <= linked


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
