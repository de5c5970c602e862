#!/usr/bin/env bash
# Penzai's `StatefulTrainer` fails in its first step if a parameter has the metadata trainable=False.
#
# Seen with penzai 0.2.5, jax 0.10.2, optax 0.2.8 on Python 3.11, CPU. `build` makes the state of the
# optimizer for all parameters, and `step` hands over the gradients of those that train.
#
# Output seen:
#   all train: loss 12.0
#   one fixed: ValueError: pytree structure error: different lengths of tuple at key path
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "penzai==0.2.5" "jax==0.10.2" "jaxlib==0.10.2" "optax==0.2.8"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax
from penzai import pz
from penzai.toolshed.basic_training import StatefulTrainer


def model(trained):
    def parameter(name):
        value = pz.nx.wrap(jnp.full(3, 2.0)).tag("x")
        return pz.Parameter(value=value, label=name, metadata={"trainable": name in trained})

    return pz.nn.Sequential([pz.nn.AddBias(parameter(x), ()) for x in ("a", "b")])


def loss(*, model, state, rng):
    value = (model(pz.nx.wrap(jnp.zeros(3)).tag("x")).unwrap("x")).sum()
    return value, state, value


def step(trained):
    trainer = StatefulTrainer.build(jax.random.key(0), model(trained), optax.adam(0.1), loss)
    return trainer.step()


print("all train: loss", float(step("ab")))
try:
    step("a")
except ValueError as error:
    first = str(error).splitlines()[0].strip()
    print("one fixed: ValueError:", first)
    assert "different lengths of tuple" in first
else:
    raise SystemExit("a fixed parameter is no error now")
PYTHON
