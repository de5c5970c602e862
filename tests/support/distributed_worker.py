"""One process of the run in tests/runs/test_distributed.py: trains, thaws, checkpoints or restores.

It also runs layers that take turns, for tests/edit/test_rotating_meshes.py.

python distributed_worker.py PROCESS PORT {whole,resume,rotating} DIRECTORY
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import freeze_optax as fo

PROCESSES = 2
STEPS = 8
# The last thaw comes after the checkpoint: a restored state has to be editable too.
THAWED = {3: "encoder/b", 6: "encoder/a"}
SAVED = 5
SPLIT = {
    "encoder": {"a": PartitionSpec("data", None), "b": PartitionSpec(None, "data")},
    "head": {"w": PartitionSpec("data", None), "b": PartitionSpec()},
}


def make_params() -> Any:
    random = np.random.default_rng(0)
    shapes = {"encoder": {"a": (8, 8), "b": (8, 8)}, "head": {"w": (8, 4), "b": (4,)}}
    return jax.tree.map(
        lambda shape: random.normal(size=shape).astype(np.float32) / 2,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32)


def loss(params: Any, batch: Any) -> Any:
    x = jnp.tanh(batch @ params["encoder"]["a"])
    x = jnp.tanh(x @ params["encoder"]["b"])
    return ((x @ params["head"]["w"] + params["head"]["b"]) ** 2).mean()


def place(mesh: Mesh, x: Any, spec: PartitionSpec) -> Any:
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def abstract(x: Any, sharding: NamedSharding) -> Any:
    return x if is_hole(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def target(tx: Any, mesh: Mesh) -> Any:
    """What the checkpoint holds, told by shapes alone: nothing is computed to restore."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPLIT)
    params = jax.tree.map(abstract, make_params(), shardings)

    def edited(params: Any) -> Any:
        state = tx.init(params)
        for start, where in THAWED.items():
            state = fo.thaw(state, params, where) if start < SAVED else state
        return state

    replicated = NamedSharding(mesh, PartitionSpec())
    state = optax.tree_map_params(
        tx,
        abstract,
        jax.eval_shape(edited, params),
        shardings,
        transform_non_params=lambda x: jax.tree.map(lambda x: abstract(x, replicated), x),
        is_leaf=is_hole,
    )
    return {"params": params, "state": state}


def train(tx: Any, mesh: Mesh, tree: Any, start: int, folder: pathlib.Path) -> Any:
    @jax.jit
    def update(tree: Any, batch: Any) -> Any:
        params, state = tree["params"], tree["state"]
        grads = fo.grad(loss, frozen=state)(params, batch)
        updates, state = tx.update(grads, state, params)
        return {"params": fo.apply_updates(params, updates, frozen=state), "state": state}

    for step in range(start, STEPS):
        if step in THAWED:
            tree["state"] = fo.thaw(tree["state"], tree["params"], THAWED[step])
        if step == SAVED and start == 0:
            with ocp.StandardCheckpointer() as saver:
                saver.save(folder / "checkpoint", tree)
        tree = update(tree, place(mesh, make_batch(step), PartitionSpec("data", None)))
    return tree


def shards(tree: Any) -> dict[str, np.ndarray]:
    """What this process holds of a tree, by path and device."""
    return {
        f"{jax.tree_util.keystr(path)} on {shard.device.id}": np.asarray(shard.data)
        for path, leaf in jax.tree.leaves_with_path(tree)
        for shard in leaf.addressable_shards
    }


def scores(params: Any, batch: Any) -> dict[str, float]:
    """The scores of weights and of gradients, under the names of both."""
    found = {"weights": fo.weight_scores(params, "stable_rank")}
    for score in ("norm", "relative", "fisher"):
        found[score] = fo.gradient_scores(loss, params, [batch], score)
    return {f"{kind} {path}": x for kind, row in found.items() for path, x in row.items()}


def rotating_params() -> Any:
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32) / 2  # noqa: E731
    return {"layers": {"b": draw(4, 8), "w": draw(4, 8, 8)}, "head": draw(8, 4)}


def rotating_loss(params: Any, x: Any) -> Any:
    def layer(h: Any, weights: Any) -> Any:
        return h + jnp.tanh(h @ weights["w"] + weights["b"]), None

    return ((fo.scan(layer, x, params["layers"])[0] @ params["head"]) ** 2).mean()


def rotating() -> Any:
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))
    return fo.rotating(inner, "layers", 1, 2, key=jax.random.key(1))


def rotate(params: Any, batches: Any) -> Any:
    """Trains layers in turns; returns the params, the state, and which layers each step trained."""
    tx, rows = rotating(), []

    @jax.jit
    def update(params: Any, state: Any, batch: Any) -> Any:
        grads = fo.grad(rotating_loss, frozen=state)(params, batch)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    state = jax.jit(tx.init)(params)
    for batch in batches:
        rows.append(np.asarray(state.rows).tolist())
        params, state = update(params, state, batch)
    return params, state, rows


def main(process: int, port: str, mode: str, folder: pathlib.Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    assert jax.process_count() == PROCESSES
    mesh = Mesh(np.array(jax.devices()), ("data",))
    tx = fo.freezable(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)), "encoder")
    if mode == "rotating":
        # The layers over all devices, and so over both processes; the biases over their other axis.
        specs = {"b": PartitionSpec(None, "data"), "w": PartitionSpec("data", None, None)}
        split = {"layers": specs, "head": PartitionSpec()}
        params = jax.tree.map(lambda x, spec: place(mesh, x, spec), rotating_params(), split)
        batches = [
            place(mesh, make_batch(step), PartitionSpec("data", None)) for step in range(STEPS)
        ]
        params, state, rows = rotate(params, batches)
        tree = {"params": params, "moments": optax.tree_utils.tree_get(state, "mu")}
        np.savez(folder / f"rows-{process}.npz", rows=rows)
    elif mode == "resume":
        with ocp.StandardCheckpointer() as saver:
            tree = saver.restore(folder / "checkpoint", target(tx, mesh))
        tree = train(tx, mesh, tree, SAVED, folder)
    else:
        params = jax.tree.map(lambda x, spec: place(mesh, x, spec), make_params(), SPLIT)
        batch = place(mesh, make_batch(0), PartitionSpec("data", None))
        np.savez(folder / f"scores-{process}.npz", **scores(params, batch))
        tree = train(tx, mesh, {"params": params, "state": tx.init(params)}, 0, folder)
    whole = jax.tree.leaves_with_path(process_allgather(tree["params"], tiled=True))
    held = {f"whole {jax.tree_util.keystr(p, simple=True, separator='/')}": x for p, x in whole}
    np.savez(folder / f"{mode}-{process}.npz", **shards(tree), **held)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4]))
