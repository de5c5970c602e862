"""`stack_layers` and `unstack_layers`: what NumPy stacks, and back to the bit."""

import collections
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jax import experimental
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import freeze_optax as fo

new_ref = getattr(jax, "new_ref", None) or experimental.mutable_array  # its name before JAX 0.9


def layer(i: int) -> dict[str, Any]:
    return {"kernel": jnp.full((2, 3), float(i)), "bias": jnp.full(3, -float(i))}


def encoder(count: int = 3, **others: Any) -> dict[str, Any]:
    return {"encoder": {**others, **{f"layer_{i}": layer(i) for i in range(count)}}, "head": 1.0}


def assert_same(a: Any, b: Any) -> None:
    """Fails unless two trees have the same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(left) is type(right)
        assert np.shape(left) == np.shape(right)
        assert bits(left) == bits(right)


def bits(x: Any) -> tuple[str, bytes]:
    if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), np.asarray(jax.random.key_data(x)).tobytes()
    return str(np.asarray(x).dtype), np.asarray(x).tobytes()


def test_layers_are_stacked_in_natural_order_and_come_back():
    params = encoder(12, norm=jnp.ones(2))
    stacked = fo.stack_layers(params, "encoder/layer_*", to="encoder/layers")
    assert list(stacked["encoder"]) == ["norm", "layers"]
    assert stacked["encoder"]["norm"] is params["encoder"]["norm"]
    kernel = np.stack([np.full((2, 3), float(i), np.float32) for i in range(12)])
    np.testing.assert_array_equal(stacked["encoder"]["layers"]["kernel"], kernel)
    assert_same(fo.unstack_layers(stacked, "encoder/layers", "encoder/layer_{0..11}"), params)


def with_bits(dtype: Any, *patterns: int) -> jax.Array:
    unsigned = np.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    return jnp.asarray(np.array(patterns, unsigned).view(jnp.dtype(dtype)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_each_bit_is_kept(jit):
    nan, sub = 0x7FC12345, 0x00000001
    layers = [
        {
            "float32": with_bits(jnp.float32, nan, 0x80000000, sub + i),
            "bfloat16": with_bits(jnp.bfloat16, 0x7F81 + i, 0x8000, 1),
            "float16": with_bits(jnp.float16, 0x7C01 + i, 0x8000, 1),
            "float8": with_bits(jnp.float8_e4m3fn, 0x80 + i, 0xFF, 1),
            "complex": jnp.array([complex(-0.0, float(i))], jnp.complex64),
            "int": jnp.array(7 + i),
        }
        for i in range(3)
    ]
    stack, unstack = fo.stack_layers, fo.unstack_layers
    stacked = (jax.jit(stack) if jit else stack)(layers)
    for name, array in stacked.items():
        expected = b"".join(np.asarray(layer[name]).tobytes() for layer in layers)
        assert np.asarray(array).tobytes() == expected, name
    assert_same((jax.jit(unstack) if jit else unstack)(stacked), layers)


def test_keys_numpy_arrays_holes_and_what_is_no_array():
    keys = jax.random.split(jax.random.key(3), 2)
    layers = [
        {
            "key": keys[i],
            "long": np.array([1e-300, i], np.float64),
            "scalar": np.array(float(i)),
            "hole": optax.MaskedNode(),
            "none": None,
            "act": jnp.tanh,
            "count": 3,
        }
        for i in range(2)
    ]
    stacked = fo.stack_layers(layers)
    np.testing.assert_array_equal(
        jax.random.key_data(stacked["key"]), np.stack([jax.random.key_data(k) for k in keys])
    )
    assert stacked["long"].dtype == np.float64
    assert isinstance(stacked["long"], np.ndarray)
    assert (stacked["act"], stacked["count"], stacked["none"]) == (jnp.tanh, 3, None)
    assert isinstance(stacked["hole"], optax.MaskedNode)
    again = fo.unstack_layers(stacked)
    assert again[1].pop("act") is jnp.tanh
    assert again[0].pop("act") is jnp.tanh
    for old in layers:
        del old["act"]
    assert_same(again, layers)


def test_containers_of_every_kind_stay_what_they_are():
    inner = encoder(2)
    frozen = FrozenDict(inner)
    ordered = collections.OrderedDict(z=1.0, **inner["encoder"])
    listed = {"layers": [layer(0), layer(1)], "head": 2.0}
    haiku = {"net/~/linear_0": layer(0), "net/~/linear_1": layer(1), "net/~/out": layer(2)}
    for params, layers, to, back in [
        (frozen, "encoder/layer_*", "encoder/layers", "encoder/layer_{0..1}"),
        (inner, "encoder/*", None, "encoder/layer_{0..1}"),
        (ordered, "layer_*", "layers", ["layer_0", "layer_1"]),
        (listed, "layers/*", None, None),
        (haiku, "net/~/linear_*", "net/~/linear", "net/~/linear_{0..1}"),
        (haiku, "net/~/{linear_0,linear_1}", "net/~/linear_0", "net/~/linear_{0..1}"),
        ([layer(0), layer(1)], "*", None, None),
        ([jnp.ones(2), jnp.zeros(2)], "*", None, None),
    ]:
        stacked = fo.stack_layers(params, layers, to)
        place = to or layers.rpartition("/")[0]
        assert_same(fo.unstack_layers(stacked, place, back), params)


def test_an_equinox_module_is_stacked_in_place_of_its_layers():
    model = eqx.nn.MLP(3, 3, 3, depth=2, key=jax.random.key(0))
    stacked = fo.stack_layers(model, "layers/*")
    assert isinstance(stacked.layers, eqx.nn.Linear)
    weights = [np.asarray(linear.weight) for linear in model.layers]
    np.testing.assert_array_equal(stacked.layers.weight, np.stack(weights))
    again = fo.unstack_layers(stacked, "layers").layers
    assert_same(again, list(model.layers))


class Deep(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(2, 1, rngs=rngs)


def test_an_nnx_state_is_stacked_and_merges_again():
    with jax.numpy_dtype_promotion("standard"):
        graph, state = nnx.split(Deep(nnx.Rngs(0)))
    stacked = fo.stack_layers(state, "layers/*")
    kernels = [np.asarray(state["layers"][i]["kernel"][...]) for i in range(3)]
    np.testing.assert_array_equal(stacked["layers"]["kernel"][...], np.stack(kernels))
    again = fo.unstack_layers(stacked, "layers")
    assert_same(again, state)
    nnx.merge(graph, again)


def test_abstract_params_are_stacked_with_their_shardings():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    struct = jax.ShapeDtypeStruct((16, 2), jnp.bfloat16, sharding=sharding)
    params = {f"layer_{i}": {"w": struct} for i in range(3)}
    stacked = fo.stack_layers(params, to="layers")["layers"]["w"]
    assert (stacked.shape, stacked.dtype) == ((3, 16, 2), jnp.bfloat16)
    assert stacked.sharding.spec == PartitionSpec(None, "d", None)
    (first, *_) = fo.unstack_layers({"w": stacked})
    assert (first["w"].shape, first["w"].dtype) == ((16, 2), jnp.bfloat16)
    assert first["w"].sharding.spec == PartitionSpec("d", None)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_the_bits_and_the_shardings_stay(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    values = [np.array([-0.0, 1e-40] * 4, np.float32) * (i + 1) for i in range(8)]
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("d")))
    with jax.set_mesh(mesh):
        layers = [put(x) for x in values]
        stacked = fo.stack_layers(layers)
        assert np.asarray(stacked).tobytes() == np.stack(values).tobytes()
        assert stacked.sharding.spec == PartitionSpec(None, "d")
        over_layers = put(np.stack(values))
        for sharded in (stacked, over_layers):
            again = fo.unstack_layers(sharded)
            assert [np.asarray(x).tobytes() for x in again] == [x.tobytes() for x in values]


def test_layers_in_host_memory_stay_there():
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    stacked = fo.stack_layers([jax.device_put(jnp.full(2, float(i)), host) for i in range(2)])
    assert stacked.sharding.memory_kind == "pinned_host"
    assert all(x.sharding.memory_kind == "pinned_host" for x in fo.unstack_layers(stacked))


def test_a_stack_trains_as_the_layers_do():
    params = {f"layer_{i}": layer(i)["kernel"][:, :2] + 0.1 for i in range(3)}
    x = jnp.array([[1.0, -2.0]])

    def apply(x, w):
        return jnp.tanh(x @ w), None

    def loss(params):
        y = x
        for i in range(3):
            y, _ = apply(y, params[f"layer_{i}"])
        return y.sum()

    def stacked_loss(stack):
        return fo.scan(apply, x, stack)[0].sum()

    expected = fo.stack_layers(jax.grad(loss)(params))
    got = jax.grad(stacked_loss)(fo.stack_layers(params))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # The stack may be made in the loss as well.
    through = jax.grad(lambda params: stacked_loss(fo.stack_layers(params)))(params)
    np.testing.assert_allclose(fo.stack_layers(through), expected, rtol=1e-6)


def changed(**leaves: Any) -> dict[str, Any]:
    params = encoder()
    params["encoder"]["layer_2"].update(leaves)
    return params


BOXED = {f"layer_{i}": {"w": nn.Partitioned(jnp.ones(2), names=("d",))} for i in range(2)}
TWO = {"a": {"layer_0": layer(0)}, "b": {"layer_0": layer(0)}}


@pytest.mark.parametrize(
    ("params", "arguments", "error", "match"),
    [
        (encoder(), ("encoder/layr_*", "encoder/x"), ValueError, "names no node; nearest: 'encod"),
        (encoder(), (0,), TypeError, "fo.stack_layers takes strings"),
        (encoder(), ("encoder/layer_*", 1), TypeError, "the path of a stack is a string, not 1"),
        (
            changed(bias=jnp.ones(4)),
            ("encoder/*",),
            ValueError,
            r"'encoder/layer_0/bias' is float32\[3\], and 'encoder/layer_2/bias' is float32\[4\]",
        ),
        (
            changed(bias=jnp.ones(3, jnp.bfloat16)),
            ("encoder/*",),
            ValueError,
            r"float32\[3\], and 'encoder/layer_2/bias' is bfloat16\[3\]",
        ),
        (
            changed(scale=jnp.ones(3)),
            ("encoder/*",),
            ValueError,
            "have the same leaves, but these differ: only in 'encoder/layer_2': 'scale'",
        ),
        (changed(bias=None), ("encoder/*",), ValueError, "only in 'encoder/layer_0': 'bias'"),
        (
            changed(bias=optax.MaskedNode()),
            ("encoder/*",),
            ValueError,
            r"'encoder/layer_0/bias' is float32\[3\], and 'encoder/layer_2/bias' is a hole",
        ),
        ([{"a": jnp.tanh}, {"a": jnp.sin}], ("*",), ValueError, "names no node"),
        (
            [{"w": jnp.ones(2), "n": 1}, {"w": jnp.ones(2), "n": 2}],
            ("*",),
            ValueError,
            "'0/n' is 1, and '1/n' is 2",
        ),
        ([{"w": 1.0}, {"w": 1.0}], ("*",), ValueError, "'0/w' is a Python float; .*asarray"),
        (
            [{"w": [jnp.ones(2)]}, {"w": (jnp.ones(2),)}],
            ("*",),
            ValueError,
            "'0' and '1' have other containers or static fields",
        ),
        (TWO, ("*/layer_0",), ValueError, "one parent, but .* names nodes of 'a', 'b'"),
        (
            encoder(norm=jnp.ones(1)),
            ("encoder/layer_*",),
            ValueError,
            "would drop 'norm', which it holds beside .* to='encoder/layers'",
        ),
        (encoder(), ("encoder/layer_*", "layers"), ValueError, "beside 'encoder/layer_0', as 'enc"),
        (encoder(), ("encoder/layer_*", "encoder/a/b"), ValueError, "as 'encoder/b'; move it"),
        (
            encoder(norm=jnp.ones(1)),
            ("encoder/layer_*", "encoder/norm"),
            ValueError,
            "'encoder' has 'norm' already",
        ),
        (
            {"l": [layer(0), layer(1)]},
            ("l/*", "l/x"),
            ValueError,
            "'l' is a list, .*leave `to` out",
        ),
        (BOXED, ("*",), ValueError, "'layer_0/w' is in a Partitioned that names the axes"),
        (
            {"a/b": layer(0), "a": {"b": layer(1)}},
            ("a/b",),
            ValueError,
            "which of 2 nodes at 'a/b'",
        ),
    ],
)
def test_what_can_not_be_stacked_is_an_error_that_names_it(params, arguments, error, match):
    with pytest.raises(error, match=match):
        fo.stack_layers(params, *arguments)


STACK = {"encoder": {"layers": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, "norm": 1.0}}


@pytest.mark.parametrize(
    ("params", "arguments", "error", "match"),
    [
        (STACK, ("encoder/layer",), ValueError, "nothing at 'encoder/layer'; nearest: 'encoder/la"),
        (STACK, (0,), TypeError, "takes the path of a stack, but got 0"),
        (STACK, ("encoder/layers", "encoder/l_{0..3}"), ValueError, "has 3 layers, .* names 4"),
        (STACK, ("encoder/layers", ["encoder/l"] * 3), ValueError, "has 3 layers, .* names 1"),
        (STACK, ("encoder/layers", "l_{0..2}"), ValueError, "beside 'encoder/layers', as 'encod"),
        (
            STACK,
            ("encoder/layers", "encoder/{a,norm,b}"),
            ValueError,
            "'encoder' has 'norm' already",
        ),
        ({"a": jnp.ones((2, 1)), "b": jnp.ones(3)}, (), ValueError, "'a' has 2 .* and 'b' has 3"),
        ({"a": jnp.ones((2, 1)), "b": jnp.ones(())}, (), ValueError, "'b' has no axis"),
        ({"a": jnp.tanh}, (), ValueError, "'' is no stack: it holds no array"),
        ([STACK], ("0", "l_{0..2}"), ValueError, "'' is a list, .*leave `to` out"),
    ],
)
def test_what_is_no_stack_is_an_error_that_names_it(params, arguments, error, match):
    with pytest.raises(error, match=match):
        fo.unstack_layers(params, *arguments)


def test_a_reference_and_an_nnx_module_are_errors_with_the_remedy():
    with pytest.raises(ValueError, match="'0/w' can't be stacked: it is a reference"):
        fo.stack_layers([{"w": new_ref(jnp.ones(2)), "b": jnp.ones(2)}] * 2)
    with jax.numpy_dtype_promotion("standard"):
        model = Deep(nnx.Rngs(0))
    for function in (fo.stack_layers, fo.unstack_layers):
        with pytest.raises(TypeError, match=r"take its state: nnx.state\(model\)"):
            function(model, "layers/*")
    param = nnx.Param(jnp.ones(2))
    param.set_metadata(out_sharding=("d",))
    with pytest.raises(ValueError, match="in a Param that names the axes"):
        fo.stack_layers(nnx.State({"0": param}))
