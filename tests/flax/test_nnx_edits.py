"""Freezing and thawing in place, in the `nnx.Optimizer` of a training loop."""

import copy
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from freeze_optax import nnx as fnnx
from tests.support import by_hand
from tests.support.nnx_models import BATCH, Tied, loss, params_of, paths_of, plain
from tests.support.sampling import cases

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone, self.middle = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.middle(jnp.tanh(self.backbone(x))))))


ALL = paths_of(params_of(Net()))
ADAM = optax.adam(0.1)


def optimizer_of(model, frozen=fo.nothing, inner=ADAM):
    return nnx.Optimizer(model, fo.freezable(inner, frozen), wrt=nnx.Param)


def below(*nodes):
    return {path for path in ALL if any(f"{path}/".startswith(f"{node}/") for node in nodes)}


def frozen_in(optimizer, model):
    flags = nnx.to_flat_state(fo.mask(optimizer, params_of(model)))
    return {"/".join(map(str, path)) for path, flag in flags if all(jax.tree.leaves(flag))}


def moments(optimizer):
    """The moments by path, of what has any."""
    found = {}
    for name in ("mu", "nu"):
        for path, x in nnx.to_flat_state(optax.tree_utils.tree_get(optimizer.opt_state, name)):
            if jax.tree.leaves(x):
                found[name, "/".join(path)] = x[...]
    return found


def give(model, optimizer, value):
    """A step with the same gradient everywhere, at frozen variables too."""
    optimizer.update(model, jax.tree.map(lambda x: jnp.full_like(x, value), params_of(model)))


def alone(leaf, *values):
    """What a bare Adam of its own makes of one leaf."""
    state = ADAM.init({"leaf": leaf})
    for value in values:
        grads = {"leaf": jnp.full_like(leaf, value)}
        updates, state = ADAM.update(grads, state, {"leaf": leaf})
        leaf = optax.apply_updates({"leaf": leaf}, updates)["leaf"]
    return leaf, state[0]


def assert_close(actual, expected):
    # Optax compiles the bias correction of a tree as one, so its last bit is not of one leaf.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def batch(step):
    return BATCH * (1.0 + 0.1 * step)


def train(optimizer, model, edits, steps):
    """A loop whose jitted step knows nothing of the edits; gives the number of its traces."""
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        _, grads = fnnx.value_and_grad(loss, frozen=optimizer)(model, x)
        optimizer.update(model, grads)

    for i in steps:
        edits.get(i, lambda: None)()
        step(model, optimizer, batch(i))
    return len(traces)


