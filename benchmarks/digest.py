"""Result files as a digest in Markdown, and the block of a README that holds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ttt4as_fast.io import atomic_path

from . import measure
from .machine import BUSY, outdated

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"

Content = dict[str, Any]


def digest(contents: dict[str, Content]) -> str:
    """The headline, the tail, growth, the span of the peers, hosts, GPU, masks; suites without a result are named."""
    places = {name: _where(content) for name, content in contents.items() if name in BLOCKS and "threads" in content}
    shared = set(places.values())
    blocks = [f"Measured on {shared.pop()}."] if len(shared) == 1 else []
    for name, block in BLOCKS.items():
        if name in contents:
            text = block(contents[name])
            blocks.append(f"*{places[name]}* - {text}" if len(shared) > 1 and name in places else text)
    blocks += [_masks(content) for name, content in contents.items() if name.startswith("masks-")]
    absent = [name for name in BLOCKS if name not in contents]
    if absent:
        blocks.append(f"No result is committed yet of: {', '.join(absent)}.")
    return "\n\n".join(blocks) + "\n"


def update_readme(path: str | Path, text: str) -> bool:
    """Put `text` between the marks of a file; returns whether that changed it.

    Raises
    ------
    ValueError
        The file has not exactly one pair of marks.
    """
    path = Path(path)
    old = path.read_text("utf-8")
    new = old.replace(f"{BEGIN}{block_of(old)}{END}", f"{BEGIN}\n{text}{END}")
    if new != old:
        with atomic_path(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return new != old


def block_of(readme: str) -> str:
    """What stands between the marks of a README; ValueError where there is not exactly one pair."""
    found = re.findall(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", readme, re.DOTALL)
    if len(found) != 1 or readme.count(BEGIN) != 1:
        raise ValueError(f"readme: expected one {BEGIN} with one {END} after it, found {len(found)} pairs")
    return found[0]


# ---------------------------------------------------------------- the blocks


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[str] = ()) -> str:
    """Numbers to the right; the first column, and those named in `texts`, to the left."""
    rules = ["---" if i == 0 or head in texts else "---:" for i, head in enumerate(heads)]
    lines = [heads, rules, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _where(content: Content) -> str:
    """Machine, threads and commit; that others used the machine, or that a peer's BLAS was below its best, if so."""
    threads = next(iter(content["threads"].values()))
    busy = content.get("load_of_others") or 0.0
    warning = f", **busy: others used {busy:.0%} of it**" if busy > BUSY else ""
    old = outdated(content["threads"], content["machine"].get("instruction_set"))
    warning += f", **peers with kernels older than the processor: {', '.join(old)}**" if old else ""
    return f"{content['machine']['cpu']}, {threads} thread(s), commit {content['commit'] or 'unknown'}{warning}"


def _times(speedup: dict[str, float] | None) -> str:
    return "-" if speedup is None else measure.times(speedup["ratio"])


def _headline(content: Content) -> str:
    rows = []
    for row in content["rows"]:
        overhead = row["overhead"]
        rows.append(
            (
                row["shape"],
                f"{row['detector_ms']:.1f}",
                f"{row['recipe']['p50']:.0f} ({row['overhead_recipe']:.0%})",
                f"{row['ours']['p50']:.2f}" + (f" ({overhead:.1%})" if overhead is not None else ""),
                _times(row["speedup"]),
            )
        )
    heads = ("features -> map", "detector, ms", "recipe adds, ms", "TTT4AS adds, ms", "speed-up")
    title = f"{content['title']} (median milliseconds; in brackets of the detector's):"
    return f"{title}\n\n{_table(heads, rows)}"


def _latency(content: Content) -> str:
    rows = [
        (row["what"], *(f"{row['response'][key]:.2f}" for key in ("p50", "p95", "p99", "max")))
        for row in content["rows"]
        if row["kind"] == "camera"
    ]
    title = f"Latency of {content['settings']['shape']}, arrival to mask, milliseconds:"
    return f"{title}\n\n" + _table(("camera", "p50", "p95", "p99", "max"), rows)


