"""`summary`: its last line, its table in every form, and the params that it takes."""

import dataclasses
import functools
import html.parser
import io
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

import freeze_optax as fo
from tests.support.models import Bert, ResNet


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def bert() -> Any:
    tokens = jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(Bert().init, jax.random.key(0), tokens, tokens)["params"]


@pytest.fixture(scope="module")
def resnet() -> Any:
    image = jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(ResNet().init, jax.random.key(0), image)["params"]


ADAPTERS = ~fo.path("**/lora_{a,b}")


def lora_70b() -> dict[str, Any]:
    """The shapes of Llama-2-70B with adapters of rank 16 beside every projection."""

    def projection(inputs: int, outputs: int) -> dict[str, Any]:
        shapes = {"kernel": (inputs, outputs), "lora_a": (inputs, 16), "lora_b": (16, outputs)}
        return {name: array(*shape, dtype=jnp.bfloat16) for name, shape in shapes.items()}

    sizes = {"q": (8192, 8192), "k": (8192, 1024), "v": (8192, 1024), "o": (8192, 8192)}
    mlp = {"gate": (8192, 28672), "up": (8192, 28672), "down": (28672, 8192)}
    norm = {"scale": array(8192, dtype=jnp.bfloat16)}
    return {
        "embed": array(32000, 8192, dtype=jnp.bfloat16),
        "layers": {
            f"layer_{i}": {
                "attention": {name: projection(*size) for name, size in sizes.items()},
                "mlp": {name: projection(*size) for name, size in mlp.items()},
                "norm_1": norm,
                "norm_2": norm,
            }
            for i in range(80)
        },
        "norm": norm,
        "head": array(8192, 32000, dtype=jnp.bfloat16),
    }


LLAMA_2_70B = 68_976_648_192  # as transformers counts meta-llama/Llama-2-70b-hf
RANK_16 = 80 * 16 * (2 * 16384 + 2 * 9216 + 3 * 36864)

