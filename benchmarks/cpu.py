"""``ttt4as bench cpu``: each operation on the CPU against its peers, in one process run, beside its goal.

Prints a table and writes ``cpu.json``. Every row is one comparison by turns with the same number of threads on both
sides; a ratio stands only where the output has passed its gate on the very input that was timed.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ttt4as_fast.progress import Progress, silent

from . import gate, latency, machine, measure, peers, workloads
from .headline import backend_of
from .results_file import result

TITLE = "CPU: each operation against its peers"
_PICKS_CHECKED = 200  # of a coreset, against plain greedy in float64, which needs seconds for them
_PICKS_TIMED = (20, 120)  # of a peer that would need minutes for all: a pick costs the same each time


@dataclass(frozen=True)
class Plan:
    """How much of everything: sizes that a test shrinks.

    Attributes
    ----------
    seconds : float
        For each comparison; three rounds are made in any case.
    calls : int
        Of the tail latency.
    seed : int
    data : path-like or None
        A data set to take images from; the whole pipeline is measured on it.
    svm, knn, coreset, maps
        Sizes, see the functions that use them.
    """

    seconds: float = 4.0
    calls: int = 10_000
    seed: int = 0
    data: str | Path | None = None
    scenes: tuple[tuple[str, float], ...] = (
        ("wrn50", 100.0),
        ("dinov2_vits14", 50.0),
        ("wrn50_1536", 50.0),
        ("wrn50_512px", 50.0),
        ("wrn50_1024px", 50.0),
        ("dinov2_vits14_1024px", 50.0),
    )
    svm: tuple[tuple[int, int], ...] = ((500, 384), (500, 1536), (1500, 1024), (5000, 384), (5000, 1536))
    svm_c: tuple[float, ...] = (1e-3, 1e-1, 10.0)
    knn: tuple[tuple[int, int], ...] = ((13_000, 344), (13_000, 1024), (13_000, 1536))
    coreset: tuple[tuple[int, int], ...] = ((31_360, 3_136), (160_000, 16_000))
    coreset_channels: int = 344
    maps: tuple[int, ...] = (224, 1024)


Row = dict[str, Any]


def run(plan: Plan | None = None, threads: int = 1, pattern: str = "", progress: Progress = silent) -> dict[str, Any]:
    """Measure the rows whose ``"operation shape peer"`` matches `pattern`; returns the content of ``cpu.json``."""
    plan = plan or Plan()
    pinned = machine.pin(threads)
    watch = machine.Watch()
    groups = [
        (name, function) for name, function in GROUPS.items() if not pattern or re.search(pattern, name, re.IGNORECASE)
    ]
    if not groups:
        raise ValueError(f"rows: expected a pattern that matches one of {', '.join(GROUPS)}, got {pattern!r}")
    rows = []
    for i, (name, function) in enumerate(groups):
        progress(f"cpu: {name}", i, len(groups))
        rows += list(function(plan))
        gc.collect()
    progress("cpu", len(groups), len(groups))
    return result("cpu", TITLE, machine.describe(pinned, watch), rows, absent_peers=peers.absent())


# ---------------------------------------------------------------- the rows


def _row(
    operation: str,
    shape: str,
    peer: str,
    version: str,
    ours: measure.Timing,
    theirs: measure.Timing,
    verdict: gate.Verdict,
    goal: float | None = None,
    **more: Any,
) -> Row:
    """One line of the table: no ratio without parity."""
    ratio = measure.ratio(theirs, ours) if verdict else None
    return {
        "operation": operation,
        "shape": shape,
        "peer": peer,
        "peer_version": version,
        "backend": backend_of(operation),
        "ours": ours.summary(),
        "theirs": theirs.summary(),
        "speedup": ratio,
        "goal": goal,
        "met": None if goal is None or ratio is None else ratio["ratio"] >= goal,
        "gate": {"passed": verdict.passed, "detail": verdict.detail},
        **more,
    }


def _usable(operation: str) -> list[peers.Peer]:
    return [peer for peer in peers.peers(operation) if peer.why_not() is None]


def _segment_rows(plan: Plan) -> Iterator[Row]:
    from ttt4as_fast import TTT4AS

    segmenter = TTT4AS()
    (recipe,) = peers.peers("segment")
    for name, goal in plan.scenes:
        workload = workloads.WORKLOADS[name]
        needed = 2.5 * 4 * workload.channels * workload.map_size**2 / 2**20
        if needed > measure.available_mebibytes():
            yield {"operation": "segment", "shape": workload.shape, "peer": recipe.name, "skipped": "too little memory"}
            continue
        scene = workloads.scene(workload, 1, plan.seed, plan.data)
        psi, deep = scene.anomaly_map[0], scene.features[0]
        out = segmenter(psi, deep)
        verdict = gate.check_segment(psi, deep, out.pred_mask, out.decision_map, out.pseudo_labels)
        found = measure.by_turns(
            {"peer": partial(recipe.adapter(), psi, deep), "ours": partial(segmenter, psi, deep)}, plan.seconds
        )
        more: dict[str, Any] = {}
        if name == plan.scenes[0][0]:
            more["tail"] = latency.back_to_back(partial(segmenter, psi, deep), plan.calls)
        yield _row(
            "segment", workload.shape, recipe.name, recipe.version, found["ours"], found["peer"], verdict, goal, **more
        )


def _robust_rows(plan: Plan) -> Iterator[Row]:
    """The robust preset beside the paper's, which it may cost three times."""
    import ttt4as_fast
    from ttt4as_fast import TTT4AS, kernels

    paper, robust = TTT4AS(), TTT4AS(preset="robust")
    for name, _ in plan.scenes:
        workload = workloads.WORKLOADS[name]
        scene = workloads.scene(workload, 1, plan.seed, plan.data)
        psi, deep = scene.anomaly_map[0], scene.features[0]
        if psi.size > gate.DENSE_PIXELS:
            continue
        want = kernels.segment_robust(psi, deep, backend="reference")
        verdict = gate.check_mask(robust(psi, deep).pred_mask, want.pred_mask, 1e-3)
        found = measure.by_turns(
            {"peer": partial(paper, psi, deep), "ours": partial(robust, psi, deep)}, plan.seconds / 4
        )
        yield _row(
            "segment_robust",
            workload.shape,
            "TTT4AS, preset paper",
            ttt4as_fast.__version__,
            found["ours"],
            found["peer"],
            verdict,
            1 / 3,
        )


