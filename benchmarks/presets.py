"""Masks of the presets against the best single threshold, on real and on synthetic defects, with every ablation.

``python -m benchmarks.presets --data DATA`` writes ``results/presets.json`` and ``results/presets.png``. DATA holds
``mvtec_ad/screw`` and ``magnetic_tile`` in the MVTec AD layout; the synthetic sets come from scikit-image's textures
and the demo's generator. Settings were chosen on one half of each set's test images, the "choice" half; what counts is
the other, the "report" half. The halves are drawn once, kind by kind. ``results/presets_settings.json`` lists the
settings that were tried on the choice half before, with a simpler detector and with this one, losers included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ttt4as_fast import TTT4AS, PatchCore, baselines, demo, metrics
from ttt4as_fast.datasets import load_dataset, read_mask
from ttt4as_fast.io import atomic_path, plain
from ttt4as_fast.kernels.arrays import to_numpy

from . import machine

CONDITIONS: dict[str, dict[str, Any]] = {  # of the synthetic sets: arguments of `demo.make_defects`
    "0.1-0.2 %": {"size": (0.001, 0.002)},
    "0.5-1 %": {"size": (0.005, 0.01)},
    "3-5 %": {"size": (0.03, 0.05)},
    "10-15 %": {"size": (0.10, 0.15)},
    "20-30 %": {"size": (0.2, 0.3)},
    "40-60 %": {"size": (0.4, 0.6)},
    "contrast 0.3": {"size": (0.03, 0.05), "contrast": 0.3},
    "contrast 0.6": {"size": (0.03, 0.05), "contrast": 0.6},
    "3 blobs, 3-5 %": {"size": (0.03, 0.05), "number": 3},
    "8 blobs, 3-5 %": {"size": (0.03, 0.05), "number": 8},
    "3 blobs, 20-30 %": {"size": (0.2, 0.3), "number": 3},
    "4 blobs, 0.3-0.6 %": {"size": (0.003, 0.006), "number": 4},
}
PHOTOGRAPHS = (*demo.TEXTURES, "tissue", "galaxies")
"""What the synthetic sets are cropped from. The last two, stained tissue (no known copyright restrictions) and the
Hubble deep field (NASA, public domain), ship with scikit-image as the textures do."""
N_GOOD, N_DEFECTIVE = 48, 24
"""Test crops of a photograph: good ones, and defective ones of each condition."""
LARGE = ("20-30 %", "40-60 %", "3 blobs, 20-30 %")
ABLATIONS: dict[str, dict[str, Any]] = {  # of the preset "robust"
    "robust": {},
    "uncalibrated": {"nominal_level": None},
    "level: half the height": {"height": 0.5, "nominal_weight": 0.0},
    "level: nominal maps only": {"nominal_weight": 1.0},
    "level: size left out": {"size_exponent": 0.0},
    "all above the level is anomalous": {"core": 0.0},
    "nominal class of half the weight": {"background_weight": 200.0},
    "nominal samples from everywhere alike": {"hard_share": 0.0},
    "five times the samples": {"n_core": 250, "n_background": 750},
    "features as they are": {"standardize": False},
    "SVM not recentred": {"recentre": False},
    "SVM only": {"score_weight": 0.0},
    "score only": {"score_weight": 1e6},
    "size left out, SVM not recentred, nominal share 0.3": {
        "size_exponent": 0.0,
        "recentre": False,
        "nominal_share": 0.3,
    },
}
_NOMINAL = "nominal_"
MAIN = ("screw", "magnetic tile", "magnetic tile without uneven", *PHOTOGRAPHS, "large")


@dataclass
class Bench:
    """One set as the detector sees it: maps, features and masks of its test images, and what calibration gave."""

    name: str
    images: np.ndarray
    maps: np.ndarray
    features: np.ndarray
    scores: np.ndarray
    masks: np.ndarray
    kinds: np.ndarray
    nominal: baselines.NominalStatistics

    @property
    def report(self) -> np.ndarray:
        """Which test images are of the report half."""
        rng, chosen = np.random.default_rng(7), np.zeros(len(self.kinds), bool)
        for kind in sorted(set(self.kinds)):
            of_kind = np.flatnonzero(self.kinds == kind)
            chosen[rng.permutation(of_kind)[: len(of_kind) // 2]] = True
        return chosen


def real_set(name: str, root: Path, size: int, every: int) -> Bench:
    """A set on disk; every `every`-th test image of a kind, 20 % of the training images for validation."""
    dataset = load_dataset(root)
    train = [sample.image for sample in dataset.train]
    order = np.random.default_rng(0).permutation(len(train))
    held = np.sort(order[: len(train) // 5])
    test = [
        sample for kind in sorted({s.kind for s in dataset.test}) for sample in _of_kind(dataset.test, kind)[::every]
    ]
    model = PatchCore(image_size=size, crop_size=size, max_patches=60_000)
    model.fit([train[i] for i in np.setdiff1d(order, held)]).calibrate([train[i] for i in held])
    blank = np.zeros((size, size), bool)
    masks = [blank if s.mask is None else model.transform_mask(read_mask(s.mask)) for s in test]
    paths = [sample.image for sample in test]
    images = np.stack([np.asarray(Image.open(p).convert("RGB").resize((size, size))) for p in paths])
    return _measure(name, model, paths, images, np.stack(masks), np.array([s.kind for s in test]))


def synthetic_set(name: str, size: int = 224, side: int = 160) -> Bench:
    """Crops of a photograph: 64 to train on, 32 for validation, `N_GOOD` and `N_DEFECTIVE` a condition to test."""
    model = PatchCore(image_size=size, crop_size=size, max_patches=60_000)
    model.fit(_tensors(crops(name, "train", 64, side, 0)))
    model.calibrate(_tensors(crops(name, "validation", 32, side, 0)))
    donors = [demo.load_texture(other)[256:, 320:] for other in demo.TEXTURES if other != name]
    images = [crops(name, "test", N_GOOD, side, 99)]
    masks, kinds = [np.zeros((N_GOOD, side, side), bool)], ["good"] * N_GOOD
    for seed, (kind, options) in enumerate(CONDITIONS.items()):
        plain = crops(name, "test", N_DEFECTIVE, side, seed)
        defective, truth = demo.make_defects(plain, donors, seed=seed, **options)
        images.append(defective)
        masks.append(truth)
        kinds += [kind] * len(truth)
    pixels = np.concatenate(images)
    truth = np.stack([model.transform_mask(mask) for mask in np.concatenate(masks)])
    shown = np.stack([np.asarray(Image.fromarray(x).convert("RGB").resize((size, size))) for x in pixels])
    return _measure(name, model, _tensors(pixels), shown, truth, np.array(kinds))


def crops(name: str, area: str, n: int, side: int, seed: int) -> np.ndarray:
    """As `demo.texture_crops`, of any of `PHOTOGRAPHS`."""
    if name in demo.TEXTURES:
        return demo.texture_crops(name, area, n, side, seed)
    from skimage import color, data

    photograph = data.immunohistochemistry() if name == "tissue" else data.hubble_deep_field()
    grey = np.rint(255 * color.rgb2gray(photograph[:512, :512])).astype(np.uint8)
    return demo.photograph_crops(grey, area, n, side, [seed, PHOTOGRAPHS.index(name)])


def cached(folder: Path | None, name: str, build: Callable[[], Bench]) -> Bench:
    """`build`, or what it gave when it was last called for this folder."""
    if folder is None:
        return build()
    path = folder / f"{name}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files}
        nominal = {key[len(_NOMINAL) :]: content.pop(key) for key in list(content) if key.startswith(_NOMINAL)}
        title = str(content.pop("name"))
        return Bench(name=title, nominal=baselines.NominalStatistics.from_arrays(nominal), **content)
    bench = build()
    arrays = {field.name: getattr(bench, field.name) for field in fields(bench) if field.name != "nominal"}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays, **{_NOMINAL + key: value for key, value in bench.nominal.arrays().items()})
    return bench


def _of_kind(samples: Any, kind: str) -> list[Any]:
    return [sample for sample in samples if sample.kind == kind]


def _tensors(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, None].astype(np.float32) / 255, 3, axis=1)


def _measure(name: str, model: PatchCore, test: Any, images: np.ndarray, masks: np.ndarray, kinds: np.ndarray) -> Bench:
    found = model.predict(test)
    arrays = (to_numpy(x) for x in (found.anomaly_map, found.features, found.pred_score))
    maps, features, scores = arrays
    assert model.nominal_statistics_ is not None
    return Bench(name, images, maps, features.astype(np.float16), scores, masks, kinds, model.nominal_statistics_)


# ---------------------------------------------------------------- methods


def methods(bench: Bench) -> dict[str, Callable[[int], np.ndarray]]:
    """Name -> mask of test image `i`, ungated. The oracle is not one of them: it sees the truth."""
    nominal = bench.nominal

    def test_time(**options: Any) -> Callable[[int], np.ndarray]:
        segmenter = TTT4AS(**options)
        return lambda i: segmenter(bench.maps[i], bench.features[i].astype(np.float32)).pred_mask

    found: dict[str, Callable[[int], np.ndarray]] = {
        "mean + 3 std": lambda i: baselines.mean_std_mask(bench.maps[i], nominal, 3.0),
        "maximum of nominal maps": lambda i: baselines.max_nominal_mask(bench.maps[i], nominal),
        "Otsu": lambda i: baselines.otsu_mask(bench.maps[i]),
        "paper": test_time(),
        "paper, radius 3, 500 nominal": test_time(neighbor_radius=3, n_nominal=500),
    }
    for name, options in ABLATIONS.items():
        found[name] = test_time(preset="robust", **{"nominal_level": nominal.level, **options})
    return found


# ---------------------------------------------------------------- numbers


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean over images."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)


def groups(benches: list[Bench]) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Name -> (which bench, which of its images): real sets, textures at 3-5 %, the large ones, each condition."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in (*MAIN, *CONDITIONS)}
    for b, bench in enumerate(benches):
        defective = bench.masks.any((1, 2))
        if bench.name in PHOTOGRAPHS:
            found[bench.name].append((b, defective & (bench.kinds == "3-5 %")))
            found["large"].append((b, defective & np.isin(bench.kinds, LARGE)))
            for condition in CONDITIONS:
                found[condition].append((b, defective & (bench.kinds == condition)))
        else:
            found[bench.name].append((b, defective))
            if bench.name == "magnetic tile":
                found["magnetic tile without uneven"].append((b, defective & (bench.kinds != "uneven")))
    return {name: parts for name, parts in found.items() if parts}


def summary(f1: np.ndarray, counts: np.ndarray | None = None) -> dict[str, Any]:
    """Mean F1 with its interval; pooled F1 from counts (overlap, predicted, marked)."""
    out: dict[str, Any] = {"f1": round(float(f1.mean()), 4), "interval": bootstrap(f1), "n": len(f1)}
    if counts is not None:
        overlap, predicted, marked = counts.sum(0)
        out["pooled_f1"] = round(float(2 * overlap / max(1, predicted + marked)), 4)
        out["precision"] = round(float(np.mean(counts[:, 0] / np.maximum(counts[:, 1], 1))), 4)
        out["recall"] = round(float(np.mean(counts[:, 0] / counts[:, 2])), 4)
    return out


def evaluate(benches: list[Bench]) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """Everything that is reported, and each method's counts (N, 3) in each bench."""
    counts: list[dict[str, np.ndarray]] = []
    milliseconds: dict[str, dict[str, float]] = {}
    for bench in benches:
        table: dict[str, np.ndarray] = {}
        for name, method in methods(bench).items():
            method(0)
            rows, spent = [], []
            for i in range(len(bench.maps)):
                began = time.process_time()  # of all threads: other programs do not count
                mask = method(i)
                spent.append(time.process_time() - began)
                rows.append(metrics.mask_counts(mask, bench.masks[i])[:3])
            table[name] = np.array(rows, np.int64)
            milliseconds.setdefault(bench.name, {})[name] = round(1e3 * float(np.median(spent)), 2)
        counts.append(table)
        print(bench.name, milliseconds[bench.name], flush=True)
    result: dict[str, Any] = {"cpu_milliseconds": milliseconds, "halves": {}}
    for half in ("choice", "report"):
        sides = [bench.report if half == "report" else ~bench.report for bench in benches]
        tables: dict[str, dict[str, Any]] = {}
        for group, parts in groups(benches).items():
            chosen = [(b, which & sides[b]) for b, which in parts]
            oracle = [_oracle(benches[b], which) for b, which in chosen]
            tables[group] = {"oracle": summary(np.concatenate(oracle))}
            for name in counts[0]:
                rows = np.concatenate([counts[b][name][which] for b, which in chosen])
                tables[group][name] = summary(2 * rows[:, 0] / np.maximum(rows[:, 1] + rows[:, 2], 1), rows)
        result["halves"][half] = {"groups": tables, "gated": _gated(benches, sides, counts)}
    return result, counts


