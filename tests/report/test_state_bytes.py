"""The bytes of optimizer state in a summary, against states that are really allocated."""

import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from tests.support import optimizers
from tests.support.nnx_models import Net, params_of

pytestmark = pytest.mark.usefixtures("standard_promotion")

SPECS = {
    "leaves": ("middle", "top/bias"),
    "rows": (fo.rows("bottom/kernel", slice(0, 2)), "middle/bias"),
}


def nbytes(tree: Any) -> int:
    """What the arrays of a concrete tree really take."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays]
    raw = [jax.random.key_data(x) if k else x for x, k in zip(arrays, keys, strict=True)]
    return sum(x.nbytes for x in raw)


def bytes_of(params: Any, *args: Any, **kwargs: Any) -> tuple[int | None, int | None]:
    summary = fo.summary(params, *args, **kwargs)
    return summary.state_bytes, summary.saved_bytes


def by_row(params: Any, *args: Any) -> dict[str, int | None]:
    return {row.path: row.state_bytes for row in fo.summary(params, *args, depth=9).rows}


def small() -> dict[str, Any]:
    return {"body": {"b": jnp.ones(3), "w": jnp.ones((2, 3))}, "head": jnp.ones(5)}


def initialised(inner: Any, spec: Any, params: Any) -> Any:
    """The state of params with these frozen, in memory."""
    return fo.freezable(inner, spec).init(params)


EVERY = pytest.mark.parametrize(
    ("module", "name"), optimizers.cases(optimizers.every(), optimizers.FEW_KINDS | {"MultiSteps"})
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@EVERY
def test_the_bytes_are_those_of_the_states_that_are_really_allocated(module, name, spec):
    params, tx = optimizers.params(), optimizers.build(module, name)
    now = nbytes(initialised(tx, spec, params))
    saved = nbytes(initialised(tx, fo.nothing, params)) - now
    assert bytes_of(params, spec, tx) == (now, saved)
    assert bytes_of(jax.eval_shape(lambda: params), spec, tx) == (now, saved)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@EVERY
def test_leaves_that_cannot_be_trained_have_no_state(module, name):
    params, tx = optimizers.params(), optimizers.build(module, name)
    others = {"flags": np.ones(2, "?"), "key": jax.random.key(0), "steps": jnp.ones(3, jnp.int32)}
    now = nbytes(initialised(tx, "middle", params))
    saved = nbytes(initialised(tx, fo.nothing, params)) - now
    params = {**params, "odd": others}
    assert nbytes(initialised(tx, "middle", params)) == now
    assert bytes_of(params, "middle", tx) == (now, saved)


WITHOUT_ARRAYS = {"function": jnp.tanh, "text": "gelu", "class": jnp.float32}


@pytest.mark.parametrize("leaf", WITHOUT_ARRAYS.values(), ids=WITHOUT_ARRAYS)
def test_leaves_that_are_no_arrays_have_no_state(leaf):
    params = {**small(), "odd": leaf}
    assert nbytes(initialised(optax.adam(0.1), "body", params)) == 4 + 2 * 20
    for tx in (optax.adam(0.1), fo.freezable(optax.adam(0.1))):
        assert bytes_of(params, "body", tx) == (44, 2 * 36)


def test_an_equinox_model_has_the_bytes_of_its_arrays():
    model = eqx.nn.MLP(2, 2, width_size=3, depth=1, key=jax.random.key(0))
    now = nbytes(initialised(optax.adam(0.1), "layers/0", model))
    assert now == 4 + 2 * 4 * 8
    for tx in (fo.freezable(optax.adam(0.1)), optax.adam(0.1)):
        assert bytes_of(model, "layers/0", tx) == (now, 2 * 4 * 9)


SOME = ["adam", "adafactor", "scale_by_lbfgs", "masked", "partition", "inject_hyperparams"]
SOME += ["MultiSteps", "novograd", "sgd"]
PATHS = [f"{layer}/{name}" for layer in ("bottom", "middle", "top") for name in ("bias", "kernel")]


@pytest.mark.parametrize("name", SOME)
def test_each_leaf_has_the_bytes_that_freezing_all_others_leaves(name):
    params, tx = optimizers.params(), optimizers.build(optax, name)
    with pytest.warns(UserWarning, match="nothing"):
        least = nbytes(initialised(tx, fo.everything, params))
    alone = {path: nbytes(initialised(tx, ~fo.path(path), params)) - least for path in PATHS}
    rows = by_row(params, fo.nothing, tx)
    assert {path: rows[path] for path in PATHS} == alone
    assert rows["top"] == alone["top/bias"] + alone["top/kernel"]
    frozen = by_row(params, "middle", tx)
    expected = {path: 0 if path.startswith("middle") else alone[path] for path in PATHS}
    assert {path: frozen[path] for path in PATHS} == expected


def test_the_bytes_of_adam_by_hand():
    summary = fo.summary(small(), "body/w", optax.adam(0.1), depth=2)
    table = [(row.path, row.state_bytes, row.saved_bytes) for row in summary.rows]
    assert table == [
        ("body", 24, 48),
        ("body/b", 24, 0),
        ("body/w", 0, 48),
        ("head", 40, 0),
    ]
    # A moment is two floats for each parameter; the step counter is nobody's.
    assert (summary.state_bytes, summary.saved_bytes) == (24 + 40 + 4, 48)


def test_where_a_part_mixes_the_leaves_only_the_whole_is_known():
    params, tx = small(), optax.flatten(optax.adam(0.1))
    now = nbytes(initialised(tx, "body", params))
    assert now == 4 + 2 * 20
    summary = fo.summary(params, "body", tx, depth=1)
    assert (summary.state_bytes, summary.saved_bytes) == (now, 2 * 36)
    assert [(row.state_bytes, row.saved_bytes) for row in summary.rows] == [(None, None)] * 2
    assert str(summary).splitlines()[0].split() == ["parameters", "bytes"]


def test_without_an_optimizer_no_bytes_of_state_are_known():
    summary = fo.summary(small(), "body")
    assert (summary.state_bytes, summary.saved_bytes) == (None, None)
    assert {(row.state_bytes, row.saved_bytes) for row in summary.rows} == {(None, None)}
    assert "optimizer" not in str(summary)
    assert "optimizer" not in summary.to_markdown()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec", [True, fo.everything, "**"])
def test_all_frozen_saves_all_statistics_and_warns_of_nothing(spec):
    assert bytes_of(small(), spec, optax.adam(0.1)) == (4, 2 * 56)


ADAM = optax.adam(0.1)


def _thawed() -> Any:
    return fo.thaw(_stepped(initialised(ADAM, "body", small())), small(), "body/b")


def _stepped(state: Any) -> Any:
    return fo.freezable(ADAM).update(small(), state, small())[1]


EDITED = {
    "fresh": lambda: initialised(ADAM, "body", small()),
    "stepped": lambda: _stepped(initialised(ADAM, "body", small())),
    "two cohorts": _thawed,
    "three cohorts": lambda: fo.thaw(_stepped(_thawed()), small(), "body/w"),
    "parked": lambda: fo.freeze(_thawed(), small(), "head", keep_state=True),
    "dropped": lambda: fo.freeze(_thawed(), small(), "head"),
    "rows": lambda: initialised(ADAM, fo.rows("head", [0, 2]), small()),
    "rows in two cohorts": lambda: fo.thaw(
        _stepped(initialised(ADAM, fo.rows("head", slice(0, 3)), small())),
        small(),
        fo.rows("head", [1]),
    ),
    "rows parked": lambda: fo.freeze(
        _stepped(initialised(ADAM, "body", small())), small(), fo.rows("head", [1]), keep_state=True
    ),
}


@pytest.mark.parametrize("make", EDITED.values(), ids=EDITED)
def test_a_state_counts_as_it_is_parked_leaves_and_cohorts_included(make):
    state = make()
    now, unfrozen = nbytes(state), nbytes(initialised(ADAM, fo.nothing, small()))
    assert unfrozen == 4 + 2 * 4 * 14
    for optimizer in (None, ADAM, fo.freezable(ADAM, "head")):
        assert bytes_of(small(), state, optimizer) == (now, unfrozen - now)
    counters = nbytes(optax.tree_utils.tree_get(state.inner, "count")) + nbytes(state.ages)
    rows = by_row(small(), state)
    assert rows["body"] + rows["head"] == now - counters


def test_each_leaf_has_the_bytes_of_its_own_rows():
    spec = (fo.rows("body/w", [1]), fo.rows("head", [0, 2]))
    expected = {"body": 24 + 24, "body/b": 24, "body/w": 24, "head": 24}
    assert by_row(small(), spec, ADAM) == expected
    assert by_row(small(), initialised(ADAM, spec, small())) == expected
    thawed = fo.thaw(initialised(ADAM, spec, small()), small(), fo.rows("head", [2]))
    assert by_row(small(), thawed) == {**expected, "head": 32}


def test_what_is_frozen_in_a_state_is_what_the_summary_shows():
    summary = fo.summary(small(), EDITED["rows parked"](), depth=1)
    assert [(r.path, r.status, r.trainable, r.frozen) for r in summary.rows] == [
        ("body", "frozen", 0, 9),
        ("head", "partial", 4, 1),
    ]


AROUND = {
    "chain": lambda tx: optax.chain(optax.trace(0.9), tx, optax.ema(0.9)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "MultiSteps object": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "named_chain": lambda tx: optax.named_chain(("a", optax.trace(0.9)), ("b", tx)),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_state_around_a_freezable_counts_and_is_not_saved(around):
    params = small()
    now = nbytes(around(fo.freezable(ADAM, "body")).init(params))
    unfrozen = nbytes(around(fo.freezable(ADAM)).init(params))
    assert unfrozen - now == 2 * 36
    # What the optimizer itself is told to freeze does not count.
    for told in (fo.nothing, "body", "head"):
        optimizer = around(fo.freezable(ADAM, told))
        assert bytes_of(params, "body", optimizer) == (now, 2 * 36)
    frozen = around(fo.freezable(ADAM, "body")).init(params)
    assert bytes_of(params, frozen, around(fo.freezable(ADAM, "body"))) == (now, 2 * 36)


@pytest.mark.parametrize("around", list(AROUND.values())[1:3], ids=list(AROUND)[1:3])
def test_a_freezable_around_another_wrapper_saves_its_state_too(around):
    params, inner = small(), around(ADAM)
    now = nbytes(fo.freezable(inner, "body").init(params))
    unfrozen = nbytes(fo.freezable(inner).init(params))
    assert unfrozen - now == 3 * 36
    assert bytes_of(params, "body", inner) == (now, 3 * 36)


PHASED = fo.scheduled(ADAM, fo.Phases({0: "body", 5: "body/w"}))
GIVEN = {"state alone": None, "plain": ADAM, "freezable": fo.freezable(ADAM), "scheduled": PHASED}


@pytest.mark.parametrize("optimizer", GIVEN.values(), ids=GIVEN)
def test_the_state_of_phases_counts_as_it_is_with_its_step(optimizer):
    state = PHASED.init(small())
    # Moments of all but `body/w`, a counter for each of the two cohorts, and the step.
    assert nbytes(state) == 2 * 4 * 8 + 3 * 4
    assert bytes_of(small(), state, optimizer)[0] == nbytes(state)
    around = optax.chain(optax.trace(0.9), PHASED)
    state = around.init(small())
    assert bytes_of(small(), state, around)[0] == nbytes(state)
    assert bytes_of(small(), state, optimizer)[0] == nbytes(state[1])


def test_a_spec_that_says_the_same_as_a_state_has_its_bytes():
    params, tx = small(), fo.freezable(ADAM, "body")
    state = tx.init(params)
    train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
    expected = fo.summary(params, "body", ADAM)
    for frozen in (state, train_state, (state, optax.EmptyState()), jax.eval_shape(lambda: state)):
        assert fo.summary(params, frozen) == expected
        assert fo.summary(params, frozen, tx) == expected


def test_an_nnx_optimizer_has_the_bytes_of_its_state():
    model = Net()
    optimizer = nnx.Optimizer(model, fo.freezable(ADAM, "backbone"), wrt=nnx.Param)
    params = params_of(model)
    now = nbytes(fo.freezable(ADAM, "backbone").init(nnx.to_pure_dict(params)))
    assert now == 4 + 2 * 4 * (4 + 4 + 4 * 2 + 2)
    for frozen in ("backbone", optimizer):
        assert bytes_of(params, frozen, ADAM) == (now, 2 * 4 * (3 * 4 + 4))
    summary = fo.summary(params, optimizer, depth=1)
    assert [(r.path, r.status) for r in summary.rows] == [
        ("backbone", "frozen"),
        ("head", "trainable"),
        ("norm", "trainable"),
    ]


def test_an_unpickled_state_has_its_own_bytes_and_saves_what_an_optimizer_tells():
    state = initialised(ADAM, "body", small())
    loaded = pickle.loads(pickle.dumps(state))
    assert bytes_of(small(), loaded) == (44, None)
    assert bytes_of(small(), loaded, ADAM) == (44, 72)
    assert str(fo.summary(small(), loaded)).splitlines()[-2] == "optimizer state: 44 bytes"


def test_of_lookahead_params_the_state_of_both_copies_counts():
    params = optax.LookaheadParams.init_synced(small())
    tx = optax.lookahead(ADAM, 5, 0.5)
    now = nbytes(initialised(tx, "body", params))
    saved = nbytes(initialised(tx, fo.nothing, params)) - now
    assert bytes_of(params, "body", tx) == (now, saved)
    assert fo.summary(params, "body").total == 14


def test_tied_leaves_have_a_state_each_as_they_really_have():
    table = jnp.ones((4, 2))
    params = {"embed": table, "head": {"bias": jnp.ones(2), "kernel": table}}
    state = initialised(ADAM, "head/bias", params)
    assert bytes_of(params, "head/bias", ADAM) == (nbytes(state), 16)
    tied = fo.tie(ADAM, ("embed", "head/kernel"))
    state = initialised(tied, "head/bias", params)
    assert bytes_of(params, "head/bias", tied) == (nbytes(state), 16)


def test_sharded_states_count_globally():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {name: jax.device_put(jnp.ones((16, 2)), sharding) for name in "ab"}
    summary = fo.summary(params, "a", ADAM)
    assert (summary.total, summary.trainable_bytes) == (64, 128)
    assert (summary.state_bytes, summary.saved_bytes) == (4 + 256, 256)
    assert bytes_of(params, initialised(ADAM, "a", params)) == (4 + 256, 256)


DTYPES = [jnp.bfloat16, jnp.float16, jnp.complex64, jnp.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_the_moments_of_every_dtype_have_its_bytes(dtype):
    params = {"a": jnp.ones(3, dtype), "b": jnp.ones(4, dtype)}
    tx = optax.sgd(0.1, momentum=0.9)
    now = nbytes(initialised(tx, "a", params))
    assert bytes_of(params, "a", tx) == (now, 3 * jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize("numbers", [{"a": 1.0, "b": 2.0, "n": 3}, {"a": 1j, "b": 2.5, "n": True}])
def test_python_numbers_have_the_state_that_they_would_have(numbers):
    tx = optax.sgd(0.1, momentum=0.9)
    now = nbytes(initialised(tx, "a", numbers))
    saved = nbytes(initialised(tx, fo.nothing, numbers)) - now
    assert (now, saved) == (4, jnp.result_type(numbers["a"]).itemsize)
    assert bytes_of(numbers, "a", tx) == (now, saved)


def test_several_freezables_are_an_error():
    tx = optax.chain(fo.freezable(ADAM), fo.freezable(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"2 FreezeStates; pass a transformation .* one freezable"):
        fo.summary(small(), "body", tx)


@pytest.mark.parametrize("odd", ["adam", 0.1, initialised(ADAM, "body", small()), optax.adam])
def test_what_is_no_optimizer_is_an_error_that_says_so(odd):
    with pytest.raises(TypeError, match="optimizer"):
        fo.summary(small(), "body", odd)


def test_no_array_is_made():
    def plan() -> Any:
        shape = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
        return fo.summary({"a": shape, "b": shape}, "a", optax.adamw(1e-3))

    before = {id(x) for x in jax.live_arrays()}
    summary = plan()
    assert (summary.state_bytes, summary.saved_bytes) == (4 + (8 << 40), 8 << 40)
    assert {id(x) for x in jax.live_arrays() if x.size > 1} <= before


def test_an_optimizer_that_has_nothing_for_the_frozen_group_is_counted():
    params = {"a": jnp.ones(4), "b": jnp.ones(2)}
    groups = fo.groups({"a": "frozen", "b": "adam"})
    inner, frozen = (
        optax.partition({"adam": optax.adam(1e-3)}, groups),
        fo.labelled(groups, "frozen"),
    )
    opt_state = fo.freezable(inner, frozen).init(params)
    for summary in (
        fo.summary(params, opt_state),
        fo.summary(params, opt_state, optimizer=inner),
        fo.summary(params, frozen, optimizer=inner),
    ):
        assert (summary.state_bytes, summary.saved_bytes) == (2 * 8 + 4, None)
        assert "less than with nothing frozen" not in str(summary)


def test_of_layers_in_turns_the_state_of_those_that_train_is_counted():
    params = {"layers": jnp.ones((6, 3, 2)), "head": jnp.ones(2)}
    tx = fo.rotating(optax.adam(1.0), "layers", 2, 5, order="ascending")
    state = tx.init(params)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    before = fo.summary(params, optimizer=tx)
    assert before.state_bytes == held - 4  # without the step count of the layers' own
    assert before.saved_bytes == 2 * 4 * 6 * (6 - 2)
    assert fo.summary(params, state).rows == before.rows
