import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo

KERNEL = np.array([[True, False, False], [False, True, True]])
HOLE = optax.MaskedNode()


def _params():
    return {"embed": jnp.zeros((5, 2)), "head": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))}}


def _mask_of(spec, params=None):
    """The mask with lists for arrays."""
    mask = fo.mask(spec, params or _params())
    return jax.tree.map(lambda x: x if isinstance(x, bool) else x.tolist(), mask)


def _elsewhere(kernel):
    return {"embed": False, "head": {"bias": False, "kernel": kernel}}


FORMS = {
    "NumPy": KERNEL,
    "jax": jnp.asarray(KERNEL),
    "function": lambda leaf: np.resize(KERNEL, leaf.shape),
    "function to jax": lambda leaf: jnp.asarray(KERNEL),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
def test_elements_are_an_array_of_bools_or_a_function_that_gives_one(mask):
    selector = fo.elements("**/kernel", mask)
    assert _mask_of(selector) == _elsewhere(KERNEL.tolist())
    assert selector(_params())["head"]["kernel"].dtype == bool
    inverse = {"embed": True, "head": {"bias": True, "kernel": (~KERNEL).tolist()}}
    assert _mask_of(~selector) == inverse


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.ones((2, 3), bool), True),
        (np.zeros((2, 3), bool), False),
        (np.array([[True] * 3, [False] * 3]), [True, False]),
        (np.array([[True, False, False]] * 2), [[True, False, False]]),
    ],
    ids=["all", "none", "rows", "columns"],
)
def test_elements_that_are_rows_or_all_or_none_are_treated_as_such(mask, expected):
    assert _mask_of(fo.elements("head/kernel", mask)) == _elsewhere(expected)


def test_elements_of_a_vector_are_its_rows():
    selector = fo.elements("head/bias", [True, False, True])
    assert _mask_of(selector)["head"]["bias"] == [True, False, True]


def test_a_scalar_is_one_element():
    params = {"a": jnp.zeros(()), "b": 2.0, "n": 3}
    assert fo.mask(fo.elements("*", np.array(True)), params) == {"a": True, "b": True, "n": True}
    assert fo.mask(fo.elements("*", lambda x: x > 1), {"a": 0.5, "b": 2.0}) == {
        "a": False,
        "b": True,
    }


def test_a_function_sees_the_leaves_that_are_selected_and_can_train():
    seen = []

    def negative(leaf):
        seen.append(leaf.shape)
        return np.asarray(leaf) < 0

    params = {"a": jnp.array([-1.0, 1.0]), "b": jnp.zeros(3), "n": jnp.arange(4), "hole": HOLE}
    mask = fo.elements(["a", "n"], negative)(params)
    assert seen == [(2,)]
    assert mask["a"].tolist() == [True, False]
    assert (mask["b"], mask["n"]) == (False, False)
    assert mask["hole"] == HOLE


def test_elements_of_a_selection_are_in_both():
    rows = fo.rows("**/kernel", [0, 2], axis=1)
    expected = KERNEL & np.array([True, False, True])
    for selector in (fo.elements(rows, KERNEL), rows & fo.elements("**/kernel", KERNEL)):
        assert _mask_of(selector) == _elsewhere(expected.tolist())
    assert _mask_of(fo.rows(fo.elements("**/kernel", KERNEL), [1])) == _elsewhere(
        [[False] * 3, [False, True, True]]
    )


ATOMS = {
    "rows": (lambda: fo.rows("w", [0, 2]), np.indices((3, 4, 2))[0] != 1),
    "columns": (
        lambda: fo.rows("w", slice(1, 3), axis=1),
        np.isin(np.indices((3, 4, 2))[1], [1, 2]),
    ),
    "last": (lambda: fo.rows("w", [-1], axis=-1), np.indices((3, 4, 2))[2] == 1),
    "elements": (
        lambda: fo.elements("w", np.arange(24).reshape(3, 4, 2) % 5 < 2),
        np.arange(24).reshape(3, 4, 2) % 5 < 2,
    ),
    "leaf": (lambda: fo.path("w"), np.ones((3, 4, 2), bool)),
}


def test_the_algebra_of_specs_along_different_axes_is_that_of_full_masks():
    params = {"v": jnp.zeros(3), "w": jnp.zeros((3, 4, 2))}

    def full(spec):
        x = fo.mask(spec, params)["w"]
        x = x[:, None, None] if np.ndim(x) == 1 else x
        return np.broadcast_to(x, (3, 4, 2))

    for make_a, a in ATOMS.values():
        np.testing.assert_array_equal(full(~make_a()), ~a)
        for make_b, b in ATOMS.values():
            x, y = make_a(), make_b()
            np.testing.assert_array_equal(full(x | y), a | b)
            np.testing.assert_array_equal(full([x, y]), a | b)
            np.testing.assert_array_equal(full(x & y), a & b)
            np.testing.assert_array_equal(full(x - y), a & ~b)
            np.testing.assert_array_equal(full(~(x | y) | (x & y)), ~(a ^ b))
    three = [make() for make, _ in list(ATOMS.values())[:3]]
    np.testing.assert_array_equal(
        full(three), np.logical_or.reduce([m for _, m in ATOMS.values()][:3])
    )
    state = fo.freezable(optax.sgd(0.1), three).init(params)
    np.testing.assert_array_equal(full(state), full(three))


