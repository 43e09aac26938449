"""The whole method on the device: labels, training, decision and mask in one CUDA graph, without synchronisation.

Seven kernels an image batch: pseudo-labels (CUDA C++), basis vectors (Triton), their Gram matrix and the solver
(CUDA C++), its weights, the decision on the feature grid, upsampling with threshold (Triton). The (C, H, W) tensor is
never built, capacities follow from shapes alone, and an image gets the same bits in any batch.

The second call with the same shapes, dtypes, strides and options captures a CUDA graph, which later calls replay
(`gpu_common.graphs`); `warmup` captures ahead of time. Inside a stream that is being captured already
(`torch.cuda.graph`) the kernels are launched one by one and join that graph, if one call went before, which compiles
them. ``torch.compile(mode="reduce-overhead")`` leaves the operator out of its own graphs: it replays this one.

A non-finite value on the device gives the image the code 4, an empty mask and a decision of NaN: raising would wait for
the device. `Segmentation.status` raises for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..gpu_common import cuda
from ..gpu_common.capability import cuda_source_unavailable as unavailable
from ..gpu_common.geometry import axis
from ..gpu_common.graphs import Graphs
from ..gpu_common.layout import dense
from ..gpu_common.memory import in_chunks
from ..gpu_common.svm import Capacity, Samples, train
from ..gpu_common.tables import Same, table
from . import gpu_stages as stages

__all__ = ["ARRAYS", "GRAPHS", "GRAPH_BYTES", "SCRATCH_BYTES", "segment", "unavailable", "warmup"]

ARRAYS = "torch"
GRAPH_BYTES = 2 << 30
"""Device memory that graphs hold in all; 64 images of 1024 x 28 x 28 features take half of it."""
GRAPHS = Graphs("segment", 8, GRAPH_BYTES)
"""Graphs of the shapes, dtypes, strides and options used last."""
SCRATCH_BYTES = 2 << 30
"""Scratch of a call at most; a batch that needs more goes through in parts, to the same result."""

_FILE = "segment/label.cu"
_LABEL_RESERVED = 40 * 1024  # bytes of shared memory that ``label.cu`` itself uses at most
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
    plan = _Plan(Same(candidates), min(limit, len(candidates)), **options)
    if anomaly_map.device.type != "cuda":
        return plan.run(anomaly_map, features, skip)
    with torch.cuda.device(anomaly_map.device):
        if torch.cuda.is_current_stream_capturing():
            return plan.run(anomaly_map, features, skip)
        return GRAPHS.run(plan, plan.run, (anomaly_map, features, skip))


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
    plan = _Plan(Same(candidates), min(limit, len(candidates)), **options)
    inputs = (anomaly_map, features, skip)
    with torch.cuda.device(anomaly_map.device):
        captured = GRAPHS.capture(plan, plan.run, inputs)
        if not captured:  # nor anything compiled, where graphs are off or have no room for this one
            plan.run(*inputs)
    return captured


@dataclass(frozen=True)
class _Plan:
    """The options of a call, and the stages under them."""

    candidates: Same[np.ndarray]
    limit: int
    percentile: float
    neighbor_radius: int
    C: float
    loss: str
    tol: float
    max_iter: int

    def run(self, anomaly_map: torch.Tensor, features: torch.Tensor, skip: torch.Tensor | None) -> _Outputs:
        """Launch the stages on the current stream, in parts if the batch needs more than `SCRATCH_BYTES`."""
        batch = len(anomaly_map)
        shape, device = anomaly_map.shape, anomaly_map.device
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        decision = torch.empty(shape, dtype=torch.float32, device=device)
        labels = torch.empty(shape, dtype=torch.int8, device=device)
        codes = torch.empty((batch,), dtype=torch.int8, device=device)
        capacity, _ = self.capacity(anomaly_map, features)
        height, width = shape[1:]
        # Of an image; its map and its features may be copied.
        scratch = capacity.bytes + 5 * height * width + features[0].nbytes
        part = max(1, min(batch, 65535, SCRATCH_BYTES // scratch))

        def work(start: int, stop: int) -> None:
            gate = None if skip is None else skip[start:stop]
            images = slice(start, stop)
            outputs = (mask[images], decision[images], labels[images], codes[images])
            self.part(anomaly_map[images], features[images], gate, outputs)

        in_chunks(work, batch, part, "images")
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
        features = dense(features)
        batch, height, width = anomaly_map.shape
        h, w = features.shape[2:]
        device = features.device
        capacity, own_points = self.capacity(anomaly_map, features)
        maps = anomaly_map.contiguous()
        maps = maps if maps.dtype == torch.float64 else maps.float()
        rows, cols = axis(height, h, device), axis(width, w, device)

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty((batch, *shape), dtype=torch.int32, device=device)

        status, counts, points = integers(), integers(3), integers(self.limit)
        cells, slot = integers(h * w), integers(h * w)
        bits_bytes = 8 * height * -(-width // 32)  # two bit maps
        bits_shared = bits_bytes <= cuda.shared_memory_limit(device) - _LABEL_RESERVED
        candidates = table(("candidates", self.candidates), device, lambda: _on_device(self.candidates.value, device))
        radius = min(self.neighbor_radius, max(height, width))  # more reaches no further
        size = (height, width, h, w, len(candidates), self.limit, radius, int(own_points))
        cuda.launch(
            device, _FILE, "label_f64" if maps.dtype == torch.float64 else "label_f32", batch, cuda.THREADS,
            maps, None if skip is None else skip.contiguous(), candidates, labels, status, points, cells, slot, counts,
            None if bits_shared else integers(bits_bytes // 4), rows.lower, rows.weight, cols.lower,
            cols.weight, *(np.int32(i) for i in size),
            np.float64(self.percentile), shared_bytes=bits_bytes if bits_shared else 0,
        )  # fmt: skip
        samples = Samples(labels, cells, slot, rows, cols, (height, width), (h, w), own_points)
        basis = stages.basis(features, points, counts, status, samples, capacity.rows)
        trained = train(
            basis, counts, status, capacity,
            C=self.C, loss=self.loss, tol=self.tol, max_iter=self.max_iter, samples=samples,
        )  # fmt: skip
        low = stages.decision(features, trained.weights, trained.report, status)
        stages.upsample_threshold(low, status, samples, mask, decision, codes)


def _on_device(candidates: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(candidates.astype(np.int32)).to(device)
