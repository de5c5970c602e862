"""The algebra of selectors, and everything that may stand for one."""

import re
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import freeze_optax as fo
from freeze_optax._tree.holes import HOLE

PARAMS = {
    "encoder": {"bias": 1.0, "kernel": 2.0},
    "head": {"bias": 3.0, "kernel": 4.0},
}


def flags(*four):
    """A mask of PARAMS from encoder/bias, encoder/kernel, head/bias, head/kernel."""
    return jax.tree.unflatten(jax.tree.structure(PARAMS), four)


ENCODER = flags(True, True, False, False)
HEAD = flags(False, False, True, True)
BIASES = flags(True, False, True, False)
ALL = flags(True, True, True, True)
NONE = flags(False, False, False, False)
encoder, biases = fo.path("encoder"), fo.path("**/bias")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (encoder, ENCODER),
        (biases, BIASES),
        (fo.everything, ALL),
        (fo.nothing, NONE),
        (encoder | biases, flags(True, True, True, False)),
        (encoder & biases, flags(True, False, False, False)),
        (encoder - biases, flags(False, True, False, False)),
        (biases - encoder, flags(False, False, True, False)),
        (~encoder, HEAD),
        (~~encoder, ENCODER),
        (encoder | "head/bias", flags(True, True, True, False)),
        ("head/bias" | encoder, flags(True, True, True, False)),
        (encoder & "**/bias", flags(True, False, False, False)),
        ("**/bias" & encoder, flags(True, False, False, False)),
        (encoder - "**/bias", flags(False, True, False, False)),
        ("**/bias" - encoder, flags(False, False, True, False)),
        (~(encoder - "**/bias") & ~fo.path("head"), flags(True, False, False, False)),
        (fo.everything - encoder, HEAD),
        (fo.path("encoder", "head/bias"), flags(True, True, True, False)),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_selectors_compose_and_give_python_bools(selector, expected):
    mask = selector(PARAMS)
    assert mask == expected
    assert {type(flag) for flag in jax.tree.leaves(mask)} == {bool}


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (fo.path("a", "b*"), "path('a', 'b*')"),
        (fo.regex("a.*"), "regex('a.*')"),
        (fo.layers("l_*"), "layers('l_*')"),
        (fo.layers("l_*")[-1], "layers('l_*')[-1]"),
        (fo.layers("l_*")[:-2], "layers('l_*')[:-2]"),
        (fo.layers("l_*")[1::2], "layers('l_*')[1::2]"),
        (fo.labelled({"a": "x"}, "x", "y"), "labelled('x', 'y')"),
        (fo.where(callable), "where(callable)"),
        (fo.everything, "everything"),
        (fo.nothing, "nothing"),
        (
            ~(fo.path("a") | fo.regex("b")) - "c" & fo.everything,
            "((~(path('a') | regex('b')) - path('c')) & everything)",
        ),
    ],
)
def test_the_repr_of_a_selector_is_what_one_would_write(selector, text):
    assert repr(selector) == text


@pytest.mark.parametrize("other", [True, ["head"], {"encoder": True}, None])
def test_only_selectors_and_strings_compose(other):
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \|: '.*' and '"):
        encoder | other
    with pytest.raises(TypeError, match=r"unsupported .* A list is the union of any specs"):
        other | encoder


@pytest.mark.parametrize(
    "mistake", [lambda: not encoder, lambda: encoder or biases, lambda: encoder and biases]
)
def test_a_selector_is_neither_true_nor_false(mistake):
    with pytest.raises(TypeError, match=r"path\('encoder'\) is neither true nor false.*write ~a"):
        mistake()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (re.compile("a.*"), r"is Pattern, not a bool; write fo\.regex\('a\.\*'\)"),
        ({"encoder"}, "is set, not a bool; a spec is .* or a list of these"),
        (fo.where(str.isdigit), "takes a function of two arguments, path and leaf"),
        (fo.where(lambda path, leaf, more: bool(leaf)), "a function of two arguments"),
    ],
    ids=["compiled", "set", "one argument", "three arguments"],
)
def test_what_is_nearly_a_spec_is_an_error_that_says_what_to_write(spec, message):
    with pytest.raises(TypeError, match=message):
        fo.mask(spec, PARAMS)


def test_an_error_of_a_function_has_a_note_about_what_it_is_called_with():
    with pytest.raises(AttributeError) as caught:
        fo.mask(lambda path: path.startswith("encoder"), PARAMS)
    (note,) = caught.value.__notes__
    assert "with the whole tree" in note
    assert "a function of path and leaf goes to fo.where" in note


