"""ttt4as_fast: anomaly maps into masks, by test-time training, in real time.

>>> import ttt4as_fast as ttt
>>> out = ttt.TTT4AS()(anomaly_map, features)  # doctest: +SKIP

Names are loaded on first use: importing the package loads neither torch, timm, numba nor cupy.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels as kernels
    from .integrations.sklearn import LinearSVC as LinearSVC
    from .patchcore import PatchCore as PatchCore
    from .segmenter import TTT4AS as TTT4AS
    from .segmenter import Segmentation as Segmentation

__version__ = "0.1.0"

# In a checkout, `kernels` does not lie in this folder: let an installed copy's folder serve it there, so that
# `python -m ...` from the root works after any kind of install.
__path__ = pkgutil.extend_path(__path__, __name__)

_WHERE = {
    "LinearSVC": "integrations.sklearn",
    "PatchCore": "patchcore",
    "Segmentation": "segmenter",
    "TTT4AS": "segmenter",
}
_MODULES = ("baselines", "backbones", "datasets", "evaluate", "figures", "kernels", "metrics", "nn")

__all__ = [*_WHERE, *_MODULES, "__version__"]  # noqa: PLE0604 - the names are those of the table above


def __getattr__(name: str) -> Any:
    if name not in _WHERE and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First all of kernels: where one thread imports the package and another a part of it, they wait for each other, and
    # Python ends that by an ImportError.
    importlib.import_module(f"{__name__}.kernels")
    module = importlib.import_module(f"{__name__}.{_WHERE.get(name, name)}")
    value = getattr(module, name) if name in _WHERE else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
