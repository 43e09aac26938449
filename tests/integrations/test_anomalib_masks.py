"""Our masks behind anomalib's models, fitted and run by anomalib on crops of real photographs."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path

import pytest
import torch

import ttt4as_fast as ttt
from ttt4as_fast.patches import join_layers

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'ttt4as_fast[anomalib]'")

import anomalib.models as host
import timm
from anomalib.data import DepthBatch, ImageBatch, InferenceBatch
from anomalib.deploy import TorchInferencer
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.patchflow.torch_model import PatchflowModel
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from ttt4as_fast.integrations._anomalib_masks import _Taken
from ttt4as_fast.integrations.anomalib import Patchcore, TTT4ASPostProcessor, load_installed_weights

from .anomalib_models import (
    AMONG_THEMSELVES,
    LITE0,
    NETWORK,
    SIDE,
    bank_model,
    data,
    engine,
    fitted,
    make,
    predict,
    read,
)

pytestmark = AMONG_THEMSELVES


def features_of(model, inputs: torch.Tensor) -> torch.Tensor:
    """The maps of the frozen network, joined; without the post-processor's hooks."""
    network = model.model.encoder if hasattr(model.model, "encoder") else model.model.feature_extractor
    return join_layers(list(copy.deepcopy(network)(inputs).values()))


@pytest.mark.parametrize("name", ["ours", "stock", "Padim", "ReverseDistillation"])
def test_masks_are_those_of_the_method(folder, name):
    """The engine gives what `TTT4AS` makes of the raw map and the features, gated by the label."""
    model, runner = fitted(name, folder)
    found = predict(model, runner, folder)
    labels = []
    for path, prediction in found.items():
        inputs = model.pre_processor(read(folder, path))
        raw = model.model(inputs)
        reference = ttt.TTT4AS()(raw.anomaly_map.detach()[:, 0], features_of(model, inputs).detach())
        labels.append(bool(prediction["pred_label"]))
        mask = prediction["pred_mask"]
        assert mask.dtype == torch.bool and mask.shape == (SIDE, SIDE)
        if not labels[-1]:
            assert not mask.any()
        else:
            assert (mask != reference.pred_mask[0]).float().mean() < 0.002
            # The random features of Reverse Distillation may tell nothing apart in an image.
            assert name == "ReverseDistillation" or (mask.any() and not mask.all())
            # the clamped map has lost its peaks: what is left of it gives another mask
            assert float(prediction["anomaly_map"].max()) <= 1.0
    assert any(labels)
    for batch_size in (1, 10):
        other = predict(model, runner, folder, batch_size)
        compared = 0
        for path, prediction in found.items():
            # The network's last bits may depend on the batch, and anomalib's threshold is the very score of an image.
            if other[path]["pred_label"] == prediction["pred_label"]:
                difference = (other[path]["pred_mask"] != prediction["pred_mask"]).float().mean()
                assert difference < 0.002, (path, batch_size)
                compared += 1
        assert compared >= 9


def test_same_map_and_features_same_mask_in_any_batch(folder):
    """To the bit, alone or in a batch."""
    model, _ = fitted("ours", folder)
    post = model.post_processor
    inputs = torch.cat([model.pre_processor(read(folder, f"bad/{i:03}.png")) for i in range(5)])
    raw = model.model(inputs)
    together = post(raw).pred_mask
    features = model.model.feature_extractor(inputs)
    labels = post(InferenceBatch(*_rerun(model, inputs))).pred_label
    assert labels.any()
    for i in range(5):
        one = InferenceBatch(pred_score=raw.pred_score[i : i + 1], anomaly_map=raw.anomaly_map[i : i + 1])
        post._predicted[threading.get_ident()] = _Taken(one.anomaly_map, {k: v[i : i + 1] for k, v in features.items()})
        assert torch.equal(post(one).pred_mask[0], together[i])
        assert together[i].any() == labels[i]


def _rerun(model, inputs):
    raw = model.model(inputs)
    return raw.pred_score, None, raw.anomaly_map


