"""The names, shapes and dtypes in an Orbax checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freeze_optax._files.abstract_arrays import as_abstract_array
from freeze_optax._files.plain_files import plain_size
from freeze_optax._files.safetensors_headers import missing_package
from freeze_optax._tree.kinds import is_array
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.messages import quoted_list


def read_orbax_headers(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yields the arrays of an Orbax checkpoint, abstract, with their names."""
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    items = [path for path in (folder, *below) if (path / "_METADATA").exists()]
    if not items:
        raise ValueError(
            f"{folder} holds no .safetensors file and no item of an Orbax checkpoint; in the "
            "folder of a CheckpointManager, name one step"
        )
    if len(items) > 1:
        raise ValueError(f"{folder} holds several items, name one: {quoted_list(map(str, items))}")
    try:
        from orbax import checkpoint  # noqa: PLC0415
    except ImportError as error:
        raise missing_package("orbax-checkpoint") from error
    for file in items[0].rglob("*"):
        if not file.is_dir():
            plain_size(file)
    try:
        # The declared type is a path of another library. A pathlib one works if it is absolute.
        item: Any = items[0].resolve()
        tree = checkpoint.PyTreeCheckpointHandler().metadata(item)
        leaves = Leaves(getattr(tree, "tree", tree))  # older versions give the tree itself
        for path, leaf in zip(leaves.paths, leaves.values, strict=True):
            # Anything but an array, such as text, has no shape.
            yield path, as_abstract_array(leaf.shape, leaf.dtype) if is_array(leaf) else None
    except Exception as error:
        # A broken file may raise any error of the JSON parsers and of the stores behind Orbax.
        raise ValueError(f"{items[0]} is not a valid Orbax checkpoint: {error}") from error
