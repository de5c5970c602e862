"""The picture of a summary: blocks, colours and labels, as they are drawn."""

import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import pytest

import freeze_optax as fo
from freeze_optax._report.counts import LeafCounts
from freeze_optax._report.outline import Line, Node
from freeze_optax._report.plot import _label

mpl.use("Agg")

from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

LEAST_FONT = 5.0
STYLES = pytest.mark.parametrize("style", ["default", "dark_background"])


@pytest.fixture(autouse=True)
def _close_figures():
    with plt.style.context("default"):
        yield
    plt.close("all")


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def three_hundred() -> dict[str, Any]:
    """A network of 300 leaves no two of whose blocks are alike."""

    def block(size: int) -> dict[str, Any]:
        return {"bias": array(size), "conv": {"kernel": array(3, 3, size)}, "scale": array(size)}

    return {f"stage_{i}": {f"block_{j}": block(64 + 16 * j) for j in range(25)} for i in range(4)}


def transformer() -> dict[str, Any]:
    layer = {"attention": {"q": array(64, 64), "v": array(64, 64)}, "mlp": array(64, 256)}
    return {
        "embed": array(500, 64),
        "encoder": {f"layer_{i}": layer for i in range(12)},
        "norm": array(64),
        "head": {"bias": array(100), "kernel": array(64, 100)},
    }


def tied() -> dict[str, Any]:
    table = jnp.ones((40, 5))
    return {"a": table, "b": {"bias": jnp.ones(50), "kernel": table}, "c": jnp.ones(7)}


PLANS = {
    "transformer": lambda: fo.summary(transformer(), ("embed", "encoder/layer_{0..9}")),
    "with a depth": lambda: fo.summary(transformer(), "encoder/layer_*/attention", depth=2),
    "all levels": lambda: fo.summary(transformer(), "encoder/layer_*/attention", depth=9),
    "300 leaves": lambda: fo.summary(three_hundred(), ("stage_{0..1}", "**/bias")),
    "300 leaves of one level": lambda: fo.summary([array(50 + i) for i in range(300)], "{0..149}"),
    "tied": lambda: fo.summary(tied(), "b/bias"),
    "rows": lambda: fo.summary({"a": array(10, 3), "b": array(8)}, fo.rows("a", [0, 1])),
    "no elements": lambda: fo.summary({"a": array(0, 3), "b": array(8), "f": jnp.tanh}, depth=1),
}
EVERY = pytest.mark.parametrize("plan", PLANS)


def blocks(ax: Any) -> list[tuple[float, float, float, str]]:
    """Level, top, height and colour of each block, by level and from the top."""
    found = [(p.get_x(), p.get_y(), p.get_height(), p.get_facecolor()) for p in ax.patches]
    return sorted((x, y, height, colors.to_hex(colour)) for x, y, height, colour in found)


def legend(ax: Any) -> dict[str, str]:
    keys = zip(ax.get_legend().get_texts(), ax.get_legend().get_patches(), strict=True)
    return {text.get_text(): colors.to_hex(patch.get_facecolor()) for text, patch in keys}


@functools.cache
def colour_of(status: str) -> str:
    summary = fo.summary({"a": {"x": array(9), "y": array(9)}, "b": array(9)}, "a/x", depth=2)
    found = legend(summary.plot())
    assert sorted(found) == ["frozen", "partial", "trainable"]
    assert len(set(found.values())) == 3
    return found[status]


def drawn(summary: fo.Summary, ax: Any = None) -> Any:
    ax = summary.plot(ax)
    ax.figure.canvas.draw()
    return ax


@functools.cache
def picture(plan: str) -> tuple[fo.Summary, Any]:
    """The summary of a plan and its picture, which the tests look at and leave as it is."""
    summary = PLANS[plan]()
    ax = drawn(summary)
    plt.close(ax.figure)  # now, as that takes its canvas
    FigureCanvasAgg(ax.figure)
    return summary, ax


# Blocks.


def test_each_node_is_a_block_as_high_as_it_has_parameters():
    params = {"a": {"x": array(3), "y": array(4)}, "b": array(5), "c": {"z": {"w": array(6)}}}
    ax = fo.summary(params, ("a/y", "c"), depth=3).plot()
    train, still, part = map(colour_of, ("trainable", "frozen", "partial"))
    assert blocks(ax) == [
        (0, 0, 7, part),
        (0, 7, 5, train),
        (0, 12, 6, still),
        (1, 0, 3, train),
        (1, 3, 4, still),
        (1, 12, 6, still),
        (2, 12, 6, still),
    ]
    assert {patch.get_width() for patch in ax.patches} == {1}
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 3), (18, 0))


