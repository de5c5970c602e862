import functools
import inspect
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import freeze_optax as fo

HOLE = optax.MaskedNode()
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)


def _params():
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    return {
        "encoder": {"kernel": normal(16, 16), "bias": normal(16)},
        "head": {"kernel": normal(16, 4), "bias": normal(4)},
    }


def _loss(params, x):
    hidden = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return jnp.square(hidden @ params["head"]["kernel"] + params["head"]["bias"]).mean()


def _split_loss(head, encoder, x):
    return _loss({"encoder": encoder, "head": head}, x)


def _bits(tree):
    """Dtype, shape and bytes at each leaf; a hole as what it is."""
    return jax.tree.map(
        lambda x: x if x is HOLE else (str(np.asarray(x).dtype), np.shape(x), _bytes(x)),
        tree,
        is_leaf=lambda x: x is HOLE,
    )


def _bytes(x):
    return np.asarray(x).tobytes()


def _zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def _state():
    return fo.freezable(optax.sgd(0.1, momentum=0.9), "encoder").init(_params())


SPECS = {
    "str": lambda: "encoder",
    "mask": lambda: jax.tree.map(lambda _: True, _params()) | {"head": False},
    "prefix mask": lambda: {"encoder": True, "head": False},
    "function": lambda: lambda tree: {"encoder": True, "head": False},
    "state": _state,
    "chain state": lambda: optax.chain(
        optax.clip(1.0), fo.freezable(optax.sgd(0.1), "encoder")
    ).init(_params()),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("holes", [False, True], ids=["zeros", "holes"])
def test_value_and_gradients_are_bitwise_those_of_trees_split_by_hand(spec, compiled, holes):
    params, wrap = _params(), jax.jit if compiled else lambda f: f
    by_hand = wrap(jax.value_and_grad(_split_loss))
    value, head = by_hand(params["head"], params["encoder"], X)
    rest = {"bias": HOLE, "kernel": HOLE} if holes else _zeros(params["encoder"])
    expected = {"encoder": rest, "head": head}
    both = wrap(fo.value_and_grad(_loss, spec(), holes=holes))(params, X)
    assert _bits(both) == _bits((value, expected))
    assert _bits(wrap(fo.grad(_loss, spec(), holes=holes))(params, X)) == _bits(expected)


@pytest.mark.parametrize("spec", [fo.nothing, fo.everything], ids=["nothing", "everything"])
def test_with_nothing_or_everything_frozen_the_value_stays_that_of_jax(spec):
    params = _params()
    value, grads = jax.value_and_grad(_loss)(params, X)
    if spec is fo.everything:
        value, grads = _loss(params, X), _zeros(params)
    assert _bits(fo.value_and_grad(_loss, spec)(params, X)) == _bits((value, grads))


def test_the_state_may_be_a_traced_argument_of_the_step():
    params = _params()
    step = jax.jit(lambda params, state, x: fo.grad(_loss, state)(params, x))
    head = jax.jit(jax.grad(_split_loss))(params["head"], params["encoder"], X)
    expected = {"encoder": _zeros(params["encoder"]), "head": head}
    assert _bits(step(params, _state(), X)) == _bits(expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_has_aux_hands_on_whatever_the_function_returns_beside_its_value(compiled):
    params, wrap = _params(), jax.jit if compiled else lambda f: f

    def with_aux(params, x):
        return _loss(params, x), {"frozen": params["encoder"], "n": x.shape[0]}

    def split(head, encoder, x):
        return with_aux({"encoder": encoder, "head": head}, x)

    both = jax.value_and_grad(split, has_aux=True)
    (value, aux), head = wrap(both)(params["head"], params["encoder"], X)
    grads = {"encoder": _zeros(params["encoder"]), "head": head}
    ours = wrap(fo.value_and_grad(with_aux, "encoder", has_aux=True))(params, X)
    assert _bits(ours) == _bits(((value, aux), grads))
    ours = wrap(fo.grad(with_aux, "encoder", has_aux=True))(params, X)
    assert _bits(ours) == _bits((grads, aux))


def test_holes_go_through_a_scan_as_its_carry():
    # Whole numbers, so that the sums are exact in whatever order they are made.
    params = {"encoder": jnp.asarray([1.0, 2.0]), "head": jnp.asarray([3.0, -1.0])}
    batches = jnp.arange(8.0).reshape(4, 2)

    def body(total, x):
        def loss(params):
            return (params["encoder"] * params["head"] * x).sum()

        grads = fo.grad(loss, "encoder", holes=True)(params)
        return jax.tree.map(jnp.add, total, grads), None

    start = jax.tree.map(jnp.zeros_like, fo.partition(params, "encoder")[0])
    total, _ = jax.jit(lambda start: jax.lax.scan(body, start, batches))(start)
    expected = {"encoder": HOLE, "head": np.asarray([1 * 12, 2 * 16], np.float32)}
    assert _bits(total) == _bits(expected)


def test_vmap_gives_gradients_for_each_example():
    params = _params()
    per_example = jax.vmap(fo.grad(_loss, "encoder"), in_axes=(None, 0))(params, X)
    by_hand = jax.vmap(jax.grad(_split_loss), in_axes=(None, None, 0))
    head = by_hand(params["head"], params["encoder"], X)
    # A zero that depends on no example is broadcast, as jax does with any constant.
    rest = jax.tree.map(lambda x: np.zeros((8, *x.shape), x.dtype), params["encoder"])
    assert _bits(per_example) == _bits({"encoder": rest, "head": head})


def test_vmap_over_the_params_gives_gradients_for_each_of_them():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), _params())
    grads = jax.vmap(fo.grad(_loss, "encoder"), in_axes=(0, None))(stacked, X)
    by_hand = jax.vmap(jax.grad(_split_loss), in_axes=(0, 0, None))
    head = by_hand(stacked["head"], stacked["encoder"], X)
    assert _bits(grads) == _bits({"encoder": _zeros(stacked["encoder"]), "head": head})


