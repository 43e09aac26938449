"""Work in chunks that fit: out of memory drops CUDA graphs, then halves the chunk, and never changes a result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch

from ..dispatch import BackendWarning
from .graphs import drop_least_used
from .tables import DEVICE_MUST_NOT_WAIT


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive chunks of at most `size`."""
    for start in range(0, total, size):
        yield start, min(total, start + size)


def in_chunks(work: Callable[[int, int], None], total: int, size: int, what: str) -> int:
    """Call ``work(start, stop)`` over ``range(total)``, in chunks of `size` or, where memory runs out, of less.

    Where memory runs out, CUDA graphs are dropped first, the least recently used one first; then the chunk is halved,
    with one warning.
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
        Not even one item fits, or a CUDA graph is being captured, which giving memory back would end.
    """
    on_device = torch.cuda.is_initialized()
    start, warned = 0, False
    while start < total:
        stop = min(total, start + size)
        try:
            work(start, stop)
            start = stop
            continue
        except torch.OutOfMemoryError:
            if on_device and torch.cuda.is_current_stream_capturing():
                raise
            dropped = drop_least_used(torch.cuda.current_device() if on_device else None)
            if stop - start == 1 and not dropped:
                raise
        # Outside the handler: its exception keeps the frames, and with them the tensors of the attempt.
        if on_device:
            with DEVICE_MUST_NOT_WAIT:  # it waits, which torch refuses while any thread captures
                torch.cuda.empty_cache()
        if dropped:
            continue
        size = (stop - start + 1) // 2
        if not warned:
            warnings.warn(
                f"out of GPU memory: going on with {size} {what} or fewer at a time, slower",
                BackendWarning,
                stacklevel=3,
            )
        warned = True
    return size