def test_a_regex_that_cannot_be_read_is_named():
    with pytest.raises(re.error, match=r"fo\.regex can't read 'a/\(' .*unterminated subpattern"):
        fo.regex("a/(")


class Callable(eqx.Module):
    encoder: typing.Any
    head: typing.Any

    def __call__(self, *args):
        raise AssertionError("a mask that is a tree is read, not called")


def state_of(frozen, params=PARAMS, inner=optax.identity()):  # noqa: B008
    return fo.freezable(inner, frozen).init(params)


STATE = state_of("encoder")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (encoder, ENCODER),
        ("encoder", ENCODER),
        ("{encoder,head}/bias", BIASES),
        (["encoder", "head/bias"], flags(True, True, True, False)),
        (("encoder", "head/bias"), flags(True, True, True, False)),
        ([encoder, fo.nothing, False], ENCODER),
        (["encoder", BIASES], flags(True, True, True, False)),
        ([["encoder"], ("head/bias",)], flags(True, True, True, False)),
        ([BIASES, ENCODER], flags(True, True, True, False)),
        ([lambda tree: HEAD, "encoder/bias"], flags(True, False, True, True)),
        ([], NONE),
        ((), NONE),
        (True, ALL),
        (False, NONE),
        (np.bool_(True), ALL),
        (BIASES, BIASES),
        ({"encoder": True, "head": False}, ENCODER),
        ({"encoder": np.bool_(True), "head": {"bias": False, "kernel": np.False_}}, ENCODER),
        (
            {"encoder": {"bias": True, "kernel": False}, "head": True},
            flags(True, False, True, True),
        ),
        (FrozenDict({"encoder": True, "head": False}), ENCODER),
        (
            Callable(encoder=True, head={"bias": False, "kernel": True}),
            flags(True, True, False, True),
        ),
        (lambda tree: jax.tree.map(lambda x: x > 2.5, tree), HEAD),
        (lambda tree: {"encoder": True, "head": False}, ENCODER),
        (lambda tree: True, ALL),
        (STATE, ENCODER),
        ((STATE, optax.EmptyState()), ENCODER),
        ({"opt": [STATE, None], "step": 3}, ENCODER),
        ([STATE, "head/bias"], flags(True, True, True, False)),
        ([STATE], ENCODER),
        ([STATE, state_of("head/bias")], flags(True, True, True, False)),
        ([(STATE, optax.EmptyState()), biases], flags(True, True, True, False)),
    ],
    ids=lambda value: re.sub(r"<| at 0x\w+>", "", repr(value))[:60],
)
def test_every_kind_of_spec_is_accepted(spec, expected):
    assert fo.mask(spec, PARAMS) == expected


def test_a_list_of_bools_is_a_mask_of_params_that_are_a_list():
    assert fo.mask([True, False], [1.0, {"w": 2.0}]) == [True, {"w": False}]
    assert fo.mask((False, [True, False]), (1.0, [2.0, 3.0])) == (False, [True, False])
    assert fo.mask(["0"], [1.0, 2.0]) == [True, False]


