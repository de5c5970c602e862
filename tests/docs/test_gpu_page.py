"""The benchmark for a GPU, tried on a CPU with tiny models; and the page of its figures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import gpu_report, results, streaming_report
from benchmarks.gpu import BANDWIDTH, BITS, DECODER, EDITS, failure
from benchmarks.steps import BY_HAND, DROP_IN
from benchmarks.streaming import MOVED, ON_DEVICE, STREAMED

ROOT = Path(__file__).parents[2]
ROWS = "100 rows of 1,024"
ON_HOST = "LoRA in 4 layers, 8 tokens, base on the host"
LAYER = 12 * 64**2 * 4 + 2 * 64 * 4  # float32, of width 64, with two norms


# `make lane-gpu` runs it.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_tiny_run_writes_finite_figures_of_each_case_and_they_make_a_page(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", out]
    command += ["--only", DECODER, EDITS, BITS, ROWS, BANDWIDTH, ON_HOST]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True, text=True)

    found = json.loads(out.read_text())
    assert all(map(math.isfinite, jax.tree.leaves(found[EDITS]))), found[EDITS]
    assert found[EDITS]["thaw what was dropped"]["survivors kept in place"] == 4
    assert found[EDITS]["thaw what was dropped"]["bytes made"] == 4 * 32 * 32 * 4
    assert found[EDITS]["thaw what was parked"]["bytes made"] == 0
    assert list(found[BITS].values()) == [{"frozen bits kept": True, "ulps": 0}] * 2
    case, on_host = found["steps"].values()
    assert list(case["ways"]) == [BY_HAND, DROP_IN]
    assert list(on_host["ways"]) == [ON_DEVICE, STREAMED, MOVED]
    page = gpu_report.page(found)
    assert ROWS in page
    measured = [*case["ways"].values(), on_host["ways"][ON_DEVICE]]
    if jax.__version_info__ >= (0, 8):
        measured += [on_host["ways"][STREAMED], on_host["ways"][MOVED]]
        _check_streamed(on_host, page)
    else:  # a way that fails is an error of that way alone
        assert "the step returns it in device" in on_host["ways"][STREAMED]["error"]
        assert f"- {ON_HOST}, {STREAMED}: ValueError" in page
    for figures in measured:
        assert {"milliseconds", "ratio", "tokens per second", "peak bytes"} <= figures.keys()
        assert all(math.isfinite(x) and x > 0 for x in figures.values()), figures


def _check_streamed(on_host, page):
    held = [on_host["ways"][way].get("host bytes", 0) for way in (ON_DEVICE, STREAMED, MOVED)]
    assert held == [0, 4 * LAYER, 4 * LAYER]
    # LoRA needs the base in both passes; moved whole, it is copied once.
    least = 4e3 * LAYER / on_host["bandwidth"]
    assert on_host["least milliseconds"] == pytest.approx({STREAMED: 2 * least, MOVED: least})
    assert f"- {ON_HOST}: step time to that" in page


@pytest.mark.parametrize(
    ("first", "streamed", "peak", "said"),
    [
        (100, 114, 90, ("in device memory 1.14, target 1.15: kept", "device 1.00, target 2: kept")),
        (100, 116, 120, ("in device memory 1.16, target 1.15: MISSED", "4.00, target 2: MISSED")),
        (50, 87, 90, ("of the transfer 1.09, target 1.1: kept", "1.00, target 2: kept")),
        (50, 89, 90, ("of the transfer 1.11, target 1.1: MISSED", "1.00, target 2: kept")),
    ],
)
def test_the_page_compares_a_streamed_step_with_whichever_takes_longer_alone(
    first, streamed, peak, said
):
    found = {
        "base bytes": 100,
        "layer bytes": 10,
        "least milliseconds": {STREAMED: 80.0, MOVED: 40.0},
        "ways": {
            ON_DEVICE: {"milliseconds": first, "ratio": 1.0, "peak bytes": 180},
            STREAMED: {"milliseconds": streamed, "ratio": streamed / first, "peak bytes": peak},
        },
    }
    verdict = streaming_report.verdict("a case", found)
    assert all(text in verdict for text in said), verdict


def test_the_page_is_that_of_the_stored_figures():
    page = (ROOT / "docs" / "explanation" / "gpu.md").read_text()
    assert page == gpu_report.page(results.read("gpu"))


def test_an_error_of_memory_says_how_much_xla_asked_for():
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate {} with allocator GPU_0_bfc"
    assert failure(RuntimeError(text.format("1.50GiB"))) == {"out of memory": 3 * 2**29}
    assert failure(RuntimeError(text.format("12B"))) == {"out of memory": 12}
    assert failure(ValueError("a shape")) == {"error": "ValueError: a shape"}
