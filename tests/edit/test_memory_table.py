"""One table: in which memory each array is that a public function returns.

The params are `a`, `b` and `c`. `a` and `b` are frozen and in host memory, `c` trains. The moments
of `b` are parked, in host memory too.
"""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.memories import HOST, assert_same_bits, jit_keeps_memory, make_params

pytestmark = pytest.mark.usefixtures("standard_promotion")

INNER = optax.chain(
    optax.scale_by_adam(), fo.since_thaw(lambda n: 1.0 / (1 + n)), fo.rates({}, 0.5)
)
TX = fo.freezable(INNER, ["a", "b"])
PHASES = fo.scheduled(INNER, fo.Phases({0: ["a", "b"], 1: "a"}))
TURNS = fo.rotating(INNER, "c", count=2, every=1, order="ascending", frozen=["a", "b"])
MEASURED = fo.freezable(fo.measured(INNER), ["a", "b"])
TIED = fo.freezable(fo.tie(INNER, ("b", "c")), "a")
ROWS = fo.rows("b", slice(0, 2))


def on_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)


def loss(params: Any) -> Any:
    moved = on_device(params)
    return (moved["a"] * moved["b"] * moved["c"]).sum()


def turn_loss(params: Any) -> Any:
    return fo.scan(lambda x, w: (x * w, None), on_device(params["a"])[0], params["c"])[0].sum()


def streamed_loss(params: Any) -> Any:
    x = on_device(params["a"])[0]
    return fo.scan(lambda x, w: (x * w, None), x, params["c"], stream=True)[0].sum()


def parked_state(params: Any) -> Any:
    """The state in which `a` is frozen without state, and `b` is parked."""
    state = fo.freeze(fo.freezable(INNER).init(params), params, "a")
    return fo.freeze(state, params, "b", keep_state=True)


def step(tx: Any, params: Any, state: Any, loss: Any = loss) -> Any:
    return tx.update(fo.grad(loss, state)(params), state, params)


def first_step(tx: Any, params: Any, loss: Any = loss) -> Any:
    return step(tx, params, tx.init(params), loss)


def reimport(params: Any, state: Any, **options: Any) -> Any:
    return fo.import_state(TX, params, fo.export_state(state), **options)


# H is the host, D is the device, - is a hole. A word is the arrays of one node: the three of the
# params, of a gradient or of updates. The words of a state are
#   count mu nu, count of since_thaw, factors of rates, ages of later cohorts,
# and before them the norms of measured.
TABLE: dict[str, tuple[Any, str]] = {
    "grad": (lambda p, s: fo.grad(loss, s)(p), "HHD"),
    "grad holes": (lambda p, s: fo.grad(loss, s, holes=True)(p), "--D"),
    "grad rows": (lambda p, s: fo.grad(loss, ROWS)(p), "HHD"),
    "value_and_grad": (lambda p, s: fo.value_and_grad(loss, s)(p), "D HHD"),
    "freezable init": (lambda p, s: TX.init(p), "D --D --D D --- --D"),
    "freezable init all": (lambda p, s: fo.freezable(INNER).init(p), "D HHD HHD D --- DDD"),
    "freezable update": (lambda p, s: step(TX, p, s), "HHD D -HD -HD D --- -DD DD"),
    "apply_updates": (lambda p, s: fo.apply_updates(p, step(TX, p, s)[0], s), "HHD"),
    "apply_updates (optax)": (lambda p, s: optax.apply_updates(p, step(TX, p, s)[0]), "HHD"),
    "freeze": (lambda p, s: fo.freeze(s, p, "c"), "D -H- -H- D --- -D-"),
    "freeze parked": (lambda p, s: fo.freeze(s, p, "c", keep_state=True), "D -HH -HH D --- -DD DD"),
    "thaw dropped": (lambda p, s: fo.thaw(s, p, "a"), "D DHD DHD D --- DDD DD"),
    "thaw parked": (lambda p, s: fo.thaw(s, p, "b"), "D -DD -DD D --- -DD DD"),
    "set_frozen": (lambda p, s: fo.set_frozen(s, p, "c", True), "D DDH DDH D --- DDD DD"),
    "adjust": (lambda p, s: fo.adjust(s, p, "c", 2.0), "D -HD -HD D --- -DD DD"),
    "adopt": (lambda p, s: fo.adopt(TX, INNER.init(on_device(p)), p), "D DDD DDD D --- DDD"),
    "release": (lambda p, s: fo.release(s, p), "D DDD DDD D --- DDD"),
    "export_state": (lambda p, s: fo.export_state(s)["leaves"], "DHDHDDDDDD"),
    "import_state": (reimport, "D -HD -HD D --- -DD DD"),
    "import_state frozen": (lambda p, s: reimport(p, s, frozen=["a", "c"]), "D -D- -D- D --- -D-"),
    "place": (lambda p, s: fo.place(p, "c"), "DDH"),
    "place device": (lambda p, s: fo.place(p, s, "device"), "DDD"),
    "place_state": (lambda p, s: fo.place_state(s), "D -HD -HD D --- -DD DD"),
    "place_state device": (lambda p, s: fo.place_state(s, "device"), "D -DD -DD D --- -DD DD"),
    "assign": (lambda p, s: fo.assign(p, {"a": p["c"], "b": 0.5, "c": p["a"]}), "HHD"),
    "hold": (lambda p, s: fo.hold(on_device(p), p, ["a", "b"]), "HHD"),
    "hold rows": (lambda p, s: fo.hold(p, on_device(p), ROWS), "HHD"),
    "partition": (fo.partition, "--D HH-"),
    "partition rows": (lambda p, s: fo.partition(p, ROWS), "HHD -- H"),
    "merge": (lambda p, s: fo.merge(*fo.partition(p, s)), "HHD"),
    "merge rows": (lambda p, s: fo.merge(*fo.partition(p, ROWS)), "HHD"),
    "scan": (lambda p, s: fo.scan(lambda x, w: (x, w), p["c"][0], p["a"]), "DH"),
    "scan streamed": (
        lambda p, s: fo.scan(lambda x, w: (x * w, w), p["c"][0], p["a"], True, stream=True),
        "DD",
    ),
    "streamed": (lambda p, s: fo.streamed(lambda w, x: {"w": w, "x": x})(p, p["c"]), "DDD D"),
    "stack_layers": (lambda p, s: fo.stack_layers({"l_0": p["a"], "l_1": p["b"]}, "l_*"), "H"),
    "unstack_layers": (lambda p, s: fo.unstack_layers(p["a"]), "HHHHHHHH"),
    "scheduled init": (lambda p, s: PHASES.init(fo.place(p, "a")), "D D -DD -DD D --- -DD DD"),
    "scheduled": (
        lambda p, s: first_step(PHASES, fo.place(p, "a")),
        "HDD D D -DD -DD D --- -DD DD",
    ),
    "rotating init": (lambda p, s: TURNS.init(p), "DD D --D --D D --- --D"),
    "rotating": (lambda p, s: first_step(TURNS, p, turn_loss), "HHD DD D --D --D D --- --D"),
    "rotating grad": (lambda p, s: fo.grad(turn_loss, TURNS.init(p))(p), "HHD"),
    "rotating streamed": (
        lambda p, s: first_step(TURNS, fo.place(p, fo.everything), streamed_loss),
        "HHD DD D --D --D D --- --D",
    ),
    "measured init": (lambda p, s: MEASURED.init(p), "--D D --D --D D --- --D"),
    "measured": (
        lambda p, s: first_step(MEASURED, fo.place(p, ["a", "b"])),
        "HHD --D D --D --D D --- --D",
    ),
    "measured thaw": (lambda p, s: fo.thaw(MEASURED.init(p), p, "a"), "D-D D D-D D-D D --- D-D DD"),
    "tie": (lambda p, s: first_step(TIED, fo.place(p, "a")), "HDD D -D- -D- D --- -D-"),
}

