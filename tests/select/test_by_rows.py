import operator as op
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import freeze_optax as fo
from tests.support.sampling import examples

HOLE = optax.MaskedNode()


def _params():
    return {"embed": jnp.zeros((5, 2)), "head": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}}


def _plain(mask):
    """The mask with a list for each vector, checked to be a vector of NumPy bools."""

    def plain(x):
        if isinstance(x, bool):
            return x
        assert (type(x), x.dtype, x.ndim) == (np.ndarray, np.dtype(bool), 1)
        assert any(x), "all or nothing is a bool"
        assert not all(x), "all or nothing is a bool"
        return x.tolist()

    return jax.tree.map(plain, mask)


def _flags(text):
    """`"110"` as a list of bools."""
    return [c == "1" for c in text]


FORMS = {
    "slice": (slice(0, 3), "11100"),
    "open start": (slice(None, 2), "11000"),
    "open stop": (slice(3, None), "00011"),
    "negative start": (slice(-2, None), "00011"),
    "negative stop": (slice(None, -1), "11110"),
    "step": (slice(None, None, 2), "10101"),
    "start and step": (slice(1, 5, 3), "01001"),
    "negative step": (slice(3, 0, -1), "01110"),
    "negative step from the end": (slice(None, None, -3), "01001"),
    "NumPy ends": (slice(np.int64(1), np.int32(2)), "01000"),
    "range": (range(1, 4), "01110"),
    "falling range": (range(4, -1, -2), "10101"),
    "list": ([0, 4], "10001"),
    "any order": ((3, 0), "10010"),
    "twice": ([1, 1], "01000"),
    "negative ints": ([-1, 0], "10001"),
    "NumPy ints": (np.asarray([2, 3], np.uint8), "00110"),
    "jax ints": (jnp.asarray([2, 3]), "00110"),
    "list of bools": ([True, False, True, False, False], "10100"),
    "NumPy bools": (np.asarray([False, True, False, False, True]), "01001"),
    "jax bools": (jnp.asarray([False, True, False, False, True]), "01001"),
}


@pytest.mark.parametrize(("rows", "expected"), FORMS.values(), ids=FORMS)
def test_rows_may_be_written_in_any_form(rows, expected):
    others = {"head": {"bias": False, "kernel": False}}
    assert _plain(fo.rows("embed", rows)(_params())) == {"embed": _flags(expected), **others}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(None), True),
        (slice(0, 5), True),
        (slice(None, None, -1), True),
        (slice(5, None), False),
        (slice(3, 3), False),
        (range(5), True),
        ([], False),
        (range(0), False),
        ([True] * 5, True),
        (np.zeros(5, bool), False),
    ],
    ids=str,
)
def test_all_rows_and_none_are_plain_bools(rows, expected):
    assert fo.rows("embed", rows)(_params())["embed"] is expected
    assert (~fo.rows("embed", rows))(_params())["embed"] is not expected


