"""How the overhead grows: along one axis at a time from the shape of WideResNet-50, time and memory, exponents fitted.

The axes are the sizes a user may change: pixels of the map, channels, cells of the feature grid, samples, images in a
batch, and patches in the bank that the detector searches. Published recipe and this package side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ttt4as_fast.progress import Progress, silent

from . import gate, machine, measure, peers, workloads
from .headline import backend_of
from .results_file import result

TITLE = "Growth of the overhead"
BASE = workloads.WORKLOADS["wrn50"]
_BATCH_CHANNELS = 152


@dataclass(frozen=True)
class Plan:
    """The sizes along each axis, and the time for each point in seconds."""

    map_size: tuple[int, ...] = (224, 320, 448, 640, 1024)
    channels: tuple[int, ...] = (96, 192, 384, 768, 1536)
    grid: tuple[int, ...] = (14, 20, 28, 40, 56)
    n_nominal: tuple[int, ...] = (100, 400, 1600, 6400)
    batch: tuple[int, ...] = (1, 4, 16, 64)
    bank: tuple[int, ...] = (1_000, 4_000, 16_000, 50_000, 100_000)
    seconds: float = 1.5
    seed: int = 0
    data: str | Path | None = None


@dataclass(frozen=True)
class Point:
    """One size: what is timed there, and why its numbers may be printed."""

    size: int
    shape: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    peer: str
    verdict: gate.Verdict


def run(plan: Plan | None = None, threads: int = 1, progress: Progress = silent) -> dict[str, Any]:
    """Measure every axis; returns the content of ``growth.json``.

    A row is an axis: its points (size, milliseconds and MiB of both sides) and the fitted exponents. The peer is left
    out where its memory would not fit.
    """
    plan = plan or Plan()
    pinned = machine.pin(threads)
    watch = machine.Watch()
    rows = []
    for i, (name, points) in enumerate(AXES.items()):
        progress("growth", i, len(AXES))
        rows.append(_axis(name, points(plan), plan.seconds))
    progress("growth", len(AXES), len(AXES))
    about = machine.describe(pinned, watch)
    return result(
        "growth", TITLE, about, rows, absent_peers=peers.absent("segment", "knn"), settings={"base": BASE.shape}
    )


def _axis(name: str, points: Iterator[Point], seconds: float) -> dict[str, Any]:
    found = [_measured(point, seconds) for point in points]
    row: dict[str, Any] = {
        "axis": name,
        "label": LABELS[name],
        "backend": backend_of(OPERATIONS[name]),
        "points": found,
    }
    for side in ("ours", "theirs"):
        known = [point for point in found if point[side] is not None]
        exponent = measure.fitted_exponent([p["size"] for p in known], [p[side]["p50"] for p in known])
        row[f"exponent_{side}"] = None if exponent is None else measure.significant(exponent, 3)
    return row


def _measured(point: Point, seconds: float) -> dict[str, Any]:
    functions = {"ours": point.ours, **({"theirs": point.theirs} if point.theirs is not None else {})}
    memory = {side: measure.peak_mebibytes(function) for side, function in functions.items()}
    timings = measure.by_turns(functions, seconds)
    entry: dict[str, Any] = {
        "size": point.size,
        "shape": point.shape,
        "peer": point.peer,
        "theirs": None,
        "speedup": None,
        "gate": {"passed": point.verdict.passed, "detail": point.verdict.detail},
    }
    for side in functions:
        mib = memory[side]
        entry[side] = {**timings[side].summary(), "mib": None if mib is None else measure.significant(mib, 3)}
    if point.verdict and point.theirs is not None:
        entry["speedup"] = measure.ratio(timings["theirs"], timings["ours"])
    return entry


def _segment_point(size: int, workload: workloads.Workload, plan: Plan, batch: int = 1, n_nominal: int = 100) -> Point:
    from ttt4as_fast import TTT4AS

    scene = workloads.scene(workload, min(batch, 4), plan.seed, plan.data)
    order = np.arange(batch) % len(scene.features)
    maps, features = scene.anomaly_map[order], scene.features[order]
    segmenter = TTT4AS(n_nominal=n_nominal)
    out = segmenter(maps, features)
    verdict = gate.check_segment(
        maps[0], features[0], out.pred_mask[0], out.decision_map[0], out.pseudo_labels[0], n_nominal=n_nominal
    )
    recipe = peers.peers("segment")[0].adapter()

    def theirs() -> None:
        for anomaly_map, deep in zip(maps, features, strict=True):
            recipe(anomaly_map, deep, n_nominal)

    fits = 2.5 * 4 * workload.channels * workload.map_size**2 / 2**20 < measure.available_mebibytes()
    shape = workload.shape + (f", batch {batch}" if batch > 1 else "")
    return Point(size, shape, partial(segmenter, maps, features), theirs if fits else None, "paper's recipe", verdict)


def _workload(**changed: int) -> workloads.Workload:
    sizes = {"channels": BASE.channels, "grid": BASE.grid, "map_size": BASE.map_size, **changed}
    return workloads.Workload("growth", like=BASE.like, **sizes)


def _by_map(plan: Plan) -> Iterator[Point]:
    for size in plan.map_size:
        yield _segment_point(size**2, _workload(map_size=size), plan)


def _by_channels(plan: Plan) -> Iterator[Point]:
    for channels in plan.channels:
        yield _segment_point(channels, _workload(channels=channels), plan)


def _by_grid(plan: Plan) -> Iterator[Point]:
    for grid in plan.grid:
        yield _segment_point(grid**2, _workload(grid=grid), plan)


def _by_samples(plan: Plan) -> Iterator[Point]:
    for n_nominal in plan.n_nominal:
        yield _segment_point(n_nominal, BASE, plan, n_nominal=n_nominal)


def _by_batch(plan: Plan) -> Iterator[Point]:
    for batch in plan.batch:
        # A batch of 64 takes the recipe minutes: fewer channels keep the axis, not the wait.
        yield _segment_point(batch, _workload(channels=min(_BATCH_CHANNELS, BASE.channels)), plan, batch=batch)


def _by_bank(plan: Plan) -> Iterator[Point]:
    from ttt4as_fast import kernels

    channels = 344
    usable = [peer for peer in peers.peers("knn") if peer.why_not() is None]
    query = workloads.query_patches(channels, plan.seed, plan.data)
    for n in plan.bank:
        bank = workloads.nominal_patches(channels, n, plan.seed, plan.data)
        # An index keeps its scratch from its first search on, which is the one whose memory is measured.
        verdict = gate.check_knn(query, bank, *kernels.KnnIndex(bank).search(query), n_rows=16)
        index = kernels.KnnIndex(bank)
        theirs = partial(usable[0].adapter()(bank), query, 1) if usable else None
        peer = usable[0].name if usable else "none installed"
        yield Point(n, f"{len(query)} x {n} x {channels}", partial(index.search, query), theirs, peer, verdict)


AXES: dict[str, Callable[[Plan], Iterator[Point]]] = {
    "map": _by_map,
    "channels": _by_channels,
    "grid": _by_grid,
    "samples": _by_samples,
    "batch": _by_batch,
    "bank": _by_bank,
}
LABELS = {
    "map": "pixels of the anomaly map",
    "channels": "feature channels",
    "grid": "cells of the feature grid",
    "samples": "nominal samples",
    "batch": f"images in a batch ({_BATCH_CHANNELS} channels)",
    "bank": "patches in the memory bank (search of one image)",
}
OPERATIONS = {**dict.fromkeys(AXES, "segment"), "bank": "knn"}


def table(content: dict[str, Any]) -> Any:
    """Every point, and the exponents, for the screen."""
    from rich.table import Table

    shown = Table("axis", "size", "peer ms", "ours ms", "speed-up", "peer MiB", "ours MiB", "gate", title=TITLE)
    for column in shown.columns[1:7]:
        column.justify = "right"
    for row in content["rows"]:
        for point in row["points"]:
            theirs, ours, speedup = point["theirs"], point["ours"], point["speedup"]
            shown.add_row(
                row["label"],
                f"{point['size']:,}",
                "-" if theirs is None else f"{theirs['p50']:.4g}",
                f"{ours['p50']:.3g}",
                "-" if speedup is None else measure.times(speedup["ratio"]),
                "-" if theirs is None or theirs["mib"] is None else f"{theirs['mib']:.0f}",
                "-" if ours["mib"] is None else f"{ours['mib']:.1f}",
                "passed" if point["gate"]["passed"] else f"FAILED: {point['gate']['detail']}",
            )
        exponents = [row["exponent_theirs"], row["exponent_ours"]]
        shown.add_row(
            "", "exponent", *("-" if value is None else f"{value:.2f}" for value in exponents), end_section=True
        )
    return shown
