"""A run of layers that take turns, in forks of which each is killed one step after the last.

python rotating_worker.py DIRECTORY
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import freeze_optax as fo

STEPS, EVERY = 6, 2


def loss(params: Any, x: Any) -> Any:
    h, _ = fo.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["layers"])
    return ((h @ params["head"]) ** 2).mean()


def train(folder: pathlib.Path, dies_at: int) -> None:
    """Goes on from the last export, and is killed before a step, or ends."""
    tx = fo.rotating(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        *("layers", 2, EVERY),
        key=jax.random.key(4),
    )

    @jax.jit
    def update(params: Any, state: Any, x: Any) -> Any:
        grads = fo.grad(loss, frozen=state)(params, x)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape).astype(np.float32))  # noqa: E731
    params = {"layers": draw(7, 3, 3), "head": draw(3, 2)}
    state, step = tx.init(params), 0
    file = folder / "checkpoint.npz"
    if file.exists():
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        params = {name: jnp.asarray(arrays.pop(name)) for name in params}
        step = int(arrays.pop("step"))
        exported = {"about": arrays.pop("about"), "leaves": arrays}
        state = fo.import_state(tx, params, exported)
    with (folder / "rows").open("a") as rows:
        rows.write(f"{json.dumps([step, state.rows.tolist()])}\n")
    while step < STEPS:
        params, state = update(params, state, np.full((4, 3), 1 + step, np.float32))
        if step == dies_at:
            jax.block_until_ready(params)
            os.kill(os.getpid(), signal.SIGKILL)
        step += 1
        exported = fo.export_state(state)
        half = folder / "half.npz"
        np.savez(half, **exported["leaves"], **params, about=exported["about"], step=step)
        half.replace(file)
    leaves = [*jax.tree.leaves(params), *exported["leaves"].values()]
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    (folder / "ended").write_text(digest)


def life(folder: pathlib.Path, dies_at: int) -> int:
    """Runs one life in a fork, and returns what it ended with."""
    # Before any backend of JAX starts here: its threads do not live through a fork.
    pid = os.fork()
    if not pid:
        code = 1
        try:
            train(folder, dies_at)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    codes = [life(folder / "whole", STEPS)]
    killed = [life(folder / "killed", step) for step in range(STEPS)]
    codes.append(life(folder / "killed", STEPS))
    if codes != [0, 0]:
        raise RuntimeError(f"lives ended with {codes}, {killed}")
    begun = [json.loads(x) for x in (folder / "killed" / "rows").read_text().splitlines()]
    lives = {
        "killed": [
            {"code": code, "step": step} for code, (step, _) in zip(killed, begun[:-1], strict=True)
        ],
        "rows": [rows for _, rows in begun],
        "ended whole": (folder / "whole" / "ended").read_text(),
        "ended killed": (folder / "killed" / "ended").read_text(),
    }
    (folder / "lives.json").write_text(json.dumps(lives))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
