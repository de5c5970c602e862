"""Tables of which some rows train: gradients from lookups, bit for bit those of the whole table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freeze_optax as fo

COUNT, WIDTH = 64, 8
RNG = np.random.default_rng(0)
# Most rows are looked up several times; some ids are negative, and some are out of range.
IDS = jnp.asarray(RNG.integers(-80, 80, (3, 40)), jnp.int32)
WEIGHTS = RNG.normal(size=(3, 40, WIDTH)).astype(np.float32)
TABLES = {
    name: jnp.asarray(RNG.normal(size=(COUNT, WIDTH)), dtype)
    for name, dtype in {"block": jnp.float32, "single": jnp.bfloat16}.items()
}
TRAINABLE = {"block": np.arange(50, COUNT), "single": np.arange(1, COUNT, 3)}
FROZEN = ~(fo.rows("block", TRAINABLE["block"]) | fo.rows("single", TRAINABLE["single"]))


def looked_up(table):
    return (jnp.tanh(table[IDS]) * WEIGHTS.astype(table.dtype)).sum()


def scanned(table):
    def body(total, ids):
        return total + jnp.tanh(table[ids]).sum(), None

    return jax.lax.scan(body, jnp.zeros((), table.dtype), IDS)[0]


def switched(table):
    branches = [lambda t: jnp.tanh(t[IDS]).sum(), lambda t: jnp.sin(t[IDS + 1]).sum()]
    return jax.lax.switch((table[0, 0] > 0).astype(jnp.int32), branches, table)


def with_head(table):
    return (jnp.tanh(table[IDS]) @ table.T).mean() + (table[IDS[:1]] ** 2).sum()


USES = {
    "index": looked_up,
    "take": lambda t: (jnp.take(t, IDS, axis=0) ** 2).sum(),
    "clip": lambda t: (t.at[IDS].get(mode="clip") ** 2).sum(),
    "small ids": lambda t: (t[IDS.astype(jnp.int8)] ** 2).sum(),
    "single elements": lambda t: (t[IDS, jnp.abs(IDS) % WIDTH] ** 2).sum(),
    "cast": lambda t: (t.astype(jnp.float16)[IDS] ** 2).sum().astype(t.dtype),
    "twice": lambda t: (t[IDS] ** 2).sum() + jnp.tanh(t[IDS[:2]]).sum() + (t[IDS[1]] ** 3).sum(),
    "vmap": lambda t: jax.vmap(lambda ids: (t[ids] ** 2).sum())(IDS).sum(),
    "remat": jax.checkpoint(jax.jit(looked_up)),
    "scan": scanned,
    "cond": switched,
    "tied head": with_head,
    "unused": lambda t: t.dtype.type(1),
}
RARE_USES = {
    "unsigned ids": lambda t: (t[IDS.astype(jnp.uint32)] ** 2).sum(),
    "unique ids": lambda t: (t.at[::2].get(unique_indices=True) ** 2).sum(),
    "columns": lambda t: (t[:, jnp.abs(IDS) % WIDTH] ** 2).sum(),
    "slices": lambda t: (t[:20] ** 2).sum() + (t[IDS[0, 0]] ** 3).sum(),
    "vmap of columns": lambda t: jax.vmap(lambda x: (x[IDS] ** 2).sum(), in_axes=1)(t).sum(),
    "jit": jax.jit(looked_up),
    "remat of scan": jax.checkpoint(scanned),
    "scan of remat": lambda t: jax.lax.scan(
        jax.checkpoint(lambda total, ids: (total + (t[ids] ** 2).sum(), None)), t.dtype.type(0), IDS
    )[0],
}


@functools.cache
def gradients(rare):
    """For each use, our gradient and that of JAX, from one program each."""
    uses = RARE_USES if rare else USES

    def all_of(differentiate):
        def loss(tables, use):
            return sum(use(x).astype(jnp.float32) for x in tables.values())

        return jax.jit(
            lambda tables: {
                name: differentiate(functools.partial(loss, use=use))(tables)
                for name, use in uses.items()
            }
        )(TABLES)

    whole = all_of(jax.grad)
    return all_of(functools.partial(fo.grad, frozen=FROZEN, holes=True)), {
        name: {key: x[TRAINABLE[key]] for key, x in whole[name].items()} for name in uses
    }


def bits(tree):
    return jax.tree.map(lambda x: (x.dtype, x.shape, np.asarray(x).tobytes()), tree)


@pytest.mark.parametrize(
    "use", [*USES, *(pytest.param(use, marks=pytest.mark.exhaustive) for use in RARE_USES)]
)
def test_the_gradient_is_bitwise_the_rows_of_that_of_the_whole_table(use):
    ours, whole = gradients(use in RARE_USES)
    assert bits(ours[use]) == bits(whole[use])


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_rows_that_are_looked_up_many_times_are_added_in_the_order_of_numpy(mode):
    def loss(params):
        return (params["block"].at[IDS].get(mode=mode) * WEIGHTS).sum()

    frozen = fo.rows("block", slice(0, 50))
    got = jax.jit(fo.grad(loss, frozen))({"block": TABLES["block"]})["block"]
    ids = np.where(IDS < 0, IDS + COUNT, IDS)  # negative ids count from the end, as in NumPy
    inside = (ids >= 0) & (ids < COUNT)
    if mode == "clip":
        ids, inside = np.clip(ids, 0, COUNT - 1), np.ones_like(inside)
    expected = np.zeros((COUNT, WIDTH), np.float32)
    np.add.at(expected, ids[inside], WEIGHTS[inside])
    expected[:50] = 0
    assert bits(got) == bits(expected)


def test_one_sum_may_be_the_gradient_of_two_tables_with_other_rows():
    def loss(tables):
        return ((tables["block"] + tables["single"])[IDS] ** 2).sum()

    tables = {"block": TABLES["block"], "single": 2 * TABLES["block"]}
    frozen = fo.rows("block", slice(0, 50)) | fo.rows("single", slice(7, None))
    got = jax.jit(fo.grad(loss, frozen, holes=True))(tables)
    whole = jax.jit(jax.grad(loss))(tables)
    assert bits(got) == bits({"block": whole["block"][50:], "single": whole["single"][:7]})


def loss_of_dict(tables, ids=IDS):
    return (tables["block"][ids] ** 3).sum()


BLOCK = {"block": TABLES["block"]}
OLD_ROWS = fo.rows("block", slice(0, 50))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_examples_under_vmap_and_auxiliary_values_are_those_of_jax(compiled):
    def loss(tables, ids):
        return loss_of_dict(tables, ids), {"ids": ids, "first": tables["block"][0]}

    wrap = jax.jit if compiled else lambda f: f
    ours = fo.value_and_grad(loss, OLD_ROWS, has_aux=True, holes=True)
    value, grads = wrap(jax.vmap(ours, in_axes=(None, 0)))(BLOCK, IDS)
    by_jax = jax.value_and_grad(loss, has_aux=True)
    expected, whole = wrap(jax.vmap(by_jax, in_axes=(None, 0)))(BLOCK, IDS)
    assert bits((value, grads)) == bits((expected, {"block": whole["block"][:, 50:]}))


def test_the_gradient_can_be_differentiated_again():
    def norm(tables, grad):
        return (grad(loss_of_dict)(tables)["block"][50:] ** 2).sum()

    ours = jax.jit(jax.grad(norm), static_argnums=1)
    got = ours(BLOCK, functools.partial(fo.grad, frozen=OLD_ROWS))["block"]
    expected = ours(BLOCK, jax.grad)["block"]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p: p["block"][0], "scalar-output"),
        (lambda p: jax.lax.complex(*p["block"][0, :2]), "real"),
    ],
    ids=["vector", "complex"],
)
def test_a_function_without_a_real_scalar_gets_the_error_of_jax(loss, message):
    with pytest.raises(TypeError, match=message):
        jax.jit(fo.grad(loss, OLD_ROWS))(BLOCK)


def test_the_program_of_a_step_finds_what_it_donates_again():
    def step(tables):
        grads = fo.grad(loss_of_dict, OLD_ROWS, holes=True)(tables)
        return {"block": tables["block"].at[50:].add(-grads["block"])}

    expected = np.array(TABLES["block"])
    expected[50:] -= np.asarray(jax.jit(jax.grad(loss_of_dict))(BLOCK)["block"])[50:]
    compiled = jax.jit(step, donate_argnums=0).lower(BLOCK).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == TABLES["block"].nbytes
    got = compiled(jax.tree.map(jnp.copy, BLOCK))["block"]
    assert bits(got) == bits(expected)
