"""Layers that take turns, against the same layers frozen by hand, and against a loop of optax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support import by_hand
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEPTH, WIDTH, EVERY = 4, 3, 2
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "embed": jax.random.normal(KEYS[0], (5, WIDTH)),
    "head": jax.random.normal(KEYS[1], (WIDTH, 2)),
    "layers": {
        "b": jax.random.normal(KEYS[2], (DEPTH, WIDTH)),
        "w": jax.random.normal(KEYS[3], (DEPTH, WIDTH, WIDTH)) / 2,
    },
}
# The second turn has a layer of the first, whose moments begin anew.
TURNS = ([0, 2], [1, 2])


def layer(h, weights):
    return h + jnp.tanh(h @ weights["w"] + weights["b"]), None


def loss(params, x, scan=fo.scan, **kwargs):
    h, _ = scan(layer, params["embed"][x], params["layers"], **kwargs)
    return ((h @ params["head"]) ** 2).mean()


def batch(step):
    return jnp.asarray(np.random.default_rng(step).integers(0, 5, 4))


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    odd = [
        jax.tree_util.keystr(path)
        for (path, a), b in pairs
        if a.dtype != b.dtype or np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]
    assert not odd


class Rotating:
    """A step as its user writes it, compiled once; `traces` counts how often it was traced."""

    def __init__(self, tx, loss=loss):
        self.tx, self.traces = tx, 0

        def step(params, state, x):
            self.traces += 1
            value, grads = fo.value_and_grad(loss, frozen=state)(params, x)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates, frozen=state), state, value

        self.plain = step
        self.step = jax.jit(step, donate_argnums=(0, 1))


def of_turns(inner, turns=TURNS, frozen=fo.nothing, every=EVERY, **kwargs):
    return fo.rotating(inner, "layers", len(turns[0]), every, order=turns, frozen=frozen, **kwargs)


INNERS = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clip and adamw": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(0.1, 0.0, 9))
    ),
    "lion": optax.lion(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    # Its state has copies of the params.
    "schedule free": optax.contrib.schedule_free_sgd(0.1, warmup_steps=3),
    "rates": optax.chain(optax.adam(0.1), fo.rates({"layers/w": 0.5})),
    "since thaw": optax.chain(optax.adam(0.1), fo.since_thaw(optax.linear_schedule(0.2, 1.0, 3))),
}


@pytest.mark.parametrize(
    "name",
    cases(
        {name: name for name in INNERS},
        ("clip and adamw", "momentum", "schedule free"),
    ),
)
def test_each_turn_is_bitwise_that_of_layers_frozen_by_hand(name):
    inner = INNERS[name]
    run = Rotating(of_turns(inner))
    by_rows = fo.freezable(inner)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_by_hand(params, state, x):
        still = fo.mask(state, params)["layers"]
        grads = fo.grad(functools.partial(loss, frozen=still), frozen=state)(params, x)
        updates, state = by_rows.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    params, expected = copied(PARAMS), copied(PARAMS)
    state = run.tx.init(params)
    state_by_hand = by_rows.init(expected)
    for step in range(2 * len(TURNS)):
        turn = TURNS[step // EVERY]
        assert state.rows.tolist() == turn
        if step % EVERY == 0:
            if step:  # so that nothing survives of a layer that trains in both turns
                state_by_hand = fo.freeze(state_by_hand, expected, "layers")
            still = fo.rows("layers", [i for i in range(DEPTH) if i not in turn])
            state_by_hand = fo.set_frozen(state_by_hand, expected, still)
        params, state, _ = run.step(params, state, batch(step))
        expected, state_by_hand = step_by_hand(expected, state_by_hand, batch(step))
        assert_same_bits(params, expected)
    assert (run.traces, run.step._cache_size()) == (1, 1)
    assert not np.array_equal(params["layers"]["w"], PARAMS["layers"]["w"])


@pytest.mark.parametrize("name", cases({n: n for n in by_hand.CASES}, ["clip and adamw"]))
def test_each_turn_is_that_of_a_loop_of_optax_with_a_leaf_for_each_layer(name):
    case = by_hand.CASES[name]
    turns = ([2, 3], [0, 1], [2, 3])
    run = Rotating(of_turns(case.inner, turns, "embed"))
    params, state = copied(PARAMS), run.tx.init(PARAMS)
    batches = [batch(step) for step in range(6)]
    for x in batches:
        params, state, _ = run.step(params, state, x)

    def apart(params):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(DEPTH)]
        return {**params, "layers": {str(i): x for i, x in enumerate(layers)}}

    def loss_apart(params, x):
        stack = jax.tree.map(lambda *x: jnp.stack(x), *params["layers"].values())
        return loss({**params, "layers": stack}, x, jax.lax.scan)

    names = {i: {f"layers/{i}/b", f"layers/{i}/w"} for i in range(DEPTH)}
    still = [
        {"embed"}.union(*(names[i] for i in range(DEPTH) if i not in turns[step // EVERY]))
        for step in range(6)
    ]
    expected = by_hand.train(
        case, jax.jit(loss_apart), apart(PARAMS), batches, still, keep_state=False
    )[-1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        apart(params),
        expected,
    )
    fo.testing.assert_frozen(PARAMS, params, "embed")


# Which layers train.


def rows_of(tx, steps, params=PARAMS):
    """The layers that each step trained, told by what it changed, in a scan of steps."""

    def body(carry, _):
        params, state = carry
        # Of the layers, the sign decides what is changed. Nothing is read but the gradient.
        grads = jax.tree.map(jnp.ones_like, params)
        updates, after = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        changed = (new["layers"]["w"] != params["layers"]["w"]).any((1, 2))
        return (new, after), (changed, state.rows)

    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), length=steps)[1]

    changed, rows = jax.jit(run)(params)
    assert [np.flatnonzero(x).tolist() for x in changed] == rows.tolist()
    return rows.tolist()


def in_order(depth, count, is_descending):
    """Blocks as BAdam has them: one after the other, and on from the start where they end."""
    layers = itertools.cycle(reversed(range(depth)) if is_descending else range(depth))
    while True:
        yield sorted(itertools.islice(layers, count))


@pytest.mark.parametrize(("depth", "count"), [(4, 2), (5, 2), (5, 3), (3, 3), (4, 1)])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_blocks_follow_one_another(depth, count, order):
    params = {"layers": {"w": jnp.ones((depth, 2, 2))}}
    tx = fo.rotating(optax.sgd(0.1), "layers", count, 2, order=order)
    expected = itertools.islice(in_order(depth, count, order == "descending"), 7)
    assert rows_of(tx, 14, params) == [block for block in expected for _ in range(2)]


def test_given_blocks_come_up_in_their_order_and_again():
    tx = fo.rotating(optax.sgd(0.1), "layers", 2, 1, order=[[3, 0], [-1, -2], [0, 1]])
    assert rows_of(tx, 7) == [[0, 3], [2, 3], [0, 1], [0, 3], [2, 3], [0, 1], [0, 3]]


@pytest.mark.parametrize(
    ("depth", "count"), cases({"few": (8, 3), "most": (5, 3), "all": (3, 3)}, ["few"])
)
def test_a_random_order_trains_all_layers_alike_and_none_twice_running(depth, count):
    params, turns = {"layers": {"w": jnp.ones((depth, 1, 1))}}, 300
    tx = fo.rotating(optax.sgd(0.1), "layers", count, 1, key=jax.random.key(5))
    rows = rows_of(tx, turns, params)
    assert all(len(set(turn)) == count and turn == sorted(turn) for turn in rows)
    # As few as there have to be.
    again = [len(set(a) & set(b)) for a, b in itertools.pairwise(rows)]
    assert set(again) == {max(0, 2 * count - depth)}
    times = np.bincount(np.ravel(rows), minlength=depth)
    np.testing.assert_allclose(times, turns * count / depth, rtol=0.25)
    if count < depth:
        assert len(set(map(tuple, rows))) > 1
        other = fo.rotating(optax.sgd(0.1), "layers", count, 1, key=jax.random.key(6))
        assert rows_of(other, turns, params) != rows
    assert rows_of(tx, 20, params) == rows[:20]


@pytest.mark.parametrize(
    "key", cases({"raw": jax.random.PRNGKey(5), "rbg": jax.random.key(5, impl="rbg")}, ["raw"])
)
def test_keys_of_any_kind_serve(key):
    tx = fo.rotating(optax.sgd(0.1), "layers", 2, 3, key=key)
    rows = rows_of(tx, 9)
    assert [turn for turn in rows[::3] for _ in range(3)] == rows


# The step.


def test_updates_may_be_applied_by_optax_or_outside_of_jit():
    tx = of_turns(optax.adamw(0.1))

    @jax.jit
    def both(params, state, x):
        updates, state = tx.update(fo.grad(loss, frozen=state)(params, x), state, params)
        ours = fo.apply_updates(params, updates, frozen=state)
        return ours, optax.apply_updates(params, updates), updates, state

    state = tx.init(PARAMS)
    for step in range(3):
        rows = state.rows
        ours, theirs, updates, state = both(PARAMS, state, batch(step))
        assert_same_bits(ours, theirs)
        assert_same_bits(fo.apply_updates(PARAMS, updates, frozen=state), ours)
        still = [i for i in range(DEPTH) if i not in rows]
        fo.testing.assert_frozen(PARAMS, ours, fo.rows("layers", still))
        # The additive identity.
        assert np.signbit(updates["layers"]["w"])[np.array(still)].all()


def test_layers_that_do_not_train_keep_every_bit():
    odd = jnp.array([-0.0, 1e-40, jnp.nan], jnp.float32)
    params = {**PARAMS, "layers": {**PARAMS["layers"], "b": jnp.tile(odd, (DEPTH, 1))}}
    tx = of_turns(optax.adamw(0.1))
    state = tx.init(params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state)

    for run in (step, jax.jit(step)):
        after = run(grads, params, state)
        fo.testing.assert_frozen(params, after, fo.rows("layers", [1, 3]))
        assert np.isnan(after["layers"]["w"][np.array([0, 2])]).all()


def test_gradients_may_be_changed_or_compact_on_their_way():
    tx = of_turns(optax.adam(0.1))
    state, x = tx.init(PARAMS), batch(0)

    @jax.jit
    def updates(params, state):
        whole = fo.grad(loss, frozen=state)(params, x)
        compact = fo.grad(loss, frozen=state, holes=True)(params, x)
        half = jax.tree.map(lambda g: g / 2, whole)
        full = jax.tree.map(lambda g: g + g, half)  # no array that we made
        return [tx.update(g, state, params) for g in (whole, compact, full)]

    first, *others = updates(PARAMS, state)
    for other in others:
        assert_same_bits(other, first)


def test_eager_steps_are_those_under_jit():
    run = Rotating(of_turns(optax.adam(0.1)))
    eager = (copied(PARAMS), run.tx.init(PARAMS))
    jitted = copied(eager)
    for step in range(2):
        *eager, _ = run.plain(*eager, batch(step))
        *jitted, _ = run.step(*jitted, batch(step))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        *map(list, (eager[:1], jitted[:1])),
    )
    assert_same_bits(eager[1].rows, jitted[1].rows)


def test_layers_along_another_axis_and_frozen_leaves_of_the_stack():
    moved = {
        **PARAMS,
        "layers": {"b": PARAMS["layers"]["b"], "w": jnp.moveaxis(PARAMS["layers"]["w"], 0, 2)},
    }
    tx = of_turns(optax.adam(0.1), frozen="layers/b", axis=-1)

    def of_moved(params, x):
        bias = params["layers"]["b"]
        h, _ = fo.scan(
            lambda h, w: (jnp.tanh(h @ w), None), params["embed"][x], params["layers"]["w"], axis=2
        )
        return ((h @ params["head"]) ** 2).mean() + bias.sum()

    run = Rotating(tx, of_moved)
    params, state = copied(moved), tx.init(moved)
    for step in range(3):
        params, state, _ = run.step(params, state, batch(step))
    assert state.state.inner[0].mu["layers"]["w"].shape == (WIDTH, WIDTH, 2)
    changed = (params["layers"]["w"] != moved["layers"]["w"]).any((0, 1))
    assert changed.tolist() == [True, True, True, False]
    fo.testing.assert_frozen(moved, params, "layers/b")


# What is refused.


def make(count=2, every=1, stack="layers", params=PARAMS, **kwargs):
    kwargs = kwargs or {"order": "ascending"}
    return fo.rotating(optax.sgd(0.1), stack, count, every, **kwargs).init(params)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"count": 5}, ValueError, "trains 5 layers at a time, but the stack has 4: 'layers/b'"),
        ({"count": 0}, ValueError, "1 or more, not 0"),
        ({"every": 0}, ValueError, "1 or more, not 0"),
        ({"every": -1}, ValueError, "1 or more, not -1"),
        ({"count": 2.0}, TypeError, "the count of fo.rotating is an integer, not 2.0"),
        ({"every": True}, TypeError, "the every of fo.rotating is an integer, not True"),
        ({"order": "random"}, TypeError, "give key="),
        ({"order": "sideways"}, ValueError, "'ascending', 'descending' or a list of blocks"),
        ({"order": []}, ValueError, "there is no block"),
        ({"order": [[0, 1], [2]]}, ValueError, r"2 different layers, as count=2, but one is \[2\]"),
        ({"order": [[1, 1]]}, ValueError, r"2 different layers, as count=2, but one is \[1, 1\]"),
        (
            {"order": [[0, 4]]},
            ValueError,
            r"the layer 4 in the block \[0, 4\], but the stack has 4",
        ),
        ({"order": [[0, -4]]}, ValueError, r"a layer twice in the block \[0, -4\]"),
        (
            {"stack": ["layers", "head"]},
            ValueError,
            "same number of layers.*'head' has 3; 'layers/b' has 4",
        ),
        ({"stack": "layer"}, ValueError, "pattern 'layer' selects no leaf"),
        ({"stack": fo.rows("layers", [0, 1])}, ValueError, "a stack is of whole leaves"),
        ({"stack": fo.nothing}, ValueError, "nothing of the stack of fo.rotating trains"),
        ({"frozen": "layers", "order": "ascending"}, ValueError, "nothing of the stack"),
        ({"frozen": fo.rows("layers", [0]), "order": "ascending"}, ValueError, "frozen in part"),
        ({"axis": 2, "order": "ascending"}, ValueError, "'layers/b' has no such axis"),
        (
            {"axis": 1, "stack": ["layers", "head"], "order": "ascending"},
            ValueError,
            "'head' has 2",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error_that_names_it(kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


def test_update_says_what_it_lacks():
    tx = of_turns(optax.sgd(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"the update of fo\.rotating needs the params"):
        tx.update(PARAMS, state)
    with pytest.raises(TypeError, match="given a FreezeState for its state, not the RotatingState"):
        tx.update(PARAMS, state.state, PARAMS)
    with pytest.raises(ValueError, match="'extra'"):
        tx.update({**PARAMS, "extra": jnp.ones(1)}, state, PARAMS)
    with pytest.raises(ValueError, match="'head'"):
        tx.update({**PARAMS, "head": None}, state, PARAMS)
    with pytest.raises(ValueError, match=r"one state of fo\.rotating, not several"):
        fo.grad(loss, frozen=[state, state])
    with pytest.raises(TypeError):
        fo.rotating(optax.sgd, "layers", 1, 1, order="ascending")
