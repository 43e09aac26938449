"""PatchCore against a plain statement of it; what it accepts, refuses, and how much memory it takes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.random_projection import SparseRandomProjection

from ttt4as_fast.backbones import create_backbone
from ttt4as_fast.baselines import NominalStatistics
from ttt4as_fast.images import ImageError
from ttt4as_fast.kernels import k_center_greedy
from ttt4as_fast.patchcore import PatchCore
from ttt4as_fast.patches import MapMaker, patches_per_image, project, reweight, standardize

from .small_patchcore import CROP, SIZE, arrays, assert_equal, defective, fitted, resnet, small, textures, write_all


@pytest.fixture(scope="module")
def model() -> PatchCore:
    return fitted()


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return defective()


@pytest.fixture
def folder(tmp_path: Path, queries: torch.Tensor) -> Path:
    return write_all(tmp_path / "images", queries)


# ---------------------------------------------------------------------------------------------------------------------
# what it computes


def plain_layers(images: torch.Tensor) -> list[torch.Tensor]:
    cut = (SIZE - CROP) // 2
    return create_backbone("efficientnet_lite0", device="cpu")(images[:, :, cut:-cut, cut:-cut])


def plain_patches(images: torch.Tensor) -> np.ndarray:
    """(N, h, w, C): the mean of nine neighbours by adding nine shifted copies, the coarser layer upsampled, joined."""
    means = []
    for x in plain_layers(images):
        padded = F.pad(x.double(), (1, 1, 1, 1))
        height, width = x.shape[2:]
        shifts = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        means.append(sum(shifts) / 9)
    means[1] = F.interpolate(means[1], means[0].shape[2:], mode="bilinear", align_corners=False)
    return torch.cat(means, 1).permute(0, 2, 3, 1).numpy()


def test_prediction_against_a_plain_statement(model, queries):
    found = model.predict(queries)
    fine, coarse = plain_layers(queries)
    expected = torch.cat([fine, F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)], 1)
    assert found.features.shape == (5, 152, 8, 8) and found.features.dtype == torch.float32
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-4)

    bank = model.memory_bank_.astype(np.float64)
    for i, patches in enumerate(plain_patches(queries)):
        distances = np.sqrt(((patches[:, :, None] - bank) ** 2).sum(-1))
        scores = distances.min(-1)
        upsampled = F.interpolate(torch.from_numpy(scores)[None, None], (CROP, CROP), mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(found.anomaly_map[i], gaussian_filter(upsampled, 4.0), rtol=1e-4)

        row, column = np.unravel_index(scores.argmax(), scores.shape)
        nearest = bank[distances[row, column].argmin()]
        support = np.argsort(np.sqrt(((bank - nearest) ** 2).sum(-1)))[:9]
        weights = torch.softmax(torch.from_numpy(distances[row, column, support]), 0)
        assert found.pred_score[i].item() == pytest.approx((1 - weights[0].item()) * scores.max(), rel=1e-4)


def test_bank_is_the_k_center_coreset_of_the_patches(model):
    patches = plain_patches(textures(8, 0)).reshape(-1, 152)
    assert model.memory_bank_.shape == (int(0.1 * 8 * 64), 152) and model.memory_bank_.dtype == np.float32
    own = [int(((patches - row) ** 2).sum(1).argmin()) for row in model.memory_bank_]
    np.testing.assert_allclose(patches[own], model.memory_bank_, rtol=1e-4, atol=1e-4)
    # 512 patches ask for 154 dimensions, more than the 152: the choice is made among the patches themselves.
    np.testing.assert_array_equal(k_center_greedy(patches.astype(np.float32), len(own), own[0]), own)


def test_training_image_scores_nothing_with_the_whole_bank():
    x = textures(2, 0)
    found = small(coreset_ratio=1.0, blur_sigma=0, n_neighbors=1).fit(x).predict(x)
    assert float(found.anomaly_map.max()) == 0 and float(found.pred_score.max()) == 0


def test_defect_stands_out(model, queries):
    found = model.predict(queries)
    assert found.pred_score.argmax() == 0 and found.pred_score[0] >= model.image_threshold_
    row, column = divmod(int(found.anomaly_map[0].argmax()), CROP)
    assert 16 <= row < 36 and 16 <= column < 36  # the defect less the offset of the crop


def test_projection_is_that_of_scikit_learn():
    wide = np.random.default_rng(0).standard_normal((9000, 300)).astype(np.float32)
    assert (9000 > 8192) and project(wide, 3).dtype == np.float32
    expected = SparseRandomProjection(eps=0.9, dense_output=True, random_state=3).fit_transform(wide)
    assert expected.shape[1] < 300
    np.testing.assert_allclose(project(wide, 3), expected, rtol=1e-5, atol=1e-5)
    narrow = wide[:, :152]
    assert project(narrow, 3) is narrow


def test_wide_features_go_through_the_projection(tmp_path):
    """ResNet-18's 384 channels: the picks are those among the projected patches."""
    path = resnet(tmp_path, seed=0)
    x = textures(6, 0)
    model = small(backbone="resnet18", weights=path, coreset_ratio=0.05, random_state=5).fit(x)
    everything = small(backbone="resnet18", weights=path, coreset_ratio=1.0).fit(x).memory_bank_
    points = SparseRandomProjection(eps=0.9, dense_output=True, random_state=5).fit_transform(everything)
    assert points.shape[1] < everything.shape[1] == 384
    start = int(np.flatnonzero((everything == model.memory_bank_[0]).all(1))[0])
    np.testing.assert_array_equal(everything[k_center_greedy(points, 19, start)], model.memory_bank_)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_reweighting_is_one_less_a_softmax(scale):
    rng = np.random.default_rng(0)
    support, patch = scale * rng.standard_normal((9, 20)), scale * rng.standard_normal(20)
    distances = np.sqrt(((support - patch) ** 2).sum(1))
    expected = (1 - torch.softmax(torch.from_numpy(distances), 0)[0].item()) * distances[0]
    assert reweight(distances[0], patch, support) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_reweighting_with_duplicates_of_the_entry():
    entry, patch = np.zeros(4), np.ones(4)
    assert reweight(2.0, patch, np.stack([entry] * 4)) == pytest.approx(2.0 * 3 / 4)


