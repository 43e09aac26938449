"""A fitted PatchCore as one safetensors file: tensors, and everything else as JSON in its metadata. No pickle.

::

    memory_bank            (M, C) float32
    scale.mean, scale.std  (C,) float32, if standardised
    nominal.*              what `NominalStatistics.arrays` gives, if calibrated
    metadata["ttt4as_fast"]  SHA-256 of what follows and of the tensors, so that no damaged byte passes; a new line;
                             JSON: {"format", "format_version", "package_version", "options", "layers",
                              "image_threshold", "backbone_sha256"}

One entry of metadata, not two: safetensors writes several in an order that changes from one run to the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backbones import WeightsError
from .baselines import NominalStatistics
from .io import absolute, atomic_path
from .kernels.arrays import check_float

if TYPE_CHECKING:
    import torch

    from .patchcore import PatchCore

FORMAT = "ttt4as_fast.PatchCore"
FORMAT_VERSION = 1
_KEY = "ttt4as_fast"
OPTIONS = (
    "backbone",
    "coreset_ratio",
    "n_neighbors",
    "image_size",
    "crop_size",
    "blur_sigma",
    "random_state",
    "standardize",
    "max_patches",
)


class ModelFileError(ValueError):
    """A file that holds no model this version can read: something else, damaged, or newer."""


def save(model: PatchCore, path: Path) -> None:
    """Write a fitted model whole or not at all; see `PatchCore.save`."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from . import __version__

    tensors = {"memory_bank": model.memory_bank_}
    if model.scale_ is not None:
        tensors["scale.mean"], tensors["scale.std"] = model.scale_
    if model.nominal_statistics_ is not None:
        tensors.update({f"nominal.{name}": array for name, array in model.nominal_statistics_.arrays().items()})
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    options = {name: getattr(model, name) for name in OPTIONS}
    options["weights"] = None if model.weights is None else absolute(model.weights)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "options": options,
        "layers": list(model.network.layers),
        "image_threshold": model.image_threshold_,
        "backbone_sha256": model.network.fingerprint,
    }
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask leaves: safetensors puts a file of its own there, of 0600
        try:
            save_file(tensors, temporary, metadata={_KEY: f"{digest(text, tensors)}\n{text}"})
        except SafetensorError as error:
            raise OSError(f"cannot be written ({error})") from error
        temporary.chmod(mode)


def load(
    cls: type[PatchCore],
    path: Path,
    device: str | torch.device | None,
    backend: str,
    weights: str | os.PathLike[str] | None,
) -> PatchCore:
    """The model in a file; see `PatchCore.load`."""
    content, tensors = _read(path)
    try:
        options = dict(content["options"])
        stored = options.pop("weights")
        if not isinstance(stored, (str, type(None))):
            raise TypeError(f"weights: expected a path, got {stored!r}")
        fitted_with = str(content["backbone_sha256"])
        threshold = content["image_threshold"]
        threshold = None if threshold is None else check_float(threshold, "image_threshold", -math.inf)
        bank, layers = tensors["memory_bank"], tuple(content["layers"])
        _check_tensors(tensors)
        scale = (tensors["scale.mean"], tensors["scale.std"]) if options["standardize"] else None
        nominal = {name.removeprefix("nominal."): x for name, x in tensors.items() if name.startswith("nominal.")}
        statistics = NominalStatistics.from_arrays(nominal) if nominal else None
        # The stored options on their own, away from what is usable here: is the file to blame?
        crop = cls(**options, layers=layers, device="cpu", backend="reference").crop_size
        if statistics is not None and statistics.mean.shape != (crop, crop):
            raise ValueError(f"nominal statistics of shape {statistics.mean.shape} for a crop of {crop} pixels")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    model = cls(
        **options, layers=layers, device=device, backend=backend, weights=stored if weights is None else weights
    )
    _check_weights(model, fitted_with, path)
    channels = sum(model.network.channels)
    if bank.shape[1:] != (channels,) or not len(bank):
        raise _damaged(path, f"a memory bank of shape {bank.shape} for {channels} channels")
    if scale is not None and any(x.shape != (channels,) for x in scale):
        raise _damaged(path, f"a scale of shape {scale[0].shape} for {channels} channels")
    model.scale_ = scale
    model.set_memory_bank(bank)
    model.nominal_statistics_, model.image_threshold_ = statistics, threshold
    return model


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"path: {str(path)!r} is a damaged model: {what}")


def _check_tensors(tensors: dict[str, np.ndarray]) -> None:
    for name, array in tensors.items():
        if array.dtype != np.float32:
            raise ValueError(f"a {name.replace('_', ' ')} of {array.dtype}, expected float32")
        if not np.isfinite(array).all():
            raise ValueError(f"a non-finite value in {name}")


def _check_weights(model: PatchCore, fitted_with: str, path: Path) -> None:
    """Refuse other weights than those of fitting: distances to the bank would mean nothing, and look like scores."""
    if model.weights is not None and not Path(model.weights).is_file():
        raise WeightsError(
            f"weights: the model {str(path)!r} was fitted with the local weights {str(model.weights)!r}, which are not "
            "there; pass their present path as weights (in a command: --weights)"
        )
    found = model.network.fingerprint
    if found != fitted_with:
        raise WeightsError(
            f"weights: those of {model.backbone!r} found here are not the ones that {str(path)!r} was fitted with "
            f"(SHA-256 {found[:12]} instead of {fitted_with[:12]}); pass the original ones as "
            "weights (in a command: --weights), or fit again"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a model file that is whole and not newer than this version."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            seal, _, text = metadata.get(_KEY, "").partition("\n")
            content = json.loads(text) if _KEY in metadata else None
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ModelFileError(f"path: {str(path)!r} is a safetensors file, but no model of {FORMAT}")
            version = content.get("format_version")
            if not isinstance(version, int) or version < 1:
                raise _damaged(path, f"format version {version!r}")
            if version > FORMAT_VERSION:
                raise ModelFileError(
                    f"path: {str(path)!r} has format version {version}, written by ttt4as_fast "
                    f"{content.get('package_version')}; this one reads up to {FORMAT_VERSION}: upgrade ttt4as_fast"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ModelFileError(
            f"path: {str(path)!r} is no safetensors file, or a truncated or corrupt one ({error})"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, f"metadata that is no JSON ({error})") from error
    except (TypeError, AttributeError) as error:  # safetensors asks NumPy for a dtype that it lacks, such as bfloat16
        raise _damaged(path, f"tensors of another dtype than float32 ({error})") from error
    try:
        whole = digest(text, tensors) == seal
    except ValueError as error:  # where ml_dtypes is imported, NumPy has them, but no buffers of them
        raise _damaged(path, f"tensors of another dtype than float32 ({error})") from error
    if not whole:
        raise ModelFileError(f"path: {str(path)!r} is corrupt: its content is not what was written")
    return content, tensors


def digest(text: str, tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of a model's JSON and tensors, names, types and shapes included."""
    found = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
