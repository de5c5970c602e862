"""Phases in one compiled program: the numbers of the host loop, and no work for what is frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support import by_hand
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Each leaf has a shape of its own, so that one can tell in a program whose work it does.
SHAPES = {"embed": (3, 4), "encoder": {"a": (4, 5), "b": (5, 6)}, "head": (6, 2)}
# Trained from the start (head), thawed later (b, then a), frozen again (b), and never (embed).
PHASES = fo.Phases({0: ("embed", "encoder"), 2: ("embed", "encoder/a"), 5: ("embed", "encoder/b")})
FIRST, SECOND, THIRD = {"encoder/a", "encoder/b"}, {"encoder/a"}, {"encoder/b"}
FROZEN = [{"embed", *still} for still in [FIRST] * 2 + [SECOND] * 3 + [THIRD] * 3]
AND_THAWED_AGAIN = fo.Phases({**dict(zip(PHASES.starts, PHASES.specs, strict=True)), 8: "embed"})
FROZEN_AND_THAWED_AGAIN = [*FROZEN, {"embed"}, {"embed"}]


def make_params() -> Any:
    random = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def batch(step: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (4, 3))


def loss(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["embed"])
    x = jnp.tanh(jnp.tanh(x @ params["encoder"]["a"]) @ params["encoder"]["b"])
    return ((x @ params["head"]) ** 2).mean()


def make_step(tx: Any) -> Any:
    def step(params, state, x):
        grads = fo.grad(loss, frozen=state)(params, x)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    return step


def scan(tx: Any, params: Any, steps: int, step: Any = None) -> tuple[Any, Any]:
    """The params after each step, and the last state, of one compiled program."""
    step = step or make_step(tx)

    def body(carry, i):
        params, state = step(*carry, batch(i))
        return (params, state), params

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(steps)))
    (_, state), history = run((params, tx.init(params)))
    return [jax.tree.map(lambda x, i=i: x[i], history) for i in range(steps)], state


def assert_close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-5, atol=1e-6), ours, theirs)


# A norm over all leaves, a schedule, and moments without a count.
ALWAYS = ("clip and adamw", "cosine", "momentum")


@pytest.mark.parametrize("name", cases({x: x for x in by_hand.CASES}, ALWAYS))
def test_a_scan_equals_optimizers_kept_per_leaf_by_hand(name):
    case, params, steps = by_hand.CASES[name], make_params(), len(FROZEN_AND_THAWED_AGAIN)
    ours, _ = scan(fo.scheduled(case.inner, AND_THAWED_AGAIN), params, steps)
    batches = [batch(step) for step in range(steps)]
    theirs = by_hand.train(case, loss, params, batches, FROZEN_AND_THAWED_AGAIN, keep_state=True)
    assert_close(ours, theirs[1:])


@pytest.mark.parametrize("name", cases({x: x for x in by_hand.CASES}, ALWAYS))
def test_a_scan_equals_the_host_loop_that_keeps_state(name):
    inner, params, steps = by_hand.CASES[name].inner, make_params(), len(FROZEN_AND_THAWED_AGAIN)
    ours, _ = scan(fo.scheduled(inner, AND_THAWED_AGAIN), params, steps)
    tx = fo.freezable(inner, AND_THAWED_AGAIN.at(0))
    state, step, theirs = tx.init(params), jax.jit(make_step(tx)), []
    for i in range(steps):
        state = fo.set_frozen(state, params, AND_THAWED_AGAIN.at(i), keep_state=True)
        params, state = step(params, state, batch(i))
        theirs.append(params)
    assert_close(ours, theirs)


def test_one_trace_serves_all_phases():
    tx, params, traces = fo.scheduled(optax.adam(0.1), PHASES), make_params(), []

    def step(params, state, x):
        traces.append(1)
        return make_step(tx)(params, state, x)

    scan(tx, params, len(FROZEN), step)
    assert len(traces) == 1
    stepped, state = jax.jit(step), tx.init(params)
    for i in range(len(FROZEN)):
        params, state = stepped(params, state, batch(i))
    assert len(traces) == 2
    assert int(state.step) == len(FROZEN)


def test_only_leaves_that_some_phase_trains_have_state():
    params, frozen_at_last = make_params(), fo.Phases({0: fo.everything, 2: ("embed", "head")})
    state = fo.scheduled(optax.adam(0.1), frozen_at_last).init(params)
    shapes = jax.tree.map(jnp.shape, optax.tree_utils.tree_get(state, "mu"))
    hole = optax.MaskedNode()
    assert shapes == {"embed": hole, "encoder": SHAPES["encoder"], "head": hole}


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", by_hand.CASES)
def test_the_state_is_that_of_the_bare_optimizer_and_counters(name):
    inner, params = by_hand.CASES[name].inner, make_params()
    ours = nbytes(fo.scheduled(inner, PHASES).init(params))
    bare = nbytes(inner.init({name: params[name] for name in ("encoder", "head")}))
    # The step, and at most one count of its own for each further leaf.
    assert bare < ours <= bare + 4 * (1 + 2)


# A signalling NaN, which arithmetic would turn into another.
NAN = np.array([0x7FA12345], np.uint32).view(np.float32)[0]
ODD = {
    "fo": (fo.apply_updates, [-0.0, np.inf, 1e-40, -1e-45, NAN]),
    # Which adds: a CPU flushes subnormal numbers then.
    "optax": (lambda params, updates, frozen: optax.apply_updates(params, updates), [-0.0, np.inf]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_phase_freezes_keeps_every_bit_whatever_its_gradient_is(name):
    apply, odd = ODD[name]
    params = jax.tree.map(np.array, make_params())
    for leaf in jax.tree.leaves(params):
        leaf.flat[: len(odd)] = np.array(odd, np.float32)
    params = jax.tree.map(jnp.asarray, params)
    tx = fo.scheduled(optax.adamw(0.1, weight_decay=0.1), PHASES)

    @jax.jit
    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return apply(params, updates, frozen=state), state

    state = tx.init(params)
    for i, still in enumerate(FROZEN):
        grads = by_path(params, lambda p, x, s=still: jnp.full_like(x, np.nan if p in s else 1.0))
        before, (params, state) = params, step(params, grads, state)
        fo.testing.assert_frozen(before, params, PHASES.at(i))
        moved = jax.tree.map(lambda x, y: x.tobytes() != y.tobytes(), before, params)
        assert moved == by_path(params, lambda p, _, s=still: p not in s)


def by_path(tree: Any, function: Any) -> Any:
    values = map(function, by_hand.paths(tree), jax.tree.leaves(tree))
    return jax.tree.unflatten(jax.tree.structure(tree), list(values))


def test_leaves_that_never_train_are_bit_identical_after_a_scan():
    params = make_params()
    history, _ = scan(fo.scheduled(optax.adamw(0.1), PHASES), params, len(FROZEN))
    fo.testing.assert_frozen(params, history[-1], "embed")
    assert not np.array_equal(params["encoder"]["a"], history[-1]["encoder"]["a"])


def equations(jaxpr: Any) -> Any:
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def switch_branches(function: Any, *args: Any) -> list[Any]:
    """The branches of the one switch in a function, and nothing of weight may be beside it."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    (switch,) = [e for e in program.eqns if e.primitive.name == "cond"]
    beside = [e.primitive.name for e in program.eqns if e is not switch]
    assert not {"dot_general", "sqrt"} & set(beside)
    return [branch.jaxpr for branch in switch.params["branches"]]