def test_one_neighbour_leaves_the_largest_distance(queries):
    model = small(n_neighbors=1, blur_sigma=0, coreset_ratio=0.5).fit(textures(2, 0))
    patches = plain_patches(queries).reshape(5, -1, 1, 152)
    expected = np.sqrt(((patches - model.memory_bank_.astype(np.float64)) ** 2).sum(-1)).min(-1).max(-1)
    np.testing.assert_allclose(model.predict(queries).pred_score, expected, rtol=1e-4)


def test_fewer_bank_entries_than_neighbours(queries):
    model = small(n_neighbors=50, coreset_ratio=0.05).fit(textures(1, 0))
    assert len(model.memory_bank_) == 3
    assert torch.isfinite(model.predict(queries).pred_score).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 13), (28, 28)])
@pytest.mark.parametrize(("size", "sigma"), [(31, 4.0), (64, 0.0), (64, 1.5), (8, 40.0)])
def test_map_against_interpolate_and_scipy(shape, size, sigma):
    scores = np.random.default_rng(0).random(shape)
    expected = F.interpolate(torch.from_numpy(scores)[None, None], (size, size), mode="bilinear")[0, 0].numpy()
    expected = gaussian_filter(expected, sigma, mode="reflect", truncate=4.0) if sigma else expected
    maker = MapMaker(size, sigma)
    found = maker(scores)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    both = maker.of_batch(torch.from_numpy(np.stack([scores, -2 * scores])))
    assert both.dtype == torch.float32 and both.shape == (2, size, size)
    np.testing.assert_allclose(both, np.stack([expected, -2 * expected]), rtol=1e-6)


