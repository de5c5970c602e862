"""Optimistix: minimisers and root finders, which take the tree that they move as `y0`."""

import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo

optx = pytest.importorskip("optimistix", reason="make lane-ecosystem installs it")

pytestmark = pytest.mark.usefixtures("standard_promotion")

Y0 = {"a": jnp.array([1.0, -0.0]), "b": jnp.zeros(2)}


def residuals(y):
    return {"a": y["a"] - 3.0, "b": y["b"] - y["a"]}


def squares(y, args=None):
    return sum((x**2).sum() for x in residuals(y).values())


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(lambda: optx.BFGS(1e-6, 1e-6), id="BFGS"),
        pytest.param(lambda: optx.NonlinearCG(1e-6, 1e-6), id="NonlinearCG"),
        pytest.param(lambda: optx.OptaxMinimiser(optax.adam(0.1), 1e-6, 1e-6), id="optax"),
    ],
)
def test_a_minimiser_moves_one_half_of_a_partition(solver):
    trainable, rest = fo.partition(Y0, "a")
    solved = optx.minimise(
        lambda y, rest: squares(fo.merge(y, rest)), solver(), trainable, rest, max_steps=2000
    )
    params = fo.merge(solved.value, rest)
    fo.testing.assert_frozen(Y0, params, "a")
    assert jnp.allclose(params["b"], Y0["a"], atol=1e-2)


def test_least_squares_moves_one_half_of_a_partition():
    trainable, rest = fo.partition(Y0, "a")
    solved = optx.least_squares(
        lambda y, rest: residuals(fo.merge(y, rest)),
        optx.LevenbergMarquardt(1e-6, 1e-6),
        trainable,
        rest,
    )
    assert jnp.allclose(fo.merge(solved.value, rest)["b"], Y0["a"], atol=1e-4)


def test_its_optax_minimiser_takes_a_freezable_optimizer():
    solver = optx.OptaxMinimiser(fo.freezable(optax.adam(0.1), "a"), rtol=1e-6, atol=1e-6)
    solved = optx.minimise(squares, solver, Y0, max_steps=2000)
    fo.testing.assert_frozen(Y0, solved.value, "a")
    assert jnp.allclose(solved.value["b"], Y0["a"], atol=1e-2)


def test_integers_become_floats_in_it_and_a_partition_keeps_them():
    # optimistix 0.1.0 turns the leaves of y0 into floats, so that no dtype says what not to move.
    tree = {**Y0, "n": jnp.arange(2)}
    solver = optx.OptaxMinimiser(fo.freezable(optax.adam(0.1), "a"), rtol=1e-6, atol=1e-6)
    assert (
        optx.minimise(squares_and_count, solver, tree, max_steps=2000).value["n"].dtype == "float32"
    )
    trainable, rest = fo.partition(tree, "a")
    solved = optx.minimise(
        lambda y, rest: squares_and_count(fo.merge(y, rest)),
        optx.BFGS(1e-6, 1e-6),
        trainable,
        rest,
    )
    fo.testing.assert_frozen(tree, fo.merge(solved.value, rest), ["a", "n"])


def squares_and_count(y, args=None):
    return squares(y) + 0.0 * y["n"].sum()
