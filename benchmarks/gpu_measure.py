"""How GPU times are taken: device events after warm-up, inputs that outgrow the L2 in turn, medians and p95."""

from __future__ import annotations

import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

TURNS = 10
"""Turns that calls take which are timed by turns."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    p50: float
    p95: float
    calls: int

    def scaled(self, factor: float) -> Times:
        """The same per item of a batch."""
        return Times(self.p50 * factor, self.p95 * factor, self.calls)


class Clock:
    """Times calls on one device.

    Parameters
    ----------
    device : torch.device
        A CUDA device is timed by its events; a host, which serves tests, by the monotonic clock.
    calls : int
        Calls to time at most.
    budget_s : float
        Seconds to spend on one measurement at most (but three calls at least).
    warmup : int
        Calls that are not timed: in the second, `segment` and a search capture a CUDA graph.
    """

    def __init__(self, device: torch.device, calls: int = 200, budget_s: float = 1.0, warmup: int = 3) -> None:
        self.warmup = warmup
        self.device = device
        self.calls = calls
        self.budget_s = budget_s

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rotation(self, make: Callable[[int], Any], size_bytes: int, least: int = 2) -> list[Any]:
        """``make(0)``, ``make(1)``, ...: as many inputs of `size_bytes` as outgrow the L2 three times.

        A clock of one call, which serves tests, makes `least` of them: tiny ones would be a hundred thousand.
        """
        cache = 0
        if self.device.type == "cuda" and self.calls > 1:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        count = max(least, math.ceil(3 * cache / max(1, size_bytes)) + 1)
        return [make(i) for i in range(count)]

    def time(self, call: Callable[..., Any], inputs: Sequence[tuple]) -> Times:
        """Times of ``call(*inputs[i])``, i rotating; the first calls, which compile and warm up, do not count."""
        return self.times_by_turns([(call, inputs)])[0]

    def times_by_turns(self, calls: Sequence[tuple[Callable[..., Any], Sequence[tuple]]]) -> list[Times]:
        """`time` of each call, a tenth of one and a tenth of the next: a device's clock, which falls as it grows warm,
        is the same for all.
        """
        counts = []
        for call, inputs in calls:
            for i in range(self.warmup):
                call(*inputs[i % len(inputs)])
            self.synchronize()
            n = 1
            if self.calls > 1:
                start = time.perf_counter()
                call(*inputs[0])
                self.synchronize()
                n = max(3, min(self.calls, int(self.budget_s / max(time.perf_counter() - start, 1e-6))))
            counts.append(n)
        readings: list[list[Callable[[], float]]] = [[] for _ in calls]
        for turn in range(TURNS):
            for (call, inputs), n, read in zip(calls, counts, readings, strict=True):
                for i in range(n * turn // TURNS, n * (turn + 1) // TURNS):
                    read.append(self._reading(call, inputs[i % len(inputs)]))
        self.synchronize()
        return [summary([reading() for reading in read]) for read in readings]

    def _reading(self, call: Callable[..., Any], arguments: tuple) -> Callable[[], float]:
        """Make the call; what gives its milliseconds once the device has come so far."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call(*arguments)
            elapsed = 1e3 * (time.perf_counter() - start)
            return lambda: elapsed
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call(*arguments)
        after.record()
        return functools.partial(before.elapsed_time, after)

    def captured_time(self, call: Callable[..., Any], inputs: Sequence[tuple]) -> Times:
        """As `time`, the calls captured in one CUDA graph, so that no launch gap is between them: for short kernels."""
        return self.captured_by_turns([(call, inputs)])[0]

    def captured_by_turns(self, calls: Sequence[tuple[Callable[..., Any], Sequence[tuple]]]) -> list[Times]:
        """As `times_by_turns`, each call's in a CUDA graph."""
        if self.device.type != "cuda":
            return self.times_by_turns(calls)
        graphs = [_captured(call, inputs) for call, inputs in calls]
        times = self.times_by_turns([(graph.replay, [()]) for graph, _ in graphs])
        return [one.scaled(1 / len(inputs)) for one, (_, inputs) in zip(times, calls, strict=True)]


def _captured(call: Callable[..., Any], inputs: Sequence[tuple]) -> tuple[torch.cuda.CUDAGraph, list]:
    """The calls in one CUDA graph, and what they return, whose memory it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs:
            call(*one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # which a capture that fails does not give back
        with torch.cuda.graph(graph):
            return graph, [call(*one) for one in inputs]


def summary(milliseconds: Sequence[float]) -> Times:
    """Median and 95th percentile (nearest rank)."""
    ordered = sorted(milliseconds)
    rank = max(0, math.ceil(0.95 * len(ordered)) - 1)
    return Times(statistics.median(ordered), ordered[rank], len(ordered))


def ceilings(clock: Clock, size: int = 1 << 31, side: int = 8192) -> dict[str, float]:
    """What this device does at best: bytes a second of a copy (read and written), operations of a bf16 product."""
    a = torch.randn(size // 4, device=clock.device)
    b = torch.empty_like(a)
    copy = clock.time(b.copy_, [(a,)])
    x = torch.randn((side, side), device=clock.device, dtype=torch.bfloat16)
    y = torch.randn((side, side), device=clock.device, dtype=torch.bfloat16)
    product = clock.time(torch.matmul, [(x, y)])
    return {"copy_bytes_per_s": 2 * size / (copy.p50 * 1e-3), "bf16_flops_per_s": 2 * side**3 / (product.p50 * 1e-3)}


def floor_ms(limits: dict[str, float], moved_bytes: float, operations: float = 0.0) -> float:
    """The least time the device can take, from bytes it must move and tensor-core operations it must do."""
    seconds = max(moved_bytes / limits["copy_bytes_per_s"], operations / limits["bf16_flops_per_s"])
    return 1e3 * seconds


def machine(commit: str | None = None) -> dict[str, Any]:
    """Device, clocks, driver, versions and commit (git's, unless it is given); what is absent is None."""
    import platform

    changes = _output("git", "status", "--porcelain")
    found: dict[str, Any] = {
        "device": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None or commit else bool(changes),
    }
    for name in ("triton", "cupy", "cuml", "faiss", "sklearn", "numpy", "anomalib"):
        try:
            found[name] = __import__(name).__version__
        except Exception:  # a GPU library without its driver raises what it likes
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "state": _output(
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw",
                "--format=csv",
            ),
        }
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def as_json(times: Times | None) -> dict[str, float] | None:
    """`times` for a result file."""
    return (
        None if times is None else {f"{name}_ms" if name != "calls" else name: v for name, v in asdict(times).items()}
    )
