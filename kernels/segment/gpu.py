"""The whole method on the device: labels, training, decision and mask without a word to the host, in one CUDA graph.

Seven kernels an image batch: pseudo-labels (CUDA C++), basis vectors (Triton), their Gram matrix and the solver
(CUDA C++), its weights, the decision on the feature grid, upsampling with threshold (Triton). The (C, H, W) tensor is
never built, capacities follow from shapes alone, and an image gets the same bits in any batch.

The second call with the same shapes, dtypes, strides and options captures a CUDA graph, which later calls replay; the
`GRAPHS` most recent are kept, each with its input buffers. `warmup` captures ahead of time. Inside a stream that is
being captured already (`torch.cuda.graph`) the kernels are launched one by one and join that graph, if one call went
before, which compiles them; so they are where capture fails. ``torch.compile(mode="reduce-overhead")`` leaves the
operator out of its own graphs: it replays this one.

A non-finite value on the device gives the image the code 4, an empty mask and a decision of NaN: raising would wait for
the device. `Segmentation.status` raises for it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..dispatch import BackendWarning
from ..gpu_common import cuda
from ..gpu_common.capability import cuda_source_unavailable as unavailable
from ..gpu_common.geometry import axis
from ..gpu_common.memory import chunks, in_chunks
from ..gpu_common.svm import Capacity, Samples, train
from ..gpu_common.tables import DEVICE_MUST_NOT_WAIT, table
from . import gpu_stages as stages

__all__ = ["ARRAYS", "GRAPHS", "SCRATCH_BYTES", "clear", "segment", "unavailable", "warmup"]

ARRAYS = "torch"
GRAPHS = 8
"""CUDA graphs kept at most."""
SCRATCH_BYTES = 2 << 30
"""Scratch of a call at most; a batch that needs more goes through in parts, to the same result."""

_FILE = "segment/label.cu"
_LABEL_RESERVED = 40 * 1024  # bytes of shared memory that it has for itself at most
_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def segment(
    anomaly_map: torch.Tensor,
    features: torch.Tensor,
    *,
    skip: torch.Tensor | None,
    candidates: np.ndarray,
    limit: int,
    **options: Any,
) -> _Outputs:
    """(B, H, W) and (B, C, h, w) -> mask bool, decision float32, labels int8, all (B, H, W), and codes (B,) int8."""
    plan = _Plan(candidates, min(limit, len(candidates)), **options)
    inputs = (anomaly_map, features, skip)
    if anomaly_map.device.type != "cuda":
        return plan.run(*inputs)
    with torch.cuda.device(anomaly_map.device):
        if torch.cuda.is_current_stream_capturing():
            return plan.run(*inputs, can_retry=False)
        return _CACHE.run(_key(plan, inputs), plan, inputs)


def warmup(
    anomaly_map: torch.Tensor,
    features: torch.Tensor,
    *,
    skip: torch.Tensor | None,
    candidates: np.ndarray,
    limit: int,
    **options: Any,
) -> bool:
    """Compile the kernels and capture the graph for inputs of these shapes, dtypes and strides; values do not matter.

    Returns
    -------
    bool
        Whether later calls replay a graph (False: they launch kernels one by one).
    """
    plan = _Plan(candidates, min(limit, len(candidates)), **options)
    inputs = (anomaly_map, features, skip)
    with torch.cuda.device(anomaly_map.device):
        return _CACHE.capture(_key(plan, inputs), plan, inputs) is not None


def clear() -> None:
    """Forget all captured graphs and release their memory."""
    _CACHE.clear()


@dataclass(frozen=True)
class _Plan:
    """The options of a call, and the stages under them."""

    candidates: np.ndarray
    limit: int
    percentile: float
    neighbor_radius: int
    C: float
    loss: str
    tol: float
    max_iter: int

    def key(self) -> Hashable:
        """What the launches depend on beside the inputs. Candidates are cached arrays: their identity will do."""
        values = (self.percentile, self.neighbor_radius, self.C, self.loss, self.tol, self.max_iter)
        return (id(self.candidates), self.limit, *values)

    def run(
        self,
        anomaly_map: torch.Tensor,
        features: torch.Tensor,
        skip: torch.Tensor | None,
        *,
        can_retry: bool = True,
    ) -> _Outputs:
        """Launch the stages on the current stream, in parts if the batch needs more than `SCRATCH_BYTES`."""
        batch = len(anomaly_map)
        shape, device = anomaly_map.shape, anomaly_map.device
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        decision = torch.empty(shape, dtype=torch.float32, device=device)
        labels = torch.empty(shape, dtype=torch.int8, device=device)
        codes = torch.empty((batch,), dtype=torch.int8, device=device)
        capacity, _ = self.capacity(anomaly_map, features)
        height, width = shape[1:]
        scratch = capacity.bytes + 8 * height * width + features[0].nbytes  # of an image; its features may be copied
        part = max(1, min(batch, 65535, SCRATCH_BYTES // scratch))

        def work(start: int, stop: int) -> None:
            gate = None if skip is None else skip[start:stop]
            images = slice(start, stop)
            outputs = (mask[images], decision[images], labels[images], codes[images])
            self.part(anomaly_map[images], features[images], gate, outputs)

        if can_retry:
            in_chunks(work, batch, part, "images")
        else:
            for start, stop in chunks(batch, part):
                work(start, stop)
        return mask, decision, labels, codes

    def capacity(self, anomaly_map: torch.Tensor, features: torch.Tensor) -> tuple[Capacity, bool]:
        """What an image may need, and whether nominal samples are basis vectors of their own.

        They are where they are few beside the cells, which keeps the Gram matrix small: 100 points and a few dozen
        cells under the anomalous ones, instead of the four cells that every point looks at.
        """
        size, (channels, *grid) = anomaly_map.shape[1:], features.shape[1:]
        if size[0] * size[1] >= 2**29:  # the solver's lists hold a pixel four times
            raise ValueError(f"anomaly_map: expected fewer than 2**29 pixels, got {size[0]} x {size[1]}")
        cells = grid[0] * grid[1]
        own_points = 2 * self.limit <= cells
        rows = cells + self.limit if own_points else cells
        limit = cuda.shared_memory_limit(anomaly_map.device)
        return Capacity(rows, channels, (size[0], size[1]), (grid[0], grid[1]), limit), own_points

    def part(
        self, anomaly_map: torch.Tensor, features: torch.Tensor, skip: torch.Tensor | None, outputs: _Outputs
    ) -> None:
        """The stages for images that fit at once: writes mask, decision, labels and codes."""
        mask, decision, labels, codes = outputs
        features = stages.dense(features)
        batch, height, width = anomaly_map.shape
        h, w = features.shape[2:]
        device = features.device
        capacity, own_points = self.capacity(anomaly_map, features)
        maps = anomaly_map.contiguous()
        maps = maps if maps.dtype == torch.float64 else maps.float()
        rows, cols = axis(height, h, device), axis(width, w, device)

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty((batch, *shape), dtype=torch.int32, device=device)

        status, counts, points, pixels = integers(), integers(3), integers(self.limit), integers(height, width)
        cells, slot = integers(h * w), integers(h * w)
        bits_bytes = 8 * height * -(-width // 32)  # two bit maps
        bits_shared = bits_bytes <= cuda.shared_memory_limit(device) - _LABEL_RESERVED
        candidates = _on_device(self.candidates, device)
        radius = min(self.neighbor_radius, max(height, width))  # more reaches no further
        size = (height, width, h, w, len(candidates), self.limit, radius, int(own_points))
        cuda.launch(
            device, _FILE, "label_f64" if maps.dtype == torch.float64 else "label_f32", batch, cuda.THREADS,
            maps, None if skip is None else skip.contiguous(), candidates, labels, status, points, pixels, cells, slot,
            counts, None if bits_shared else integers(bits_bytes // 4), rows.lower, rows.weight, cols.lower,
            cols.weight, *(np.int32(i) for i in size),
            np.float64(self.percentile), shared_bytes=bits_bytes if bits_shared else 0,
        )  # fmt: skip
        samples = Samples(labels, pixels, cells, slot, rows, cols, (height, width), (h, w), own_points)
        basis = stages.basis(features, points, counts, status, samples, capacity.rows)
        trained = train(
            basis, counts, status, capacity,
            C=self.C, loss=self.loss, tol=self.tol, max_iter=self.max_iter, samples=samples,
        )  # fmt: skip
        low = stages.decision(features, trained.weights, trained.report, status)
        stages.upsample_threshold(low, status, samples, mask, decision, codes)


def _on_device(candidates: np.ndarray, device: torch.device) -> torch.Tensor:
    """`candidates` as int32 on `device`, kept for the next call; the array is kept too, so that its id stays taken."""

    def make() -> tuple[np.ndarray, torch.Tensor]:
        return candidates, torch.from_numpy(candidates.astype(np.int32)).to(device)

    return table(("candidates", id(candidates)), device, make)[1]


def _key(plan: _Plan, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> Hashable:
    layout = tuple(None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in inputs)
    return (inputs[0].device, layout, plan.key())


class _Graph:
    """One captured call: its own input buffers, the graph, its outputs."""

    def __init__(self, plan: _Plan, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> None:
        self.plan = plan  # keeps the candidates, whose identity the key holds
        self.lock = threading.Lock()
        self.used = torch.cuda.Event()
        anomaly_map, features, skip = inputs
        self.inputs = (
            _buffer_like(anomaly_map, torch.contiguous_format),
            _buffer_like(features, stages.layout(features)),
            None if skip is None else _buffer_like(skip, torch.contiguous_format),
        )
        self.graph = torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(), _capture_stream(anomaly_map.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):  # around the capture too: one that is invalidated leaves its stream current
                for buffer, x in zip(self.inputs, inputs, strict=True):
                    if buffer is not None:
                        buffer.copy_(x)
                plan.run(*self.inputs)  # compiles and loads whatever these very buffers need
                stream.synchronize()
                self.outputs = self.capture()
        finally:
            current.wait_stream(stream)  # the buffers are this stream's: it may reuse what is freed on failure
        self.used.record()

    def capture(self) -> _Outputs:
        """Record the launches, all compiled by now, on the current stream; one that fails leaves torch as it was."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            with (
                DEVICE_MUST_NOT_WAIT,
                torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                return self.plan.run(*self.inputs, can_retry=False)
        except RuntimeError:
            _end_broken_capture(stream.device, pool)
            raise

    def replay(self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> _Outputs:
        """Copy the inputs in, replay, copy the outputs out: on the current stream, in turn with other streams."""
        with self.lock:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.used)
            buffers = [x for x in self.inputs if x is not None]
            for buffer in buffers:
                buffer.record_stream(stream)  # the graph may be dropped while this stream still reads it
            _copy(buffers, [x for x in inputs if x is not None])
            self.graph.replay()
            outputs = [torch.empty_like(x) for x in self.outputs]
            _copy(outputs, self.outputs)
            self.used.record()
        mask, decision, labels, codes = outputs
        return mask, decision, labels, codes


