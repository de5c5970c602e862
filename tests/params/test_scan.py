"""A scan that goes back through no frozen layer, against `jax.lax.scan` over all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import freeze_optax as fo
from tests.support.sampling import cases

DEPTH, WIDTH, BATCH = 6, 4, 3
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "below": jax.random.normal(KEYS[0], (WIDTH, WIDTH)),
    "layers": {
        "kernel": jax.random.normal(KEYS[1], (DEPTH, WIDTH, WIDTH)),
        "bias": jnp.ones((DEPTH, WIDTH)),
    },
}
X = jax.random.normal(KEYS[2], (BATCH, WIDTH))

RUNS = {
    "the first": fo.rows("layers", slice(0, 4)),
    "the last": fo.rows("layers", slice(3, None)),
    "the middle": fo.rows("layers", [2, 3]),
    "every other": fo.rows("layers", slice(None, None, 2)),
    "all": fo.path("layers"),
    "none": fo.nothing,
    "one field more": fo.rows("layers", slice(0, 3)) | fo.rows("layers/bias", slice(0, 5)),
}


def layer(h, weights):
    h = jnp.tanh(h @ weights["kernel"] + weights["bias"])
    return h, (h.sum(), weights["bias"])


def outputs(scan, params, **kwargs):
    return scan(layer, X @ params["below"], params["layers"], **kwargs)


def loss_with(scan, **kwargs):
    def loss(params):
        h, (sums, _) = outputs(scan, params, **kwargs)
        return (h**2).sum() + (sums**2).sum()

    return loss


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("unroll", cases({"rolled": 1, "unrolled": True}, ["rolled"]))
@pytest.mark.parametrize("spec", RUNS.values(), ids=RUNS)
def test_the_carry_and_the_outputs_are_those_of_one_scan_over_all(spec, unroll, jit):
    mask = fo.mask(spec, PARAMS)["layers"]

    def both(params):
        kwargs = {"unroll": unroll}
        return outputs(jax.lax.scan, params, **kwargs), outputs(
            fo.scan, params, frozen=mask, **kwargs
        )

    expected, got = (jax.jit(both) if jit else both)(PARAMS)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


@pytest.mark.parametrize("spec", RUNS.values(), ids=RUNS)
def test_the_gradient_is_that_of_one_scan_with_zeros_for_what_is_frozen(spec):
    mask = fo.mask(spec, PARAMS)
    grads = fo.grad(loss_with(fo.scan, frozen=mask["layers"]), spec)(PARAMS)
    plain = jax.grad(loss_with(jax.lax.scan))(PARAMS)

    def check(got, plain, frozen):
        still = np.broadcast_to(frozen, plain.shape[:1])
        np.testing.assert_allclose(got[~still], plain[~still], rtol=1e-5, atol=1e-5)
        assert not got[still].any()

    jax.tree.map(check, grads, plain, mask)
    assert grads["below"].any()


def dots(fun, *args):
    """How many products of matrices are computed, loops counted by their length."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                total += eqn.params["length"] * count(eqn.params["jaxpr"].jaxpr)
            elif eqn.primitive.name == "dot_general":
                total += 1
            else:
                inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
                total += sum(count(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
        return total

    return count(jax.make_jaxpr(fun)(*args).jaxpr)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # Forward 1 + 6; back through a layer that trains 2, through a frozen one above it 1.
        (["below", fo.rows("layers", slice(0, 5))], 7 + 2),
        (["below", fo.rows("layers", slice(0, 4))], 7 + 4),
        (["below", fo.rows("layers", slice(2, 6))], 7 + 4 + 4),
        (fo.rows("layers", slice(0, 5)), 7 + 2 + 5 + 1),
    ],
    ids=["all but the last", "all but two", "all but the first two", "below trains too"],
)
def test_nothing_goes_back_through_frozen_layers_below_the_first_that_trains(spec, expected):
    mask = fo.mask(spec, PARAMS)["layers"]
    assert dots(fo.grad(loss_with(fo.scan, frozen=mask), spec), PARAMS) == expected
    one_scan = dots(fo.grad(loss_with(jax.lax.scan), spec), PARAMS)
    assert one_scan > expected


def kept_shapes(jaxpr):
    """The shapes of what the loops return: what is kept for the backward pass, and gradients."""
    shapes = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            shapes |= {v.aval.shape for v in eqn.outvars}
        inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
        shapes = shapes.union(*(kept_shapes(j) for j in inner if hasattr(j, "eqns")))
    return shapes


def test_the_weights_of_frozen_layers_are_not_kept_for_the_backward_pass():
    spec = fo.rows("layers", slice(2, 6))
    mask = fo.mask(spec, PARAMS)["layers"]
    jaxpr = jax.make_jaxpr(fo.grad(loss_with(fo.scan, frozen=mask), spec))(PARAMS)
    shapes = kept_shapes(jaxpr.jaxpr)
    assert (4, BATCH, WIDTH) in shapes  # activations of the four frozen layers above
    assert (4, WIDTH, WIDTH) not in shapes


