"""What factors cost: a multiplication and a selection for each element that trains, no more.

The figures are those of XLA's own analysis of the optimised step, without and with the factors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from tests.support.compiling import OPTIMISED

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZE, LEAVES = 1000, [f"layer_{i}" for i in range(4)]
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adamw": optax.adamw(0.1, weight_decay=0.1)}
RULES = {"layer_*": 0.5}
# The multiplication, and the selection, which JAX 0.12 counts. Before, the conversions of a
# bfloat16 to float32 and back count.
FLOPS = {"float32": 2, "bfloat16": 3}
# A scalar is compared with zero; its bytes are read for that and for the product, and written.
SMALL = 16


class Costs(NamedTuple):
    flops: float
    bytes: float
    temporary: int
    output: int


def costs(tx: Any, dtype: str, state: Any = None) -> Costs:
    params = {name: jnp.ones(SIZE, dtype) for name in LEAVES}
    state = tx.init(params) if state is None else state

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=dict(OPTIMISED))
    compiled = jitted.lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    analysis = compiled.cost_analysis()
    return Costs(
        analysis["flops"],
        analysis["bytes accessed"],
        memory.temp_size_in_bytes,
        # Of each output there is a pointer beside its bytes.
        memory.output_size_in_bytes - 8 * len(jax.tree.leaves((params, state))),
    )


@pytest.mark.parametrize("dtype", FLOPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "frozen", [pytest.param(fo.nothing, id="all train"), pytest.param("layer_{1..3}", id="one")]
)
def test_a_factor_costs_a_product_and_a_selection_for_each_element_that_trains(name, dtype, frozen):
    inner = OPTIMIZERS[name]
    bare = costs(fo.freezable(inner, frozen), dtype)
    ours = costs(fo.freezable(optax.chain(inner, fo.rates(RULES)), frozen), dtype)
    count = len(LEAVES) if frozen is fo.nothing else 1
    assert 0 < ours.flops - bare.flops <= count * (FLOPS[dtype] * SIZE + 2)
    assert 0 < ours.bytes - bare.bytes <= count * SMALL
    assert ours.temporary == bare.temporary
    assert ours.output - bare.output == count * 4


def test_two_of_them_are_two_multiplications_so_the_analysis_sees_one():
    inner = OPTIMIZERS["sgd"]
    one, two = (
        costs(fo.freezable(optax.chain(inner, *[fo.rates(RULES)] * count)), "float32")
        for count in (1, 2)
    )
    assert two.flops - one.flops >= SIZE * len(LEAVES)


def test_the_cost_does_not_depend_on_the_factors():
    # So it is that of one compiled step. Factors of 1, never adjusted, cost as much.
    inner = OPTIMIZERS["sgd"]
    found = {
        costs(fo.freezable(optax.chain(inner, fo.rates(rules))), "float32")
        for rules in (RULES, {}, {"layer_0": 0.0})
    }
    assert len(found) == 1


def test_since_thaw_costs_as_much_whatever_the_cohorts():
    inner, schedule = OPTIMIZERS["sgd"], optax.linear_schedule(0.0, 1.0, 100)
    params = {name: jnp.ones(SIZE) for name in LEAVES}
    chain = optax.chain(inner, fo.since_thaw(schedule))
    tx = fo.freezable(chain, LEAVES[1:])
    state = tx.init(params)
    for name in LEAVES[1:]:
        state = fo.thaw(state, params, name)
    bare, one = (costs(fo.freezable(x), "float32") for x in (inner, chain))
    four = costs(tx, "float32", state)
    for ours, cohorts in ((one, 1), (four, 4)):
        # The schedule itself has some dozen operations for each cohort.
        assert ours.flops - bare.flops <= FLOPS["float32"] * SIZE * len(LEAVES) + 64 * cohorts
        assert ours.bytes - bare.bytes <= 512 * cohorts
        assert ours.temporary - bare.temporary <= 256 * cohorts
