"""CUDA streams of the package's own, and launches on one beside torch's current stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import torch

_of_thread = threading.local()


def own_stream(device: torch.device, priority: int | None = None) -> torch.cuda.Stream:
    """A new stream of `device`: torch's are handed to everyone in turn, and what others launch there would be captured.

    Parameters
    ----------
    device : torch.device
    priority : int, optional
        Lower goes first; 0 if not given.
    """
    import cupy

    with cupy.cuda.Device(device.index):
        made = cupy.cuda.Stream(non_blocking=True, priority=priority)
    stream = torch.cuda.ExternalStream(made.ptr, device=device)
    stream.owner = made  # type: ignore[attr-defined]
    return stream


class Beside:
    """Launches on a stream beside torch's current one: a context, at whose end the current stream waits for them.

    Blocks of those launches come first where both streams have some to run. A CUDA graph that is being captured gets
    both streams. On the host, where a kernel has ended once it is launched, nothing has to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.current_stream(device), _stream_beside(device)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._streams is not None:
            current, beside = self._streams
            current.wait_stream(beside)

    def launch(self, work: Callable[[], None]) -> torch.cuda.Event | None:
        """Have `work` launch there, after all that the current stream has so far; what `wait_for` takes."""
        if self._streams is None:
            work()
            return None
        current, beside = self._streams
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            work()
        return beside.record_event()

    def wait_for(self, launched: torch.cuda.Event | None) -> None:
        """Let the current stream wait for what was launched."""
        if self._streams is not None and launched is not None:
            self._streams[0].wait_event(launched)


def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """One for each thread, so that none gets into the capture of another's."""
    streams = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = own_stream(device, priority=-1)
    return streams[device]
