"""anomalib: PatchCore on our search and coreset, and masks by test-time training behind any of its models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from .. import kernels

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
from anomalib.metrics import Evaluator  # noqa: E402
from anomalib.models import Patchcore as _Patchcore  # noqa: E402
from anomalib.models.components import SparseRandomProjection, TimmFeatureExtractor  # noqa: E402
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel  # noqa: E402
from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # noqa: E402
from anomalib.models.image.super_add.torch_model import DEFAULT_CHUNK_SIZE, SuperADDModel  # noqa: E402
from anomalib.visualization import Visualizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ._anomalib_masks import TTT4ASPostProcessor  # noqa: E402

__all__ = ["Patchcore", "TTT4ASPostProcessor", "accelerate", "load_installed_weights"]

Model = TypeVar("Model", bound=nn.Module)


# ---------------------------------------------------------------- memory banks


class _PreparedBank(nn.Module):
    """The search of a model's memory bank, prepared once, and again when the bank was replaced or written to.

    Not when it was written to through ``.data`` or its NumPy view, which torch's version counter does not see. It holds
    no further state, so that an instance of the host's class can become one.
    """

    memory_bank: torch.Tensor
    _prepared: tuple[torch.Tensor, int, dict[int, kernels.KnnIndex]] | None = None

    def _index(self, layer: int | None = None) -> kernels.KnnIndex:
        """Over the memory bank (N, C), or over one layer of it where it is (layers, N, C)."""
        bank = self.memory_bank
        if bank.is_inference():  # such a tensor does not count the writes to it
            with torch.inference_mode(False):
                bank = self.memory_bank = bank.clone()
        if self._prepared is None or self._prepared[0] is not bank or self._prepared[1] != bank._version:
            self._prepared = (bank, bank._version, {})
        indices, key = self._prepared[2], layer or 0
        if key not in indices:
            indices[key] = kernels.KnnIndex(bank if layer is None else bank[layer])
        return indices[key]

    def _searchable(self, query: Any) -> bool:
        """Not while a graph is recorded: then plain torch operations must do the work, which every exporter knows."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(query) is not torch.Tensor
        return not traced and self.memory_bank.device.type in ("cpu", "cuda")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}


class _FastPatchcoreModel(_PreparedBank, PatchcoreModel):
    """`PatchcoreModel` with our search and coreset."""

    def nearest_neighbors(self, embedding: torch.Tensor, n_neighbors: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and rows of the memory bank: (Q,) for one neighbour, (Q, k) for more, as anomalib returns them."""
        if not self._searchable(embedding):
            return super().nearest_neighbors(embedding, n_neighbors)
        found: Any = self._index().search(embedding, n_neighbors)  # tensors, as the embedding
        distances, indices = found[0].to(embedding.dtype), found[1]
        return (distances[:, 0], indices[:, 0]) if n_neighbors == 1 else (distances, indices)

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


class _FastSuperADDModel(_PreparedBank, SuperADDModel):
    """`SuperADDModel` with our search of each layer's bank."""

    def nearest_neighbors_chunked(
        self,
        features_query: torch.Tensor,
        features_key: torch.Tensor,
        knn_neighbors: int,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        normalize: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and rows (B, Q, k) of `features_key`; where that is no layer of the bank, anomalib searches."""
        layer = self._layer_of(features_key) if self._searchable(features_query) and not normalize else None
        if layer is None:
            return super().nearest_neighbors_chunked(
                features_query, features_key, knn_neighbors, chunk_size=chunk_size, normalize=normalize
            )
        found: Any = self._index(layer).search(features_query.flatten(0, 1), knn_neighbors)
        shape = (*features_query.shape[:2], knn_neighbors)
        return found[0].to(features_query.dtype).reshape(shape), found[1].reshape(shape)

    def _layer_of(self, key: torch.Tensor) -> int | None:
        """Which layer of the memory bank `key` is a view of, whole."""
        same = (layer for layer, bank in enumerate(self.memory_bank) if bank.data_ptr() == key.data_ptr())
        return next(same, None) if key.shape == self.memory_bank.shape[1:] else None


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
    SuperADDModel: _FastSuperADDModel,
}


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
    prepares anew, and the coreset by `kernels.k_center_greedy`. ``SuperADD`` gets the search of each layer's bank; its
    random subsampling stays. ``AnomalyDINO`` with ``coreset_subsampling`` gets the coreset; its search is one product
    of unit vectors, which stays. State dict, results and everything else stay as they are, but for the last bits of
    distances, which anomalib computes with cancellation. Under export, tracing and `torch.compile`, the model runs
    anomalib's own torch operations.

    torch counts no write through ``memory_bank.data`` or ``memory_bank.numpy()``, and so the search goes on in
    the bank as it was: assign ``memory_bank.clone()`` after it.

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
        The model has no memory bank to search; or replacing the search would be unsafe, because it is a subclass,
        which may override what would be replaced, or trains through the distances.
    """
    inner = getattr(model, "model", model)
    if type(inner) in _FAST.values():
        return model
    if type(inner) not in _FAST:
        known = ", ".join(cls.__name__ for cls in _FAST)
        raise TypeError(
            f"model: expected Patchcore, AnomalyDINO or SuperADD of anomalib, or their {known}, got "
            f"{type(model).__name__} over {type(inner).__name__}; what other models keep is no bank that they search "
            "for nearest neighbours outside of training, or they offer no place to replace its search"
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
    ONNX and OpenVINO export and `torch.compile` see anomalib's torch operations. The search does not notice a write
    through ``memory_bank.data``; see `accelerate`.

    Parameters
    ----------
    backbone, layers, pre_trained, coreset_sampling_ratio, num_neighbors, precision, pre_processor, post_processor, \
evaluator, visualizer
        As in `anomalib.models.Patchcore`. A `TTT4ASPostProcessor` is attached at once. A checkpoint of a model that had
        one puts it, with its options, in the place of the default post-processor: in `load_from_checkpoint` and by
        ``ckpt_path`` of the engine. One that was given stays, and takes those of the options that it has.

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
        if post_processor is True:
            self.__dict__["_default_post_processor"] = self.post_processor  # not registered a second time
        if isinstance(self.post_processor, TTT4ASPostProcessor):
            self.post_processor.attach(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As anomalib's, which builds the default post-processor and would leave ours, and its masks, behind."""
        former, config = self.post_processor, checkpoint.get("anomalib_post_processor_config") or {}
        if former is not None and former is self.__dict__.get("_default_post_processor") and "n_nominal" in config:
            self.post_processor = TTT4ASPostProcessor().attach(self)  # anomalib restores its options now
            trainer: Any = self._trainer
            if trainer is not None:  # which has asked for the callbacks before
                trainer.callbacks = [self.post_processor if one is former else one for one in trainer.callbacks]
        super().on_load_checkpoint(checkpoint)


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
    weights = backbones.create_network(name).state_dict()
    for network in networks:  # which end at the last layer that is asked for
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
    return model
