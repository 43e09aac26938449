"""Progress reports of long work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, done, total)


def silent(stage: str, done: int, total: int) -> None:
    """The `Progress` of work that nobody watches."""


def reporter(progress: Progress | None) -> Progress:
    """`progress`, or `silent` where it is None; TypeError for what cannot be called, before any work."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function of (stage, done, total), got {progress!r}")
    return progress or silent
