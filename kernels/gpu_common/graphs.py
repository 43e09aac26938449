"""CUDA graphs of repeated calls: all launches of a call in one, which costs the host what one launch costs.

The second call with the same shapes, dtypes, strides and options captures a graph, which later ones replay: they copy
their inputs into the graph's own and its outputs out of it. The graphs used last are kept, and dropped where memory
runs out (`drop_least_used`). Where capture fails the kernels are launched one by one; with
``TTT4AS_CUDA_GRAPHS=0`` they always are.

`torch.cuda.graph` begins by waiting for the device and giving cached memory back to it, which ends a capture that
another thread has under way. A program that captures graphs of its own in several threads should call ``warmup`` before
it does, or turn these graphs off.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch

from ..dispatch import BackendWarning, warn_once
from .layout import layout
from .tables import DEVICE_MUST_NOT_WAIT

ENVIRONMENT_VARIABLE = "TTT4AS_CUDA_GRAPHS"
PATIENCE = 100
"""Calls without a graph after which it is dropped for a new one. If it were dropped sooner, more shapes in turn than
there are graphs would make each call capture one, which takes as long as a dozen calls.
"""

Inputs: TypeAlias = tuple[torch.Tensor | None, ...]
Outputs: TypeAlias = tuple[torch.Tensor, ...]
Work: TypeAlias = Callable[..., Outputs]
"""Launches kernels on the current stream: ``work(*inputs)`` -> new tensors. Compiled by now, it does not wait."""


class Graph:
    """One captured call: its own inputs, the graph, its outputs; `bytes` of device memory in all."""

    def __init__(self, work: Work, inputs: Inputs) -> None:
        self.lock = threading.Lock()
        self.used = torch.cuda.Event()
        self.inputs = tuple(None if x is None else _buffer_like(x) for x in inputs)
        self.bytes = sum(x.nbytes for x in _tensors(self.inputs))
        self.graph = torch.cuda.CUDAGraph()
        device = next(x.device for x in inputs if x is not None)
        with _ONE_CAPTURES:
            current, stream = torch.cuda.current_stream(), _capture_stream(device)
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):  # around the capture too: where it fails, it leaves its stream current
                    _copy(_tensors(self.inputs), _tensors(inputs))
                    work(*self.inputs)  # compiles and loads whatever these very buffers need
                    stream.synchronize()
                    self.outputs = self._capture(work)
            finally:
                current.wait_stream(stream)  # the buffers are this stream's: it may reuse what is freed on failure
        self.used.record()

    def _capture(self, work: Work) -> Outputs:
        """Record the launches, all compiled by now, on the current stream; one that fails leaves torch as it was."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            with (
                DEVICE_MUST_NOT_WAIT,
                torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                outputs = work(*self.inputs)
        except RuntimeError:
            _end_broken_capture(stream.device, pool)
            raise
        self.bytes += sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))
        return outputs

    def replay(self, inputs: Inputs) -> Outputs:
        """Copy the inputs in, replay, copy the outputs out: on the current stream, in turn with other streams."""
        with self.lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.used)
            buffers = _tensors(self.inputs)
            for buffer in buffers:
                buffer.record_stream(stream)  # the graph may be dropped while this stream still reads it
            try:
                _copy(buffers, _tensors(inputs))
                self.graph.replay()
                outputs = tuple(torch.empty_like(x) for x in self.outputs)
                _copy(outputs, self.outputs)
            finally:
                self.used.record(stream)  # no room for the outputs: what was launched still reads and writes
        return outputs


class _Kind:
    """Calls of one key."""

    def __init__(self, inputs: Inputs) -> None:
        self.calls = 0
        self.used = 0  # number of the last one, among all calls of the operation
        self.order = 0  # the same, among the calls of all operations
        self.tried = False  # whether a capture was tried
        self.graph: Graph | None = None
        self.device = next(x.device for x in inputs if x is not None)
        self.bytes = sum(x.nbytes for x in _tensors(inputs))  # of its graph; until one is captured, a lower bound