def count(jaxpr: Any, primitive: str) -> int:
    return sum(e.primitive.name == primitive for e in equations(jaxpr))


@pytest.mark.parametrize("has_aux", [False, True], ids=["", "has_aux"])
def test_each_phase_has_the_backward_pass_of_what_it_trains(has_aux):
    params, x = make_params(), batch(0)
    state = fo.scheduled(optax.adam(0.1), AND_THAWED_AGAIN).init(params)

    def fun(params, x):
        return (loss(params, x), x.sum()) if has_aux else loss(params, x)

    gradient = fo.value_and_grad(fun, frozen=state, has_aux=has_aux)
    branches = switch_branches(gradient, params, x)
    # Four products forward; backward one for the head; of b, its own and that through the head;
    # of a, its own and that through b. With b frozen, its own is not there.
    assert [count(branch, "dot_general") for branch in branches] == [5, 7, 8, 9]


def test_each_phase_updates_what_it_trains_and_nothing_else():
    params, tx = make_params(), fo.scheduled(optax.adam(0.1), PHASES)
    branches = switch_branches(tx.update, params, tx.init(params), params)
    worked = [
        {e.outvars[0].aval.shape for e in equations(branch) if e.primitive.name == "sqrt"}
        for branch in branches
    ]
    a, b, head = SHAPES["encoder"]["a"], SHAPES["encoder"]["b"], SHAPES["head"]
    assert worked == [{head}, {head, b}, {head, a}]
    # One leaf, one cohort: once. What runs for several cohorts is merged by the compiler.
    assert count(branches[0], "sqrt") == 1


