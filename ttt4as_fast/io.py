"""Results as files: whole or absent, and JSON that every reader takes."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from .kernels.files import atomic_path, naming

__all__ = ["absolute", "atomic_path", "check_folder", "naming", "plain"]


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file, without ``..``: ``link/..`` is where the link leads to, not where it stands."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name) if ".." in Path(folder).parts else os.path.abspath(path)


def check_folder(folder: Path, name: str) -> None:
    """Before long work: raise an OSError if `folder`, the argument `name`, cannot be made or written. Makes nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(f"{name}: expected a folder to write to, got {str(folder)!r} ({error.strerror})") from error


def plain(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinity as null, NumPy's scalars as Python's, tuples as lists, paths as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
