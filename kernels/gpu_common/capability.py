"""Whether Triton and CuPy can really serve a device: each is tried on a tiny kernel, an import proves nothing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def triton_unavailable(device: str) -> str | None:
    """Why Triton kernels cannot serve tensors on `device`; None if they can.

    Host tensors are served only where Triton interprets its kernels (``TRITON_INTERPRET=1``), which is for debugging.
    """
    if device == "cpu":
        return None if interpreting() else "it takes CUDA tensors, these arrays are on the host"
    reason = no_cuda()
    return reason if reason is not None else _probe_triton(_current())


def cuda_source_unavailable(device: str) -> str | None:
    """Why CUDA C++ kernels (and Triton's beside them) cannot serve tensors on `device`; None if they can."""
    from . import cuda

    return triton_unavailable(device) or cuda.unavailable(device)


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on the host."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def no_cuda() -> str | None:
    """Why there is no CUDA device to use; None if there is one."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no usable CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0 or later, this device has {major}.{minor}"


def not_while_capturing() -> None:
    """Raise where a CUDA graph is being captured: a probe waits for the device, and its failure would be remembered.

    Raises
    ------
    RuntimeError
        The first call of an operation on this device came inside a capture.
    """
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call the operation once before capturing it in a CUDA graph: its backend is tried then")


def reason_of(error: Exception, library: str) -> str:
    """What is remembered of a kernel that failed where it was tried.

    Raises
    ------
    torch.OutOfMemoryError, RuntimeError
        Memory ran out, or another thread captures a CUDA graph, in whose mode nothing else may wait for the device.
        Either may pass: that is not remembered.
    """
    import torch

    said = f"{library} cannot run a kernel here ({type(error).__name__}: {error})"
    if "out of memory" in str(error).lower():  # torch, Triton and the driver under CuPy each raise errors of their own
        raise torch.OutOfMemoryError(said) from error
    if "capturing" in str(error).lower():  # the driver: "not permitted when stream is", "depend on a ... stream"
        raise RuntimeError(said) from error
    return said


def _current() -> int:
    import torch

    return torch.cuda.current_device()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _probe_triton(device: int) -> str | None:
    """Why Triton does not run on the current device, number `device` (the key of the cache); None if it does."""
    try:
        from . import probe
    except ImportError as error:
        return f"triton is not usable ({error})"
    not_while_capturing()
    return probe.run()