def test_an_update_has_no_products_for_a_phase_that_has_no_matrix_to_train():
    squared = optax.stateless(lambda u, _: jax.tree.map(lambda x: x @ (x.T @ x), u))
    inner, params = optax.chain(squared, optax.sgd(0.1, momentum=0.9)), make_params()
    phases = fo.Phases({0: "*", 1: ("embed", "encoder"), 2: "embed", 3: fo.nothing})
    tx = fo.scheduled(inner, phases)
    branches = switch_branches(tx.update, params, tx.init(params), params)
    assert [count(branch, "dot_general") > 0 for branch in branches] == [False, True, True, True]


def test_the_compiled_program_branches_and_does_not_do_the_work_of_all_phases():
    params, tx = make_params(), fo.scheduled(optax.adam(0.1), PHASES)
    lowered = jax.jit(make_step(tx)).lower(params, tx.init(params), batch(0))
    # One for the gradient, one for the update.
    assert lowered.compile().as_text().count(" conditional(") == 2


@pytest.mark.parametrize("phase", range(4))
def test_value_and_gradient_of_each_phase_are_those_of_bare_jax(phase):
    params, x = make_params(), batch(0)
    start = AND_THAWED_AGAIN.starts[phase]
    state = fo.scheduled(optax.adam(0.1), AND_THAWED_AGAIN).init(params)
    state = state._replace(step=jnp.int32(start))

    def fun(params, x, *, scale):
        return loss(params, x) * scale, {"x": x}

    differentiate = jax.jit(fo.value_and_grad(fun, frozen=state, has_aux=True))
    (value, aux), grads = differentiate(params, x, scale=2.0)
    (bare, _), whole = jax.value_and_grad(fun, has_aux=True)(params, x, scale=2.0)
    still = FROZEN_AND_THAWED_AGAIN[start]
    expected = by_path(whole, lambda path, g: jnp.zeros_like(g) if path in still else g)
    np.testing.assert_allclose(value, bare, rtol=1e-6)
    assert_close(grads, expected)
    fo.testing.assert_frozen(jax.tree.map(jnp.zeros_like, params), grads, tuple(still))
    fo.testing.assert_frozen({"x": x}, aux, True)


def test_holes_are_an_error_as_the_structure_of_a_gradient_can_not_follow_the_phase():
    state = fo.scheduled(optax.adam(0.1), PHASES).init(make_params())
    with pytest.raises(ValueError, match=r"fo\.scheduled.*leave holes out"):
        fo.value_and_grad(loss, frozen=state, holes=True)


def test_a_gradient_for_the_state_of_other_params_is_an_error_that_names_the_paths():
    state = fo.scheduled(optax.adam(0.1), fo.Phases({0: "a"})).init({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"different params: .*'embed'.*'a', 'b'"):
        fo.grad(loss, frozen=state)(make_params(), batch(0))


def test_it_works_in_a_chain_and_its_state_is_found_there():
    params, steps = make_params(), len(FROZEN)
    tx = optax.chain(optax.clip(0.01), fo.scheduled(optax.adam(0.1), PHASES), optax.scale(0.5))
    ours, state = scan(tx, params, steps)

    # Has the gradient of the loss, clipped by element as the chain clips it.
    def clipped(params, x):
        clip = lambda g: jax.lax.stop_gradient(jnp.clip(g, -0.01, 0.01))  # noqa: E731
        terms = jax.tree.map(lambda p, g: (p * clip(g)).sum(), params, jax.grad(loss)(params, x))
        return sum(jax.tree.leaves(terms))

    case = by_hand.CASES["adam"]._replace(rate=lambda step: 0.05)
    batches = [batch(step) for step in range(steps)]
    assert_close(ours, by_hand.train(case, clipped, params, batches, FROZEN, True)[1:])
    gradient = fo.value_and_grad(loss, frozen=state)
    assert [count(b, "dot_general") for b in switch_branches(gradient, params, batch(0))] == [
        5,
        7,
        8,
    ]


def test_a_phase_may_freeze_everything_while_schedules_run_on():
    phases = fo.Phases({0: True, 2: fo.nothing})
    case, params, steps = by_hand.CASES["cosine"], make_params(), 4
    ours, _ = scan(fo.scheduled(case.inner, phases), params, steps)
    fo.testing.assert_frozen(params, ours[1], True)
    frozen = [set(by_hand.paths(params))] * 2 + [set()] * 2
    batches = [batch(step) for step in range(steps)]
    assert_close(ours, by_hand.train(case, loss, params, batches, frozen, True)[1:])


def test_leaves_that_can_not_be_trained_pass_through_every_phase():
    others = {"steps": jnp.arange(2), "key": jax.random.key(0), "mask": jnp.array([True, False])}
    ours, _ = scan(fo.scheduled(optax.adam(0.1), PHASES), {**make_params(), **others}, len(FROZEN))
    without, _ = scan(fo.scheduled(optax.adam(0.1), PHASES), make_params(), len(FROZEN))
    fo.testing.assert_frozen({**without[-1], **others}, ours[-1], True)


def test_an_inner_that_gives_float32_for_bfloat16_params_is_applied_in_every_phase():
    widened = optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype(jnp.float32), u))
    tx = fo.scheduled(optax.chain(widened, optax.sgd(0.5)), fo.Phases({0: "a", 1: "b", 2: "c"}))
    params = {name: jnp.full(2, 1.0, jnp.bfloat16) for name in "abc"}
    state, update = tx.init(params), jax.jit(tx.update)
    for frozen in "abc":
        updates, state = update(params, state, params)
        expected = {name: 0.0 if name == frozen else -0.5 for name in "abc"}
        assert {name: x.dtype for name, x in updates.items()} == dict.fromkeys("abc", jnp.float32)
        assert {name: float(x[0]) for name, x in updates.items()} == expected
    new = fo.apply_updates(params, updates, frozen=state)
    expected = {**dict.fromkeys("ab", jnp.full(2, 0.5, jnp.bfloat16)), "c": params["c"]}
    fo.testing.assert_frozen(expected, new, True)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_structure_and_types_of_the_state_never_change(jit):
    params, tx = make_params(), fo.scheduled(by_hand.CASES["cosine"].inner, PHASES)
    abstract, state = jax.eval_shape(tx.init, params), tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    for _ in range(3):
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        assert kinds(state) == kinds(abstract)
        _, state = update(params, state, params)


