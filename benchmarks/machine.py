"""Where a number was measured: threads pinned and read back, how busy the machine is, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ttt4as_fast.installation import MEASURED, checkout, git, origin
from ttt4as_fast.kernels.arrays import check_int

_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TTT4AS_NUM_THREADS",
)
_DISTRIBUTIONS = (
    "ttt4as_fast",
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-image",
    "torch",
    "timm",
    "faiss-cpu",
    "anomalib",
    "opencv-python",
    "threadpoolctl",
)
_MEASURING = ("benchmarks/*.py",)  # from the root of a checkout
_WITH_AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")  # of OpenBLAS's kernels
BUSY = 0.1  # share of the processors used by others from which timings are not to be trusted

_limits: list[Any] = []  # threadpoolctl's limits last as long as their objects


class ThreadsError(RuntimeError):
    """A library would not run with the number of threads that the others run with: no comparison is possible."""


def pin(threads: int) -> dict[str, int]:
    """Give every library that takes part the same number of threads, and read back that they have it.

    Parameters
    ----------
    threads : int
        From 1 to the processors this process may use.

    Returns
    -------
    dict
        Library -> threads, as `thread_counts` reads them.

    Raises
    ------
    ValueError
        More threads than processors.
    ThreadsError
        A library kept another number.
    """
    threads = check_int(threads, "threads", 1, processors())
    for name in _VARIABLES:  # for what is loaded later, and for child processes
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)
    core = _core()
    if core is not None:
        core.set_num_threads(threads)
    for module in ("faiss", "cv2"):
        _load(module)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        pass
    else:
        import sklearn.utils  # noqa: F401 - brings an OpenMP runtime of its own, which must be there to be limited

        _limits.append(threadpool_limits(threads))
        torch.set_num_threads(threads)
    found = thread_counts()
    other = {name: count for name, count in found.items() if count != threads}
    if other:
        raise ThreadsError(f"expected {threads} threads everywhere, got {other}")
    return found


def thread_counts() -> dict[str, int]:
    """Threads that each loaded library would use now; a BLAS with the processor whose kernels it has chosen."""
    import torch

    counts = {"torch": torch.get_num_threads()}
    core = _core()
    if core is not None:
        counts["ttt4as core"] = core.max_threads()
    if "faiss" in sys.modules:
        counts["faiss"] = sys.modules["faiss"].omp_get_max_threads()
    if "cv2" in sys.modules:
        counts["opencv"] = sys.modules["cv2"].getNumThreads()
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return counts
    for pool in threadpool_info():
        file, kernels = Path(pool["filepath"]).name.split(".")[0], pool.get("architecture")
        counts[f"{pool['internal_api']} ({file}{f', {kernels}' if kernels else ''})"] = pool["num_threads"]
    return counts


def outdated(counts: Iterable[str], isa: str | None) -> list[str]:
    """Which of `thread_counts` is an OpenBLAS with kernels older than a processor with AVX-512: a peer below its best.

    Parameters
    ----------
    counts : iterable of str
        The names.
    isa : str, optional
        The processor's instruction set, as the C++ core names it; None: unknown.
    """
    if isa not in ("avx512", "amx"):
        return []
    blas = (name for name in counts if name.startswith("openblas (") and ", " in name)
    return [name for name in blas if not name.endswith(tuple(f", {kernels})" for kernels in _WITH_AVX512))]


def instruction_set() -> str | None:
    """What the C++ core runs with; None without one."""
    return getattr(_core(), "isa", lambda: None)()


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Watch:
    """What other processes take of the processors from now on: a run is watched whole, not only as it begins."""

    def __init__(self) -> None:
        self._before = self._counts()

    def load_of_others(self) -> float | None:
        """Their share since then, in [0, 1]; None where it cannot be told."""
        now = self._counts()
        if self._before is None or now is None:
            return None
        spent, busy, own = (b - a for a, b in zip(self._before, now, strict=True))
        return min(max((busy - own) / max(spent, 1e-3) / (os.cpu_count() or 1), 0.0), 1.0)

    @staticmethod
    def _counts() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all processors' work, of this process and the children that have ended."""
        try:
            busy = _busy_ticks() / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        return time.perf_counter(), busy, sum(os.times()[:4])


def load_of_others(seconds: float = 0.3) -> float | None:
    """Share of the processors that other processes used during `seconds`, in [0, 1]; None where it cannot be told."""
    watch = Watch()
    time.sleep(seconds)
    return watch.load_of_others()


def _busy_ticks() -> int:
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return user + nice + system + irq + softirq


def describe(threads: dict[str, int], watch: Watch) -> dict[str, Any]:
    """What a result file says of the machine, how busy others kept it since `watch`, the versions and the commit."""
    busy = watch.load_of_others()
    return {
        "machine": {
            "cpu": processor(),
            "processors": processors(),
            "memory_gib": _memory_gib(),
            "system": platform.system(),
            "architecture": platform.machine(),
            "instruction_set": instruction_set(),
        },
        "threads": threads,
        "load_of_others": None if busy is None else round(busy, 3),
        "versions": versions(),
        **origin(),
    }


def versions() -> dict[str, str]:
    """Python's and the libraries' versions; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def unchanged_since(commit: str) -> bool:
    """Whether what is measured, and how, is what it was at a commit; False outside a checkout."""
    try:
        git(checkout(), "diff", "--quiet", commit, "--", *MEASURED, *_MEASURING)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _core() -> Any:
    from ttt4as_fast.kernels.dispatch import native_core

    core = native_core()
    return None if isinstance(core, str) else core


def _load(module: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ImportError:
        pass  # a peer that is absent is named by peers.py


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