def test_standardised_patches():
    x = textures(4, 0)
    bank = small(coreset_ratio=1.0, standardize=True).fit(x).memory_bank_
    np.testing.assert_allclose(bank.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(bank.std(0), 1, atol=1e-3)


def test_standardised_prediction_measures_in_deviations(queries):
    model = small(standardize=True, n_neighbors=1, blur_sigma=0, coreset_ratio=1.0).fit(textures(4, 0))
    nominal = plain_patches(textures(4, 0)).reshape(-1, 152)
    patches = (plain_patches(queries).reshape(5, -1, 1, 152) - nominal.mean(0)) / nominal.std(0)
    bank = (nominal - nominal.mean(0)) / nominal.std(0)
    expected = [np.sqrt(((image - bank) ** 2).sum(-1)).min(-1).max() for image in patches]
    found = model.predict(queries)
    np.testing.assert_allclose(found.pred_score, expected, rtol=1e-3)
    plain = small().fit(textures(4, 0)).predict(queries)
    np.testing.assert_array_equal(found.features, plain.features)  # what TTT4AS trains on stays as it is


def test_constant_channel_survives_standardising():
    patches = np.ones((10, 2), np.float32)
    patches[:, 1] = np.arange(10)
    mean, std = standardize(patches)
    assert mean[0] == 1 and std[0] == 1 and np.isfinite(patches).all() and (patches[:, 0] == 0).all()


def test_max_patches_bounds_the_bank():
    x = textures(6, 0)
    model = small(coreset_ratio=1.0, max_patches=100).fit(x)
    assert len(model.memory_bank_) == 6 * 16
    everything = {row.tobytes() for row in small(coreset_ratio=1.0).fit(x).memory_bank_}
    assert {row.tobytes() for row in model.memory_bank_} <= everything
    again = small(coreset_ratio=1.0, max_patches=100).fit(x, batch_size=1)
    np.testing.assert_array_equal(again.memory_bank_, model.memory_bank_)
    assert len(small(coreset_ratio=1.0, max_patches=10**6).fit(x).memory_bank_) == 6 * 64
    with pytest.raises(ValueError, match="max_patches: expected at least one for each of the 6 images, got 5"):
        small(max_patches=5).fit(x)
    assert patches_per_image(784, 3, 784 * 3 - 1) == 783


# ---------------------------------------------------------------------------------------------------------------------
# the same image, the same result


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_batch_and_order_change_no_bit(model, queries, batch_size):
    order = [3, 0, 4, 1, 2]
    assert_equal(model.predict(queries), model.predict(queries[order], batch_size=batch_size), order)


def test_alone_or_resized_in_a_batch(model):
    big = textures(3, 5, side=101)
    together = arrays(model.predict(big))
    for i in range(3):
        for alone, all_three in zip(arrays(model.predict(big[i : i + 1])), together, strict=True):
            np.testing.assert_array_equal(alone[0], all_three[i])


def test_fitting_twice_gives_the_same_bank(model):
    for batch_size in (1, 4):
        np.testing.assert_array_equal(
            small().fit(textures(8, 0), batch_size=batch_size).memory_bank_, model.memory_bank_
        )
    assert not np.array_equal(small(random_state=1).fit(textures(8, 0)).memory_bank_, model.memory_bank_)


def test_mixed_precision_around_it_changes_no_bit(model, queries):
    expected = model.predict(queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(expected, model.predict(queries))
        np.testing.assert_array_equal(small().fit(textures(8, 0)).memory_bank_, model.memory_bank_)


PREDICT = """
import hashlib, sys
import numpy as np
from ttt4as_fast.patchcore import PatchCore
model = PatchCore.load(sys.argv[1], device="cpu")
found = model.predict(np.load(sys.argv[2]))
digest = hashlib.sha256()
for x in (found.anomaly_map, found.pred_score, found.features):
    digest.update(x.tobytes())
print(digest.hexdigest(), repr(model.image_threshold_))
np.save(sys.argv[3], found.anomaly_map)
"""


@pytest.mark.parametrize("threads", ["same", "other"])
def test_another_process_gives_the_same(model, queries, tmp_path, threads):
    model.save(tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", queries.numpy())
    n = torch.get_num_threads() if threads == "same" else torch.get_num_threads() % 2 + 1
    run = subprocess.run(
        [sys.executable, "-c", PREDICT, *(str(tmp_path / name) for name in ("m.safetensors", "x.npy", "maps.npy"))],
        env={**os.environ, "OMP_NUM_THREADS": str(n)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    digest, threshold = run.stdout.split()
    here = model.predict(queries.numpy())
    assert threshold == repr(model.image_threshold_)
    if threads == "same":
        expected = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays(here))).hexdigest()
        assert digest == expected
    else:  # convolutions may add in another order
        np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), here.anomaly_map, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# one call, many images


def test_milliseconds_of_each_stage(model, folder):
    spent = model.predict(folder).milliseconds
    assert list(spent) == ["decode", "backbone", "knn", "map"]
    assert all(value > 0 for value in spent.values())


def test_progress(folder):
    seen = []
    model = small().fit(folder, progress=lambda *step: seen.append(step), batch_size=2)
    assert seen[:5] == [("features", i, 5) for i in range(1, 6)]
    assert seen[-1] == ("coreset", 32, 32)
    seen.clear()
    model.calibrate(folder, progress=lambda *step: seen.append(step))
    model.predict(folder, progress=lambda *step: seen.append(step))
    assert seen == [(stage, i, 5) for stage in ("calibration", "prediction") for i in range(1, 6)]


def test_streaming_gives_what_predict_gives(model, folder):
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-200])
    good = [folder / f"{i}.png" for i in (0, 1, 3, 4)]
    expected = model.predict(good)
    errors = []
    results = list(model.predict_iter(folder, batch_size=2, on_error=errors.append))
    assert [result.path for result in results] == good
    assert [error.path.name for error in errors] == ["2.png"]
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result.anomaly_map, expected.anomaly_map[i])
        np.testing.assert_array_equal(result.features, expected.features[i])
        assert result.pred_score == expected.pred_score[i] and result.size == (SIZE, SIZE)
        assert set(result.milliseconds) == {"decode", "backbone", "knn", "map"}
    with pytest.raises(ImageError, match=r"2\.png"):
        list(model.predict_iter(folder))
    with pytest.raises(ImageError, match=r"2\.png"):
        model.predict(folder)
    only_bad = list(model.predict_iter([folder / "2.png"] * 3, batch_size=2, on_error=errors.append))
    assert only_bad == [] and len(errors) == 4


