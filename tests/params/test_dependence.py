"""What each output of a traced function depends on; the reference asks JAX for one at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback
from jax.interpreters.partial_eval import dce_jaxpr

from freeze_optax._params.dependence import depends_on, has_effects, without_effects


@jax.custom_jvp
def custom(x: Any, y: Any) -> Any:
    return x + 1.0, y + 1.0


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents))


def scanned(x: Any, y: Any) -> Any:
    # The first carry depends on `y` after two rows, the last one never does.
    def f(carry: Any, row: Any) -> Any:
        a, b, c, d = carry
        return (b, c, y, d), (d * row, row, a)

    return jax.lax.scan(f, (x, x, x, x), jnp.stack([x, x, x]))


FUNCTIONS = {
    "operations": lambda x, y: (x + 1.0, x * y, y, jnp.ones(()), 2.0 * x),
    "jit": jax.jit(lambda x, y: (jnp.sin(x), jnp.sin(y), jax.jit(lambda y: 2.0)(y))),
    "checkpoint": jax.checkpoint(lambda x, y: (jnp.sin(x), jnp.sin(y))),
    "custom_jvp": custom,
    "scan": scanned,
    "cond": lambda x, y: jax.lax.cond(x > 0, lambda: (x, y, x), lambda: (x, x, 0.0)),
    "cond on y": lambda x, y: jax.lax.cond(y > 0, lambda: (x, x), lambda: (x, x)),
    "literals": lambda x, y: (1.0, jnp.sin(2.0), x),
    "gradient": lambda x, y: jax.vjp(lambda a, b: jnp.sin(a) * jnp.cos(b), x, y)[1](1.0),
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_each_output_is_told_apart_as_by_dead_code_elimination(f):
    jaxpr = jax.make_jaxpr(f)(1.0, 2.0).jaxpr
    outputs = range(len(jaxpr.outvars))
    for marked in ([False, True], [True, False], [False, False], [True, True]):
        expected = []
        for i in outputs:
            _, used = dce_jaxpr(jaxpr, [i == j for j in outputs])
            expected.append(any(a and b for a, b in zip(used, marked, strict=True)))
        assert depends_on(jaxpr, marked) == expected


def test_an_output_of_a_loop_with_a_condition_depends_on_all_that_goes_in():
    def f(x: Any, y: Any) -> Any:
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + y), (0, x)), x

    assert depends_on(jax.make_jaxpr(f)(1.0, 2.0).jaxpr, [False, True]) == [True, True, False]
    assert depends_on(jax.make_jaxpr(f)(1.0, 2.0).jaxpr, [False, False]) == [False] * 3


def read(x: Any) -> Any:
    return io_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), x)


@pytest.mark.parametrize(
    "call",
    [
        read,
        jax.jit(read),
        lambda x: jax.lax.scan(lambda c, _: (read(c), None), x, None, 2)[0],
        lambda x: jax.lax.cond(x > 0, read, jnp.sin, x),
    ],
    ids=["bare", "jit", "scan", "cond"],
)
def test_what_a_callback_returned_counts_as_marked_and_is_never_computed_again(call):
    def f(x: Any, y: Any) -> Any:
        jax.debug.print("{}", y)
        return call(x), jnp.sin(x)

    jaxpr = jax.make_jaxpr(jax.jit(f))(jnp.float32(1.0), 2.0).jaxpr
    assert depends_on(jaxpr, [False, False]) == [True, False]
    assert has_effects(jaxpr)
    again, used = dce_jaxpr(without_effects(jaxpr), [False, True])
    assert used == [True, False]
    assert not has_effects(again)
    assert has_effects(jaxpr), "the original is unchanged"


def test_a_collective_over_a_mesh_is_no_effect():
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("x")

    def f(x: Any, y: Any) -> Any:
        return jax.lax.all_gather(x, "x", tiled=True), y

    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    jaxpr = jax.make_jaxpr(mapped)(jnp.ones(2), jnp.ones(2)).jaxpr
    assert depends_on(jaxpr, [False, True]) == [False, True]
    assert without_effects(jaxpr) is jaxpr
