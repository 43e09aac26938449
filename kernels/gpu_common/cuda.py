"""Launches the package's CUDA C++ kernels on torch's current stream: CuPy compiles them (NVRTC) and launches them.

Tensors are passed as bare addresses, which costs nothing and needs no stream of CuPy's own; the launch joins torch's
current stream, so a CUDA graph captures it. A test may serve another device type by adding a launcher to `LAUNCHERS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .capability import not_while_capturing, reason_of

_PACKAGE = Path(__file__).resolve().parents[1]
OPTIONS = ("--std=c++17",)
THREADS = 1024
"""Threads of a block where one block has a whole map to itself."""


class Unit(NamedTuple):
    """What is compiled: a ``.cu`` file below the package, the text before it, and options of its own."""

    file: str
    prelude: str = ""
    options: tuple[str, ...] = ()


Launcher = Callable[[Unit, str, int, int, int, tuple], None]
"""``launcher(unit, kernel, blocks, threads, shared_bytes, arguments)``."""


@functools.cache
def source(file: str) -> str:
    """The text of a ``.cu`` file of the package with its own headers pasted in (CuPy's disk cache hashes the text)."""
    seen: set[str] = set()

    def paste(path: Path) -> str:
        def header(match: re.Match) -> str:
            name = match.group(1)
            if name in seen:
                return ""
            seen.add(name)
            return paste(_PACKAGE / "gpu_common" / name)

        text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'#include "(\w+\.cuh)"\n', header, text)

    return paste(_PACKAGE / file)


def unavailable(device: str) -> str | None:
    """Why CUDA C++ kernels cannot run on `device`; None if they can."""
    if device not in LAUNCHERS:
        return "its CUDA C++ kernels need a CUDA device"
    return _probe(torch.cuda.current_device()) if device == "cuda" else None


def launch(
    device: torch.device,
    file: str,
    kernel: str,
    blocks: int,
    threads: int,
    *arguments: Any,
    shared_bytes: int = 0,
    prelude: str = "",
    options: tuple[str, ...] = (),
) -> None:
    """Launch `kernel` of `file` over `blocks` blocks of `threads` threads on the current stream of `device`.

    Parameters
    ----------
    device : torch.device
    file : str
        Path below the package, such as ``"peaks/peaks.cu"``.
    kernel : str
    blocks, threads : int
        One-dimensional grid and block; no blocks, no launch.
    *arguments
        In the kernel's order and of exactly its types: contiguous tensors (or None) for pointers, ``np.int32`` for int,
        ``np.float64`` for double, an array for a structure.
    shared_bytes : int
        Dynamic shared memory of a block.
    prelude : str
        Text before that of the file: definitions.
    options : tuple of str
        The compiler's, beside `OPTIONS`.
    """
    if blocks:
        LAUNCHERS[device.type](Unit(file, prelude, options), kernel, blocks, threads, shared_bytes, arguments)


def addresses(arguments: tuple) -> tuple:
    """`arguments` with every tensor as its address, None as the null pointer; the others must be NumPy values."""
    converted = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous()
            argument = np.uint64(argument.data_ptr())
        elif argument is None:
            argument = np.uint64(0)
        assert isinstance(argument, np.generic | np.ndarray), f"expected a tensor or a NumPy value, got {argument!r}"
        converted.append(argument)
    return tuple(converted)


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return 96 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _cupy_launch(unit: Unit, kernel: str, blocks: int, threads: int, shared_bytes: int, arguments: tuple) -> None:
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(device):
        function = _cupy_kernel(unit, kernel, device)
        with _cupy_stream(device.index, torch.cuda.current_stream(device).cuda_stream):
            function((blocks,), (threads,), addresses(arguments), shared_mem=shared_bytes)


@functools.cache
def _cupy_module(unit: Unit) -> Any:
    import cupy

    return cupy.RawModule(code=unit.prelude + source(unit.file), options=OPTIONS + unit.options, backend="nvrtc")


@functools.cache
def _cupy_kernel(unit: Unit, kernel: str, device: torch.device) -> Any:
    import cupy

    cupy.cuda.Device(device.index).use()  # binds the device's context, which a thread that is new does not have yet
    function = _cupy_module(unit).get_function(kernel)
    # The bound belongs to the loaded function, which all launches share, whatever each asks for; and without it a
    # block has 48 KB less the static part. So once, to all that there is.
    function.max_dynamic_shared_size_bytes = shared_memory_limit(device) - function.shared_size_bytes
    return function


class _Stream:
    """A CUDA stream by its address, as CuPy takes it from other libraries."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


@functools.lru_cache(maxsize=64)
def _cupy_stream(device_index: int, address: int) -> Any:
    """CuPy's view of a stream of the current device; every device has a default stream at address 0."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Stream(address))
    return cupy.cuda.ExternalStream(address)  # CuPy before 14


@functools.cache
def _probe(device: int) -> str | None:
    """Why CuPy does not run on the current device, number `device` (the key of the cache); None if it does."""
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"CuPy is not installed ({error}); pip install 'ttt4as_fast[gpu]'"
    not_while_capturing()
    try:
        mask = torch.zeros((1, 3, 3), dtype=torch.bool, device="cuda")
        mask[0, 1, 1] = True
        out = torch.zeros_like(mask)
        scratch = torch.empty(6, dtype=torch.int32, device="cuda")
        scalars = (np.int32(3), np.int32(3), np.int32(1))
        _cupy_launch(Unit("peaks/peaks.cu"), "dilate", 1, 32, 0, (mask, out, scratch, *scalars))
        return None if bool(out.all()) else "a CuPy kernel ran here with a wrong result"
    except Exception as error:  # whatever NVRTC, the driver or CuPy has to say
        return reason_of(error, "CuPy")


LAUNCHERS: dict[str, Launcher] = {"cuda": _cupy_launch}
"""Device type -> launcher."""
