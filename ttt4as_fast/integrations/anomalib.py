"""anomalib: PatchCore on our search and coreset, and masks by test-time training behind any of its models."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from .. import kernels
from ..patches import join_layers
from ..segmenter import TTT4AS

EXPECTED = ((2, 7), (3, 0))  # from the first on, below the second


def _check_version() -> None:
    expected = f"anomalib >= {EXPECTED[0][0]}.{EXPECTED[0][1]}, < {EXPECTED[1][0]}"
    try:
        found = metadata.version("anomalib")
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"ttt4as_fast.integrations.anomalib needs {expected}, and found none: pip install 'ttt4as_fast[anomalib]'"
        ) from None
    numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in found.split(".")[:2])
    if not EXPECTED[0] <= numbers < EXPECTED[1]:
        raise ImportError(f"ttt4as_fast.integrations.anomalib needs {expected}, and found {found}")


_check_version()

from anomalib import PrecisionType  # noqa: E402 - another version may fail here, with a message that names nothing
from anomalib.data import Batch, InferenceBatch  # noqa: E402
from anomalib.metrics import Evaluator  # noqa: E402
from anomalib.models import Patchcore as _Patchcore  # noqa: E402
from anomalib.models.components import SparseRandomProjection, TimmFeatureExtractor  # noqa: E402
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel  # noqa: E402
from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # noqa: E402
from anomalib.post_processing import PostProcessor  # noqa: E402
from anomalib.visualization import Visualizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

__all__ = ["Patchcore", "TTT4ASPostProcessor", "accelerate", "load_installed_weights"]

Model = TypeVar("Model", bound=nn.Module)


# ---------------------------------------------------------------- memory banks


class _FastPatchcoreModel(PatchcoreModel):
    """`PatchcoreModel` with our search and coreset. It holds no further state, so that an instance can become one."""

    _prepared: tuple[torch.Tensor, int, kernels.KnnIndex] | None = None

    def nearest_neighbors(self, embedding: torch.Tensor, n_neighbors: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and rows of the memory bank: (Q,) for one neighbour, (Q, k) for more, as anomalib returns them."""
        if _is_traced(embedding) or self.memory_bank.device.type not in ("cpu", "cuda"):
            return super().nearest_neighbors(embedding, n_neighbors)
        distances, indices = self._index().search(embedding, n_neighbors)
        distances = distances.to(embedding.dtype)
        return (distances[:, 0], indices[:, 0]) if n_neighbors == 1 else (distances, indices)

    def _index(self) -> kernels.KnnIndex:
        """The memory bank prepared once, and again when it was replaced or written to."""
        bank = self.memory_bank
        if bank.is_inference():  # such a tensor does not count the writes to it
            with torch.inference_mode(False):
                bank = self.memory_bank = bank.clone()
        if self._prepared is None or self._prepared[0] is not bank or self._prepared[1] != bank._version:
            self._prepared = (bank, bank._version, kernels.KnnIndex(bank))
        return self._prepared[2]

    def subsample_embedding(self, sampling_ratio: float, embeddings: torch.Tensor | None = None) -> None:
        """Make the memory bank of the embeddings that training has stored; see `anomalib`'s."""
        if embeddings is not None:
            warnings.warn(
                "embeddings: anomalib has deprecated it, and so it is ignored", DeprecationWarning, stacklevel=2
            )
        if not self.embedding_store:
            raise ValueError("Embedding store is empty. Cannot perform coreset selection.")
        self.memory_bank = _coreset(self.embedding_store, sampling_ratio)
        self.embedding_store.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}


class _FastAnomalyDINOModel(AnomalyDINOModel):
    """`AnomalyDINOModel` with our coreset."""

    def fit(self) -> None:
        """Make the memory bank of the embeddings that training has stored."""
        if not self.coreset_subsampling or not self.embedding_store:
            super().fit()
            return
        self.memory_bank = _coreset(self.embedding_store, self.sampling_ratio)
        self.embedding_store.clear()


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    PatchcoreModel: _FastPatchcoreModel,
    AnomalyDINOModel: _FastAnomalyDINOModel,
}


