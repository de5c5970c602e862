"""The runs of tests/runs/test_killed.py: they store their state, and go on from it."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import freeze_optax as fo

STEPS = 312
EVERY = 3
CYCLE = 24

SHAPES = {"encoder": (3, 3), "table": (4, 3), "head": {"w": (3, 2), "b": (2,)}}
OLD_ROWS = fo.rows("table", [0, 1])
IN_A_CYCLE = {0: ("encoder", OLD_ROWS), 5: OLD_ROWS, 9: fo.nothing, 14: ("encoder", "head/b")}
PHASES = fo.Phases({c + i: spec for c in range(0, STEPS, CYCLE) for i, spec in IN_A_CYCLE.items()})
# Begun in the middle of a chunk.
SCHEDULE = fo.Phases({0: ("encoder", OLD_ROWS), 40: ("encoder", "head/b"), 82: OLD_ROWS})
EDITS = {
    0: lambda state, params: fo.set_frozen(state, params, "encoder"),
    4: lambda state, params: fo.thaw(
        fo.freeze(state, params, OLD_ROWS, keep_state=True), params, "encoder"
    ),
    11: lambda state, params: fo.freeze(state, params, "encoder", keep_state=True),
    15: lambda state, params: fo.thaw(state, params, OLD_ROWS),
    19: lambda state, params: fo.set_frozen(state, params, "head/b", keep_state=True),
}


def make_params() -> Any:
    numbers = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: jnp.asarray(numbers.normal(size=shape).astype(np.float32))  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)


def loss(params: Any, x: Any) -> Any:
    x = jnp.tanh((x + params["table"]) @ params["encoder"])
    return ((x @ params["head"]["w"] + params["head"]["b"]) ** 2).mean()


INNER = optax.chain(
    optax.clip_by_global_norm(1.0),
    # With a count of each cohort, and one that runs on for all.
    optax.adamw(optax.cosine_decay_schedule(0.05, STEPS)),
)


class Life(NamedTuple):
    """How far a run is."""

    step: int
    params: Any
    state: Any


class Run:
    """A run as its user writes it; what is frozen follows phases.

    Attributes:
      last: The number of steps.
      stride: How many of them the compiled program takes at once.
      is_edited: Whether the host freezes and thaws.
    """

    last, stride, is_edited = STEPS, 1, True

    def __init__(self, folder: pathlib.Path, tell: Callable[[str], None]):
        self.folder, self.tell = folder, tell
        self.tx = self.transformation()
        self.update = jax.jit(self.steps, donate_argnums=(0, 1))

    def transformation(self) -> Any:
        return fo.freezable(INNER, PHASES.at(0))

    def begun(self) -> Any:
        """The params of a run that begins."""
        return make_params()

    def changes(self, step: int) -> bool:
        return step in PHASES.starts

    def edit(self, state: Any, params: Any, step: int) -> Any:
        keep_state = step // CYCLE % 2 == 0
        return fo.set_frozen(state, params, PHASES.at(step), keep_state=keep_state)

    def steps(self, params: Any, state: Any, batches: Any) -> Any:
        grads = fo.grad(loss, frozen=state)(params, batches[0])
        updates, state = self.tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    def train(self) -> Life:
        """Goes on from the last checkpoint that is complete, or begins."""
        self.tell("start")
        life = self.restored()
        if life is None:
            params = self.begun()
            life = Life(0, params, self.tx.init(params))
        else:
            plan = plan_of(life.state)
            counts = {"cohorts": max(plan.cohorts) + 1, "parked": len(plan.parked)}
            self.tell(f"resumed {json.dumps({'step': life.step, **counts})}")
        step, params, state = life
        while step < self.last:
            if self.changes(step):
                self.tell("editing")
            state = self.edit(state, params, step)
            self.tell("stepping")
            batches = np.stack([batch(step + i) for i in range(self.stride)])
            params, state = self.update(params, state, batches)
            step += self.stride
            if step % EVERY == 0:
                self.save(Life(step, params, state))
                self.tell("written")
        self.close()
        return Life(step, params, state)

    def save(self, life: Life) -> None:
        """Writes beside the last checkpoint, then puts it into its place at one blow."""
        half = self.folder / "checkpoint.tmp"
        with half.open("wb") as file:
            self.tell("writing")
            self.write(file, life)
        half.replace(self.folder / "checkpoint")

    def restored(self) -> Life | None:
        file = self.folder / "checkpoint"
        return self.read(file) if file.exists() else None

    def write(self, file: Any, life: Life) -> None:
        exported = fo.export_state(life.state)
        leaves = {f"leaves/{name}": x for name, x in exported["leaves"].items()}
        own = {f"params/{i}": x for i, x in enumerate(jax.tree.leaves(life.params))}
        np.savez(file, step=life.step, about=exported["about"], **leaves, **own)

    def read(self, file: pathlib.Path) -> Life:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        fresh = make_params()
        count = len(jax.tree.leaves(fresh))
        params = like(fresh, [arrays[f"params/{i}"] for i in range(count)])
        leaves = {name[7:]: x for name, x in arrays.items() if name.startswith("leaves/")}
        exported = {"about": arrays["about"], "leaves": leaves}
        return Life(int(arrays["step"]), params, fo.import_state(self.tx, params, exported))

    def close(self) -> None:
        """Waits for what is still being written."""


def plan_of(state: Any) -> Any:
    return getattr(state, "state", state).plan


def like(tree: Any, values: list[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), map(jnp.asarray, values))


class ByHand(Run):
    """Edits are data: a step and what is done before it."""

    def changes(self, step: int) -> bool:
        return step % CYCLE in EDITS

    def edit(self, state: Any, params: Any, step: int) -> Any:
        return EDITS.get(step % CYCLE, lambda state, params: state)(state, params)

    def write(self, file: Any, life: Life) -> None:
        tree = {"step": life.step, "params": life.params, "state": fo.export_state(life.state)}
        file.write(flax.serialization.msgpack_serialize(jax.device_get(tree)))

    def read(self, file: pathlib.Path) -> Life:
        tree = flax.serialization.msgpack_restore(file.read_bytes())
        params = jax.tree.map(jnp.asarray, tree["params"])
        return Life(tree["step"], params, fo.import_state(self.tx, params, tree["state"]))


class Orbax(Run):
    """The state as it is, written while the next steps run."""

    last = 72

    def begun(self) -> Any:
        # On a certain device, as Orbax restores them: else each life would compile anew.
        return jax.device_put(make_params(), jax.devices()[0])

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, life: Life) -> None:
        self.tell("writing")
        tree = {"params": life.params, "state": life.state}
        self.manager.save(life.step, args=ocp.args.StandardSave(tree))

    def restored(self) -> Life | None:
        step = self.manager.latest_step()
        if step is None:
            return None
        tree = self.manager.restore(step, args=ocp.args.StandardRestore(self.target(step)))
        return Life(step, tree["params"], tree["state"])

    def target(self, step: int) -> Any:
        """What was stored at a step, told by the phases alone."""

        def replayed(params: Any) -> Any:
            state = self.tx.init(params)
            for start in (start for start in PHASES.starts if start < step):
                state = self.edit(state, params, start)
            return {"params": params, "state": state}

        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            jax.eval_shape(replayed, make_params()),
        )

    def close(self) -> None:
        self.manager.close()


class Scheduled(Run):
    """Phases inside one compiled program, which comes back to the host after each chunk."""

    last, stride, is_edited = 240, EVERY, False

    def transformation(self) -> Any:
        return fo.scheduled(INNER, SCHEDULE)

    def changes(self, step: int) -> bool:
        return False

    def edit(self, state: Any, params: Any, step: int) -> Any:
        return state

    def steps(self, params: Any, state: Any, batches: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            return Run.steps(self, *carry, x[None]), None

        return jax.lax.scan(body, (params, state), batches)[0]

    def write(self, file: Any, life: Life) -> None:
        np.savez(file, np.int64(life.step), *jax.tree.leaves((life.params, life.state)))

    def read(self, file: pathlib.Path) -> Life:
        with np.load(file, allow_pickle=False) as stored:
            step, *arrays = stored.values()
        tree = jax.eval_shape(lambda params: (params, self.tx.init(params)), make_params())
        return Life(int(step), *like(tree, arrays))


COURSES = {"phases": Run, "by hand": ByHand, "orbax": Orbax, "scheduled": Scheduled}
