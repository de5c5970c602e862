"""What XLA for a GPU makes of a step, against code split by hand: memory, and what is launched."""

from pathlib import Path

import pytest

from benchmarks.cases import COMPILED, Case
from benchmarks.compiled import LIMIT
from benchmarks.steps import BY_HAND, DROP_IN, WAYS, Way, stages
from tests.support import absent_gpu

pytestmark = pytest.mark.usefixtures("standard_promotion")


def costs(case: Case, way: Way, folder: Path) -> dict[str, float]:
    """Memory as XLA plans it, and how many commands the device gets: products, and all of them."""
    temporary, peak, lines = list[int](), list[int](), list[str]()
    for i, stage in enumerate(stages(case, way.parts(case))):
        of_stage = folder / str(i)
        program = absent_gpu.compiled(
            stage.function, *stage.args, donated=stage.donated, folder=of_stage
        )
        memory = program.memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        held = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        peak.append(held + memory.output_size_in_bytes + memory.temp_size_in_bytes)
        lines += absent_gpu.commands(of_stage).splitlines()
    return {
        "temporary bytes": max(temporary),
        "peak bytes": max(peak),
        "products": sum("Matmul" in x or "Gemm" in x for x in lines),
        "commands": sum(": k" in x for x in lines),
    }


@pytest.mark.parametrize("name", COMPILED)
def test_a_step_costs_what_code_split_by_hand_costs(name: str, tmp_path: Path):
    case = COMPILED[name]
    ours, by_hand = (costs(case, WAYS[way], tmp_path / way) for way in (DROP_IN, BY_HAND))
    over = {k: (ours[k], x) for k, x in by_hand.items() if ours[k] > LIMIT * x}
    assert not over


def test_a_peer_costs_more_where_something_else_reads_the_gradients(tmp_path: Path):
    case, ways = COMPILED["norm logged"], ("optax.partition", DROP_IN)
    peer, ours = (costs(case, WAYS[way], tmp_path / way) for way in ways)
    assert peer["products"] > 1.5 * ours["products"]