def _is_traced(x: Any) -> bool:
    """Whether a graph is being recorded: then plain torch operations must do the work, which every exporter knows."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor


def _coreset(store: list[torch.Tensor], sampling_ratio: float) -> torch.Tensor:
    """The rows of all of `store` that anomalib's `KCenterGreedy` picks, but for ties within rounding.

    The random draws are anomalib's, in its order. Beside the store there are only the projected points, a fraction of
    it, and the bank: the store is never stacked, nor a distance kept but one a point.
    """
    n = sum(len(part) for part in store)
    size = int(n * sampling_ratio)
    if size <= 0:
        raise ValueError(
            f"sampling_ratio: expected one that keeps at least one of the {n} patches, got {sampling_ratio}"
        )
    first = store[0]
    with torch.inference_mode(False), torch.no_grad():  # validation, where a bank may be made, is in inference mode
        projection = SparseRandomProjection(eps=0.9).fit(first[:1].expand(n, -1))  # which reads the shape alone
        points = torch.zeros((n, int(projection.n_components)), dtype=first.dtype, device=first.device)
        ends = torch.tensor([len(part) for part in store]).cumsum(0).tolist()
        for part, end in zip(store, ends, strict=True):
            points[end - len(part) : end] = projection.transform(part)
        start = int(torch.randint(high=n, size=(1,), device=first.device))
        with tqdm(total=size, desc="Selecting Coreset Indices.") as bar:
            picks = kernels.k_center_greedy(points, size, start, progress=lambda done, _: bar.update(done - bar.n))
        bank = torch.zeros((size, first.shape[1]), dtype=first.dtype, device=first.device)
        for part, end in zip(store, ends, strict=True):
            here = (picks >= end - len(part)) & (picks < end)
            bank[here] = part[picks[here] - (end - len(part))]
    return bank


def accelerate(model: Model) -> Model:
    """Let a model of anomalib's that exists use our search and our coreset, in place.

    ``Patchcore`` and its torch model get both: neighbours by `kernels.KnnIndex`, which a change of the memory bank
    prepares anew, and the coreset by `kernels.k_center_greedy`. ``AnomalyDINO`` with ``coreset_subsampling`` gets the
    coreset; its search is one product of unit vectors, which stays. State dict, results and everything else stay as
    they are, but for the last bits of distances, which anomalib computes with cancellation. Under export, tracing and
    `torch.compile`, the model runs anomalib's own torch operations.

    Parameters
    ----------
    model : AnomalibModule or torch.nn.Module
        Fitted or not.

    Returns
    -------
    Model
        `model` itself. Accelerating it twice changes nothing.

    Raises
    ------
    TypeError
        A model that carries no memory bank to search, or where replacing its search is not sound: a subclass that
        could override what would be replaced, or a model that learns through the distances.
    """
    inner = getattr(model, "model", model)
    if type(inner) in _FAST.values():
        return model
    if type(inner) not in _FAST:
        known = ", ".join(cls.__name__ for cls in _FAST)
        raise TypeError(
            f"model: expected Patchcore or AnomalyDINO of anomalib, or their {known}, got {type(model).__name__} over "
            f"{type(inner).__name__}; what other models keep is no bank that they search for nearest neighbours "
            "outside of training, or they offer no place to replace its search"
        )
    if isinstance(inner, AnomalyDINOModel) and not inner.coreset_subsampling:
        raise TypeError("model: expected AnomalyDINO with coreset_subsampling=True; without it, nothing is accelerated")
    inner.__class__ = _FAST[type(inner)]
    return model


class Patchcore(_Patchcore):
    """`anomalib.models.Patchcore` with exact search by `kernels.KnnIndex` and a coreset by `kernels.k_center_greedy`.

    The same arguments, hyperparameters and state dict: checkpoints load into either class. After the same seed, both
    choose the same coreset, but for ties within rounding. Training holds what it has stored of the training set and a
    fraction of that for the projected points; anomalib stacks it a second time and differences it a third.
    ONNX and OpenVINO export and `torch.compile` see anomalib's torch operations.

    Parameters
    ----------
    backbone, layers, pre_trained, coreset_sampling_ratio, num_neighbors, precision, pre_processor, post_processor, \
