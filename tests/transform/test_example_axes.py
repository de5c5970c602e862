"""Gradients with an axis of examples in front, as `optax.contrib.dpsgd` takes them."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo

EXAMPLES = 4  # as many as `embed` has rows: the two axes can't be told apart by their length
ROWS = {
    "one run": ([0], slice(1, 4)),
    "two runs": ([0, 2], [1, 3]),
}


def _params(rows=4, dtype=jnp.float32):
    numbers = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    return {
        "embed": jnp.asarray(numbers, dtype),
        "head": jnp.ones(4),
        "frozen": -jnp.zeros((2, 4)),
        "scalar": jnp.asarray(3.0),
    }


def _grads(params, examples=EXAMPLES):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(examples, *x.shape)), x.dtype), params
    )


def _dpsgd():
    # Without noise: its keys depend on the number of leaves, which parts of a leaf add to.
    return optax.contrib.dpsgd(0.5, 1.0, 0.0, seed=0, momentum=0.9)


def _only(tree, rows, axis):
    taken = np.take(np.asarray(tree["embed"]), np.arange(tree["embed"].shape[axis])[rows], axis)
    return {"embed": jnp.asarray(taken), "head": tree["head"]}


def _bits(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def _by_hand(params, grads, live):
    """The updates of bare optax on the trainable rows alone, in the whole tree."""
    tx, trainable = _dpsgd(), _only(params, live, 0)
    updates, _ = tx.update(_only(grads, live, 1), tx.init(trainable))
    embed = np.full(params["embed"].shape, -0.0, params["embed"].dtype)
    embed[live] = updates["embed"]
    zeros = {name: np.full(params[name].shape, -0.0, np.float32) for name in ("frozen", "scalar")}
    return {"embed": embed, "head": updates["head"], **zeros}


@pytest.mark.parametrize(("frozen", "live"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("with_params", [True, False], ids=["params", "no params"])
def test_rows_are_cut_on_the_axis_of_the_leaf_and_not_of_the_examples(frozen, live, with_params):
    params = _params()
    grads = _grads(params)
    tx = fo.freezable(_dpsgd(), [fo.rows("embed", frozen), "frozen", "scalar"])
    state = tx.init(params)
    expected = _by_hand(params, grads, live)
    arguments = (params,) if with_params else ()
    updates, _ = tx.update(grads, state, *arguments)
    assert _bits(updates) == _bits(expected)
    # A gradient of the rows that train alone has an update of these rows.
    partial = grads | {"embed": _only(grads, live, 1)["embed"]}
    updates, _ = tx.update(partial, state, *arguments)
    assert _bits(updates) == _bits(expected | {"embed": expected["embed"][live]})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scattered_rows_of_gradients_of_examples_are_those_of_the_leaf(dtype):
    params = _params(20, dtype)  # more runs than are sliced
    grads, live = _grads(params), slice(1, None, 2)
    tx = fo.freezable(optax.trace(0.9), [fo.rows("embed", slice(0, None, 2)), "frozen", "scalar"])
    zeros = jax.tree.map(jnp.zeros_like, grads)
    zeros["embed"] = zeros["embed"][:, live]
    # A trace that starts with the axis of examples keeps it: the update has it too.
    state = optax.tree_utils.tree_set(tx.init(params), trace=_holes(zeros))
    updates, _ = jax.jit(tx.update)(grads, state)
    embed = np.full((EXAMPLES, 20, 4), -0.0, params["embed"].dtype)
    embed[:, live] = grads["embed"][:, live]
    assert _bits(updates["embed"]) == _bits(embed)
    assert _bits(updates["head"]) == _bits(grads["head"])


def _holes(tree):
    return tree | {"frozen": optax.MaskedNode(), "scalar": optax.MaskedNode()}


@pytest.mark.parametrize("with_params", [True, False], ids=["params", "no params"])
def test_rows_thawed_later_train_on_gradients_of_examples_as_a_fresh_optimizer_does(with_params):
    params = _params()
    grads = _grads(params)
    tx = fo.freezable(_dpsgd(), [fo.rows("embed", [0, 1]), "frozen", "scalar"])
    arguments = (params,) if with_params else ()
    _, state = tx.update(grads, tx.init(params), *arguments)
    state = fo.thaw(state, params, fo.rows("embed", [0]))
    updates, _ = tx.update(grads, state, *arguments)

    bare = _dpsgd()
    first, trained = _only(params, [2, 3], 0), _only(params, [0, 2, 3], 0)
    _, old = bare.update(_only(grads, [2, 3], 1), bare.init(first))
    old_trace, fresh = old[1].trace, bare.init(trained)
    trace = {
        "embed": jnp.concatenate([jnp.zeros((1, 4)), old_trace["embed"]]),
        "head": old_trace["head"],
    }
    by_hand = optax.tree_utils.tree_set(fresh, trace=trace)
    expected, _ = bare.update(_only(grads, [0, 2, 3], 1), by_hand)
    embed = np.full((4, 4), -0.0, np.float32)
    embed[[0, 2, 3]] = expected["embed"]
    # A norm over the parts of a leaf adds its squares in another order.
    np.testing.assert_allclose(updates["embed"], embed, rtol=1e-5)
    np.testing.assert_allclose(updates["head"], expected["head"], rtol=1e-5)
    assert _bits(updates["embed"][1]) == _bits(embed[1])


MISFITS = {  # the shape of a gradient, and whether it is told without params too
    "other columns": ((4, 5), False),
    "examples of other columns": ((3, 4, 5), False),
    "other rows": ((5, 4), True),
    "fewer axes": ((4,), True),
    "a number": ((), True),
}


@pytest.mark.parametrize(("shape", "without_params"), MISFITS.values(), ids=MISFITS)
def test_a_gradient_that_fits_neither_rows_nor_leaf_is_an_error_with_both_shapes(
    shape, without_params
):
    params = _params()
    tx = fo.freezable(optax.sgd(0.1), fo.rows("embed", [0]))
    state, grads = tx.init(params), params | {"embed": jnp.ones(shape)}
    message = (
        re.escape(f"gradient of 'embed' is of shape {shape}") + ".*3 that train, of a leaf of "
    )
    with pytest.raises(ValueError, match=message + r"shape \(4, 4\)"):
        tx.update(grads, state, params)
    if without_params:
        with pytest.raises(ValueError, match=message + "2 axes"):
            tx.update(grads, state)


def test_trees_whose_rows_are_on_another_axis_are_refused():
    params = _params()
    grads = _grads(params)
    state = fo.freezable(_dpsgd(), fo.rows("embed", [0])).init(params)
    with pytest.raises(ValueError, match="'embed' are frozen, of a leaf of 2 axes, but in the"):
        fo.partition(grads, state)
    with pytest.raises(ValueError, match=r"update of 'embed' is of shape \(4, 4, 4\)"):
        fo.apply_updates(params, grads, state)


TRANSFORMATIONS = {
    "freezable": lambda inner: fo.freezable(inner, ["frozen", "scalar"]),
    "tied": lambda inner: fo.freezable(fo.tie(inner, ("embed", "twin")), ["frozen", "scalar"]),
    "tied rows": lambda inner: fo.freezable(
        fo.tie(inner, ("embed", "twin")),
        ["frozen", "scalar", fo.rows("embed", [0]), fo.rows("twin", [0])],
    ),
    "scheduled": lambda inner: fo.scheduled(
        inner, fo.Phases({0: ["frozen", "scalar", fo.rows("embed", [0])], 1: fo.nothing})
    ),
}


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        pytest.param(TRANSFORMATIONS["freezable"], False, id="eager"),
        *(pytest.param(make, True, id=name) for name, make in TRANSFORMATIONS.items()),
    ],
)
def test_zeros_have_the_shape_of_their_leaf_without_params_too(make, compiled):
    params = _params()
    params["twin"] = params["embed"] + 0
    grads = _grads(params)
    tx = make(_dpsgd())
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    updates, after = update(grads, state)
    with_params, _ = update(grads, state, params)
    assert _bits(updates) == _bits(with_params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    new = optax.apply_updates(params, updates)
    frozen = ("frozen", "scalar")
    assert _bits([new[name] for name in frozen]) == _bits([params[name] for name in frozen])
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.usefixtures("standard_promotion")
def test_aggregators_of_optax_train_the_live_leaves_as_without_freezable():
    aggregating = pytest.importorskip("optax.experimental._aggregating")
    mean = aggregating.Aggregator(
        init=lambda params: optax.EmptyState(),
        update=lambda grads, state, _=None: (jax.tree.map(lambda g: g.mean(0), grads), state),
    )
    inner = aggregating.process(optax.clip(0.5), mean, optax.adam(0.1))
    params = _params()
    grads = _grads(params)
    tx = fo.freezable(inner, ["frozen", "scalar", fo.rows("embed", [1])])
    updates, _ = tx.update(grads, tx.init(params))
    live = [0, 2, 3]
    trainable = _only(params, live, 0)
    expected, _ = inner.update(_only(grads, live, 1), inner.init(trainable))
    assert _bits(_only(updates, live, 0)) == _bits(expected)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_under_shard_map_the_zeros_have_the_shape_of_the_shard():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    params = {"frozen": jnp.ones((4, 2)), "head": jnp.ones((2, 2))}
    tx = fo.freezable(optax.sgd(0.5), "frozen")
    state = tx.init(params)
    update = jax.shard_map(
        lambda grads: tx.update(grads, state)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    updates = jax.jit(update)(params)
    expected = {"frozen": np.full((4, 2), -0.0, np.float32), "head": np.full((2, 2), -0.5, "f")}
    assert _bits(updates) == _bits(expected)


@pytest.mark.parametrize("stacked_init", [True, False], ids=["init outside", "init inside"])
def test_under_vmap_the_zeros_are_those_of_each_model(stacked_init):
    params = {"frozen": jnp.ones((3, 4)), "head": jnp.ones((3, 2))}
    tx = fo.freezable(optax.sgd(0.5), "frozen")
    state = tx.init(params) if stacked_init else jax.vmap(tx.init)(params)
    updates, _ = jax.vmap(tx.update)(params, state)
    expected = {"frozen": np.full((3, 4), -0.0, np.float32), "head": np.full((3, 2), -0.5, "f")}
    assert _bits(updates) == _bits(expected)


def test_a_trace_for_leaves_of_other_ranks_is_not_used_again():
    # Both states are without arrays, and both gradients are of one shape.
    tx = fo.freezable(optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0), "w")
    traces = []

    @jax.jit
    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state)[0]

    grads = {"w": jnp.ones((2, 3)), "x": jnp.ones((2, 3))}
    for shape in ((3,), (2, 3), (3,)):
        state = tx.init({"w": jnp.ones(shape), "x": jnp.ones(shape)})
        assert update(grads, state)["w"].shape == shape
    assert len(traces) == 2


def test_states_of_the_same_ranks_share_a_trace_whatever_their_lengths():
    tx = fo.freezable(optax.sgd(0.1), "w")
    states = [tx.init({"w": jnp.ones(n), "x": jnp.ones(n)}) for n in (2, 3)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    holes = tx.init({"w": optax.MaskedNode(), "x": jnp.ones(2)})
    assert jax.tree.structure(holes) == jax.tree.structure(states[0])


def test_a_pickled_state_keeps_the_ranks_and_a_former_one_without_them_still_fits():
    params = _params()
    tx = fo.freezable(optax.sgd(0.1), ["frozen", fo.rows("embed", [0])])
    state = tx.init(params)
    restored = pickle.loads(pickle.dumps(state))
    updates, _ = tx.update(_grads(params), restored)
    assert updates["frozen"].shape == (2, 4)
    former = pickle.loads(pickle.dumps(state))
    context = copy.copy(former.plan.context)
    del context.leaf_kinds
    former.plan._context = context
    assert jax.tree.structure(former) == jax.tree.structure(state)
    updates, _ = tx.update(params, former)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
