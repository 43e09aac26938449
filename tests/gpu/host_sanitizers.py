"""Sanitizers over the package's CUDA C++ kernels without a GPU: the very same text, a host thread for each thread.

A barrier orders what is before it and what is after, a shuffle and a ballot order nothing, as on a device. To
ThreadSanitizer two accesses to one address, one of them a write, that no barrier orders are a race, in shared memory as
in global memory, whether or not it shows in a result. AddressSanitizer sees an access past a tensor or past the shared
memory that was asked for, UndefinedBehaviorSanitizer an overflow or a misaligned address.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import emulator

if TYPE_CHECKING:
    from ttt4as_fast.kernels.gpu_common.cuda import Unit

SHIM = Path(__file__).with_name("host_threads.hpp")
FLAGS = ("-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas")
SANITIZERS = {"races": ("-fsanitize=thread",), "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")}
"""What is looked for -> the compiler's options."""


class SanitizerError(AssertionError):
    """What a sanitizer has to say of a kernel."""


@functools.cache
def unavailable(kind: str) -> str | None:
    """Why no program can run under the sanitizers of `kind` here; None if one just did."""
    if emulator.compiler() is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "empty.cpp"
        unit.write_text("int main() { return 0; }\n")
        command = [str(emulator.compiler()), *FLAGS, *SANITIZERS[kind], str(unit), "-o", f"{folder}/empty"]
        for step in (command, [f"{folder}/empty"]):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                return f"no {SANITIZERS[kind][0]}: {done.stderr.strip()[-300:]}"
    return None


@functools.cache
def program(unit: Unit, kind: str) -> Path:
    """A program that runs a kernel of `unit`: the first argument names it, the second a file with its arguments."""
    from ttt4as_fast.kernels.gpu_common import cuda

    runs = "".join(
        f'    if (!std::strcmp(arguments[1], "{name}")) return host::run({name}, arguments[2]);\n'
        for name in emulator.kernels_of(cuda.source(unit.file))
    )
    main = f"int main(int, char** arguments) {{\n{runs}    return 2;\n}}"
    whole = emulator.text_of(unit, SHIM, main)
    return emulator.build(whole, f"{Path(unit.file).stem}-{kind}", "", [*FLAGS, *SANITIZERS[kind]])


def described(tensor_map: np.ndarray) -> bytes:
    """The memory that a tensor map of `emulator.tensor_map` describes."""
    (found,) = tensor_map
    rank = found["rank"]
    steps = (found["dims"][1:rank] - 1) * found["strides"][1:rank]
    return ctypes.string_at(int(found["address"]), int(2 * found["dims"][0] + steps.sum()))


class Sanitizer(emulator.Emulator):
    """A launcher for `cuda.LAUNCHERS` that runs each launch under a sanitizer before it computes its results."""

    def __init__(self, kind: str, threads: int = 64) -> None:
        super().__init__(threads)
        self.kind = kind

    def __call__(self, unit: Unit, kernel: str, blocks: int, threads: int, shared_bytes: int, arguments: tuple) -> None:
        sizes = (blocks, self.threads_of(unit, threads), shared_bytes, len(arguments))
        parts = [np.array(sizes, np.int64).tobytes()]

        def add(what: int, content: bytes) -> None:
            parts.extend((np.array([what, len(content)], np.int64).tobytes(), content))

        for argument in arguments:
            if argument is None:
                add(0, b"")
                continue
            if isinstance(argument, np.ndarray) and argument.dtype == emulator.TENSOR_MAP:
                add(3, described(argument))
            add(1 if isinstance(argument, torch.Tensor) else 2, np.asarray(argument).tobytes())
        with tempfile.NamedTemporaryFile() as written:
            written.write(b"".join(parts))
            written.flush()
            command = [str(program(unit, self.kind)), kernel, written.name]
            options = {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=66:detect_leaks=0"}
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | options)
        if done.returncode:
            raise SanitizerError(f"{kernel}: status {done.returncode}: {done.stderr[:6000]}")
        super().__call__(unit, kernel, blocks, threads, shared_bytes, arguments)