def _svm_rows(plan: Plan) -> Iterator[Row]:
    from ttt4as_fast import kernels

    for n, channels in plan.svm:
        X, y = workloads.svm_samples(n, channels, plan.seed, plan.data)
        for C in plan.svm_c:
            optimum = gate.svm_optimum(X, y, C)
            svm = kernels.fit_linear_svm(X, y, C=C)
            verdict = gate.check_svm(X, y, svm.coef, svm.intercept, C, optimum)
            for peer in _usable("linear_svm"):
                fit = peer.adapter()
                coef, intercept = fit(X, y, C)
                theirs = gate.check_svm(X, y, coef, intercept, C, optimum)
                found = measure.by_turns(
                    {"peer": partial(fit, X, y, C), "ours": partial(kernels.fit_linear_svm, X, y, C=C)},
                    plan.seconds / 4,
                )
                shape = f"{n} x {channels}, C {C:g}"
                yield _row(
                    "linear_svm",
                    shape,
                    peer.name,
                    peer.version,
                    found["ours"],
                    found["peer"],
                    verdict,
                    10.0,
                    peer_gate={"passed": theirs.passed, "detail": theirs.detail},
                )


def _knn_rows(plan: Plan) -> Iterator[Row]:
    for n, channels in plan.knn:
        bank = workloads.nominal_patches(channels, n, plan.seed, plan.data)
        query = workloads.query_patches(channels, plan.seed, plan.data)
        yield from _search_rows(query, bank, "activations", plan.seconds, 5.0)
    n, channels = plan.knn[0]
    rng = np.random.default_rng(plan.seed)
    noise = rng.standard_normal((n + 784, channels)).astype(np.float32)
    # No structure to use: the goal is not to be slower than 1.2 times a plain search.
    yield from _search_rows(noise[n:], noise[:n], "white noise", plan.seconds, 1 / 1.2)


def _search_rows(query: np.ndarray, bank: np.ndarray, kind: str, seconds: float, goal: float) -> Iterator[Row]:
    from ttt4as_fast import kernels

    index = kernels.KnnIndex(bank)
    built = {peer: peer.adapter()(bank) for peer in _usable("knn")}
    for k in (1, 9):
        verdict = gate.check_knn(query, bank, *index.search(query, k))
        functions: dict[str, Callable[[], Any]] = {"ours": partial(index.search, query, k)}
        functions.update({peer.name: partial(search, query, k) for peer, search in built.items()})
        found = measure.by_turns(functions, seconds)
        for peer in built:
            yield _row(
                "knn",
                f"{len(query)} x {len(bank)} x {bank.shape[1]}, k {k}, {kind}",
                peer.name,
                peer.version,
                found["ours"],
                found[peer.name],
                verdict,
                goal,
            )


