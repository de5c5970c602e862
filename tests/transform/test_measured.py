"""`measured`: the norms are NumPy's on what was recorded, and no update changes by a bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support import measuring, optimizers
from tests.support.compiling import OPTIMISED
from tests.support.measuring import assert_close, by_hand
from tests.support.memories import assert_same_bits

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLE = optax.MaskedNode()
DTYPES = {"single": "float32", "half": "float16", "brain": "bfloat16", "complex": "complex64"}


def make_params() -> Any:
    random = np.random.default_rng(0)

    def draw(dtype: str) -> Any:
        values = random.normal(size=(8, 3)) + 1j * random.normal(size=(8, 3))
        return jnp.asarray(values.real if dtype != "complex64" else values, dtype)

    return {"frozen": draw("float32"), "body": {name: draw(x) for name, x in DTYPES.items()}}


PARAMS = make_params()


def gradient(step: int, params: Any = PARAMS) -> Any:
    """Gradients that differ in size by step and leaf; squared, those in float16 are infinite."""
    sizes = {"half": 300.0, "single": 1e-6}

    def one(path: Any, x: Any) -> Any:
        size = sizes.get(path[-1].key, 1.0) * (1 + step % 3)
        return (x * jnp.asarray(size, x.dtype)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def run(tx: Any, state: Any, steps: range, params: Any = PARAMS) -> tuple[Any, list[Any]]:
    """The state after some steps, and the gradients and updates of each."""
    update, history = jax.jit(tx.update), []
    for step in steps:
        grads = gradient(step, params)
        updates, state = update(grads, state, params)
        history.append((grads, updates))
    return state, history


def body(history: list[Any], *names: str) -> list[Any]:
    """The history of what trains."""
    pick = lambda tree: {"body": {n: tree["body"][n] for n in names or DTYPES}}  # noqa: E731
    return [(pick(grads), pick(updates)) for grads, updates in history]


INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "adam": lambda: optax.adam(optax.linear_schedule(0.1, 0.01, 5)),
    "scale and momentum": lambda: optax.chain(optax.scale(0.5), optax.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("adam", 0.9),
        ("sgd", 0.0),
        pytest.param("sgd", 0.999, marks=pytest.mark.exhaustive),
        pytest.param("scale and momentum", 0.5, marks=pytest.mark.exhaustive),
    ],
)
def test_the_measures_are_those_of_numpy_on_recorded_gradients(name, decay):
    tx = fo.freezable(fo.measured(INNER[name](), decay), "frozen")
    state, history = tx.init(PARAMS), []
    assert {x.steps for x in fo.scores(state).values()} == {0}
    assert np.isnan([x[:4] for x in fo.scores(state).values()]).all()
    for steps in (range(1), range(1, 7)):
        state, more = run(tx, state, steps)
        history += more
        assert_close(fo.scores(state), by_hand(body(history), decay))
    # Each vector is float32, and of what is frozen there is none.
    norms = optax.tree_utils.tree_get(state, "norms")
    assert norms["frozen"] == HOLE
    assert {(x.shape, str(x.dtype)) for x in jax.tree.leaves(norms)} == {((7,), "float32")}


MESHES = [("auto", AxisType.Auto), ("explicit", AxisType.Explicit)]


@pytest.mark.parametrize("kind", [x for _, x in MESHES], ids=[x for x, _ in MESHES])
def test_on_a_mesh_a_norm_is_that_of_the_whole_leaf(kind):
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(kind,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec("x")))
    tx = fo.freezable(fo.measured(optax.adam(0.1)), "frozen")
    with jax.set_mesh(mesh):
        state, history = run(tx, tx.init(params), range(3), params)
        state = fo.thaw(state, params, "frozen")
        state, _ = run(tx, state, range(3, 4), params)
    expected, recorded = run(tx, tx.init(PARAMS), range(3))
    assert_close(by_hand(body(history)), by_hand(body(recorded)))
    expected = fo.thaw(expected, PARAMS, "frozen")
    expected, _ = run(tx, expected, range(3, 4))
    assert_close(fo.scores(state), fo.scores(expected))
    assert fo.scores(state)["frozen"].steps == 1


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_norm_of_many_numbers_has_the_precision_of_float32(jit):
    random = np.random.default_rng(1)
    params = {"w": jnp.asarray(random.normal(size=1_000_000), jnp.float32)}
    tx = fo.measured(optax.sgd(1.0))
    options = dict(OPTIMISED)
    update = jax.jit(tx.update, compiler_options=options) if jit else tx.update
    updates, state = update(params, tx.init(params))
    assert_close(fo.scores(state), by_hand([(params, updates)]))


def test_doubles_are_summed_in_double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        params = {"w": jnp.full(3, 1e25, jnp.float64), "v": jnp.full(3, 1e-30, jnp.complex128)}
        tx = fo.measured(optax.sgd(1.0))
        updates, state = tx.update(params, tx.init(params))
        assert_close(fo.scores(state), by_hand([(params, updates)]))
    finally:
        jax.config.update("jax_enable_x64", before)


# No update changes.


def loss(params: Any) -> jax.Array:
    x = jnp.tanh(jnp.linspace(-1.0, 1.0, 18).reshape(3, 6) @ params["bottom"]["kernel"])
    x = x + params["bottom"]["bias"] * params["middle"]["kernel"][:3] + params["middle"]["bias"]
    return ((x - params["top"]["kernel"][3:] * params["top"]["bias"]) ** 2).mean()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "name"),
    optimizers.cases(optimizers.every(), {"adafactor", "chain", "polyak_sgd"}),
)
def test_no_update_and_no_state_of_the_optimizer_changes_by_a_bit(module, name):
    bare, inner = optimizers.build(module, name), optimizers.build(module, name)
    txs = [fo.freezable(bare, "middle"), fo.freezable(fo.measured(inner), "middle")]
    params = optimizers.params()

    def steps(tx: Any) -> Any:
        def one(params: Any, state: Any) -> Any:
            value, grads = fo.value_and_grad(loss, "middle")(params)
            extra = optimizers.extras(name, loss, value, grads)
            updates, state = tx.update(grads, state, params, **extra)
            return updates, state

        step, state, found = jax.jit(one, compiler_options=dict(OPTIMISED)), tx.init(params), []
        now = params
        for _ in range(3):
            updates, state = step(now, state)
            # Outside of the step, where it is one addition in both runs.
            now = fo.apply_updates(now, updates, frozen="middle")
            found.append((updates, now))
        return found, state

    (expected, bare_state), (found, state) = map(steps, txs)
    assert_same_bits(found, expected)
    if name.startswith("schedule_free"):
        # It adds an update to a state of its own. Some CPUs do so in one rounding if nothing else
        # reads the update.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
            state.inner.state,
            bare_state.inner,
        )
    else:
        assert_same_bits(state.inner.state, bare_state.inner)
    assert {x.steps for x in fo.scores(state).values()} == {3}


def test_in_eager_mode_no_update_changes_by_a_bit():
    bare = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1))
    tx, params = fo.measured(bare), optimizers.params()
    state, plain = tx.init(params), bare.init(params)
    for _ in range(2):
        _, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        expected, plain = bare.update(grads, plain, params)
        assert_same_bits((updates, state.state), (expected, plain))
        params = optax.apply_updates(params, updates)


class _Bare:
    """A transformation whose state is one number, without a node around it."""

    init = staticmethod(lambda _: jnp.zeros(()))

    @staticmethod
    def update(updates: Any, state: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda x: x * state, updates), state + 1


def test_a_bare_number_that_is_the_whole_state_runs_on_after_a_thaw_as_without_it():
    bare = optax.GradientTransformation(_Bare.init, _Bare.update)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    found = []
    for inner in (bare, fo.measured(bare)):
        tx = fo.freezable(inner, "b")
        _, state = tx.update(params, tx.init(params), params)
        updates, _ = tx.update(params, fo.thaw(state, params, "b"), params)
        found.append(updates)
    assert_same_bits(found[1], found[0])
    assert float(found[1]["b"][0]) == 1.0


# What is not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_counts_for_no_average_of_that_leaf(bad):
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    fine = {"a": jnp.full(3, 2.0), "b": jnp.full(3, 3.0)}
    broken = {**fine, "a": fine["a"].at[1].set(bad)}
    for skips in (
        fo.measured(optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5)),
        optax.apply_if_finite(fo.measured(optax.sgd(0.1, momentum=0.9)), 5),
        fo.measured(optax.sgd(0.1)),
    ):
        tx = fo.freezable(skips)
        state, history = tx.init(params), []
        for grads in (broken, fine, broken, fine):
            updates, state = tx.update(grads, state, params)
            history.append((grads, updates))
        good = [history[1], history[3]]
        expected = by_hand([({"a": g["a"]}, {"a": u["a"]}) for g, u in good])
        found = fo.scores(state)
        assert_close({"a": found["a"]}, expected)
        # The other leaf has a gradient in each step, unless all of the step leaves no trace.
        assert found["b"].steps == (2 if hasattr(state.inner, "notfinite_count") else 4)
        assert np.isfinite(found["b"][:4]).all()


def test_a_norm_that_overflows_counts_as_not_finite():
    params = {"w": jnp.full(3, 1e25)}
    tx = fo.measured(optax.sgd(1.0))
    _, state = tx.update(params, tx.init(params))
    assert fo.scores(state)["w"].steps == 0


# Arguments.


def test_arguments_that_are_none_are_an_error_at_once():
    for decay in ("0.9", None, True, jnp.ones(2), 0.5j):
        with pytest.raises(TypeError, match=r"the decay of fo\.measured is a number, not"):
            fo.measured(optax.sgd(0.1), decay)
    for decay in (-0.1, 1.0, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"is 0 or more and less than 1; 0\.9 averages"):
            fo.measured(optax.sgd(0.1), decay)
    with pytest.raises(TypeError, match="measured takes a transformation first"):
        fo.measured(optax.sgd)


def test_a_decay_may_be_injected():
    params = {"frozen": PARAMS["frozen"], "body": {"single": PARAMS["body"]["single"]}}
    for decay in (0.5, 0.0):
        inner = lambda rate, decay: fo.measured(optax.sgd(rate), decay)  # noqa: E731
        tx = fo.freezable(optax.inject_hyperparams(inner)(rate=0.5, decay=decay), "frozen")
        state, history = run(tx, tx.init(params), range(3), params)
        assert_close(fo.scores(state), by_hand(body(history, "single"), decay))


# Groups.

LABELS = {"frozen": "cold", "body": {"single": "x", "half": "x", "brain": "y", "complex": "y"}}


def group_scores(history: list[Any], groups: dict[str, list[str]]) -> Any:
    pick = lambda tree, names: [dict(measuring.paths(tree))[n] for n in names]  # noqa: E731
    norms = {
        label: [[measuring.norm(*pick(tree, names)) for tree in trees] for trees in history]
        for label, names in groups.items()
    }
    return {k: measuring.score([g for g, _ in v], [u for _, u in v]) for k, v in norms.items()}


BY = {
    "tree": LABELS,
    "prefix": {"frozen": "cold", "body": "x"},
    "function": lambda tree: jax.tree.map(lambda x: "x" if x.dtype == np.float32 else "y", tree),
    "by path": fo.groups({"body/{single,half}": "x", "frozen": "cold"}, default="y"),
}
GROUPS = {
    "tree": {"x": ["body/single", "body/half"], "y": ["body/brain", "body/complex"]},
    "prefix": {"x": [f"body/{name}" for name in DTYPES]},
    "function": {"x": ["body/single"], "y": ["body/half", "body/brain", "body/complex"]},
    "by path": {"x": ["body/single", "body/half"], "y": ["body/brain", "body/complex"]},
}


@pytest.mark.parametrize("name", BY)
def test_a_group_has_the_norm_of_its_leaves_that_train(name):
    tx = fo.freezable(fo.measured(optax.sgd(0.1), by=BY[name]), "frozen")
    state, history = run(tx, tx.init(PARAMS), range(3))
    expected, found = group_scores(history, GROUPS[name]), fo.scores(state)
    assert_close({k: found[k] for k in expected}, expected)
    # Of the label of frozen leaves alone there is nothing yet; edits, export and import keep all.
    assert {k: x.steps for k, x in found.items() if k not in expected} in ({}, {"cold": 0})
    again = fo.import_state(tx, PARAMS, fo.export_state(state))
    assert_same_bits(again, state)
    parked = fo.freeze(state, PARAMS, "body/complex", keep_state=True)
    assert_close(fo.scores(parked), found)
    state = fo.thaw(parked, PARAMS, ["frozen", "body/complex"])
    state, more = run(tx, state, range(3, 4))
    if name == "function":
        # The group is larger now, and its norm with it.
        last = measuring.norm(more[0][0]["frozen"], more[0][0]["body"]["single"])
        norms = [measuring.norm(g["body"]["single"]) for g, _ in history]
        expected = measuring.average([*norms, last], 0.9)
        np.testing.assert_allclose(fo.scores(state)["x"].gradient, expected, rtol=1e-6)
    else:
        assert_close({"cold": fo.scores(state)["cold"]}, group_scores(more, {"cold": ["frozen"]}))
    # The state of the bare optimizer and back.
    assert_close(fo.scores(fo.release(state, PARAMS)), fo.scores(state))
    assert_same_bits(fo.adopt(tx, fo.release(state, PARAMS), PARAMS).inner, state.inner)


def test_after_a_thaw_groups_around_a_freezable_are_exact():
    tx = fo.measured(fo.freezable(optax.adam(0.1), "frozen"), by=lambda tree: "all")
    state, history = run(tx, tx.init(PARAMS), range(2))
    state, more = run(tx, fo.thaw(state, PARAMS, "frozen"), range(2, 4))
    names = [path for path, _ in measuring.paths(PARAMS)]
    grads, updates = ([x[i] for x in (*history, *more)] for i in (0, 1))
    expected = group_scores(list(zip(grads, updates, strict=True)), {"all": names})
    assert_close(fo.scores(state), expected)


def test_labels_that_do_not_fit_are_an_error():
    for by, error in (
        ({"frozen": "a"}, "label tree does not fit the tree: it has nothing for"),
        ({"frozen": "a", "body": "b", "more": "c"}, "'more', which the tree does not have"),
    ):
        with pytest.raises(ValueError, match=error):
            fo.freezable(fo.measured(optax.sgd(0.1), by=by)).init(PARAMS)
    with pytest.raises(TypeError, match="'body/brain' an array as its label"):
        fo.measured(optax.sgd(0.1), by=PARAMS).init(PARAMS)
    changing = lambda tree: jax.tree.map(lambda x: str(x.shape), tree)  # noqa: E731
    params = {"w": jnp.ones((4, 2))}
    tx = fo.freezable(fo.measured(optax.sgd(0.1), by=changing), fo.rows("w", [0]))
    with pytest.raises(ValueError, match=r"have '\(3, 2\)' for the gradients, but for the params"):
        tx.update(params, tx.init(params), params)