def test_scores_labels_and_maps_are_anomalibs(folder):
    model, runner = fitted("Padim", folder)
    found = predict(model, runner, folder)
    stock = copy.deepcopy(model)
    stock.post_processor.detach(stock)
    assert not any(module._forward_hooks for module in stock.modules())
    plain = PostProcessor()
    plain.load_state_dict(stock.post_processor.state_dict())
    stock.post_processor = plain
    for path, prediction in predict(stock, engine(folder / "stock"), folder).items():
        for name in ("pred_label", "pred_score", "anomaly_map"):
            assert torch.equal(prediction[name], found[path][name]), name
    assert (
        sum(
            int((p["pred_mask"] != found[path]["pred_mask"]).any())
            for path, p in predict(stock, engine(folder / "stock"), folder).items()
        )
        > 0
    )


def test_torch_inferencer(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # anomalib's consent to unpickle a file that this test has written
    model, runner = fitted("ours", folder)
    found = predict(model, runner, folder, 1)
    inferencer = TorchInferencer(runner.export(model, "torch", export_root=tmp_path), device="cpu")
    assert inferencer.model.post_processor is not model.post_processor
    for path, prediction in found.items():
        mask = inferencer.predict(folder / path).pred_mask
        assert torch.equal(mask[0].as_subclass(torch.Tensor), prediction["pred_mask"].as_subclass(torch.Tensor))
    assert not model.post_processor._predicted and not inferencer.model.post_processor._predicted

    expected = {path: prediction["pred_mask"].as_subclass(torch.Tensor) for path, prediction in found.items()}
    wrong = []

    def work(names):
        for path in names:
            mask = inferencer.predict(folder / path).pred_mask[0].as_subclass(torch.Tensor)
            if not torch.equal(mask, expected[path]):
                wrong.append(path)

    paths = list(expected)
    threads = [threading.Thread(target=work, args=(paths[i:] + paths[:i],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not inferencer.model.post_processor._predicted


def test_cfm(monkeypatch, tmp_path):
    """Two modalities, through the engine: the mask is made with the features of the RGB image."""
    create = timm.create_model
    monkeypatch.setattr(  # DINO's weights would have to be fetched, and 224 pixels would take a minute
        timm,
        "create_model",
        lambda **options: create(**{**options, "pretrained": False, "img_size": SIDE}),
    )
    weights = tmp_path / "pointmae.pth"
    torch.save({"base_model": {}}, weights)  # no layer: the points' network stays at its random weights
    torch.manual_seed(0)
    post = TTT4ASPostProcessor()
    model = host.CFM(
        group_size=8,
        num_group=16,
        pointmae_weights=weights,
        post_processor=post,
        evaluator=False,
        visualizer=False,
        pre_processor=PreProcessor(transform=Resize((SIDE, SIDE))),
    )
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    points = torch.rand(1, 3, SIDE, SIDE, generator=generator) + 0.1
    runner = engine(tmp_path, max_epochs=1)

    def batches():
        batch = DepthBatch(image=image.clone(), depth_map=points.clone(), gt_label=torch.tensor([0]))
        return torch.utils.data.DataLoader([batch], batch_size=None)

    (found,) = runner.predict(model, dataloaders=batches(), return_predictions=True)
    with torch.no_grad():
        rgb = model.eval().model.feature_extractors.extractors.forward_rgb_features(image)
    # Its choice of points is random: the map is the engine's, which has no statistics yet to normalise it by.
    expected = ttt.TTT4AS()(found.anomaly_map.as_subclass(torch.Tensor), rgb)
    assert rgb.shape == (1, 768, 8, 8)
    assert torch.equal(found.pred_mask.as_subclass(torch.Tensor), expected.pred_mask) and expected.pred_mask.any()


class Pyramid(torch.nn.Module):
    """Runs its network on an image in several sizes, as Patchflow does, and on one of them twice."""

    def __init__(self):
        super().__init__()
        self.feature_extractor = torch.nn.Conv2d(3, 8, 4, 4)
        self.crop_size = 48  # which is none of its forward pass
        self.seen = []

    def forward(self, images):
        sizes = [torch.nn.functional.interpolate(images, scale_factor=scale) for scale in (0.5, 1, 0.25)]
        self.seen = [self.feature_extractor(x) for x in (*sizes, sizes[1].flip(3))]
        if len(images) == 1:
            raise RuntimeError("a pass that fails")
        return InferenceBatch(pred_score=images.flatten(1).amax(1), anomaly_map=images.mean(1))


def test_the_finest_features_of_a_pass():
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(3, 3, 9, 9), (SIDE, SIDE), mode="bilinear")
    model = Pyramid().eval()
    post = TTT4ASPostProcessor(C=1e3).attach(model).eval()
    with torch.no_grad():
        for some in (images, images[..., :32, :32]):  # the second after a pass that failed with a finer grid
            raw = model(some)
            masks = [ttt.TTT4AS(C=1e3)(raw.anomaly_map, features).pred_mask for features in model.seen]
            assert torch.equal(post(raw).pred_mask, masks[1])
            assert not any(torch.equal(masks[1], masks[i]) for i in (0, 2, 3))
            with pytest.raises(RuntimeError, match="a pass that fails"):
                model(images[:1])
    post.detach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_that_sees_the_middle_of_an_image():
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 9, 9), (97, 80), mode="bilinear")
    model = PatchflowModel((97, 80), "resnet18", pre_trained=False, crop_size=(64, 48)).eval()
    post = TTT4ASPostProcessor().attach(model).eval()
    with torch.no_grad():
        raw = model(images)
        found = post(raw).pred_mask
        middle = (..., slice(16, 80), slice(16, 64))
        features = join_layers(list(model.feature_extractor(images[middle]).values()))
    assert raw.anomaly_map.shape == (2, 1, 97, 80) and features.shape == (2, 896, 8, 6)
    outside = torch.ones(97, 80, dtype=torch.bool)
    outside[middle] = False
    assert (raw.anomaly_map[..., outside] == -1).all() and not found[..., outside].any()
    expected = ttt.TTT4AS()(raw.anomaly_map[middle][:, 0], features).pred_mask
    assert torch.equal(found[middle][:, 0], expected) and expected.any((1, 2)).all()


def test_features_of_a_backbone(folder):
    """The images that reach it are those in the file, whatever the model has normalised them by."""
    model = bank_model(Patchcore, post_processor=TTT4ASPostProcessor(backbone="efficientnet_lite0"))  # ImageNet's mean
    names = ("bad/000.png", "good_test/001.png", "bad/002.png")
    images = torch.cat([read(folder, name) for name in names])
    found = model(images).pred_mask
    raw = model.model(model.pre_processor(images)).anomaly_map[:, 0]
    network = ttt.backbones.create_backbone("efficientnet_lite0", device="cpu")
    for i, image in enumerate(images):
        features = join_layers(network(image[None]))
        expected = ttt.TTT4AS()(raw[i : i + 1], features)
        assert (found[i, 0] != expected.pred_mask[0]).float().mean() < 0.002 and found[i].any()
    assert not any("network" in name for name in model.state_dict())
    other = copy.deepcopy(model)
    assert torch.equal(other(images).pred_mask, found)
    with pytest.raises(ValueError, match=r"backbone: expected images in \[0, 1\] before the model's Normalize"):
        model(3 * images)


def test_a_backbone_takes_what_a_bicubic_resize_overshoots():
    board = torch.kron(torch.eye(2).repeat(6, 6), torch.ones(8, 8))[None, None].expand(1, 3, -1, -1).clone()
    resize = Resize((SIDE, SIDE), interpolation=InterpolationMode.BICUBIC)
    assert resize(board).max() > 1.05 and resize(board).min() < -0.05
    model = bank_model(Patchcore, post_processor=TTT4ASPostProcessor(backbone="efficientnet_lite0"))
    model.pre_processor = PreProcessor(transform=Compose([resize, Normalize(**LITE0)]))
    model.post_processor.attach(model)
    found = model(board).pred_mask
    raw = model.model(model.pre_processor(board)).anomaly_map[:, 0]
    network = ttt.backbones.create_backbone("efficientnet_lite0", device="cpu")
    expected = ttt.TTT4AS()(raw, join_layers(network(resize(board).clamp(0, 1))))
    different = (found[0, 0] != expected.pred_mask[0]).float().mean()
    assert found.any() and different < 0.01  # what repeats in the image all but ties


def test_checkpoints_restore_the_configuration(folder, tmp_path):
    options = {"neighbor_radius": 2, "n_nominal": 37, "layers": ["blocks.4"], "gate": False, "image_sensitivity": 0.6}
    model = make("ours", post_processor=TTT4ASPostProcessor(**options))
    runner = engine(tmp_path)
    runner.fit(model, datamodule=data(folder))
    path = runner.trainer.checkpoint_callback.best_model_path
    loaded = Patchcore.load_from_checkpoint(path, post_processor=TTT4ASPostProcessor()).eval()
    for name, value in options.items():
        assert getattr(loaded.post_processor, name) == value
    image = read(folder, "bad/001.png")
    expected = model.eval()(image)
    found = loaded(image)
    assert torch.equal(found.pred_mask, expected.pred_mask) and expected.pred_mask.any()

    config = TTT4ASPostProcessor(backbone="efficientnet_lite0").checkpoint_config()
    loaded.post_processor.load_checkpoint_config(config)  # takes its features elsewhere now
    other = make("ours", post_processor=TTT4ASPostProcessor(backbone="efficientnet_lite0"))
    other.load_state_dict(loaded.state_dict())
    assert torch.equal(loaded(image).pred_mask, other.eval()(image).pred_mask)


def test_a_checkpoint_brings_the_masks_along(folder, tmp_path):
    """Into the default post-processor's place, wherever a checkpoint is loaded; one that was given stays."""
    options = {"neighbor_radius": 2, "layers": ["blocks.4"], "gate": False, "image_sensitivity": 0.6}
    model = make("ours", post_processor=TTT4ASPostProcessor(**options))
    runner = engine(tmp_path)
    runner.fit(model, datamodule=data(folder))
    path = runner.trainer.checkpoint_callback.best_model_path
    image = read(folder, "bad/001.png")
    expected = model.eval()(image)
    exported = runner.export(make("ours"), "torch", export_root=tmp_path, ckpt_path=path)
    for loaded in (Patchcore.load_from_checkpoint(path), torch.load(exported, weights_only=False)["model"]):
        post = loaded.post_processor
        assert type(post) is TTT4ASPostProcessor and {name: getattr(post, name) for name in options} == options
        assert torch.equal(loaded.eval()(image).pred_mask, expected.pred_mask)

    live, fresh = copy.deepcopy(make("ours")), engine(tmp_path / "fresh")
    found = fresh.predict(live, datamodule=data(folder), ckpt_path=path, return_predictions=True)
    assert sum(isinstance(one, PostProcessor) for one in fresh.trainer.callbacks) == 1  # maps are normalised once
    masks = predict(model, runner, folder)
    for batch in found:
        for name, mask in zip(batch.image_path, batch.pred_mask, strict=True):
            assert torch.equal(
                torch.as_tensor(mask), torch.as_tensor(masks["/".join(Path(name).parts[-2:])]["pred_mask"])
            )

    given = PostProcessor()
    kept = Patchcore.load_from_checkpoint(path, post_processor=given)
    assert kept.post_processor is given and given.image_sensitivity == 0.6
    live = make("ours")
    live.post_processor = given
    live.on_load_checkpoint({"anomalib_post_processor_config": model.post_processor.checkpoint_config()})
    assert live.post_processor is given
    live = make("ours", post_processor=False)
    live.on_load_checkpoint({"anomalib_post_processor_config": model.post_processor.checkpoint_config()})
    assert live.post_processor is None


def test_gate_follows_the_label(folder):
    model = copy.deepcopy(fitted("ours", folder)[0])
    post = model.post_processor
    images = torch.cat([read(folder, f"{kind}/{i:03}.png") for kind in ("bad", "good_test") for i in range(5)])
    found = model(images)
    assert torch.equal(found.pred_mask.flatten(1).any(1), found.pred_label) and 0 < found.pred_label.sum() < 10
    for sensitivity in (0.0, 0.3, 0.7, 1.0):
        post.image_sensitivity = sensitivity
        found = model(images)
        assert torch.equal(found.pred_mask.flatten(1).any(1), found.pred_label)
    post.image_sensitivity, post.gate = 0.5, False
    assert model(images).pred_mask.flatten(1).any(1).all()
    post.gate, post.enable_normalization = True, False
    found = model(images)  # whose raw scores are far above 1 - sensitivity
    assert found.pred_label.all() and found.pred_mask.flatten(1).any(1).all()
    raw = model.model(model.pre_processor(images)).pred_score
    post._forget()
    post.image_sensitivity = 1 - float(raw.median())
    found = model(images)
    assert torch.equal(found.pred_mask.flatten(1).any(1), found.pred_label) and 0 < found.pred_label.sum() < 10
    post._image_threshold.fill_(math.nan)
    post._pixel_threshold.fill_(math.nan)
    assert model(images).pred_mask.flatten(1).any(1).all()


def test_a_mask_that_is_there_is_kept(folder):
    model, _ = fitted("Padim", folder)
    post = copy.deepcopy(model).post_processor
    mask = torch.eye(SIDE, dtype=torch.bool)[None]
    maps, score = torch.rand(1, SIDE, SIDE), torch.rand(1)
    assert torch.equal(post(InferenceBatch(pred_score=score, anomaly_map=maps, pred_mask=mask)).pred_mask, mask)
    batch = ImageBatch(image=torch.rand(1, 3, SIDE, SIDE), pred_score=score, anomaly_map=maps, pred_mask=mask)
    post.post_process_batch(batch)
    assert torch.equal(batch.pred_mask.as_subclass(torch.Tensor), mask)
    post.enable_thresholding = False
    result = post(InferenceBatch(pred_score=score, anomaly_map=maps))
    assert result.pred_mask is None and result.pred_label is None


def test_misuse_is_named(folder, monkeypatch):
    model, _ = fitted("Padim", folder)
    post = copy.deepcopy(model).post_processor
    maps = InferenceBatch(pred_score=torch.rand(1), anomaly_map=torch.rand(1, SIDE, SIDE))
    with pytest.raises(RuntimeError, match=r"no features of these predictions: call attach\(model\)"):
        post(maps)
    twin = copy.deepcopy(model)
    twin.model(torch.rand(1, 3, SIDE, SIDE))
    with pytest.raises(RuntimeError, match="features of another batch"):
        twin.post_processor(maps)
    with pytest.raises(ValueError, match="expected 'nothing' in PadimModel, which has feature_extractor"):
        TTT4ASPostProcessor(features="nothing").attach(model)
    with pytest.raises(ValueError, match=r"expected one of feature_extractor, encoder.* in Linear"):
        TTT4ASPostProcessor().attach(torch.nn.Linear(2, 2))
    twin.post_processor.layers = ["blocks.9"]
    with pytest.raises(ValueError, match=r"layers: expected names among blocks.2, blocks.4, got 'blocks.9'"):
        twin(torch.rand(1, 3, SIDE, SIDE))
    pooled = make("Padim", post_processor=TTT4ASPostProcessor(features="anomaly_map_generator"))
    pooled.post_processor.attach(pooled)
    pooled.model.gaussian = copy.deepcopy(model.model.gaussian)
    assert pooled.eval()(torch.rand(1, 3, SIDE, SIDE)).pred_mask.any()  # a map is a feature map of one channel
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create(name, **{**options, "pretrained": False, "img_size": 56})
    )
    dino = AnomalyDINOModel(encoder_name="vit_small_patch14_dinov2").train()
    dino(torch.rand(1, 3, 56, 56))
    dino.fit()
    tokens = TTT4ASPostProcessor(features="feature_encoder").attach(dino).eval()
    with pytest.raises(ValueError, match=r"expected a module that returns feature maps .*\(1, 16, 384\)"):
        tokens(dino.eval()(torch.rand(1, 3, 56, 56)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"percentile": 101}, ValueError, "percentile: expected"),
        ({"loss": "l1"}, ValueError, "loss: expected"),
        ({"preset": "best"}, ValueError, "preset: expected"),
        ({"robust": {"n_core": 9}}, ValueError, "n_core: not an option of the preset 'paper'"),
        ({"preset": "robust", "neighbor_radius": 3}, ValueError, "neighbor_radius: not an option"),
        ({"backbone": "vgg"}, ValueError, "backbone: expected one of"),
        ({"backbone": "efficientnet_lite0", "features": "encoder"}, ValueError, "features: expected none beside"),
        ({"backbone_weights": "x.pth"}, ValueError, "backbone_weights: expected none without a backbone"),
        ({"layers": "layer2"}, TypeError, "layers: expected a sequence"),
        ({"layers": 5}, TypeError, "layers: expected a sequence of names, got 5"),
        ({"gate": "no"}, TypeError, "gate: expected a bool, got 'no'"),
        ({"robust": 5}, TypeError, "robust: expected options by name, got 5"),
        ({"preset": "robust", "robust": {"percentile": 5}}, TypeError, r"robust: expected .*core.* got 'percentile'"),
        ({"preset": "robust", "robust": {"image_threshold": 1}}, TypeError, r"robust: .* got 'image_threshold'"),
        ({"preset": "robust", "robust": {"n_cores": 5}}, TypeError, r"robust: .* got 'n_cores'"),
        ({"backend": "abacus"}, ValueError, "backend: expected one of 'auto', 'gpu', 'cpu', 'reference', got 'abacus'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        TTT4ASPostProcessor(**options)


def test_the_robust_preset(folder):
    model = copy.deepcopy(fitted("ours", folder)[0])
    post = TTT4ASPostProcessor(preset="robust", robust={"n_core": 40}, gate=False).attach(model).eval()
    inputs = model.pre_processor(read(folder, "bad/000.png"))
    raw = model.model(inputs)
    found = post(raw).pred_mask
    expected = ttt.TTT4AS(preset="robust", n_core=40)(raw.anomaly_map[:, 0], features_of(model, inputs))
    assert torch.equal(found[:, 0], expected.pred_mask) and expected.pred_mask.any()
    other = TTT4ASPostProcessor()
    other.load_checkpoint_config(post.checkpoint_config())
    assert repr(other._segmenter()) == repr(post._segmenter())


def test_attaching_again_and_elsewhere(folder, images):
    model = bank_model(Patchcore, post_processor=TTT4ASPostProcessor())
    for _ in range(3):
        model.post_processor.attach(model)
    assert len(model.model._forward_hooks) == len(model.model.feature_extractor._forward_hooks) == 1
    expected = model(images).pred_mask
    other = copy.deepcopy(model)
    assert next(iter(other.model._forward_hooks.values())).__self__ is other.post_processor
    assert torch.equal(other(images).pred_mask, expected)
    model.train()
    model.model(images)
    assert not model.post_processor._features and not model.post_processor._predicted  # training leaves nothing behind
    with pytest.raises(ValueError, match="expected one with backbone='tf_efficientnet_lite0'"):
        load_installed_weights(make("ReverseDistillation"))


def test_command_line(folder, tmp_path):
    """`anomalib train` and `predict` with class paths in a configuration file."""
    yaml = pytest.importorskip("yaml")
    from anomalib.cli import AnomalibCLI

    module = "ttt4as_fast.integrations.anomalib"
    normalize = {"class_path": "torchvision.transforms.v2.Normalize", "init_args": LITE0}
    config = {
        "model": {
            "class_path": f"{module}.Patchcore",
            "init_args": {
                **NETWORK,
                "post_processor": {
                    "class_path": f"{module}.TTT4ASPostProcessor",
                    "init_args": {"neighbor_radius": 3, "layers": ["blocks.4"], "image_sensitivity": 0.6},
                },
                "pre_processor": {
                    "class_path": "anomalib.pre_processing.PreProcessor",
                    "init_args": {"transform": normalize},
                },
            },
        },
        "data": {
            "class_path": "anomalib.data.Folder",
            "init_args": {
                "name": "brick",
                "root": str(folder),
                "normal_dir": "good",
                "normal_test_dir": "good_test",
                "abnormal_dir": "bad",
                "mask_dir": "masks",
                "num_workers": 0,
                "val_split_mode": "same_as_test",
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
        "default_root_dir": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = AnomalibCLI(args=["fit", "--config", str(tmp_path / "config.yaml")])
    post = cli.model.post_processor
    assert type(cli.model) is Patchcore and type(post) is TTT4ASPostProcessor
    assert post.neighbor_radius == 3 and post.layers == ["blocks.4"] and post.image_sensitivity == 0.6
    assert not torch.isnan(post.image_threshold)
    (batch, *_) = cli.engine.predict(cli.model, datamodule=data(folder), return_predictions=True)
    assert torch.equal(batch.pred_mask.flatten(1).any(1).as_subclass(torch.Tensor), batch.pred_label)


def test_a_post_processor_of_no_model():
    batch = InferenceBatch(pred_score=torch.ones(1), anomaly_map=torch.rand(1, 8, 8))
    with pytest.raises(RuntimeError, match="no features of these predictions"):
        TTT4ASPostProcessor()(batch)