# They return no arrays, or are a part of the rows above.
WITHOUT_ARRAYS = {
    "Convergence",
    "Decision",
    "FreezeState",
    "Phases",
    "Score",
    "Scores",
    "Selector",
    "Summary",
    "bottom_leaves",
    "by_module",
    "declared",
    "dotted",
    "elements",
    "everything",
    "freezable",
    "gradient_scores",
    "groups",
    "labelled",
    "labels",
    "layers",
    "layerwise",
    "mask",
    "nothing",
    "of_type",
    "path",
    "plot_scores",
    "rates",
    "regex",
    "register_for_jax_export",
    "rows",
    "scores",
    "since_thaw",
    "summary",
    "tied_paths",
    "top_elements",
    "top_leaves",
    "weight_scores",
    "where",
}


def letters(tree: Any) -> str:
    """The memory of each array of a tree, see `TABLE`."""
    words: dict[Any, str] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole):
        letter = "-" if is_hole(x) else "H" if x.sharding.memory_kind == HOST else "D"
        words[path[:-1]] = words.get(path[:-1], "") + letter
    return " ".join(words.values())


def is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def test_each_public_function_is_in_the_table():
    public = {name for name in vars(fo) if not name.startswith("_")} - {"linen", "nnx", "testing"}
    in_table = {name.split()[0] for name in TABLE} - {"freezable"}
    assert public == in_table | WITHOUT_ARRAYS
    assert not in_table & WITHOUT_ARRAYS


@pytest.mark.parametrize("is_jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "where", ["one device", pytest.param("mesh", marks=pytest.mark.exhaustive)]
)
def test_each_array_is_where_the_table_says_with_the_bits_of_device_memory(where, is_jitted):
    params = make_params(where)
    state = parked_state(params)

    def all_rows(params: Any, state: Any) -> Any:
        return {name: function(params, state) for name, (function, _) in TABLE.items()}

    run = jax.jit(all_rows) if is_jitted else all_rows
    results = run(fo.place(params, state), fo.place_state(state))
    expected = run(params, state)
    for name in TABLE:
        assert_same_bits(results[name], expected[name])
    # What JAX 0.7.1 computes is in device memory, whatever it computes it from.
    if jit_keeps_memory():
        assert {name: letters(x) for name, x in results.items()} == {
            name: memories for name, (_, memories) in TABLE.items()
        }


def test_masks_and_summaries_read_host_memory():
    params = make_params("one device")
    placed = fo.place(params, ["a", "b"])
    for spec in (fo.top_elements("a", 0.2), fo.elements("b", lambda x: abs(x) > 1), ROWS):
        assert_same_masks(fo.mask(spec, placed), fo.mask(spec, params))
    assert fo.labels("a", placed) == fo.labels("a", params)
    assert fo.tied_paths({**placed, "z": placed["a"]}) == [("a", "z")]


def assert_same_masks(actual: Any, expected: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, mask in actual.items():
        assert np.array_equal(mask, expected[name])
