"""A limit for the memory that the names in a file may take."""

from collections.abc import Sequence

_DEEPEST = 1_024
"""The limit of the MessagePack libraries. Memory for key paths grows with the depth squared."""

_LONGEST = 10_000
"""The most characters of a path."""

_NODE, _FREE, _TIMES, _MOST = 1_000, 100_000_000, 100, 1_000_000_000
"""The memory of a node without its path, in bytes, roughly. Then the limit for a file: the bytes
that any file may take, the multiple of its size that is added, and the bytes that no file exceeds.
"""


class NameBudget:
    """Counts the memory that the names in a file take, up to a limit.

    A short file can stand for long paths, because the path of a leaf contains all names above it.

    Args:
      size: The size of the file, in bytes.
    """

    def __init__(self, size: int):
        self._size, self._most = size, min(_FREE + _TIMES * size, _MOST)
        self._left = self._most

    def take(self, keys: Sequence[str], nodes: int = 1) -> None:
        """Takes budget for a node.

        Args:
          keys: The components of its path.
          nodes: How many nodes have no budget yet: the node itself, and perhaps some above it.

        Raises:
          ValueError: If no budget is left, or the path is too long or too deep.
        """
        if len(keys) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST:,} deep")
        length = sum(map(len, keys)) + len(keys) - 1
        if length > _LONGEST:
            start = "/".join(keys)[:20]
            raise ValueError(
                f"the path {start!r}… has {length:,} characters, over the limit of {_LONGEST:,}"
            )
        self._left -= nodes * (_NODE + 8 * len(keys) + 2 * length)
        if self._left < 0:
            raise ValueError(
                f"its names would take over {self._most:,} bytes of memory, the limit for "
                f"a file of {self._size:,} bytes"
            )
