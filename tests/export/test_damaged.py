"""What is said of an export that is damaged, crafted, or of something else: an error that names it.

Its checksum is right in all of them but one, so that what is told is what is wrong.
"""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._export.encoding import pack_text
from tests.export.test_export import params, trained, transformation

pytestmark = pytest.mark.usefixtures("standard_promotion")


def _damaged(change: Any) -> dict[str, Any]:
    _, state = trained(transformation())
    exported = fo.export_state(state)
    about = _about(exported)
    exported["leaves"] = {k: np.asarray(v) for k, v in exported["leaves"].items()}
    changed = change(exported, about)
    if changed is not None:
        exported["about"] = _packed(changed)
    return exported


def _about(exported: Any) -> Any:
    return json.loads(np.asarray(exported["about"]).tobytes())


def _packed(about: Any) -> np.ndarray:
    """A text with a checksum that is right, if there can be one."""
    try:
        return pack_text({name: value for name, value in about.items() if name != "sum"})
    except (KeyError, AttributeError):
        return np.frombuffer(json.dumps(about).encode(), np.uint8)


def cut(exported, _about):
    exported["about"] = exported["about"][:-9]


def missing_leaf(exported, _about):
    del exported["leaves"]["000002"]


def cut_leaf(exported, _about):
    name = max(exported["leaves"], key=lambda n: exported["leaves"][n].size)
    exported["leaves"][name] = exported["leaves"][name][:-1]


def other_dtype(exported, _about):
    exported["leaves"]["000002"] = exported["leaves"]["000002"].astype(np.float64)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (cut, "no export of fo.export_state, or damaged: its 'about' can't be read"),
        (missing_leaf, "the export is damaged: '.+' is NoneType, not"),
        (cut_leaf, r"the export is damaged: 'inner/.+' is \w+\[\d.*\], not \w+\[\d"),
        (other_dtype, "the export is damaged: '.+' is float64"),
        (lambda e, a: {**a, "format": "freeze_optax state, version 9"}, "version 9', not 'free"),
        (lambda e, a: {**a, "cohorts": a["cohorts"][1:]}, "'cohorts' is for 4 parts .* are 5"),
        (lambda e, a: {**a, "frozen": [*a["frozen"], True]}, "'frozen' is for 6 parts .* are 5"),
        (lambda e, a: {**a, "cohorts": [5] * len(a["cohorts"])}, "cohorts and frozen flags do not"),
        (lambda e, a: {**a, "cohorts": [-1, 0, 1, 1, 1], "frozen": [False] * 5}, "do not agree"),
        (lambda e, a: {**a, "leaves": a["leaves"][1:]}, "only in the state to be: 'inner/1/count'"),
        (lambda e, a: {**a, "leaves": 3}, "its 'leaves' is 3, not a list"),
        (lambda e, a: e.update(leaves=[1, 2]), "its 'leaves' is a list, not a dict"),
        (lambda e, a: e.update(leaves=None), "the export is damaged: '.+' is NoneType, not"),
        (lambda e, a: [], "no export of fo.export_state, or damaged"),
    ],
)
def test_damage_is_an_error_that_says_where(change, match):
    with pytest.raises(ValueError, match=match):
        fo.import_state(transformation(), params(), _damaged(change))


ODD = {
    "infinite": ("cohorts", [math.inf, 0], "its 'cohorts' has inf at 0, not a whole number"),
    "null": ("cohorts", [0, None], "its 'cohorts' has None at 1, not a whole number"),
    "true for one": ("cohorts", [True, 0], "its 'cohorts' has True at 0, not a whole number"),
    "one for true": ("frozen", [1, False], "its 'frozen' has 1 at 0, not true or false"),
    "a step alone": ("schedule", [1], "its 'schedule' has 1 at 0, not a step and a list"),
    "no schedule": ("schedule", None, "its 'schedule' is None, not a list"),
    "no paths": ("paths", None, "its 'paths' is None, not a list"),
    "text for paths": ("paths", "w", "its 'paths' is 'w', not a list"),
    "a whole leaf in parts": ("parts", [[0, None], [1, None]], "its parts are whole leaves"),
    "text for a part": (
        "parts",
        [["0", None]],
        r"its 'parts' has \['0', None\] at 0, not the numb",
    ),
    "entries of numbers": ("leaves", [0], "its 'leaves' has 0 at 0, not a path, a shape and"),
}


@pytest.mark.parametrize(("name", "value", "said"), ODD.values(), ids=ODD)
def test_what_is_said_in_another_type_is_named(name, value, said):
    tree, tx = {"a": jnp.ones(2), "b": jnp.ones(2)}, fo.freezable(optax.adam(0.1), "a")
    exported = fo.export_state(tx.init(tree))
    exported["about"] = _packed({**_about(exported), name: value})
    with pytest.raises(ValueError, match=f"^the export is damaged: {said}"):
        fo.import_state(tx, tree, exported)