def _growth(content: Content) -> str:
    rows = []
    for row in content["rows"]:
        first, last = row["points"][0], row["points"][-1]
        rows.append(
            (
                row["label"],
                f"{first['size']:,} to {last['size']:,}",
                f"{first['ours']['p50']:.3g} to {last['ours']['p50']:.3g}",
                *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("exponent_ours", "exponent_theirs")),
            )
        )
    heads = ("growth with", "sizes", "ours, ms", "exponent", "the peer's")
    return f"{content['title']}, time ~ size^exponent:\n\n{_table(heads, rows)}"


def _cpu(content: Content) -> str:
    by_peer: dict[tuple[str, str], list[float]] = {}
    for row in content["rows"]:
        if row.get("speedup"):
            note = f" ({row['extrapolated']})" if row.get("extrapolated") else ""
            key = row["operation"], f"{row['peer']}, {row['peer_version']}{note}"
            by_peer.setdefault(key, []).append(row["speedup"]["ratio"])
    rows = [
        (
            operation,
            peer,
            " to ".join(dict.fromkeys(measure.times(ratio) for ratio in (min(ratios), max(ratios)))),
            str(len(ratios)),
        )
        for (operation, peer), ratios in by_peer.items()
    ]
    heads = ("operation", "peer", "speed-up", "shapes")
    return f"Each operation against its peers:\n\n{_table(heads, rows, ('peer',))}"


def _integrations(content: Content) -> str:
    rows = [
        (
            f"{row['host']}: {row['operation']}",
            f"{row['stock']} ({row['version']})",
            row["switched"],
            f"{row['theirs']['p50']:.3g}",
            f"{row['ours']['p50']:.3g}",
            _times(row["speedup"]),
        )
        for row in content["rows"]
        if "skipped" not in row
    ]
    heads = ("host", "as it is", "switched to", "ms", "ms after", "speed-up")
    return f"{content['title']}:\n\n{_table(heads, rows, heads[:3])}"


def _gpu(content: Content) -> str:
    """The rows of ``benchmarks.gpu``, whose file has a format of its own, that have a goal: the others only tune."""
    measured = [row for row in content["rows"] if row["status"] == "ok" and row.get("ours")]
    if not measured:
        return "On a GPU: not measured."
    rows = [
        (
            row["name"],
            f"{row['ours']['p50_ms']:.3g}",
            gpu_graph(row),
            "; ".join(f"{measure.times(ratio)} {name}" for name, ratio in row["ratios"].items()) or "-",
            f"{row['goal']}: {'met' if row['goal_met'] else '**missed**'}",
        )
        for row in measured
        if row["goal_met"] is not None
    ]
    left = [row["name"] for row in content["rows"] if row not in measured]
    heads = ("row", "ours, ms", "captured, ms", "speed-up", "goal")
    text = f"On {gpu_device(content)}; *captured* is the time in a CUDA graph, without the host's launches:\n\n"
    text += _table(heads, rows, ("captured, ms", "speed-up", "goal"))
    return text + (f"\n\nNot measured there: {', '.join(left)}." if left else "")


def gpu_device(content: Content) -> str:
    """Device and commit of a ``gpu.json``."""
    machine = content.get("machine") or {}
    device, commit = (machine.get("device") or {}).get("name", "a GPU"), machine.get("commit") or "unknown"
    return f"{device}, commit {commit[:12]}"


def gpu_graph(row: Content) -> str:
    """What a GPU row took in a CUDA graph, and the bare product that was captured beside it; ``-`` where none was."""

    def milliseconds(name: str) -> str | None:
        found = (row.get("notes") or {}).get(name)
        return f"{found['p50_ms']:.3g}" if isinstance(found, dict) else None

    ours = milliseconds("in_a_graph") or milliseconds("graph_replay_alone")
    bare = milliseconds("bare_bf16_product_in_a_graph")
    return "-" if ours is None else ours + (f" (bare product {bare})" if bare else "")


def _masks(content: Content) -> str:
    rows = [
        (row["method"], *("-" if row[name] is None else f"{row[name]:.3f}" for name in ("precision", "recall", "f1")))
        for row in content["rows"]
    ]
    heads = ("method", "precision", "recall", "F1")
    return f"{content['title']}, means over defective images:\n\n{_table(heads, rows)}"


BLOCKS: dict[str, Callable[[Content], str]] = {
    "headline": _headline,
    "latency": _latency,
    "growth": _growth,
    "cpu": _cpu,
    "integrations": _integrations,
    "gpu": _gpu,
}