def _coreset_rows(plan: Plan) -> Iterator[Row]:
    from ttt4as_fast import kernels

    for n, picks in plan.coreset:
        points = workloads.nominal_patches(plan.coreset_channels, n, plan.seed, plan.data)
        begin = time.perf_counter()
        ours = kernels.k_center_greedy(points, picks)
        spent = measure.Timing(((1e3 * (time.perf_counter() - begin),),))
        checked = min(_PICKS_CHECKED, picks)
        verdict = gate.check_coreset(ours, kernels.k_center_greedy(points, checked, backend="reference"))
        for peer in _usable("coreset"):
            theirs = _time_of_picks(peer.adapter(), points, picks, plan.seed)
            yield _row(
                "coreset",
                f"{n} x {plan.coreset_channels} -> {picks}",
                peer.name,
                peer.version,
                spent,
                theirs,
                verdict,
                10.0,
                extrapolated=f"the peer's time from its first {_PICKS_TIMED[1]} picks"
                if picks > _PICKS_TIMED[1]
                else None,
            )
        if not _usable("coreset"):
            yield {
                "operation": "coreset",
                "shape": f"{n} x {plan.coreset_channels} -> {picks}",
                "backend": backend_of("coreset"),
                "ours": spent.summary(),
                "gate": {"passed": verdict.passed, "detail": verdict.detail},
                "skipped": "no peer is installed",
            }


def _time_of_picks(select: Callable[..., Any], points: np.ndarray, picks: int, seed: int) -> measure.Timing:
    """Milliseconds for all picks: measured if they are few, else the first ones and as many more as there are."""

    def spent(n: int) -> float:
        begin = time.perf_counter()
        select(points, n, seed)
        return 1e3 * (time.perf_counter() - begin)

    few, many = _PICKS_TIMED
    if picks <= many:
        return measure.Timing(((spent(picks),),))
    spent(few)
    first = spent(few)
    return measure.Timing(((first + (spent(many) - first) / (many - few) * (picks - few),),))


def _peaks(psi: np.ndarray) -> Any:
    from ttt4as_fast import kernels

    return kernels.dilate(kernels.local_maxima(psi, 99.0), 5)


def _peak_rows(plan: Plan) -> Iterator[Row]:
    from ttt4as_fast import kernels

    for size in plan.maps:
        workload = workloads.Workload("peaks", 152, 28, size, "")
        psi = workloads.scene(workload, 1, plan.seed, plan.data).anomaly_map[0]

        ours = partial(_peaks, psi)

        reference = kernels.dilate(kernels.local_maxima(psi, 99.0, backend="reference"), 5, backend="reference")
        verdict = gate.check_equal(ours(), reference)
        for peer in _usable("peaks"):
            label = peer.adapter()
            found = measure.by_turns({"peer": partial(label, psi, 99.0, 5), "ours": ours}, plan.seconds / 2)
            agrees = gate.check_equal(label(psi, 99.0, 5), reference)
            yield _row(
                "peaks",
                f"{size} x {size}",
                peer.name,
                peer.version,
                found["ours"],
                found["peer"],
                verdict,
                10.0,
                peer_gate={"passed": agrees.passed, "detail": agrees.detail},
            )


def _upsample_rows(plan: Plan) -> Iterator[Row]:
    import torch

    from ttt4as_fast import kernels

    scene = workloads.scene(workloads.WORKLOADS["dinov2_vits14"], 1, plan.seed, plan.data)
    deep = torch.from_numpy(scene.features[:1, :64])
    forms = {
        "float32": (deep, 1e-5),
        "float32, channels last": (deep.contiguous(memory_format=torch.channels_last), 1e-5),
        "float16": (deep.half(), 2e-3),
        "bfloat16": (deep.bfloat16(), 2e-2),
        "bfloat16, channels last": (deep.bfloat16().contiguous(memory_format=torch.channels_last), 2e-2),
    }
    for size in plan.maps:
        for form, (features, tolerance) in forms.items():
            reference = kernels.bilinear_upsample(features.double().numpy(), (size, size), backend="reference")
            verdict = gate.check_equal(kernels.bilinear_upsample(features, (size, size)).double(), reference, tolerance)
            for peer in _usable("upsample"):
                found = measure.by_turns(
                    {
                        "peer": partial(peer.adapter(), features, (size, size)),
                        "ours": partial(kernels.bilinear_upsample, features, (size, size)),
                    },
                    plan.seconds / 4,
                )
                shape = f"64 x 16 x 16 -> {size} x {size}, {form}"
                yield _row("bilinear", shape, peer.name, peer.version, found["ours"], found["peer"], verdict)


