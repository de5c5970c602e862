"""Scores of gradients, against gradients of a linear model that are written by hand."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support import nnx_models
from tests.support.memories import jit_keeps_memory
from tests.support.nodes import Quantized

RNG = np.random.default_rng(0)
PARAMS = {
    "bias": RNG.normal(size=3).astype(np.float32),
    "kernel": RNG.normal(size=(8, 3)).astype(np.float32),
}
BATCHES = [
    (RNG.normal(size=(6, 8)).astype(np.float32), RNG.normal(size=(6, 3)).astype(np.float32))
    for _ in range(3)
]
SCORES = ["norm", "relative", "fisher"]


def loss(params, batch):
    x, y = batch
    return 0.5 * ((x @ params["kernel"] + params["bias"] - y) ** 2).sum()


def by_hand(score, batches=BATCHES, live=slice(None)):
    """The gradients of half the squared error: x.T @ error, and the sum of the errors."""
    kernel, bias = (PARAMS[name].astype(np.float64) for name in ("kernel", "bias"))
    rows = []
    for x, y in batches:
        error = x @ kernel + bias - y
        rows.append({"bias": error.sum(axis=0), "kernel": (x.T @ error)[live]})
    scores = {}
    for name, weight in (("bias", bias), ("kernel", kernel[live])):
        mean = sum(row[name] for row in rows) / len(rows)
        scores[name] = {
            "norm": np.linalg.norm(mean) / np.sqrt(mean.size),
            "relative": np.linalg.norm(mean) / np.linalg.norm(weight),
            "fisher": np.mean([row[name] ** 2 for row in rows]),
        }[score]
    return scores


def assert_close(actual, expected, rtol=1e-5):
    assert list(actual) == list(expected)
    assert {type(x) for x in actual.values()} == {float}
    np.testing.assert_allclose([*actual.values()], [*expected.values()], rtol=rtol)


@pytest.mark.parametrize("score", SCORES)
def test_the_scores_are_those_of_gradients_by_hand(score):
    assert_close(fo.gradient_scores(loss, PARAMS, iter(BATCHES), score), by_hand(score))
    one = fo.gradient_scores(loss, PARAMS, BATCHES[:1], score)
    assert_close(one, by_hand(score, BATCHES[:1]))


@pytest.mark.parametrize("score", SCORES)
def test_what_trains_of_a_leaf_is_scored(score):
    frozen = ["bias", fo.rows("kernel", slice(0, 5))]
    expected = {"kernel": by_hand(score, live=slice(5, None))["kernel"]}
    assert_close(fo.gradient_scores(loss, PARAMS, BATCHES, score, frozen), expected)
    elements = fo.elements("kernel", np.arange(24).reshape(8, 3) < 15)
    actual = fo.gradient_scores(loss, PARAMS, BATCHES, score, ["bias", elements])
    assert_close(actual, expected)


def test_a_batch_of_one_example_gives_the_empirical_fisher_information():
    x, y = BATCHES[0]
    examples = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    actual = fo.gradient_scores(loss, PARAMS, examples, "fisher")
    per_example = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, (x[:, None], y[:, None]))
    expected = {name: np.mean(np.square(g, dtype=float)) for name, g in per_example.items()}
    assert_close(actual, expected)


def test_one_program_serves_all_batches_and_has_no_backward_pass_for_frozen_leaves():
    traced = []

    @jax.custom_vjp
    def probe(x):
        return x

    def backward(_, cotangent):
        traced.append("backward")
        return (cotangent,)

    probe.defvjp(lambda x: (x, None), backward)

    def counted(params, batch):
        traced.append("forward")
        return loss({**params, "kernel": probe(params["kernel"])}, batch)

    fo.gradient_scores(counted, PARAMS, BATCHES, frozen="kernel")
    assert traced == ["forward"]
    fo.gradient_scores(counted, PARAMS, BATCHES, "fisher")
    assert traced == ["forward", "forward", "backward"]


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("in_context", [False, True])
def test_leaves_on_a_mesh_have_the_scores_of_one_device(axes, in_context):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axes,))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("x",)))
    params = {
        "bias": jax.device_put(PARAMS["bias"], whole),
        "kernel": jax.device_put(PARAMS["kernel"], rows),
    }

    def squares(params, batch):
        return (params["kernel"] ** 2).sum() * (params["bias"] ** 2).sum() * batch

    with (
        jax.set_mesh(mesh) if in_context and hasattr(jax, "set_mesh") else contextlib.nullcontext()
    ):
        for score in SCORES:
            actual = fo.gradient_scores(squares, params, [1.0, 2.0], score)
            square = {name: np.square(x, dtype=float).sum() for name, x in PARAMS.items()}
            expected = {}
            for name, other in (("bias", "kernel"), ("kernel", "bias")):
                norm = 2 * np.sqrt(square[name]) * square[other]
                expected[name] = {
                    "norm": 1.5 * norm / np.sqrt(PARAMS[name].size),
                    "relative": 1.5 * 2 * square[other],
                    "fisher": 2.5 * norm**2 / PARAMS[name].size,
                }[score]
            assert_close(actual, expected)


@pytest.mark.parametrize("score", SCORES)
def test_leaves_in_host_memory_have_the_scores_of_device_memory(score):
    params = fo.place(jax.tree.map(jnp.asarray, PARAMS), frozen="kernel")

    def moved(params, batch):
        return loss(jax.device_put(params, jax.memory.Space.Device), batch)

    assert_close(fo.gradient_scores(moved, params, BATCHES, score), by_hand(score))
    assert_close(
        fo.gradient_scores(moved, params, BATCHES, score, "kernel"),
        {"bias": by_hand(score)["bias"]},
    )
    if jit_keeps_memory():
        with pytest.raises(ValueError, match="in host memory are 'kernel'"):
            fo.gradient_scores(loss, params, BATCHES, score)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_sums_of_small_floats_are_in_float32(dtype):
    params = {"w": jnp.full(4, 2.0, dtype)}

    def line(params, batch):
        return (params["w"].astype(jnp.float32) * batch).sum()

    # In float16 the square of 300 is infinite, and 1 is lost beside 2,048.
    batches = [jnp.float32(300.0), jnp.float32(-20.0)] * 50
    batches = [jnp.asarray(x, dtype).astype(jnp.float32) for x in batches]
    mean, square = float(np.mean(batches)), float(np.mean(np.square(batches)))
    for score, expected in (("norm", mean), ("relative", mean / 2), ("fisher", square)):
        assert_close(fo.gradient_scores(line, params, batches, score), {"w": expected})


def test_complex_gradients_count_by_modulus():
    params = {"w": jnp.full(2, 3 + 4j)}

    def square(params, batch):
        return batch * (abs(params["w"]) ** 2).sum() / 2

    for score, expected in (("norm", 10.0), ("relative", 2.0), ("fisher", 100.0)):
        assert_close(fo.gradient_scores(square, params, [2.0], score), {"w": expected})


def test_tiny_and_huge_gradients_keep_their_scores():
    def line(params, batch):
        return (params["w"] * batch).sum()

    for size in (1e-30, 1e30):
        scores = fo.gradient_scores(line, {"w": jnp.ones(3)}, [jnp.float32(size)], "fisher")
        assert_close(scores, {"w": size**2}, rtol=1e-6)


def test_new_biases_are_relative_to_nothing():
    params = {"new": jnp.zeros(2), "idle": jnp.zeros(2), "w": jnp.ones(2)}

    def line(params, batch):
        return (params["new"] + params["w"]).sum() * batch

    scores = fo.gradient_scores(line, params, [2.0], "relative")
    assert scores == {"idle": 0.0, "new": np.inf, "w": 2.0}


def test_a_gradient_of_nan_is_a_score_of_nan():
    for score in SCORES:
        scores = fo.gradient_scores(loss, PARAMS, [*BATCHES, (BATCHES[0][0], np.nan)], score)
        assert all(map(np.isnan, scores.values()))
    with pytest.raises(ValueError, match="score of 'bias' is NaN"):
        fo.top_leaves(scores, 0.5)


def test_leaves_that_are_no_arrays_stay_what_they_are():
    params = {"n": 2, "f": jnp.tanh, "key": jax.random.key(0), "w": 2.0, "table": np.arange(3)}

    def power(params, batch):
        (width,) = jax.random.uniform(params["key"], (params["n"] - 1,)).shape
        return params["f"](params["w"]) * batch * width * params["table"].astype("f4").sum()

    assert_close(
        fo.gradient_scores(power, params, [1.0]), {"w": 3 * (1 - np.tanh(2.0) ** 2)}, rtol=1e-4
    )


def test_a_quantized_node_has_a_score_only_for_what_trains_apart():
    params = {"q": Quantized(jnp.ones((2, 2), jnp.int8), jnp.full((2, 1), 0.5)), "w": jnp.ones(2)}

    def product(params, batch):
        return (params["q"].dequantized() @ params["w"]).sum() * batch

    assert_close(fo.gradient_scores(product, params, [1.0]), {"w": 1.0})
    scores = fo.gradient_scores(product, params, [1.0], frozen="q/values")
    assert_close(scores, {"q/scale": 2.0, "w": 1.0})


def test_models_of_nnx_and_equinox_have_scores_by_path():
    graphdef, params = nnx.split(nnx_models.Tied())

    def of_state(params, batch):
        return nnx_models.loss(nnx.merge(graphdef, params), batch)

    scores = fo.gradient_scores(of_state, params, [nnx_models.BATCH])
    grads = nnx.to_flat_state(jax.grad(of_state)(params, nnx_models.BATCH))
    norms = {
        "/".join(map(str, path)): np.sqrt(np.mean(np.square(x[...], dtype=float)))
        for path, x in grads
    }
    assert "a/kernel" in norms
    assert_close(scores, {path: norms[path] for path in sorted(norms)})
    model = nnx_models.Net()
    scores = fo.gradient_scores(nnx_models.loss, model, [nnx_models.BATCH], frozen=nnx.BatchStat)
    assert scores.keys() == {f"{layer}/bias" for layer in ("backbone", "head", "norm")} | {
        "backbone/kernel",
        "head/kernel",
        "norm/scale",
    }
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    scores = fo.gradient_scores(lambda m, x: m(x).sum(), mlp, [jnp.ones(2)], frozen="**/bias")
    assert scores.keys() == {"layers/0/weight", "layers/1/weight"}


def test_it_warns_if_nothing_trains():
    with pytest.warns(UserWarning, match="fo.gradient_scores finds no leaf to score"):
        assert fo.gradient_scores(loss, PARAMS, BATCHES, frozen=fo.everything) == {}


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="one of 'norm', 'relative', 'fisher', not 'snr'"):
        fo.gradient_scores(loss, PARAMS, BATCHES, "snr")
    for score in SCORES:
        with pytest.raises(ValueError, match="batches is empty"):
            fo.gradient_scores(loss, PARAMS, iter([]), score)
    for one in (BATCHES[0][0], {"x": 1.0}):
        with pytest.raises(TypeError, match=r"not one \w+; for one batch write \[batch\]"):
            fo.gradient_scores(loss, PARAMS, one)
    with pytest.raises(TypeError, match="'kernel' is abstract; give it params with values"):
        fo.gradient_scores(loss, {**PARAMS, "kernel": jax.ShapeDtypeStruct((8, 3), "f4")}, BATCHES)
    with pytest.raises(TypeError, match="'kernel' is traced; call it outside of jit"):
        jax.jit(lambda params: fo.gradient_scores(loss, params, BATCHES))(PARAMS)
    with pytest.raises(ValueError, match="pattern 'x' selects no leaf"):
        fo.gradient_scores(loss, PARAMS, BATCHES, frozen="x")
