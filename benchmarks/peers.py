"""Against whom: each peer behind one small adapter, with its version; what is absent here is named, not forgotten.

An adapter does what its library's users would write who know the library: its fastest call, in the type that keeps the
work small. All take NumPy arrays and give NumPy arrays back, where the library works on tensors over memory that is
shared, not copied; a library for GPUs makes the trip to the device and back, as it would for these arrays.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

STAGES = ("upsampling", "pseudo-labels", "sampling", "SVM", "prediction")


@dataclass(frozen=True)
class Peer:
    """One way that others do an operation.

    Attributes
    ----------
    name : str
        Of the row, such as ``"FAISS IndexFlatL2"``.
    operation : str
        What it does: ``segment``, ``linear_svm``, ``peaks``, ``knn``, ``coreset``, ``upsample`` or ``binarise``.
    distributions : tuple of str
        Whose versions are reported.
    make : callable
        Imports the library and returns the adapter; ImportError or RuntimeError where it cannot serve.
    """

    name: str
    operation: str
    distributions: tuple[str, ...]
    make: Callable[[], Callable[..., Any]]

    @property
    def version(self) -> str:
        """``"scikit-learn 1.9.1, torch 2.15.0"``."""
        return versions(*self.distributions)

    def why_not(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        return _why_not(self)

    def adapter(self) -> Callable[..., Any]:
        return _adapter(self)


@functools.cache
def _adapter(peer: Peer) -> Callable[..., Any]:
    return peer.make()


@functools.cache
def _why_not(peer: Peer) -> str | None:
    try:
        _adapter(peer)
    except (ImportError, RuntimeError, OSError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def versions(*distributions: str) -> str:
    """``"scikit-learn 1.9.1, torch 2.15.0"``."""
    return ", ".join(f"{name} {_version(name)}" for name in distributions)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def peers(operation: str) -> list[Peer]:
    """The peers of an operation, present or not."""
    found = [peer for peer in PEERS if peer.operation == operation]
    if not found:
        raise ValueError(f"operation: expected one of {sorted({p.operation for p in PEERS})}, got {operation!r}")
    return found


def absent(*operations: str) -> dict[str, str]:
    """Peers of the given operations (default: all) that cannot be measured here, and why; loads their libraries."""
    reasons = {peer.name: peer.why_not() for peer in PEERS if not operations or peer.operation in operations}
    return {name: reason for name, reason in reasons.items() if reason is not None}


# ---------------------------------------------------------------- the paper's recipe


def recipe_stages(
    anomaly_map: np.ndarray, features: np.ndarray, n_nominal: int = 100
) -> tuple[np.ndarray, dict[str, float]]:
    """Test-time training as the paper describes it, with the libraries it names: mask and milliseconds a stage.

    Dense bilinear upsampling (torch), local maxima and dilation (SciPy), `sklearn.svm.LinearSVC(C=1e-3)` on the
    labelled pixels, ``predict`` on all of them, scikit-learn's defaults. The coefficients, which scikit-learn fits in
    float64, are made float32 before ``predict``: else all of the upsampled features would be copied to float64. The
    radius and the grid of nominal pixels are this package's, because the paper's text does not state them.

    Parameters
    ----------
    anomaly_map : numpy.ndarray, (H, W) float32
    features : numpy.ndarray, (C, h, w) float32
    n_nominal : int
        Nominal pixels aimed at. Default 100.

    Returns
    -------
    mask : numpy.ndarray, (H, W) bool
    milliseconds : dict
        A number for each of `STAGES`.
    """
    import torch
    import torch.nn.functional as F
    from scipy import ndimage
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    height, width = anomaly_map.shape
    clock = [time.perf_counter()]
    dense = F.interpolate(torch.from_numpy(features)[None], (height, width), mode="bilinear", align_corners=False)[0]
    dense = dense.reshape(len(features), -1).numpy().T
    clock.append(time.perf_counter())

    highest = ndimage.maximum_filter(anomaly_map, size=3)
    peaks = (anomaly_map == highest) & (anomaly_map >= np.percentile(anomaly_map, 99.0))
    anomalous = ndimage.maximum_filter(peaks, size=11, mode="constant")  # a row and a column at a time
    labels = anomalous.astype(np.int8)
    step = max(1, int(np.sqrt(height * width / n_nominal)))
    grid = np.zeros_like(anomalous)
    grid[step // 2 :: step, step // 2 :: step] = True
    labels[grid & ~anomalous] = -1
    labels = labels.ravel()
    clock.append(time.perf_counter())

    places = np.flatnonzero(labels)
    samples = dense[places]
    clock.append(time.perf_counter())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = LinearSVC(C=1e-3, random_state=0).fit(samples, labels[places])
    classifier.coef_ = classifier.coef_.astype(np.float32)
    classifier.intercept_ = classifier.intercept_.astype(np.float32)
    clock.append(time.perf_counter())
    mask = classifier.predict(dense).reshape(height, width) > 0
    clock.append(time.perf_counter())
    return mask, {stage: 1e3 * (b - a) for stage, a, b in zip(STAGES, clock[:-1], clock[1:], strict=True)}


def _recipe() -> Callable[..., Any]:
    import sklearn.svm  # noqa: F401

    return lambda anomaly_map, features, n_nominal=100: recipe_stages(anomaly_map, features, n_nominal)[0]


# ---------------------------------------------------------------- parts


def _sklearn_svm() -> Callable[..., Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    def fit(X: np.ndarray, y: np.ndarray, C: float) -> tuple[np.ndarray, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LinearSVC(C=C, random_state=0).fit(X, y)
        return model.coef_[0], float(model.intercept_[0])

    return fit


def _cuml_svm() -> Callable[..., Any]:
    _need_cuda()
    from cuml.svm import LinearSVC

    def fit(X: Any, y: Any, C: float) -> tuple[Any, float]:
        model = LinearSVC(C=C, penalized_intercept=True).fit(X, y)
        return model.coef_.reshape(-1), float(model.intercept_[0])

    return fit


def _scipy_peaks() -> Callable[..., Any]:
    from scipy import ndimage

    def label(anomaly_map: np.ndarray, percentile: float, radius: int) -> np.ndarray:
        highest = ndimage.maximum_filter(anomaly_map, size=3)
        peaks = (anomaly_map == highest) & (anomaly_map >= np.percentile(anomaly_map, percentile))
        return ndimage.maximum_filter(peaks, size=2 * radius + 1, mode="constant")

    return label


def _skimage_peaks() -> Callable[..., Any]:
    from skimage.feature import peak_local_max
    from skimage.morphology import dilation, footprint_rectangle

    def label(anomaly_map: np.ndarray, percentile: float, radius: int) -> np.ndarray:
        threshold = np.percentile(anomaly_map, percentile)
        # The threshold is exclusive there; peaks of a plateau all count, at the border too.
        places = peak_local_max(
            anomaly_map,
            min_distance=1,
            threshold_abs=np.nextafter(anomaly_map.dtype.type(threshold), anomaly_map.dtype.type(-np.inf)),
            exclude_border=False,
        )
        peaks = np.zeros(anomaly_map.shape, bool)
        peaks[tuple(places.T)] = True
        return dilation(peaks, footprint_rectangle((2 * radius + 1,) * 2, decomposition="separable"))

    return label


def _cupyx_peaks() -> Callable[..., Any]:
    _need_cuda()
    import cupy
    from cupyx.scipy import ndimage

    def label(anomaly_map: np.ndarray, percentile: float, radius: int) -> np.ndarray:
        psi = cupy.asarray(anomaly_map)
        peaks = (psi == ndimage.maximum_filter(psi, size=3)) & (psi >= cupy.percentile(psi, percentile))
        return ndimage.maximum_filter(peaks.view(cupy.uint8), size=2 * radius + 1, mode="constant").get() > 0

    return label


def _faiss_knn() -> Callable[..., Any]:
    import faiss

    def build(bank: np.ndarray) -> Callable[..., Any]:
        index = faiss.IndexFlatL2(bank.shape[1])
        index.add(bank)
        return lambda query, k: index.search(query, k)

    return build


def _faiss_gpu_knn() -> Callable[..., Any]:
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("this FAISS is built without GPU support")
    _need_cuda()
    resources = faiss.StandardGpuResources()

    def build(bank: np.ndarray) -> Callable[..., Any]:
        index = faiss.GpuIndexFlatL2(resources, bank.shape[1])
        index.add(bank)
        return lambda query, k: index.search(query, k)

    return build


def _torch_knn() -> Callable[..., Any]:
    import torch

    def build(bank: np.ndarray) -> Callable[..., Any]:
        held = torch.from_numpy(bank)

        def search(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            found = torch.cdist(torch.from_numpy(query), held).topk(k, largest=False)
            return found.values.numpy(), found.indices.numpy()

        return search

    return build


def _anomalib_knn() -> Callable[..., Any]:
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    def build(bank: np.ndarray) -> Callable[..., Any]:
        # Its search needs a memory bank and nothing else of the model, not the backbone.
        model = PatchcoreModel.__new__(PatchcoreModel)
        torch.nn.Module.__init__(model)
        model.register_buffer("memory_bank", torch.from_numpy(bank))

        def search(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            distances, indices = model.nearest_neighbors(torch.from_numpy(query), n_neighbors=k)
            return distances.numpy().reshape(len(query), k), indices.numpy().reshape(len(query), k)

        return search

    return build


def _anomalib_coreset() -> Callable[..., Any]:
    import torch
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    def select(points: np.ndarray, n_samples: int, seed: int) -> np.ndarray:
        """Starts where torch's generator says; with three axes it leaves out its own random projection."""
        torch.manual_seed(seed)
        sampler = KCenterGreedy(torch.from_numpy(points)[:, :, None], n_samples / len(points) * (1 + 1e-9))
        with silent_bars():
            return np.array(sampler.select_coreset_idxs())

    return select


