"""`scores` and `plot_scores`: what was measured as a mapping, a table and lines."""

import html.parser
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import optax
import pytest

import freeze_optax as fo

mpl.use("Agg")

from matplotlib import pyplot as plt

pytestmark = pytest.mark.usefixtures("standard_promotion")

SGD = optax.sgd(0.5)


def state_of(params: Any, steps: int = 2, frozen: Any = fo.nothing) -> Any:
    tx = fo.freezable(fo.measured(SGD), frozen)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: x * (1 + i), params)
        _, state = tx.update(grads, state, params)
    return state


LAYERS = {f"layer_{i}": {"w": jnp.full(4, 1.0 + i)} for i in (0, 2, 10)}


def test_it_is_a_mapping_in_natural_order():
    found = fo.scores(state_of(LAYERS))
    assert list(found) == ["layer_0/w", "layer_2/w", "layer_10/w"]
    assert len(found) == 3
    assert "layer_2/w" in found
    with pytest.raises(KeyError):
        found["layer_1/w"]
    # Norms 2 and 4 of the first one: 0.9 and 1 are their weights.
    first = found["layer_0/w"]
    assert first.gradient == pytest.approx((0.9 * 2 + 4) / 1.9)
    assert first.update == pytest.approx((0.9 * 1 + 2) / 1.9)
    assert (first.gradient_change, first.update_change, first.steps) == (2.0, 1.0, 2)
    assert all(type(x) is float for x in first[:4])
    assert type(first.steps) is int


def test_as_text_it_is_a_table():
    expected = """\
             gradient   update   gradient change   update change   steps
────────────────────────────────────────────────────────────────────────
layer_0/w        3.05     1.53                 2               1       2
layer_2/w        9.16     4.58                 6               3       2
layer_10/w       33.6     16.8                22              11       2

measured: 3"""
    found = fo.scores(state_of(LAYERS))
    assert str(found) == repr(found) == expected
    assert str(fo.scores(state_of(LAYERS, 0))).count("-       0") == 3
    assert "(the params)" in str(fo.scores(state_of(jnp.ones(3))))
    none = fo.scores(fo.freezable(fo.measured(SGD), fo.path("*") - "layer_0").init(LAYERS))
    assert list(none) == ["layer_0/w"]


def test_a_path_is_on_one_line_unless_it_is_very_long():
    path = "encoder/layers/attention/query/kernel"
    params = {path: jnp.ones(4), "x" * 100: jnp.ones(4)}
    lines = str(fo.scores(state_of(params))).splitlines()
    assert any(line.startswith(f"{path}  ") for line in lines)
    assert max(map(len, lines)) < 160


