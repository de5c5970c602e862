"""Scores of weights, against NumPy, and against matrices whose signal is known."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.nnx_models import Net, Tied
from tests.support.nodes import Quantized


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stable_rank(x):
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return (values**2).sum() / values[0] ** 2


def of(x, score, **options):
    (value,) = fo.weight_scores({"w": x}, score, **options).values()
    assert type(value) is float
    return value


def signals(x):
    """How many singular values the score counts as signal, solved from the score."""
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    score = of(x, "snr") * values[0]
    sums = np.cumsum(values)[:-1]
    (found,) = np.flatnonzero(np.isclose(sums / (values.sum() - sums), score, rtol=1e-4))
    return found + 1


# Signal and noise.

SHAPES = [(8, 8), (24, 24), (64, 64), (16, 64), (64, 16), (5, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_random_matrix_has_no_signal(shape):
    params = {str(seed): 1e-3 * draw(*shape, seed=seed) for seed in range(20)}
    found = [score for score in fo.weight_scores(params).values() if score]
    # The edge is that of 99 of 100 large matrices. Of small ones it is less exact.
    assert len(found) <= (2 if min(shape) < 16 else 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_of_a_signal_of_low_rank_is_found_in_noise(shape):
    count = 1 + min(shape) // 16
    left = np.linalg.qr(draw(shape[0], count, seed=1))[0]
    right = np.linalg.qr(draw(shape[1], count, seed=2))[0]
    # Noise alone reaches the sum of the two roots.
    strength = (4 if min(shape) < 16 else 1.6) * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    assert signals(draw(*shape) + strength * left @ right.T) == count


def test_more_signal_has_a_higher_score_and_the_unit_of_the_weights_is_divided_out_once():
    noise, signal = draw(32, 32), np.outer(draw(32, seed=1), draw(32, seed=2))
    scores = [of(noise + strength * signal, "snr") for strength in (0, 1, 4)]
    assert scores[0] == 0 < scores[1] < scores[2] * 4
    np.testing.assert_allclose(of(8 * (noise + signal), "snr"), scores[1] / 8, rtol=1e-5)


DEGENERATE = {
    "zeros": (np.zeros((4, 6)), 0.0, 0.0),
    "all alike": (np.ones((6, 4)), np.inf, 1.0),
    "orthogonal": (np.linalg.qr(draw(8, 8))[0], 0.0, 8.0),
    "one row": (draw(1, 7), 0.0, 1.0),
    "one element": (np.full((1, 1), 3.0), 0.0, 1.0),
    "NaN": (np.full((3, 3), np.nan), np.nan, np.nan),
    "infinite": (np.full((3, 3), np.inf), np.nan, np.nan),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_the_scores_of_degenerate_matrices_are_defined(name):
    x, snr, rank = DEGENERATE[name]
    np.testing.assert_equal(of(x, "snr"), snr)
    np.testing.assert_allclose(of(x, "stable_rank"), rank, rtol=1e-5)


# Norms, and the shape of the matrix.


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_the_norm_is_the_root_mean_square_without_overflow(scale):
    x = (scale * draw(5, 7)).astype(np.float32)
    expected = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    np.testing.assert_allclose(of(x, "norm"), expected, rtol=1e-6)
    assert of(np.zeros((2, 2)), "norm") == 0
    assert of(np.full((2, 2), np.inf), "norm") == np.inf
    assert np.isnan(of(np.array([[1.0, np.nan]]), "norm"))


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((3, 3, 4, 16), (36, 16)),  # a kernel of Flax: inputs before outputs
        ((16, 4, 3, 3), (16, 36)),  # one of Equinox: outputs before inputs
        ((12, 3, 4), (12, 12)),  # a query of attention
        ((3, 4, 12), (12, 12)),  # its output
        ((2, 3, 2), (6, 2)),  # two that differ alike: the last axis is the columns
    ],
    ids=str,
)
def test_the_axes_are_split_where_rows_and_columns_differ_least(shape, sides):
    x = draw(*shape)
    np.testing.assert_allclose(of(x, "stable_rank"), stable_rank(x.reshape(sides)), rtol=1e-5)
    assert fo.weight_scores({"w": x}, lambda matrix: 100 * matrix.shape[0] + matrix.shape[1]) == {
        "w": 100 * sides[0] + sides[1]
    }


def test_each_layer_of_a_stack_is_a_matrix_of_its_own():
    params = {"layers": {"w": draw(3, 4, 5), "b": draw(3, 5)}, "head": draw(3, 5, seed=1)}
    scores = fo.weight_scores(params, "stable_rank", stacked="layers")
    each = [stable_rank(x) for x in params["layers"]["w"]]
    expected = {"head": stable_rank(params["head"]), "layers/w": np.mean(each)}
    assert scores.keys() == expected.keys()  # the biases are no matrix
    np.testing.assert_allclose([*scores.values()], [*expected.values()], rtol=1e-5)
    layers = fo.weight_scores(fo.unstack_layers(params["layers"]), "stable_rank")
    np.testing.assert_allclose([*layers.values()], each, rtol=1e-5)


# Kinds of leaf.

DTYPES = ["float16", "bfloat16", "float8_e4m3fn", "float32", "float64", ">f4", "longdouble"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_float_is_computed_with_in_float32(dtype):
    x = (100 * draw(6, 4)).astype(dtype)
    wide = x.astype(np.float64)
    for leaf in [x] if dtype in DTYPES[-3:] else [x, jnp.asarray(x)]:
        np.testing.assert_allclose(of(leaf, "stable_rank"), stable_rank(wide), rtol=1e-5)
        np.testing.assert_allclose(of(leaf, "norm"), np.sqrt((wide**2).mean()), rtol=1e-6)


def test_complex_leaves_count_by_modulus():
    x = draw(6, 4) + 1j * draw(6, 4, seed=1)
    values = np.linalg.svd(x, compute_uv=False)
    expected = (values**2).sum() / values[0] ** 2
    np.testing.assert_allclose(of(jnp.asarray(x), "stable_rank"), expected, rtol=1e-5)
    np.testing.assert_allclose(of(x, "norm"), np.sqrt((abs(x) ** 2).mean()), rtol=1e-6)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_leaves_on_a_mesh_and_in_host_memory_have_the_scores_of_one_device(axes, memory):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axes,))
    w = draw(16, 8) + np.outer(draw(16, seed=1), draw(8, seed=2)) * 4
    params = {
        "one": jax.device_put(w, jnp.ones(1).sharding.with_memory_kind(memory)),
        "all": jax.device_put(w, NamedSharding(mesh, PartitionSpec("x"), memory_kind=memory)),
        "each": jax.device_put(w, NamedSharding(mesh, PartitionSpec(), memory_kind=memory)),
    }
    for score in ("snr", "norm"):
        expected = dict.fromkeys(("all", "each", "one"), of(w, score))
        assert fo.weight_scores(params, score) == expected
    with jax.sharding.use_mesh(mesh) if not hasattr(jax, "set_mesh") else jax.set_mesh(mesh):
        on_mesh = {"all": params["all"], "each": params["each"]}
        assert fo.weight_scores(on_mesh, "norm") == {"all": of(w, "norm"), "each": of(w, "norm")}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("x", None))
        return nn.Dense(2, kernel_init=init, name="dense")(x)


def test_trees_of_all_frameworks_have_scores_by_path():
    boxed = Linen().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert fo.weight_scores(boxed, "norm") == {"dense/kernel": 1.0}
    paths = {"backbone/kernel", "head/kernel"}
    assert fo.weight_scores(Net()).keys() == paths
    assert fo.weight_scores(nnx.state(Net(), nnx.Param)).keys() == paths
    assert fo.weight_scores(nnx.state(Tied(), nnx.Param)).keys() == {"a/kernel", "out/kernel"}
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    assert fo.weight_scores(mlp, "norm") == {
        f"layers/{i}/weight": of(layer.weight, "norm") for i, layer in enumerate(mlp.layers)
    }


def test_leaves_that_do_not_train_or_are_no_matrix_have_no_score():
    params = {
        "quantized": Quantized(jnp.ones((4, 4), jnp.int8), jnp.full((4, 1), 0.5)),
        "table": np.ones((3, 3), int),
        "keys": jax.random.split(jax.random.key(0), (2, 2)),
        "bias": jnp.ones(3),
        "empty": jnp.ones((0, 3)),
        "hole": optax.MaskedNode(),
        "name": "text",
        "cold": jnp.ones((2, 2)),
        "part": jnp.full((2, 2), 2.0),
    }
    frozen = ["cold", fo.rows("part", [0])]
    assert fo.weight_scores(params, "norm", frozen) == {"part": 2.0}
    # The scale trains by itself if the values alone are frozen.
    scores = fo.weight_scores(params, "norm", [*frozen, "quantized/values"])
    assert scores == {"part": 2.0, "quantized/scale": 0.5}


def test_abstract_leaves_are_left_out_with_a_warning_that_names_them():
    shape = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    params = {
        "a": shape,
        "b": jnp.ones((2, 2)),
        "c": shape,
        "bias": jax.ShapeDtypeStruct((2,), "f4"),
    }
    with pytest.warns(UserWarning, match="no score to leaves without values: 'a'$"):
        assert fo.weight_scores(params, "norm", "c") == {"b": 1.0}


def test_it_warns_if_no_leaf_is_left():
    params = {"b": jnp.ones(3), "w": jnp.ones((2, 2))}
    with pytest.warns(UserWarning, match=r"finds no leaf to score: .* fewer than 2 axes"):
        assert fo.weight_scores(params, frozen="w") == {}


# Arguments.


def test_a_function_of_the_matrix_is_a_score():
    assert of(draw(4, 3), lambda matrix: jnp.abs(matrix).max()) == float(abs(draw(4, 3)).max())
    for wrong in (lambda x: x, lambda x: None, lambda x: 1j, lambda x: "high", lambda x: True):
        with pytest.raises(TypeError, match="the function returns one real number"):
            of(draw(4, 3), wrong)


def test_a_bar_on_stderr_shows_the_progress(capsys):
    fo.weight_scores({"w": draw(2, 2)}, progress=True)
    out, error = capsys.readouterr()
    assert not out
    assert "100%" in error
    fo.weight_scores({"w": draw(2, 2)})
    assert capsys.readouterr() == ("", "")


def test_wrong_arguments_are_errors():
    params = {"w": draw(2, 2)}
    with pytest.raises(ValueError, match="one of 'snr', 'stable_rank', 'norm' or a function"):
        fo.weight_scores(params, "rank")
    with pytest.raises(TypeError, match="or a function of a matrix, not 2"):
        fo.weight_scores(params, 2)
    with pytest.raises(ValueError, match="pattern 'x' selects no leaf"):
        fo.weight_scores(params, frozen="x")
    with pytest.raises(ValueError, match="selects a part of 'w'"):
        fo.weight_scores(params, stacked=fo.rows("w", [0]))
    with pytest.raises(TypeError, match="'w' is traced; call it outside of jit"):
        jax.jit(lambda w: fo.weight_scores({"w": w})["w"])(params["w"])
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        fo.weight_scores({"a/b": draw(2, 2), "a": {"b": draw(2, 2)}})


def test_no_warning_otherwise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fo.weight_scores({"w": draw(2, 2), "b": draw(2)})
