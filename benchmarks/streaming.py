"""A frozen base in host memory, streamed layer by layer or moved whole, against device memory.

It needs JAX 0.8: before, a jitted function returned in device memory what it took from the host.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo
from benchmarks.cases import CLIPPED, Case, language_model
from benchmarks.models import stacked_transformer, stacked_transformer_loss
from benchmarks.steps import Parts, drop_in

ON_DEVICE, STREAMED = "base in device memory", "on the host, streamed"
MOVED = "on the host, moved whole"
ON_HOST = "base on the host"
"""How the names of these cases end."""
LAYERS, RANK = "layers", 8


@dataclasses.dataclass(frozen=True)
class Streaming:
    """A case whose base, what is frozen of its stack of layers, may be on the host.

    Attributes:
      case: The case.
      depth: How many layers the stack has.
      passes: In how many passes a step that streams reads them.
    """

    case: Case
    depth: int
    passes: int

    def base(self) -> fo.Summary:
        """A summary of params whose base is on the host."""
        mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")

        def on_host(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        params = jax.eval_shape(self.case.params)
        return fo.summary(_map_base(on_host, params, self.case), self.case.frozen)

    def transfer(self, bandwidth: float) -> dict[str, Any]:
        """The bytes of the base, and for each way how long it takes at least to bring them."""
        base = self.base()
        passes = {STREAMED: self.passes, MOVED: 1}  # moved whole, they stay for the backward pass
        return {
            "bandwidth": bandwidth,
            "base bytes": base.host_bytes,
            "layer bytes": base.host_bytes / self.depth,
            "least milliseconds": {
                way: 1e3 * base.least_seconds(bandwidth, count) for way, count in passes.items()
            },
        }


def streamings(
    sizes: tuple[int, int, int, Any], batches: Sequence[tuple[int, int]]
) -> dict[str, Streaming]:
    """For each batch, adapters in all layers, and the last tenth of the layers trained.

    Args:
      sizes: Depth, width, vocabulary and dtype.
      batches: How many sequences, of how many tokens.
    """
    depth, width, vocabulary, dtype = sizes
    last = max(depth // 10, 1)
    found: dict[str, Streaming] = {}
    for batch in batches:
        where = f"{batch[0] * batch[1]:,} tokens, {ON_HOST}"
        lora = Case(
            partial(stacked_transformer, depth, width, vocabulary, dtype, RANK),
            stacked_transformer_loss,
            language_model(depth, width, vocabulary, batch).batch,
            ~fo.path(f"{LAYERS}/qkv_{{a,b}}"),
            inner=CLIPPED,
        )
        of_last = dataclasses.replace(
            lora,
            params=partial(_last_layers_apart, last, depth, width, vocabulary, dtype),
            frozen=("embed", "norm", LAYERS),
        )
        found[f"LoRA in {depth} layers, {where}"] = Streaming(lora, depth, 2)
        found[f"the last {last} of {depth} layers, {where}"] = Streaming(of_last, depth - last, 1)
    return found


def _last_layers_apart(last: int, *sizes: Any) -> Any:
    params = stacked_transformer(*sizes)
    layers = params[LAYERS]
    return {
        **params,
        LAYERS: jax.tree.map(lambda x: x[:-last], layers),
        "last_layers": jax.tree.map(lambda x: x[-last:], layers),
    }


def _map_base(function: Callable[[Any], Any], params: Any, case: Case) -> Any:
    """The params with a function applied to what is frozen of the layers."""
    flags = fo.mask(case.frozen, params)[LAYERS]
    layers = jax.tree.map(lambda x, flag: function(x) if flag else x, params[LAYERS], flags)
    return {**params, LAYERS: layers}


def _with_base(case: Case, on_host: bool, stream: bool, move: bool) -> Parts:
    params = case.params()
    if on_host:
        params = _map_base(_to_host, params, case)
    flags = fo.mask(case.frozen, params)[LAYERS]
    scan = partial(fo.scan, frozen=flags, stream=stream)

    def loss(params: Any, batch: Any) -> jax.Array:
        if move:
            params = _map_base(_to_device, params, case)
        return case.loss(params, batch, scan=scan)

    return drop_in(dataclasses.replace(case, params=lambda: params, loss=loss))


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)


WAYS: dict[str, Callable[[Case], Parts]] = {
    ON_DEVICE: partial(_with_base, on_host=False, stream=False, move=False),
    STREAMED: partial(_with_base, on_host=True, stream=True, move=False),
    MOVED: partial(_with_base, on_host=True, stream=False, move=True),
}


def measured_bandwidth(nbytes: int) -> float:
    """The bytes per second that the host sends to the device; the median of some copies."""
    array = _to_host(jnp.zeros(nbytes // 4, jnp.float32))
    copy = jax.jit(_to_device).lower(array).compile()
    taken: list[float] = []
    for _ in range(9):
        begin = time.perf_counter()
        jax.block_until_ready(copy(array))
        taken.append(time.perf_counter() - begin)
    return array.nbytes / statistics.median(taken[2:])
