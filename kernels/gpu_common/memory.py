"""Work in chunks that fit: out of memory halves the chunk, warns once, and never changes a result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch

from ..dispatch import BackendWarning


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive chunks of at most `size`."""
    for start in range(0, total, size):
        yield start, min(total, start + size)


def in_chunks(work: Callable[[int, int], None], total: int, size: int, what: str) -> int:
    """Call ``work(start, stop)`` over ``range(total)``, in chunks of `size` or, where memory runs out, of less.

    `work` writes its results into tensors that exist already and may be called again for a range it failed on.

    Parameters
    ----------
    work : callable
    total, size : int
        Items in all, and at most in one call.
    what : str
        Names the items in the warning.

    Returns
    -------
    int
        The chunk size that fitted, for the next call.

    Raises
    ------
    torch.OutOfMemoryError
        One item does not fit either, or a graph is captured, which giving memory back would break off.
    """
    start, warned = 0, False
    while start < total:
        stop = min(total, start + size)
        try:
            work(start, stop)
            start = stop
            continue
        except torch.OutOfMemoryError:
            if stop - start == 1 or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
                raise
        # Out of the handler, whose exception holds the frames and with them the tensors of the attempt.
        size = (stop - start + 1) // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not warned:
            warnings.warn(
                f"out of GPU memory: going on with {size} {what} or fewer at a time, slower",
                BackendWarning,
                stacklevel=3,
            )
        warned = True
    return size