SPECS = [
    "embed",
    fo.path("embed") | fo.nothing,
    ["embed"],
    {"embed": True, "head": False},
    lambda tree: {"embed": True, "head": False},
    fo.freezable(optax.sgd(0.1), "embed").init(_params()),
    fo.rows("embed", slice(0, 4)),
    {"embed": np.asarray(_flags("11101")), "head": False},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_rows_of_any_spec_are_those_of_the_leaves_that_it_selects(spec):
    mask = fo.rows(spec, [0, 2])(_params())
    assert _plain(mask) == {"embed": _flags("10100"), "head": {"bias": False, "kernel": False}}


def test_rows_of_rows_count_from_the_first_of_the_leaf_and_are_in_both():
    nested = fo.rows(fo.rows("embed", slice(1, 4)), [0, 2, 3])
    assert _plain(nested(_params())["embed"]) == _flags("00110")
    assert fo.rows(fo.rows("embed", slice(0, 2)), slice(2, 4))(_params())["embed"] is False


def test_each_selected_leaf_is_cut_along_its_own_leading_axis():
    mask = fo.rows(fo.everything, slice(None, 2))(_params())
    assert _plain(mask) == {
        "embed": _flags("11000"),
        "head": {"bias": _flags("110"), "kernel": True},
    }


def test_the_rows_of_a_leaf_without_rows_are_none():
    params = {"w": jnp.zeros((0, 2))}
    for rows in (slice(None), [], np.zeros(0, bool)):
        assert fo.rows("w", rows)(params) == {"w": False}


def test_a_slice_of_no_integers_is_an_error_about_slices():
    with pytest.raises(TypeError, match="slice"):
        fo.rows("embed", slice("a", 3))(_params())


def test_a_selector_keeps_the_rows_it_was_made_with():
    rows = np.asarray([0, 1])
    selector = fo.rows("embed", rows)
    rows[0] = 4
    assert _plain(selector(_params())["embed"]) == _flags("11000")
    selector(_params())["embed"][:] = True
    assert _plain(selector(_params())["embed"]) == _flags("11000")


def test_abstract_trees_and_tracers_have_the_same_mask():
    selector = fo.rows("embed", slice(0, 3))
    expected = _plain(selector(_params()))
    assert _plain(selector(jax.eval_shape(_params))) == expected
    masks = []
    jax.jit(lambda tree: masks.append(_plain(fo.mask(selector, tree))))(_params())
    assert masks == [expected]


def test_holes_and_none_stay_where_they_are():
    params = {"a": HOLE, "b": jnp.zeros(3), "c": None}
    assert _plain(fo.rows(["a", "b"], [0])(params)) == {"a": HOLE, "b": _flags("100"), "c": None}
    assert _plain(fo.mask(~fo.rows(fo.everything, [0]), params)) == {
        "a": HOLE,
        "b": _flags("011"),
        "c": None,
    }


class Layer(eqx.Module):
    weight: jax.Array
    activation: object
    name: str = "layer"


def test_functions_and_names_beside_the_arrays_of_a_module_have_no_rows():
    model = {"layer": Layer(jnp.zeros((4, 2)), jax.nn.relu), "head": jnp.zeros(2)}
    selector = fo.rows("layer", slice(0, 1))
    mask = selector(model)
    assert jax.tree.structure(mask) == jax.tree.structure(model)
    assert _plain(jax.tree.leaves(mask)) == [False, _flags("1000"), False, False]
    assert _plain(jax.tree.leaves(fo.mask(selector, model))) == [False, _flags("1000"), True, True]


def test_rows_of_an_nnx_state_are_found_by_their_path():
    state = nnx.state(nnx.Embed(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    mask = fo.rows("embedding", [3])(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    assert _plain(jax.tree.leaves(mask)) == [_flags("0001")]


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.arange(3),
        np.asarray([True, False, True]),
        jax.random.split(jax.random.key(0), 3),
        np.zeros(3, jax.dtypes.float0),
    ],
    ids=["int", "bool", "key", "float0"],
)
def test_leaves_that_cannot_be_trained_stay_frozen_whole(leaf):
    params = {"leaf": leaf, "w": jnp.zeros(3)}
    selector = fo.rows(fo.everything, [0])
    assert _plain(selector(params)) == {"leaf": _flags("100"), "w": _flags("100")}
    assert _plain(fo.mask(selector, params)) == {"leaf": True, "w": _flags("100")}
    labels = fo.labels(fo.rows("leaf", [0]), params)
    assert labels == {"leaf": "frozen", "w": "trainable"}


SHAPES = {"a": (4,), "b": {"c": (3, 2), "d": (1,)}}
TREE = jax.tree.map(np.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
COUNTS = (4, 3, 1)
PATHS = ("a", "b/c", "b/d")


def _columns(function):
    return [function(i, count) for i, count in enumerate(COUNTS)]


def _atom(path, bits):
    """A selector with its vectors, one for each leaf of `TREE`."""
    i = PATHS.index(path)
    mask = [bool(bits >> row & 1) for row in range(COUNTS[i])]
    return fo.rows(path, mask), _columns(lambda j, n: mask if j == i else [False] * n)


ATOMS = st.one_of(
    st.builds(_atom, st.sampled_from(PATHS), st.integers(0, 15)),
    st.sampled_from(PATHS).map(
        lambda path: (fo.path(path), _columns(lambda j, n: [PATHS[j] == path] * n))
    ),
    st.just((fo.everything, _columns(lambda _, n: [True] * n))),
    st.just((fo.nothing, _columns(lambda _, n: [False] * n))),
)


def _combine(operator, left, right):
    rule = {"or_": lambda p, q: p or q, "and_": lambda p, q: p and q, "sub": lambda p, q: p > q}
    columns = [list(map(rule[operator], a, b)) for a, b in zip(left[1], right[1], strict=True)]
    return getattr(op, operator)(left[0], right[0]), columns


EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(_combine, st.sampled_from(["or_", "and_", "sub"]), inner, inner),
        inner.map(lambda e: (~e[0], [[not p for p in column] for column in e[1]])),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda es: (
                fo.rows([e[0] for e in es], slice(None)),
                [list(map(any, zip(*c, strict=True))) for c in zip(*(e[1] for e in es))],  # noqa: B905
            )
        ),
    ),
    max_leaves=8,
)


