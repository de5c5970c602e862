import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import freeze_optax as fo
from tests.support.sampling import cases

HOLE = optax.MaskedNode()
COUNT = 20
# One run, two runs, and more than are worth a slice each.
ROWS = {"block": range(14), "two runs": [0, 1, 10], "scattered": range(0, COUNT, 2)}
ANY_ROWS = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
COMPILED = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def _split(rows):
    """The indices of frozen rows and of those that train."""
    return sorted(rows), [i for i in range(COUNT) if i not in rows]


def _odd_values(shape, dtype=np.float32, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    # -0.0, a subnormal, an infinity and a NaN with a payload, in each row.
    x[:, 0], x[:, 1], x[:, 2] = -0.0, 1e-42, -np.inf
    x[:, 3] = np.asarray([0x7FC01234], np.uint32).view(np.float32)
    return x


def _params():
    rng = np.random.default_rng(1)
    embed = jnp.asarray(rng.normal(size=(COUNT, 4)), jnp.float32)
    return {"embed": embed, "head": jnp.asarray(rng.normal(size=4), jnp.float32), "n": 3}


def _bits(tree):
    return jax.tree.map(lambda x: (np.asarray(x).dtype.name, np.shape(x), _bytes(x)), tree)


def _bytes(x):
    return np.asarray(x).tobytes()


def _assert_same(tree, expected):
    """The same structure, holes included, and the same dtypes, shapes and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert _bits(jax.tree.leaves(tree)) == _bits(jax.tree.leaves(expected))


@ANY_ROWS
@COMPILED
def test_partition_gives_the_rows_that_train_and_merge_puts_them_back_bit_for_bit(rows, wrap):
    odd = _odd_values((COUNT, 5))
    params = {"embed": jnp.asarray(odd), "head": jnp.ones(2)}
    frozen, live = _split(rows)
    trainable, rest = wrap(lambda p: fo.partition(p, fo.rows("embed", rows)))(params)
    _assert_same(trainable, {"embed": odd[live], "head": np.ones(2, np.float32)})
    assert _bits(jax.tree.leaves(rest)) == _bits([odd[frozen]])
    _assert_same(wrap(fo.merge)(trainable, rest), {"embed": odd, "head": np.ones(2, np.float32)})


@pytest.mark.parametrize("dtype", [np.complex64, jnp.bfloat16])
@ANY_ROWS
def test_partition_and_merge_are_inverse_for_other_dtypes(rows, dtype):
    x = np.linspace(-1, 1, COUNT).astype(dtype)
    x[0], x[-1] = -0.0, np.inf
    params = {"w": jnp.asarray(x)}
    _assert_same(fo.merge(*fo.partition(params, fo.rows("w", rows))), {"w": x})


@ANY_ROWS
def test_partition_and_merge_are_inverse_for_numpy_arrays_of_any_dtype(rows):
    x = np.linspace(0.1, 0.9, COUNT)
    trainable, rest = fo.partition({"w": x}, fo.rows("w", rows))
    _assert_same(trainable, {"w": x[_split(rows)[1]]})
    _assert_same(fo.merge(trainable, rest), {"w": x})


@ANY_ROWS
def test_partition_and_merge_are_inverse_on_abstract_trees(rows):
    abstract = {"w": jax.ShapeDtypeStruct((COUNT, 3), jnp.bfloat16)}
    trainable, rest = fo.partition(abstract, fo.rows("w", rows))
    count = len(_split(rows)[1])
    assert trainable == {"w": jax.ShapeDtypeStruct((count, 3), jnp.bfloat16)}
    assert fo.merge(trainable, rest) == abstract


@ANY_ROWS
def test_a_map_over_the_trainable_part_moves_only_its_rows(rows):
    params, (_, live) = _params(), _split(rows)

    @jax.jit
    def double(trainable, rest):
        return fo.merge(jax.tree.map(lambda x: x * 2, trainable), rest)

    expected = jax.tree.map(np.array, params) | {"head": np.asarray(params["head"]) * 2}
    expected["embed"][live] *= 2
    trainable, rest = fo.partition(params, fo.rows("embed", rows))
    same = jax.jit(lambda rest: rest)(rest)
    assert jax.tree.structure(same) == jax.tree.structure(rest)
    _assert_same(double(trainable, same), expected | {"n": np.asarray(3, np.int32)})


def test_partition_of_an_nnx_state_keeps_its_variables():
    state = nnx.state(nnx.Embed(COUNT, 2, rngs=nnx.Rngs(0)), nnx.Param)
    trainable, rest = fo.partition(state, fo.rows("embedding", [0, 1]))
    assert jax.tree.leaves(trainable)[0].shape == (COUNT - 2, 2)
    _assert_same(fo.merge(trainable, rest), state)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (np.zeros((COUNT, 4), np.float32), r"'embed'.*\(20, 4\)"),
        (np.zeros((5, 4), np.float32), r"'embed'.*\(5, 4\)"),
        (np.zeros((6, 3), np.float32), r"'embed'.*\(6, 3\)"),
        (HOLE, r"'embed'"),
    ],
    ids=["whole", "rows", "width", "hole"],
)
def test_merge_names_path_and_shape_of_rows_that_do_not_fit(part, message):
    params = {"embed": _params()["embed"]}
    _, rest = fo.partition(params, fo.rows("embed", range(14)))
    with pytest.raises(ValueError, match=message):
        fo.merge({"embed": part}, rest)


def test_merge_names_the_path_where_the_parts_are_exchanged():
    trainable, rest = fo.partition(_params(), fo.rows("embed", range(14)))
    with pytest.raises(ValueError, match=r"'embed'.*the order is fo.merge\(trainable, rest\)"):
        fo.merge(rest, trainable)


@ANY_ROWS
@COMPILED
def test_hold_takes_the_rows_of_old_and_all_others_of_new(rows, wrap):
    frozen, _ = _split(rows)
    new, old = _odd_values((COUNT, 5), seed=1), _odd_values((COUNT, 5), seed=2)
    counts = np.arange(COUNT), -np.arange(COUNT)
    trees = [
        {"n": jnp.asarray(n, jnp.int32), "w": jnp.asarray(w)}
        for n, w in zip(counts, (new, old), strict=True)
    ]
    expected = {"n": counts[0].astype(np.int32), "w": new.copy()}
    expected["n"][frozen], expected["w"][frozen] = counts[1][frozen], old[frozen]
    held = wrap(lambda new, old: fo.hold(new, old, fo.rows(fo.everything, rows)))(*trees)
    _assert_same(held, expected)
    held = wrap(lambda new, old: fo.hold(new, old, fo.rows("w", rows)))(*trees)
    _assert_same(held, expected | {"n": counts[0].astype(np.int32)})


IDS = jnp.asarray([0, 3, 3, 19, 10, 7])


def _lookup(params, ids):
    return jnp.tanh(params["embed"][ids] * params["head"]).sum()


def _matmul(params, ids):
    logits = params["embed"] @ params["head"]
    return jax.nn.logsumexp(logits) - logits[ids].mean()


LOSSES = pytest.mark.parametrize("loss", [_lookup, _matmul])


def _reference(loss, frozen, has_aux=False):
    """Value and gradient by JAX alone, with the frozen rows of it zeroed."""
    params = _params()
    params.pop("n")
    value, grads = jax.value_and_grad(loss, has_aux=has_aux)(params, IDS)
    grads = jax.tree.map(np.array, grads)
    grads["embed"][frozen] = 0.0
    return value, grads | {"n": np.zeros((), np.int32)}


def _assert_close(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (np.shape(a), np.asarray(a).dtype) == (np.shape(b), np.asarray(b).dtype)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


GRADIENTS = {
    f"{loss.__name__}-{name}-{'jit' if compiled else 'eager'}": (loss, rows, compiled)
    for loss in (_lookup, _matmul)
    for name, rows in ROWS.items()
    for compiled in (False, True)
}
ALWAYS = [x for x in GRADIENTS if x.endswith("jit") or "two runs" in x]


@pytest.mark.parametrize(("loss", "rows", "compiled"), cases(GRADIENTS, ALWAYS))
def test_gradients_are_those_of_jax_and_zero_at_frozen_rows(loss, rows, compiled):
    frozen, live = _split(rows)
    spec, params = fo.rows("embed", rows), _params()

    def wrap(f):
        return jax.jit(lambda p: f(p | {"n": 3}, IDS)) if compiled else lambda p: f(p, IDS)

    value, expected = _reference(loss, frozen)
    both = wrap(fo.value_and_grad(loss, spec))(params)
    _assert_close(both, (value, expected))
    assert np.asarray(both[1]["embed"])[frozen].tobytes() == b"\0" * 16 * len(frozen)
    _assert_close(wrap(fo.grad(loss, spec))(params), expected)
    alone = expected | {"embed": expected["embed"][live], "n": HOLE}
    _assert_close(wrap(fo.value_and_grad(loss, spec, holes=True))(params), (value, alone))
    _assert_close(wrap(fo.grad(loss, spec, holes=True))(params), alone)


@ANY_ROWS
def test_aux_and_more_arguments_pass_through(rows):
    def loss(params, ids, *, scale=1.0):
        return _matmul(params, ids) * scale, {"embed": params["embed"], "ids": ids}

    params, (frozen, _) = _params(), _split(rows)
    (value, _), expected = _reference(lambda p, ids: loss(p, ids, scale=3.0), frozen, has_aux=True)
    (ours, aux), grads = fo.value_and_grad(loss, fo.rows("embed", rows), has_aux=True)(
        params, IDS, scale=3.0
    )
    _assert_close((ours, grads), (value, expected))
    _assert_same(aux, {"embed": params["embed"], "ids": IDS})
    grads, aux = fo.grad(loss, fo.rows("embed", rows), has_aux=True)(params, IDS, scale=3.0)
    _assert_close(grads, expected)
    _assert_same(aux, {"embed": params["embed"], "ids": IDS})


@ANY_ROWS
def test_the_function_sees_every_bit_of_every_row(rows):
    odd = _odd_values((COUNT, 5))

    def loss(params):
        return params["w"][:, 4].sum(), jax.lax.bitcast_convert_type(params["w"], jnp.uint32)

    for wrap in (lambda f: f, jax.jit):
        _, seen = wrap(fo.grad(loss, fo.rows("w", rows), has_aux=True))({"w": jnp.asarray(odd)})
        np.testing.assert_array_equal(seen, odd.view(np.uint32))


@ANY_ROWS
@pytest.mark.parametrize("holes", [False, True], ids=["zeros", "holes"])
def test_gradients_are_summed_in_the_carry_of_a_scan(rows, holes):
    params, (frozen, live) = {k: v for k, v in _params().items() if k != "n"}, _split(rows)
    gradient = fo.grad(_lookup, fo.rows("embed", rows), holes=holes)
    start = jax.tree.map(jnp.zeros_like, params)
    if holes:
        start["embed"] = jnp.zeros((len(live), 4))

    def body(total, ids):
        return jax.tree.map(jnp.add, total, gradient(params, ids)), None

    total, _ = jax.jit(lambda start: jax.lax.scan(body, start, jnp.stack([IDS, IDS])))(start)
    _, expected = _reference(_lookup, frozen)
    expected = {name: 2 * expected[name] for name in ("embed", "head")}
    if holes:
        expected["embed"] = expected["embed"][live]
    _assert_close(total, expected)


@ANY_ROWS
def test_gradients_are_differentiated_again_and_batched_as_those_of_jax(rows):
    frozen, _ = _split(rows)
    embed, keep = _params()["embed"], np.ones((COUNT, 1), np.float32)
    keep[frozen] = 0.0

    def loss(params, ids):
        return _lookup(params | {"head": jnp.ones(4)}, ids)

    def penalty(gradient):
        return lambda w: (gradient(w) ** 2 * w).sum()

    ours = fo.grad(loss, fo.rows("embed", rows))
    second = jax.grad(penalty(lambda w: ours({"embed": w}, IDS)["embed"]))(embed)
    plain = jax.grad(lambda w: loss({"embed": w}, IDS))
    expected = jax.grad(penalty(lambda w: plain(w) * keep))(embed)
    _assert_close(second, expected)
    batched = jax.vmap(ours, in_axes=(None, 0))({"embed": embed}, IDS[:, None])
    each = [jax.grad(lambda w, i=i: loss({"embed": w}, i[None]))(embed) * keep for i in IDS]
    _assert_close(batched, {"embed": jnp.stack(each)})


def _steps(count):
    rng = np.random.default_rng(5)
    return rng.normal(size=(count, 5)).astype(np.float32)


@ANY_ROWS
@pytest.mark.parametrize("only_rows", [False, True], ids=["full updates", "row updates"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, "donated"], ids=["eager", "jit", "donated"])
def test_updates_move_the_rows_that_train_and_no_bit_of_the_others(rows, only_rows, wrap):
    odd, (frozen, live) = _odd_values((COUNT, 5)), _split(rows)
    odd[live] = 1.0
    step = _steps(COUNT)
    step[frozen] = np.nan
    expected = odd.copy()
    expected[live] += step[live]
    updates = {"w": jnp.asarray(step[live] if only_rows else step), "x": jnp.ones(2)}
    run = jax.jit if wrap == "donated" else wrap
    kwargs = {"donate_argnums": 0} if wrap == "donated" else {}
    apply = run(lambda p, u: fo.apply_updates(p, u, frozen=fo.rows("w", rows)), **kwargs)
    new = apply({"w": jnp.asarray(odd), "x": jnp.ones(2)}, updates)
    _assert_same(new, {"w": expected, "x": np.full(2, 2, np.float32)})
    fo.testing.assert_frozen({"w": odd}, {"w": new["w"]}, fo.rows("w", rows))


@pytest.mark.usefixtures("standard_promotion")
@ANY_ROWS
@pytest.mark.parametrize("holes", [False, True], ids=["zeros", "holes"])
def test_a_step_of_a_freezable_optimizer_is_the_plain_one_on_the_rows_that_train(rows, holes):
    params, (frozen, live) = {k: v for k, v in _params().items() if k != "n"}, _split(rows)
    tx = fo.freezable(optax.adam(0.1), fo.rows("embed", rows))
    state = tx.init(params)
    grads = fo.grad(_matmul, state, holes=holes)(params, IDS)
    updates, state = tx.update(grads, state, params)
    new = fo.apply_updates(params, updates, frozen=state)
    _, full = _reference(_matmul, frozen)
    # Adam's first step: the sign of the gradient, but for epsilon.
    expected = {k: np.array(v) for k, v in params.items()}
    for name, index in (("embed", live), ("head", slice(None))):
        g = full[name][index]
        expected[name][index] -= 0.1 * g / (np.abs(g) + 1e-8)
    _assert_close(new, expected)
    assert np.asarray(new["embed"])[frozen].tobytes() == expected["embed"][frozen].tobytes()


@pytest.mark.parametrize("update", [None, HOLE], ids=["None", "hole"])
def test_a_leaf_frozen_in_part_without_an_update_is_the_very_object(update):
    params = {"w": jnp.ones((COUNT, 5))}
    new = fo.apply_updates(params, {"w": update}, frozen=fo.rows("w", [1]))
    assert new["w"] is params["w"]


@ANY_ROWS
@pytest.mark.parametrize("count", [1, 5, 19, 21])
def test_updates_of_other_rows_are_an_error_with_path_and_shape(rows, count):
    params = {"a": {"w": jnp.ones((COUNT, 5))}}
    with pytest.raises(ValueError, match=rf"'a/w'.*\({count}, 5\)"):
        fo.apply_updates(params, {"a": {"w": jnp.ones((count, 5))}}, fo.rows("a", rows))


@ANY_ROWS
@COMPILED
def test_rows_that_train_alone_are_moved_as_they_are_in_the_whole(rows, wrap):
    _, live = _split(rows)
    x, step = np.linspace(1, 2, COUNT * 2, dtype=np.float32).reshape(COUNT, 2), _steps(COUNT)[:, :2]
    params = {"w": jnp.asarray(x)}
    state = fo.freezable(optax.sgd(0.1), fo.rows("w", rows)).init(params)
    trainable, rest = fo.partition(params, state)
    expected = x.copy()
    expected[live] += step[live]
    for update in (step, step[live]):
        apply = wrap(lambda p, u: fo.apply_updates(p, u, frozen=state))
        new = apply(trainable, {"w": jnp.asarray(update)})
        _assert_same(new, {"w": expected[live]})
        _assert_same(fo.merge(new, rest), {"w": expected})


def test_an_update_that_broadcasts_does_so_for_the_rows_that_train_as_in_optax():
    params = {"w": jnp.ones((3, 2))}
    expected = {"w": np.asarray([[1, 1], [3, 3], [3, 3]], np.float32)}
    for update in (2.0, jnp.asarray(2.0)):
        _assert_same(fo.apply_updates(params, {"w": update}, fo.rows("w", [0])), expected)


def test_a_dtype_wider_than_its_update_stays():
    params = {"w": jnp.ones((4, 2), jnp.bfloat16)}
    with jax.numpy_dtype_promotion("standard"):
        new = fo.apply_updates(params, {"w": jnp.ones((4, 2))}, fo.rows("w", [0, 3]))
    expected = np.asarray([[1, 1], [2, 2], [2, 2], [1, 1]], jnp.bfloat16)
    _assert_same(new, {"w": expected})


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@ANY_ROWS
def test_assert_frozen_looks_at_frozen_rows_alone(rows, kind):
    odd, (frozen, live) = _odd_values((COUNT, 5)), _split(rows)
    moved = odd.copy()
    moved[live] = 7.0
    spec = fo.rows("w", rows)
    fo.testing.assert_frozen({"w": kind(odd)}, {"w": kind(moved)}, spec)
    last = frozen[-1]
    moved[last, 0] = 0.0
    message = rf"^1 frozen leaf is .*:\n  w: 1 of 100 .* at \({last}, 0\): -0\.0 became 0\.0$"
    with pytest.raises(AssertionError, match=message):
        fo.testing.assert_frozen({"w": kind(odd)}, {"w": kind(moved)}, spec)


def test_assert_frozen_of_rows_still_compares_shape_and_dtype():
    old, spec = {"w": jnp.ones((4, 2))}, fo.rows("w", [0])
    with pytest.raises(AssertionError, match=r"w: float32\[4, 2\] became float32\[4, 3\]"):
        fo.testing.assert_frozen(old, {"w": jnp.ones((4, 3))}, spec)
    with pytest.raises(AssertionError, match=r"w: float32\[4, 2\] became bfloat16\[4, 2\]"):
        fo.testing.assert_frozen(old, {"w": jnp.ones((4, 2), jnp.bfloat16)}, spec)