@EVERY
def test_blocks_add_up_to_the_parameters_and_do_not_overlap(plan):
    summary, ax = picture(plan)
    levels = {x: list(group) for x, group in itertools.groupby(blocks(ax), lambda b: b[0])}
    assert sum(height for _, _, height, _ in levels[0]) == summary.total
    for level, column in levels.items():
        for (_, top, height, _), (_, below, *_) in itertools.pairwise(column):
            assert top + height <= below
        if level:
            spans = [(top, top + height) for _, top, height, _ in levels[level - 1]]
            for _, top, height, _ in column:
                assert any(low <= top and top + height <= high for low, high in spans)
    assert ax.get_ylim() == (summary.total, 0)


@EVERY
def test_colours_add_up_to_what_trains(plan):
    summary, ax = picture(plan)
    by_status = dict.fromkeys(map(colour_of, ("trainable", "frozen", "partial")), 0)
    train, still, part = by_status
    shown = [block for block in blocks(ax) if block[2]]
    for level, top, height, colour in shown:
        inside = any(x == level + 1 and top <= y < top + height for x, y, *_ in shown)
        by_status[colour] += 0 if inside else height
    # A leaf that is frozen in part has no blocks inside it.
    assert by_status[train] <= summary.trainable
    assert by_status[still] <= summary.frozen
    assert sum(by_status.values()) == summary.total
    rest = summary.trainable - by_status[train] + summary.frozen - by_status[still]
    assert by_status[part] == rest


def test_folded_layers_are_one_block_of_all_their_parameters():
    ax = PLANS["transformer"]().plot()
    layer = 2 * 64 * 64 + 64 * 256
    second = [(height, colour) for x, _, height, colour in blocks(ax) if x == 1]
    expected = [(10 * layer, colour_of("frozen")), (2 * layer, colour_of("trainable"))]
    assert second[:2] == expected


# Labels.


def spans(ax: Any) -> list[tuple[Any, Any]]:
    renderer = ax.figure.canvas.get_renderer()
    return [(text, text.get_window_extent(renderer)) for text in ax.texts]


@EVERY
def test_labels_can_be_read_and_stay_in_their_blocks(plan):
    _, ax = picture(plan)
    shown = [(patch, patch.get_window_extent()) for patch in ax.patches]
    for text, extent in spans(ax):
        assert text.get_fontsize() >= LEAST_FONT
        x, y = ax.transData.inverted().transform((extent.x0, (extent.y0 + extent.y1) / 2))
        (block,) = [
            block
            for patch, block in shown
            if patch.get_x() <= x < patch.get_x() + 1
            and patch.get_y() <= y < patch.get_y() + patch.get_height()
        ]
        assert block.y0 <= extent.y0 <= extent.y1 <= block.y1, text
        assert block.x0 <= extent.x0 <= extent.x1 <= block.x1, text
    extents = [extent for _, extent in spans(ax)]
    assert not [(a, b) for a, b in itertools.combinations(extents, 2) if a.overlaps(b)]


@EVERY
def test_every_block_with_room_for_a_line_has_its_name(plan):
    _, ax = picture(plan)
    labelled = {(int(t.get_position()[0]), t.get_position()[1]) for t in ax.texts}
    high = [p for p in ax.patches if p.get_window_extent().height * 72 / ax.figure.dpi > 8]
    for patch in high:
        middle = patch.get_y() + patch.get_height() / 2
        assert (int(patch.get_x()), middle) in labelled


def test_300_leaves_of_one_size_have_names_to_read():
    ax = drawn(PLANS["300 leaves of one level"]())
    assert (
        len(ax.texts) > len(ax.patches) / 2
    )  # the larger ones, which are up to seven times the smallest


def test_at_300_leaves_the_picture_is_no_larger_than_a_page():
    width, height = PLANS["300 leaves"]().plot().figure.get_size_inches()
    assert 4 <= width <= 12
    assert 4 <= height <= 12