def _anomalib_mebin() -> Callable[..., Any]:
    import torch
    from anomalib.post_processing import mebin

    def binarise(anomaly_maps: np.ndarray, as_it_is: bool = False) -> np.ndarray:
        """Takes all maps of a set at once: its search range is that of their maxima.

        On a CPU anomalib counts connected components by a thousand poolings for each of 64 thresholds, a minute an
        image. Unless `as_it_is`, SciPy counts them: the same numbers, hence the same masks.
        """
        maps = torch.from_numpy(anomaly_maps)[:, None]
        if as_it_is:
            return mebin.mebin_binarize(maps)[0][:, 0].numpy() > 0
        original = mebin._count_connected_components
        mebin._count_connected_components = _count_components
        try:
            return mebin.mebin_binarize(maps)[0][:, 0].numpy() > 0
        finally:
            mebin._count_connected_components = original

    return binarise


def _count_components(masks: Any, num_iterations: int = 0) -> Any:
    """Eight-connected components of each (1, H, W) mask."""
    import torch
    from scipy import ndimage

    counts = [ndimage.label(mask[0].numpy() > 0, np.ones((3, 3)))[1] for mask in masks]
    return torch.tensor(counts, dtype=torch.long)


def _torch_upsample() -> Callable[..., Any]:
    import torch.nn.functional as F

    return functools.partial(F.interpolate, mode="bilinear", align_corners=False)


