"""What this installation is and can do, for ``ttt4as info``; versions and commit, which results are recorded with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

ENVIRONMENT_VARIABLES = {
    "TTT4AS_BACKEND": "the backend of every operation; those that do not have it raise",
    "TTT4AS_NUM_THREADS": "threads of the C++ core, 1024 at most (else OMP_NUM_THREADS, else all it may use)",
    "TTT4AS_ISA": "the most that the C++ core may use: generic, avx2, avx512 or amx",
    "TTT4AS_CUDA_GRAPHS": "0: kernels on a GPU are launched one by one, without CUDA graphs",
    "TTT4AS_DEBUG": "commands show tracebacks, unless it is 0",
    "OMP_NUM_THREADS": "threads of torch and of the C++ core",
}
MEASURED = ("kernels", "ttt4as_fast", "CMakeLists.txt")
"""Paths of a checkout, from its root, that results depend on."""


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that the results rest on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("ttt4as_fast", "torch", "timm", "numpy", "scipy", "scikit-learn", "scikit-image", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def origin() -> dict[str, str | None]:
    """Of which commit a result is, and of which day."""
    return {"commit": commit(), "measured": time.strftime("%Y-%m-%d", time.gmtime())}


def commit() -> str | None:
    """The checkout's commit, with ``+`` if what is measured differs from it; None outside a checkout."""
    try:
        root = checkout()
        head = git(root, "rev-parse", "HEAD")
        changed = git(root, "status", "--porcelain", "--", *MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head[:12] + ("+" if changed else "")


def checkout(folder: Path | None = None) -> Path:
    """The root of the checkout that a folder lies in, by default this copy's, which may be installed in it.

    Raises
    ------
    OSError
        There is none, or no git.
    """
    try:
        root = Path(git(folder or Path(__file__).resolve().parent, "rev-parse", "--show-toplevel"))
    except subprocess.CalledProcessError as error:
        raise FileNotFoundError(f"checkout: {error.stderr.strip()}") from None
    if not (root / "kernels" / "cpp").is_dir():  # an environment may lie in a checkout of something else
        raise FileNotFoundError(f"checkout: {str(root)!r} is not this package's")
    return root


def git(root: Path, *arguments: str) -> str:
    """What git prints of a checkout."""
    command = ["git", "-C", str(root), *arguments]
    # A folder may have a name that the locale cannot decode.
    names = sys.getfilesystemencoding()
    done = subprocess.run(command, check=True, capture_output=True, encoding=names, errors="surrogateescape")
    return done.stdout.strip()


def describe() -> dict[str, Any]:
    """What this installation is and can do: versions, devices, backends and why not, threads, environment variables."""
    import platform

    from . import kernels
    from .kernels.dispatch import native_core

    core = native_core()
    threads, cuda = _of_torch()
    backends = {device: kernels.backends(device) for device in ("cpu", "cuda")}
    environment: dict[str, dict[str, str | None]] = {
        name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in ENVIRONMENT_VARIABLES.items()
    }
    environment["TTT4AS_BACKEND"]["remark"] = _remark(os.environ.get("TTT4AS_BACKEND"), backends["cpu"])
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "torch_threads": threads,
        "core": core if isinstance(core, str) else core.__version__,
        "cuda": cuda,
        "backends": backends,
        "environment": environment,
    }


def _of_torch() -> tuple[int | None, list[str] | None]:
    """torch's threads, and the GPUs that it can use or None; neither without torch, which NumPy arrays do not need."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # it is there, and broken
            raise
        return None, None
    usable = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if usable else None
    return torch.get_num_threads(), devices


def _remark(backend: str | None, operations: dict[str, dict[str, str | None]]) -> str | None:
    """Which operations raise under this value of TTT4AS_BACKEND, in words; None if all have such a backend."""
    lacking = [name for name, backends in operations.items() if backend not in backends]
    if backend in (None, "", "auto") or not lacking:
        return None
    return f"{'all' if len(lacking) == len(operations) else ', '.join(lacking)} raise: no backend {backend!r}"


def tables(found: dict[str, Any]) -> list[Table]:
    """What `describe` has found, for the screen."""
    from rich.table import Table

    general = Table("", "", title="Installation", show_header=False)
    for name, value in found["versions"].items():
        general.add_row(name, value)
    for name in ("system", "processors", "torch_threads", "core"):
        general.add_row(name.replace("_", " "), "-" if found[name] is None else str(found[name]))
    general.add_row("CUDA devices", ", ".join(found["cuda"]) if found["cuda"] else "none")
    made = [general]
    for device, operations in found["backends"].items():
        made.append(
            Table("operation", "backend", "", title=f"Backends for arrays on {device}; 'auto' takes the first usable")
        )
        for operation, backends in operations.items():
            for i, (name, reason) in enumerate(backends.items()):
                made[-1].add_row("" if i else operation, name, "usable" if reason is None else f"not usable: {reason}")
    variables = Table("variable", "value", "meaning", title="Environment")
    for name, entry in found["environment"].items():
        remark = f" [{entry['remark']}]" if entry.get("remark") else ""
        variables.add_row(name, entry["value"] or "not set", entry["meaning"] + remark)
    return [*made, variables]
