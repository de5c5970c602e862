"""What in the state of each transformation belongs to leaves, counts their steps, or is a clock."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import freeze_optax as fo
from freeze_optax._state.layout import CLOCK, COUNTER
from tests.support import optimizers

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# Their init looks into a leaf of the params, so it fails on holes alone.
WITHOUT_LAYOUT = {
    "flatten",
    "lbfgs",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
}


def layout_of(inner: optax.GradientTransformation, tree: Any) -> Any:
    return fo.freezable(inner).init(tree).plan.layout


def kinds(inner: optax.GradientTransformation, tree: Any) -> tuple[set[str], set[str], set[str]]:
    """The paths of counters, clocks, and what is shaped like `tree` (one leaf, "w")."""
    layout = layout_of(inner, tree)
    rows = list(zip(layout.paths, layout.owners, strict=True))
    counters = {path for path, owner in rows if owner == COUNTER}
    clocks = {path for path, owner in rows if owner == CLOCK}
    return counters, clocks, {path.removesuffix("/w") for path, owner in rows if owner >= 0}


RATE = optax.linear_schedule(0.1, 0.01, 3)
EXPECTED = {
    "scale_by_adam": (optax.scale_by_adam(), {"count"}, set(), {"mu", "nu"}),
    "adam with a schedule": (optax.adam(RATE), {"0/count"}, {"1/count"}, {"0/mu", "0/nu"}),
    "adafactor with a schedule": (
        optax.adafactor(RATE, multiply_by_parameter_scale=False),
        {"0/count"},
        {"2/count"},
        {"0/v_row", "0/v_col", "0/v"},
    ),
    "momentum": (optax.sgd(0.1, momentum=0.9), set(), set(), {"0/trace"}),
    "plain sgd": (optax.sgd(0.1), set(), set(), set()),
    "schedule": (optax.scale_by_schedule(RATE), set(), {"count"}, set()),
    "add_noise": (optax.add_noise(0.1, 0.5, 7), set(), {"count", "rng_key"}, set()),
    "rprop": (optax.rprop(0.1), set(), set(), {"0/step_sizes", "0/prev_updates"}),
    "zero_nans": (optax.zero_nans(), set(), set(), {"found_nan"}),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
        {"mini_step", "gradient_step", "inner_opt_state/0/count"},
        {"inner_opt_state/1/count"},
        {"acc_grads", "inner_opt_state/0/mu", "inner_opt_state/0/nu"},
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.sgd)(learning_rate=RATE, momentum=0.9),
        set(),
        {
            "count",
            "hyperparams/learning_rate",
            "hyperparams/momentum",
            "hyperparams_states/learning_rate/count",
        },
        {"inner_state/0/trace"},
    ),
    "apply_if_finite": (
        optax.apply_if_finite(optax.scale_by_adam(), 3),
        {"inner_state/count"},
        {"notfinite_count", "last_finite", "total_notfinite"},
        {"inner_state/mu", "inner_state/nu"},
    ),
    "scale_by_lbfgs": (
        optax.scale_by_lbfgs(),
        {"count", "weights_memory"},
        set(),
        {"params", "updates", "diff_params_memory", "diff_updates_memory"},
    ),
    "masked": (
        optax.masked(optax.scale_by_adam(), {"w": False}),
        {"inner_state/count"},
        set(),
        {"inner_state/mu", "inner_state/nu"},
    ),
    "partition": (
        optax.partition(
            {"x": optax.scale_by_adam(), "y": optax.scale_by_schedule(RATE)}, {"w": "y"}
        ),
        {"inner_states/x/inner_state/count"},
        {"inner_states/y/inner_state/count"},
        {"inner_states/x/inner_state/mu", "inner_states/x/inner_state/nu"},
    ),
    "named_chain with slashes": (
        optax.named_chain(("a/b", optax.scale_by_adam()), ("a", optax.scale_by_schedule(RATE))),
        {"a/b/count"},
        {"a/count"},
        {"a/b/mu", "a/b/nu"},
    ),
    "schedule_free": (
        optax.contrib.schedule_free_sgd(0.1),
        {"b1", "weight_sum", "step_count", "max_lr"},
        set(),
        {"z"},
    ),
    "reduce_on_plateau": (
        optax.contrib.reduce_on_plateau(),
        set(),
        {"scale", "best_value", "plateau_count", "cooldown_count", "count", "avg_value"},
        set(),
    ),
    "a noise key beside moments": (
        optax.chain(optax.scale_by_adam(), optax.chain(optax.add_noise(0.1, 0.5, 7))),
        {"0/count"},
        {"1/0/count", "1/0/rng_key"},
        {"0/mu", "0/nu"},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_counters_clocks_and_statistics_are_told_apart(name):
    inner, counters, clocks, statistics = EXPECTED[name]
    assert kinds(inner, {"w": jnp.ones((4, 3))}) == (counters, clocks, statistics)


def test_the_clock_of_lookahead_runs_on_for_its_pair():
    pair = optax.LookaheadParams.init_synced({"w": jnp.ones(3)})
    counters, clocks, statistics = kinds(optax.lookahead(optax.scale_by_adam(), 2, 0.5), pair)
    assert counters == {"fast_state/count"}
    assert clocks == {"steps_since_sync"}
    assert statistics == {"fast_state/mu", "fast_state/nu"}


@pytest.mark.parametrize("names", [("mu", "nu", "count"), ("0", "1"), ("a/b", "a", "b"), ("",)])
def test_the_names_of_params_confuse_nothing(names):
    tree = {name: jnp.ones(2) for name in names}
    inner = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(RATE))
    layout = layout_of(inner, tree)
    found = {}
    for path, owner in zip(layout.paths, layout.owners, strict=True):
        found.setdefault(owner, []).append(path)
    # jax sorts the keys of a dict.
    written = [name or "''" for name in sorted(names)]
    expected = {i: [f"0/mu/{n}", f"0/nu/{n}"] for i, n in enumerate(written)}
    assert found == expected | {COUNTER: ["0/count"], CLOCK: ["1/count"]}


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(
            optax.partition(
                {"x": optax.scale_by_adam(), "y": optax.trace(0.9)}, {"body": "x", "head": "y"}
            ),
            id="labels",
        ),
        pytest.param(optax.masked(optax.scale_by_adam(), {"body": False, "head": True}), id="mask"),
    ],
)
def test_labels_and_masks_that_name_whole_subtrees_leave_no_place_unknown(inner):
    body = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    layout = layout_of(inner, {"body": body, "head": jnp.ones(2)})
    layout.places(inner.init({"body": body, "head": jnp.ones(2)}))
    rows = dict(zip(layout.paths, layout.owners, strict=True))
    assert CLOCK not in rows.values()
    assert {p for p, owner in rows.items() if owner == COUNTER} == {p for p in rows if "count" in p}
    assert {owner for path, owner in rows.items() if path.endswith("/head")} == {2}


def test_params_that_are_one_bare_array_have_a_layout():
    layout = layout_of(optax.adam(RATE), jnp.ones(3))
    rows = dict(zip(layout.paths, layout.owners, strict=True))
    assert rows == {"0/count": COUNTER, "0/mu": 0, "0/nu": 0, "1/count": CLOCK}


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(m, n, id=f"{m.__name__}.{n}") for m, n in optimizers.every()],
)
def test_what_belongs_to_a_leaf_ends_in_its_path_and_all_else_has_one_shape_for_any_params(
    module, name
):
    inner, tree = optimizers.build(module, name), optimizers.params()
    if name in WITHOUT_LAYOUT:
        with pytest.raises(ValueError, match="its init fails on params that are all holes"):
            layout_of(inner, tree)
        return
    layout = layout_of(inner, tree)
    whole = jax.eval_shape(inner.init, tree)
    places = layout.places(whole)
    paths = [f"{layer}/{leaf}" for layer in tree for leaf in ("bias", "kernel")]
    for place, owner, path in zip(places, layout.owners, layout.paths, strict=True):
        if owner >= 0:
            assert path.endswith(paths[owner])
        else:
            assert len(jax.tree.leaves(place)) == 1
            assert not any(path.endswith(suffix) for suffix in paths)
    # No counter and no clock has a shape that a change of the params changes.
    thinner = jax.tree.map(lambda x: x[..., :3], tree)
    other = layout.places(jax.eval_shape(inner.init, thinner))
    for place, new, owner in zip(places, other, layout.owners, strict=True):
        if owner < 0:
            assert place.shape == new.shape
    assert jax.tree.structure(layout.rebuild(places)) == jax.tree.structure(whole)