@pytest.mark.parametrize("name", ["paths", "frozen", "cohorts", "schedule", "parts", "leaves"])
def test_what_is_not_said_is_named(name):
    exported = fo.export_state(fo.freezable(optax.adam(0.1)).init({"w": jnp.ones(2)}))
    about = _about(exported)
    del about[name]
    exported["about"] = _packed(about)
    with pytest.raises(ValueError, match=f"its '{name}' is missing, not a list"):
        fo.import_state(fo.freezable(optax.adam(0.1)), {"w": jnp.ones(2)}, exported)


@pytest.mark.parametrize(
    ("field", "value"), [("path", ["x"]), ("shape", None), ("shape", [2.0]), ("key", 3)]
)
def test_an_entry_that_is_none_is_shown(field, value):
    def change(exported, about):
        about["leaves"][2][field] = value
        return about

    with pytest.raises(ValueError, match=r"'leaves' has \{.+\} at 2, not a path, a shape and a d"):
        fo.import_state(transformation(), params(), _damaged(change))


def test_lists_in_lists_without_an_end_are_an_error():
    tx, tree = fo.freezable(optax.adam(0.1)), {"w": jnp.ones(2)}
    exported = {**fo.export_state(tx.init(tree)), "about": np.frombuffer(b"[" * 200_000, np.uint8)}
    with pytest.raises(ValueError, match=r"or damaged: its 'about' can't be read \(RecursionError"):
        fo.import_state(tx, tree, exported)


def test_a_text_that_has_changed_since_is_told_by_its_checksum():
    tree = {"w": jnp.ones((8, 2))}
    tx = fo.freezable(optax.sgd(0.1), fo.rows("w", [0, 1]))
    exported = fo.export_state(tx.init(tree))
    text = exported["about"].tobytes()
    assert b'"3f"' in text
    other = {**exported, "about": np.frombuffer(text.replace(b'"3f"', b'"9f"'), np.uint8)}
    with pytest.raises(ValueError, match=r"changed after the export; its checksum is \d+, not \d+"):
        fo.import_state(tx, tree, other)
    about = json.loads(text)
    about["parts"][0][1][1] = "9f"
    state = fo.import_state(tx, tree, {**exported, "about": _packed(about)})
    np.testing.assert_array_equal(fo.mask(state, tree)["w"], [False, True, True] + 5 * [False])


def test_cohorts_that_no_edit_makes_are_an_error():
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = fo.freezable(optax.adam(0.1))
    state = tx.init(tree)
    parked = fo.freeze(state, tree, "b", keep_state=True)
    assert (parked.plan.frozen, parked.plan.cohorts) == ((False, True), (0, 1))
    plain = fo.freezable(optax.sgd(0.1))
    cases = [(tx, parked, [1, 1]), (tx, parked, [1, 2]), (plain, plain.init(tree), [0, 1])]
    for tx, state, cohorts in cases:
        exported = fo.export_state(state)
        exported["about"] = _packed({**_about(exported), "cohorts": cohorts})
        with pytest.raises(ValueError, match="its cohorts and frozen flags do not agree"):
            fo.import_state(tx, tree, exported)


def _noise(impl: str) -> tuple[Any, Any, Any]:
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(1, impl=impl))
    tx, tree = fo.freezable(optax.chain(noise, optax.trace(0.9))), {"w": jnp.ones((3, 4))}
    return tx, tree, fo.export_state(tx.init(tree))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_which_numbers_are_keys_is_told_by_the_transformation_alone(impl):
    tx, tree, exported = _noise(impl)
    fo.import_state(tx, tree, exported)
    about = _about(exported)
    (key,) = [i for i, entry in enumerate(about["leaves"]) if "key" in entry]
    (trace,) = [i for i, entry in enumerate(about["leaves"]) if entry["path"].endswith("trace/w")]
    others = {"threefry2x32", "rbg", "unsafe_rbg", "no such", None} - {impl}
    for i, kinds in ((key, others), (trace, {impl})):
        for kind in kinds:
            entry = {**about["leaves"][i], "key": kind}
            entries = [*about["leaves"][:i], entry, *about["leaves"][i + 1 :]]
            for shape in ((2,), (4,), (3, 4, 2)):
                arrays = {**exported["leaves"], f"{i:06d}": np.zeros(shape, np.uint32)}
                crafted = {"about": _packed({**about, "leaves": entries}), "leaves": arrays}
                with pytest.raises(ValueError, match="the export is not of a state of this trans"):
                    fo.import_state(tx, tree, crafted)


