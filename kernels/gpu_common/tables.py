"""Small constant tensors on a device, made once and kept for as long as a launch may read them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

CAPACITY = 256
"""Tables kept beside those that a CUDA graph holds the addresses of."""

_Table = TypeVar("_Table")
_Value = TypeVar("_Value")
_RECENT: OrderedDict[tuple[Hashable, torch.device], object] = OrderedDict()
_IN_GRAPHS: dict[tuple[Hashable, torch.device], object] = {}
_LOCK = threading.Lock()
DEVICE_MUST_NOT_WAIT = threading.Lock()
"""Held while a graph is captured: a wait for the whole device, from any thread, would end the capture."""


class Same(Generic[_Value]):
    """Part of a key: one object, equal to itself alone. The key keeps it alive, so that no other takes its place."""

    def __init__(self, value: _Value) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def table(key: Hashable, device: torch.device, make: Callable[[], _Table]) -> _Table:
    """What ``make()`` returned for `key` and `device`, made on the first call.

    The least recently used one goes when there are more than `CAPACITY`, once the device has read it for the last time.
    One that is asked for while a CUDA graph is captured stays for good: nothing tells when the last replay is over.

    Parameters
    ----------
    key : hashable
        Whose values are all that the table depends on.
    device : torch.device
    make : callable
        Returns tensors on `device`, and whatever else must live as long.
    """
    place = (key, device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _LOCK:
        found = _IN_GRAPHS.get(place)
        if found is None:
            found = _RECENT.pop(place, None)
            found = make() if found is None else found
            (_IN_GRAPHS if capturing else _RECENT)[place] = found
        if len(_RECENT) > CAPACITY and DEVICE_MUST_NOT_WAIT.acquire(blocking=False):  # else a later call drops them
            try:
                while len(_RECENT) > CAPACITY:
                    (_, used_on), dropped = _RECENT.popitem(last=False)
                    if used_on.type == "cuda":
                        torch.cuda.synchronize(used_on)
                    del dropped
            finally:
                DEVICE_MUST_NOT_WAIT.release()
    return found  # type: ignore[return-value]
