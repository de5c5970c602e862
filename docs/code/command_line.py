"""Runs the command line in a folder of its own, and shows what it prints."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(tempfile.mkdtemp())
(FOLDER / "notes.txt").write_text("no checkpoint", encoding="utf-8")


def write_checkpoint(name):
    """Writes a small checkpoint, with names as PyTorch gives them."""
    layers = {f"encoder.layer.{i}.weight": np.ones((64, 64), np.float32) for i in range(12)}
    np.savez(FOLDER / name, **layers, **{"head.weight": np.ones((64, 10), np.float32)})


def run(arguments):
    """Runs `freeze-optax` with these arguments, and prints what it prints."""
    command = [sys.executable, "-m", "freeze_optax", *shlex.split(arguments)]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=FOLDER, env=environment
    )
    print(f"$ freeze-optax {arguments}\n{done.stdout}{done.stderr}", end="")
    if done.returncode:
        print(f"exit code: {done.returncode}")
    print()