def _pipeline_rows(plan: Plan) -> Iterator[Row]:
    """Images to masks, with every backend automatic and with every backend ``reference``; milliseconds by stage."""
    from ttt4as_fast import TTT4AS, PatchCore

    nominal, source = workloads.images("nominal", 40, 256, plan.seed, plan.data)
    defective, _ = workloads.images("defective", 8, 256, plan.seed, plan.data)
    fast = PatchCore(device="cpu").fit(nominal)
    slow = PatchCore(device="cpu", backend="reference")
    slow.set_memory_bank(fast.memory_bank_)
    segmenters = {"ours": TTT4AS(), "reference": TTT4AS(backend="reference")}
    stages: dict[str, list[dict[str, float]]] = {"ours": [], "reference": []}

    def whole(name: str, model: Any) -> Any:
        prediction = model.predict(defective)
        begin = time.perf_counter()
        masks = segmenters[name](prediction.anomaly_map, prediction.features).pred_mask
        spent = {**prediction.milliseconds, "TTT4AS": 1e3 * (time.perf_counter() - begin)}
        stages[name].append({stage: ms / len(defective) for stage, ms in spent.items()})
        return masks

    verdict = gate.check_mask(whole("ours", fast), whole("reference", slow), 1e-4)
    found = measure.by_turns(
        {"reference": lambda: whole("reference", slow), "ours": lambda: whole("ours", fast)}, plan.seconds
    )
    by_stage = {
        name: {stage: measure.significant(float(np.median([one[stage] for one in rounds]))) for stage in rounds[0]}
        for name, rounds in stages.items()
    }
    share = by_stage["ours"]["TTT4AS"] / sum(by_stage["ours"].values())
    yield _row(
        "segment",
        f"PatchCore.predict + TTT4AS, {len(defective)} images of {source}, bank {len(fast.memory_bank_)} x 152",
        "PatchCore and TTT4AS with backend reference",
        machine.versions()["ttt4as_fast"],
        found["ours"],
        found["reference"],
        verdict,
        stages_ms=by_stage,
        ttt_share=measure.significant(share, 3),
        ttt_share_goal=0.02,
    )


GROUPS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "segment": _segment_rows,
    "segment_robust": _robust_rows,
    "linear_svm": _svm_rows,
    "knn": _knn_rows,
    "coreset": _coreset_rows,
    "peaks": _peak_rows,
    "bilinear": _upsample_rows,
    "pipeline": _pipeline_rows,
}


# ---------------------------------------------------------------- the table


def table(content: dict[str, Any]) -> Any:
    """The rows for the screen."""
    from rich.table import Table

    threads = next(iter(content["threads"].values()))
    shown = Table("operation", "shape", "peer", "peer ms", "ours ms", "speed-up", "goal", "gate", title=TITLE)
    shown.caption = f"medians, {threads} thread(s) on both sides; in brackets the band of single rounds (p20 to p80)"
    for column in shown.columns[3:7]:
        column.justify = "right"
    for row in content["rows"]:
        if "skipped" in row:
            ours = f"{row['ours']['p50']:.3g}" if "ours" in row else "-"
            shown.add_row(row["operation"], row["shape"], row.get("peer", "-"), "-", ours, row["skipped"], "", "")
            continue
        shown.add_row(
            row["operation"],
            row["shape"],
            row["peer"] + (f" ({row['extrapolated']})" if row.get("extrapolated") else ""),
            f"{row['theirs']['p50']:.4g}",
            f"{row['ours']['p50']:.3g}",
            measure.with_band(row["speedup"]),
            "" if row["goal"] is None else f"{row['goal']:.3g}x {'met' if row['met'] else 'MISSED'}",
            row["gate"]["detail"] if row["gate"]["passed"] else f"FAILED: {row['gate']['detail']}",
        )
    return shown
