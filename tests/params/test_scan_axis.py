"""A scan over layers stacked along another axis, against `jax.lax.scan` over moved axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo
from tests.params.test_scan import dots
from tests.support.sampling import cases

DEPTH, WIDTH, BATCH = 6, 4, 3
KEYS = jax.random.split(jax.random.key(0), 4)
LEADING = {
    "bias": jax.random.normal(KEYS[3], (DEPTH, WIDTH)),
    "kernel": jax.random.normal(KEYS[1], (DEPTH, WIDTH, WIDTH)),
}
X = jax.random.normal(KEYS[2], (BATCH, WIDTH))
AXES = {"axis 1": 1, "the last": -1, "the one before": -2}
ANY_AXIS = pytest.mark.parametrize("axis", AXES.values(), ids=AXES)


def move(layers, axis):
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), layers)


def layer(h, weights):
    h = jnp.tanh(h @ weights["kernel"] + weights["bias"])
    return h, (h.sum(), weights["bias"])


def total(pair):
    h, (sums, biases) = pair
    return (h**2).sum() + (sums**2).sum() + (biases * 0.1).sum()


def reference(layers, axis):
    """One scan of JAX over all layers, with their axis moved to the front."""
    leading = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), layers)
    return jax.lax.scan(layer, X, leading)


def specs(axis, layers):
    """For each spec whether each layer is frozen, and the full mask of each leaf."""
    rows = {
        "the first": slice(0, 4),
        "every other": slice(None, None, 2),
        "the last": [5],
        "all": slice(None),
        "none": [],
    }
    for name, where in rows.items():
        flags = np.zeros(DEPTH, bool)
        flags[where] = True
        yield name, fo.rows("**", where, axis=axis), flags, flags
    # Elements that cover the first three layers, and some elements of others.
    flags = np.arange(DEPTH) < 3

    def mask(leaf):
        chosen = np.random.default_rng(1).random(leaf.shape) < 0.3
        np.moveaxis(chosen, axis, 0)[:3] = True
        np.moveaxis(chosen, axis, 0)[3:, 0] = False
        return chosen

    yield "elements", fo.elements("**", mask), flags, mask


@pytest.mark.parametrize(
    ("axis", "jit"),
    cases(
        {
            f"{name}, {how}": (axis, jit)
            for name, axis in AXES.items()
            for how, jit in (("eager", False), ("jit", True))
        },
        ["axis 1, jit", "the last, jit"],
    ),
)
def test_outputs_and_gradients_are_those_of_one_scan_over_moved_axes(axis, jit):
    layers = move(LEADING, axis)
    expected = jax.jit(reference, static_argnums=1)(layers, axis)
    plain = jax.jit(jax.grad(lambda p: total(reference(p, axis))))(layers)
    for name, spec, _, where in specs(axis, layers):

        def scanned(p, spec=spec):
            return fo.scan(layer, X, p, spec, axis=axis)

        def both(p, spec=spec, scanned=scanned):
            return scanned(p), fo.grad(lambda p: total(scanned(p)), spec)(p)

        got, grads = (jax.jit(both) if jit else both)(layers)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected
        )
        for leaf, grad in grads.items():
            if callable(where):
                mask = where(layers[leaf])
            else:
                mask = np.zeros(grad.shape, bool)
                np.moveaxis(mask, axis, 0)[where] = True
            wanted = np.where(mask, 0, plain[leaf])
            np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
            assert not np.asarray(grad)[mask].any()


@ANY_AXIS
def test_nothing_goes_back_through_layers_below_the_first_that_trains(axis):
    layers = move(LEADING, axis)
    for name, spec, flags, _ in specs(axis, layers):
        if name in ("all", "none"):
            continue

        def loss(p, spec=spec):
            return total(fo.scan(layer, X, p, spec, axis=axis))

        first = int(np.flatnonzero(~flags)[0])
        live = int((~flags).sum())
        # For a layer that trains the gradients of weights and carry, for a frozen one the carry's.
        expected = DEPTH + live + (DEPTH - first)
        assert dots(fo.grad(loss, spec), layers) == expected, name


def test_leaves_of_several_ranks_have_their_layers_along_one_axis():
    x = {"scale": jnp.arange(1.0, 7.0).reshape(1, 6), "cube": jnp.ones((2, 6, 2, 2))}
    carry, seen = fo.scan(
        lambda h, w: (h * w["scale"] + w["cube"].sum(), w["scale"]),
        jnp.ones(1),
        x,
        fo.rows("**", slice(0, 3), axis=1),
        axis=1,
    )
    expected, right = jax.lax.scan(
        lambda h, w: (h * w["scale"] + w["cube"].sum(), w["scale"]),
        jnp.ones(1),
        jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), x),
    )
    np.testing.assert_array_equal(carry, expected)
    np.testing.assert_array_equal(seen, right)
    with pytest.raises(ValueError, match=r"same length of axis 2, .* shapes .*\(1, 6\)"):
        fo.scan(lambda h, w: (h, None), 0.0, x, fo.nothing, axis=2)
    with pytest.raises(ValueError, match="same length of axis -1"):
        fo.scan(lambda h, w: (h, None), 0.0, x, fo.nothing, axis=-1)
    with pytest.raises(ValueError, match="same length of axis -3"):
        fo.scan(lambda h, w: (h, None), 0.0, x, fo.nothing, axis=-3)


def test_a_spec_of_rows_along_another_axis_freezes_no_layer():
    layers = move(LEADING, 1)
    inputs = fo.rows("kernel", [0, 1])  # of each layer

    def loss(scan):
        return lambda p: total(scan(p))

    grads = fo.grad(loss(lambda p: fo.scan(layer, X, p, inputs, axis=1)), inputs)(layers)
    plain = jax.grad(loss(lambda p: reference(p, 1)))(layers)
    assert not np.asarray(grads["kernel"])[:2].any()
    np.testing.assert_allclose(grads["kernel"][2:], plain["kernel"][2:], rtol=1e-4, atol=1e-5)


def test_no_layers_along_an_inner_axis_give_what_jax_gives():
    carry, seen = fo.scan(lambda c, x: (c, x * 2), 1.0, jnp.zeros((4, 0)), fo.nothing, axis=1)
    assert (float(carry), seen.shape) == (1.0, (0, 4))


@pytest.mark.parametrize("axis", [1.0, "1", None, True], ids=repr)
def test_an_axis_that_is_no_integer_is_an_error(axis):
    with pytest.raises(TypeError, match="axis"):
        fo.scan(lambda c, x: (c, None), 1.0, jnp.zeros((4, 3)), fo.nothing, axis=axis)
