"""Rows of any axis and elements in each function of params, against NumPy and bare optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.sampling import cases

HOLE = optax.MaskedNode()
SHAPE = (4, 6)
COMPILED = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def _elements(seed=0):
    return np.random.default_rng(seed).random(SHAPE) < 0.6


def _where(axis, indices):
    mask = np.zeros(SHAPE, bool)
    np.moveaxis(mask, axis, 0)[indices] = True
    return mask


# What is frozen of "w": the spec, its full mask, and the shape of what trains.
FROZEN = {
    "columns": (fo.rows("w", [0, 1, 4], axis=1), _where(1, [0, 1, 4]), (4, 3)),
    "last columns": (fo.rows("w", slice(2, None), axis=-1), _where(1, slice(2, None)), (4, 2)),
    "elements": (fo.elements("w", _elements()), _elements(), (int((~_elements()).sum()),)),
    "rows and columns": (
        fo.rows("w", [1]) | fo.rows("w", [0, 5], axis=1),
        _where(0, [1]) | _where(1, [0, 5]),
        (12,),
    ),
}
ANY = pytest.mark.parametrize(
    ("spec", "mask", "shape"), cases(FROZEN, ("columns", "elements", "rows and columns"))
)
FEW = pytest.mark.parametrize(("spec", "mask", "shape"), cases(FROZEN, ("columns", "elements")))


def _odd_values(seed=0):
    """Values of which rows, columns and elements hold -0.0, subnormals, infinities and NaNs."""
    x = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    x.flat[::4], x.flat[1::5], x.flat[2::7] = -0.0, 1e-42, -np.inf
    x.flat[3::8] = np.asarray([0x7FC01234], np.uint32).view(np.float32)
    return x


def _params(w=None):
    w = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32) if w is None else w
    return {"n": 3, "v": jnp.arange(1.0, 4.0), "w": jnp.asarray(w)}


def _assert_same_bits(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()


def _assert_trees_have_the_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(_assert_same_bits, tree, expected)


@COMPILED
@ANY
def test_partition_gives_what_trains_and_merge_is_its_inverse_bit_for_bit(wrap, spec, mask, shape):
    params = {"v": jnp.ones(2), "w": jnp.asarray(_odd_values())}
    trainable, rest = wrap(lambda p: fo.partition(p, spec))(params)
    # What trains is of the order of the leaf.
    _assert_same_bits(trainable["w"], _odd_values()[~mask].reshape(shape))
    _assert_same_bits(trainable["v"], np.ones(2, np.float32))
    _assert_trees_have_the_same_bits(wrap(fo.merge)(trainable, rest), params)
    numpy = jax.tree.map(np.asarray, params)
    _assert_trees_have_the_same_bits(fo.merge(*fo.partition(numpy, spec)), numpy)
    new = {"v": trainable["v"], "w": trainable["w"] + 1}
    expected = np.where(mask, _odd_values(), _odd_values() + 1)
    merged = wrap(fo.merge)(new, rest)["w"]
    _assert_same_bits(np.asarray(merged)[mask], expected[mask])
    np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("name", ["columns", "elements"])
def test_parts_that_do_not_fit_do_not_merge(name):
    spec, _, shape = FROZEN[name]
    trainable, rest = fo.partition(_params(), spec)
    what = "elements" if name == "elements" else "rows"
    for wrong, message in (
        (jnp.zeros((2, 2)), rf"'w' is of shape \(2, 2\), where `rest` lacks {what} of shape"),
        (HOLE, rf"'w' is a hole in `trainable`, where `rest` lacks {what}"),
        (trainable["w"].astype("bfloat16"), "'w' is bfloat16 in `trainable` and float32"),
        (jnp.zeros(SHAPE), rf"\(4, 6\), where `rest` lacks {what} of shape \({shape[0]},"),
    ):
        with pytest.raises(ValueError, match=message):
            fo.merge({**trainable, "w": wrong}, rest)


def _loss(params, x):
    return (jnp.sin(params["w"]) * x).sum() ** 2 + (params["w"][0, :3] * params["v"]).sum()


X = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)


@COMPILED
@ANY
def test_gradients_are_those_of_the_whole_leaf_at_what_trains(wrap, spec, mask, shape):
    params = _params()
    value, whole = jax.jit(jax.value_and_grad(lambda w: _loss({**params, "w": w}, X)))(params["w"])
    both = {
        holes: wrap(lambda p, holes=holes: fo.value_and_grad(_loss, spec, holes=holes)(p, X))
        for holes in (False, True)
    }
    own_value, grads = both[False](params)
    np.testing.assert_allclose(own_value, value, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], np.where(mask, 0, whole), rtol=1e-6)
    assert np.asarray(grads["w"])[mask].tobytes() == bytes(4 * mask.sum())
    own_value, grads = both[True](params)
    np.testing.assert_allclose(own_value, value, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], np.asarray(whole)[~mask].reshape(shape), rtol=1e-6)
    np.testing.assert_allclose(grads["v"], params["w"][0, :3], rtol=1e-6)
    assert grads["n"] == HOLE


@COMPILED
@ANY
def test_hold_takes_what_is_selected_of_the_old_leaf(wrap, spec, mask, shape):
    old, new = {"w": jnp.asarray(_odd_values(0))}, {"w": jnp.asarray(_odd_values(1))}
    held = wrap(lambda new, old: fo.hold(new, old, spec))(new, old)
    _assert_same_bits(held["w"], np.where(mask, _odd_values(0), _odd_values(1)))


@COMPILED
@ANY
def test_apply_updates_adds_to_what_trains_and_keeps_every_other_bit(wrap, spec, mask, shape):
    x, rng = _odd_values(), np.random.default_rng(3)
    whole = rng.normal(size=SHAPE).astype(np.float32)
    part = whole[~mask].reshape(shape)
    state = fo.freezable(optax.sgd(0.1), spec).init({"w": jnp.asarray(x)})
    apply = wrap(lambda p, u: fo.apply_updates(p, u, frozen=state))
    for update in (np.where(mask, np.nan, whole), part, np.float32(1)):
        new = np.asarray(apply({"w": jnp.asarray(x)}, {"w": jnp.asarray(update)})["w"])
        _assert_same_bits(new[mask], x[mask])
        added = (x + (whole if np.ndim(update) else update))[~mask]
        # XLA flushes subnormal sums.
        np.testing.assert_allclose(new[~mask], added, rtol=1e-6, atol=1e-38)
    alone = apply({"w": jnp.asarray(x[~mask].reshape(shape))}, {"w": jnp.asarray(part)})["w"]
    np.testing.assert_allclose(alone, x[~mask].reshape(shape) + part, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("name", ["columns", "elements"])
def test_an_update_of_another_shape_is_an_error(name):
    spec, _, shape = FROZEN[name]
    for wrong in ((5,), (3, 6), (*shape, 1), (4, 6, 1), (1, *shape)):
        with pytest.raises(ValueError, match="the update of 'w' is of shape"):
            fo.apply_updates({"w": jnp.ones(SHAPE)}, {"w": jnp.ones(wrong)}, frozen=spec)


@ANY
def test_assert_frozen_looks_at_each_bit_of_what_is_frozen_alone(spec, mask, shape):
    before = {"w": jnp.asarray(_odd_values())}
    live = {"w": jnp.where(mask, before["w"], 7.0)}
    fo.testing.assert_frozen(before, live, spec)
    fo.testing.assert_frozen(before, live, {"w": mask})
    i = np.flatnonzero(mask & (_odd_values() == 0) & np.signbit(_odd_values()))[0]
    changed = _odd_values()
    changed.flat[i] = 0.0  # a sign alone
    with pytest.raises(AssertionError, match=r"w: 1 of 24 elements differ.*-0\.0 became 0\.0"):
        fo.testing.assert_frozen(before, {"w": jnp.asarray(changed)}, spec)


def _run(tx, params, style, steps=3):
    """Trains with whole gradients, with holes, or on what trains alone."""
    state = tx.init(params)

    def step(params, state):
        if style == "partition":
            trainable, rest = fo.partition(params, state)
            grads = jax.grad(lambda t: _loss(fo.merge(t, rest), X))(trainable)
            updates, state = tx.update(grads, state, trainable)
            trainable = fo.apply_updates(trainable, updates, frozen=state)
            return fo.merge(trainable, rest), state
        grads = fo.grad(_loss, state, holes=style == "holes")(params, X)
        updates, state = tx.update(grads, state, params)
        if style == "optax":
            return optax.apply_updates(params, updates), state
        return fo.apply_updates(params, updates, frozen=state), state

    step = jax.jit(step)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("style", ["whole", "holes", "partition", "optax"])
@FEW
def test_a_run_is_that_of_bare_optax_on_what_trains(style, spec, mask, shape):
    inner = optax.adamw(0.05, weight_decay=0.1)
    before = np.random.default_rng(4).normal(size=SHAPE).astype(np.float32)
    # optax.apply_updates adds -0.0, which may flush subnormals; the frozen -0.0 stays.
    before[mask] = -0.0 if style == "optax" else 1e-42
    params = {"v": jnp.arange(1.0, 4.0), "w": jnp.asarray(before)}
    new, state = _run(fo.freezable(inner, spec), params, style)

    # By hand: bare optax on the vector of what trains.
    def whole(live):
        return {"v": live["v"], "w": jnp.asarray(before).at[~mask].set(live["w"])}

    live = {"v": params["v"], "w": jnp.asarray(before[~mask])}
    bare = inner.init(live)
    for _ in range(3):
        grads = jax.grad(lambda live: _loss(whole(live), X))(live)
        updates, bare = inner.update(grads, bare, live)
        live = optax.apply_updates(live, updates)
    np.testing.assert_allclose(np.asarray(new["w"])[~mask], live["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["v"], live["v"], rtol=1e-5, atol=1e-6)
    _assert_same_bits(np.asarray(new["w"])[mask], before[mask])
    for moment in ("mu", "nu"):
        own = optax.tree_utils.tree_get(state, moment)["w"]
        assert own.shape == shape
        by_hand = np.asarray(optax.tree_utils.tree_get(bare, moment)["w"]).reshape(shape)
        np.testing.assert_allclose(own, by_hand, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("standard_promotion")
def test_scheduled_phases_along_different_axes_equal_the_host_loop_that_keeps_state():
    phases = fo.Phases(
        {
            0: [fo.rows("w", [0, 1], axis=1), "v"],
            2: fo.rows("w", slice(0, 2)),
            4: fo.elements("w", _elements()) | fo.rows("w", [3]),
            6: fo.rows("w", [0, 1], axis=1),
        }
    )
    inner, params = optax.adamw(0.05, weight_decay=0.1), _params()
    del params["n"]

    def step(tx):
        def of(params, state):
            grads = fo.grad(_loss, state)(params, X)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state

        return of

    tx = fo.scheduled(inner, phases)
    one = step(tx)
    body = lambda carry, _: ((new := one(*carry)), new[0])  # noqa: E731
    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=8)[1])
    ours = run(params)

    tx = fo.freezable(inner, phases.at(0))
    state, host = tx.init(params), jax.jit(step(tx))
    for i in range(8):
        state = fo.set_frozen(state, params, phases.at(i), keep_state=True)
        before = params
        params, state = host(params, state)
        fo.testing.assert_frozen(before, params, phases.at(i))
        for name, x in params.items():
            np.testing.assert_allclose(ours[name][i], x, rtol=1e-5, atol=1e-6)
    for i in (1, 3, 5, 7):
        frozen = fo.mask(phases.at(i), params)["w"]
        frozen = frozen[:, None] if np.ndim(frozen) == 1 else frozen
        still = np.broadcast_to(frozen, SHAPE)
        _assert_same_bits(ours["w"][i][still], ours["w"][i - 1][still])


@pytest.mark.usefixtures("standard_promotion")
@ANY
def test_tied_leaves_that_are_frozen_alike_train_as_one(spec, mask, shape):
    del shape
    both = [spec, {"a": mask, "w": mask, "v": False}]
    shared = jnp.asarray(_params()["w"])
    params = {"a": shared, "v": jnp.ones(3), "w": jnp.copy(shared)}
    inner = optax.adam(0.1)
    tx = fo.freezable(fo.tie(inner, ("a", "w")), both[1])
    state = tx.init(params)
    rng = np.random.default_rng(5)
    one, bare = shared, inner.init(shared)
    for i in range(3):
        grads = {
            k: jnp.asarray(rng.normal(size=np.shape(x)), jnp.float32) for k, x in params.items()
        }
        given = grads if i else fo.partition(grads, state)[0]
        updates, state = tx.update(given, state, params)
        params = fo.apply_updates(params, updates, frozen=state)
        # Adam on the whole leaf treats each element alone.
        update, bare = inner.update(grads["a"] + grads["w"], bare, one)
        one = jnp.where(mask, one, one + update)
        for name in ("a", "w"):
            np.testing.assert_allclose(params[name], one, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"'a'.*'w'|'w'.*'a'"):
        fo.freezable(fo.tie(inner, ("a", "w")), spec).init(params)


@pytest.mark.usefixtures("standard_promotion")
@FEW
def test_states_and_gradients_below_vmap(spec, mask, shape):
    """Several models at once, each with a state of its own."""
    tx = fo.freezable(optax.adam(0.1), spec)
    rng = np.random.default_rng(6)
    w, g = (rng.normal(size=(3, *SHAPE)).astype(np.float32) for _ in range(2))
    states = jax.vmap(tx.init)({"w": w})
    assert optax.tree_utils.tree_get(states, "mu")["w"].shape == (3, *shape)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state)

    new = np.asarray(jax.vmap(step)({"w": w}, states, {"w": g})["w"])
    np.testing.assert_allclose(new, np.where(mask, w, w - 0.1 * np.sign(g)), atol=1e-5)
    _assert_same_bits(new[:, mask], w[:, mask])


@ANY
def test_gradients_of_single_examples_have_axes_in_front(spec, mask, shape):
    mean = optax.stateless(lambda g, _: jax.tree.map(lambda x: x.mean(0), g))
    tx, params = fo.freezable(mean, spec), _params()
    grads = np.random.default_rng(7).normal(size=(5, *SHAPE)).astype(np.float32)
    state = tx.init(params)
    tree = {"n": HOLE, "v": jnp.ones((5, 3)), "w": jnp.asarray(grads)}
    updates, _ = tx.update(tree, state, params)
    expected = np.where(mask, -0.0, grads.mean(0))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5, atol=1e-7)
    live = grads[:, ~mask].reshape(5, *shape)
    tree = {"n": HOLE, "v": jnp.ones((5, 3)), "w": jnp.asarray(live)}
    if len(shape) == 1:
        with pytest.raises(ValueError, match=r"only axes of examples.* of the whole leaf"):
            tx.update(tree, state, params)
        return
    updates, _ = tx.update(tree, state, params)
    np.testing.assert_allclose(updates["w"], live.mean(0), rtol=1e-5, atol=1e-7)


@ANY
def test_a_gradient_of_another_shape_is_an_error_with_its_path(spec, mask, shape):
    tx, params = fo.freezable(optax.sgd(0.1), spec), _params()
    state = tx.init(params)
    for wrong in ((5,), (3, 6), (*SHAPE[::-1],), (4,)):
        grads = {"n": HOLE, "v": jnp.ones(3), "w": jnp.ones(wrong)}
        with pytest.raises(ValueError, match="the gradient of 'w' is of shape"):
            tx.update(grads, state, params)