_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_SMALL = 4 << 20  # bytes; torch copies more at once faster one by one (64 images on an H200: 0.13 ms, together 0.32)


def _copy(to: Sequence[torch.Tensor], of: Sequence[torch.Tensor]) -> None:
    """Copies between tensors of equal dtypes, one launch for all small ones whose numbers have one size: launches are
    what an image alone takes time for.
    """
    for a, b in zip(to, of, strict=True):
        if a.nbytes > _SMALL:
            a.copy_(b, non_blocking=True)
    small = [(a, b) for a, b in zip(to, of, strict=True) if a.nbytes <= _SMALL]
    for size in sorted({a.itemsize for a, _ in small}):
        pairs = [(a, b) for a, b in small if a.itemsize == size]
        if len({a.dtype for a, _ in pairs}) > 1:
            pairs = [(a.view(_NUMBERS[size]), b.view(_NUMBERS[size])) for a, b in pairs]
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs], non_blocking=True)


def _buffer_like(x: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """An empty tensor like `x` in the given layout; calls in any mode may write to it."""
    with torch.inference_mode(False):
        return torch.empty_like(x, memory_format=layout)


def _end_broken_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Undo what torch leaves of a capture that the driver broke off, and what would outlive this call.

    Its allocator still takes the pool for one that is being filled, and gives nothing back to the device; its generator
    refuses random numbers outside of a graph.
    """
    with contextlib.suppress(RuntimeError):  # it had not begun, or has ended
        torch._C._cuda_endAllocateToPool(device.index, pool)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())  # a copy of the state is in no capture


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has: torch's own are shared by turns, and what others launch would be captured."""
    import cupy

    with cupy.cuda.Device(device.index):
        made = cupy.cuda.Stream(non_blocking=True)
    stream = torch.cuda.ExternalStream(made.ptr, device=device)
    stream.owner = made  # type: ignore[attr-defined]
    return stream


class _Cache:
    """Least recently used graphs. A key is captured when it comes a second time: one-off shapes cost no capture."""

    def __init__(self, make: Callable[..., _Graph] = _Graph) -> None:
        self.make = make
        self.graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: capture failed, do not try again
        self.seen: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self.lock = threading.Lock()

    def run(self, key: Hashable, plan: _Plan, inputs: tuple) -> _Outputs:
        with self.lock:
            known = key in self.graphs
            second = key in self.seen
            self.seen[key] = plan.candidates  # alive as long as its id is part of a key
            self.seen.move_to_end(key)
            while len(self.seen) > 4 * GRAPHS:
                self.seen.popitem(last=False)
        graph = self.capture(key, plan, inputs) if known or second else None
        return plan.run(*inputs) if graph is None else graph.replay(inputs)

    def capture(self, key: Hashable, plan: _Plan, inputs: tuple) -> _Graph | None:
        """The graph of `key`, captured now if it is new; None where capture fails."""
        with self.lock:
            if key not in self.graphs:
                self.seen[key] = plan.candidates
                try:
                    self.graphs[key] = self.make(plan, inputs)
                except RuntimeError as error:  # out of memory included
                    self.graphs[key] = None
                    warnings.warn(
                        f"segment: no CUDA graph for {tuple(inputs[0].shape)} ({error}); launching kernels one by one",
                        BackendWarning,
                        stacklevel=2,
                    )
                while len(self.graphs) > GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            return self.graphs[key]

    def clear(self) -> None:
        with self.lock:
            self.graphs.clear()
            self.seen.clear()


_CACHE = _Cache()
