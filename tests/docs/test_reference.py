"""The reference: each public name on one page, inventories in order, and remedies that run."""

import collections
import contextlib
import inspect
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import freeze_optax
from freeze_optax import linen, nnx, testing
from tests.support.page_modules import fresh_page_modules

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("reference/*.md")}
KINDS = "currentmodule|module|automodule|autofunction|autoclass|autodata|autosummary"
DIRECTIVE = re.compile(rf"^\s*\.\. ({KINDS})::[ ]*(\S*?)(?:\(\))?$")


def public_names(module: types.ModuleType) -> set[str]:
    names = {name for name in vars(module) if not name.startswith("_")}
    names = set(getattr(module, "__all__", names))
    return {
        f"{module.__name__}.{name}" for name in names if not inspect.ismodule(vars(module)[name])
    }


PUBLIC = set.union(*map(public_names, [freeze_optax, linen, nnx, testing]))


def described(page: str) -> Iterator[tuple[str, str]]:
    """The names that a page describes ("autofunction", …) or lists ("autosummary")."""
    module, in_summary = "", False
    for line in PAGES[page].splitlines():
        if match := DIRECTIVE.match(line):
            kind, name = match.groups()
            in_summary = kind == "autosummary"
            if kind.endswith("module"):
                module = name
            elif not in_summary:
                yield kind, f"{module}.{name}"
        elif in_summary and (match := re.fullmatch(r"   (\w+)", line)):
            yield "autosummary", f"{module}.{match[1]}"
        elif line.startswith("```"):
            in_summary = False


def test_the_names_are_those_that_users_import():
    assert {
        "freeze_optax.freezable",
        "freeze_optax.nnx.thaw",
        "freeze_optax.linen.modules",
    } < PUBLIC
    assert len(PUBLIC) > 45
    assert not [name for name in PUBLIC if "._" in name]


def test_each_public_name_is_described_once():
    found = [name for page in PAGES for kind, name in described(page) if kind != "autosummary"]
    counts = collections.Counter(name for name in found if "._" not in name)
    assert set(counts) == PUBLIC
    assert {name: count for name, count in counts.items() if count > 1} == {}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_table_at_the_top_of_a_page_lists_what_it_describes(page):
    entries = list(described(page))
    listed = {name for kind, name in entries if kind == "autosummary"}
    assert listed == {name for kind, name in entries if kind != "autosummary"} & PUBLIC


def test_the_overview_links_each_public_name_once():
    linked = re.findall(r"\{py:obj\}`~([\w.]+)`", PAGES["index"])
    assert sorted(linked) == sorted(PUBLIC)


def test_each_page_of_the_reference_is_in_its_table_of_contents():
    (contents,) = re.findall(r"```\{toctree\}\n:hidden:\n\n(.*?)\n```", PAGES["index"], re.DOTALL)
    assert sorted(contents.split()) == sorted(PAGES.keys() - {"index"})


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_no_colon_in_the_first_line_of_what_is_returned(name):
    # Sphinx would take what stands before it for a type.
    module, _, attribute = name.rpartition(".")
    docstring = inspect.getdoc(getattr(sys.modules[module], attribute))
    for line in re.findall(r"^ *Returns:\n(.*)", docstring, re.MULTILINE):
        assert ": " not in re.sub("`[^`]*`", "", line)


# Inventories.