@examples(150)
@given(EXPRESSIONS)
def test_the_algebra_of_selectors_is_that_of_their_vectors(expression):
    selector, columns = expression
    expected = [c if len(set(c)) == 2 else c[0] for c in columns]
    assert _plain(jax.tree.leaves(selector(TREE))) == expected
    # And the mask is a spec that selects the same, as NumPy has it and as JAX has it.
    mask = selector(TREE)
    assert _plain(jax.tree.leaves(fo.mask(mask, TREE))) == expected
    on_device = jax.tree.map(jnp.asarray, mask)
    assert _plain(jax.tree.leaves(fo.mask(on_device, TREE))) == expected


def test_rows_combine_with_strings_on_either_side():
    rows = fo.rows("embed", [0])
    whole = {"embed": True, "head": {"bias": True, "kernel": True}}
    assert ("**" | rows)(_params()) == (rows | "**")(_params()) == whole
    assert _plain(("embed" - rows)(_params())["embed"]) == _flags("01111")
    assert _plain(("embed" & rows)(_params())["embed"]) == _flags("10000")


VECTOR = np.asarray(_flags("101"))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_vector_in_a_prefix_mask_is_for_each_leaf_below(convert):
    params = {"a": {"b": jnp.zeros(3), "w": jnp.zeros((3, 2))}, "c": jnp.zeros(4)}
    mask = {"a": convert(VECTOR), "c": convert(np.asarray(False))}
    both = {"b": _flags("101"), "w": _flags("101")}
    assert _plain(fo.mask(mask, params)) == {"a": both, "c": False}
    assert _plain(fo.mask(lambda _: mask, params)) == {"a": both, "c": False}
    assert _plain(fo.mask(convert(VECTOR), {"a": params["a"]})) == {"a": both}
    assert _plain(fo.mask([mask, fo.rows("a/b", [1])], params)["a"]) == both | {"b": True}


def test_a_vector_of_all_or_nothing_in_a_mask_is_a_bool():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(1), "c": jnp.zeros((1, 4))}
    mask = {"a": np.ones(3, bool), "b": np.zeros(1, bool), "c": np.ones(1, bool)}
    assert _plain(fo.mask(mask, params)) == {"a": True, "b": False, "c": True}


def test_negative_rows_count_from_the_end_down_to_the_first():
    assert _plain(fo.rows("embed", [-5, -1])(_params())) == _plain(
        fo.rows("embed", [0, 4])(_params())
    )
    assert fo.mask(fo.rows("embed", [-5]), _params())["embed"].tolist() == [True] + [False] * 4


def test_a_state_is_a_spec_of_its_rows():
    rows = fo.rows("embed", [0, 2])
    state = optax.chain(optax.clip(1.0), fo.freezable(optax.sgd(0.1), rows)).init(_params())
    assert _plain(fo.mask(state, _params())) == _plain(rows(_params()))
    # But of no leaf that has only the rows that train, as a gradient may.
    with pytest.raises(ValueError, match=r"'embed'.*\(3, 2\)"):
        fo.mask(state, {**_params(), "embed": jnp.ones((3, 2))})


ERRORS = {
    "int too large": (
        "embed",
        [0, 5],
        r"rows\(path\('embed'\), 2 indices\): the leaf 'embed' .* shape \(5, 2\), .*row 5 is out",
    ),
    "both ends": ("embed", slice(-7, 9), r"is of shape \(5, 2\), so -7 is out of range"),
    "int too small": ("embed", [-6], r"'embed' is of shape \(5, 2\), so row -6 is out of range"),
    "several": ("embed", [4, 7, -9, 1], r"is of shape \(5, 2\), so row 7 is out of range"),
    "stop too large": ("embed", slice(0, 6), r"'embed' is of shape \(5, 2\), so 6 is out of range"),
    "start too small": ("embed", slice(-6, None), r"'embed' is of shape \(5, 2\), so -6 is out of"),
    "too few bools": (
        "embed",
        [True] * 4,
        r"'embed' is of shape \(5, 2\), so it takes 5 bools.* 4",
    ),
    "too many bools": (
        "embed",
        np.ones(6, bool),
        r"'embed' is of shape \(5, 2\), .*5 bools, not 6",
    ),
    "no bools": ("embed", np.zeros(0, bool), r"'embed' is of shape \(5, 2\), .*5 bools, not 0"),
    "nested": ("head", [2], r"the leaf 'head/kernel' is of shape \(2, 3\), so row 2 is out of"),
    "scalar": ("scale", [0], r"the leaf 'scale' is a scalar, of shape \(\), and has no rows"),
    "Python scalar": ("rate", slice(0, 1), r"the leaf 'rate' is a scalar, of shape"),
    "no leaf": ("embedd", [0], r"pattern 'embedd' selects no leaf; nearest: 'embed'"),
    "no step": ("embed", slice(0, 3, 0), r"slice step cannot be zero"),
}


