"""PatchCore: a memory bank of nominal patch features, and the distance to it as the anomaly map.

Images go in as files, PIL images or tensors; maps, scores and the features that `TTT4AS` trains on come out.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from . import kernels
from .backbones import Backbone, available, check_input_size, check_layers, create_backbone, resolve_device
from .baselines import NominalStatistics
from .images import ImageError, list_images, read_image
from .kernels.arrays import (
    as_float_array,
    check_bool,
    check_finite,
    check_float,
    check_int,
    check_option,
    device_of,
    is_tensor,
    like,
    to_numpy,
)
from .patches import MapMaker, join_layers, patches_per_image, project, reweight, standardize
from .prediction import STAGES, Clock, ImagePrediction, Prediction, stacked
from .preprocessing import ImageSource, Preprocessing, as_batch
from .progress import Progress, reporter

if TYPE_CHECKING:
    from .kernels.arrays import Array


class PatchCore:
    """Anomaly detection by the distance of patch features to a memory bank of nominal ones.

    Every image, whatever its size and form, is resized to a square of `image_size` (bilinear, antialiased), and its
    centre of `crop_size` is what the model sees. Feature layers are averaged over 3 x 3 neighbours (stride 1, zeros
    beyond the border, as in the paper's code), brought bilinearly to the finest grid and joined. The bank is a greedy
    k-center coreset of the nominal patches, chosen in the space of scikit-learn's ``SparseRandomProjection(eps=0.9)``.
    A patch's score is its Euclidean distance to the nearest of the bank; the map is these scores upsampled bilinearly
    to `crop_size` and blurred. The image score is the largest patch score times ``1 - exp(d_1) / sum_i exp(d_i)``, with
    d_i the distances of that patch to the `n_neighbors` bank entries nearest to its own nearest one (that one first).

    Parameters
    ----------
    backbone : str
        A name from `ttt4as_fast.backbones.available`. Default ``"efficientnet_lite0"``, installed with its weights.
    layers : sequence of str, optional
        As in `ttt4as_fast.backbones.create_backbone`. Default: the backbone's own choice.
    coreset_ratio : float
        Share of the nominal patches kept, in (0, 1]. Default 0.1.
    n_neighbors : int
        Bank entries that re-weight the image score, >= 1. Default 9; 1 leaves the largest patch score as it is.
    image_size, crop_size : int
        Pixels, ``crop_size <= image_size``; multiples of the patch size for the crop of a ViT. Default 256 and 224.
    blur_sigma : float
        Of the Gaussian, in pixels of the crop, >= 0; cut off at 4 sigma, mirrored at the border, as
        ``scipy.ndimage.gaussian_filter``. Default 4.
    random_state : int
        Seeds the projection, the coreset's first pick and the sampling of `max_patches`. Default 0.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.
    device : str or torch.device, optional
        Default: ``"cuda"`` if torch can use it, else ``"cpu"``.
    weights : path-like, optional
        Local weights of the backbone.
    standardize : bool
        Scale each channel to zero mean and unit variance over the nominal patches before distances are taken. The
        paper does not; on real images it moved the image AUROC up or down by less than 0.01 and lowered the mean F1 of
        TTT4AS. Default False.
    max_patches : int, optional
        Upper bound on the nominal patches held while fitting: each image gives an equal share of its patches, drawn at
        random. Default None: all of them.

    Attributes
    ----------
    memory_bank_ : numpy.ndarray, (M, C) float32
        After `fit`; standardised if asked for.
    index_ : ttt4as_fast.kernels.KnnIndex
        The bank prepared for search.
    nominal_statistics_ : NominalStatistics or None
        Of the validation images given to `calibrate`.
    image_threshold_ : float or None
        Image scores from it on are anomalous; set by `calibrate`.

    Raises
    ------
    ValueError, TypeError
        An option is unknown or out of range.

    Notes
    -----
    The same image gives the same result to the bit, alone, in any batch and in any order, on one machine with one
    number of torch threads: on a CPU the network sees one image at a time, which also is the faster way there. Another
    number of threads or another machine sums the convolutions in another order, and the last bits of the features
    change. On CUDA images go through the network in batches, whose size can change the last bits as well;
    ``batch_size=1`` avoids it.

    References
    ----------
    Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022. The image score is eq. 7 of it as
    anomalib reads it: the softmax runs over all neighbours, the nearest one included.
    """

    memory_bank_: np.ndarray
    index_: kernels.KnnIndex

    def __init__(
        self,
        backbone: str = "efficientnet_lite0",
        *,
        layers: Sequence[str] | None = None,
        coreset_ratio: float = 0.1,
        n_neighbors: int = 9,
        image_size: int = 256,
        crop_size: int = 224,
        blur_sigma: float = 4.0,
        random_state: int = 0,
        backend: str = "auto",
        device: str | torch.device | None = None,
        weights: str | os.PathLike[str] | None = None,
        standardize: bool = False,
        max_patches: int | None = None,
    ) -> None:
        self.backbone = check_option(backbone, "backbone", tuple(available()))
        check_layers(layers, backbone)
        self.layers = layers
        self.coreset_ratio = check_float(coreset_ratio, "coreset_ratio", 0.0, 1.0, open_low=True)
        self.n_neighbors = check_int(n_neighbors, "n_neighbors", 1)
        self.preprocessing = Preprocessing(image_size, crop_size)
        self.image_size, self.crop_size = self.preprocessing.image_size, self.preprocessing.crop_size
        check_input_size(backbone, self.crop_size, self.crop_size, "crop_size")
        self.blur_sigma = check_float(blur_sigma, "blur_sigma", 0.0, 1e4)
        self.random_state = check_int(random_state, "random_state", 0, 2**32 - 1)
        self.backend = backend
        self.device = resolve_device(device)
        self.weights = weights
        self.standardize = check_bool(standardize, "standardize")
        self.max_patches = None if max_patches is None else check_int(max_patches, "max_patches", 1)
        with device_of(torch.empty(0, device=self.device)):
            for operation in (kernels.knn, kernels.coreset):  # refused now, not after minutes of features
                operation.OPERATION.resolve(backend, self.device.type)
        self.nominal_statistics_: NominalStatistics | None = None
        self.image_threshold_: float | None = None
        self.scale_: tuple[np.ndarray, np.ndarray] | None = None
        self._network: Backbone | None = None
        self._to_map = MapMaker(self.crop_size, self.blur_sigma)

    def get_params(self) -> dict[str, Any]:
        """The constructor's arguments, as they stand."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        changed = {name: value for name, value in self.get_params().items() if value != parameters[name].default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @property
    def _on_cuda(self) -> bool:
        """Whether patches are tensors, a batch at once. On a host they are arrays, image by image: torch's idle threads
        would spin on cores that the search needs, and in a batch the last bits of an image depend on the others.
        """
        return self.device.type == "cuda"

    # ------------------------------------------------------------ fitting

    def fit(self, images: Any, *, batch_size: int = 16, progress: Progress | None = None) -> PatchCore:
        """Build the memory bank from nominal images.

        Parameters
        ----------
        images : path, folder, iterable of paths or PIL images, or (N, 3, H, W) array or tensor
            Nominal images only; floats in [0, 1] if an array. The images in a folder are taken in natural order.
        batch_size : int
            Images read, and on CUDA passed through the network, at once. Default 16.
        progress : callable, optional
            ``progress(stage, done, total)`` with stage ``"features"`` (images), then ``"coreset"`` (picks).

        Returns
        -------
        PatchCore
            Itself. An earlier calibration is forgotten.

        Raises
        ------
        ValueError, TypeError
            No images, or arrays of the wrong shape, dtype or range.
        FileNotFoundError
            A path does not exist.
        ImageError
            A file cannot be read as an image.
        WeightsError
            The backbone's weights cannot be had.

        Notes
        -----
        Memory: ``4 * P * (C + D)`` bytes, with P the patches (images times h * w, or `max_patches`), C the channels
        (152) and D those of the projection, 4 ln(P) / 0.162 (about 300), or none where that is not below C; beside it
        one batch of images, then the k-center's scratch, and ``4 * coreset_ratio * P * C`` for the bank. With the
        defaults: 0.5 MB an image. Images are read batch by batch and dropped.
        """
        source = ImageSource(images)
        batch_size = check_int(batch_size, "batch_size", 1)
        report = reporter(progress)
        rng = np.random.default_rng(self.random_state)
        patches: np.ndarray | None = None
        done = 0
        for batch in source.batches(batch_size):
            chunks = self._chunks(self.preprocessing.prepare(batch))
            for found in (image.flatten(0, 1) for pooled, _ in chunks for image in pooled):
                if patches is None:
                    share = patches_per_image(len(found), len(source), self.max_patches)
                    patches = np.zeros((share * len(source), found.shape[1]), np.float32)
                rows = slice(done * share, (done + 1) * share)
                if share < len(found):
                    found = found[torch.from_numpy(np.sort(rng.choice(len(found), share, replace=False)))]
                patches[rows] = to_numpy(found)
                done += 1
                report("features", done, len(source))
        assert patches is not None  # a source has at least one image
        scale = standardize(patches) if self.standardize else None
        picks = self._coreset(patches, progress)
        self.set_memory_bank(patches[picks])
        self.scale_ = scale
        self.nominal_statistics_, self.image_threshold_ = None, None
        return self

    def _coreset(self, patches: np.ndarray, progress: Progress | None) -> np.ndarray:
        """Rows of the patches that the bank keeps, in the order of picking."""
        n = max(1, int(self.coreset_ratio * len(patches)))
        if n == len(patches):
            return np.arange(n)
        points: Array = project(patches, self.random_state)
        if self._on_cuda:
            points = torch.from_numpy(points).to(self.device)
        start = int(np.random.default_rng([self.random_state, 1]).integers(len(patches)))
        step = None if progress is None else functools.partial(progress, "coreset")
        return to_numpy(kernels.k_center_greedy(points, n, start, progress=step, backend=self.backend))

    def set_memory_bank(self, bank: np.ndarray) -> None:
        """Search in `bank` from now on; thresholds stay.

        Parameters
        ----------
        bank : array or tensor, (N, D)
            Vectors of this model's patches, D its channels, any float dtype. A contiguous float32
            array is kept by reference: do not write to it. Anything else is copied to one.

        Raises
        ------
        ValueError, TypeError
            No such vectors, one that is not finite, or a D that is not the backbone's. The bank is then as it was.
        """
        kept = np.ascontiguousarray(to_numpy(as_float_array(bank, "bank", (2,))), np.float32)
        channels = sum(self.network.channels)
        if kept.shape[1] != channels:
            raise ValueError(f"bank: expected {channels} channels, as the backbone gives, got shape {kept.shape}")
        check_finite(kept, "bank")
        placed = torch.from_numpy(kept).to(self.device) if self._on_cuda else kept
        self.index_ = kernels.KnnIndex(placed, backend=self.backend)
        self.memory_bank_ = kept

    def calibrate(
        self,
        images: Any,
        *,
        false_alarm_rate: float = 0.01,
        extrapolate: bool = True,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> PatchCore:
        """Estimate pixel statistics and the image threshold from nominal validation images.

        Parameters
        ----------
        images : as in `fit`
            Nominal images that were not fitted on.
        false_alarm_rate : float
            Share of nominal images that may reach the image threshold, in [0, 1). Default 0.01.
        extrapolate : bool
            Estimate the threshold from the tail of these images' scores (default), as a hundredth of few images cannot
            be counted; False counts. See `NominalStatistics.image_threshold`.
        batch_size : int
            As in `fit`.
        progress : callable, optional
            ``progress(stage, done, total)`` with stage ``"calibration"``.

        Returns
        -------
        PatchCore
            Itself, with `nominal_statistics_` and `image_threshold_`.

        Raises
        ------
        RuntimeError
            Not fitted yet.
        ValueError, TypeError, FileNotFoundError, ImageError
            As in `fit`.

        Notes
        -----
        Memory: ``4 * N * crop_size**2`` bytes for the maps; features are kept for one batch at a time.
        """
        rate = check_float(false_alarm_rate, "false_alarm_rate", 0.0, 1.0)
        extrapolate = check_bool(extrapolate, "extrapolate")
        source = ImageSource(images)
        report = reporter(progress)
        maps, scores = [], []
        for batch in source.batches(check_int(batch_size, "batch_size", 1)):
            prepared, spent = self.preprocessing.prepare(batch), dict.fromkeys(STAGES, 0.0)
            for anomaly_map, score, _ in self._judge(prepared, spent, self.device):
                maps.append(to_numpy(anomaly_map))
                scores.append(score)
                report("calibration", len(maps), len(source))
        statistics = NominalStatistics.from_maps(np.stack(maps), np.asarray(scores, np.float32))
        self.image_threshold_ = statistics.image_threshold(rate, extrapolate=extrapolate)
        self.nominal_statistics_ = statistics
        return self

    # ------------------------------------------------------------ predicting

    def predict(
        self,
        images: Any,
        *,
        batch_size: int = 16,
        progress: Progress | None = None,
        keep_on_device: bool = False,
    ) -> Prediction:
        """Anomaly maps, image scores and features of images.

        Parameters
        ----------
        images : as in `fit`
        batch_size : int
            As in `fit`; it does not change the result.
        progress : callable, optional
            ``progress(stage, done, total)`` with stage ``"prediction"``.
        keep_on_device : bool
            Leave the results of a model on CUDA where they are, as tensors, whatever `images` is: a `TTT4AS` that
            takes them then runs there, and features need not travel. Of a model on a CPU it changes nothing.

        Returns
        -------
        Prediction
            Tensors on the device of `images` if that is a tensor, else NumPy arrays.

        Raises
        ------
        RuntimeError
            Not fitted yet.
        ValueError, TypeError, FileNotFoundError, ImageError
            As in `fit`.

        Notes
        -----
        Keeps the features of all images, 0.5 MB each with the defaults; `predict_iter` keeps one batch.
        """
        source = ImageSource(images)
        stays = check_bool(keep_on_device, "keep_on_device") and self._on_cuda
        target = self.device if stays else images.device if is_tensor(images) else torch.device("cpu")
        spent = dict.fromkeys(STAGES, 0.0)
        report = reporter(progress)
        results: list[tuple[Any, float, Any]] = []
        for batch in source.batches(check_int(batch_size, "batch_size", 1)):
            begin = time.perf_counter()
            prepared = self.preprocessing.prepare(batch)
            spent["decode"] += 1e3 * (time.perf_counter() - begin)
            for result in self._judge(prepared, spent, target):
                results.append(result)
                report("prediction", len(results), len(source))
        maps, features = (stacked([row[i] for row in results], target) for i in (0, 2))
        scores = torch.tensor([row[1] for row in results], dtype=torch.float32, device=target)
        parts: list[Any] = [maps, scores, features]
        if not (stays or is_tensor(images)):
            parts = [to_numpy(part) for part in parts]
        return Prediction(parts[0], parts[1], parts[2], spent)

    def predict_iter(
        self,
        images: Any,
        *,
        batch_size: int = 16,
        on_error: Callable[[ImageError], None] | None = None,
    ) -> Iterator[ImagePrediction]:
        """`predict` for image files, one result at a time: memory does not grow with their number.

        Parameters
        ----------
        images : path, folder or iterable of paths
        batch_size : int
            Files read at once. Default 16.
        on_error : callable, optional
            Called with the `ImageError` of a file that cannot be read, which is then left out. Default: it is raised.

        Yields
        ------
        ImagePrediction
            In the order of the files.

        Raises
        ------
        RuntimeError, ValueError, TypeError, FileNotFoundError, ImageError
            As in `predict`.
        """
        self._check_fitted()
        paths = list_images(images)
        batch_size = check_int(batch_size, "batch_size", 1)
        return self._stream(paths, batch_size, on_error)

    def _stream(
        self, paths: list[Path], batch_size: int, on_error: Callable[[ImageError], None] | None
    ) -> Iterator[ImagePrediction]:
        for start in range(0, len(paths), batch_size):
            spent = dict.fromkeys(STAGES, 0.0)
            begin = time.perf_counter()
            opened = []
            for path in paths[start : start + batch_size]:
                try:
                    image = read_image(path)
                except ImageError as error:
                    if on_error is None:
                        raise
                    on_error(error)
                else:
                    opened.append((path, (image.height, image.width), self.preprocessing.transform(image)))
            if not opened:
                continue
            prepared = as_batch([pixels for _, _, pixels in opened])
            spent["decode"] = 1e3 * (time.perf_counter() - begin)
            results = list(self._judge(prepared, spent, torch.device("cpu")))
            share = {stage: value / len(opened) for stage, value in spent.items()}
            for (path, size, _), (anomaly_map, score, features) in zip(opened, results, strict=True):
                yield ImagePrediction(path, size, to_numpy(anomaly_map), score, to_numpy(features), dict(share))

    def _check_fitted(self) -> None:
        if not hasattr(self, "index_"):
            raise RuntimeError("this PatchCore has no memory bank yet: call fit, or PatchCore.load")

    def _judge(
        self, images: torch.Tensor, spent: dict[str, float], target: torch.device
    ) -> Iterator[tuple[torch.Tensor, float, torch.Tensor]]:
        """(anomaly map, image score, features) of each prepared image, tensors on `target`; adds the milliseconds of
        each stage to `spent`.
        """
        self._check_fitted()
        clock = Clock(self.device, spent)
        # The network of all images first: its threads spin on for milliseconds, on the cores that the search needs.
        found = list(self._chunks(images))
        clock.stop("backbone")
        for pooled, features in found:
            n, height, width, channels = pooled.shape
            if self.scale_ is not None:
                mean, std = (torch.from_numpy(x).to(pooled.device) for x in self.scale_)
                pooled = (pooled - mean) / std
            patches: Array = pooled.view(-1, channels) if self._on_cuda else pooled.view(-1, channels).numpy()
            distances, nearest = (x.reshape(n, -1) for x in self.index_.search(patches, 1))
            scores = self._image_scores(patches.reshape(n, -1, channels), distances, nearest)
            clock.stop("knn")
            grids = distances.reshape(n, height, width)
            if is_tensor(grids):
                maps = self._to_map.of_batch(grids)
            else:
                maps = torch.from_numpy(np.stack([self._to_map(grid) for grid in grids]))
            maps, features = maps.to(target), features.to(target)
            clock.stop("map")
            yield from zip(maps, scores, features, strict=True)
            clock.start()

    def _image_scores(self, patches: Array, distances: Array, nearest: Array) -> list[float]:
        """The paper's eq. 7 for each image: its largest patch distance, re-weighted by the bank entries around the one
        nearest to that patch. From patches (N, P, C) and their distances and nearest entries (N, P).
        """
        each = like(np.arange(len(distances)), distances)
        worst = distances.argmax(1)
        largest = to_numpy(distances[each, worst])
        if not np.isfinite(largest).all():  # values on a device are checked nowhere before
            raise ValueError(f"images: the features that {self.backbone!r} gives of one are not finite")
        k = min(self.n_neighbors, len(self.memory_bank_))
        if k == 1:
            return largest.tolist()
        own = self.memory_bank_[to_numpy(nearest[each, worst])]  # on the host whatever backend serves the index
        _, support = self.index_.search(like(own, patches), k)
        rows = zip(largest, to_numpy(patches[each, worst]), to_numpy(support), strict=True)
        return [reweight(float(distance), patch, self.memory_bank_[entries]) for distance, patch, entries in rows]

    # ------------------------------------------------------------ features and geometry

    @property
    def network(self) -> Backbone:
        """The frozen backbone, made on first use."""
        if self._network is None:
            self._network = create_backbone(self.backbone, self.layers, self.weights, self.device)
        return self._network

    def _chunks(self, images: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(averaged patches (n, h, w, C), features (n, C, h, w)) of a prepared batch; on a CPU image by image."""
        network = self.network
        size = len(images) if self._on_cuda else 1
        for start in range(0, len(images), size):
            with torch.inference_mode():
                chunk = images[start : start + size].to(self.device).contiguous(memory_format=torch.channels_last)
                maps = network(chunk)
                features = join_layers(maps).contiguous()
                pooled = join_layers([F.avg_pool2d(x, 3, stride=1, padding=1) for x in maps])
                pooled = pooled.permute(0, 2, 3, 1).contiguous()
            yield pooled, features

    def transform_mask(self, mask: Any) -> np.ndarray:
        """A mask of an image on the grid of its anomaly map; see `Preprocessing.transform_mask`."""
        return self.preprocessing.transform_mask(mask)

    def inverse_transform_mask(self, mask: Any, size: tuple[int, int]) -> np.ndarray:
        """A mask on an anomaly map's grid in the pixels of the image; see `Preprocessing.inverse_transform_mask`."""
        return self.preprocessing.inverse_transform_mask(mask, size)

    def inverse_transform_map(self, anomaly_map: Any, size: tuple[int, int]) -> np.ndarray:
        """An anomaly map in the pixels of its image; see `Preprocessing.inverse_transform_map`."""
        return self.preprocessing.inverse_transform_map(anomaly_map, size)

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one safetensors file, whole or not at all.

        Parameters
        ----------
        path : path-like
            Usually ends in ``.safetensors``. Its folder must exist; an older file is replaced.

        Raises
        ------
        RuntimeError
            Not fitted yet.
        OSError
            The file cannot be written.

        Notes
        -----
        Holds the bank, the calibration and the options, not the backbone: its name and a hash of its weights.
        """
        from . import model_file

        self._check_fitted()
        model_file.save(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        backend: str = "auto",
        weights: str | os.PathLike[str] | None = None,
    ) -> PatchCore:
        """A model that `save` wrote.

        Parameters
        ----------
        path : path-like
        device, backend
            As in `PatchCore`; they need not be those it was fitted with.
        weights : path-like, optional
            Local weights of the backbone, as in `PatchCore`; needed if it was fitted with such and they moved.

        Returns
        -------
        PatchCore
            Gives the same results to the bit on the same machine.

        Raises
        ------
        FileNotFoundError
            No such file.
        ModelFileError
            The file is no model, truncated, corrupt or written by a newer version. A ValueError.
        WeightsError
            The backbone's weights cannot be had, or are not those the model was fitted with.
        """
        from . import model_file

        return model_file.load(cls, Path(path), device=device, backend=backend, weights=weights)
