"""anomalib itself, fitted and run on crops of real photographs: the same PatchCore, faster."""

from __future__ import annotations

import copy
import io
from importlib import metadata

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'ttt4as_fast[anomalib]'")

import anomalib.models as host
import timm
from anomalib.models.components import KCenterGreedy
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.super_add.torch_model import SuperADDModel

from ttt4as_fast.integrations import anomalib as integration
from ttt4as_fast.integrations.anomalib import Patchcore, accelerate

from .anomalib_models import AMONG_THEMSELVES, NETWORK, SIDE, bank_model, data, engine, make, read

pytestmark = AMONG_THEMSELVES


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize("found", ["1.2.0", "2.0.0b3", "2.6.9", "3.0.0"])
def test_another_version_is_refused(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"needs anomalib >= 2\.7, < 3, and found {found}"):
        integration._check_version()


def test_no_version_is_refused(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match=r"found none: pip install 'ttt4as_fast\[anomalib\]'"):
        integration._check_version()


@pytest.mark.parametrize("found", ["2.7.0", "2.10.1.dev3"])
def test_a_later_version_is_taken(monkeypatch, found):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    integration._check_version()


# ---------------------------------------------------------------- PatchCore


def test_fit_and_test_as_anomalib(folder, tmp_path):
    """The same coreset, metrics and predictions through the engine, and checkpoints that load into either class."""
    results, models = [], {}
    for name in ("stock", "ours"):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        model, runner = make(name), engine(tmp_path / name)
        torch.manual_seed(0)
        runner.fit(model, datamodule=data(folder))
        results.append(runner.test(model, datamodule=data(folder))[0])
        models[name] = (model, runner)
    assert results[0].keys() == results[1].keys() and results[0]["image_AUROC"] > 0.6
    for metric, value in results[0].items():
        assert results[1][metric] == pytest.approx(value, abs=1e-6), metric
    (stock, stock_runner), (ours, our_runner) = models["stock"], models["ours"]
    torch.testing.assert_close(ours.model.memory_bank, stock.model.memory_bank, rtol=0, atol=0)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert dict(ours.hparams) == dict(stock.hparams) and ours.name == stock.name

    image = read(folder, "bad/000.png")
    for runner, target, reference in ((stock_runner, Patchcore, stock), (our_runner, host.Patchcore, ours)):
        loaded = target.load_from_checkpoint(runner.trainer.checkpoint_callback.best_model_path).eval()
        torch.testing.assert_close(loaded(image).pred_score, reference.eval()(image).pred_score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(image).anomaly_map, reference(image).anomaly_map, rtol=1e-3, atol=1e-3)
        assert type(loaded.model) is (integration._FastPatchcoreModel if target is Patchcore else type(stock.model))


@pytest.mark.parametrize(
    ("num_neighbors", "precision"),
    [(1, "float32"), (9, "float32"), (10_000, "float32"), (9, "float16")],  # half convolutions are slow on a CPU
)
def test_accelerate_in_place(images, num_neighbors, precision):
    model = bank_model(num_neighbors=num_neighbors, precision=precision, post_processor=False)
    expected = copy.deepcopy(model)(images)
    assert accelerate(model) is model and accelerate(model) is model
    found = model(images)
    assert found.pred_score.dtype == expected.pred_score.dtype and found.anomaly_map.shape == (3, 1, SIDE, SIDE)
    tolerance = {"float32": 1e-3, "float16": 0.2}[precision]  # anomalib's half distances cancel
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=0, atol=tolerance)


def test_search_follows_the_bank(images):
    """Every way to change a memory bank is seen by the next search."""
    model = accelerate(bank_model())
    inner = model.model
    embedding = torch.rand(5, inner.memory_bank.shape[1])

    def check():
        bank = inner.memory_bank
        expected = torch.cdist(embedding.double(), bank.double()).topk(3, largest=False)
        distances, indices = inner.nearest_neighbors(embedding.to(bank.dtype), 3)
        torch.testing.assert_close(distances.double(), expected.values, rtol=1e-2, atol=1e-4)
        assert distances.dtype == bank.dtype and torch.equal(indices[:, 0], expected.indices[:, 0])
        one, index = inner.nearest_neighbors(embedding.to(bank.dtype), 1)
        assert one.shape == index.shape == (5,) and torch.equal(index, indices[:, 0])

    check()
    prepared = inner._index()
    assert inner._index() is prepared
    inner.memory_bank = inner.memory_bank.flip(0).clone()
    check()
    inner.memory_bank.add_(0.5)
    check()
    with torch.inference_mode():
        inner.memory_bank = inner.memory_bank * 0.5
        check()
        inner.memory_bank.mul_(3)
    check()
    state = {name: value.clone() for name, value in inner.state_dict().items()}
    state["memory_bank"] = torch.rand(7, inner.memory_bank.shape[1])
    inner.load_state_dict(state)
    assert len(inner.memory_bank) == 7
    check()
    inner.memory_bank[3] = embedding[0]
    check()
    inner.double()
    check()


def test_copies_and_pickles(images):
    model = accelerate(bank_model())
    expected = model(images).anomaly_map
    stream = io.BytesIO()
    torch.save(model, stream)
    bank = model.model.memory_bank
    assert stream.tell() < 14e6 + 1.5 * bank.numel() * bank.element_size()  # the prepared bank is not saved with it
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(images).anomaly_map, expected)
        other.model.memory_bank.zero_()
        assert torch.equal(model(images).anomaly_map, expected)


