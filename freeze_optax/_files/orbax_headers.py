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
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    items = [path for path in (folder, *below) if (path / "_METADATA").exists()]
    if not items:
        raise ValueError(
            f"{folder} holds no .safetensors file and no item of an Orbax checkpoint; of the "
            "folder of a CheckpointManager name one step"
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
        # Declared as a path of another library; one of pathlib does, but no relative one.
        item: Any = items[0].resolve()
        tree = checkpoint.PyTreeCheckpointHandler().metadata(item)
        leaves = Leaves(getattr(tree, "tree", tree))  # older versions give the tree itself
        for path, leaf in zip(leaves.paths, leaves.values, strict=True):
            # What is no array, as text is not, has no shape.
            yield path, as_abstract_array(leaf.shape, leaf.dtype) if is_array(leaf) else None
    except Exception as error:
        # A broken file raises what the parsers of JSON, and the stores behind it, do.
        raise ValueError(f"{items[0]} is no whole Orbax checkpoint: {error}") from error