def test_calibration_is_of_the_maps(model):
    held_out = model.predict(textures(5, 1))
    expected = NominalStatistics.from_maps(held_out.anomaly_map, held_out.pred_score)
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(model.nominal_statistics_.arrays()[name], array)
    assert model.image_threshold_ == expected.image_threshold(0.01, extrapolate=True)
    assert model.image_threshold_ > expected.image_threshold(0.01)
    assert (held_out.pred_score < model.image_threshold_).all()


def test_calibration_rate_and_refit():
    model = small().fit(textures(2, 0))
    assert model.nominal_statistics_ is None and model.image_threshold_ is None
    scores = np.sort(model.predict(textures(5, 1)).pred_score)
    model.calibrate(textures(5, 1), false_alarm_rate=0.4)
    assert scores[2] < model.image_threshold_ <= scores[3]
    model.fit(textures(2, 0))
    assert model.nominal_statistics_ is None and model.image_threshold_ is None


def test_the_network_sees_one_image_at_a_time_on_a_cpu(model, queries):
    """In a batch the last bits of a convolution may depend on the others."""
    seen = []
    handle = model.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.predict(queries)
    handle.remove()
    assert seen == [1] * len(queries)


def test_milliseconds_are_within_those_of_the_call(model, queries):
    begin = time.perf_counter()
    spent = model.predict(queries).milliseconds
    assert 0 < sum(spent.values()) <= 1e3 * (time.perf_counter() - begin)