class Model(nnx.Module):
    def __init__(self):
        self.encoder = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(1, 1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mask", [{"encoder": True, "head": False}, ENCODER, Callable(True, False)])
def test_a_mask_fits_other_containers_by_key_path(mask):
    assert fo.mask(mask, FrozenDict(PARAMS)) == FrozenDict(ENCODER)
    resolved = fo.mask(mask, nnx.state(Model()))
    assert isinstance(resolved, nnx.State)
    assert nnx.to_pure_dict(resolved) == ENCODER


def test_an_nnx_module_of_flags_is_a_mask():
    model = Model()
    mask = fo.path("encoder")(model)
    assert isinstance(mask, Model)
    assert nnx.to_pure_dict(nnx.state(fo.mask(mask, model))) == ENCODER
    assert fo.mask(mask, PARAMS) == ENCODER


def test_a_prefix_may_name_a_node_that_holds_no_leaf():
    params = {"dropout": {}, "encoder": {"kernel": 1.0}, "head": None}
    expected = {"dropout": {}, "encoder": {"kernel": True}, "head": None}
    mask = {"dropout": False, "encoder": True, "head": False}
    # What jax takes for a prefix, and so what `optax.masked` takes for a mask.
    assert jax.tree.map(lambda flag, node: node, mask, params) == params
    assert fo.mask(mask, params) == expected
    labels = {"dropout": "hot", "encoder": "cold", "head": "hot"}
    assert fo.labelled(labels, "cold")(params) == expected


def test_what_a_state_of_other_containers_freezes_is_found_by_path():
    class Reordered(typing.NamedTuple):
        head: typing.Any
        encoder: typing.Any

    assert fo.mask(STATE, FrozenDict(PARAMS)) == FrozenDict(ENCODER)
    assert fo.mask(STATE, Reordered(**PARAMS)) == Reordered(**ENCODER)


def test_a_train_state_is_a_spec():
    tx = optax.chain(optax.clip(1.0), fo.freezable(optax.adam(0.1), "encoder"))
    train_state = TrainState.create(apply_fn=print, params=PARAMS, tx=tx)
    assert fo.mask(train_state, PARAMS) == ENCODER
    assert fo.mask(train_state.opt_state, PARAMS) == ENCODER


def test_an_nnx_optimizer_is_a_spec():
    model = Model()
    optimizer = nnx.Optimizer(model, fo.freezable(optax.adam(0.1), "encoder"), wrt=nnx.Param)
    assert fo.mask(optimizer, PARAMS) == ENCODER
    assert nnx.to_pure_dict(fo.mask(optimizer, nnx.state(model, nnx.Param))) == ENCODER


@pytest.mark.parametrize(
    "spec", [(STATE, STATE), (STATE, (optax.EmptyState(), STATE)), {"a": STATE, "b": STATE}]
)
def test_a_tree_with_two_states_does_not_say_which(spec):
    with pytest.raises(ValueError, match=r"2 FreezeStates.*pass one of them, or a list of them"):
        fo.mask(spec, PARAMS)


def test_a_state_without_a_plan_is_refused():
    with pytest.raises(ValueError, match=r"no plan; .*freezable\(\.\.\.\)\.init\(params\)"):
        fo.mask(fo.FreezeState(()), PARAMS)


OTHER = {"encoder": {"bias": 1.0}, "tail": 2.0}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (
            state_of("encoder", OTHER),
            "different params: only in the tree: 'encoder/kernel', 'head/bias', 'head/kernel'; "
            "only in the state: 'tail'",
        ),
        (
            {"encoder": {"bias": True}, "tail": False},
            "the mask does not fit the tree: it has nothing for 'encoder/kernel', 'head/bias', "
            "'head/kernel' of the tree, and 'tail', which the tree does not have",
        ),
        ({"encoder": True}, "nothing for 'head/bias', 'head/kernel' of the tree$"),
        ({**ENCODER, "tail": True}, "it has 'tail', which the tree does not have"),
        ({"encoder": {"bias": {"x": True}, "kernel": True}, "head": True}, "'encoder/bias/x'"),
        (None, "nothing for 'encoder/bias'"),
        (["encoder", {"head": True}], "nothing for 'encoder/bias', 'encoder/kernel'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_a_state_or_mask_of_other_params_names_the_odd_paths(spec, match):
    with pytest.raises(ValueError, match=match):
        fo.mask(spec, PARAMS)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (1, "the mask at 'head/bias' is int, not a bool"),
        (0.0, "'head/bias' is float, not a bool"),
        (
            "frozen",
            r"'head/bias' is str, not a bool; for labels write fo\.labelled\(labels, name\)",
        ),
        (jnp.ones(2, bool), r"'head/bias' is ArrayImpl\(2,\), not a bool"),
        (np.ones((1, 2), bool), r"'head/bias' is ndarray\(1, 2\), not a bool"),
        (jnp.ones(()), r"'head/bias' is ArrayImpl\(\), not a bool"),
        (jax.ShapeDtypeStruct((3,), bool), r"'head/bias' is ShapeDtypeStruct\(3,\), not a bool"),
    ],
)
@pytest.mark.parametrize("as_function", [False, True])
def test_a_mask_of_anything_but_bools_names_path_and_type(leaf, match, as_function):
    mask = {"encoder": True, "head": {"bias": leaf, "kernel": False}}
    with pytest.raises(TypeError, match=match):
        fo.mask((lambda tree: mask) if as_function else mask, PARAMS)


@pytest.mark.parametrize(
    "function", [lambda path, leaf: True, lambda tree, *, axis: True, lambda: True]
)
def test_a_function_of_anything_but_the_tree_is_refused_before_it_is_called(function):
    match = r"takes the tree alone, but .*<lambda> takes other arguments; .* goes to fo\.where"
    for spec in (function, [function], fo.dotted(function)):
        with pytest.raises(TypeError, match=match):
            fo.mask(spec, PARAMS)


