"""Losses that do not hand the layers to the scan as they are, while these take turns."""

import functools

import jax
import jax.numpy as jnp
import pytest

import freeze_optax as fo
from tests.params.test_scan_rotating import PARAMS, assert_close, base, rotating, value
from tests.support.sampling import cases


def unscanned(params):
    return value(params["embed"], params)


def half_scanned(params):
    f = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return value(fo.scan(f, params["embed"], params["layers"]["w"])[0], params)


@pytest.mark.parametrize(
    ("loss", "names", "has_aux", "jit"),
    cases(
        {
            "none": (unscanned, "'layers/b', 'layers/w'", False, False),
            "none, and a jitted loss": (unscanned, "'layers/b', 'layers/w'", False, True),
            "none, and an auxiliary value": (unscanned, "'layers/b', 'layers/w'", True, False),
            "some": (half_scanned, "'layers/b'", False, False),
            "some, and a jitted loss with both": (half_scanned, "'layers/b'", True, True),
        },
        ("none", "none, and an auxiliary value", "some, and a jitted loss with both"),
    ),
)
def test_a_loss_that_does_not_scan_a_leaf_of_the_stack_is_an_error_each_time(
    loss, names, has_aux, jit
):
    state = rotating().init(PARAMS)
    fun = (lambda params: (loss(params), params["layers"])) if has_aux else loss
    fun = jax.jit(fun) if jit else fun
    for _ in range(2):
        with pytest.raises(ValueError, match=f"does not hand {names} to fo.scan"):
            fo.grad(fun, frozen=state, has_aux=has_aux)(PARAMS)


def test_a_jitted_loss_that_scans_the_stack_is_none_the_second_time_either():
    state, loss = rotating().init(PARAMS), jax.jit(functools.partial(base, fo.scan))
    first, second = (fo.value_and_grad(loss, frozen=state)(PARAMS) for _ in range(2))
    assert_close(first, second, 0)
    has_aux = jax.jit(lambda params: (base(fo.scan, params), params["head"]))
    for _ in range(2):
        (found, aux), _ = fo.value_and_grad(has_aux, frozen=state, has_aux=True)(PARAMS)
    assert (found, aux.tolist()) == (first[0], PARAMS["head"].tolist())


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.sum(),
        lambda w: w[0],
        lambda w: w @ w,
        lambda w: 2 * w,
        jnp.tanh,
        list,
        jnp.asarray,
    ],
    ids=["sum", "index", "product", "factor", "function", "list", "array"],
)
def test_to_compute_with_a_leaf_of_the_stack_is_an_error_that_says_how_to_scan(use):
    state = rotating().init(PARAMS)
    with pytest.raises(TypeError, match="'layers/w' take turns"):
        fo.grad(lambda params: jnp.sum(use(params["layers"]["w"])), frozen=state)(PARAMS)


# The gradient would be that of other layers.
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:2],
        lambda x: x[::-1],
        lambda x: 2 * x,
        lambda x: x**2,
        lambda x: x[:2] if x.ndim else x,
    ],
    ids=["part", "turned round", "factor", "square", "part of arrays"],
)
def test_to_change_which_layers_the_scan_gets_is_an_error(change):
    state = rotating().init(PARAMS)

    def loss(params):
        return base(fo.scan, {**params, "layers": jax.tree.map(change, params["layers"])})

    with pytest.raises(
        (TypeError, IndexError, ValueError), match=r"key|0-dimensional|of the 5 layers"
    ):
        fo.grad(loss, frozen=state)(PARAMS)