DTYPES = [",", "f4,f4", "(", "f4(", "object", "V4", "S4", "U1", "M8[s]", "a4", "", "i1," * 9_999]
DTYPES += ["<f4", ">f4", "f", "float", "float32 ", "longdouble", "float16", "int8", "float64"]


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_a_dtype_is_not_parsed(promotion):
    for of in ("float32", "float8_e4m3fn"):
        tree, tx = {"w": jnp.ones(2, of)}, fo.freezable(optax.trace(0.9))
        exported = fo.export_state(tx.init(tree))
        about = _about(exported)
        for name in DTYPES:
            entries = [{**about["leaves"][0], "dtype": name}]
            crafted = {**exported, "about": _packed({**about, "leaves": entries})}
            with (
                jax.numpy_dtype_promotion(promotion),
                pytest.raises(ValueError, match=r"the export is .*'inner/trace/w' is \(\[2\]"),
            ):
                fo.import_state(tx, tree, crafted)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_a_statistic_that_gradients_have_widened_stays_so(promotion):
    tree, tx = {"w": jnp.ones(2, jnp.bfloat16)}, fo.freezable(optax.trace(0.9))
    _, state = tx.update({"w": jnp.full(2, 1 / 3, jnp.float32)}, tx.init(tree), tree)
    exported = fo.export_state(state)
    with jax.numpy_dtype_promotion(promotion):
        restored = fo.import_state(tx, tree, exported)
    fo.testing.assert_frozen(state, restored, True)


def test_what_trained_must_be_trainable_still():
    floats = {"n": jnp.ones(2), "w": jnp.ones(2)}
    tx = fo.freezable(optax.sgd(0.1))
    state = tx.init(floats)
    for stored in (state, fo.freeze(state, floats, "n", keep_state=True)):
        exported = fo.export_state(stored)
        for leaf, said in ((jnp.arange(3), r"int32\[3\]"), ("text", "a str")):
            with pytest.raises(
                ValueError, match=f"the export is of other params: 'n' trains in it.*is {said} in"
            ):
                fo.import_state(tx, {**floats, "n": leaf}, exported)
    dropped = fo.export_state(fo.freeze(state, floats, "n"))
    restored = fo.import_state(tx, {**floats, "n": jnp.arange(3)}, dropped)
    assert restored.plan.frozen == (True, False)


def test_leaves_that_share_a_buffer_are_not_parted():
    apart = {"a": jnp.ones(2), "b": jnp.ones(2)}
    shared = dict.fromkeys(apart, jnp.ones(2))
    tx = fo.freezable(optax.adam(0.1))
    for keep_state in (False, True):
        exported = fo.export_state(fo.freeze(tx.init(apart), apart, "a", keep_state))
        assert fo.mask(fo.import_state(tx, apart, exported), apart) == {"a": True, "b": False}
        for frozen in (None, "a"):
            with pytest.raises(ValueError, match=f"{PARTED} they share one buffer"):
                fo.import_state(tx, shared, exported, frozen=frozen)
        state = fo.import_state(tx, shared, exported, frozen=fo.nothing)
        assert fo.mask(state, shared) == {"a": False, "b": False}


PARTED = "'a' would be frozen and 'b' trained, but"


def test_leaves_that_share_a_buffer_are_not_parted_by_a_phase():
    apart = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = fo.scheduled(optax.adam(0.1), fo.Phases({0: fo.nothing, 3: "a"}))
    exported = fo.export_state(tx.init(apart))
    fo.import_state(tx, apart, exported)
    with pytest.raises(ValueError, match=f"{PARTED} they share one buffer"):
        fo.import_state(tx, dict.fromkeys(apart, jnp.ones(2)), exported)


@pytest.mark.parametrize("keep_state", [False, True], ids=["dropped", "parked"])
def test_what_tie_ties_is_not_parted(keep_state):
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    loose = fo.freezable(optax.sgd(0.1))
    exported = fo.export_state(fo.freeze(loose.init(tree), tree, "a", keep_state))
    tied = fo.freezable(fo.tie(optax.sgd(0.1), ("a", "b")))
    with pytest.raises(ValueError, match=f"{PARTED} fo.tie ties them"):
        fo.import_state(tied, tree, exported)
    parted = {"opt": fo.freeze(loose.init(tree), tree, "a", keep_state)}
    with pytest.raises(ValueError, match=f"{PARTED} fo.tie ties them"):
        fo.import_state({"opt": tied.init(tree)}, tree, fo.export_state(parted))


def test_something_else_is_no_export():
    with pytest.raises(ValueError, match=r"no export of fo\.export_state"):
        fo.import_state(transformation(), params(), params())
    with pytest.raises(TypeError, match=r"export_state was given a dict .* holds no FreezeState"):
        fo.export_state(params())
