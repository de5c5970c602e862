"""Plain files: no pipes, no devices."""

import stat
from pathlib import Path


def plain_size(file: Path) -> int:
    """Returns the size of a plain file; raises for anything else, because a pipe blocks `open`."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file} is not a plain file; copy its contents into one")
    return status.st_size
