"""A compiled training step that goes on from where it was, and steps of several ways in turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.steps import Parts, stages

Times = dict[str, list[float]]
WARM_UP = 3


class Run:
    """A compiled step of one way; its buffers are donated.

    Attributes:
      compile_seconds: What XLA took.
      state_bytes: The size of the optimizer's state.
      held_bytes: The size of what lives between two steps, in device memory.
      host_bytes: The size of the params and the state in host memory.
    """

    def __init__(self, case: Case, way: Callable[[Case], Parts]):
        (stage,) = stages(case, way(case))
        lowered = jax.jit(stage.function, donate_argnums=stage.donated).lower(*stage.args)
        begin = time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        params, state, *self._others = stage.args
        _check_memory(self._step.output_shardings[:2], (params, state))
        self.state_bytes = _bytes(state)
        self.host_bytes = _bytes([x for x in jax.tree.leaves((params, state)) if _on_host(x)])
        self.held_bytes = _bytes(stage.args) - self.host_bytes
        # Copies, as one buffer can't be donated twice, and the ways share what they start from. But
        # what is in host memory a way has put there itself, and JAX copies it to the device.
        self._carried = jax.tree.map(lambda x: x if _on_host(x) else jnp.copy(x), (params, state))

    def __call__(self) -> float:
        """The seconds of a step."""
        begin = time.perf_counter()
        params, state, *_ = jax.block_until_ready(self._step(*self._carried, *self._others))
        seconds = time.perf_counter() - begin
        self._carried = params, state
        return seconds

    @property
    def added_bytes(self) -> int:
        """What XLA allots during a step in device memory, beside what lives between two."""
        memory = self._step.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    @property
    def peak_bytes(self) -> int:
        """What XLA allots to arguments, outputs and temporary values together, on the device.

        On a CPU XLA does not tell host memory from it.
        """
        return self._step.memory_analysis().argument_size_in_bytes + self.added_bytes


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _on_host(x: jax.Array) -> bool:
    return x.sharding.memory_kind == "pinned_host"


def _check_memory(shardings: Any, carried: Any) -> None:
    """Raises if a step would return something in another memory than it takes it from."""

    def check(path: Any, x: jax.Array, sharding: jax.sharding.Sharding) -> None:
        kinds = x.sharding.memory_kind, sharding.memory_kind
        if kinds[0] != kinds[1]:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name} is in {kinds[0]}, but the step returns it in {kinds[1]}")

    jax.tree.map_with_path(check, carried, shardings)


def in_turns(runs: dict[str, Run], rounds: int, seconds: float = float("inf")) -> Times:
    """The seconds of each step, one step of each way in every round, until either is used up."""
    taken: Times = {name: [] for name in runs}
    names = list(runs)
    begin = time.perf_counter()
    for i in range(rounds + WARM_UP):
        shift = i % len(names)  # so that nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            taken[name].append(runs[name]())
        # Quartiles need a few rounds.
        if i >= WARM_UP + 4 and time.perf_counter() - begin > seconds:
            break
    return {name: of_way[WARM_UP:] for name, of_way in taken.items()}


def quartiles(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """The median time, and the quartiles of the ratios to the reference, round by round."""
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    milliseconds = 1e3 * statistics.median(seconds)
    return {"milliseconds": milliseconds, "low": low, "ratio": middle, "high": high}