def test_names_cannot_control_a_terminal_or_a_page():
    params = {"\x1b[31m": jnp.ones(2), "<b>&": jnp.ones(2), "[red]": jnp.ones(2)}
    found = fo.scores(state_of(params))
    assert "\x1b" not in str(found)
    assert "[red]" in str(found)
    page = found._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_in_a_notebook_it_is_a_table_with_the_cells_of_the_text():
    class Cells(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows: list[list[str]] = []

        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")

        def handle_data(self, data):
            if self.rows and self.rows[-1] and data.strip():
                self.rows[-1][-1] += data

    cells = Cells()
    found = fo.scores(state_of(LAYERS, 1))
    table = found._repr_html_().split("</table>")[0]
    cells.feed(table)
    header, first, *_ = cells.rows
    assert header == ["", "gradient", "update", "gradient change", "update change", "steps"]
    assert first == ["layer_0/w", "2", "1", "-", "-", "1"]
    assert len(cells.rows) == 4
    assert "measured: 3" in found._repr_html_()


def test_it_reads_any_tree_with_one_state():
    state = state_of(LAYERS)
    for tree in ({"step": 3, "opt_state": state}, (state, LAYERS), state.inner):
        assert fo.scores(tree) == fo.scores(state)


def test_a_tree_without_one_and_a_traced_one_are_an_error():
    with pytest.raises(TypeError, match=r"no state of fo\.measured is; measure the optimizer"):
        fo.scores(fo.freezable(SGD).init(LAYERS))
    with pytest.raises(TypeError, match="a dict for its state, in which"):
        fo.scores(LAYERS)
    state = state_of(LAYERS)
    with pytest.raises(
        TypeError, match=r"the state is traced, or of shapes alone; call it outside"
    ):
        jax.jit(lambda state: fo.scores(state)["layer_0/w"].gradient)(state)
    with pytest.raises(TypeError, match="of shapes alone"):
        fo.scores(jax.eval_shape(lambda state: state, state))


def history_of(paths: list[str], steps: int = 3) -> Any:
    one = lambda i, step: fo.Score(1.0 + i, 2.0, 0.5 * step, math.nan, step)  # noqa: E731
    return {
        step: fo.Scores({path: one(i, step) for i, path in enumerate(paths)})
        for step in reversed(range(steps))
    }


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def lines_of(ax: Any) -> dict[str, list[float]]:
    return {line.get_label(): line.get_ydata().tolist() for line in ax.lines}


def test_a_line_is_a_leaf_over_the_steps():
    ax = fo.plot_scores(history_of(["b", "a_10", "a_2"]))
    assert lines_of(ax) == {"a_2": [3.0] * 3, "a_10": [2.0] * 3, "b": [1.0] * 3}
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "gradient", "log")
    own = plt.figure().subplots()
    assert fo.plot_scores(history_of(["b"]), "gradient_change", own) is own
    assert (own.get_ylabel(), lines_of(own)) == ("gradient change", {"b": [0.0, 0.5, 1.0]})


def test_what_does_not_train_at_a_step_is_a_gap():
    history = history_of(["a", "b"])
    history[1] = fo.Scores({"a": history[1]["a"]})
    ax = fo.plot_scores(history)
    first, gap, last = lines_of(ax)["b"]
    assert (first, math.isnan(gap), last) == (2.0, True, 2.0)
    # All that is known is NaN: no line, and no scale of powers of ten.
    assert fo.plot_scores(history, "update_change").get_yscale() == "linear"


def test_many_leaves_are_few_lines_of_subtrees():
    paths = [f"{part}/layer_{i}/{name}" for part in "ab" for i in range(5) for name in "wv"]
    ax = fo.plot_scores(history_of(paths))
    assert list(lines_of(ax)) == [f"{part}/layer_{i}" for part in "ab" for i in range(5)]
    assert lines_of(ax)["a/layer_1"] == pytest.approx([math.hypot(3, 4)] * 3)
    many = [f"layer_{i}/w" for i in range(30)]
    labels = list(lines_of(fo.plot_scores(history_of(many))))
    assert len(labels) == 12
    assert labels[0] == "layer_0 … layer_1"
    assert labels[-1] == "layer_27 … layer_29"
    top = [f"{x}" for x in range(12)]
    assert list(lines_of(fo.plot_scores(history_of(top)))) == top


def test_a_name_is_no_formula_and_a_long_one_is_short():
    ax = fo.plot_scores(history_of(["$x$", "y" * 100]))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[0] == "$x$"
    assert len(labels[1]) == 40
    ax.figure.canvas.draw()


def test_what_cannot_be_drawn_is_an_error_at_once():
    history = history_of(["a"])
    with pytest.raises(
        ValueError, match=r"was given 'gradients', which is no measure; .*'gradient'"
    ):
        fo.plot_scores(history, "gradients")
    for wrong in (history[0], [history[0]], {0: 1.0}, None):
        with pytest.raises(
            TypeError, match=r"takes a mapping from step to scores, .*history\[step"
        ):
            fo.plot_scores(wrong)
    with pytest.raises(ValueError, match="an empty history"):
        fo.plot_scores({})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'freeze_optax\[plot\]'"):
        fo.plot_scores(history_of(["a"]))