evaluator, visualizer
        As in `anomalib.models.Patchcore`. A `TTT4ASPostProcessor` is attached at once.

    References
    ----------
    Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022. Akcay et al., Anomalib, ICIP 2022.

    Examples
    --------
    >>> model = Patchcore(backbone="resnet18", pre_trained=False)
    >>> model.name
    'Patchcore'
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        coreset_sampling_ratio: float = 0.1,
        num_neighbors: int = 9,
        precision: str | PrecisionType = PrecisionType.FLOAT32,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            coreset_sampling_ratio=coreset_sampling_ratio,
            num_neighbors=num_neighbors,
            precision=precision,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        accelerate(self)
        if isinstance(self.post_processor, TTT4ASPostProcessor):
            self.post_processor.attach(self)


# ---------------------------------------------------------------- masks

# Where anomalib's models keep the frozen network: Patchcore, PaDiM, CFA, FastFlow, ...; Reverse Distillation and CFlow;
# STFPM; CFM, whose first feature map is of the RGB image.
_EXTRACTORS = ("feature_extractor", "encoder", "teacher_model", "feature_extractors.extractors")
_OPTIONS = (
    *("preset", "percentile", "neighbor_radius", "n_nominal", "C", "loss", "nominal_sampling", "random_state"),
    *("tol", "max_iter", "backend"),
)


