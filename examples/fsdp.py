"""Fine-tunes over several processes, thaws mid-run, and goes on with another number of devices.

`python examples/fsdp.py` starts two processes of four CPU devices on this machine, which train half
of the run. One process of two devices ends it. On a cluster start each process yourself:
`python examples/fsdp.py train --coordinator HOST:PORT --processes N --process I --folder SHARED`.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from tqdm import tqdm

import freeze_optax as fo

BLOCKS, WIDTH, BATCH, STEPS = 4, 64, 64, 120
SAVED, THAWED = STEPS // 2, {STEPS // 4: "block_3", 3 * STEPS // 4: "block_2"}
TX = fo.freezable(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3)), "block_*")
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES / 16).astype(np.float32)


def new_params():
    random = np.random.default_rng(0)
    shapes = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    tree = {f"block_{i}": shapes for i in range(BLOCKS)} | {"head": {"kernel": (WIDTH, 10)}}
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    draw = [random.normal(size=shape, scale=shape[0] ** -0.5) for shape in leaves]
    return jax.tree.unflatten(treedef, [x.astype(np.float32) for x in draw])


def loss_fn(params, images, labels):
    x = images
    for i in range(BLOCKS):
        block = params[f"block_{i}"]
        x = x + jax.nn.relu(x @ block["up"]) @ block["down"]
    logits = x @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def step(params, opt_state, images, labels):
    loss, grads = fo.value_and_grad(loss_fn, frozen=opt_state)(params, images, labels)
    updates, opt_state = TX.update(grads, opt_state, params)
    return fo.apply_updates(params, updates, frozen=opt_state), opt_state, loss


def sharded(mesh, x):
    """Gives each device its part of an array; all processes have the same one."""
    spec = PartitionSpec("data") if x.ndim and x.shape[0] % mesh.size == 0 else PartitionSpec()
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: whole[i])


def on_mesh(mesh, opt_state):
    """Copies to all devices what is on one: the step counts that `init` and `thaw` make."""
    is_on_one = lambda x: not isinstance(x.sharding, NamedSharding)  # noqa: E731
    return jax.tree.map(lambda x: sharded(mesh, x) if is_on_one(x) else x, opt_state)


def begin(mesh, steps=0):
    """Gives new params, and the state that they have before a step, without the training."""
    params = jax.tree.map(functools.partial(sharded, mesh), new_params())
    opt_state = TX.init(params)
    for start, where in THAWED.items():
        opt_state = fo.thaw(opt_state, params, where) if start < steps else opt_state
    return params, on_mesh(mesh, opt_state)


def train(mesh, params, opt_state, steps):
    bar = tqdm(steps, disable=jax.process_index() > 0, desc=f"{mesh.size} devices")
    for i in bar:
        if i in THAWED:
            opt_state = on_mesh(mesh, fo.thaw(opt_state, params, THAWED[i]))
        rows = np.random.default_rng(i).integers(len(LABELS), size=BATCH)
        batch = (sharded(mesh, x[rows]) for x in (IMAGES, LABELS.astype(np.int32)))
        params, opt_state, loss = step(params, opt_state, *batch)
        bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    return params, opt_state


def first_half(options):
    """Trains the first half in this process and those beside it, and stores a checkpoint."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, int(options.processes), int(options.process))
    mesh = Mesh(np.array(jax.devices()), "data")
    params, opt_state = train(mesh, *begin(mesh), range(SAVED))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{options.folder}/checkpoint", {"params": params, "state": opt_state})


def second_half(options):
    """Trains the second half in one process, then all of it on one device, to compare."""
    mesh = Mesh(np.array(jax.devices()), "data")
    params, opt_state = begin(mesh, SAVED)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": opt_state})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(f"{options.folder}/checkpoint", target)
    params, opt_state = train(mesh, *restored.values(), range(SAVED, STEPS))
    print(fo.summary(params, opt_state, depth=1))

    alone = Mesh(np.array(jax.devices()[:1]), "data")
    expected, _ = train(alone, *begin(alone), range(STEPS))
    fo.testing.assert_frozen(new_params(), jax.device_get(params), "block_{0..1}")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, expected)
    loss = jax.jit(loss_fn)(expected, IMAGES, LABELS)
    print(f"as on one device, to 1e-4; loss on all digits {loss:.3f}")


def launch(folder):
    """Starts the processes of both halves on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(devices, *arguments):
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, *arguments, "--folder", folder]
        return subprocess.Popen(command, env=environment)

    both = ["train", "--coordinator", address, "--processes", "2", "--process"]
    statuses = [process.wait() for process in [start(4, *both, str(i)) for i in range(2)]]
    sys.exit(any(statuses) or start(2, "resume").wait())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["train", "resume"])
    for name in ("coordinator", "processes", "process", "folder"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    if options.part is None:
        with tempfile.TemporaryDirectory() as folder:
            launch(folder)
    first_half(options) if options.part == "train" else second_half(options)