@pytest.mark.parametrize("spec", [fo.nothing, fo.everything], ids=["nothing", "everything"])
def test_leaves_without_a_gradient_reach_the_function_as_they_are_and_get_zeros(spec):
    params = {
        "bool": np.asarray([True, False]),
        "count": jnp.arange(3),
        "exponent": 2,
        "function": jnp.tanh,
        "key": jax.random.key(0),
        "kind": "square",
        "switch": True,
        "w": jnp.ones(2),
    }
    seen = {}

    def loss(p):
        seen.update(p)
        noise = jax.random.normal(p["key"], (2,))
        branch = p["w"] ** p["exponent"] if p["kind"] == "square" and p["switch"] else 0.0
        moved = p["function"](jnp.where(p["bool"], branch, noise))
        return moved.sum() + p["count"].max().astype(jnp.float32)

    grads = fo.grad(loss, spec)(params)
    by_hand = jax.grad(lambda w: jnp.tanh(w[0] ** 2))(params["w"])
    assert _bits(grads) == _bits(
        {
            "bool": np.zeros(2, bool),
            "count": np.zeros(3, np.int32),
            "exponent": np.int32(0),
            "function": np.float32(0),
            "key": np.float32(0),
            "kind": np.float32(0),
            "switch": np.bool_(False),
            "w": by_hand if spec is fo.nothing else np.zeros(2, np.float32),
        }
    )
    assert all(seen[name] is params[name] for name in params if name != "w")


def test_integer_bool_and_key_arguments_of_a_jitted_step_need_nothing_special():
    params = {"b": jnp.asarray(True), "i": jnp.arange(2), "k": jax.random.key(0), "w": jnp.ones(2)}

    def loss(p):
        return jnp.where(p["b"], (p["w"] * p["i"].astype(jnp.float32)).sum(), 0.0)

    expected = {
        "b": np.bool_(False),
        "i": np.zeros(2, np.int32),
        "k": np.float32(0),
        "w": np.asarray([0, 1], "f"),
    }
    assert _bits(jax.jit(fo.grad(loss, fo.nothing))(params)) == _bits(expected)


class Pair(typing.NamedTuple):
    kernel: typing.Any
    bias: typing.Any


class Block(eqx.Module):
    kernel: typing.Any
    bias: typing.Any = None
    width: int = eqx.field(static=True, default=2)