class TTT4ASPostProcessor(PostProcessor):
    """Masks by test-time training instead of one threshold, for any anomalib model that has a frozen network.

    The SVM is trained on each test image's raw anomaly map, before normalisation clamps its peaks, and on the features
    of the model's own network, which a forward hook takes, or of another backbone. Images whose label is normal get an
    empty mask. Scores, labels, maps and their thresholds are anomalib's. An image's mask depends on its own map,
    features and label alone.

    ``Engine.fit``, ``test`` and ``predict``, the command line and `Patchcore` of this module attach it. Where a model
    is used without them, call `attach` once; a model saved by ``export_type="torch"`` stays attached. ONNX and OpenVINO
    hold no training: exporting with this post-processor raises. Several threads may run one model.

    Parameters
    ----------
    features : str, optional
        Dotted name, inside the torch model, of the module whose output is the feature maps. Default: anomalib's name
        for the frozen network.
    layers : sequence of str, optional
        Which of the feature maps to use, where the module returns several by name. Default: all of them. They are
        joined at the finest grid.
    backbone : str, optional
        A name of `ttt4as_fast.backbones.available`: take features from it, not from the model.
    backbone_weights : str, optional
        Local file of its weights.
    gate : bool
        Leave the mask of an image empty that is not labelled anomalous, default True. Before a threshold is known
        (nothing was validated) every image is marked.
    preset, percentile, neighbor_radius, n_nominal, C, loss, nominal_sampling, random_state, tol, max_iter, backend
        As in `ttt4as_fast.TTT4AS`.
    **kwargs
        As in `anomalib.post_processing.PostProcessor`. With ``enable_thresholding=False`` there is no mask.

    Raises
    ------
    ValueError, TypeError
        An option is unknown or out of range, or both `backbone` and a module of the model are asked for.

    References
    ----------
    Test Time Training for Industrial Anomaly Segmentation, CVPR workshops 2024.

    Examples
    --------
    >>> from anomalib.models import Padim
    >>> model = Padim(pre_trained=False, post_processor=TTT4ASPostProcessor(neighbor_radius=3))
    >>> model.post_processor.attach(model).neighbor_radius
    3
    """

    def __init__(
        self,
        features: str | None = None,
        layers: Sequence[str] | None = None,
        backbone: str | None = None,
        backbone_weights: str | None = None,
        gate: bool = True,
        preset: str = "paper",
        percentile: float = 99.0,
        neighbor_radius: int = 5,
        n_nominal: int = 100,
        C: float = 1e-3,
        loss: str = "squared_hinge",
        nominal_sampling: str = "grid",
        random_state: int = 0,
        tol: float = 1e-4,
        max_iter: int = 1000,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(layers, str):
            raise TypeError(f"layers: expected a sequence of names, got {layers!r}")
        if backbone is not None:
            from ..backbones import available

            kernels.arrays.check_option(backbone, "backbone", tuple(available()))
            if features is not None:
                raise ValueError(f"features: expected none beside backbone={backbone!r}, got {features!r}")
        elif backbone_weights is not None:
            raise ValueError(f"backbone_weights: expected none without a backbone, got {backbone_weights!r}")
        self.features = features
        self.layers = None if layers is None else list(layers)
        self.backbone = backbone
        self.backbone_weights = None if backbone_weights is None else str(backbone_weights)
        self.gate = bool(gate)
        self.preset = preset
        self.percentile = percentile
        self.neighbor_radius = neighbor_radius
        self.n_nominal = n_nominal
        self.C = C
        self.loss = loss
        self.nominal_sampling = nominal_sampling
        self.random_state = random_state
        self.tol = tol
        self.max_iter = max_iter
        self.backend = backend
        self._segmenter()
        self._scale: list[tuple[list[float], list[float]]] = []
        self._forget()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        own = ("features", "layers", "backbone", "backbone_weights", "gate", *_OPTIONS)
        return (*super()._checkpoint_config_keys, *own)

    def _segmenter(self) -> TTT4AS:
        """As the attributes, which a checkpoint may have set, stand now. Images labelled 1 are segmented."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return TTT4AS(image_threshold=0.5 if self.gate else None, **options)

    # ------------------------------------------------------------ features

    def attach(self, model: nn.Module) -> TTT4ASPostProcessor:
        """Take the features of `model` from now on, whenever it is run.

        Parameters
        ----------
        model : AnomalibModule or torch.nn.Module
            The model that this post-processor belongs to, or its torch model.

        Returns
        -------
        TTT4ASPostProcessor
            Itself. Attaching twice changes nothing.

        Raises
        ------
        ValueError
            There is no such module, or none is known to hold the frozen network.
        """
        inner = getattr(model, "model", model)
        source = None if self.backbone is not None else self._find_extractor(inner)
        self.detach(model)
        # Bound methods, so that a copied or unpickled model calls the post-processor that was copied with it.
        if source is not None:
            source.register_forward_hook(self._on_features)
        else:
            self._scale = list(_normalisation(getattr(model, "pre_processor", None)))
        inner.register_forward_hook(self._on_prediction)
        return self

    def detach(self, model: nn.Module) -> None:
        """Take no more features from `model`."""
        for module in model.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
        self._forget()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called by the trainer: attach to its model."""
        super().setup(trainer, pl_module, stage)
        self.attach(pl_module)

    def _find_extractor(self, inner: nn.Module) -> nn.Module:
        names = dict(inner.named_modules())
        for name in _EXTRACTORS if self.features is None else (self.features,):
            if name in names:
                return names[name]
        what = f"one of {', '.join(_EXTRACTORS)}" if self.features is None else repr(self.features)
        children = ", ".join(name for name, _ in inner.named_children())
        raise ValueError(
            f"features: expected {what} in {type(inner).__name__}, which has {children}; give features= the dotted "
            "name of the module that returns feature maps, or backbone= the name of another network"
        )

    def _on_features(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.training:
            self._features[threading.get_ident()] = output

    def _on_prediction(self, module: nn.Module, args: tuple, output: Any) -> None:
        thread = threading.get_ident()
        source = self._features.pop(thread, None)
        anomaly_map = getattr(output, "anomaly_map", None)
        if not self.training and anomaly_map is not None:
            self._predicted[thread] = (anomaly_map, args[0] if self.backbone is not None else source)

    def _forget(self) -> None:
        """Drop what forward passes have left, by thread: a pass and its post-processing are of one thread."""
        self._features: dict[int, Any] = {}
        self._predicted: dict[int, tuple[torch.Tensor, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_network"}
        return {**state, "_features": {}, "_predicted": {}}

    def _maps(self, source: Any) -> torch.Tensor:
        """(B, C, h, w) of what the hook has taken: the images for a backbone, else the network's output."""
        if self.backbone is not None:
            return self._backbone_maps(_plain(source))
        if isinstance(source, Mapping):
            unknown = set(self.layers or ()) - set(source)
            if unknown:
                raise ValueError(f"layers: expected names among {', '.join(map(str, source))}, got {min(unknown)!r}")
            source = [source[name] for name in self.layers or source]
        elif self.layers is not None:
            raise ValueError(f"layers: expected none, the feature maps of this model have no names; got {self.layers}")
        found = [source] if isinstance(source, torch.Tensor) else list(source)
        maps = [_plain(x) for x in found if isinstance(x, torch.Tensor) and x.ndim == 4]
        if not maps:
            shapes = ", ".join(str(tuple(getattr(x, "shape", ()))) for x in found)
            raise ValueError(
                f"features: expected a module that returns feature maps (B, C, h, w), got one that returns {shapes}; "
                "name another, or give backbone= the name of another network"
            )
        return join_layers(maps)

    def _backbone_maps(self, images: torch.Tensor) -> torch.Tensor:
        network = self.__dict__.get("_network")  # not registered: its weights belong into no checkpoint
        if network is None:
            from ..backbones import create_backbone

            network = create_backbone(str(self.backbone), self.layers, self.backbone_weights, images.device)
            self.__dict__["_network"] = network
        images = images.float()
        for mean, std in reversed(self._scale):
            images = images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)
        low, high = float(images.min()), float(images.max())
        if low < -0.01 or high > 1.01:
            raise ValueError(
                f"backbone: expected images in [0, 1] before the model's Normalize, got [{low:.3g}, {high:.3g}]"
            )
        # One by one: the last bits of a batched convolution may depend on the batch.
        return torch.cat([join_layers(network.to(images.device)(image[None])) for image in images.clamp(0, 1)])

    # ------------------------------------------------------------ masks

    def _pred_mask(self, predictions: Any) -> torch.Tensor | None:
        """The masks of a batch, in the shape of its map; None where the host makes none."""
        ready = self._predicted.pop(threading.get_ident(), None)
        anomaly_map, score = predictions.anomaly_map, predictions.pred_score
        if anomaly_map is None or predictions.pred_mask is not None or not self.enable_thresholding:
            return predictions.pred_mask
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "TTT4ASPostProcessor trains on each test image, which no exported graph can hold. Set post_processor "
                "of the model to anomalib's PostProcessor to export the detector, and give its map and features to "
                "ttt4as_fast.TTT4AS; or use export_type='torch'."
            )
        anomaly_map = _plain(anomaly_map)
        if ready is None or ready[1] is None:
            raise RuntimeError(
                "TTT4ASPostProcessor has no features of these predictions: call attach(model) before the model is "
                "run, with .eval(), and post-process in the same thread"
            )
        maps = anomaly_map.squeeze(1) if anomaly_map.ndim == 4 else anomaly_map
        features = self._maps(ready[1])
        if len(features) != len(maps):
            raise ValueError(
                f"features: expected a batch of {len(maps)} as the anomaly map, got shape {tuple(features.shape)}; "
                "a model with tiles gives features of tiles: give backbone= the name of another network"
            )
        if not _same_values(ready[0], anomaly_map):
            raise RuntimeError("TTT4ASPostProcessor has features of another batch: post-process each batch once run")
        score = maps.flatten(1).amax(1) if score is None else _plain(score).reshape(len(maps))
        labels = self._labels(score).to(maps.device, torch.float32) if self.gate else None
        return self._segmenter()(maps, features, labels).pred_mask.reshape(anomaly_map.shape)

    def _labels(self, score: torch.Tensor) -> torch.Tensor:
        """(B,) bool, of raw scores: the label that the host will give, so that mask and label agree."""
        if self.enable_normalization and not torch.isnan(self.image_max):
            score = self._normalize(score, self.image_min, self.image_max, self.image_threshold)
            return score > self.normalized_image_threshold.to(score.device)
        return torch.isnan(self.image_threshold) | (score > self.image_threshold)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Post-process what the model has just predicted.

        Parameters
        ----------
        predictions : InferenceBatch
            Of the last forward pass, with its raw `anomaly_map`. A `pred_mask` that is there already is kept.

        Returns
        -------
        InferenceBatch
            As the host's, but for `pred_mask`, bool.

        Raises
        ------
        RuntimeError
            The features of these predictions were not taken, or a graph is being exported.
        ValueError
            The network's output holds no feature maps, or not for each image one.
        """
        mask = self._pred_mask(predictions)
        result = super().forward(predictions)
        return result if mask is None else result._replace(pred_mask=mask)

    def post_process_batch(self, batch: Batch) -> None:
        """As `forward`, for a batch of the trainer, in place."""
        mask = self._pred_mask(batch)
        if mask is not None:
            batch.pred_mask = mask
        super().post_process_batch(batch)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """As the host's: thresholds need no mask."""
        self._forget()
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Without the subclass (`torchvision.tv_tensors`) that batches wrap tensors in, and without a gradient."""
    return x.detach().as_subclass(torch.Tensor)


def _same_values(taken: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a map given is the map taken, whole: a batch holds a view of it, or a copy of another dtype."""
    taken = _plain(taken)
    if taken.numel() != given.numel():
        return False
    if taken.data_ptr() == given.data_ptr():
        return True
    return torch.equal(taken.reshape(-1).to(given.device, given.dtype), given.reshape(-1))


def _normalisation(transform: Any) -> Iterator[tuple[list[float], list[float]]]:
    """(mean, std) of every `Normalize` in a pre-processor, in the order they are applied."""
    transform = getattr(transform, "transform", transform)
    if type(transform).__name__ == "Normalize":
        yield [float(x) for x in transform.mean], [float(x) for x in transform.std]
    for inner in getattr(transform, "transforms", ()):
        yield from _normalisation(inner)


# ---------------------------------------------------------------- weights


def load_installed_weights(model: Model) -> Model:
    """Fill the frozen network of an anomalib model with the ImageNet weights that are installed with this package.

    For machines without a network. Build the model with ``backbone="tf_efficientnet_lite0"`` and
    ``pre_trained=False``, and give it images normalised by mean 127/255 and standard deviation 128/255 a channel.

    Parameters
    ----------
    model : AnomalibModule or torch.nn.Module

    Returns
    -------
    Model
        `model` itself.

    Raises
    ------
    ValueError
        The model has no `TimmFeatureExtractor` over ``tf_efficientnet_lite0``.
    """
    from .. import backbones

    name = "efficientnet_lite0"
    networks = [
        module.feature_extractor
        for module in model.modules()
        if isinstance(module, TimmFeatureExtractor) and str(module.backbone).split(".")[0] == f"tf_{name}"
    ]
    if not networks:
        raise ValueError(f"model: expected one with backbone='tf_{name}', got {type(model).__name__} without it")
    weights = backbones._create_network(name, backbones._SPECS[name], None).state_dict()
    for network in networks:  # which end at the last layer that is asked for
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
    return model
