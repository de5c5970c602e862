"""The benchmark for a GPU, tried on a CPU with tiny models; and the page of its figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import gpu_report, results
from benchmarks.gpu import BITS, DECODER, EDITS, failure
from benchmarks.steps import BY_HAND, DROP_IN

ROOT = Path(__file__).parents[2]
ROWS = "100 rows of 1,024"


@pytest.mark.slow
def test_a_tiny_run_writes_finite_figures_of_each_case_and_they_make_a_page(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", out]
    command += ["--only", DECODER, EDITS, BITS, ROWS]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True, text=True)

    found = json.loads(out.read_text())
    assert all(map(math.isfinite, jax.tree.leaves(found[EDITS]))), found[EDITS]
    assert found[EDITS]["thaw what was dropped"]["survivors kept in place"] == 4
    assert found[EDITS]["thaw what was dropped"]["bytes made"] == 4 * 32 * 32 * 4
    assert found[EDITS]["thaw what was parked"]["bytes made"] == 0
    assert list(found[BITS].values()) == [{"frozen bits kept": True, "ulps": 0}] * 2
    (case,) = found["steps"].values()
    assert list(case["ways"]) == [BY_HAND, DROP_IN]
    for figures in case["ways"].values():
        assert {"milliseconds", "ratio", "tokens per second", "peak bytes"} <= figures.keys()
        assert all(math.isfinite(x) and x > 0 for x in figures.values()), figures
    assert ROWS in gpu_report.page(found)


def test_the_page_is_that_of_the_stored_figures():
    page = (ROOT / "docs" / "explanation" / "gpu.md").read_text()
    assert page == gpu_report.page(results.read("gpu"))


def test_an_error_of_memory_says_how_much_xla_asked_for():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate {} with allocator GPU_0_bfc"
    assert failure(RuntimeError(text.format("1.50GiB"))) == {"out of memory": 3 * 2**29}
    assert failure(RuntimeError(text.format("12B"))) == {"out of memory": 12}
    assert failure(ValueError("a shape")) == {"error": "ValueError: a shape"}