class silent_bars:
    """Progress bars of a library, which cost time and cannot be turned off by argument, go nowhere."""

    def __enter__(self) -> None:
        from tqdm import tqdm

        self._init = tqdm.__init__
        init = self._init

        def quiet(bar: Any, *args: Any, **kwargs: Any) -> None:
            init(bar, *args, **{**kwargs, "disable": True})

        tqdm.__init__ = quiet

    def __exit__(self, *_: object) -> None:
        from tqdm import tqdm

        tqdm.__init__ = self._init


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")


PEERS = (
    Peer("paper's recipe", "segment", ("scikit-learn", "torch", "scipy"), _recipe),
    Peer("scikit-learn LinearSVC", "linear_svm", ("scikit-learn",), _sklearn_svm),
    Peer("cuML LinearSVC", "linear_svm", ("cuml-cu13",), _cuml_svm),
    Peer("SciPy", "peaks", ("scipy",), _scipy_peaks),
    Peer("scikit-image peak_local_max", "peaks", ("scikit-image",), _skimage_peaks),
    Peer("cupyx", "peaks", ("cupy-cuda13x",), _cupyx_peaks),
    Peer("FAISS IndexFlatL2", "knn", ("faiss-cpu",), _faiss_knn),
    Peer("FAISS GPU", "knn", ("faiss-gpu",), _faiss_gpu_knn),
    Peer("torch.cdist", "knn", ("torch",), _torch_knn),
    Peer("anomalib nearest_neighbors", "knn", ("anomalib",), _anomalib_knn),
    Peer("anomalib KCenterGreedy", "coreset", ("anomalib",), _anomalib_coreset),
    Peer("F.interpolate", "upsample", ("torch",), _torch_upsample),
    Peer("anomalib MEBin", "binarise", ("anomalib",), _anomalib_mebin),
)