def test_params_make_the_same_model_and_repr_shows_what_was_chosen():
    model = small(coreset_ratio=0.5, layers=["blocks.4"])
    again = PatchCore(**model.get_params())
    assert again.get_params() == model.get_params() and again.layers == ["blocks.4"]
    assert repr(model) == (
        f"PatchCore(layers=['blocks.4'], coreset_ratio=0.5, image_size={SIZE}, crop_size={CROP}, "
        "device=device(type='cpu'))"
    )


@pytest.mark.parametrize(
    ("bank", "error", "message"),
    [
        (np.ones((5, 151), np.float32), ValueError, r"bank: expected 152 channels.* got shape \(5, 151\)"),
        (np.ones(152, np.float32), ValueError, "bank: expected 2 dimensions"),
        (np.ones((0, 152), np.float32), ValueError, "bank: expected no empty axis"),
        (np.full((5, 152), np.nan), ValueError, "bank: expected finite values"),
        (np.full((5, 152), "x"), TypeError, "bank: expected dtype"),
    ],
)
def test_a_refused_bank_changes_nothing(queries, bank, error, message):
    model = small().fit(textures(2, 0))
    before, expected = model.memory_bank_, model.predict(queries)
    with pytest.raises(error, match=message):
        model.set_memory_bank(bank)
    assert model.memory_bank_ is before
    assert_equal(expected, model.predict(queries))


def test_not_fitted(tmp_path, folder):
    model = small()
    for call in (
        lambda: model.predict(textures(1, 0)),
        lambda: model.predict_iter(folder),
        lambda: model.calibrate(textures(1, 0)),
        lambda: model.save(tmp_path / "m.safetensors"),
    ):
        with pytest.raises(RuntimeError, match=r"no memory bank yet: call fit, or PatchCore\.load"):
            call()
    assert not (tmp_path / "m.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# memory, real data

MEMORY = """
import resource, sys
import torch
from ttt4as_fast.patchcore import PatchCore
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
paths = [sys.argv[1]]
model = PatchCore(image_size=72, crop_size=64, device="cpu", coreset_ratio=0.02)
model.fit(paths * 4, batch_size=4).predict(paths * 4, batch_size=4)
begin = peak()
model.fit(paths * 40, batch_size=4)
fitted = peak()
for result in model.predict_iter(paths * 40, batch_size=4):
    pass
print(fitted - begin, peak() - fitted)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's unit")
def test_memory_is_that_of_the_patches(tmp_path):
    """40 images of 3 MB each decoded: were they or their layers kept, the growth would be 120 MB."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)).save(tmp_path / "big.png")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "big.png")], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    fitting, predicting = (float(x) for x in run.stdout.split())
    patches = 4 * 40 * 64 * 152 / 2**20  # 1.5 MiB, beside which the k-center has scratch of its own
    assert fitting < 6 * patches + 8
    assert predicting < 12


DATA = Path(os.environ.get("TTT4AS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "magnetic_tile").is_dir(), reason=f"REAL DATA NOT FOUND: no {DATA / 'magnetic_tile'}")
def test_real_defects_are_found():
    """Magnetic tiles at half the resolution: blowholes and breaks score above nominal tiles."""
    from sklearn.metrics import roc_auc_score

    root = DATA / "magnetic_tile"
    train = sorted((root / "train" / "good").iterdir())[::16]
    good = sorted((root / "test" / "good").iterdir())[::8]
    bad = [path for kind in ("blowhole", "break") for path in sorted((root / "test" / kind).iterdir())[::8]]
    model = PatchCore(image_size=128, crop_size=112, device="cpu").fit(train)
    scores = [result.pred_score for result in model.predict_iter(good + bad)]
    assert roc_auc_score([0] * len(good) + [1] * len(bad), scores) > 0.75
