"""A leaf frozen by rows inside `freezable`: forms, wrappers, modes, and bits that stay."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support.compiling import OPTIMISED
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")


def same(expected: Any, new: Any) -> None:
    """Whether two trees have the same arrays, bit by bit, whatever nodes they stand in."""
    one, other = jax.tree.leaves(expected), jax.tree.leaves(new)
    fo.testing.assert_frozen(dict(enumerate(one)), dict(enumerate(other)), True)


F32 = (0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001)
F16 = (0, 0x8000, 1, 0x83FF, 0x7C00, 0xFC00, 0x7E01, 0xFC01)
BF16 = (0, 0x8000, 1, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81)
AWKWARD = {
    "bfloat16": np.array(BF16, np.uint16).view(jnp.bfloat16),
    "float8_e5m2": np.array((0, 0x80, 1, 0x83, 0x7C, 0xFC, 0x7E, 0xFD), np.uint8).view(
        jnp.float8_e5m2
    ),
    "complex64": np.array([x for y in F32 for x in (y, 0x80000000)], np.uint32).view(np.complex64),
    "float16": np.array(F16, np.uint16).view(np.float16),
    "float32": np.array(F32, np.uint32).view(np.float32),
}
PLACES = {"end": [8, 9], "middle": [3, 4], "scattered": [0, 3, 9]}


def awkward(place: str) -> tuple[dict[str, Any], Any]:
    """Rows of ones that train, among rows with signed zeros, subnormals, infinities and NaNs."""
    live = np.isin(np.arange(10), PLACES[place])
    values = {}
    for name, odd in AWKWARD.items():
        array = np.ones((10, 2), odd.dtype)
        array[~live] = np.resize(odd, (10 - live.sum(), 2))
        values[name] = jnp.asarray(array)
    return values, fo.rows(True, ~live)


BITS = {
    f"{name}-{place}-{'jit' if jit else 'eager'}": (inner, place, jit)
    for name, inner in {
        "sgd": optax.sgd(0.1, momentum=0.9),
        "lion": optax.lion(0.1, weight_decay=0.1),
    }.items()
    for place in PLACES
    for jit in (False, True)
}
ALWAYS = ("sgd-middle-eager", "sgd-scattered-jit", "lion-middle-jit", "lion-scattered-eager")


@pytest.mark.parametrize(("inner", "place", "jit"), cases(BITS, ALWAYS))
def test_frozen_rows_stay_bit_identical_in_every_dtype_with_nan_gradients(inner, place, jit):
    params, frozen = awkward(place)
    tx = fo.freezable(inner, frozen)
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    for name in grads:
        grads[name] = grads[name].at[np.array(PLACES[place])].set(1)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    # Without its optimiser XLA changes the NaNs of bfloat16, also where nothing is computed.
    wrapped = jax.jit(step, compiler_options=dict(OPTIMISED)) if jit else step
    new, state = params, tx.init(params)
    for _ in range(2):
        new, state = wrapped(new, state)
    fo.testing.assert_frozen(params, new, frozen)
    for name, array in new.items():
        assert not np.any(np.asarray(array)[PLACES[place]] == np.ones(2, array.dtype)), name


@pytest.mark.parametrize("place", PLACES)
def test_optax_apply_updates_keeps_frozen_zeros_and_subnormals_under_jit(place):
    params, frozen = awkward(place)
    params = {"w": jnp.where(jnp.isnan(params["float32"]), -0.0, params["float32"])}
    tx = fo.freezable(optax.adamw(0.1, weight_decay=0.1), frozen)

    # It is XLA's optimiser that leaves the addition out.
    compiled = functools.partial(jax.jit, compiler_options=dict(OPTIMISED))

    @compiled
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    new, state = step(params, tx.init(params))
    new, _ = step(new, state)
    fo.testing.assert_frozen(params, new, frozen)
    train = TrainState.create(apply_fn=None, params=params, tx=tx)
    ones = jax.tree.map(jnp.ones_like, params)
    apply = compiled(lambda state: state.apply_gradients(grads=ones))
    fo.testing.assert_frozen(params, apply(train).params, frozen)
    assert np.all(np.asarray(new["w"])[PLACES[place]] != 1)


def table(rows: int = 6) -> dict[str, Any]:
    values = jax.random.normal(jax.random.key(1), (rows, 2))
    return {"embed": values, "head": jnp.array([0.5, -1.0, 2.0])}


SCATTERED = fo.rows("embed", [0, 2, 3])
KEPT = np.array([1, 4, 5])


def by_hand(tree: Any, rows: Any = KEPT) -> Any:
    return {**tree, "embed": tree["embed"][rows]}


def quadratic(params: Any) -> jax.Array:
    return (params["embed"] ** 3).sum() * params["head"].sum() + (params["head"] ** 2).sum()


@pytest.mark.parametrize("rows", [False, True], ids=["whole gradients", "gradients of rows"])
@pytest.mark.parametrize("params_too", [False, True], ids=["whole params", "params of rows"])
def test_updates_have_the_form_of_the_gradients_and_apply_to_either_form_of_params(
    rows, params_too
):
    params, inner = table(), optax.adamw(0.1, weight_decay=0.1)
    tx = fo.freezable(inner, SCATTERED)
    state = tx.init(params)
    grads = fo.grad(quadratic, frozen=state, holes=rows)(params)
    given, rest = fo.partition(params, state) if params_too else (params, None)
    updates, new_state = jax.jit(tx.update)(grads, state, given)
    assert updates["embed"].shape == ((3, 2) if rows else (6, 2))
    new = fo.apply_updates(given, updates, frozen=state)
    assert new["embed"].shape == given["embed"].shape
    new = fo.merge(new, rest) if params_too else new
    bare = by_hand(params)
    bare_grads = by_hand(jax.grad(quadratic)(params))
    bare_updates, bare_state = jax.jit(inner.update)(bare_grads, inner.init(bare), bare)
    fo.testing.assert_frozen(optax.apply_updates(bare, bare_updates), by_hand(new), True)
    fo.testing.assert_frozen(params, new, SCATTERED)
    same(bare_state, new_state)


def test_a_norm_counts_the_rows_that_train_alone():
    params = table()
    tx = fo.freezable(optax.clip_by_global_norm(1.0), SCATTERED)
    grads = {"embed": jnp.zeros((6, 2)).at[0].set(1e6).at[4, 1].set(3.0), "head": jnp.zeros(3)}
    updates, _ = tx.update({**grads, "head": jnp.array([0, 4.0, 0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["embed"][4], [0.0, 0.6], rtol=1e-6)
    np.testing.assert_allclose(updates["head"], [0.0, 0.8, 0.0], rtol=1e-6)


def scaled() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, scale=None):
        return jax.tree.map(lambda u, s: u * s, updates, scale), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_an_extra_argument_shaped_like_the_params_is_cut_like_them():
    params = table()
    tx = fo.freezable(scaled(), SCATTERED)
    scale = jax.tree.map(lambda x: x + 1, params)
    updates, _ = tx.update(params, tx.init(params), params, scale=scale)
    expected = jax.tree.map(lambda x: x * (x + 1), by_hand(params))
    fo.testing.assert_frozen(expected, by_hand(updates), True)


def test_an_extra_argument_with_a_number_for_each_leaf_reaches_the_inner_one():
    params = table()
    tx = fo.freezable(scaled(), SCATTERED)
    updates, _ = tx.update(params, tx.init(params), params, scale={"embed": 2.0, "head": 3.0})
    np.testing.assert_array_equal(updates["embed"][KEPT], 2 * params["embed"][KEPT])
    np.testing.assert_array_equal(updates["head"], 3 * params["head"])


@pytest.mark.parametrize("bare", [False, True], ids=["tree", "one bare array"])
@pytest.mark.parametrize("inner", [optax.lbfgs(), optax.polyak_sgd()], ids=["lbfgs", "polyak"])
def test_a_function_of_the_params_gets_all_rows(inner, bare):
    params = table()["embed"] if bare else table()
    frozen = fo.rows(True, [0, 2, 3]) if bare else SCATTERED
    shapes = []

    def value_fn(params):
        embed = params if bare else params["embed"]
        shapes.append(embed.shape)
        return ((embed - 1) ** 2).sum()

    tx = fo.freezable(inner, frozen)
    state = tx.init(params)
    value, grads = fo.value_and_grad(value_fn, frozen=state)(params)
    extra = {"value": value, "grad": grads, "value_fn": value_fn}
    updates, _ = tx.update(grads, state, params, **extra)
    assert set(shapes) == {(6, 2)}
    new = fo.apply_updates(params, updates, frozen=state)
    assert value_fn(new) < value
    fo.testing.assert_frozen(params, new, frozen)


def test_a_function_of_the_params_gets_the_frozen_rows_as_they_are():
    params, seen = table(), []

    def update(updates, state, params=None, *, value_fn):
        value_fn(jax.tree.map(lambda x: x + 1, params))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = fo.freezable(inner, SCATTERED)
    tx.update(params, tx.init(params), params, value_fn=seen.append)
    expected = {"embed": params["embed"].at[KEPT].add(1), "head": params["head"] + 1}
    fo.testing.assert_frozen([expected], seen, True)


def test_both_copies_of_lookahead_keep_their_frozen_rows():
    inner = optax.lookahead(optax.adam(0.1), 2, 0.5)

    def run(tx, fast):
        params = optax.LookaheadParams.init_synced(fast)
        state = tx.init(params)
        for i in range(3):
            grads = jax.tree.map(lambda x, i=i: x * (0.5 + i), params.fast)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    new, state = run(fo.freezable(inner, SCATTERED), table())
    expected, bare_state = run(inner, by_hand(table()))
    for copy, bare_copy in zip(new, expected, strict=True):
        fo.testing.assert_frozen(table(), copy, SCATTERED)
        fo.testing.assert_frozen(bare_copy, by_hand(copy), True)
    same(bare_state, state)


def test_optax_finds_and_maps_what_is_in_the_state():
    params, tx = table(), fo.freezable(optax.adam(0.1), SCATTERED)
    state = tx.init(params)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    np.testing.assert_array_equal(optax.tree_utils.tree_get(mapped, "mu")["embed"], np.ones((3, 2)))
    assert optax.tree_utils.tree_get(mapped, "count") == 0
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    later = optax.tree_utils.tree_set(fo.thaw(state, params, fo.rows("embed", [0])), count=5)
    assert optax.tree_utils.tree_get(later, "count") == 5
    both = optax.tree_map_params(tx, lambda x: x + 1, later)
    moments = jax.tree.leaves(optax.tree_utils.tree_get(both, "nu")["embed"])
    assert [x.shape for x in moments] == [(3, 2), (1, 2)]
    assert all(np.all(x == 1) for x in moments)
    assert jax.tree.structure(both) == jax.tree.structure(later)


def close(expected: Any, new: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), expected, new)


AROUND = {
    "chain": lambda tx: optax.chain(optax.clip(0.1), tx, optax.scale(0.5)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, True),
}


@pytest.mark.parametrize("wrap", AROUND)
def test_other_transformations_go_around_it(wrap):
    tx, bare = AROUND[wrap](fo.freezable(optax.adam(0.1), SCATTERED)), AROUND[wrap](optax.adam(0.1))
    params, rows = table(), by_hand(table())
    state, bare_state = tx.init(params), bare.init(rows)
    for i in range(4):
        grads = jax.tree.map(lambda x, i=i: x * (i - 1.5), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, bare_state = jax.jit(bare.update)(by_hand(grads), bare_state, rows)
        rows = optax.apply_updates(rows, updates)
        close(rows, by_hand(params))
    fo.testing.assert_frozen(table(), params, SCATTERED)


def make_step(tx: Any) -> Any:
    def step(params, state):
        grads = fo.grad(quadratic, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def bare_run(inner: Any, params: Any, steps: int) -> Any:
    """The bare optimizer on the rows, with gradients of the whole."""
    rows, state = by_hand(params), inner.init(by_hand(params))
    for _ in range(steps):
        grads = by_hand(jax.grad(quadratic)(params))
        updates, state = jax.jit(inner.update)(grads, state, rows)
        rows = optax.apply_updates(rows, updates)
        params = {**rows, "embed": params["embed"].at[KEPT].set(rows["embed"])}
    return params


def test_a_scan_and_donated_steps_follow_the_bare_optimizer():
    tx, params = fo.freezable(optax.adam(0.01), SCATTERED), table()
    expected = bare_run(optax.adam(0.01), params, 4)
    step = make_step(tx)
    scan = functools.partial(jax.lax.scan, lambda carry, _: (step(*carry), None), length=4)
    (new, _), _ = jax.jit(scan)((params, tx.init(params)))
    donated = jax.jit(step, donate_argnums=(0, 1))
    own = (jax.tree.map(jnp.copy, params), tx.init(params))
    for _ in range(4):
        own = donated(*own)
    for result in (new, own[0]):
        close(expected, result)
        fo.testing.assert_frozen(params, result, SCATTERED)


def test_an_ensemble_under_vmap_freezes_the_rows_of_each_member():
    tx = fo.freezable(optax.adam(0.01), SCATTERED)
    step = jax.jit(jax.vmap(make_step(tx)))
    members = [table(), jax.tree.map(lambda x: -2 * x, table())]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    state = jax.vmap(tx.init)(stacked)
    assert optax.tree_utils.tree_get(state, "mu")["embed"].shape == (2, 3, 2)
    new, state = step(*step(stacked, state))
    for i, member in enumerate(members):
        own = jax.tree.map(lambda x, i=i: x[i], new)
        close(bare_run(optax.adam(0.01), member, 2), own)
        fo.testing.assert_frozen(member, own, SCATTERED)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("where", [slice(0, 8), [0, 3, 5]], ids=["block", "scattered"])
def test_sharded_params_stay_sharded_and_frozen_rows_stay(where, axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spec = PartitionSpec(*((None,) * axis), "data")
    values = jnp.arange(128, dtype=jnp.float32).reshape(16, 8)
    params = {"w": jax.device_put(values, NamedSharding(mesh, spec))}
    frozen = fo.rows("w", where)
    tx = fo.freezable(optax.adam(0.1), frozen)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    new, _ = step(params, state)
    fo.testing.assert_frozen(params, new, frozen)
    live = np.setdiff1d(np.arange(16), np.arange(16)[where])
    np.testing.assert_allclose(new["w"][live], values[live] - 0.1, rtol=1e-5)
    assert new["w"].sharding.device_set == set(jax.devices())


def test_an_equinox_model_trains_the_rows_of_its_embedding():
    model = eqx.nn.Embedding(5, 3, key=jax.random.key(0))
    frozen = fo.rows("weight", slice(0, 3))
    tx = fo.freezable(optax.adam(0.1), frozen)
    state = tx.init(model)

    @eqx.filter_jit
    def step(model, state):
        grads = fo.grad(lambda m: jax.vmap(m)(jnp.arange(5)).sum(), frozen=state)(model)
        updates, state = tx.update(grads, state, model)
        return fo.apply_updates(model, updates, frozen=state), state

    new, _ = step(model, state)
    fo.testing.assert_frozen(model, new, frozen)
    np.testing.assert_allclose(new.weight[3:], model.weight[3:] - 0.1, rtol=1e-5, atol=1e-6)


def test_tied_leaves_with_the_same_rows_share_one_state():
    params = {"a": table()["embed"], "b": jnp.copy(table()["embed"]), "c": jnp.ones(2)}
    same_rows = fo.rows("{a,b}", [0, 2, 3])
    tx = fo.freezable(fo.tie(optax.adam(0.1), ("a", "b")), same_rows)
    state = tx.init(params)
    grads = {"a": params["a"], "b": 2 * params["b"], "c": params["c"]}
    updates, state = tx.update(grads, state, params)
    inner = optax.adam(0.1)
    bare_grads = {"a": (params["a"] + 2 * params["b"])[KEPT], "c": params["c"]}
    expected, _ = inner.update(bare_grads, inner.init(bare_grads))
    for name in ("a", "b"):
        close(expected["a"], updates[name][KEPT])
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * (6 + 2) + 1
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        fo.freezable(fo.tie(optax.adam(0.1), ("a", "b")), fo.rows("a", [0, 2, 3])).init(params)


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
@pytest.mark.parametrize("where", [slice(0, 3), [0, 2, 3]], ids=["block", "scattered"])
def test_a_wrong_number_of_rows_is_an_error_naming_the_path(where, rows):
    params, frozen = table(), fo.rows("embed", where)
    tx = fo.freezable(optax.adam(0.1), frozen)
    state = tx.init(params)
    odd = {**params, "embed": jnp.ones((rows, 2))}
    with pytest.raises(ValueError, match=rf"'embed' is of shape \({rows}, 2\)"):
        tx.update(odd, state, params)
    with pytest.raises(ValueError, match="'embed'"):
        tx.update(params, state, odd)
    with pytest.raises(ValueError, match="'embed'"):
        fo.apply_updates(params, odd, frozen=state)
    with pytest.raises(ValueError, match="'embed'"):
        fo.apply_updates(odd, params, frozen=state)


def test_a_number_is_no_gradient_of_rows():
    params, tx = table(), fo.freezable(optax.adam(0.1), SCATTERED)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"'embed' is of shape \(\)"):
        tx.update({**params, "embed": jnp.float32(1.0)}, state, params)
    with pytest.raises(ValueError, match="'embed'"):
        tx.update(params, state, {**params, "embed": jnp.float32(1.0)})


@pytest.mark.parametrize("missing", [None, optax.MaskedNode()], ids=["None", "hole"])
def test_no_gradient_for_rows_that_train_is_an_error_naming_the_path(missing):
    params, tx = table(), fo.freezable(optax.adam(0.1), SCATTERED)
    with pytest.raises(ValueError, match="no gradient at 'embed'"):
        tx.update({**params, "embed": missing}, tx.init(params), params)


def test_a_state_of_more_or_fewer_rows_is_no_spec_for_a_leaf():
    state = fo.freezable(optax.adam(0.1), SCATTERED).init(table())
    for rows in (5, 9):
        with pytest.raises(ValueError, match="'embed'"):
            fo.mask(state, table(rows))
