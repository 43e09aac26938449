"""The operations that test-time training and PatchCore spend their time in, each with several backends.

How to read this package
------------------------
One folder an operation, and every folder has the same doors::

    bilinear/  knn/  coreset/  peaks/  linear_svm/  segment/  segment_robust/
        __init__.py     the public function: docstring, validation, dispatch - no arithmetic
        reference.py    the plain statement of what it computes; every other file is held to it
        cpu.py          the compiled core (C++)
        gpu.py          Triton, CUDA C++ through CuPy, or both
                        (a further file is a further backend: numba.py, cuml.py)
    gpu_common/         what several gpu.py share: launching CUDA, CUDA graphs, capability, memory, the SVM solver
    cpp/                the C++ core that every cpu.py calls; also a library of its own

`segment` is the whole method in one call; the others are its parts and PatchCore's::

    features --knn--> anomaly map --peaks--> pseudo-labels --bilinear--> samples --linear_svm--> w, b --> mask
                 ^                                                                                   |
              coreset                                   `segment` fuses everything right of the map -+

How a backend is chosen
-----------------------
1. the ``backend`` argument, unless it is ``"auto"``;
2. the environment variable ``TTT4AS_BACKEND``, if set;
3. else the first usable one in the operation's order of speed for the device of its first argument; for a CUDA tensor
   without a usable GPU backend that is a trip to the host and back.

A backend that was named raises RuntimeError if it cannot serve; the automatic choice falls back and warns once where
something that could be installed is missing. `backends` says what is usable here and why the rest is not. Usable means
tried: a library that imports but finds no device is not usable.

Arrays may be NumPy's or torch's. Results come back as the kind, and on the device, of the first argument. Tensors go
through the operators ``torch.ops.ttt4as.*``, so that `torch.compile` and `torch.export` see one node a call; not those
of `fit_linear_svm`, which returns numbers of Python too, and of a `KnnIndex`, which is an object of Python.
Nothing here imports torch, numba, triton or cupy before it is needed, and nothing imports from the rest of ttt4as_fast.
"""

from __future__ import annotations

from . import bilinear, coreset, knn, linear_svm, peaks
from . import segment as _segment
from . import segment_robust as _segment_robust
from .bilinear import bilinear_sample, bilinear_upsample
from .coreset import k_center_greedy
from .dispatch import BackendWarning, Operation
from .knn import KnnIndex, nearest_neighbors
from .linear_svm import LinearSVMResult, fit_linear_svm
from .peaks import dilate, local_maxima
from .segment import Segmentation

__all__ = [
    "BackendWarning",
    "KnnIndex",
    "LinearSVMResult",
    "Segmentation",
    "backends",
    "bilinear_sample",
    "bilinear_upsample",
    "dilate",
    "fit_linear_svm",
    "k_center_greedy",
    "local_maxima",
    "nearest_neighbors",
    "segment",
    "segment_robust",
]

OPERATIONS: tuple[Operation, ...] = tuple(
    module.OPERATION for module in (bilinear, knn, coreset, peaks, linear_svm, _segment, _segment_robust)
)

segment = _segment.segment
segment_robust = _segment_robust.segment_robust


def backends(device: str = "cpu") -> dict[str, dict[str, str | None]]:
    """What can serve each operation here, fastest first, and why not what cannot.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where the arguments live: NumPy arrays and host tensors are ``"cpu"``, ``"cuda"`` is torch's current device.

    Returns
    -------
    dict
        ``{operation: {backend: reason}}`` with reason None for a usable backend. The first usable one of an operation
        is what ``backend="auto"`` takes.

    Raises
    ------
    ValueError
        `device` is neither ``"cpu"`` nor ``"cuda"``.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    return {
        operation.name: {name: _why_not(operation, name, device) for name in operation.preference(device)}
        for operation in OPERATIONS
    }


def _why_not(operation: Operation, name: str, device: str) -> str | None:
    try:
        return operation.why_not(name, device)
    except RuntimeError as error:  # it could not be tried now
        return str(error)
