#!/usr/bin/env bash
# Orbax's PyTreeRestore, and `load` of its newer API, give None for an array that the file lacks, if
# the file has a node without arrays in its place. StandardRestore raises.
#
# Seen with orbax-checkpoint 0.12.8, optax 0.2.8, jax 0.10.2 on Python 3.11, CPU. The state of an
# optimizer in which a leaf is masked out is restored onto one in which it trains: its moments are
# None, and there is no error until the next update.
#
# Output seen:
#   StandardRestore ValueError
#   PyTreeRestore   {'a': None, 'b': 0.0}
#   v1 load         {'a': None, 'b': 0.0}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "orbax-checkpoint==0.12.8" "optax==0.2.8" "jax==0.10.2" \
    "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1

warnings.simplefilter("ignore")
logging.getLogger("absl").setLevel(logging.ERROR)
path = Path(sys.argv[1]) / "state"
params = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}
without_a = optax.masked(optax.adam(0.1), {"a": False, "b": True}).init(params)
whole = optax.masked(optax.adam(0.1), {"a": True, "b": True}).init(params)
target = jax.eval_shape(lambda: whole)


def moments(restore):
    try:
        mu = optax.tree_utils.tree_get(restore(), "mu")
    except ValueError:
        return "ValueError"
    return {name: None if x is None else float(x) for name, x in mu.items()}


with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, without_a)
    checkpointer.wait_until_finished()
    standard = moments(lambda: checkpointer.restore(path, target))
with ocp.PyTreeCheckpointer() as checkpointer:
    tree = moments(lambda: checkpointer.restore(path, item=target))
newer = moments(lambda: v1.load(path, target))
print("StandardRestore", standard)
print("PyTreeRestore  ", tree)
print("v1 load        ", newer)
assert standard == "ValueError"
assert tree == newer == {"a": None, "b": 0.0}, "a missing array is an error now"
PYTHON
