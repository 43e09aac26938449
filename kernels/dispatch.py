"""Which backend serves a call: the argument, else the environment variable TTT4AS_BACKEND, else the fastest usable.

An operation is a folder; its backends are the files in it. Each backend file defines

- ``unavailable(device) -> str | None``: why it cannot serve arrays on that device type, None if it can. It compiles or
  calls something: an import that succeeds proves nothing. It tests the current device, and the answer is kept for each
  device. A failure that may be temporary, such as a lack of memory, is raised and not kept;
- ``ARRAYS``: ``"numpy"`` if its functions take host arrays, ``"torch"`` if they take tensors;
- ``TAKES_BFLOAT16 = True``, if its functions take host arrays of `arrays.BFLOAT16`; else bfloat16 becomes float32;
- ``CHECKS_FINITE = True``, if its functions find non-finite values themselves and raise ValueError: callers then do not
  check first;
- functions with the names and results of those in ``reference.py``.

Automatic choice falls back, with one warning when something that could be installed is missing. A named backend raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import arrays

if TYPE_CHECKING:
    from .arrays import Array

ENVIRONMENT_VARIABLE = "TTT4AS_BACKEND"


class BackendWarning(UserWarning):
    """A faster backend exists but cannot be used here; the message says why. Shown once for each."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation and its backends, fastest first, for host arrays and for CUDA tensors."""

    name: str
    host: tuple[str, ...]
    cuda: tuple[str, ...]
    finite: bool = True  # whether its inputs have to be

    @functools.cached_property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that exist, ``reference`` last."""
        names = dict.fromkeys((*self.cuda, *self.host))
        return tuple(sorted(names, key=lambda name: name == "reference"))

    def preference(self, device: str) -> tuple[str, ...]:
        """The backends that automatic choice tries for arrays on `device`, in that order."""
        return self.cuda if device == "cuda" else self.host

    def module(self, name: str) -> ModuleType:
        """The backend's file, imported: in `sys.modules` it also is while another thread still imports it."""
        return importlib.import_module(f"{__package__}.{self.name}.{name}")

    def why_not(self, name: str, device: str) -> str | None:
        """Why backend `name` cannot serve arrays on `device` here, the current one of its type; None if it can."""
        return _why_not(self, name, device, arrays.current_device(device))

    def check_backend(self, backend: Any, source: str = "backend") -> None:
        """Raise ValueError unless `backend`, which `source` gave, is ``"auto"`` or one that exists."""
        if not isinstance(backend, str) or (backend != "auto" and backend not in self.backends):
            takes = ", ".join(map(repr, ("auto", *self.backends)))
            raise ValueError(f"{source}: expected one of {takes} for {self.name}, got {backend!r}")

    def resolve(self, backend: str, device: str) -> ModuleType:
        """The module that serves a call with this `backend` argument and arrays on the current `device`.

        Raises
        ------
        ValueError
            The backend is unknown to this operation.
        RuntimeError
            The backend was named, by argument or environment variable, and cannot serve; a backend cannot be tried
            now (no memory is left, or a CUDA graph is captured).
        """
        source = "backend"
        self.check_backend(backend)
        if backend == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
            backend, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
            self.check_backend(backend, source)
        if backend != "auto":
            reason = self.why_not(backend, device)
            if reason:
                raise RuntimeError(f"{source}={backend!r} cannot serve {self.name} on {device}: {reason}")
            return self.module(backend)
        for place, name in enumerate(self.preference(device)):
            reason = self.why_not(name, device)
            if reason is None:
                module = self.module(name)
                if device != "cpu" and place == 0 and module.ARRAYS == "numpy":
                    warn_once(f"{self.name}: has no backend for {device}; tensors go to the host and back")
                return module
            warn_once(f"{self.name}: backend {name!r} is not usable ({reason}); using a slower one")
        raise RuntimeError(f"backend: no backend of {self.name} can serve arrays on {device!r}")

    def run(self, function: str, inputs: dict[str, Array], backend: str, **options: Any) -> Any:
        """Call `function` of the chosen backend on `inputs` and return its result as the kind of the first of them.

        The function gets them by their order; their names are the caller's arguments, for errors. A backend of host
        arrays gets `inputs` and `options` as such.
        """
        template = next(iter(inputs.values()))
        with arrays.device_of(template):
            module = self.resolve(backend, arrays.device_type(template))
            if module.ARRAYS == "numpy":
                on_device = arrays.device_type(template) != "cpu"
                bfloat16 = getattr(module, "TAKES_BFLOAT16", False)
                inputs = {name: arrays.to_numpy(x, keep_bfloat16=bfloat16) for name, x in inputs.items()}
                options = {name: arrays.to_numpy(x) if arrays.is_tensor(x) else x for name, x in options.items()}
                for name, x in inputs.items() if on_device and self.finite else ():
                    if x.dtype.kind == "f":  # values on a device are checked nowhere before
                        arrays.check_finite(x, name)
            return arrays.like(getattr(module, function)(*inputs.values(), **options), template)


def checks_finite(module: ModuleType) -> bool:
    """Whether a backend finds non-finite values itself; the caller then says where, by `arrays.check_finite`."""
    return getattr(module, "CHECKS_FINITE", False)


@functools.cache
def _why_not(operation: Operation, name: str, device: str, current: int | None) -> str | None:
    try:
        return operation.module(name).unavailable(device)
    except ImportError as error:
        return str(error)


@functools.cache
def warn_once(message: str) -> None:
    """A `BackendWarning`, the first time that this process has the message."""
    warnings.warn(message, BackendWarning, stacklevel=5)


@functools.cache
def native_core() -> ModuleType | str:
    """The compiled C++ core, or why it is absent."""
    try:
        return importlib.import_module(f"{__package__}._core")
    except ImportError as error:
        return (
            f"the C++ core is not built ({error}); reinstalled with a C++17 compiler, TTT4AS_BUILD_CORE=1 and pip's "
            "--force-reinstall --no-cache-dir it is, or the reason is shown"
        )
