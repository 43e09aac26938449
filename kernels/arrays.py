"""NumPy and torch at the edge of a kernel: telling them apart, checking them, and converting without surprises.

torch is never imported here: an object can only be a tensor if its owner imported torch already.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = np.ndarray | torch.Tensor

_INT64_MAX = 2**63 - 1
_FLOATS = ("float16", "bfloat16", "float32", "float64")
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # NumPy has none: the bits, for the C++ core


def imported_torch() -> Any:
    """torch, if it is imported; None too while another thread imports it, when it lacks what is asked of it."""
    torch = sys.modules.get("torch")
    return None if getattr(getattr(torch, "__spec__", None), "_initializing", False) else torch


def is_tensor(x: Any) -> bool:
    """Whether `x` is a torch tensor."""
    torch = imported_torch()
    return torch is not None and isinstance(x, torch.Tensor)


def is_compiling() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing, which warns of cached functions."""
    torch = imported_torch()
    return torch is not None and torch.compiler.is_compiling()


def device_type(x: Array) -> str:
    """``"cpu"`` for NumPy arrays and host tensors, else the tensor's device type (``"cuda"``, ...)."""
    return x.device.type if is_tensor(x) else "cpu"  # type: ignore[union-attr]


def device_of(x: Array) -> contextlib.AbstractContextManager:
    """The device of `x` as the current one, on which Triton launches; nothing for what lies on the host."""
    if device_type(x) == "cpu":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device_of(x)


def current_device(kind: str) -> int | None:
    """Number of the current device of a type; None where there is but one."""
    if kind != "cuda":
        return None
    torch = imported_torch()
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


def dtype_name(x: Array) -> str:
    """The dtype as NumPy and torch both spell it: ``"float32"``, ``"bfloat16"``, ..."""
    if isinstance(x.dtype, np.dtype):
        return _numpy_name(x.dtype)
    return str(x.dtype).removeprefix("torch.")  # not cached: see `is_compiling`


@functools.cache
def _numpy_name(dtype: np.dtype) -> str:
    return str(dtype)


def as_float_array(x: Any, name: str, ndim: tuple[int, ...], *, meta: bool = False) -> Array:
    """`x` as a floating-point array or detached tensor with one of the ranks in `ndim` and no empty axis.

    Lists become arrays, and integers floats: float32, which holds 16 bits, else float64. Arrays get the byte order of
    the machine. Values are not read: see `check_finite`. `meta` as in `check_dense`.
    """
    check_dense(x, name, meta=meta)
    if not is_tensor(x):
        x = as_array(x, name)
        if x.dtype.kind in "iub":
            x = x.astype(np.float64 if x.dtype.itemsize > 2 else np.float32)
        elif not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
    else:
        if x.requires_grad:
            x = x.detach()
        x = x.resolve_neg()  # kernels read memory, which conj() leaves as it is; torch.compile cannot ask `is_neg`
        if not (x.is_floating_point() or x.is_complex()):
            x = x.double() if x.dtype.itemsize > 2 else x.float()
    if dtype_name(x) not in _FLOATS:
        raise TypeError(f"{name}: expected dtype {', '.join(_FLOATS)} or an integer, got {dtype_name(x)}")
    if x.ndim not in ndim:
        raise ValueError(f"{name}: expected {' or '.join(str(n) for n in ndim)} dimensions, got shape {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: expected no empty axis, got shape {tuple(x.shape)}")
    return x


def as_array(x: Any, name: str) -> np.ndarray:
    """`x` as `numpy.asarray` takes it, or TypeError: rows of different lengths make no array."""
    try:
        return np.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array or tensor, got {type(x).__name__} ({error})") from None


def check_dense(x: Any, name: str, *, meta: bool = False) -> None:
    """Raise TypeError for an array with masked values, or a sparse or nested tensor, ValueError for one without values.

    Those are tensors on the meta device. With `meta` they pass: torch runs operators on them to find the shapes of
    results.
    """
    if is_tensor(x):
        import torch

        if x.is_nested or x.layout is not torch.strided:
            kind = "a nested one" if x.is_nested else f"the layout {str(x.layout).removeprefix('torch.')}"
            raise TypeError(f"{name}: expected a dense tensor, got {kind}")
        if x.device.type == "meta" and not meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the device meta, which has none")
    elif type(x) is not np.ndarray and isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise TypeError(f"{name}: expected an array without masked values, got {np.ma.count_masked(x)} masked")