def test_tree_map_params_maps_the_moments_and_nothing_else():
    params, tx, traces = make_params(), fo.scheduled(optax.adam(0.1), PHASES), []

    @jax.jit
    def step(params, state, x):
        traces.append(1)
        return make_step(tx)(params, state, x)

    state = tx.init(params)
    step(params, state, batch(0))
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    step(params, mapped, batch(0))
    assert len(traces) == 1
    for moment in ("mu", "nu"):
        old, new = (optax.tree_utils.tree_get(x, moment) for x in (state, mapped))
        fo.testing.assert_frozen(jax.tree.map(jnp.ones_like, old), new, True)
        assert [x.shape for x in jax.tree.leaves(new)] == [(4, 5), (5, 6), (6, 2)]
    counters = [x for x in jax.tree.leaves(mapped) if x.dtype == jnp.int32]
    assert len(counters) == len(jax.tree.leaves(mapped)) - 2 * 3
    assert not any(x.any() for x in counters)


def plain_state(params: Any) -> Any:
    return optax.adam(0.1).init(params)


def freeze_state(params: Any) -> Any:
    return fo.freezable(optax.adam(0.1), "embed").init(params)


@pytest.mark.parametrize(
    ("make", "name"),
    [(plain_state, "tuple"), (freeze_state, "FreezeState"), (lambda params: params, "dict")],
)
def test_update_with_a_state_of_another_kind_is_an_error(make, name):
    params, tx = make_params(), fo.scheduled(optax.adam(0.1), PHASES)
    with pytest.raises(TypeError, match=rf"given a {name} .*the ScheduledState that init gives"):
        tx.update(params, make(params), params)


@pytest.mark.parametrize(
    "edit",
    [fo.freeze, fo.thaw, fo.set_frozen, lambda state, params, _: fo.release(state, params)],
    ids=["freeze", "thaw", "set_frozen", "release"],
)
def test_the_state_follows_its_phases_and_can_not_be_edited(edit):
    params = make_params()
    state = fo.scheduled(optax.adam(0.1), PHASES).init(params)
    with pytest.raises(ValueError, match=r"fo\.scheduled follows its phases; it can't be edited"):
        edit(state, params, "encoder")


def test_a_first_phase_that_leaves_the_first_step_open_is_an_error():
    with pytest.raises(ValueError, match=r"step 0 is before the first phase, which begins at 3"):
        fo.scheduled(optax.adam(0.1), fo.Phases({3: "encoder"}))


def test_init_names_the_phase_that_does_not_fit_the_params():
    tx = fo.scheduled(optax.adam(0.1), fo.Phases({0: "encoder", 7: "encodr/a"}))
    with pytest.raises(ValueError, match=r"in the phase from step 7 on: .*'encodr/a' selects no"):
        tx.init(make_params())
