"""The compiled core, and how many threads it may use: its own limit, and torch's where torch is loaded.

The core's limit is what threadpoolctl set, else ``TTT4AS_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the processors
of this process; its pool is one for the whole process (see kernels/cpp/include/ttt4as/threads.hpp).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from . import arrays
from .dispatch import BackendWarning, native_core

_ISAS = ("generic", "avx2", "avx512", "amx")


def why_not() -> str | None:
    """Why the core cannot be used; None if it can."""
    found = native_core()
    return found if isinstance(found, str) else None


@functools.cache
def core() -> ModuleType:
    """The core; RuntimeError where it is not built."""
    found = native_core()
    if isinstance(found, str):
        raise RuntimeError(found)
    check_environment()
    register_with_threadpoolctl()
    return found


def check_environment() -> None:
    """Warn of environment variables whose value the core ignores."""
    number, isa = os.environ.get("TTT4AS_NUM_THREADS", ""), os.environ.get("TTT4AS_ISA", "")
    if number and not (number.isdecimal() and int(number) >= 1):
        _warn_ignored(f"TTT4AS_NUM_THREADS: expected an integer >= 1, got {number!r}")
    if isa and isa not in _ISAS:
        _warn_ignored(f"TTT4AS_ISA: expected one of {', '.join(map(repr, _ISAS))}, got {isa!r}")


def _warn_ignored(message: str) -> None:
    warnings.warn(f"{message}; the variable is ignored", BackendWarning, stacklevel=4)


def threads() -> int:
    """Threads for one call: the core's limit, and no more than ``torch.set_num_threads`` where torch is loaded."""
    return within_torch(core().max_threads())


def within_torch(most: int) -> int:
    """At most as many threads as torch may use, where it is loaded."""
    torch = arrays.imported_torch()
    return most if torch is None else min(most, torch.get_num_threads())


def register_with_threadpoolctl() -> None:
    """Let ``threadpoolctl.threadpool_limits`` and ``threadpool_info`` see the core, where threadpoolctl is installed.

    Called when the core is first used, so that scikit-learn and joblib, which set limits through it, reach the core.
    """
    try:
        import threadpoolctl
    except ImportError:
        return

    class CoreController(threadpoolctl.LibController):  # type: ignore[misc]
        """The core's pool; counted as an OpenMP runtime, because it heeds the same limits."""

        user_api = "openmp"
        internal_api = "ttt4as"
        filename_prefixes = ("_core",)
        check_symbols = ("ttt4as_get_num_threads", "ttt4as_set_num_threads")

        def get_num_threads(self) -> int:
            return self.dynlib.ttt4as_get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.ttt4as_set_num_threads(num_threads)

        def get_version(self) -> None:
            return None

    threadpoolctl.register(CoreController)


def segment_batch(
    function: Callable[..., Any],
    anomaly_map: np.ndarray,
    features: np.ndarray,
    skip: np.ndarray | None,
    *,
    max_iter: int,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One of the core's fused methods over a batch: mask, decision, labels and codes, as the operations return them."""
    if skip is not None:  # images that are passed over are checked too
        arrays.check_finite(anomaly_map, "anomaly_map")
        arrays.check_finite(features, "features")
    dtype = np.result_type(anomaly_map.dtype, features.dtype, np.float32)
    try:
        mask, decision, labels, codes, _ = function(
            anomaly_map.astype(dtype, copy=False),
            features.astype(dtype, copy=False),
            max_iter=min(max_iter, np.iinfo(np.int32).max),
            skip=skip,
            threads=threads(),
            **options,
        )
    except ValueError:
        arrays.check_finite(anomaly_map, "anomaly_map")  # says where
        arrays.check_finite(features, "features")
        raise
    return mask, decision, labels, codes


def rows(x: np.ndarray) -> np.ndarray:
    """`x` (N, D) as float32 or float64, aligned, with adjacent columns; `x` itself where it is that already.

    float64 stays float64, everything else becomes float32, which holds it exactly.
    """
    dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    regular = x.strides[0] % dtype.itemsize == 0 and x.strides[1] == dtype.itemsize
    if x.dtype == dtype and x.flags.aligned and regular:
        return x
    return np.require(x, dtype, ("C", "A"))