@pytest.mark.parametrize("path", sorted(DOCS.glob("inventories/*.txt")), ids=lambda path: path.stem)
def test_an_inventory_is_sorted_and_says_how_it_was_checked(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    entries = [line.split() for line in lines if not line.startswith("#")]
    assert re.search(r"Checked on \d{4}-\d\d-\d\d", " ".join(comments))
    assert entries
    assert [name for name, _, _ in entries] == sorted({name for name, _, _ in entries})
    for _, role, uri in entries:
        assert re.fullmatch(r"py:(function|class|exception|module)", role)
        assert re.fullmatch(r"[\w./]+\.html#[\w.$-]+", uri)


# Errors.

CELL = re.compile(r"```\{code-cell\} python\n((?::.*\n)*)(.*?)```", re.DOTALL)

REMEDIES = [
    'fo.regex(r".*/layer_0/.*")(params)',
    'fo.path("**/layer_0")(params)',
    'fo.layers("encoder/layer_*")[:5](params)',
    'fo.dotted(fo.layers("layers/*")[0])({"layers.0.weight": jnp.ones(2)})',
    'fo.path("encoder", "head")(params)',
    'fo.mask({"encoder": True, "head": False}, params)',
    'fo.mask(fo.labelled({"encoder": "frozen", "head": "trainable"}, "frozen"), params)',
    "fo.mask(fo.where(lambda path, leaf: leaf.ndim < 2), params)",
    'fo.mask(fo.of_type(nn.LayerNorm, modules=modules), variables["params"])',
    'fo.rows("encoder/layer_0/kernel", [0], axis=1)(params)',
    'fo.elements("head/kernel", lambda leaf: abs(leaf) > 0.1)(params)',
    'fo.top_elements("**/kernel", 0.05)(params)',
    'fo.freezable(optax.adam(1e-3), fo.rows("head/kernel", [0])).init(params)',
    'fo.freezable(optax.adam(1e-3), ~fo.path("head")).init(params)',
    'fo.freezable(optax.sgd(0.1), ["embed", "head"]).init({**tied, "w": jnp.ones(2)})',
    'fo.freezable(optax.sgd(0.1), "embed").init({**tied, "head": jnp.copy(table)})',
    "fo.value_and_grad(loss_fn, frozen=opt_state)(params, batch)",
    "jax.vmap(tx.init)(stacked)",
    "fo.adopt(fo.freezable(optax.adam(1e-3)), optax.adam(1e-3).init(params), params)",
    'fo.freeze(opt_state, params, "encoder")',
    "fo.adopt(tx, plain_state, params)",
    'fo.Phases({0: fo.everything, 10: "encoder"}).validate(params)',
    "fo.set_frozen(opt_state, params, phases.at(20))",
    'fo.import_state({"step": 0, "opt_state": tx.init(params)}, params, tree_export)',
    'serialization.from_bytes(fo.set_frozen(target, params, "encoder"), saved)',
    'fo.rates([("encoder/layer_2", 0.5), ("encoder", 0.1)]).init(params)',
    'fo.groups({"encoder": "slow", fo.everything: "fast"})(params)',
    'fo.groups({"encoder": "slow"}, default="fast")(params)',
    'fo.groups([("encoder", "slow"), (fo.everything, "fast")])(params)',
    'fo.labelled(fo.groups({"encoder": "frozen", "head": "fast"}), "frozen")(params)',
    'fo.rates(fo.layerwise(["encoder/layer_*", "head"], 0.9)).init(params)',
    "fo.since_thaw(optax.linear_schedule(0.0, 1.0, 100)).init(params)",
    "fo.rates({}, default=0.1).init(params)",
    'fo.adjust(rated_state, params, "head", 0.5)',
    "fo.merge(trainable, rest)",
    'fo.tie(optax.sgd(0.1), ("embed", "head")).init(tied)',
    'fo.summary(params, "encoder", optimizer=optax.adamw(1e-3))',
    "fo.grad(stacked_loss(fo.scan), frozen=turn_state)(scanned)",
    'fo.freeze(turn_state, scanned, "head")',
    "turns.update(turn_grads, turn_state, scanned)",
    'fo.stack_layers(mixed, "encoder/layer_*", to="encoder/layers")',
    'fo.unstack_layers(scanned, "encoder/layers", to="encoder/layer_{0..2}")',
    'fo.place(hosted, opt_state, "device")',
    "fo.place(hosted, opt_state)",
    "fo.export_state(optimizer.opt_state)",
    "optimizer.step[...]",
]


@pytest.fixture(scope="module")
def errors_page() -> dict[str, object]:
    """What the cells of the page of errors leave behind."""
    namespace: dict[str, object] = {}
    printed, promotion = io.StringIO(), jax.numpy_dtype_promotion("standard")
    with contextlib.redirect_stdout(printed), promotion, fresh_page_modules():
        for match in CELL.finditer(PAGES["errors"]):
            exec(compile(match[2], "docs/reference/errors.md", "exec"), namespace)
    return {**namespace, "printed": printed.getvalue()}


def test_each_heading_of_an_error_is_in_a_message_below_it(errors_page):
    printed = " ".join(errors_page["printed"].split())
    headings = re.findall(r"^### (.*)$", PAGES["errors"], re.MULTILINE)
    assert len(headings) > 40
    pieces = [
        part.strip(" `,").removesuffix(")").removeprefix(")").strip()
        for heading in headings
        for code in re.findall(r"`` .*? ``|`[^`]+`", heading)
        for part in code.strip("`").split("…")
    ]
    assert [piece for piece in pieces if piece not in printed] == []


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("remedy", REMEDIES)
def test_what_to_write_instead_runs(errors_page, remedy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eval(remedy, dict(errors_page))
