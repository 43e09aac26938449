"""What the rows of `gpu_rows` share: a row's result, the device under test with its clock, and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .gpu_measure import Clock, Times, as_json, ceilings

Peers = dict[str, Callable[..., Any]]


@dataclass
class Row:
    """One line of the result: what was asked, what came out."""

    name: str
    goal: str
    ours: Times | None = None
    correct: bool | None = None
    peers: dict[str, Times | str] = field(default_factory=dict)
    """Times, or why there are none."""
    floor: float | None = None
    """Milliseconds that the device needs at least."""
    met: bool | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the result file; what was not measured says so."""
        ours = as_json(self.ours)
        peers = {name: t if isinstance(t, str) else as_json(t) for name, t in self.peers.items()}
        status = "not measured" if ours is None else ("ok" if self.correct else "wrong answer")
        result = {"name": self.name, "goal": self.goal, "status": status, "ours": ours, "peers": peers}
        if ours is not None and self.correct:
            result |= {
                "floor_ms": self.floor,
                "over_floor": self.over_floor,
                "ratios": self.ratios,
                "goal_met": self.met,
            }
        return result | {"notes": self.notes}

    @property
    def over_floor(self) -> float | None:
        """How many times the floor it takes."""
        return self.ours.p50 / self.floor if self.ours and self.floor else None

    @property
    def ratios(self) -> dict[str, float]:
        """Peers' medians over ours."""
        assert self.ours is not None
        return {name: t.p50 / self.ours.p50 for name, t in self.peers.items() if isinstance(t, Times)}


@dataclass
class Bench:
    """A device, its clock and ceilings, and the backend under test (``"gpu"``)."""

    clock: Clock
    limits: dict[str, float]
    backend: str = "gpu"
    small: bool = False
    """Tiny sizes, for tests of this very code."""

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def note_captured(self, row: Row, calls: dict[str, tuple[Callable[..., Any], list[tuple]]]) -> list[float]:
        """Note the times of named calls, each's in one CUDA graph, without gaps between launches; or why not.

        Returns
        -------
        list of float
            The medians in milliseconds, by turns; NaN where they cannot be had.
        """
        try:
            times = self.clock.captured_by_turns(list(calls.values()))
        except Exception as error:
            if len(calls) > 1:  # one by one, for those that can be had
                return [self.note_captured(row, {name: call})[0] for name, call in calls.items()]
            row.notes |= dict.fromkeys(calls, f"not measured: {type(error).__name__}: {error}"[:300])
            return [math.nan]
        row.notes |= {name: as_json(one) for name, one in zip(calls, times, strict=True)}
        return [one.p50 for one in times]

    def peers_time(self, row: Row, peers: Peers, inputs: list[tuple]) -> None:
        """Time each peer; one that fails, for lack of memory or of a library, says why."""
        for name, call in peers.items():
            try:
                row.peers[name] = self.clock.time(call, inputs)
            except Exception as error:
                row.peers[name] = f"not measured: {type(error).__name__}: {error}"[:300]
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


def prepare(device: torch.device, small: bool = False) -> Bench:
    """A bench with measured ceilings."""
    clock = Clock(device, calls=1, warmup=0) if small else Clock(device)
    limits = ceilings(clock, 1 << 16, 32) if small else ceilings(clock)
    return Bench(clock, limits, small=small)


def network_like(shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Vectors (..., C) with a network's statistics: non-negative, few strong directions, decaying, a little noise."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]
    rank = min(channels, 64)
    basis = torch.randn((rank, channels), generator=generator) / torch.arange(1, rank + 1).sqrt()[:, None]
    rows = int(np.prod(shape[:-1]))
    generator.manual_seed(seed + 1)
    parts = []
    for start in range(0, rows, 1 << 16):  # the host's memory stays small
        n = min(rows - start, 1 << 16)
        parts.append(torch.randn((n, rank), generator=generator).to(device) @ basis.to(device))
    x = torch.cat(parts)
    noise = torch.randn(x.shape, device=device, generator=torch.Generator(device).manual_seed(seed + 2))
    return torch.relu(x + 0.3 + 0.1 * noise).reshape(shape)


def anomaly_maps(batch: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Smooth maps with a bump each, as a detector's after its blur."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((batch, 1, max(2, size // 8), max(2, size // 8)), generator=generator)
    maps = F.interpolate(coarse, (size, size), mode="bicubic")[:, 0]
    grid = torch.arange(size, dtype=torch.float32)
    for i in range(batch):
        row, col = (torch.rand(2, generator=generator) * size).tolist()
        squared = (grid[:, None] - row) ** 2 + (grid[None] - col) ** 2
        maps[i] += 1.5 * torch.exp(-squared / (2 * (0.04 * size + 1) ** 2))
    return maps.to(device)
