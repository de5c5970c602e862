"""The memory that the names in a file may take."""

from collections.abc import Sequence

_DEEPEST = 1_024
"""As deep as the MessagePack libraries go. Key paths as deep as a file can be take its square."""

_LONGEST = 10_000
"""The most characters of a path."""

_NODE, _FREE, _TIMES, _MOST = 1_000, 100_000_000, 100, 1_000_000_000
"""Of memory, in bytes: what a node takes beside its path, about; what any file may take; how many
times its size it may take beyond that; and what no file may take more of."""


class NameBudget:
    """What memory the names in a file may still take.

    Short files can stand for long paths, as the path of a leaf has in it all the names above.

    Args:
      size: Of the file, in bytes.
    """

    def __init__(self, size: int):
        self._size, self._most = size, min(_FREE + _TIMES * size, _MOST)
        self._left = self._most

    def take(self, keys: Sequence[str], nodes: int = 1) -> None:
        """Makes budget for a node.

        Args:
          keys: The components of its path.
          nodes: How many there are that have no budget yet: itself, and maybe some above it.

        Raises:
          ValueError: If there is none left, or the path goes too far.
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
                f"{self._size:,} in a file"
            )
