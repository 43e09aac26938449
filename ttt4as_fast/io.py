"""Results as files: whole or absent, and JSON that every reader takes."""

from __future__ import annotations

import math
from typing import Any

from .kernels.files import atomic_path, naming

__all__ = ["atomic_path", "naming", "plain"]


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
