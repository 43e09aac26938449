"""Result files as one self-contained page; `digest` makes a README's summary of them.

The page holds its style, its script and its plots: it opens from a mail or a disk, in light or dark, on a phone and on
paper. Tables sort by a click on a column's head. `sections` has one for each suite.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ttt4as_fast.io import atomic_path

from .digest import digest, update_readme
from .machine import BUSY
from .results_file import load
from .sections import SECTIONS, section

Content = dict[str, Any]


def write(results: str | Path, folder: str | Path, readme: str | Path | None = None) -> list[Path]:
    """Write ``report.html`` and ``digest.md`` of a folder of result files; returns the paths of what was written.

    Parameters
    ----------
    results : path-like
        Folder of ``*.json``.
    folder : path-like
        Made if absent.
    readme : path-like, optional
        A Markdown file: what stands between its ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` becomes the digest.

    Raises
    ------
    FileNotFoundError
        There are no result files.
    ValueError
        The Markdown file has no such marks.
    """
    contents = load(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("report.html", page(contents)), ("digest.md", digest(contents))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(folder / name)
    if readme is not None and update_readme(readme, digest(contents)):
        written.append(Path(readme))
    return written


# ---------------------------------------------------------------- the page


def page(contents: dict[str, Content]) -> str:
    """The whole page of the given suites."""
    here = Path(__file__).parent
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    order = [*(name for name in SECTIONS if name in contents), *(name for name in contents if name not in SECTIONS)]
    sections, links = [], []
    for name in order:
        title = str(contents[name].get("title", "GPU" if name == "gpu" else name))
        body = section(name, contents[name])
        sections.append(
            f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n'
            f"{_about(contents[name])}\n{body}</section>"
        )
        links.append(f'<li><a href="#{name}">{escape(title)}</a></li>')
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>ttt4as benchmarks</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>What test-time training costs: ttt4as benchmarks</h1>
<p>Milliseconds are medians of single calls; a speed-up is the ratio of two medians of one process run with the same
number of threads on both sides, and is printed only where the output agrees with the reference on that very input.</p>
<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>
</header>
<main>
{chr(10).join(sections)}
</main>
<footer><p class="faint">Made by <code>ttt4as bench --report DIR</code>. Click a column's head to sort.</p></footer>
<script>
{script}</script>
</body>
</html>
"""


def _about(content: Content) -> str:
    """Machine, threads, versions and commit of a suite, and a warning where the machine was busy."""
    if "threads" not in content:
        return ""
    machine, versions = content["machine"], content["versions"]
    threads = next(iter(content["threads"].values()))
    said = [
        f"{machine['cpu']}, {machine['processors']} processors, {machine['memory_gib']} GiB, "
        f"instruction set {machine['instruction_set'] or 'unknown'}",
        f"{threads} thread(s) for both sides",
        f"commit {content['commit'] or 'unknown'}",
        content["measured"],
        ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    text = f'<p class="faint">{escape("; ".join(said))}.</p>'
    busy = content.get("load_of_others")
    if busy is not None and busy > BUSY:
        text += f'<p class="bad">Other programs used {busy:.0%} of the processors: times are not to be trusted.</p>'
    absent = content.get("absent_peers") or {}
    if absent:
        names = "; ".join(f"{name} ({reason})" for name, reason in absent.items())
        text += f'<p class="faint">Not measured here: {escape(names)}.</p>'
    return text