class Graphs:
    """The graphs of one operation. The second call of a kind captures one: one-off shapes cost no capture.

    Parameters
    ----------
    name : str
        The operation, for the warning where capture fails.
    capacity : int
        Graphs kept at most, each with its inputs, outputs and scratch. The least recently used one is dropped for a new
        one, but not before `PATIENCE` calls without it.
    most_bytes : float
        Device memory that they hold in all at most; there is no graph of a call that needs more.
    make : callable
        ``make(work, inputs)`` captures; a test without a device has another.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        most_bytes: float = math.inf,
        make: Callable[[Work, Inputs], Graph] = Graph,
    ) -> None:
        self.name = name
        self.capacity = capacity
        self.most_bytes = most_bytes
        self.make = make
        self.kinds: OrderedDict[Hashable, _Kind] = OrderedDict()  # in the order of their last calls
        self.calls = 0
        self.lock = threading.Lock()
        with _ALL_LOCK:
            _ALL.add(self)

    @property
    def graphs(self) -> list[Graph]:
        """Those that are kept, the one used last at the end."""
        return [kind.graph for kind in self.kinds.values() if kind.graph is not None]

    def run(self, options: Hashable, work: Work, inputs: Inputs) -> Outputs:
        """``work(*inputs)`` on the current stream, or its graph's replay. The device of `inputs` is the current one.

        Parameters
        ----------
        options : hashable
            Whose values are all that the launches depend on beside the shapes, strides and dtypes of `inputs`.
        work : callable
            Not kept.
        inputs : tuple of tensors
            None stands for one that is not given.
        """
        if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
            return work(*inputs)
        with self.lock:
            kind = self._kind(options, inputs)
            graph = kind.graph
            wanted = not kind.tried and kind.calls > 1 and self._has_room(kind, PATIENCE)
            kind.tried = kind.tried or wanted  # other threads launch one by one until there is a graph
        if wanted:
            graph = self._captured(kind, work, inputs, PATIENCE)
        return work(*inputs) if graph is None else graph.replay(inputs)

    def capture(self, options: Hashable, work: Work, inputs: Inputs) -> bool:
        """Capture the graph of such inputs if it is new; False where that fails, or it has no room: calls then launch
        kernels one by one.

        Raises
        ------
        RuntimeError
            The current stream is being captured, which to capture another graph would end.
        """
        if any(x.is_cuda for x in _tensors(inputs)) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{self.name}: warm up before the capture of a CUDA graph, not inside of it")
        if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
            return False
        with self.lock:
            kind = self._kind(options, inputs)
            wanted = not kind.tried and self._has_room(kind, 0)
            kind.tried = kind.tried or wanted
        if wanted:
            self._captured(kind, work, inputs, 0)
        return kind.graph is not None

    def clear(self) -> None:
        """Forget all graphs and release their memory."""
        with self.lock:
            self.kinds.clear()

    def _kind(self, options: Hashable, inputs: Inputs) -> _Kind:
        """The calls like this one, which is counted."""
        key = options, tuple(None if x is None else (x.device, x.shape, x.stride(), x.dtype) for x in inputs)
        kind = self.kinds.get(key)
        if kind is None:
            kind = self.kinds[key] = _Kind(inputs)
            if len(self.kinds) > 8 * self.capacity:  # those without a graph are forgotten in time
                del self.kinds[next(key for key, other in self.kinds.items() if other.graph is None)]
        else:
            self.kinds.move_to_end(key)
        self.calls += 1
        kind.calls += 1
        kind.used, kind.order = self.calls, next(_ORDER)
        return kind

    def _has_room(self, kind: _Kind, patience: int) -> bool:
        """Whether there is room for its graph; makes it by dropping graphs unused for more than `patience` calls."""
        kept = [(key, other) for key, other in self.kinds.items() if other.graph is not None]
        room = self.most_bytes - kind.bytes - sum(other.bytes for _, other in kept)
        going = 0
        while len(kept) - going >= self.capacity or room < 0:
            if going == len(kept) or self.calls - kept[going][1].used <= patience:
                return False
            room += kept[going][1].bytes
            going += 1
        for key, _ in kept[:going]:
            del self.kinds[key]
        return True

    def _captured(self, kind: _Kind, work: Work, inputs: Inputs, patience: int) -> Graph | None:
        """The graph of such calls; None, and a warning, where capture fails, which is not tried again.

        What a graph holds is known once it is captured: if there is no room for it, it is not kept, and another is
        captured only when there is.
        """
        try:
            graph = self.make(work, inputs)
            with self.lock:
                kind.bytes = graph.bytes
                if self._has_room(kind, patience):
                    kind.graph = graph
                else:
                    kind.tried = False
        except ImportError as error:
            warn_once(f"{self.name}: no CUDA graphs without CuPy ({error}); launching kernels one by one")
        except RuntimeError as error:  # out of memory included
            shape = next(tuple(x.shape) for x in inputs if x is not None)
            warnings.warn(
                f"{self.name}: no CUDA graph for {shape} ({error}); launching kernels one by one",
                BackendWarning,
                stacklevel=3,
            )
        return kind.graph


def drop_least_used(device: int | None) -> bool:
    """Drop the least recently used graph on `device`, of all operations; False where there is none.

    Its memory is needed: calls like its own launch kernels one by one from then on. Waits for its last replay, since
    torch unmaps an expandable segment once the stream is done that it was made on, which is that of the capture.
    """
    with _ALL_LOCK:
        caches = list(_ALL)
    found = []
    for cache in caches:
        with cache.lock:
            found += [kind for kind in cache.kinds.values() if kind.graph is not None and kind.device.index == device]
    if found:
        oldest = min(found, key=lambda kind: kind.order)
        graph, oldest.graph = oldest.graph, None
        if graph is not None:
            graph.used.synchronize()
    return bool(found)


_ALL: weakref.WeakSet[Graphs] = weakref.WeakSet()
_ALL_LOCK = threading.Lock()
_ORDER = itertools.count()
_ONE_CAPTURES = threading.Lock()
"""Held while a device's capture stream is in use, which all graphs share."""
_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 4 << 20  # bytes; larger tensors are copied faster one by one (64 images on an H200: 0.13 ms, together 0.32)


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [x for x in inputs if x is not None]


