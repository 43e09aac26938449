"""How time and memory are taken: contestants by turns in one process; the kernel's high-water mark."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttt4as_fast.kernels.dispatch import native_core

_MOST_CALLS = 50  # of one contestant in one turn
_SLOW = 500.0  # milliseconds from which a first call says well enough how long the next will take
_SHORT = 50.0  # milliseconds up to which a function is warmed up in every turn
_WARM = 0.01  # seconds of that
_PATIENCE = 60.0  # seconds that the least number of rounds may take
_TICKS = 0.008  # seconds, two of the kernel's ticks: what a process has used is known no finer
_REST = 0.25  # seconds to wait for other threads at most


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> np.ndarray:
        return np.array([call for one in self.rounds for call in one])

    def quantile(self, q: float) -> float:
        """The `q`-th percentile, q in [0, 100]."""
        return float(np.percentile(self.calls, q))

    def summary(self) -> dict[str, float]:
        """p20, p50 and p80 in milliseconds, and the number of calls."""
        return {**{f"p{q}": significant(self.quantile(q)) for q in (20, 50, 80)}, "n": len(self.calls)}


def significant(value: float, digits: int = 4) -> float:
    """`value` to `digits` significant digits; result files say no more than was measured."""
    return float(f"{value:.{digits}g}")


def times(ratio: float) -> str:
    """A speed-up as it is shown, to three significant digits: ``"12.7x"``, ``"1,580x"``."""
    return f"{significant(ratio, 3):,.0f}x" if ratio >= 1000 else f"{ratio:.3g}x"


def with_band(speedup: dict[str, float] | None) -> str:
    """``"130x (127x to 133x)"``, the band only where there were several rounds; ``"-"`` for None."""
    if speedup is None:
        return "-"
    low, high = speedup["low"], speedup["high"]
    return times(speedup["ratio"]) + (f" ({times(low)} to {times(high)})" if low < high else "")


def by_turns(
    functions: Mapping[str, Callable[[], Any]], seconds: float, least: int = 3, most: int = 200
) -> dict[str, Timing]:
    """Time functions against each other, by turns, so that what slows the machine down slows all of them.

    One call of each goes before, unmeasured. A turn holds one call of the slowest and, of each other one, as many as
    fit into a twentieth of that, at most 50: a fast one is then measured warm, as in a loop over images. Each turn
    waits until the threads of the turn before sleep (`come_to_rest`), and begins with calls that do not count, a
    hundredth of a second of them, but for functions of more than 50 ms: a processor that has slept takes its time.

    Parameters
    ----------
    functions : mapping of str to callable
        Called without arguments.
    seconds : float
        Time to spend, more if `least` rounds take more.
    least, most : int
        Rounds; fewer than `least`, but one, where they would take more than a minute.

    Returns
    -------
    dict of str to Timing
    """
    first = {}
    for name, function in functions.items():
        first[name] = _once(function)
        if first[name] < _SLOW:
            first[name] = _once(function)
    slowest = max(first.values())
    repeats = {name: max(1, min(_MOST_CALLS, int(0.05 * slowest / max(ms, 1e-6)))) for name, ms in first.items()}
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in functions}
    began = time.perf_counter()
    done = 0
    while done < most:
        spent = time.perf_counter() - began
        if done and spent > (seconds if done >= least else max(seconds, _PATIENCE)):
            break
        for name, function in functions.items():
            come_to_rest()
            begin = time.perf_counter()
            while first[name] <= _SHORT and time.perf_counter() - begin < _WARM:
                function()
            rounds[name].append(tuple(_once(function) for _ in range(repeats[name])))
        done += 1
    return {name: Timing(tuple(found)) for name, found in rounds.items()}


def come_to_rest() -> None:
    """Wait until no thread of this process runs, a quarter of a second at most.

    Worker threads of OpenMP and OpenBLAS spin for milliseconds, OpenBLAS's for up to a tenth of a second, after their
    work is done. They would take cores from whatever is measured next, and so favour what is measured after itself.
    """
    end = time.perf_counter() + _REST
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(_TICKS)
        if time.process_time() - used < 0.25 * _TICKS:
            return


def _once(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster: of the medians, and the band of the rounds' own ratios (20th and 80th percentile).

    The ratio is the quotient of the medians that are printed beside it, over all rounds. Where a busy machine slows one
    side in some rounds and the other side in others, few rounds have such a ratio of their own, and it may lie beside
    their percentiles. Rounds and medians then disagree by as much, and the band is widened to say so.
    """
    each = [np.median(a) / np.median(b) for a, b in zip(slow.rounds, fast.rounds, strict=True)]
    of_medians = slow.quantile(50) / fast.quantile(50)
    low, high = np.percentile(each, (20, 80))
    return {
        "ratio": significant(of_medians, 3),
        "low": significant(float(min(low, of_medians)), 3),
        "high": significant(float(max(high, of_medians)), 3),
    }


def peak_mebibytes(function: Callable[[], Any]) -> float | None:
    """Memory that a call needs above what the process held before it, MiB; None where the kernel does not tell.

    The kernel's high-water mark is reset before the call and read after it, so that memory freed on the way counts.
    Memory that an allocator, or segmentation in the C++ core, kept from earlier calls is given back first.
    """
    gc.collect()
    core = native_core()
    if not isinstance(core, str):
        core.release_memory()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # Windows takes no None
        return None
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        before = status_mebibytes("VmRSS")
        function()
        return max(status_mebibytes("VmHWM") - before, 0.0)
    except OSError:
        return None


def status_mebibytes(field: str) -> float:
    """A size of this process, such as ``"VmRSS"``, MiB; OSError where the kernel does not tell."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise OSError(f"{field} is not in /proc/self/status")


def available_mebibytes() -> float:
    """Memory that can be had without swapping, MiB; infinite where it cannot be told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return math.inf


def fitted_exponent(sizes: list[float], values: list[float]) -> float | None:
    """Slope of log(value) over log(size), least squares; None for fewer than two sizes."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