def assert_trained_by_hand(model, frozen, keep_state):
    """That the model is what a loop over plain arrays, an optimizer for each, makes of it."""
    graph, _, rest = nnx.split(Net(), nnx.Param, ...)

    def plain_loss(params, x):
        state = nnx.state(Net(), nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        return loss(nnx.merge(graph, state, rest), x)

    batches = [batch(i) for i in range(len(frozen))]
    case = by_hand.CASES["adam"]
    expected = by_hand.train(case, plain_loss, plain(Net()), batches, frozen, keep_state)[-1]
    actual = plain(model)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, one, other in zip(
        by_hand.paths(expected), *map(jax.tree.leaves, (actual, expected)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("keep_state", cases({"dropped": False, "parked": True}, ["parked"]))
def test_edits_in_a_jitted_loop_equal_a_loop_by_hand_and_retrace_once_each(keep_state):
    model = Net()
    optimizer = optimizer_of(model, "backbone")
    edits = {
        2: lambda: fnnx.thaw(optimizer, model, "backbone/kernel"),
        4: lambda: fnnx.freeze(optimizer, model, fo.of_type(nnx.LayerNorm), keep_state=keep_state),
        6: lambda: fnnx.thaw(optimizer, model, fo.everything),
        8: lambda: fnnx.set_frozen(optimizer, model, "**/bias", keep_state=keep_state),
        10: lambda: fnnx.set_frozen(optimizer, model, "head"),
    }
    traces = train(optimizer, model, edits, range(12))
    phases = [below("backbone"), {"backbone/bias"}, {"backbone/bias"} | below("norm"), set()]
    phases += [{path for path in ALL if path.endswith("bias")}, below("head")]
    assert_trained_by_hand(model, [phases[i // 2] for i in range(12)], keep_state)
    assert traces == 6
    assert frozen_in(optimizer, model) == phases[-1]


def test_going_back_to_a_plan_needs_no_new_trace():
    model = Net()
    optimizer = optimizer_of(model, "backbone")

    def swap(where):
        return lambda: fnnx.set_frozen(optimizer, model, where, keep_state=True)

    fnnx.set_frozen(optimizer, model, fo.nothing)
    park, go_on = swap("backbone"), swap(fo.nothing)
    assert train(optimizer, model, {1: park, 2: go_on, 3: park, 4: go_on}, range(5)) == 2


@pytest.mark.parametrize("resume", [1, 2, 5])
def test_phases_in_a_loop_equal_a_loop_by_hand_and_survive_a_restart(resume):
    by_type = fo.of_type(nnx.Linear, fields=("kernel",))
    phases = fo.Phases({0: ["backbone", "middle"], 2: "backbone", 4: by_type})
    model, traces = Net(), 0
    optimizer = optimizer_of(model, phases.at(0))
    for steps in (range(resume), range(resume, 6)):
        follow = functools.partial(fnnx.set_frozen, optimizer, model)
        edits = {i: functools.partial(follow, phases.at(i)) for i in steps}
        traces += train(optimizer, model, edits, steps)
        model, optimizer = copy.deepcopy((model, optimizer))
    kernels = {path for path in ALL if path.endswith("kernel")}
    frozen = [below("backbone", "middle"), below("backbone"), kernels]
    assert_trained_by_hand(model, [frozen[i // 2] for i in range(6)], False)
    # The step is made anew at a restart, so a phase that it interrupts is traced twice.
    assert traces == (3 if resume == 2 else 4)


def test_survivors_keep_their_very_buffers_and_the_optimizer_its_identity():
    model = Net()
    optimizer = optimizer_of(model, "backbone")
    give(model, optimizer, 0.5)
    held = optimizer
    before = moments(optimizer)
    pointers = {key: x.unsafe_buffer_pointer() for key, x in before.items()}
    fnnx.thaw(optimizer, model, "backbone/kernel")
    fnnx.freeze(optimizer, model, "norm")
    fnnx.freeze(optimizer, model, "middle", keep_state=True)
    after = moments(optimizer)
    assert {path for _, path in after} == ALL - below("norm") - {"backbone/bias"}
    for key, pointer in pointers.items():
        if not key[1].startswith("norm"):
            assert after[key].unsafe_buffer_pointer() == pointer, key
    assert held is optimizer
    assert optimizer.step[...] == 1


def test_moments_are_bitwise_those_of_a_fresh_adam_after_a_thaw_and_of_an_old_one_elsewhere():
    model = Net()
    optimizer = optimizer_of(model, "backbone")
    start = plain(model)
    for value in (0.3, -0.2):
        give(model, optimizer, value)
    fnnx.thaw(optimizer, model, "backbone/kernel")
    for value in (0.5, 0.1):
        give(model, optimizer, value)
    fnnx.freeze(optimizer, model, "middle", keep_state=True)
    give(model, optimizer, float("nan"))
    fnnx.thaw(optimizer, model, "middle")
    found, now = moments(optimizer), plain(model)
    old, new, nan = (0.3, -0.2, 0.5, 0.1), (0.5, 0.1), float("nan")
    for path in ALL - {"backbone/bias"}:
        node, name = path.split("/")
        values = {"backbone": (*new, nan), "middle": old}.get(node, (*old, nan))
        leaf, state = alone(start[node][name], *values)
        assert_close(now[node][name], leaf)
        fo.testing.assert_frozen(state.mu["leaf"], found["mu", path], True)
        fo.testing.assert_frozen(state.nu["leaf"], found["nu", path], True)
    give(model, optimizer, -0.4)
    for name, leaf in start["middle"].items():
        assert_close(plain(model)["middle"][name], alone(leaf, *old, -0.4)[0])
    fo.testing.assert_frozen(start["backbone"]["bias"], plain(model)["backbone"]["bias"], True)


def test_freeze_only_freezes_thaw_only_thaws_and_set_frozen_does_both():
    model = Net()
    optimizer = optimizer_of(model, "backbone")
    fnnx.freeze(optimizer, model, fo.of_type(nnx.LayerNorm, fields=("scale",)))
    assert frozen_in(optimizer, model) == below("backbone", "norm/scale")
    fnnx.thaw(optimizer, model, fo.of_type(nnx.Linear, fields=("bias",)))
    assert frozen_in(optimizer, model) == below("backbone/kernel", "norm/scale")
    fnnx.set_frozen(optimizer, model, fo.by_module(lambda _, path: path == "middle"))
    assert frozen_in(optimizer, model) == below("middle")
    fnnx.set_frozen(optimizer, model, fo.mask("head", params_of(model)))
    assert frozen_in(optimizer, model) == below("head")


def test_an_edit_to_the_standing_plan_changes_nothing():
    model = Net()
    optimizer = optimizer_of(model, "backbone")
    give(model, optimizer, 0.5)
    before = optimizer.opt_state
    fnnx.freeze(optimizer, model, "backbone/kernel", keep_state=True)
    fnnx.thaw(optimizer, model, ["head", fo.of_type(nnx.LayerNorm)])
    fnnx.set_frozen(optimizer, model, ["backbone/*"])
    fnnx.set_frozen(optimizer, model, optimizer)
    assert optimizer.opt_state is before


@pytest.mark.parametrize("wrap", ["chain", "MultiSteps", "ModelAndOptimizer"])
def test_the_state_is_found_wherever_it_is(wrap):
    model = Net()
    tx = fo.freezable(ADAM, "backbone")
    if wrap == "chain":
        tx = optax.chain(optax.clip(1.0), tx)
    if wrap == "MultiSteps":
        tx = optax.MultiSteps(tx, 2)
    kind = nnx.ModelAndOptimizer if wrap == "ModelAndOptimizer" else nnx.Optimizer
    optimizer = kind(model, tx, wrt=nnx.Param)
    fnnx.set_frozen(optimizer, model, "head")
    before = plain(model)
    for _ in range(2):
        grads = fnnx.grad(loss, optimizer)(model)
        optimizer.update(*([grads] if kind is nnx.ModelAndOptimizer else [model, grads]))
    fo.testing.assert_frozen(before, plain(model), "head")
    with pytest.raises(AssertionError, match="6 frozen leaves are not"):
        fo.testing.assert_frozen(before, plain(model), True)


def test_an_edit_inside_a_jitted_function_reaches_the_optimizer():
    model = Net()
    optimizer = optimizer_of(model, "backbone")

    @nnx.jit
    def thaw(model, optimizer):
        fnnx.thaw(optimizer, model, "backbone/bias")

    give(model, optimizer, 0.3)
    start = plain(model)["backbone"]["bias"]
    thaw(model, optimizer)
    assert frozen_in(optimizer, model) == below("backbone/kernel")
    give(model, optimizer, 0.5)
    assert_close(plain(model)["backbone"]["bias"], alone(start, 0.5)[0])


def test_what_an_edit_makes_looks_like_what_an_optimizer_starts_with():
    model = Net()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    model.backbone.kernel = nnx.Param(jax.device_put(model.backbone.kernel[...], split), tag="x")
    fresh, edited = optimizer_of(model), optimizer_of(model, "backbone")
    fnnx.thaw(edited, model, "backbone")
    for name in ("mu", "nu"):
        states = [optax.tree_utils.tree_get(o.opt_state, name) for o in (fresh, edited)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        for (path, one), (_, other) in zip(*map(nnx.to_flat_state, states), strict=True):
            assert type(one) is type(other), path
            assert one.get_metadata() == other.get_metadata(), path
        fo.testing.assert_frozen(*states, True)
        made = moments(edited)[name, "backbone/kernel"].sharding
        assert made.is_equivalent_to(split, 2)


def test_a_shared_variable_is_edited_by_any_of_its_paths_and_counts_once():
    for where, expected in {
        "head/kernel": {"a/kernel"},
        "head": {"a/kernel", "head/bias"},
        fo.by_module(lambda _, path: path == "head"): {"a/kernel", "head/bias"},
        fo.of_type(nnx.Linear, fields=("kernel",)): {"a/kernel", "out/kernel"},
    }.items():
        model = Tied()
        optimizer = optimizer_of(model)
        fnnx.freeze(optimizer, model, where)
        assert frozen_in(optimizer, model) == expected
        assert {path for _, path in moments(optimizer)} == paths_of(params_of(model)) - expected
        before = plain(model)
        optimizer.update(model, fnnx.grad(loss, optimizer)(model))
        fo.testing.assert_frozen(before, plain(model), sorted(expected))
        assert model.head.kernel is model.a.kernel
        fnnx.thaw(optimizer, model, where)
        assert frozen_in(optimizer, model) == set()
        fnnx.set_frozen(optimizer, model, where)
        assert frozen_in(optimizer, model) == expected


class Grouped(nnx.Module):
    """Variables that hold trees, between others."""

    def __init__(self):
        self.a, self.d = (nnx.Param({"x": jnp.ones(2), "y": jnp.ones(3)}) for _ in range(2))
        self.b, self.c = nnx.Param(jnp.ones(4)), nnx.Param(jnp.array(3))


@pytest.mark.parametrize("where", ["a", "b", "d", "a/y"])
@pytest.mark.parametrize("edit", [fnnx.freeze, fnnx.set_frozen])
def test_the_state_of_a_tree_in_a_variable_can_not_be_edited(edit, where):
    model = Grouped()
    optimizer = optimizer_of(model)
    before = jax.tree.leaves(optimizer.opt_state)
    with pytest.raises(ValueError, match="a tree in an NNX Variable can't be edited"):
        edit(optimizer, model, where)
    assert all(map(operator.is_, before, jax.tree.leaves(optimizer.opt_state)))


MISTAKES = {
    "the wrong order": (
        lambda edit, optimizer, model: edit(model, optimizer, "head"),
        (TypeError, r"takes an nnx.Optimizer first, not a Net: \w+\(optimizer, model, \.\.\.\)"),
    ),
    "a state for the model": (
        lambda edit, optimizer, model: edit(optimizer, nnx.state(model), "head"),
        (TypeError, "an NNX module is needed here, not a State"),
    ),
    "the state for the optimizer": (
        lambda edit, optimizer, model: edit(optimizer.opt_state, model, "head"),
        (TypeError, "takes an nnx.Optimizer first, not a FreezeState"),
    ),
    "another model": (
        lambda edit, optimizer, model: edit(optimizer, Tied(), "head"),
        (ValueError, "different params: only in the params: 'a/bias'.*; only in the state: 'back"),
    ),
    "a typo": (
        lambda edit, optimizer, model: edit(optimizer, model, ["head", "backbon"]),
        (ValueError, "'backbon' selects no leaf; nearest: 'backbone'"),
    ),
    "a type that is not there": (
        lambda edit, optimizer, model: edit(optimizer, model, fo.of_type(nnx.Conv)),
        (ValueError, r"of_type\(Conv\): no module is a Conv"),
    ),
}


@pytest.mark.parametrize("edit", [fnnx.freeze, fnnx.thaw, fnnx.set_frozen])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_and_changes_nothing(mistake, edit):
    call, (error, message) = MISTAKES[mistake]
    model = Net()
    optimizer = optimizer_of(model, "backbone")
    state, before = optimizer.opt_state, plain(optimizer)
    with pytest.raises(error, match=message):
        call(edit, optimizer, model)
    assert optimizer.opt_state is state
    fo.testing.assert_frozen(before, plain(optimizer), True)


@pytest.mark.parametrize(
    ("tx", "error", "message"),
    [
        (ADAM, TypeError, "holds no FreezeState"),
        (fo.scheduled(ADAM, fo.Phases({0: "head"})), ValueError, "follows its phases"),
        (fo.freezable(optax.flatten(ADAM)), ValueError, "flatten can't be edited"),
        (
            optax.chain(fo.freezable(ADAM), fo.freezable(ADAM, "head")),
            ValueError,
            "2 FreezeStates, not one; edit one of them",
        ),
    ],
    ids=["plain", "scheduled", "flattened", "two"],
)
def test_an_optimizer_that_cannot_be_edited_says_why(tx, error, message):
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = optimizer.opt_state
    for edit in (fnnx.freeze, fnnx.set_frozen):
        with pytest.raises(error, match=message):
            edit(optimizer, model, "backbone")
    assert optimizer.opt_state is state
