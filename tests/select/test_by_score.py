import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo


def _top(scores, share):
    """By a stable sort of all scores, the largest first."""
    scores = np.asarray(scores, np.float64)
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[: round(share * scores.size)]] = True
    return mask.reshape(scores.shape)


def _full(flag, shape):
    flag = flag[:, None] if np.ndim(flag) == 1 and len(shape) == 2 else flag
    return np.broadcast_to(flag, shape)


def _draw(seed, shape, distinct):
    """Values of both signs, with many equal ones if `distinct` is small."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.integers(-distinct, distinct + 1, shape))


@pytest.mark.parametrize("distinct", [1, 2, 1000], ids="{} distinct".format)
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 1 / 3, 0.5, 0.99, 1, np.float32(0.25)])
def test_the_top_elements_are_the_first_of_a_stable_sort(share, distinct):
    params = {"a": _draw(0, (5, 7), distinct), "b": _draw(1, (11,), distinct)}
    mask = fo.top_elements("**", share)(params)
    for name, x in params.items():
        np.testing.assert_array_equal(_full(mask[name], x.shape), _top(np.abs(x), share))


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("distinct", [1, 1000])
def test_the_elements_of_several_leaves_are_ranked_together(share, distinct):
    params = {
        "a": _draw(0, (5, 7), distinct),
        "b": 3 * _draw(1, (4, 2), distinct),
        "c": np.zeros(3),
    }
    mask = fo.top_elements(["a", "b"], share, jointly=True)(params)
    together = _top(np.abs(np.concatenate([params["a"].ravel(), params["b"].ravel()])), share)
    np.testing.assert_array_equal(_full(mask["a"], (5, 7)), together[:35].reshape(5, 7))
    np.testing.assert_array_equal(_full(mask["b"], (4, 2)), together[35:].reshape(4, 2))
    assert mask["c"] is False


def test_jointly_of_no_leaf_is_nothing():
    params = {"n": np.arange(3), "w": np.ones(2)}
    assert fo.top_elements("n", 0.5, jointly=True)(params) == {"n": False, "w": False}
    assert fo.top_elements("n", 0.5)(params) == {"n": False, "w": False}


DTYPES = ["float16", "bfloat16", "float8_e4m3fn", "float32", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_leaves_of_any_dtype_are_ranked(dtype, convert):
    values = np.random.default_rng(2).permutation(12).reshape(3, 4) - 6.0
    values = values * (1 + 1j) if dtype == "complex64" else values
    x = convert(np.asarray(values).astype(dtype))
    mask = fo.top_elements("w", 0.25)({"w": x})["w"]
    np.testing.assert_array_equal(mask, _top(np.abs(values), 0.25))


def test_float64_scores_are_not_rounded():
    x = np.array([[1.0, 1.0 + 1e-12], [1.0 + 2e-12, 1.0 - 1e-12]])
    mask = fo.top_elements("w", 0.25, score=np.abs)({"w": x})["w"]
    np.testing.assert_array_equal(mask, x == x.max())


def test_integer_scores_are_not_rounded():
    scores = np.array([[2**24, 2**24 + 1], [0, 2**24]])
    mask = fo.top_elements("w", 0.25, score={"w": scores})({"w": jnp.ones((2, 2))})["w"]
    np.testing.assert_array_equal(mask, scores == 2**24 + 1)


def test_infinite_scores_are_the_largest_and_the_smallest():
    scores = {"w": np.array([[np.inf, 1.0], [-np.inf, 2.0]])}
    for share, expected in ((0.25, [[1, 0], [0, 0]]), (0.75, [[1, 1], [0, 1]])):
        mask = fo.top_elements("w", share, score=scores)({"w": jnp.ones((2, 2))})["w"]
        np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_a_tree_of_scores_is_matched_by_path():
    params = {"x": {"b": jnp.ones(4), "w": jnp.ones((2, 3))}}
    scores = {"x": {"b": np.array([3.0, 1.0, 2.0, 0.0]), "w": np.arange(6.0).reshape(2, 3)}}
    hole = optax.MaskedNode()
    for tree in (scores, jax.tree.map(jnp.float32, scores)):
        mask = fo.top_elements("**", 0.5, score=tree)(params)
        assert mask["x"]["b"].tolist() == [True, False, True, False]
        np.testing.assert_array_equal(_full(mask["x"]["w"], (2, 3)), _top(scores["x"]["w"], 0.5))
    mask = fo.top_elements("x/b", 0.5, score=scores)({"x": {"b": jnp.ones(4), "w": hole}})
    assert mask["x"]["w"] == hole
    with pytest.raises(ValueError, match=r"the tree of scores does not fit.* 'x/w'"):
        fo.top_elements("x/b", 0.5, score={"x": {"b": np.ones(4)}})(params)


@pytest.mark.usefixtures("standard_promotion")
def test_the_gradients_choose_the_elements_that_train():
    """What `shira` and SIFT do: the largest gradients of a batch, then a step of those alone."""
    params = {"w": jnp.arange(1.0, 13.0).reshape(3, 4), "b": jnp.ones(4)}
    grads = jax.grad(lambda p: (p["w"] ** 3).sum() + p["b"].sum())(params)
    chosen = ~fo.top_elements("w", 0.25, score=grads)
    tx = fo.freezable(optax.adam(1.0), chosen)
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params)
    expected = np.zeros((3, 4))
    expected.flat[-3:] = -1.0
    np.testing.assert_allclose(updates["w"], expected, atol=1e-5)
    assert not np.any(updates["b"])
    assert optax.tree_utils.tree_get(state, "mu")["w"].shape == (3,)


def test_leaves_that_cannot_train_are_not_ranked():
    params = {"n": np.array([9, 8]), "key": jax.random.key(0), "w": np.array([1.0, 2.0, 3.0])}
    mask = fo.top_elements("**", 1 / 3, jointly=True)(params)
    assert (mask["n"], mask["key"], mask["w"].tolist()) == (False, False, [False, False, True])


def test_scores_within_a_selection_of_rows_are_in_both():
    params = {"w": np.array([[9.0, 8.0], [1.0, 7.0]])}
    mask = fo.top_elements(fo.rows("w", [1]), 0.5)(params)["w"]
    np.testing.assert_array_equal(_full(mask, (2, 2)), [[False, False], [False, False]])
    mask = fo.top_elements(fo.rows("w", [1], axis=1), 0.5)(params)["w"]
    np.testing.assert_array_equal(_full(mask, (2, 2)), [[False, True], [False, False]])


ERRORS = {
    "NaN": ({"w": np.array([1.0, np.nan])}, abs, ValueError, "score of 'w' has NaNs"),
    "abstract": (
        {"w": jax.ShapeDtypeStruct((2,), jnp.float32)},
        abs,
        TypeError,
        "score of 'w' is a function of its values, but the leaf is abstract; give a tree",
    ),
    "shape": ({"w": np.ones(2)}, lambda x: np.ones(3), ValueError, r"of shape \(3,\), .* \(2,\)"),
    "scalar": ({"w": np.ones(2)}, np.sum, ValueError, r"of shape \(\), .* of shape \(2,\)"),
    "complex": ({"w": np.ones(2, complex)}, np.square, TypeError, "is complex; .* jnp.abs"),
    "no array": ({"w": np.ones(2)}, lambda x: None, TypeError, "is a NoneType; it takes an array"),
    "text": ({"w": np.ones(2)}, lambda x: "high", TypeError, "is a str; it takes an array"),
    "key": ({"w": np.ones(2)}, {"w": jax.random.split(jax.random.key(0))}, TypeError, "an array"),
    "tree shape": ({"w": np.ones(2)}, {"w": np.ones(3)}, ValueError, r"of shape \(3,\), .* \(2,\)"),
    "abstract tree": (
        {"w": np.ones(2)},
        {"w": jax.ShapeDtypeStruct((2,), jnp.float32)},
        TypeError,
        "is a ShapeDtypeStruct",
    ),
}


@pytest.mark.parametrize(("params", "score", "error", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("jointly", [False, True])
def test_scores_that_have_no_order_are_an_error_with_their_path(
    params, score, error, message, jointly
):
    with pytest.raises(error, match=message):
        fo.top_elements("w", 0.5, score=score, jointly=jointly)(params)


def test_traced_leaves_and_scores_are_an_error():
    selector = fo.top_elements("w", 0.5)
    with pytest.raises(TypeError, match=r"score of 'w' is traced, .* settled before tracing"):
        jax.jit(selector)({"w": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match=r"score of 'w' is traced, .* settled before tracing"):
        jax.jit(lambda g: fo.top_elements("w", 0.5, score=g)({"w": np.ones(2)}))({"w": np.ones(2)})


@pytest.mark.parametrize(
    ("share", "error"),
    [
        *((share, ValueError) for share in (-0.1, 1.5, np.nan, 10)),
        *((share, TypeError) for share in (True, "0.1", None, 0.1j)),
    ],
    ids=repr,
)
def test_a_share_that_is_none_is_an_error_at_once(share, error):
    with pytest.raises(error, match="share of the elements is"):
        fo.top_elements("w", share)


def test_scores_in_a_tree_rank_abstract_and_traced_leaves():
    scores, masks = {"w": np.array([[3.0, 1.0], [2.0, 4.0]])}, []
    selector = fo.top_elements("w", 0.5, score=scores)
    masks.append(selector({"w": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)})["w"])
    jax.jit(lambda tree: masks.append(selector(tree)["w"]))({"w": jnp.ones((2, 2))})
    for mask in masks:
        np.testing.assert_array_equal(mask, [[True, False], [False, True]])


def test_the_repr_shows_the_share_and_the_score():
    assert repr(fo.top_elements("w", 0.01)) == "top_elements(path('w'), 0.01, abs)"
    tree = repr(fo.top_elements("w", 0.5, score={"w": np.ones(2)}, jointly=True))
    assert tree == "top_elements(path('w'), 0.5, tree of scores, jointly=True)"