def test_a_function_with_more_arguments_that_have_defaults_is_called_with_the_tree():
    assert fo.mask(lambda tree, name="encoder": {x: x == name for x in tree}, PARAMS) == ENCODER
    assert fo.mask(lambda *trees: {x: x == "encoder" for x in trees[0]}, PARAMS) == ENCODER


def test_params_in_place_of_a_mask_are_refused_by_path():
    with pytest.raises(TypeError, match="the mask at 'encoder/bias' is float, not a bool"):
        fo.mask(PARAMS, PARAMS)


def test_a_traced_mask_is_refused_by_path():
    def resolve(flag):
        return fo.mask({"encoder": flag, "head": False}, PARAMS)

    with pytest.raises(TypeError, match=r"'encoder' is traced.*make the mask of Python bools"):
        jax.jit(resolve)(True)


def test_a_concrete_scalar_array_of_bool_counts_as_a_bool():
    assert fo.mask({"encoder": jnp.array(True), "head": np.array(False)}, PARAMS) == ENCODER


@pytest.mark.parametrize("spec", ["encodr", ["encoder", "encodr"], encoder | "encodr"])
def test_a_pattern_that_selects_nothing_is_an_error_with_the_nearest_paths(spec):
    with pytest.raises(ValueError, match="pattern 'encodr' selects no leaf; nearest: 'encoder'"):
        fo.mask(spec, PARAMS)


def test_a_selector_of_ones_own_says_what_it_selects():
    class Nameless(fo.Selector):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nameless()


def test_everything_works_on_abstract_trees():
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.float32, PARAMS))
    assert (encoder - "**/bias")(abstract) == flags(False, True, False, False)
    assert fo.mask({"encoder": True, "head": False}, abstract) == ENCODER
    assert fo.mask(STATE, abstract) == ENCODER


HOLED = {"encoder": {"bias": HOLE, "kernel": HOLE}, "head": {"bias": 3.0, "kernel": HOLE}}


@pytest.mark.parametrize(
    ("spec", "bias"),
    [
        ("encoder", False),
        ("head/bias", True),
        (~encoder, True),
        (fo.regex("encoder/.*"), False),
        (fo.layers("*")[0], False),
        (fo.layers("*")[1], True),
        (fo.where(lambda path, leaf: leaf > 2.0), True),
        (fo.labelled({"encoder": "cold", "head": "hot"}, "cold"), False),
        (fo.labelled(flags("cold", "cold", "hot", "cold"), "cold"), False),
        (ENCODER, False),
        (HEAD, True),
        ({"encoder": False, "head": True}, True),
        (lambda tree: jax.tree.map(lambda leaf: leaf > 2.0, tree), True),
        (STATE, False),
        (True, True),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_holes_count_as_leaves_that_match_and_stay(spec, bias):
    held = {**HOLED, "head": {"bias": bias, "kernel": HOLE}}
    assert fo.mask(spec, HOLED) == held
    if isinstance(spec, fo.Selector):
        assert spec(HOLED) == held


def label_by_top(tree):
    return jax.tree_util.tree_map_with_path(lambda keys, _: keys[0].key, tree)


def test_a_label_that_a_function_gives_to_holes_only_counts_as_given():
    assert fo.labelled(label_by_top, "encoder")(HOLED) == {
        "encoder": {"bias": HOLE, "kernel": HOLE},
        "head": {"bias": False, "kernel": HOLE},
    }


@pytest.mark.parametrize("spec", [[True, False], (False, False), [True], [[True, False]]], ids=repr)
def test_a_list_of_bools_is_a_mask_of_a_list_and_no_union(spec):
    params = {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match=r"nothing for 'a', 'b' .*for all leaves write one bool"):
        fo.mask(spec, params)
    with pytest.raises(ValueError, match="a list of bools is a mask of a list"):
        fo.freezable(optax.sgd(0.1), spec).init(params)


def test_a_list_of_bools_is_matched_by_path_with_a_list_in_other_containers():
    assert fo.mask([True, False], {"0": 1.0, "1": 2.0}) == {"0": True, "1": False}
    assert fo.mask([{"a": True, "b": False}, False], {"a": 1.0, "b": 2.0}) == {
        "a": True,
        "b": False,
    }
