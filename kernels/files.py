"""Output files that are either whole or absent: written beside their place under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
    """An OSError of the block names `path`: that of a full disk names no file, that of an open the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a text of its own, which a file name would hide
            if type(error) is OSError:  # NumPy's: "100000 requested and 992 written"
                raise OSError(f"{os.fspath(path)!r}: {error}") from error
        elif error.filename is None or (temporary is not None and error.filename == os.fspath(temporary)):
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to `path` when the block ends and removed if it raises.

    The temporary name keeps the suffix of `path`, because writers such as Pillow and NumPy choose the format by it,
    and starts with a dot, so that a listing of the folder passes it over. A reader sees the old file or the new one,
    never half of one; an interrupted run leaves the old one in place.

    Parameters
    ----------
    path : path-like
        Where the finished file goes. Its folder must exist.

    Yields
    ------
    pathlib.Path
        Where to write. There is no file there yet.

    Raises
    ------
    FileNotFoundError
        The folder of `path` does not exist, or the block wrote nothing (a writer may have added a suffix of its own).
    IsADirectoryError
        `path` is a folder.
    OSError
        The file cannot be written; the message names `path`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in an existing folder, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, got the folder {str(path)!r}")
    # 32 letters are 128 bytes at most, which leaves room in the 255 of a file name.
    temporary = path.parent / f".{path.stem[:32]}-{secrets.token_hex(8)}{path.suffix}"
    try:
        with naming(path, temporary):
            yield temporary
            if not temporary.is_file():
                raise FileNotFoundError(f"nothing was written to the temporary file of {str(path)!r}")
            with open(temporary, "rb+") as file:  # the rename must not reach the disk before the contents do
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
