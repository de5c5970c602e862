"""Diffrax: gradients through a solved differential equation, of a part of its vector field."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import freeze_optax as fo
from tests.support.bare_steps import assert_same_bits, bare_steps, steps_with

diffrax = pytest.importorskip("diffrax", reason="make lane-ecosystem installs it")

pytestmark = pytest.mark.usefixtures("standard_promotion")

ADJOINTS = [
    diffrax.RecursiveCheckpointAdjoint,
    diffrax.DirectAdjoint,
    diffrax.BacksolveAdjoint,
]


def new_field():
    return eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda x: x.__name__)
def test_a_vector_field_that_trains_in_part_moves_as_by_hand(adjoint):
    def loss_of(field):
        arrays, static = eqx.partition(field, eqx.is_array)

        def velocity(t, y, arrays):
            return eqx.combine(arrays, static)(y)

        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=jnp.ones(2),
            args=arrays,
            adjoint=adjoint(),
            max_steps=8,
        )
        return (solved.ys**2).sum()

    field = new_field()
    trained = steps_with("layers/0", loss_of, field, eqx.filter_jit)
    expected = bare_steps(loss_of, field, lambda path: path.startswith("layers/1"))
    fo.testing.assert_frozen(field, trained, "layers/0")
    assert_same_bits(trained, expected)
