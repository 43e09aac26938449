"""Masks by test-time training behind anomalib's models; `integrations.anomalib` checks the version and imports it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import nn

from ..kernels import arrays
from ..patches import join_layers
from ..segmenter import ROBUST_ONLY, TTT4AS

__all__ = ["TTT4ASPostProcessor"]

# Where anomalib's models keep the frozen network: Patchcore, PaDiM, CFA, FastFlow, ...; Reverse Distillation and CFlow;
# STFPM; CFM, whose first feature map is of the RGB image.
_EXTRACTORS = ("feature_extractor", "encoder", "teacher_model", "feature_extractors.extractors")
_OPTIONS = (
    *("preset", "percentile", "neighbor_radius", "n_nominal", "C", "loss", "nominal_sampling", "random_state"),
    *("tol", "max_iter", "backend"),
)


class _Taken(NamedTuple):
    """What a forward pass has left: its map, and what features are made of."""

    anomaly_map: torch.Tensor
    source: Any  # the network's output, or the images for a backbone
    crop: Sequence[int] | None = None  # (height, width) of the middle, where the network saw no more of the image


class TTT4ASPostProcessor(PostProcessor):
    """Masks by test-time training instead of one threshold, for any anomalib model that has a frozen network.

    The SVM is trained on each test image's raw anomaly map, before normalisation clamps its peaks, and on the features
    of the model's own network, which a forward hook takes, or of another backbone. Images whose label is normal get an
    empty mask. Scores, labels, maps and their thresholds are anomalib's. An image's mask depends on its own map,
    features and label alone.

    ``Engine.fit``, ``test`` and ``predict``, the command line and `Patchcore` of this module attach it. Where a model
    is used without them, call `attach` once; a model saved by ``export_type="torch"`` stays attached.
    `torch.export.export` keeps the method as one operator, ``ttt4as::segment``, which a process has that imports
    ``ttt4as_fast.nn``; to save such a program, export under `torch.no_grad` a wrapper that returns
    ``tuple(model(batch))``. ONNX and OpenVINO have no operator that trains: exporting to them with this post-processor
    raises. Several threads may run one model.

    ``load_from_checkpoint`` of anomalib's own classes builds anomalib's post-processor, whose masks are one threshold:
    give it ``post_processor=TTT4ASPostProcessor()``, which takes the options that the checkpoint holds. What it returns
    can be exported; ``Engine.export(ckpt_path=...)`` loads such a class by itself, without these masks.

    Parameters
    ----------
    features : str, optional
        Dotted name, inside the torch model, of the module whose output is the feature maps. Default: anomalib's name
        for the frozen network. Where a pass runs it several times, on an image in several sizes, the output with the
        finest grid is taken, the first of such.
    layers : sequence of str, optional
        Which of the feature maps to use, where the module returns several by name. Default: all of them. They are
        joined at the finest grid.
    backbone : str, optional
        A name of `ttt4as_fast.backbones.available`: take features from it, not from the model.
    backbone_weights : str, optional
        Local file of its weights.
    gate : bool
        Leave the mask of an image empty that is not labelled anomalous, default True. Before a threshold is known
        (nothing was validated) every image is marked. With ``enable_normalization=False`` anomalib labels raw scores
        by ``1 - image_sensitivity``, whatever was validated.
    preset, percentile, neighbor_radius, n_nominal, C, loss, nominal_sampling, random_state, tol, max_iter, backend
        As in `ttt4as_fast.TTT4AS`.
    robust : dict of str to value, optional
        Options that only ``preset="robust"`` has, as `ttt4as_fast.TTT4AS` takes them.
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
        robust: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
            raise TypeError(f"layers: expected a sequence of names, got {layers!r}")
        if robust is not None and not isinstance(robust, Mapping):
            raise TypeError(f"robust: expected options by name, got {robust!r}")
        for name in robust or ():
            if name not in ROBUST_ONLY:
                names = ", ".join(sorted(ROBUST_ONLY))
                raise TypeError(f"robust: expected options that only preset='robust' has ({names}), got {name!r}")
        if backbone is not None:
            from ..backbones import available

            arrays.check_option(backbone, "backbone", tuple(available()))
            if features is not None:
                raise ValueError(f"features: expected none beside backbone={backbone!r}, got {features!r}")
        elif backbone_weights is not None:
            raise ValueError(f"backbone_weights: expected none without a backbone, got {backbone_weights!r}")
        self.features = features
        self.layers = None if layers is None else list(layers)
        self.backbone = backbone
        self.backbone_weights = None if backbone_weights is None else str(backbone_weights)
        self.gate = arrays.check_bool(gate, "gate")
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
        self.robust = None if robust is None else dict(robust)
        self._segmenter()
        self._scale: list[tuple[list[float], list[float]]] = []
        self._model: weakref.ref[nn.Module] | None = None
        self._forget()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        own = ("features", "layers", "backbone", "backbone_weights", "gate", "robust", *_OPTIONS)
        return (*super()._checkpoint_config_keys, *own)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what `checkpoint_config` returned, and take the features that it names from now on."""
        super().load_checkpoint_config(config)
        self._segmenter()
        self.__dict__.pop("_network", None)
        model = self._model() if self._model is not None else None
        if model is not None:
            self.attach(model)

    def _segmenter(self) -> TTT4AS:
        """As the attributes, which a checkpoint may have set, stand now. Images labelled 1 are segmented."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return TTT4AS(image_threshold=0.5 if self.gate else None, **options, **(self.robust or {}))

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
        self._model = weakref.ref(model)
        # Bound methods, so that a copied or unpickled model calls the post-processor that was copied with it.
        if source is not None:
            inner.register_forward_pre_hook(self._on_start)
            source.register_forward_hook(self._on_features)
        else:
            pre_processor = getattr(model, "pre_processor", None)
            self._scale = list(_normalisation(getattr(pre_processor, "transform", None)))
        inner.register_forward_hook(self._on_prediction)
        return self

    def detach(self, model: nn.Module) -> None:
        """Take no more features from `model`."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]
        self._model = None
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

    def _on_start(self, module: nn.Module, args: tuple) -> None:
        self._features.pop(threading.get_ident(), None)  # of a pass that raised

    def _on_features(self, module: nn.Module, args: tuple, output: Any) -> None:
        thread = threading.get_ident()
        if not self.training and (thread not in self._features or _finest(self._features[thread]) < _finest(output)):
            self._features[thread] = output

    def _on_prediction(self, module: nn.Module, args: tuple, output: Any) -> None:
        thread = threading.get_ident()
        source = self._features.pop(thread, None)
        anomaly_map = getattr(output, "anomaly_map", None)
        if not self.training and anomaly_map is not None:
            if self.backbone is not None:
                self._predicted[thread] = _Taken(anomaly_map, args[0])
            else:
                crop = getattr(module, "crop_size", None)  # of Patchflow, a pair; a number of that name is another's
                self._predicted[thread] = _Taken(anomaly_map, source, crop if isinstance(crop, (tuple, list)) else None)

    def _forget(self) -> None:
        """Drop what forward passes have left, by thread: a pass and its post-processing are of one thread."""
        self._features: dict[int, Any] = {}
        self._predicted: dict[int, _Taken] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_network"}
        return {**state, "_model": None, "_features": {}, "_predicted": {}}

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
        maps = [_plain(x) for x in _feature_maps(found)]
        if not maps:
            shapes = ", ".join(str(tuple(getattr(x, "shape", ()))) for x in found)
            raise ValueError(
                f"features: expected a module that returns feature maps (B, C, h, w), got one that returns {shapes}; "
                "name another, or give backbone= the name of another network"
            )
        return join_layers(maps)

    def _backbone_maps(self, images: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"backbone: expected none in a model that is exported, got {self.backbone!r}, whose network is no part "
                "of the model; take the features from a module of the model (features=), or use export_type='torch'"
            )
        network = self.__dict__.get("_network")  # not registered: its weights belong into no checkpoint
        if network is None:
            from ..backbones import create_backbone

            network = create_backbone(str(self.backbone), self.layers, self.backbone_weights, images.device)
            self.__dict__["_network"] = network
        images = images.float()
        for mean, std in reversed(self._scale):
            images = images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)
        low, high = float(images.min()), float(images.max())
        if low < -0.5 or high > 1.5:  # normalised images reach from -2 to 2.6; what a bicubic resize overshoots is cut
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
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "TTT4ASPostProcessor trains an SVM on each test image, for which ONNX and OpenVINO have no operator. "
                "Export with export_type='torch' or torch.export.export, which keep it; or set the model's "
                "post_processor to anomalib's PostProcessor, whose masks are one threshold"
            )
        if ready is None or ready.source is None:
            raise RuntimeError(
                "TTT4ASPostProcessor has no features of these predictions: call attach(model) before the model is "
                "run, with .eval(), and post-process in the same thread"
            )
        same = ready.anomaly_map is anomaly_map or _same_values(ready.anomaly_map, anomaly_map)
        anomaly_map = _plain(anomaly_map)
        maps = anomaly_map.squeeze(1) if anomaly_map.ndim == 4 else anomaly_map
        features = self._maps(ready.source)
        batch = maps.shape[0]  # not its len(), which an exported graph would hold as a constant
        if features.shape[0] != batch:
            raise ValueError(
                f"features: expected a batch of {batch} as the anomaly map, got shape {tuple(features.shape)}; "
                "a model with tiles gives features of tiles: give backbone= the name of another network"
            )
        if not same:
            raise RuntimeError("TTT4ASPostProcessor has features of another batch: post-process each batch once run")
        score = maps.flatten(1).amax(1) if score is None else _plain(score).reshape(batch)
        labels = self._labels(score).to(maps.device, torch.float32) if self.gate else None
        if ready.crop is None:
            return self._segmenter()(maps, features, labels).pred_mask.reshape(anomaly_map.shape)
        # Patchflow: the network sees the middle of an image, the map is padded back.
        height, width = ready.crop
        top, left = (maps.shape[1] - height) // 2, (maps.shape[2] - width) // 2
        middle = (slice(None), slice(top, top + height), slice(left, left + width))
        mask = torch.zeros_like(maps, dtype=torch.bool)
        mask[middle] = self._segmenter()(maps[middle], features, labels).pred_mask
        return mask.reshape(anomaly_map.shape)

    def _labels(self, score: torch.Tensor) -> torch.Tensor:
        """(B,) bool, of raw scores: the label that the host will give, so that mask and label agree.

        Without a branch on a value, which no exported graph could hold.
        """
        unknown = torch.isnan(self.image_threshold)
        if self.enable_normalization:
            score = self._normalize(score, self.image_min, self.image_max, self.image_threshold)
            unknown = unknown & torch.isnan(self.image_max)
        # The host compares scores that it does not normalise with this one, too.
        return unknown | (score > self.normalized_image_threshold.to(score.device))

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
            The features of these predictions were not taken; or the model is exported to ONNX, or with a backbone.
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


def _feature_maps(output: Any) -> list[torch.Tensor]:
    """Those tensors (B, C, h, w) that a module's output is or holds."""
    if isinstance(output, torch.Tensor):
        output = [output]
    elif isinstance(output, Mapping):
        output = output.values()
    return [x for x in output if isinstance(x, torch.Tensor) and x.ndim == 4]


def _finest(output: Any) -> int:
    """Places of the finest grid among the feature maps; 0 without any."""
    return max((x.shape[2] * x.shape[3] for x in _feature_maps(output)), default=0)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Without the subclass (`torchvision.tv_tensors`) that batches wrap tensors in, and without a gradient."""
    x = x.detach()
    return x if torch.compiler.is_compiling() else x.as_subclass(torch.Tensor)  # a tracer's own subclass must stay


def _same_values(taken: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a map given is the map taken, whole: a batch holds a view of it, or a copy of another dtype."""
    taken, given = _plain(taken), _plain(given)
    if taken.numel() != given.numel():
        return False
    if taken.data_ptr() == given.data_ptr():
        return True
    return torch.equal(taken.reshape(-1).to(given.device, given.dtype), given.reshape(-1))


def _normalisation(transform: Any) -> Iterator[tuple[list[float], list[float]]]:
    """(mean, std) of every `Normalize` in a torchvision transform, in the order they are applied."""
    if type(transform).__name__ == "Normalize":
        yield [float(x) for x in transform.mean], [float(x) for x in transform.std]
    for inner in getattr(transform, "transforms", ()):
        yield from _normalisation(inner)