BROADCAST = {
    "whole": KERNEL,
    "columns": np.array([[True, False, True]]),
    "rows": np.array([[True], [False]]),
    "vector of rows": np.array([False, True]),
    "one": np.array([[True]]),
    "none": np.array([[False]]),
}


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("mask", BROADCAST.values(), ids=BROADCAST)
def test_a_mask_has_arrays_that_broadcast_to_the_leaf(mask, convert):
    column = mask[:, None] if mask.ndim == 1 else mask
    resolved = fo.mask(
        {"embed": False, "head": {"bias": False, "kernel": convert(mask)}}, _params()
    )
    full = np.broadcast_to(column, (2, 3))
    own = resolved["head"]["kernel"]
    own = own[:, None] if np.ndim(own) == 1 else own
    np.testing.assert_array_equal(np.broadcast_to(own, (2, 3)), full)
    # And it reads as itself.
    again = fo.mask(resolved, _params())
    jax.tree.map(np.testing.assert_array_equal, again, resolved)
    jax.tree.map(np.testing.assert_array_equal, fo.mask(lambda _: resolved, _params()), resolved)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((3, 2), bool), r"'head/kernel' is of shape \(3, 2\).*\(2, 3\).*each element"),
        (np.ones((2, 2), bool), r"'head/kernel' is of shape \(2, 2\).*of length 1"),
        (np.ones((1, 2, 3), bool), r"'head/kernel' is of shape \(1, 2, 3\)"),
        (np.array([True, False, True]), r"'head/kernel' has 3 bools, one for each row"),
        (np.ones((2, 0), bool), r"'head/kernel' is of shape \(2, 0\)"),
    ],
    ids=["transposed", "too short", "more axes", "a vector for an inner axis", "nothing"],
)
def test_an_array_in_a_mask_that_does_not_fit_is_an_error_with_both_shapes(mask, message):
    with pytest.raises(ValueError, match=message):
        fo.mask(_elsewhere(mask), _params())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fo.elements("w", np.ones((2, 3))), TypeError, "mask of elements holds bools, not"),
        (lambda: fo.elements("w", [[0, 1]]), TypeError, r"holds bools, not int64 \(list\)"),
        (lambda: fo.elements("w", None), TypeError, "holds bools, not object"),
        (lambda: fo.elements("w", "ab"), TypeError, "holds bools"),
        (lambda: fo.elements("w", {"w": KERNEL}), TypeError, r"holds bools, not object \(dict\)"),
        (lambda: fo.elements("w", [[True], [True, False]]), TypeError, "holds bools"),
    ],
    ids=["floats", "ints", "None", "text", "a tree", "ragged"],
)
def test_what_is_no_mask_of_elements_is_an_error_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_mask_of_another_shape_is_an_error_with_path_and_both_shapes():
    message = (
        r"elements\(.*bools of shape \(2, 3\)\): the leaf 'embed' is of shape \(5, 2\), .*\(2, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        fo.elements("embed", KERNEL)(_params())
    with pytest.raises(ValueError, match=r"'embed' is of shape \(5, 2\), .* of shape \(2,\)"):
        fo.elements("embed", lambda leaf: np.ones(2, bool))(_params())
    with pytest.raises(TypeError, match=r"the mask of 'embed' holds bools, not float32"):
        fo.elements("embed", lambda leaf: leaf)(_params())
    with pytest.raises(TypeError, match=r"the mask of 'embed' holds bools, not object"):
        fo.elements("embed", lambda leaf: None)(_params())


def test_a_traced_mask_is_an_error_that_says_when_it_is_settled():
    with pytest.raises(TypeError, match=r"mask of elements is traced, .* settled before tracing"):
        jax.jit(lambda mask: fo.elements("w", mask)({"w": jnp.ones((2, 3))}))(KERNEL)
    with pytest.raises(TypeError, match=r"'embed' is traced, .* settled before tracing"):
        jax.jit(fo.elements("embed", lambda leaf: leaf > 0))(_params())


def test_abstract_trees_and_tracers_have_the_same_mask():
    selector, masks = fo.elements("**/kernel", KERNEL), []
    assert _mask_of(selector, jax.eval_shape(_params)) == _elsewhere(KERNEL.tolist())
    jax.jit(lambda tree: masks.append(_mask_of(selector, tree)))(_params())
    assert masks == [_elsewhere(KERNEL.tolist())]


def test_a_selector_keeps_the_mask_that_it_was_made_with():
    mask = KERNEL.copy()
    selector = fo.elements("**/kernel", mask)
    mask[:] = True
    assert _mask_of(selector) == _elsewhere(KERNEL.tolist())
    selector(_params())["head"]["kernel"][:] = True
    assert _mask_of(selector) == _elsewhere(KERNEL.tolist())


def test_elements_of_an_nnx_state_are_found_by_their_path():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mask = fo.elements("kernel", KERNEL)(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    found = {np.shape(x): x for x in jax.tree.leaves(mask)}
    np.testing.assert_array_equal(found[2, 3], KERNEL)


def test_a_leaf_of_which_elements_are_frozen_has_no_label():
    selector = fo.elements("**/kernel", KERNEL)
    with pytest.raises(ValueError, match=r"'head/kernel' is frozen in part \(3 of 6 elements\)"):
        fo.labels(selector, _params())


def test_the_repr_shows_what_was_selected_of_what():
    assert repr(fo.elements("w", KERNEL)) == "elements(path('w'), bools of shape (2, 3))"
    assert repr(~fo.elements("w", jnp.isnan)).startswith("~elements(path('w'), ")
    assert repr(fo.elements("w", np.isnan)) == "elements(path('w'), isnan)"