class NonFiniteError(ValueError):
    """What `check_finite` raises."""

    without_batch: str
    """The message for who gave one image: without the first axis of the place."""


def check_finite(x: np.ndarray, name: str) -> None:
    """Raise NonFiniteError where a host array holds NaN or infinity, with the first place it does."""
    # One reduction decides the common case: a sum is finite only if every term is (or it overflowed: look closer).
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(x)):
            return
    finite = np.isfinite(x)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        count = int(x.size - np.count_nonzero(finite))

        def says(place: tuple[int, ...]) -> str:
            at = f" at {place}" if place else ""
            return f"{name}: expected finite values, got {x[where]}{at} ({count} non-finite in all)"

        error = NonFiniteError(says(where))
        error.without_batch = says(where[1:])
        raise error


def to_numpy(x: Array, *, keep_bfloat16: bool = False) -> np.ndarray:
    """A host array of float16, float32, float64, bool or integers.

    bfloat16, which NumPy lacks, becomes float32, or with `keep_bfloat16` the bits of a host tensor as dtype `BFLOAT16`.
    """
    if not is_tensor(x):
        return x  # type: ignore[return-value]
    x = x.detach()  # type: ignore[union-attr]
    if dtype_name(x) == "bfloat16":
        if keep_bfloat16 and device_type(x) == "cpu":
            import torch

            return x.view(torch.int16).numpy().view(BFLOAT16)  # type: ignore[union-attr]
        x = x.float()  # type: ignore[union-attr]
    return x.numpy(force=True)  # type: ignore[union-attr]


def like(result: Any, template: Array) -> Any:
    """`result` (an array, or a tuple of them) as the kind and on the device of `template`."""
    if not is_tensor(template):
        return result
    if isinstance(result, tuple):
        parts = [like(part, template) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    if isinstance(result, np.ndarray):
        import torch

        if not (result.ndim == 4 and result.transpose(0, 2, 3, 1).flags.c_contiguous):  # channels last stays so
            result = np.ascontiguousarray(result)
        bits = result.dtype == BFLOAT16
        tensor = torch.from_numpy(result.view(np.int16) if bits else result)
        return (tensor.view(torch.bfloat16) if bits else tensor).to(template.device)  # type: ignore[union-attr]
    return result


def check_int(value: Any, name: str, minimum: int, maximum: int = _INT64_MAX) -> int:
    """`value` as an int within [minimum, maximum]; none is larger than what torch and C++ take."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {_integers(minimum, maximum)}, got {value!r}") from None
    if not minimum <= number <= maximum:
        bound = " and < 2**63" if number > _INT64_MAX == maximum else ""
        raise ValueError(f"{name}: expected {_integers(minimum, maximum)}{bound}, got {number}")
    return number


def _integers(minimum: int, maximum: int) -> str:
    return f"an integer >= {minimum}" if maximum == _INT64_MAX else f"an integer in [{minimum}, {maximum}]"


def check_float(value: Any, name: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> float:
    """`value` as a finite float within [low, high], or (low, high] with `open_low`."""
    try:
        if isinstance(value, (bool, np.bool_, str, bytes, bytearray)):
            raise TypeError
        number = float(value)
    except OverflowError:  # an integer too large for a float
        number = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {_numbers(low, high, open_low)}, got {value!r}") from None
    if not math.isfinite(number) or number > high or number < low or (open_low and number == low):
        raise ValueError(f"{name}: expected {_numbers(low, high, open_low)}, got {number!r}")
    return number


def _numbers(low: float, high: float, open_low: bool) -> str:
    first = "(" if open_low or low == -math.inf else "["
    return f"a number in {first}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"


def check_bool(value: Any, name: str) -> bool:
    """`value` as a bool if it is one, NumPy's included."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return bool(value)


def check_option(value: Any, name: str, options: tuple[str, ...]) -> str:
    """`value` if it is one of `options`."""
    if not isinstance(value, str) or value not in options:  # an array has no truth value
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def check_size(size: Any, name: str = "size") -> tuple[int, int]:
    """`size` as (height, width), both at least 1; an integer stands for both."""
    if isinstance(size, (int, np.integer)):
        size = (size, size)
    try:
        height, width = size
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected (height, width), got {size!r}") from None
    return check_int(height, f"{name}[0]", 1), check_int(width, f"{name}[1]", 1)