WIDE = {
    "capitals": "MWMWMWMW_W",
    "long": "a_name_that_no_column_has_room_for",
    "wide": "中文中文中文中文",
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", WIDE.values(), ids=WIDE)
def test_a_long_name_is_cut_to_its_block(name):
    params = {name: {name: array(9)}, "b": {"c": array(9)}}
    ax = drawn(fo.summary(params, depth=2))
    found = [(text.get_position()[0], extent) for text, extent in spans(ax)]
    assert len(found) == 4
    for x, extent in found:
        end = ax.transData.transform((int(x) + 1, 0))[0]
        assert extent.x1 <= end


@pytest.mark.parametrize("name", ["$x_1$", "$", "a$b$c", r"\alpha", r"$\frac$", "x^2_{0}", "%"])
def test_names_are_no_mathematics(name):
    ax = drawn(fo.summary({name: array(9), "b": array(9)}, depth=1))
    assert name in [text.get_text().split("  ")[0] for text in ax.texts]
    assert not any(text.get_parse_math() for text in ax.texts)


NUMBERS = {9: "9", 999: "999", 1000: "1k", 1234: "1.23k", 10**6: "1M", 70 * 10**9: "70B"}


@pytest.mark.parametrize(("count", "text"), NUMBERS.items())
def test_labels_say_how_many_parameters(count, text):
    ax = drawn(fo.summary({"name": array(count)}))
    assert [label.get_text().split() for label in ax.texts] == [["name", text]]


@pytest.mark.parametrize("count", [999_999, 999_600, 999_999_999])
def test_numbers_are_rounded_to_the_next_unit(count):
    ax = drawn(fo.summary({"name": array(count)}))
    assert ax.texts[0].get_text().split()[1] in ("1M", "1B")


# Around the blocks.


@EVERY
def test_the_title_is_the_last_line_of_the_table_and_fits(plan):
    summary, ax = picture(plan)
    assert ax.get_title(loc="left") == summary.headline
    assert_inside(ax)


def assert_inside(ax: Any) -> None:
    """Title and legend lie within the figure."""
    renderer = ax.figure.canvas.get_renderer()
    whole = ax.figure.bbox
    for part in (ax._left_title, ax.get_legend()):
        extent = part.get_window_extent(renderer)
        assert whole.x0 <= extent.x0
        assert extent.x1 <= whole.x1
        assert whole.y0 <= extent.y0
        assert extent.y1 <= whole.y1


def test_the_title_of_a_large_model_fits_a_picture_of_one_level():
    params = {"body": array(70, 10**9), "head": array(123_456_789)}
    assert_inside(drawn(fo.summary(params, "body", depth=1)))


@EVERY
def test_the_legend_names_the_colours_that_there_are(plan):
    _, ax = picture(plan)
    shown = {colour for _, _, height, colour in blocks(ax) if height}
    assert set(legend(ax).values()) == shown


@STYLES
def test_letters_are_dark_on_light_blocks_in_every_style(style):
    with plt.style.context(style):
        ax = drawn(PLANS["transformer"]())
        assert {colors.to_hex(text.get_color()) for text in ax.texts} == {"#000000"}
        for *_, colour in blocks(ax):
            assert sum(colors.to_rgb(colour)) > 1.5
        ground = colors.to_hex(ax.get_facecolor())
        assert {colors.to_hex(patch.get_edgecolor()) for patch in ax.patches} == {ground}
        named = ax.get_legend().get_texts()[0].get_color()
        assert colors.to_hex(named) == colors.to_hex(mpl.rcParams["text.color"])


# Axes.


def test_it_draws_into_the_given_axes_and_returns_them():
    figure, (left, right) = plt.subplots(1, 2)
    assert PLANS["transformer"]().plot(right) is right
    assert not left.patches
    assert len(right.patches) > 10
    assert PLANS["tied"]().plot(ax=left) is left
    assert plt.get_fignums() == [figure.number]


def test_without_axes_it_makes_new_ones():
    first, second = PLANS["tied"]().plot(), PLANS["tied"]().plot()
    assert first.figure is not second.figure
    assert len(plt.get_fignums()) == 2


def test_what_is_right_of_given_axes_is_left_alone():
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    ax = drawn(PLANS["transformer"](), left)
    end = right.get_window_extent().x0
    for text, extent in spans(ax):
        assert extent.x1 <= end, text


SMALL = {"no leaves": {}, "no arrays": [jnp.tanh], "one array": jnp.ones(3), "scalar": 1.0}


@pytest.mark.parametrize("depth", [None, 0, 1, 5])
@pytest.mark.parametrize("params", SMALL.values(), ids=SMALL)
def test_anything_can_be_drawn(params, depth):
    summary = fo.summary(params, depth=depth)
    ax = drawn(summary)
    assert ax.get_title(loc="left") == summary.headline
    assert sum(height for x, _, height, _ in blocks(ax) if x == 0) in (0, summary.total)


def test_one_array_is_one_block():
    ax = drawn(fo.summary(jnp.ones((2, 3)), True))
    assert blocks(ax) == [(0, 0, 6, colour_of("frozen"))]


def test_a_depth_of_zero_has_no_blocks_inside():
    assert not fo.summary(transformer(), depth=0).plot().patches


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    summary = PLANS["tied"]()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'freeze_optax\[plot\]'"):
        summary.plot()
    assert str(summary)


def test_a_summary_needs_no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert fo.summary(transformer(), "embed").to_dict()["frozen"] == 500 * 64


def test_a_label_has_the_number_if_both_fit_and_is_cut_if_the_name_does_not():
    line = Line(0, Node("head"), LeafCounts(total=9))
    texts = {room: _label(line, room) for room in (0, 1, 2, 3, 4, 6, 7, 99)}
    cut = {0: "h…", 1: "h…", 2: "h…", 3: "he…"}
    assert texts == {**cut, 4: "head", 6: "head", 7: "head  9", 99: "head  9"}