class Sizes(TorchDispatchMode):
    """Records the largest tensor that any torch operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and function.__name__.split(".")[0] not in ("expand", "t", "transpose"):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("ratio", [0.01, 0.1, 1.0])
def test_coreset_is_anomalibs(ratio):
    generator = torch.Generator().manual_seed(0)
    store = [torch.randn(n, 300, generator=generator) for n in (70, 1, 129)]
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = KCenterGreedy(torch.cat(store), ratio).sample_coreset()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    assert torch.equal(integration._coreset(store, ratio), expected)


def test_coreset_is_made_in_bounded_memory():
    store = [torch.randn(100, 2000) for _ in range(10)]
    sizes = {}
    for name, run in {
        "ours": lambda: integration._coreset(store, 0.02),
        "anomalib": lambda: KCenterGreedy(torch.vstack(store), 0.02).sample_coreset(),
    }.items():
        with Sizes() as recorded:
            run()
        sizes[name] = recorded.largest
    assert sizes["anomalib"] >= 1000 * 2000  # it stacks the store
    projected = 1000 * 170  # by the Johnson-Lindenstrauss bound
    assert sizes["ours"] <= 2 * projected


def test_coreset_of_duplicates_and_errors():
    same = [torch.ones(6, 40)]
    assert integration._coreset(same, 0.5).shape == (3, 40)
    with pytest.raises(ValueError, match=r"keeps at least one of the 6 patches, got 0\.1"):
        integration._coreset(same, 0.1)
    model = accelerate(host.Patchcore(**NETWORK))
    with pytest.raises(ValueError, match="Embedding store is empty"):
        model.model.subsample_embedding(0.1)
    with pytest.raises(ValueError, match="Memory bank is empty"):
        model.eval().model(torch.zeros(1, 3, SIDE, SIDE))
    model.model.embedding_store.append(torch.rand(20, 5))
    with pytest.warns(DeprecationWarning, match="ignored"):
        model.model.subsample_embedding(0.5, torch.rand(3, 5))
    assert model.model.memory_bank.shape == (10, 5)


def test_anomaly_dino(monkeypatch, images):
    """Random weights, since those of DINO would have to be fetched; the coreset is anomalib's own."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create(name, **{**options, "pretrained": False, "img_size": 56})
    )
    banks = []
    for change in (lambda model: model, accelerate):
        torch.manual_seed(0)
        model = change(AnomalyDINOModel(encoder_name="vit_small_patch14_dinov2", coreset_subsampling=True))
        model.train()
        model(images[..., :56, :56])
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        model.fit()
        banks.append(model.memory_bank)
        assert model.eval()(images).anomaly_map.shape == (3, 1, SIDE, SIDE)
    assert len(banks[0]) == 4 and torch.equal(*banks)
    with pytest.raises(TypeError, match="coreset_subsampling=True"):
        accelerate(AnomalyDINOModel(encoder_name="vit_small_patch14_dinov2"))


def test_super_add(monkeypatch):
    """Each layer has a bank of its own; random weights, since those of DINOv3 would have to be fetched."""
    create = timm.create_model
    small = {"pretrained": False, "img_size": 48}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**options, **small}))
    torch.manual_seed(0)
    stock = SuperADDModel(
        "vit_tiny_patch16_dinov3_qkvb",
        layers=[3, 9],
        patch_size=48,
        patch_overlap=16,
        max_database_size=20,
        subsampling_iterations=1,
    )
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    stock.train()(images)
    stock.subsample_embedding()
    model = accelerate(copy.deepcopy(stock.eval()))
    assert stock.memory_bank.shape[:2] == (2, 20) and type(model) is integration._FastSuperADDModel
    for _ in range(2):
        expected, found = stock(images.flip(3)), model(images.flip(3))
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-4, atol=1e-5)
        assert len(model._prepared[2]) == 2
        for one in (stock, model):  # which the prepared search must see
            one.memory_bank[1] += 0.5
    query = torch.rand(1, 4, stock.memory_bank.shape[2])
    for other in (torch.clone, lambda layer: layer[:7]):  # no layer of the model's bank: anomalib's own search
        found, expected = (one.nearest_neighbors_chunked(query, other(one.memory_bank[0]), 2) for one in (model, stock))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_accelerate_refuses_what_is_not_sound():
    class Mine(host.Patchcore):
        pass

    class MyModel(integration.PatchcoreModel):
        def nearest_neighbors(self, embedding, n_neighbors):
            return super().nearest_neighbors(embedding, n_neighbors)

    own = host.Patchcore(**NETWORK)
    own.model.__class__ = MyModel
    other_bank = host.MHPatchcore(backbone="resnet18", pre_trained=False)
    for model in (make("Padim"), own, torch.nn.Linear(2, 2), other_bank):
        with pytest.raises(TypeError, match=r"model: expected Patchcore, AnomalyDINO or SuperADD of anomalib.* got"):
            accelerate(model)
    assert type(accelerate(Mine(**NETWORK)).model) is integration._FastPatchcoreModel


# ---------------------------------------------------------------- export
