"""Latency as an inspection line meets it: a steady camera, one image at a time, alone and beside other work.

Response is what the line waits: from the frame's arrival to its mask, queueing included where a mask was late. Service
is the call alone. Both over thousands of calls, with the tail, because a line is stopped by its worst image.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ttt4as_fast.progress import Progress, silent

from . import gate, machine, measure, workloads
from .headline import backend_of
from .results_file import result

TITLE = "Latency, throughput and cold start"
QUANTILES = (50, 95, 99)
_WARM_UP = 50
_COLD_RUNS = 5


def quantiles(milliseconds: np.ndarray) -> dict[str, float]:
    """p50, p95, p99, max and n."""
    found = {f"p{q}": measure.significant(float(np.percentile(milliseconds, q))) for q in QUANTILES}
    return {**found, "max": measure.significant(float(milliseconds.max())), "n": len(milliseconds)}


def back_to_back(function: Callable[[], Any], calls: int) -> dict[str, float]:
    """Quantiles of `calls` calls without a pause, and by how much resident memory grew over them (MiB)."""
    for _ in range(_WARM_UP):
        function()
    spent = np.zeros(calls)
    before = _resident()
    for i in range(calls):
        begin = time.perf_counter()
        function()
        spent[i] = time.perf_counter() - begin
    grown = None if before is None else measure.significant((_resident() or before) - before)
    return {**quantiles(1e3 * spent), "resident_growth_mib": grown}  # type: ignore[dict-item]


def steady(
    function: Callable[[], Any], calls: int, rate: float, progress: Callable[[int, int], None] | None = None
) -> dict[str, dict[str, float]]:
    """Call once a period of a camera with `rate` images a second; quantiles of response and service, milliseconds.

    Frames arrive on a fixed schedule. One that arrives while another is worked on waits, and its waiting counts.
    """
    for _ in range(_WARM_UP):
        function()
    response, service = np.zeros(calls), np.zeros(calls)
    start = time.perf_counter() + 0.01
    for i in range(calls):
        due = start + i / rate
        wait = due - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        begin = time.perf_counter()
        function()
        end = time.perf_counter()
        response[i], service[i] = end - due, end - begin
        if progress is not None and i % 50 == 0:
            progress(i, calls)
    return {"response": quantiles(1e3 * response), "service": quantiles(1e3 * service)}


@contextlib.contextmanager
def competing_thread() -> Iterator[None]:
    """A thread that decodes an image and sorts numbers without pause, as the rest of a line's program does.

    It holds Python's lock in between, as such programs do.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (512, 512, 3), np.uint8)).save(buffer, "PNG")
    encoded, numbers = buffer.getvalue(), rng.random(1 << 16)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            Image.open(io.BytesIO(encoded)).load()
            np.sort(numbers)
            sum(range(2000))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run(
    name: str = "wrn50",
    threads: int = 1,
    calls: int = 3000,
    rate: float = 50.0,
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    seconds: float = 3.0,
    seed: int = 0,
    data: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure all of it on one workload; returns the content of ``latency.json``.

    Raises
    ------
    RuntimeError
        The output misses the reference on that workload.
    """
    from ttt4as_fast import TTT4AS

    pinned = machine.pin(threads)
    watch = machine.Watch()
    workload = workloads.WORKLOADS[name]
    scene = workloads.scene(workload, min(max(batches), 8), seed, data)
    segmenter = TTT4AS()
    out = segmenter(scene.anomaly_map[0], scene.features[0])
    verdict = gate.check_segment(
        scene.anomaly_map[0], scene.features[0], out.pred_mask, out.decision_map, out.pseudo_labels
    )
    if not verdict:
        raise RuntimeError(f"segment: {verdict.detail}: its latency would mean nothing")
    n_images = len(scene.features)
    turn = iter(range(10**12))

    def frame() -> None:
        i = next(turn) % n_images
        segmenter(scene.anomaly_map[i], scene.features[i])

    rows: list[dict[str, Any]] = []
    for beside, context in (("alone", contextlib.nullcontext), ("beside a busy thread", competing_thread)):
        with context():
            found = steady(frame, calls, rate, partial(progress, f"camera, {beside}"))
        progress(f"camera, {beside}", calls, calls)
        rows.append({"kind": "camera", "what": f"{rate:g} images/s, {beside}", **found})
    rows.append({"kind": "back to back", "what": "no pause", "service": back_to_back(frame, calls)})
    rows += _throughput(scene, segmenter, batches, seconds, progress)
    rows += _cold(threads, scene)
    about = machine.describe(pinned, watch)
    settings = {"workload": name, "shape": workload.shape, "images": scene.source, "backend": backend_of("segment")}
    return result("latency", TITLE, about, rows, settings=settings, gate=verdict.detail)


def _throughput(
    scene: workloads.Scene, segmenter: Any, batches: tuple[int, ...], seconds: float, progress: Progress
) -> Iterator[dict[str, Any]]:
    n_images = len(scene.features)
    alone = segmenter(scene.anomaly_map[0], scene.features[0]).pred_mask
    for i, size in enumerate(batches):
        progress("throughput", i, len(batches))
        order = np.arange(size) % n_images
        maps, features = scene.anomaly_map[order], scene.features[order]
        if not (segmenter(maps, features).pred_mask[0] == alone).all():
            raise RuntimeError(f"segment: the first image of a batch of {size} differs from the same image alone")
        timing = measure.by_turns({"batch": partial(segmenter, maps, features)}, seconds / len(batches))["batch"]
        yield {
            "kind": "throughput",
            "what": f"batch of {size}",
            "batch": size,
            "images_per_second": measure.significant(1e3 * size / timing.quantile(50)),
            "peak_mib": _rounded(measure.peak_mebibytes(partial(segmenter, maps, features))),
            **timing.summary(),
        }
    progress("throughput", len(batches), len(batches))


_COLD = """
import json, sys, time
begin = time.perf_counter()
import ttt4as_fast
imported = time.perf_counter()
import numpy as np
arrays = np.load(sys.argv[2])
anomaly_map, features = arrays["anomaly_map"], arrays["features"]
start = time.perf_counter()
segmenter = ttt4as_fast.TTT4AS(backend=sys.argv[1])
segmenter(anomaly_map, features)
first = time.perf_counter()
calls = []
for _ in range(3):
    at = time.perf_counter()
    segmenter(anomaly_map, features)
    calls.append(time.perf_counter() - at)
print(json.dumps([1e3 * x for x in (imported - begin, first - start, *calls)]))
"""


def _cold(threads: int, scene: workloads.Scene) -> Iterator[dict[str, Any]]:
    """A fresh interpreter: import, first call (which loads what it needs), the calls after. Medians."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TTT4AS_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "image.npz"
        np.savez(arrays, anomaly_map=scene.anomaly_map[0], features=scene.features[0])
        for backend in dict.fromkeys((backend_of("segment"), "reference")):
            runs = []
            for _ in range(_COLD_RUNS if backend != "reference" else 1):
                command = [sys.executable, "-c", _COLD, backend, str(arrays)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            middle = np.median(np.array(runs), axis=0)
            yield {
                "kind": "cold start",
                "what": f"backend {backend}",
                "import_ms": measure.significant(middle[0]),
                "first_call_ms": measure.significant(middle[1]),
                "second_call_ms": measure.significant(middle[2]),
                "later_call_ms": measure.significant(float(np.median(middle[3:]))),
            }


def _resident() -> float | None:
    try:
        return measure.status_mebibytes("VmRSS")
    except OSError:
        return None


def _rounded(value: float | None) -> float | None:
    return None if value is None else measure.significant(value, 3)


def tables(content: dict[str, Any]) -> list[Any]:
    """Three tables for the screen."""
    from rich.table import Table

    rows = content["rows"]
    title = f"Latency, {content['settings']['shape']}: milliseconds"
    tail = Table("", "", "p50", "p95", "p99", "max", "calls", title=title)
    for row in rows:
        for kind in ("response", "service"):
            if kind in row:
                one = row[kind]
                tail.add_row(row["what"], kind, *(f"{one[q]:.2f}" for q in ("p50", "p95", "p99", "max")), str(one["n"]))
    through = Table("", "images/s", "ms a batch", "memory of a call, MiB", title="Throughput")
    cold = Table("", "import", "first call", "second call", "later", title="Cold start: milliseconds")
    for row in rows:
        if row["kind"] == "throughput":
            memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
            through.add_row(row["what"], f"{row['images_per_second']:.0f}", f"{row['p50']:.2f}", memory)
        elif row["kind"] == "cold start":
            keys = ("import_ms", "first_call_ms", "second_call_ms", "later_call_ms")
            cold.add_row(row["what"], *(f"{row[key]:.1f}" for key in keys))
    for one in (tail, through, cold):
        for column in one.columns[2 if one is tail else 1 :]:
            column.justify = "right"
    return [tail, through, cold]
