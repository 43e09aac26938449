"""The parts of the report page: a sortable table, and a section for each suite; an unknown one is a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from . import measure, svg
from .digest import gpu_device, gpu_graph
from .integrations import described
from .peers import STAGES

DETECTOR_COLOURS = {"backbone": 3, "knn": 4, "map": 5}
STAGE_COLOURS = {"upsampling": 2, "pseudo-labels": 6, "sampling": 7, "SVM": 8, "prediction": 9}
OURS = "TTT4AS, fused"
COLOURS = {**DETECTOR_COLOURS, **STAGE_COLOURS, OURS: 1}

_NOTE = 34  # letters from which a cell is given width

Content = dict[str, Any]

Cell = Any  # str, number, None, or (text, value to sort by)


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A sortable table. A cell is text, a number, None, or (text, number to sort by); text is escaped."""
    numeric = [any(isinstance(row[i], (int, float, tuple)) for row in rows) for i in range(len(heads))]
    classes = [' class="number"' if yes else "" for yes in numeric]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(text)}</button></th>'
        for text, kind in zip(heads, classes, strict=True)
    )
    lines = []
    for row in rows:
        cells = "".join(_cell(value, kind) for value, kind in zip(row, classes, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(value: Cell, kind: str) -> str:
    if value is None:
        return f"<td{kind}>-</td>"
    if isinstance(value, tuple):
        text, number = value
        return f'<td{kind} data-v="{number}">{escape(text)}</td>'
    if isinstance(value, bool):
        return f"<td{kind}>{value}</td>"
    if isinstance(value, (int, float)):
        return (
            f'<td{kind} data-v="{value}">{value:,.4g}</td>'
            if abs(value) < 1e4
            else f'<td{kind} data-v="{value}">{value:,.0f}</td>'
        )
    text = _arrows(escape(str(value)))
    mark = ' class="bad"' if text.startswith(("FAILED", "MISSED")) else ""
    kind = kind or (' class="note"' if len(text) > _NOTE else "")
    return f"<td{kind}>{f'<span{mark}>{text}</span>' if mark else text}</td>"


def _arrows(text: str) -> str:
    """``->`` of a shape, escaped, as an arrow that no line breaks in two."""
    return text.replace("-&gt;", "&rarr;")


def _speedup(found: dict[str, float] | None) -> Cell:
    return None if found is None else (measure.with_band(found), found["ratio"])


def _gate(found: dict[str, Any]) -> str:
    return f"{'passed' if found['passed'] else 'FAILED'}: {found['detail']}"


def _percent(share: float | None) -> Cell:
    return None if share is None else (f"{share:.1%}", share)


def _headline(content: Content) -> str:
    heads = (
        "workload",
        "shape",
        "detector ms",
        "recipe ms",
        "of the detector",
        "TTT4AS ms",
        "of the detector",
        "speed-up",
        "gate",
    )
    rows, bars = [], []
    for row in content["rows"]:
        rows.append(
            (
                row["workload"],
                row["shape"],
                row["detector_ms"],
                row["recipe"]["p50"],
                _percent(row["overhead_recipe"]),
                row["ours"]["p50"],
                _percent(row["overhead"]),
                _speedup(row["speedup"]),
                _gate(row["gate"]),
            )
        )
        detector = {name: row["detector"][name]["p50"] for name in DETECTOR_COLOURS}
        both = {
            "recipe": {**detector, **row["recipe"]["stages"]},
            "TTT4AS": {**detector, OURS: row["ours"]["p50"]},
        }
        title = f"{row['workload']}: milliseconds of an image, detector and test-time training, recipe and TTT4AS"
        plot = svg.stacked_bars(title, "ms", both, COLOURS)
        weights = "random weights" if row["detector"]["weights"] == "random" else "real weights"
        bars.append(
            f'<figure><div class="scroll wide" role="region" tabindex="0" aria-label="Bars of {row["workload"]}">'
            f"{plot}</div>"
            f"<figcaption>{escape(row['workload'])}: {escape(row['like'])}, "
            f"{_arrows(escape(row['shape']))}; {weights}, {escape(row['images'])}</figcaption></figure>"
        )
    stages = [
        (f"{row['workload']}, {side}", *(row[key]["stages"].get(stage) for stage in STAGES), row[key]["p50"])
        for row in content["rows"]
        for side, key in (("recipe", "recipe"), ("TTT4AS", "ours"))
    ]
    return (
        table("Milliseconds an image", heads, rows)
        + svg.legend(COLOURS)
        + "".join(bars)
        + "<h3>Test-time training by stage</h3>"
        + table(
            "Milliseconds a stage; TTT4AS: its operations called one by one, and the fused call",
            ("workload", *STAGES, "whole"),
            stages,
        )
    )


def _cpu(content: Content) -> str:
    rows = []
    for row in content["rows"]:
        if "skipped" in row:
            ours = row["ours"]["p50"] if "ours" in row else None
            rows.append(
                (row["operation"], row["shape"], row.get("peer", "-"), None, ours, None, None, "", row["skipped"])
            )
            continue
        met = "" if row["met"] is None else "met" if row["met"] else "MISSED"
        rows.append(
            (
                row["operation"],
                row["shape"],
                f"{row['peer']} ({row['peer_version']})"
                + (f"; {row['extrapolated']}" if row.get("extrapolated") else ""),
                row["theirs"]["p50"],
                row["ours"]["p50"],
                _speedup(row["speedup"]),
                row["goal"],
                met,
                _gate(row["gate"]),
            )
        )
    heads = ("operation", "shape", "peer", "peer ms", "ours ms", "speed-up", "goal", "reached", "gate")
    text = table("Each operation against its peers", heads, rows)
    for row in content["rows"]:
        if "tail" in row:
            tail = row["tail"]
            text += (
                f"<p>{escape(row['shape'])} over {tail['n']:,} calls without a pause: p50 {tail['p50']} ms, "
                f"p95 {tail['p95']} ms, p99 {tail['p99']} ms, maximum {tail['max']} ms; "
                f"resident memory grew by {tail['resident_growth_mib']} MiB.</p>"
            )
        if "stages_ms" in row:
            stages = list(row["stages_ms"]["ours"])
            lines = [(name, *(row["stages_ms"][name][stage] for stage in stages)) for name in ("ours", "reference")]
            text += table(f"{row['shape']}: milliseconds an image", ("backends", *stages), lines)
    return text


def _growth(content: Content) -> str:
    plots, rows = [], []
    for row in content["rows"]:
        peer = next((point["peer"] for point in row["points"] if point["theirs"]), "peer")
        for key, what in (("p50", "milliseconds"), ("mib", "MiB above what was held")):
            lines = []
            for side, name, colour in (
                ("ours", "TTT4AS" if row["axis"] != "bank" else "KnnIndex", 1),
                ("theirs", peer, 2),
            ):
                points = [
                    (point["size"], point[side][key])
                    for point in row["points"]
                    if point[side] and (point[side][key] or 0) > 0
                ]
                exponent = row[f"exponent_{side}"]
                label = name + (f", exponent {exponent:.2f}" if key == "p50" and exponent is not None else "")
                if points:
                    lines.append(svg.Line(label, points, colour))
            if lines:
                title = f"{what} over {row['label']}"
                plots.append(f"<figure>{svg.log_log(title, row['label'], what, lines)}</figure>")
        for point in row["points"]:
            theirs = point["theirs"] or {"p50": None, "mib": None}
            rows.append(
                (
                    row["label"],
                    point["size"],
                    theirs["p50"],
                    point["ours"]["p50"],
                    _speedup(point["speedup"]),
                    theirs["mib"],
                    point["ours"]["mib"],
                    _gate(point["gate"]),
                )
            )
    heads = ("axis", "size", "peer ms", "ours ms", "speed-up", "peer MiB", "ours MiB", "gate")
    base = f"<p>From {escape(content['settings']['base'])}, one size changed at a time.</p>"
    return f'{base}<div class="plots">{"".join(plots)}</div>{table("Every point", heads, rows)}'


def _latency(content: Content) -> str:
    rows = content["rows"]
    keys = ("p50", "p95", "p99", "max", "n")
    tail = [
        (row["what"], kind, *(row[kind][key] for key in keys))
        for row in rows
        for kind in ("response", "service")
        if kind in row
    ]
    through = [
        (row["what"], row["images_per_second"], row["p50"], row["peak_mib"])
        for row in rows
        if row["kind"] == "throughput"
    ]
    cold_keys = ("import_ms", "first_call_ms", "second_call_ms", "later_call_ms")
    cold = [(row["what"], *(row[key] for key in cold_keys)) for row in rows if row["kind"] == "cold start"]
    settings = content["settings"]
    text = f"<p>{escape(settings['shape'])}, {escape(settings['images'])}. "
    text += "Response: from a frame's arrival to its mask, waiting included.</p>"
    text += table("Milliseconds over many calls", ("camera", "time", "p50", "p95", "p99", "maximum", "calls"), tail)
    if through:
        units = ("batch", "images a second", "milliseconds a batch", "memory of a call, MiB")
        text += "<h3>Throughput</h3>" + table("Throughput", units, through)
    if cold:
        steps = ("interpreter just started", "import ms", "first call ms", "second call ms", "later calls ms")
        text += "<h3>Cold start</h3>" + table("Cold start", steps, cold)
    return text


def _integrations(content: Content) -> str:
    heads = ("host", "operation", "as it is", "ms", "switched to", "ms after", "speed-up", "gate")
    rows: list[Sequence[Cell]] = []
    for row in content["rows"]:
        if "skipped" in row:
            rows.append((row["host"], row["operation"], "-", None, "-", None, None, row["skipped"]))
            continue
        rows.append(
            (
                row["host"],
                row["operation"],
                f"{row['stock']} ({row['version']})",
                row["theirs"]["p50"],
                row["switched"],
                row["ours"]["p50"],
                _speedup(row["speedup"]),
                described(row),
            )
        )
    prepared = [
        (row["host"], row["operation"], row["prepare"]["theirs"], row["prepare"]["ours"])
        for row in content["rows"]
        if "prepare" in row
    ]
    text = table("The same call, before and after the line is switched", heads, rows)
    if prepared:
        columns = ("host", "search", "as it is, ms", "switched, ms")
        text += "<h3>What a search prepares once</h3>" + table("Milliseconds to prepare the bank", columns, prepared)
    return text


def _masks(content: Content) -> str:
    names = (
        "precision",
        "recall",
        "f1",
        "pooled_f1",
        "iou",
        "fpr_pixels_nominal",
        "fpr_images_nominal",
        "milliseconds",
    )
    heads = (
        "method",
        "precision",
        "recall",
        "F1",
        "pooled F1",
        "IoU",
        "nominal pixels marked",
        "nominal images marked",
        "ms",
        "what it is",
    )
    rows = [
        (
            row["method"],
            *(_percent(row[name]) if name.startswith("fpr") else row[name] for name in names),
            row["meaning"],
        )
        for row in content["rows"]
    ]
    detector = content["detector"]
    text = (
        f"<p>Detector: I-AUROC {detector['i_auroc']:.3f}, P-AUROC {detector['p_auroc']:.3f}, "
        f"AU-PRO {detector['aupro']:.3f}. "
        "Precision, recall, F1 and IoU are means over defective images.</p>"
    )
    text += table("Every way to make a mask, on identical maps", heads, rows)
    if content["paper"]:
        printed = [
            (
                f"Table {row['table']}{row['part'] or ''}",
                row["what"],
                f"{row['detector']}, {row['backbone'] or 'its own features'}",
                *(row.get(name) for name in ("i_auroc", "p_auroc", "precision", "recall", "f1")),
            )
            for row in content["paper"]
        ]
        columns = ("printed in", "what", "detector", "I-AUROC", "P-AUROC", "precision", "recall", "F1")
        text += "<h3>As printed in the paper, not measured here</h3>" + table(
            "The paper's figures for this category", columns, printed
        )
        text += (
            "<p>What differs:</p><ul>" + "".join(f"<li>{escape(line)}</li>" for line in content["differs"]) + "</ul>"
        )
    return text


_GPU_VERSIONS = ("python", "torch", "cuda", "triton", "cupy", "cuml", "faiss", "sklearn", "numpy", "anomalib")


def _gpu(content: Content) -> str:
    """The rows of ``benchmarks.gpu``, whose file has a format of its own."""
    machine = content.get("machine") or {}
    said = [gpu_device(content), *(f"{name} {machine[name]}" for name in _GPU_VERSIONS if machine.get(name))]
    about = (
        f'<p class="faint">{escape("; ".join(said))}. Captured: in a CUDA graph, without the host\'s launches. Floors: '
        "how many times it takes what bandwidth and arithmetic allow.</p>"
    )
    rows = []
    for row in content["rows"]:
        ours = row.get("ours")
        peers = {name: time for name, time in (row.get("peers") or {}).items() if isinstance(time, dict)}
        ratios = row.get("ratios") or {}
        goal = {True: "met", False: "missed"}.get(row.get("goal_met"), "-")
        for name in peers or ("-",):
            theirs = peers.get(name)
            rows.append(
                (
                    row["name"],
                    row["status"],
                    name,
                    theirs and theirs["p50_ms"],
                    ours and ours["p50_ms"],
                    ratios.get(name),
                    gpu_graph(row),
                    row.get("over_floor"),
                    f"{row['goal']}: {goal}" if goal != "-" else goal,
                )
            )
    heads = ("operation", "status", "peer", "peer ms", "ours ms", "speed-up", "captured ms", "floors", "goal")
    return about + table("On the GPU", heads, rows)


def _anything(content: Content) -> str:
    """Rows of plain values as they are; nested ones as JSON."""
    rows = content.get("rows") or []
    heads = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    if not heads:
        return "<p>No rows.</p>"
    cells = [
        [
            value if value is None or isinstance(value, (int, float, str)) else json.dumps(value)
            for value in (row.get(head) for head in heads)
        ]
        for row in rows
    ]
    return table("Rows", heads, cells)


SECTIONS: dict[str, Callable[[Content], str]] = {
    "headline": _headline,
    "cpu": _cpu,
    "growth": _growth,
    "latency": _latency,
    "integrations": _integrations,
    "gpu": _gpu,
}


def section(name: str, content: Content) -> str:
    """The body of a suite's section, by the suite's name."""
    return SECTIONS.get(name, _masks if name.startswith("masks") else _anything)(content)
