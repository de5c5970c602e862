"""Two processes, each with devices of its own: thawed, stored, restored into fresh processes."""

import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.support import by_hand, distributed_worker
from tests.support.compiling import QUICK_FLAGS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 100


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run(mode: str, folder: pathlib.Path) -> None:
    """Both processes, from start to end."""
    port = str(free_port())
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK_FLAGS}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, distributed_worker.__file__]
    logs = [folder / f"{mode}-{process}.log" for process in range(distributed_worker.PROCESSES)]
    started = []
    try:
        for process, log in enumerate(logs):
            with log.open("w") as file:
                arguments = [*command, str(process), port, mode, str(folder)]
                started.append(
                    subprocess.Popen(
                        arguments, stdout=file, stderr=subprocess.STDOUT, env=environment
                    )
                )
        codes = [process.wait(SECONDS) for process in started]
    except subprocess.TimeoutExpired:
        codes = ["too slow"]
    finally:
        for process in started:
            process.kill()
            process.wait()
    output = "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)
    assert codes == [0] * len(logs), f"{mode} ended with {codes}\n{output}"


def load(mode: str, folder: pathlib.Path) -> list[dict[str, Any]]:
    files = [folder / f"{mode}-{process}.npz" for process in range(distributed_worker.PROCESSES)]
    return [dict(np.load(file)) for file in files]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("distributed")
    for mode in ("whole", "resume"):
        run(mode, folder)
    return {mode: load(mode, folder) for mode in ("whole", "resume", "scores")}


def test_fresh_processes_go_on_bitwise_from_a_checkpoint_made_after_a_thaw(runs):
    for process, (whole, resumed) in enumerate(zip(runs["whole"], runs["resume"], strict=True)):
        assert list(whole) == list(resumed)
        odd = [name for name in whole if whole[name].tobytes() != resumed[name].tobytes()]
        assert not odd, f"process {process} went on otherwise at {odd}"


def test_the_moments_made_by_a_thaw_are_split_over_the_processes_as_their_parameter(runs):
    for held in runs["whole"]:
        for moment in ("mu", "nu"):
            for name, leaf in held.items():
                if not name.startswith("['params']"):
                    continue
                (twin,) = [x for x in held if x.endswith(name.replace("['params']", f".{moment}"))]
                assert held[twin].shape == leaf.shape
    first, second = ({n for n in held if "['a']" in n} for held in runs["whole"])
    assert len(first) == len(second) == 2 * 3
    assert not first & second


def test_two_processes_end_where_one_device_and_a_loop_by_hand_end(runs):
    steps = range(distributed_worker.STEPS)
    frozen = [
        {path for path in ("encoder/a", "encoder/b") if step < thawed_at(path)} for step in steps
    ]
    decayed = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))
    case = by_hand.Case(optax.identity(), decayed, lambda step: 0.05, clip=1.0)
    batches = [distributed_worker.make_batch(step) for step in steps]
    params = jax.tree.map(jax.numpy.asarray, distributed_worker.make_params())
    expected = by_hand.train(case, distributed_worker.loss, params, batches, frozen, False)[-1]
    for held in runs["whole"]:
        for path, leaf in zip(by_hand.paths(expected), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(held[f"whole {path}"], leaf, rtol=1e-4, atol=1e-6)


def test_two_processes_have_the_scores_of_one_device(runs):
    params = jax.tree.map(jax.numpy.asarray, distributed_worker.make_params())
    expected = distributed_worker.scores(params, distributed_worker.make_batch(0))
    for held in runs["scores"]:
        assert list(held) == list(expected)
        np.testing.assert_allclose([*held.values()], [*expected.values()], rtol=1e-5)


def thawed_at(path: str) -> int:
    (step,) = [step for step, where in distributed_worker.THAWED.items() if where == path]
    return step
