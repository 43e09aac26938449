"""What coverage need not see: other people's Python, which takes two to three times as long under its tracer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def untraced() -> Iterator[None]:
    """Nothing in the block counts as covered."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def without_trace(function: Callable) -> Callable:
    """`function`, whose calls run `untraced`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with untraced():
            return function(*args, **kwargs)

    return call