TREES = {
    "names": {"a|b": array(4), "c`d": array(3), "<b>x</b>": array(3), "[red]y[/red]": array(2)},
    "deep": {"a": {"b": {"c": {"d": array(2), "e": array(3)}, "f": array(4)}, "g": array(5)}},
    "long": {"a_name_that_is_long_" * 6: {"w": array(3), "a_name_as_long_" * 8: array(2)}},
    "numbers": {f"layer_{i}": array(1000, 1000 + i // 3) for i in range(9)},
}
SPECS = {
    "names": "a|b",
    "deep": "a/b/c/d",
    "long": "*/w",
    "numbers": "layer_{0..4}",
}


PLAIN = {f"{name} {bool(tx)}": (TREES[name], SPECS[name], tx) for name in TREES for tx in (0, 1)}


@functools.cache  # and not on import: all workers import this
def summaries() -> dict[str, fo.Summary]:
    made = {k: fo.summary(t, s, optax.adam(0.1) if tx else None) for k, (t, s, tx) in PLAIN.items()}
    table = jnp.ones((4, 2))
    tied = {"embed": table, "head": {"bias": jnp.ones(2), "kernel": table}}
    made["tied"] = fo.summary(tied, "head/bias", depth=2)
    made["lora"] = fo.summary(lora_70b(), ADAPTERS, optax.adamw(1e-3))
    made["nothing"] = fo.summary({}, optimizer=optax.adam(0.1))
    made["one array"] = fo.summary(jnp.ones(3))
    return made


EVERY = pytest.mark.parametrize(
    "summary", [*PLAIN, "tied", "lora", "nothing", "one array"], indirect=True
)


@pytest.fixture
def summary(request: pytest.FixtureRequest) -> fo.Summary:
    return summaries()[request.param]


def test_every_summary_is_tested():
    assert EVERY.mark.args[1] == list(summaries())


# The last line.


def last(summary: fo.Summary) -> list[str]:
    return [summary.headline, str(summary).splitlines()[-1], summary.to_markdown().splitlines()[-1]]


def test_bert_base_with_its_last_two_layers_and_pooler(bert):
    frozen = ["embeddings", "encoder/layer_{0..9}"]
    line = "trainable: 14,766,336 of 109,482,240 parameters (13.49%)"
    assert last(fo.summary(bert, frozen)) == [line] * 3
    assert last(fo.summary(bert, frozen, optax.adamw(1e-3), depth=2)) == [line] * 3


def test_the_rows_of_bert_base(bert):
    summary = fo.summary(bert, ["embeddings", "encoder/layer_{0..9}"], optax.adamw(1e-3))
    layer = 7_087_872
    embeddings = (30_522 + 512 + 2) * 768 + 2 * 768
    pooler = 768 * 768 + 768
    assert [(row.path, row.status, row.trainable, row.frozen) for row in summary.rows] == [
        ("embeddings", "frozen", 0, embeddings),
        ("encoder", "partial", 2 * layer, 10 * layer),
        ("encoder/layer_{0..9}", "frozen", 0, 10 * layer),
        ("encoder/layer_{10..11}", "trainable", 2 * layer, 0),
        ("pooler", "trainable", pooler, 0),
    ]
    assert (summary.state_bytes, summary.saved_bytes) == (
        4 + 8 * 14_766_336,
        8 * (109_482_240 - 14_766_336),
    )


def test_resnet_18(resnet):
    assert (
        last(fo.summary(resnet)) == ["trainable: 11,689,512 of 11,689,512 parameters (100.00%)"] * 3
    )
    line = "trainable: 513,000 of 11,689,512 parameters (4.39%)"
    assert last(fo.summary(resnet, ~fo.path("fc"), optax.sgd(0.1, momentum=0.9))) == [line] * 3


LINES = {
    "no leaves": ({}, "trainable: 0 of 0 parameters (0.00%)"),
    "no elements": ({"a": array(0, 3)}, "trainable: 0 of 0 parameters (0.00%)"),
    "no arrays": ([jnp.tanh, "gelu"], "trainable: 0 of 0 parameters (0.00%)"),
    "one": (1.0, "trainable: 1 of 1 parameters (100.00%)"),
    "integer": (jnp.ones(3, int), "trainable: 0 of 3 parameters (0.00%)"),
    "one of three": ({"a": array(1), "n": array(2, dtype=bool)}, "1 of 3 parameters (33.33%)"),
    "two of three": ({"a": array(2), "n": array(1, dtype=bool)}, "2 of 3 parameters (66.67%)"),
    "million": ({"a": array(10**6)}, "trainable: 1,000,000 of 1,000,000 parameters (100.00%)"),
}


@pytest.mark.parametrize(("params", "line"), LINES.values(), ids=LINES)
def test_the_last_line_says_how_many_train(params, line):
    assert all(text.endswith(line) for text in last(fo.summary(params)))
    assert all(text.startswith("trainable: ") for text in last(fo.summary(params)))


def test_names_are_broken_before_numbers_in_a_console_of_the_user():
    summary = fo.summary({"encoder" * 9: jnp.ones((1_000, 1_000))}, False)
    console = Console(width=40, file=io.StringIO(), color_system=None)
    console.print(summary)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert "encode   trainable    1,000,000   4.0 MB" in lines


@EVERY
def test_the_last_line_is_whole_in_a_narrow_terminal_too(summary, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    count = f"trainable: {summary.trainable:,} of {summary.total:,} parameters ("
    assert str(summary).splitlines()[-1].startswith(count)
    assert str(summary).endswith("%)")


# The plan of a model that fits into no machine.


def test_a_70b_plan_fits_a_screen_and_takes_no_memory():
    params = lora_70b()
    before = {id(x) for x in jax.live_arrays()}
    summary = fo.summary(params, ADAPTERS, optax.adamw(1e-3))
    assert {id(x) for x in jax.live_arrays() if x.size > 1} <= before
    assert (summary.total, summary.trainable) == (LLAMA_2_70B + RANK_16, RANK_16)
    assert summary.state_bytes == 4 + 2 * 2 * RANK_16
    assert summary.saved_bytes == 2 * 2 * LLAMA_2_70B
    assert len(summary.rows) < 50
    assert len(str(summary).splitlines()) < 50
    layers = next(row for row in summary.rows if row.path == "layers/layer_{0..79}")
    assert (layers.status, layers.trainable) == ("partial", RANK_16)
    assert fo.summary(params, ADAPTERS).rows[0].path == "embed"


# The table in text.


@EVERY
@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_name_is_lost(summary, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    *lines, final = str(summary).splitlines()
    assert max(map(len, lines)) <= columns
    assert final == summary.headline
    squeezed = re.sub(r"\s", "", "".join(line[:columns] for line in lines))
    assert "…" not in squeezed
    # A name may be folded, among the cells of its row.
    cells = r"[a-z0-9.,%]*?"
    for row in summary.rows:
        name = row.path.rpartition("/")[2]
        pieces = cells.join(map(re.escape, name)) if len(name) > 30 else re.escape(name)
        assert re.search(pieces, squeezed), name
        assert f"{row.total:,}" in "".join(lines)


def test_the_whole_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    params = {
        "encoder": {f"layer_{i}": {"kernel": array(768, 768)} for i in range(12)},
        "head": {"kernel": array(768, 2), "steps": array(dtype=jnp.int32)},
    }
    assert str(fo.summary(params, "encoder/layer_{0..9}", optax.adamw(1e-3))).splitlines() == [
        "                               parameters     bytes   optimizer state",
        "─" * 69,
        "encoder            partial      7,077,888   28.3 MB            9.4 MB",
        "  layer_{0..9}     frozen       5,898,240   23.6 MB           0 bytes",
        "  layer_{10..11}   trainable    1,179,648    4.7 MB            9.4 MB",
        "head               partial          1,537    6.1 kB           12.3 kB",
        "  kernel           trainable        1,536    6.1 kB           12.3 kB",
        "  steps            frozen               1   4 bytes           0 bytes",
        "",
        "parameters: 28.3 MB, of which 4.7 MB train",
        "optimizer state: 9.4 MB, 47.2 MB less than with nothing frozen",
        "trainable: 1,181,184 of 7,079,425 parameters (16.68%)",
    ]


def test_tied_leaves_say_with_whom():
    lines = str(summaries()["tied"]).splitlines()
    assert [line.split() for line in lines if "kernel" in line] == [
        ["kernel", "=", "embed", "trainable", "0", "0", "bytes"]
    ]


@EVERY
def test_the_text_has_no_control_codes_whatever_the_terminal(summary, monkeypatch):
    expected = str(summary)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert str(summary) == repr(summary) == expected
    assert "\x1b" not in expected


@EVERY
def test_no_line_ends_in_spaces(summary):
    assert not [line for line in str(summary).splitlines() if line != line.rstrip()]


# The table in Markdown.


def parsed(text: str) -> list[list[str]]:
    """The cells of a Markdown table, as GitHub reads it."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]


def without_code(cell: str) -> str:
    fence = re.match("`+", cell)[0]
    assert cell.endswith(fence)
    inside = cell[len(fence) : -len(fence)]
    assert fence not in inside
    return inside


@EVERY
def test_markdown_parses_back_to_the_rows(summary):
    header, rule, *rows = parsed(summary.to_markdown())
    assert {len(header)} == {len(row) for row in [rule, *rows]}
    assert header[1:4] == ["", "parameters", "bytes"]
    assert all(re.fullmatch("-{3,}:?", cell) for cell in rule)
    expected = [(row.path or "(the params)", row.status, f"{row.total:,}") for row in summary.rows]
    # Beside a tied leaf stands, as code of its own, what it is tied to.
    names = [re.sub("(?<=`) = `.*`$", "", row[0]) for row in rows]
    assert [(without_code(x), *row[1:3]) for x, row in zip(names, rows, strict=True)] == expected


TICKS = ["`", "``", "`a`", "a``b", "``a|`b", "a`"]


@pytest.mark.parametrize("name", TICKS)
def test_backticks_in_names_do_not_end_the_code(name):
    _, _, row, other = parsed(fo.summary({name: array(2), "zz": array(3)}).to_markdown())
    assert without_code(row[0]).strip() == name
    assert without_code(other[0]) == "zz"


# A table in HTML, for notebooks and pages.


class Element:
    """An element of a page: its tag, its attributes, and what is in it."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    @property
    def text(self) -> str:
        return "".join(x if isinstance(x, str) else x.text for x in self.children)

    @property
    def style(self) -> dict[str, str]:
        """The declarations that count: a later one replaces a former one."""
        given = (self.attributes.get("style") or "").split(";")
        pairs = [declaration.partition(":") for declaration in given if declaration]
        return {name.strip(): value.strip() for name, _, value in pairs}

    def all(self, *tags: str) -> list["Element"]:
        """The elements with one of these tags, in the order of the page; all without a tag."""
        inside = [x for x in self.children if isinstance(x, Element)]
        found = ([x] * (x.tag in tags or not tags) + x.all(*tags) for x in inside)
        return [x for elements in found for x in elements]


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def page(summary: fo.Summary) -> Element:
    read = Page()
    read.feed(summary._repr_html_())
    read.close()
    (root,) = read.open
    return root


def html_rows(summary: fo.Summary) -> list[list[Element]]:
    (table,) = page(summary).all("table")
    return [row.all("th", "td") for row in table.all("tr")]


@EVERY
def test_the_html_is_a_table_and_says_what_the_other_forms_say(summary):
    root = page(summary)
    (table,) = root.all("table")
    assert table.attributes["class"] == "freeze-optax-summary"
    header, *rows = [[cell.text for cell in row] for row in html_rows(summary)]
    markdown_header, _, *markdown_rows = parsed(summary.to_markdown())
    assert header == markdown_header
    assert [cells[1:] for cells in rows] == [cells[1:] for cells in markdown_rows]
    # Its names are those of the table in text: in a wide terminal, what a line begins with.
    console = Console(width=500, file=io.StringIO(), color_system=None)
    lines = summary.render(console).splitlines()
    for (name, *_), line in zip(rows, lines[2:], strict=False):
        assert line.strip().startswith(name)
    notes = [line for line in summary.to_markdown().split("\n\n")[1:] if line]
    assert [element.text for element in root.all("p")] == notes
    (headline,) = root.all("strong")
    assert headline.text == summary.headline


@EVERY
def test_the_html_has_header_cells_with_a_scope_and_a_name(summary):
    (table,) = page(summary).all("table")
    (head,), (body,) = table.all("thead"), table.all("tbody")
    columns = head.all("th", "td")
    assert [(x.tag, x.attributes["scope"]) for x in columns] == [("th", "col")] * len(columns)
    assert all(x.text or x.attributes["aria-label"] for x in columns)
    for row in body.all("tr"):
        first, *others = row.all("th", "td")
        assert (first.tag, first.attributes["scope"]) == ("th", "row")
        assert first.text
        assert [x.tag for x in others] == ["td"] * (len(columns) - 1)


@EVERY
def test_the_html_has_its_numbers_to_the_right_under_their_headers(summary):
    for row in html_rows(summary):
        sides = [cell.style["text-align"] for cell in row]
        assert sides == ["left", "left", *["right"] * (len(row) - 2)]


@EVERY
def test_the_html_has_names_further_right_the_deeper_they_are(summary):
    lines = summary.render(Console(width=500, color_system=None, force_jupyter=False)).splitlines()
    spaces = [len(line) - len(line.lstrip()) for line in lines[2 : 2 + len(summary.rows)]]
    names = [row[0] for row in html_rows(summary)[1:]]
    left = [float(name.style["padding-left"].removesuffix("em")) for name in names]
    for s, x in zip(spaces, left, strict=True):
        for t, y in zip(spaces, left, strict=True):
            assert (s > t, s == t) == (x > y, x == y)


@EVERY
def test_the_html_scrolls_by_itself_and_takes_the_room_that_it_needs(summary):
    root = page(summary)
    (box,) = (x for x in root.all("div") if x.all("table"))
    assert box.style["overflow-x"] == "auto"
    for element in root.all():
        assert not {"width", "min-width", "height"} & {*element.style, *element.attributes}
        assert element.tag not in {"style", "script", "link"}
    assert all(cell.style["white-space"] == "pre" for row in html_rows(summary) for cell in row)


HOSTILE = ["<b>x</b>", "a&amp;b", "a & b", '"quoted"', "it's", "`ticks`", "</table>", "<script>"]
HOSTILE += ['" onclick="x', "two  spaces", " ", "a\nb", "\x1b[31m", "\u202e", "\ud800", "&lt;"]


@pytest.mark.parametrize("name", [*HOSTILE, ""])
def test_the_html_shows_any_name_as_it_is(name):
    shared = jnp.ones(2)
    for params in ({name: {"w": shared}, "zz": shared}, {"a": shared, "zz": {name: shared}}):
        summary = fo.summary(params, depth=3)
        assert {x.tag for x in page(summary).all()} <= {
            *("div", "table", "thead", "tbody", "tr", "th", "td", "span", "p", "strong")
        }
        lines = summary.render(Console(width=500, color_system=None, force_jupyter=False))
        for (cell, *_), line in zip(html_rows(summary)[1:], lines.splitlines()[2:], strict=False):
            assert line.strip().startswith(cell.text.strip())
            assert {*cell.attributes} <= {"scope", "style", "title"}
            assert all(part.isprintable() for part in [cell.text, cell.attributes.get("title", "")])


def test_the_html_says_the_whole_path_of_a_row():
    params = {f"part_{2 * i}": {"w": jnp.ones(2)} for i in range(20)} | {"z": jnp.ones(1)}
    summary = fo.summary(params)
    for row, (cell, *_) in zip(summary.rows, html_rows(summary)[1:], strict=True):
        assert cell.attributes.get("title", cell.text) == row.path


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@EVERY
def test_the_html_can_be_read_on_black_and_on_white(summary):
    styles = [element.style for element in page(summary).all()]
    assert not any(name.startswith("background") for style in styles for name in style)
    assert all(float(style.get("opacity", 1)) >= 0.6 for style in styles)
    colours = {style["color"] for style in styles if "color" in style}
    assert colours or not summary.rows
    for colour in colours:
        assert re.fullmatch("#[0-9a-f]{6}", colour)
        light = luminance(colour)
        # What WCAG 2 asks of text (AA). No colour has more than 4.58 on both.
        assert 1.05 / (light + 0.05) > 4.5, f"{colour} on white"
        assert (light + 0.05) / 0.05 > 4.5, f"{colour} on black"


def test_what_a_notebook_shows_is_not_printed_too(capsys):
    fo.summary({"a": array(2)})._repr_html_()
    assert capsys.readouterr() == ("", "")


def test_the_three_statuses_have_a_colour_each():
    summary = fo.summary({"a": {"x": array(2), "y": array(2)}}, "a/x")
    found = {row[1].style["color"]: row[1].text for row in html_rows(summary)[1:]}
    assert sorted(found.values()) == ["frozen", "partial", "trainable"]


# As data.


KEYS = ["total", "trainable", "frozen", "trainable_bytes", "frozen_bytes"]
KEYS += ["state_bytes", "saved_bytes", "rows"]


@EVERY
def test_the_dict_goes_through_json_and_has_the_attributes(summary):
    data = summary.to_dict()
    assert list(data) == KEYS
    assert json.loads(json.dumps(data)) == data
    assert {key: data[key] for key in KEYS[:-1]} == {
        key: getattr(summary, key) for key in KEYS[:-1]
    }
    rows = [{**dataclasses.asdict(row), "factors": list(row.factors)} for row in summary.rows]
    assert data["rows"] == rows
    assert set(KEYS[:-1]) | {"path", "status"} <= {key for row in data["rows"] for key in row} or (
        not data["rows"]
    )


@EVERY
def test_the_lowest_rows_sum_to_the_totals(summary):
    rows = summary.rows
    low = [r for r in rows if not any(o.path.startswith(r.path + "/") for o in rows)]
    for key in KEYS[:5]:
        assert sum(getattr(row, key) for row in low) == getattr(summary, key)
    assert all(row.total == row.trainable + row.frozen for row in rows)


def test_equal_plans_have_equal_summaries():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    assert fo.summary(params, "a") == fo.summary(params, {"a": True, "b": False})
    assert fo.summary(params, "a") != fo.summary(params, "b")


def test_summaries_that_show_the_same_are_equal_however_they_were_asked_for():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    assert fo.summary(params, "a", depth=1) == fo.summary(params, "a", depth=2)
    assert fo.summary(params, "a", depth=1) == fo.summary(params, "a")


@pytest.mark.parametrize("layers", [13, 14])
def test_a_name_of_more_than_40_characters_has_its_middle_left_out_in_the_table_alone(layers):
    params = {f"part_{2 * i}": jnp.ones(2) for i in range(layers)} | {"z": jnp.ones(1)}
    summary = fo.summary(params)
    name = "part_{" + ",".join(str(2 * i) for i in range(layers)) + "}"
    assert summary.rows[0].path == name
    shown = str(summary).splitlines()[2].split("  ")[0].strip()
    assert shown == (name if len(name) <= 40 else f"{name[:20]}…{name[-10:]}")