@pytest.mark.parametrize("holes", [False, True], ids=["zeros", "holes"])
@pytest.mark.parametrize(
    "build",
    [
        lambda a, b: {"b": b, "a": a, "empty": {}, "none": None},
        lambda a, b: [a, [b]],
        lambda a, b: (a, (b, None)),
        lambda a, b: Pair(a, {"x": b}),
        lambda a, b: Block(a, [b]),
        lambda a, b: FrozenDict({"a": a, "b": {"c": b}}),
        lambda a, b: {"a": a, "b": b, "hole": HOLE},
    ],
    ids=["dict", "list", "tuple", "namedtuple", "equinox", "frozendict", "hole"],
)
def test_the_gradient_has_the_structure_of_the_params(build, holes):
    a, b = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 4.0])

    def loss(params):
        first, second = jax.tree.leaves(params)
        return (first * second).sum()

    frozen = jax.tree.unflatten(jax.tree.structure(build(a, b)), [True, False])
    gradient = fo.grad(loss, frozen, holes=holes)(build(a, b))
    expected = build(HOLE if holes else np.zeros(2, np.float32), np.asarray(a))
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    assert _bits(jax.tree.leaves(gradient)) == _bits(jax.tree.leaves(expected))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_complex_params_have_the_gradients_of_jax(frozen, compiled):
    wrap = jax.jit if compiled else lambda f: f
    params = {"a": jnp.asarray([1 + 2j, 3j]), "b": jnp.asarray([2 - 1j, 1 + 1j])}

    def loss(p):
        return jnp.abs(p["a"] * p["b"]).sum()

    other = "b" if frozen == "a" else "a"
    by_hand = wrap(jax.grad(lambda x, rest: loss({other: x, frozen: rest})))
    expected = {other: by_hand(params[other], params[frozen]), frozen: np.zeros(2, np.complex64)}
    assert _bits(wrap(fo.grad(loss, frozen))(params)) == _bits(expected)


def test_numpy_and_python_numbers_have_the_gradients_of_jax():
    params = {
        "float": 2.0,
        "complex": 1 + 1j,
        "numpy": np.asarray([1.0, 2.0], np.float32),
        "scalar": np.float32(3),
        "frozen": {"float": 4.0, "numpy": np.asarray([5.0, 6.0], np.float32), "complex": 2j},
    }
    seen = {}

    def loss(p):
        seen.update(p["frozen"])
        total = (p["numpy"] * p["frozen"]["numpy"]).sum() * p["float"] * p["scalar"]
        return total + jnp.abs(p["complex"] * p["frozen"]["complex"]) * p["frozen"]["float"]

    trained = {name: leaf for name, leaf in params.items() if name != "frozen"}
    expected = jax.grad(lambda t: loss(t | {"frozen": params["frozen"]}))(trained)
    expected["frozen"] = {"complex": 0j, "float": 0.0, "numpy": np.zeros(2, np.float32)}
    expected["frozen"] = jax.tree.map(jnp.asarray, expected["frozen"])
    seen.clear()
    gradient = fo.grad(loss, "frozen")(params)
    assert _bits(gradient) == _bits(expected)
    weak = jax.tree.map(lambda x: x.weak_type, gradient)
    assert weak == jax.tree.map(lambda x: x.weak_type, expected)
    assert all(seen[name] is leaf for name, leaf in params["frozen"].items())


def test_arguments_after_the_params_pass_through_positional_or_named():
    def loss(params, x, *, scale):
        return (params["a"] * params["b"] * x["x"]).sum() * scale

    gradient = fo.grad(loss, "a")({"a": 2.0, "b": 3.0}, {"x": jnp.asarray(5.0)}, scale=7.0)
    assert jax.tree.map(float, gradient) == {"a": 0.0, "b": 70.0}


@pytest.mark.parametrize("holes", [False, True], ids=["zeros", "holes"])
def test_frozen_leaves_have_no_backward_pass(holes):
    params = _params()

    def flops(fun, *args):
        return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]

    by_hand = flops(jax.value_and_grad(_split_loss), params["head"], params["encoder"], X)
    ours = flops(fo.value_and_grad(_loss, "encoder", holes=holes), params, X)
    assert ours <= 1.02 * by_hand
    assert flops(jax.value_and_grad(_loss), params, X) > 1.3 * by_hand


