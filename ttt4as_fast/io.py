"""Output files that are either whole or absent: written beside their place under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to `path` when the block ends and removed if it raises.

    The temporary name keeps the suffix of `path`, because writers such as Pillow and NumPy choose the format by it.
    A reader sees the old file or the new one, never half of one; an interrupted run leaves the old one in place.

    Parameters
    ----------
    path : path-like
        Where the finished file goes. Its folder must exist.

    Yields
    ------
    pathlib.Path
        An empty file to write to.

    Raises
    ------
    FileNotFoundError
        The folder of `path` does not exist.
    IsADirectoryError
        `path` is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in an existing folder, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, got the folder {str(path)!r}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp makes a private file; the result gets the permissions that a plain open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        with open(temporary, "rb+") as file:  # the rename must not reach the disk before the contents do
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
