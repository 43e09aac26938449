"""anomalib's rows of `integrations`: its PatchCore beside the same object accelerated, its masks beside TTT4AS's.

The images are crops of a photograph of bricks; EfficientNet-Lite0, whose weights come with the package, makes 28 x 28
patches of 152 channels of each at 224 pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import gate, measure, peers

if TYPE_CHECKING:
    import torch

    from .integrations import Plan, Row

_CORESET_RATIO = 0.02  # anomalib needs minutes for its default of a tenth
_MAPS_AGREE = 1e-3  # of the largest score: anomalib's distances suffer cancellation


@dataclass(frozen=True)
class _Setting:
    """A fitted model as it is and accelerated, and what they are run on."""

    stock: Any
    fast: Any
    store: list[torch.Tensor]
    images: torch.Tensor
    query: torch.Tensor


def rows(plan: Plan) -> Iterator[Row]:
    """Coreset, search, a batch from end to end, and that batch with masks of either kind.

    Parameters
    ----------
    plan : Plan
        Of `integrations`.
    """
    import torch

    with torch.no_grad():
        setting = _setting(plan)
        found = [make(setting, plan) for make in (_coreset_row, _search_row, _predict_row, _masks_row)]
    yield from found


def _setting(plan: Plan) -> _Setting:
    import torch
    from anomalib.models import Patchcore

    from ttt4as_fast.integrations.anomalib import accelerate, load_installed_weights

    network: dict[str, Any] = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"]}
    stock = load_installed_weights(Patchcore(**network, pre_trained=False, pre_processor=False))
    store = [stock.train().model(image[None]) for image in _crops("train", plan.training_images, plan)]
    images = _crops("test", plan.batch, plan)
    query = torch.cat([stock.model(image[None]) for image in images])
    stock.eval().model.embedding_store = []
    stock.model.memory_bank = torch.cat(store)[::10].clone()
    return _Setting(stock, accelerate(copy.deepcopy(stock)), store, images, query)


def _crops(area: str, n: int, plan: Plan) -> torch.Tensor:
    """Images (n, 3, side, side), normalised as the network's weights want them."""
    import torch
    import torch.nn.functional as F

    from ttt4as_fast import demo

    grey = torch.from_numpy(demo.texture_crops("brick", area, n, 192, plan.seed)).float()
    resized = F.interpolate(grey[:, None], (plan.side, plan.side), mode="bilinear")
    return ((resized - 127) / 128).expand(-1, 3, -1, -1)


def _row(operation: str, calls: tuple[str, str], functions: dict[str, Any], verdict: gate.Verdict, plan: Plan) -> Row:
    from .integrations import row

    timings = measure.by_turns(functions, plan.seconds)
    return row("anomalib", operation, calls, peers.versions("anomalib", "torch"), timings, verdict)


_ACCELERATED = ("Patchcore", "accelerate(Patchcore)")


def _coreset_row(setting: _Setting, plan: Plan) -> Row:
    functions = {
        "theirs": partial(_coreset, setting.stock.model, setting.store),
        "ours": partial(_coreset, setting.fast.model, setting.store),
    }
    verdict = gate.check_equal(functions["ours"](), functions["theirs"]())
    n, channels = sum(map(len, setting.store)), setting.store[0].shape[1]
    return _row(f"coreset, {_CORESET_RATIO:.0%} of {n} x {channels}", _ACCELERATED, functions, verdict, plan)


def _coreset(model: Any, store: list[torch.Tensor]) -> torch.Tensor:
    """The bank that a model chooses; its own stays, for the other rows."""
    import torch

    model = copy.copy(model)
    model._buffers = dict(model._buffers)
    model.embedding_store = list(store)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - which anomalib's projection draws from
    with warnings.catch_warnings(), peers.silent_bars():
        warnings.simplefilter("ignore")
        model.subsample_embedding(_CORESET_RATIO)
    return model.memory_bank


def _search_row(setting: _Setting, plan: Plan) -> Row:
    k = 9
    functions = {
        name: partial(model.model.nearest_neighbors, setting.query, k)
        for name, model in (("theirs", setting.stock), ("ours", setting.fast))
    }
    bank = setting.stock.model.memory_bank
    verdict = gate.check_knn(setting.query.numpy(), bank.numpy(), *functions["ours"]())
    operation = f"search, {len(setting.query)} patches in {len(bank)} x {bank.shape[1]}, k {k}"
    return _row(operation, _ACCELERATED, functions, verdict, plan)


def _predict_row(setting: _Setting, plan: Plan) -> Row:
    functions = {
        name: partial(model.model, setting.images)
        for name, model in (("theirs", setting.stock), ("ours", setting.fast))
    }
    maps = {name: function().anomaly_map.numpy() for name, function in functions.items()}
    verdict = gate.check_equal(maps["ours"], maps["theirs"], _MAPS_AGREE)
    return _row(f"predict, {len(setting.images)} images of {plan.side} px", _ACCELERATED, functions, verdict, plan)


def _masks_row(setting: _Setting, plan: Plan) -> Row:
    """What masks by test-time training add to a prediction, beside one threshold for all images."""
    from ttt4as_fast.integrations.anomalib import TTT4ASPostProcessor
    from ttt4as_fast.patches import join_layers

    from .integrations import check_masks

    plain, masked = (copy.deepcopy(setting.fast) for _ in range(2))
    masked.post_processor = TTT4ASPostProcessor(gate=False)
    masked.post_processor.attach(masked).eval()
    inner = setting.fast.model
    maps = inner(setting.images).anomaly_map[:, 0]
    features = join_layers(list(inner.feature_extractor(setting.images).values()))
    verdict = check_masks(maps, features, masked(setting.images).pred_mask.reshape(maps.shape))
    functions = {"theirs": partial(plain, setting.images), "ours": partial(masked, setting.images)}
    calls = ("PostProcessor, one threshold", "TTT4ASPostProcessor, a mask trained in each image")
    return _row(f"predict, {len(setting.images)} images, both accelerated", calls, functions, verdict, plan)