def test_what_the_user_rematerialises_is_not_kept_either():
    hidden = 5
    params = {
        "up": jax.random.normal(KEYS[0], (DEPTH, WIDTH, hidden)),
        "down": jax.random.normal(KEYS[1], (DEPTH, hidden, WIDTH)),
    }
    spec = fo.rows(fo.everything, slice(2, 6))
    mask = fo.mask(spec, params)

    def block(x, weights):
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    def with_cast(x, weights):
        return jax.checkpoint(block)(x * 1.0, weights)

    policy = jax.checkpoint_policies.everything_saveable
    for f, keeps_hidden, keeps_weights in [
        (block, True, False),
        (jax.checkpoint(block), False, False),
        (jax.jit(jax.checkpoint(block)), False, False),
        (jax.checkpoint(block, policy=policy), True, False),
        (with_cast, False, True),  # as jax.lax.scan does
    ]:

        def loss(params, f=f):
            return (fo.scan(f, X, params, frozen=mask)[0] ** 2).sum()

        jaxpr = jax.make_jaxpr(fo.grad(loss, spec))(params)
        shapes = kept_shapes(jaxpr.jaxpr)
        assert ((4, BATCH, hidden) in shapes) == keeps_hidden, f
        assert ((4, WIDTH, hidden) in shapes) == keeps_weights, f


@pytest.mark.parametrize("spec", [RUNS["the last"], RUNS["every other"]], ids=["one", "several"])
def test_forward_mode_and_second_derivatives_are_those_of_one_scan(spec):
    mask = fo.mask(spec, PARAMS)["layers"]
    tangents = jax.tree.map(jnp.cos, PARAMS)
    loss, plain = loss_with(fo.scan, frozen=mask), loss_with(jax.lax.scan)
    # What is frozen is a constant, so it has no tangent.
    flags = {"below": False, "layers": mask}
    of_live = jax.tree.map(
        lambda x, frozen: jnp.where(np.asarray(frozen).reshape(-1, *[1] * (x.ndim - 1)), 0, x),
        tangents,
        flags,
    )

    def derivatives(loss, tangents):
        return jax.jvp(loss, (PARAMS,), (tangents,)), jax.jvp(
            jax.grad(loss), (PARAMS,), (tangents,)
        )

    (value, rate), (grads, curvature) = jax.jit(lambda: derivatives(loss, of_live))()
    (value_2, rate_2), (grads_2, curvature_2) = jax.jit(lambda: derivatives(plain, of_live))()
    np.testing.assert_allclose([value, rate], [value_2, rate_2], rtol=1e-5)

    def check(got, expected, frozen):
        still = np.broadcast_to(frozen, got.shape[:1])
        np.testing.assert_allclose(got[~still], expected[~still], rtol=1e-4, atol=1e-4)

    jax.tree.map(check, (grads, curvature), (grads_2, curvature_2), (flags, flags))


def test_integers_among_the_layers_do_not_count():
    xs = {"kernel": jnp.ones((3, 2)), "index": jnp.arange(3)}

    def loss(xs):
        frozen = fo.rows("kernel", slice(0, 2))
        h, seen = fo.scan(lambda h, x: (h * x["kernel"], x["index"]), jnp.ones(2), xs, frozen)
        assert seen.shape == (3,)
        return h.sum()

    assert fo.grad(loss, fo.nothing)(xs)["kernel"].tolist() == [[0, 0], [0, 0], [1, 1]]


def test_layers_of_an_nnx_state():
    layers = nnx.State({"kernel": nnx.Param(jnp.full((3, 2), 2.0))})
    frozen = fo.rows("kernel", slice(0, 2))
    h, _ = fo.scan(lambda h, x: (h * x["kernel"][...], None), jnp.ones(2), layers, frozen)
    np.testing.assert_array_equal(h, np.full(2, 8.0))


@pytest.mark.parametrize("xs", [{"a": jnp.ones((3, 2)), "b": jnp.ones(2)}, {"a": jnp.ones(())}, {}])
def test_leaves_without_one_leading_axis_are_an_error_with_their_shapes(xs):
    with pytest.raises(ValueError, match="the same leading axis, but"):
        fo.scan(lambda h, x: (h, x), 0.0, xs, fo.nothing)


def test_a_spec_of_the_whole_params_is_an_error():
    with pytest.raises(ValueError, match="pattern 'layers' selects no leaf"):
        fo.scan(layer, X, PARAMS["layers"], "layers")


def test_a_stack_of_no_layers_gives_what_jax_gives():
    def f(carry, x):
        return carry + x.sum(), x

    empty = jnp.zeros((0, 4))
    carry, outputs = fo.scan(f, 1.0, empty, fo.nothing)
    expected_carry, expected = jax.lax.scan(f, 1.0, empty)
    assert (float(carry), outputs.shape) == (float(expected_carry), expected.shape) == (1.0, (0, 4))
