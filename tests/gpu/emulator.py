"""Runs the package's CUDA C++ kernels on the host: the very same text, built by a C++ compiler, thread by thread.

Every thread of a block is a fiber. A fiber runs until it meets a barrier, a shuffle or a ballot; the block goes on when
all have met the same one, so a divergent barrier is an error, and the order in which fibers run (forwards, backwards)
is a parameter: a result that depends on it reveals a race. Shared memory starts as NaN.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from ttt4as_fast.kernels.gpu_common.cuda import Unit

SHIM = Path(__file__).with_name("emulator.hpp")
HOPPER = SHIM.with_name("hopper.hpp")
"""What a kernel for compute capability 9.0 alone needs, too."""
THREADS = 32
"""Threads of a block unless a test says otherwise: fewer are faster, and loops run longer."""


def compiler() -> str | None:
    """A host C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")


def kernels_of(text: str) -> list[str]:
    """The names of the kernels in a CUDA source."""
    names = re.findall(r"^extern \"C\" __global__ void (?:__launch_bounds__\([^)]*\))?\s*(\w+)\(", text, re.MULTILINE)
    names += re.findall(r"^\w+_KERNEL\((\w+), ", text, re.MULTILINE)  # those that a macro spells out
    assert names, text[:200]
    return names


def for_hopper(unit: Unit) -> bool:
    """Whether `unit` is for compute capability 9.0 alone."""
    return "-arch=sm_90a" in unit.options


def text_of(unit: Unit, shim: Path, end: str) -> str:
    """A C++ unit of the kernels of `unit`: `shim` stands in for CUDA, `end` is what follows."""
    from ttt4as_fast.kernels.gpu_common import cuda

    shims = "".join(f'#include "{path}"\n' for path in ((shim, HOPPER) if for_hopper(unit) else (shim,)))
    return f"{shims}{unit.prelude}{cuda.source(unit.file)}\n{end}\n"


def tensor_map(x: torch.Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> np.ndarray:
    """`driver.tensor_map` for the host: the ``TensorMap`` of hopper.hpp."""
    found = np.zeros(1, dtype=TENSOR_MAP)
    rank = len(shape)
    found["address"], found["rank"] = x.data_ptr(), rank
    found["dims"][0, :rank], found["strides"][0, 1:rank], found["box"][0, :rank] = shape, strides, box
    return found


TENSOR_MAP = np.dtype(
    [
        ("address", np.int64),
        ("dims", np.int64, 5),
        ("strides", np.int64, 5),
        ("box", np.int32, 5),
        ("rank", np.int32),
    ]
)


@functools.cache
def library(unit: Unit) -> ctypes.CDLL:
    """The kernels of `unit`, built for the host; ``host_NAME`` launches kernel NAME."""
    from ttt4as_fast.kernels.gpu_common import cuda

    launchers = "\n".join(f"HOST_LAUNCHER({name})" for name in kernels_of(cuda.source(unit.file)))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    return ctypes.CDLL(str(build(text_of(unit, SHIM, launchers), Path(unit.file).stem, ".so", flags)))


def build(text: str, name: str, suffix: str, flags: list[str]) -> Path:
    """What the compiler makes of a C++ unit that includes a shim; made once for each text."""
    folder = Path(tempfile.gettempdir()) / f"ttt4as-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    everything = text + " ".join(flags) + "".join(path.read_text() for path in sorted(SHIM.parent.glob("*.hpp")))
    built = folder / f"{name}-{hashlib.sha256(everything.encode()).hexdigest()[:16]}{suffix}"
    if not built.exists():
        unit = folder / f"{built.stem}-{os.getpid()}.cpp"
        unit.write_text(text)
        partial = unit.with_suffix(".partial")
        subprocess.run([str(compiler()), *flags, str(unit), "-o", str(partial)], check=True)
        unit.unlink()
        partial.replace(built)
    return built


class Emulator:
    """A launcher for `cuda.LAUNCHERS`; `threads` stands in for the block size that a GPU would use."""

    def __init__(self, threads: int = THREADS, backwards: bool = False) -> None:
        self.threads = threads
        self.backwards = backwards

    def threads_of(self, unit: Unit, threads: int) -> int:
        """Of a block that would have `threads` on a GPU; what is for one architecture alone has them all."""
        return threads if for_hopper(unit) else min(threads, self.threads)

    def __call__(self, unit: Unit, kernel: str, blocks: int, threads: int, shared_bytes: int, arguments: tuple) -> None:
        from ttt4as_fast.kernels.gpu_common import cuda

        values = cuda.addresses(arguments)
        holders = [np.array([value]) for value in values]
        pointers = (ctypes.c_void_p * len(holders))(*(holder.ctypes.data for holder in holders))
        launcher = getattr(library(unit), f"host_{kernel}")
        launcher.restype = ctypes.c_int
        code = launcher(
            ctypes.c_int(blocks),
            ctypes.c_int(self.threads_of(unit, threads)),
            ctypes.c_longlong(shared_bytes),
            ctypes.c_int(self.backwards),
            ctypes.c_int(len(holders)),
            pointers,
        )
        assert code == 0, {1: "threads met different barriers", 2: "wrong number of arguments"}[code]