def _oracle(bench: Bench, which: np.ndarray) -> np.ndarray:
    """F1 of each image at the one threshold that is best for their mean."""
    threshold, _ = baselines.oracle_threshold(bench.maps[which], bench.masks[which])
    pairs = zip(bench.maps[which], bench.masks[which], strict=True)
    return np.array([metrics.precision_recall_f1(psi > threshold, truth)[2] for psi, truth in pairs])


def _gated(benches: list[Bench], sides: list[np.ndarray], counts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """At 1 % false alarms, counted on validation images or extrapolated: good images marked, defective ones missed."""
    found: dict[str, Any] = {}
    cases = [(name, extrapolate) for name in ("paper", "robust") for extrapolate in (False, True)]
    for bench, side, table in zip(benches, sides, counts, strict=True):
        good, bad = side & (bench.kinds == "good"), side & bench.masks.any((1, 2))
        for name, extrapolate in cases:
            passed = bench.scores >= bench.nominal.image_threshold(0.01, extrapolate=extrapolate)
            rows = table[name]
            missed = ~passed | (rows[:, 0] == 0)
            found.setdefault(bench.name, {})[f"{name}, {'extrapolated' if extrapolate else 'counted'}"] = {
                "good_marked": [int((passed & (rows[:, 1] > 0))[good].sum()), int(good.sum())],
                "defective_missed": [int(missed[bad].sum()), int(bad.sum())],
                "defective_below_threshold": int((~passed)[bad].sum()),
            }
    return found


# ---------------------------------------------------------------- failures


def draw_failures(path: Path, benches: list[Bench], counts: list[dict[str, np.ndarray]]) -> None:
    """Of every texture the report image at the first decile of the robust preset's F1, and the one at the median.

    Textures only: the figure is committed, and the other sets' images may not be passed on freely.
    """
    from ttt4as_fast import figures

    rows: list[tuple[Bench, int]] = []
    for bench, table in zip(benches, counts, strict=True):
        if bench.name not in PHOTOGRAPHS:
            continue
        which = np.flatnonzero(bench.report & bench.masks.any((1, 2)))
        overlap, predicted, marked = table["robust"][which].T
        order = which[np.argsort(2 * overlap / np.maximum(predicted + marked, 1), kind="stable")]
        rows += [(bench, int(order[int(q * (len(order) - 1))])) for q in (0.1, 0.5)]
    masks: dict[str, list[np.ndarray]] = {"paper": [], "robust": []}
    scaled = []
    for bench, i in rows:
        for name, found in masks.items():
            found.append(to_numpy(methods(bench)[name](i)))
        low, high = float(np.median(bench.maps[i])), bench.nominal.image_threshold(0.01)
        scaled.append((bench.maps[i] - low) / (2 * (high - low)))
    figures.comparison(
        path,
        [bench.images[i] for bench, i in rows],
        scaled,
        masks,
        [bench.masks[i] for bench, i in rows],
        labels=[f"{bench.name}: {bench.kinds[i].replace(' blobs,', ' in')}" for bench, i in rows],
        scale_label="score from the map's median (0) to twice the threshold's distance (1)",
        title="First decile and median of the robust preset's F1",
    )


def show(result: dict[str, Any]) -> None:
    """The tables, as text."""
    for half, content in result["halves"].items():
        print(f"\n{half} half: mean F1 over defective images (pooled F1)")
        names = [name for name in (*MAIN, *CONDITIONS) if name in content["groups"]]
        print(" " * 34 + " ".join(f"{name[:13]:>13s}" for name in names))
        for method in content["groups"][names[0]]:
            cells = [content["groups"][name][method] for name in names]
            texts = [f"{c['f1']:.3f}" + (f" ({c['pooled_f1']:.3f})" if "pooled_f1" in c else "") for c in cells]
            print(f"{method[:33]:34s}" + " ".join(f"{text:>13s}" for text in texts))
        print(json.dumps(content["gated"]))


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presets", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder with mvtec_ad/screw and magnetic_tile; without: textures only"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for presets.json and presets.png; default: benchmarks/results of this checkout",
    )
    parser.add_argument(
        "--every", type=int, default=2, help="of magnetic tile, take every n-th test image; default: %(default)s"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for what the detector gives; delete it when the detector changes"
    )
    options = parser.parse_args()
    watch = machine.Watch()
    benches = []
    builders: dict[str, Callable[[], Bench]] = {name: lambda name=name: synthetic_set(name) for name in PHOTOGRAPHS}
    if options.data is not None:
        builders["screw"] = lambda: real_set("screw", options.data / "mvtec_ad" / "screw", 320, 1)
        builders["tile"] = lambda: real_set("magnetic tile", options.data / "magnetic_tile", 224, options.every)
    for name, build in builders.items():
        began = time.perf_counter()
        benches.append(cached(options.cache, name, build))
        print(f"{name}: {len(benches[-1].maps)} test images, {time.perf_counter() - began:.0f} s", flush=True)
    finish(benches, options.output, watch)


def finish(benches: list[Bench], output: Path, watch: machine.Watch) -> None:
    """Evaluate, print, write ``presets.json`` (with where it was measured, as every suite) and ``presets.png``."""
    result, counts = evaluate(benches)
    show(result)
    output.mkdir(parents=True, exist_ok=True)
    about = machine.describe(machine.thread_counts(), watch)
    with atomic_path(output / "presets.json") as temporary:
        temporary.write_text(json.dumps(plain({**about, **result})) + "\n", encoding="utf-8")
    draw_failures(output / "presets.png", benches, counts)


if __name__ == "__main__":
    main()
