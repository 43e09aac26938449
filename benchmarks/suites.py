"""``ttt4as bench all``: every suite whose results are committed, one after another, each in a process of its own.

A process of its own: what one leaves behind (memory, warm caches, a library's threads) reaches no other, and one that
fails stops no other. A suite whose result is current - the same code, machine and number of threads - is kept, so that
a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .results_file import all_passed


@dataclass(frozen=True)
class Suite:
    """One result file.

    Attributes
    ----------
    name : str
        ``<name>.json``, and the command but for the headline, which has none.
    minutes : float
        What it may take on two cores.
    question : str
        What it answers.
    """

    name: str
    minutes: float
    question: str

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments after ``ttt4as bench``."""
        return () if self.name == "headline" else (self.name,)


SUITES = (
    Suite("headline", 3, "what test-time training adds to an image"),
    Suite("latency", 4, "the tail under a steady camera, throughput, cold start"),
    Suite("integrations", 5, "each host as it is, and with one line switched"),
    Suite("growth", 8, "how time and memory grow"),
    Suite("cpu", 14, "each operation against its peers"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a suite: ``"measured"``, ``"kept"``, ``"missed a gate"`` or ``"failed"``, and minutes spent."""

    suite: Suite
    status: str
    minutes: float


def chosen(pattern: str = "") -> list[Suite]:
    """The suites whose name matches a pattern.

    Raises
    ------
    ValueError
        None does.
    """
    found = [suite for suite in SUITES if re.search(pattern, suite.name, re.IGNORECASE)]
    if not found:
        names = ", ".join(suite.name for suite in SUITES)
        raise ValueError(f"suites: expected a pattern that matches one of {names}, got {pattern!r}")
    return found


def run(
    suites: Sequence[Suite],
    folder: str | Path,
    threads: int,
    options: Sequence[str] = (),
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Measure suites into a folder.

    Parameters
    ----------
    suites : sequence of Suite
    folder : path-like
        For the result files.
    threads : int
    options : sequence of str
        Further arguments for each.
    again : bool
        Also those whose result is current. Default False.
    say : callable
        Takes a line of progress.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for suite in suites:
        if not again and is_current(folder / f"{suite.name}.json", threads):
            say(f"{suite.name}: kept, measured with this code, machine and number of threads")
            outcomes.append(Outcome(suite, "kept", 0.0))
            continue
        say(f"{suite.name}: {suite.question} (up to {suite.minutes:g} min on two cores)")
        begin = time.monotonic()
        arguments = [*suite.command, "--threads", str(threads), "--output", str(folder), *options]
        # Not from here: in the root of a checkout, `ttt4as_fast` would be the folder and not the installed package.
        done = subprocess.run([sys.executable, "-m", "ttt4as_fast", "bench", *arguments], check=False, cwd=folder)
        minutes = (time.monotonic() - begin) / 60
        status = {0: "measured", 1: "missed a gate"}.get(done.returncode, "failed")
        outcomes.append(Outcome(suite, status, minutes))
        say(f"{suite.name}: {status}, {minutes:.1f} min")
    return outcomes


def is_current(path: Path, threads: int) -> bool:
    """Whether a result is whole, has passed, and comes from this code, processor and number of threads."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        commit, counts, cpu = content["commit"], content["threads"], content["machine"]["cpu"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if commit is None or commit.endswith("+") or not all_passed(content):
        return False
    return cpu == machine.processor() and set(counts.values()) == {threads} and machine.unchanged_since(commit)