@pytest.mark.parametrize(("spec", "rows", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("use", [lambda s, p: s(p), lambda s, p: fo.mask(~s, p)])
def test_rows_that_do_not_fit_are_an_error_with_path_and_shape(use, spec, rows, message):
    params = {**_params(), "scale": jnp.zeros(()), "rate": 0.5}
    with pytest.raises(ValueError, match=message):
        use(fo.rows(spec, rows), params)


@pytest.mark.parametrize(
    "rows",
    [0, True, None, "01", {0, 1}, 1.0, [0.0], [None], ["0"], [[0]], [[0], [1, 2]], np.ones((5, 2))],
    ids=str,
)
def test_what_is_no_vector_of_rows_is_an_error_at_once(rows):
    with pytest.raises(
        TypeError, match=rf"rows are .* not {re.escape(repr(rows))}; .* write \[row\]"
    ):
        fo.rows("embed", rows)


def test_traced_rows_are_an_error_that_says_when_they_are_settled():
    with pytest.raises(TypeError, match=r"the rows are traced, .* settled before tracing"):
        jax.jit(lambda rows: fo.rows("embed", rows)(_params()))(jnp.arange(2))
    with pytest.raises(TypeError, match=r"mask at 'embed' is traced, .* settled before tracing"):
        jax.jit(lambda v: fo.mask({"embed": v, "head": True}, _params()))(jnp.ones(5, bool))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"a": {"w": VECTOR}}, ValueError, r"mask at 'a/w' has 3 bools.* of shape \(4, 2\)"),
        ({"a": VECTOR}, ValueError, r"'a/w'.* of shape \(4, 2\)"),
        ({"a": np.ones((2, 4), bool)}, ValueError, r"'a' is of shape \(2, 4\).* \(4, 2\)"),
        ({"a": np.ones((4, 2))}, TypeError, r"mask at 'a' is ndarray\(4, 2\), not a bool"),
        ({"a": np.arange(4)}, TypeError, r"mask at 'a' is ndarray\(4,\), not a bool"),
        ({"a": [True] * 4}, ValueError, r"it has nothing for 'a/w'.* and 'a/0'"),
    ],
)
def test_a_vector_in_a_mask_that_does_not_fit_is_an_error(mask, error, message):
    with pytest.raises(error, match=message):
        fo.mask(mask, {"a": {"w": jnp.zeros((4, 2))}})


@pytest.mark.parametrize("leaf", [1.0, jnp.zeros(()), np.float32(1)])
def test_a_vector_for_a_scalar_is_an_error_with_its_path(leaf):
    with pytest.raises(TypeError, match=r"the mask at 'a' is ndarray\(3,\), not a bool"):
        fo.mask({"a": VECTOR}, {"a": leaf})


@pytest.mark.parametrize("labels", [fo.labels, lambda spec, tree: spec.labels(tree)])
def test_a_leaf_frozen_in_part_has_no_label(labels):
    with pytest.raises(ValueError, match=r"'embed' is frozen in part \(2 of 5 rows\), but a label"):
        labels(fo.rows("embed", [0, 2]), _params())
    whole = fo.rows("embed", slice(None))
    head = {"bias": "trainable", "kernel": "trainable"}
    assert labels(whole, _params()) == {"embed": "frozen", "head": head}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (slice(0, 3), "rows(path('embed'), slice(0, 3))"),
        (slice(None, -1), "rows(path('embed'), slice(None, -1))"),
        (slice(None, None, 2), "rows(path('embed'), slice(None, None, 2))"),
        ([0, 1], "rows(path('embed'), 2 indices)"),
        ([True, False, True], "rows(path('embed'), 3 bools)"),
    ],
)
def test_the_repr_shows_what_was_selected_of_what(rows, text):
    assert repr(fo.rows("embed", rows)) == text
    assert repr(~fo.rows("embed", rows) | "head") == f"(~{text} | path('head'))"