def test_no_backward_pass_for_frozen_leaves_is_even_traced():
    # Eager mode runs what is traced here as it stands.
    params = _params()

    def products(fun, *args):
        return str(jax.make_jaxpr(fun)(*args)).count("dot_general")

    by_hand = products(jax.grad(_split_loss), params["head"], params["encoder"], X)
    assert products(fo.grad(_loss, "encoder"), params, X) == by_hand
    assert products(jax.grad(_loss), params, X) > by_hand


def test_under_a_trace_zeros_are_made_once_per_shape_and_dtype():
    params = {f"layer_{i}": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)} for i in range(5)}
    params |= {"half": [jnp.ones(3, jnp.bfloat16)] * 2, "n": jnp.arange(3), "out": jnp.ones(())}
    # Of a scalar that is the value itself, the gradient 1.0 needs no broadcast.
    jaxpr = jax.make_jaxpr(fo.grad(lambda p: p["out"], ["layer_*", "half"]))(params)
    assert str(jaxpr).count("broadcast_in_dim") == 4


def test_in_eager_mode_zero_gradients_lie_where_their_parameter_lies():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    specs = [jax.sharding.PartitionSpec(*axes) for axes in (("d", None), (None, "d"), ())]
    shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
    frozen = [jax.device_put(jnp.ones((8, 16)), sharding) for sharding in shardings]
    params = {"frozen": frozen, "w": jax.device_put(jnp.ones(16), shardings[2])}
    gradient = fo.grad(lambda p: p["w"].sum(), "frozen")(params)
    assert [x.sharding for x in gradient["frozen"]] == shardings
    assert _bits(gradient["frozen"]) == _bits([np.zeros((8, 16), np.float32)] * 3)


@pytest.mark.parametrize("wrap", [fo.grad, fo.value_and_grad])
def test_the_wrapped_function_keeps_its_name_and_signature(wrap):
    wrapped = wrap(_loss, "encoder")
    assert (wrapped.__name__, wrapped.__module__) == ("_loss", __name__)
    assert inspect.signature(wrapped) == inspect.signature(_loss)


class Loss(eqx.Module):
    scale: float

    def __call__(self, params):
        return _loss(params, X) * self.scale


@pytest.mark.parametrize(
    "fun",
    [functools.partial(_loss, x=X), jax.jit(lambda p: _loss(p, X)), Loss(2.0)],
    ids=["partial", "jitted", "module"],
)
def test_any_callable_can_be_differentiated(fun):
    params = _params()
    head = jax.grad(lambda head: fun({"encoder": params["encoder"], "head": head}))(params["head"])
    expected = {"encoder": _zeros(params["encoder"]), "head": head}
    assert _bits(fo.grad(fun, "encoder")(params)) == _bits(expected)


@pytest.mark.parametrize("wrap", [fo.grad, fo.value_and_grad])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("encodr", r"'encodr' selects no leaf; nearest: 'encoder'"),
        ({"encoder": True}, r"the mask does not fit .*nothing for 'head/bias', 'head/kernel'"),
        (fo.freezable(optax.sgd(0.1)).init({"a": 1.0}), r"different params: .*'head/kernel'.*'a'"),
    ],
    ids=["pattern", "mask", "state"],
)
def test_a_spec_of_other_params_is_an_error_that_names_the_paths(wrap, spec, message):
    with pytest.raises(ValueError, match=message):
        wrap(_loss, spec)(_params(), X)


def test_arguments_may_have_any_name():
    def loss(weights, params, fun, frozen):
        return (weights["a"] * params * fun * frozen).sum()

    weights = {"a": jnp.ones(2)}
    others = {"params": 2.0, "fun": 3.0, "frozen": 5.0}
    value, grads = fo.value_and_grad(loss, fo.nothing)(weights, **others)
    assert float(value) == 60.0
    np.testing.assert_array_equal(grads["a"], [30.0, 30.0])
    np.testing.assert_array_equal(fo.grad(loss, fo.nothing)(weights, **others)["a"], [30.0, 30.0])
