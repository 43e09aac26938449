"""What a runner leaves behind: one JSON file a suite, with the machine, the versions and the commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttt4as_fast.io import atomic_path, plain

FORMAT_VERSION = 1
RESULTS = Path(__file__).resolve().parent / "results"


def result(suite: str, title: str, about: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The content of a result file.

    Parameters
    ----------
    suite : str
        Name of the file, without ``.json``.
    title : str
        Heading in the report.
    about : dict
        What `machine.describe` says.
    rows : list of dict
        Of plain values; nested dictionaries for timings (p20, p50, p80, n).
    **more
        Further keys: settings, notes, peers that are absent.
    """
    return {"format_version": FORMAT_VERSION, "suite": suite, "title": title, **about, **more, "rows": rows}


def save(content: dict[str, Any], folder: str | Path) -> Path:
    """Write a result whole to ``folder/<suite>.json``; the folder is made if absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['suite']}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Suite -> content of every result file in a folder, in the order of their names.

    ``gpu.json``, which `benchmarks.gpu` writes in a format of its own, is the suite ``"gpu"``. Files of other formats,
    such as the reports of ``ttt4as evaluate``, are passed over.

    Raises
    ------
    FileNotFoundError
        No such folder, or no result in it.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            continue
        if content.get("format_version") == FORMAT_VERSION and "suite" in content:
            found[content["suite"]] = content
        elif path.name == "gpu.json" and "schema" in content:
            found["gpu"] = content
    if not found:
        raise FileNotFoundError(f"output: no result files in {str(folder)!r}; run 'ttt4as bench' first")
    return found


def all_passed(content: Any) -> bool:
    """Whether every gate in a result, however deep, has passed."""
    if isinstance(content, dict):
        gate = content.get("gate")
        failed = isinstance(gate, dict) and not gate["passed"]
        return not failed and all(all_passed(value) for value in content.values())
    if isinstance(content, (list, tuple)):
        return all(all_passed(value) for value in content)
    return True
