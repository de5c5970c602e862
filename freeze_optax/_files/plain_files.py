"""Plain files: no pipes, no devices."""

import stat
from pathlib import Path


def plain_size(file: Path) -> int:
    """The size of a file; an error if it is no plain one, as to open a pipe is to wait."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file} is no plain file; copy what it gives into one")
    return status.st_size