def _copy(to: Sequence[torch.Tensor], of: Sequence[torch.Tensor]) -> None:
    """Copies between tensors of equal dtypes, one launch for all small ones of the same element size: with a
    single image, launches take the time.
    """
    for a, b in zip(to, of, strict=True):
        if a.nbytes > _SMALL:
            a.copy_(b, non_blocking=True)
    small = [(a, b) for a, b in zip(to, of, strict=True) if a.nbytes <= _SMALL]
    for size in sorted({a.itemsize for a, _ in small}):
        pairs = [(a, b) for a, b in small if a.itemsize == size]
        if len(pairs) == 1:
            pairs[0][0].copy_(pairs[0][1], non_blocking=True)
            continue
        if len({a.dtype for a, _ in pairs}) > 1:
            pairs = [(a.view(_NUMBERS[size]), b.view(_NUMBERS[size])) for a, b in pairs]
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs], non_blocking=True)


def _buffer_like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor like `x` in its `layout`; calls in any mode may write to it."""
    with torch.inference_mode(False):
        return torch.empty_like(x, memory_format=layout(x))


def _end_broken_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Undo what a capture that the driver ended leaves behind in torch.

    torch's allocator still takes the pool for one that is being filled, and gives nothing back to the device; its
    random number generator refuses to work outside of a graph.
    """
    with contextlib.suppress(RuntimeError):  # it had not begun, or has ended
        torch._C._cuda_endAllocateToPool(device.index, pool)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())  # a copy of the state is in no capture


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of our own: torch's are handed to everyone in turn, and what others launch there would be captured."""
    import cupy

    with cupy.cuda.Device(device.index):
        made = cupy.cuda.Stream(non_blocking=True)
    stream = torch.cuda.ExternalStream(made.ptr, device=device)
    stream.owner = made  # type: ignore[attr-defined]
    return stream
