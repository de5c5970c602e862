import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from freeze_optax._params.zeros import Zeros
from tests.support.compiling import OPTIMISED

FLOATS = [
    "float16",
    "bfloat16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
]
SIGNED_ZERO = [name for name in FLOATS if not name.endswith("fnuz")]
INTEGERS = ["int4", "uint4", "int8", "uint8", "int32", "uint32", "bool"]

SPECIAL_32 = np.array(
    [
        *(0x00000000, 0x80000000),  # zeros
        *(0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF),  # subnormals
        *(0x7F800000, 0xFF800000),  # infinities
        *(0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFFFFFFF, 0x7FD55555),  # quiet NaNs
        *(0x3F800000, 0xBF800000, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),  # finite ones
    ],
    np.uint32,
)


def _bytes(x):
    x = np.asarray(x)
    return (str(x.dtype), x.shape, x.tobytes())


def _every_number(name):
    """All bit patterns of a small dtype but signalling NaNs, the telling ones of a large one."""
    if name == "complex64":
        return np.stack([SPECIAL_32, SPECIAL_32[::-1]], -1).reshape(-1).view(np.complex64)
    if name == "float64":
        return np.array([0, 1 << 63, 1, 0x7FF0 << 48, 0x7FF8 << 48 | 1], np.uint64).view(name)
    dtype = jnp.dtype(name)
    if dtype.itemsize == 4:
        return SPECIAL_32.view(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    everything = np.arange(1 << 8 * dtype.itemsize, dtype=unsigned)
    if name in ("float16", "bfloat16", "float8_e5m2"):
        mantissa = jnp.finfo(dtype).nmant
        quiet = everything >> (mantissa - 1) & 1 == 1
        is_nan = np.isnan(everything.view(dtype).astype(np.float32))
        everything = everything[quiet | ~is_nan]
    return everything.view(dtype)


@pytest.mark.parametrize("name", [*FLOATS, "complex64", "float64"])
def test_adding_an_update_zero_under_jit_keeps_every_bit(name):
    numbers = _every_number(name)
    x64 = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", name == "float64" or x64)
    try:
        add = jax.jit(lambda x: x + Zeros().update(x), compiler_options=dict(OPTIMISED))
        added = _bytes(add(jnp.asarray(numbers)))
    finally:
        jax.config.update("jax_enable_x64", x64)
    assert added == _bytes(numbers)


@pytest.mark.parametrize("name", [*INTEGERS, "uint16"])
def test_adding_an_update_zero_keeps_integers_and_bools(name):
    dtype = jnp.dtype(name)
    numbers = jnp.asarray(np.array([0, 1, 1, 0, 1], np.int32).astype(dtype))
    for add in (lambda x: x + Zeros().update(x), jax.jit(lambda x: x + Zeros().update(x))):
        assert _bytes(add(numbers)) == _bytes(numbers)


@pytest.mark.parametrize("name", SIGNED_ZERO)
def test_update_zeros_are_negative_where_the_dtype_has_negative_zero(name):
    leaf = jnp.ones((2, 3), name)
    expected = np.copysign(np.zeros((2, 3), np.float32), -1).astype(jnp.dtype(name))
    assert np.signbit(expected.astype(np.float32)).all()
    assert _bytes(Zeros().update(leaf)) == _bytes(expected)
    assert _bytes(jax.jit(Zeros().update)(leaf)) == _bytes(expected)


@pytest.mark.parametrize("name", ["float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_update_zeros_are_plain_where_the_pattern_of_negative_zero_is_nan(name):
    update = Zeros().update(jnp.ones(3, name))
    assert _bytes(update) == (name, (3,), b"\0\0\0")


def test_both_parts_of_a_complex_update_zero_are_negative():
    update = Zeros().update(jnp.ones(2, jnp.complex64))
    assert _bytes(update) == ("complex64", (2,), b"\0\0\0\x80" * 4)


@pytest.mark.parametrize("name", [*FLOATS, "complex64"])
def test_gradient_zeros_are_positive_and_like_the_leaf(name):
    size = jnp.dtype(name).itemsize
    assert _bytes(Zeros().gradient(jnp.ones((2, 1), name))) == (name, (2, 1), bytes(2 * size))


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_and_bools_have_gradients_and_updates_of_their_own_dtype(name):
    leaf = jnp.ones((2, 3), name)
    for zero in (Zeros().gradient(leaf), Zeros().update(leaf)):
        assert _bytes(zero) == _bytes(np.zeros((2, 3), jnp.dtype(name)))


@pytest.mark.parametrize(
    ("leaf", "shape"),
    [
        (jax.random.key(0), ()),
        (jax.random.split(jax.random.key(0), 3), (3,)),
        ("text", ()),
        (len, ()),
        (np.array(["a", "b"]), (2,)),
        (jnp.float32, ()),
        # This dtype holds powers of two: it has no zero.
        (jnp.ones(2, jnp.float8_e8m0fnu), (2,)),
    ],
    ids=["key", "keys", "string", "function", "strings", "class", "exponents"],
)
def test_what_is_no_number_gets_float32_zeros_of_its_shape(leaf, shape):
    assert _bytes(Zeros().gradient(leaf)) == _bytes(np.full(shape, 0.0, np.float32))
    assert _bytes(Zeros().update(leaf)) == _bytes(np.full(shape, -0.0, np.float32))


def test_a_float0_gradient_alone_gives_an_update_that_changes_no_integer():
    assert _bytes(Zeros().update(np.zeros(2, jax.dtypes.float0))) == _bytes(np.zeros(2, bool))


@pytest.mark.parametrize(
    ("leaf", "update", "gradient"),
    [
        (2.0, jnp.asarray(-0.0), jnp.asarray(0.0)),
        (2j, jnp.asarray(complex(-0.0, -0.0)), jnp.asarray(0j)),
        (3, jnp.asarray(0), jnp.asarray(0)),
        (True, jnp.asarray(False), jnp.asarray(False)),
        (np.float32(2), jnp.float32(-0.0), jnp.float32(0)),
        (np.ones(2, np.float16), -jnp.zeros(2, jnp.float16), jnp.zeros(2, jnp.float16)),
        (np.int8(3), jnp.int8(0), jnp.int8(0)),
    ],
    ids=["float", "complex", "int", "bool", "numpy scalar", "numpy array", "numpy int"],
)
def test_python_and_numpy_numbers_get_zeros_as_jax_reads_them(leaf, update, gradient):
    zeros = Zeros()
    assert _bytes(zeros.update(leaf)) == _bytes(update)
    assert _bytes(zeros.gradient(leaf)) == _bytes(gradient)


def test_gradient_and_update_zeros_of_one_leaf_do_not_mix_under_a_trace():
    # 0.0 == -0.0, so a table of made zeros can't tell them apart by value.
    @jax.jit
    def both_orders(x):
        first, second = Zeros(), Zeros()
        up = first.update(x), first.gradient(x)
        down = second.gradient(x), second.update(x)
        return [up[0], down[1]], [up[1], down[0]]

    updates, gradients = both_orders(jnp.ones(2))
    assert [np.signbit(x).tolist() for x in updates] == [[True, True]] * 2
    assert [np.signbit(x).tolist() for x in gradients] == [[False, False]] * 2


def test_under_a_trace_equal_leaves_share_one_zero():
    def make(leaves):
        zeros = Zeros()
        return [zeros.update(x) for x in leaves]

    leaves = [jnp.ones(3), jnp.ones(3), jnp.ones(2), jnp.ones(3, jnp.bfloat16), jnp.ones(3)]
    assert str(jax.make_jaxpr(make)(leaves)).count("broadcast_in_dim") == 3


def test_outside_a_trace_each_zero_has_a_buffer_of_its_own_and_can_be_donated():
    zeros = Zeros()
    made = [zeros.gradient(jnp.ones(3)) for _ in range(2)]
    assert made[0].unsafe_buffer_pointer() != made[1].unsafe_buffer_pointer()
    moved = jax.jit(lambda x, y: (x + 1, y + 2), donate_argnums=(0, 1))(*made)
    assert [x.tolist() for x in moved] == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("make", [Zeros.gradient, Zeros.update])
@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, "complex64"])
def test_a_copied_zero_has_the_bits_of_the_one_that_was_made(make, name):
    zeros = Zeros()
    first, second = (make(zeros, jnp.ones((2, 3), name)) for _ in range(2))
    assert second is not first
    assert _bytes(second) == _bytes(first) == _bytes(make(Zeros(), jnp.ones((2, 3), name)))


def test_a_zero_is_copied_only_for_leaves_of_the_same_type_and_place():
    first, second = jax.devices()[:2]
    one = jnp.ones(())
    leaves = [one, jnp.asarray(1.0), *(jax.device_put(one, device) for device in (first, second))]
    zeros = Zeros()
    for leaf in [*leaves, *leaves]:
        like = jnp.full_like(leaf, -0.0)
        zero = zeros.update(leaf)
        for attribute in ("weak_type", "sharding", "committed"):
            assert getattr(zero, attribute) == getattr(like, attribute)


@pytest.mark.parametrize("make", [Zeros.gradient, Zeros.update])
def test_zeros_lie_where_their_leaf_lies(make):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    leaf = jax.device_put(jnp.ones((2, 16)), sharding)
    on_second = jax.device_put(jnp.ones(3), jax.devices()[1])
    zeros = Zeros()
    for _ in range(2):
        assert make(zeros, leaf).sharding == sharding
        assert make(zeros, on_second).devices() == {jax.devices()[1]}


def test_freezable_gives_negative_zeros_for_frozen_leaves_and_holes_for_holes():
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float16), "i": jnp.arange(2), "w": jnp.ones(1)}
    grads = {
        "a": jnp.full(2, jnp.nan),
        "b": optax.MaskedNode(),
        "i": np.zeros(2, jax.dtypes.float0),
        "w": jnp.ones(1),
    }
    tx = fo.freezable(optax.sgd(0.5), ["a", "b"])
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.map(_bytes, updates) == {
        "a": _bytes(np.full(2, -0.0, np.float32)),
        "b": optax.MaskedNode(),
        "i": _bytes(np.zeros(2, np.int32)),
        "w": _bytes(np.full(1, -0.5, np.float32)),
    }
