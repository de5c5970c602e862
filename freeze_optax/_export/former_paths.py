"""Exports whose paths have the `value` of metadata boxes, as version 0.1.0 wrote them."""

from typing import Any

from freeze_optax._tree.holes import is_hole
from freeze_optax._tree.leaves import Leaves
from freeze_optax._tree.variables import is_box


def with_present_paths(about: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    """Returns the description of an export with the paths that its leaves have now.

    Args:
      about: The description, as `unpack_text` returns it.
      leaves: The leaves of the params.
    """
    present = list(leaves.paths)
    if about["paths"] == present:
        return about
    nodes = Leaves(leaves.tree, stop=lambda x: is_hole(x) or is_box(x))
    boxes = [path for path, x in zip(nodes.paths, nodes.values, strict=True) if is_box(x)]
    former = {f"{path}/value" if path else "value": path for path in boxes}
    if [former.get(path, path) for path in about["paths"]] != present:
        return about

    def renamed(path: str) -> str:
        # A statistic has the path of its leaf, below that of its place in the state.
        found = (old for old in former if path.endswith(f"/{old}"))
        longest = max(found, key=len, default="")
        return path.removesuffix(longest) + former[longest] if longest else path

    entries = [{**entry, "path": renamed(entry["path"])} for entry in about["leaves"]]
    return {**about, "paths": present, "leaves": entries}
