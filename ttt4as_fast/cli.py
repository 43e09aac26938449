"""The command ``ttt4as``: arguments, help, progress bars, messages and exit codes. The work is done elsewhere.

Exit codes: 0 done; 1 some files failed, the rest is done; 2 wrong arguments or nothing to work on; 130 interrupted.
No import at the top may load torch: ``--help`` is instant.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_bench import bench_app
from .cli_options import (
    METHOD,
    SPEED,
    Backend,
    BatchSize,
    Device,
    Gate,
    ImageThreshold,
    Loss,
    MapFormat,
    MaxIter,
    ModelFile,
    MovedWeights,
    Nominal,
    NominalSampling,
    Output,
    Overwrite,
    Percentile,
    Preset,
    PresetOption,
    Radius,
    RandomState,
    Sampling,
    SvmC,
    SvmLoss,
    Texture,
    Tol,
    load_detector,
    segmenter_of,
    settings_of,
    threshold_of,
)
from .terminal import DEBUG, command, escape_on_stdout, failed, out, print_table, printable, progress_bars, warn

app = typer.Typer(
    name="ttt4as",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")


# ---------------------------------------------------------------- root


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        out(f"ttt4as {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks (also: {DEBUG}=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Anomaly maps into masks by test-time training, and PatchCore to make the maps.

    Start with [b]ttt4as demo[/b]; on your own images: [b]fit[/b], then [b]predict[/b].
    """
    if debug:
        os.environ[DEBUG] = "1"
    escape_on_stdout()
    warnings.showwarning = lambda message, *_: warn(str(message))


def main() -> None:
    """Entry point of ``ttt4as`` and ``python -m ttt4as_fast``."""
    app(prog_name="ttt4as")


# ---------------------------------------------------------------- commands


@command(app, None, "ttt4as demo", "ttt4as demo --texture grass --seed 7 --output demo-grass")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the results, made if absent.")
    ] = Path("demo-output"),
    texture: Annotated[
        list[Texture] | None, typer.Option(help="One of the photographs; may be repeated.", show_default="all three")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of crops, defects and coreset.")] = 0,
    backend: Backend = "auto",
) -> None:
    """Run everything on real photographs with known defects: masks of THR and TTT4AS, a figure, a summary.

    Brick, gravel and grass photographs come with scikit-image, the network's weights with the installation: nothing is
    downloaded. Writes figure.png and summary.json.
    """
    from .demo import TEXTURES, run_demo, table

    names = [one.value for one in texture] if texture else list(TEXTURES)
    with progress_bars() as progress:
        summary = run_demo(output, names, seed, backend, progress=progress)
    print_table(table(summary))
    spent = summary["milliseconds"]
    out(
        f"f1_threshold {summary['f1_threshold']:.3f}   f1_ttt4as {summary['f1_ttt4as']:.3f}   "
        f"{summary['seconds']:.0f} s in all, {spent['ttt4as']:.1f} ms an image for TTT4AS"
    )
    out(f"wrote {output / 'figure.png'} and {output / 'summary.json'}")


@command(
    app,
    None,
    "ttt4as fit mvtec_ad/screw --model screw.safetensors",
    "ttt4as fit good_parts/ --model parts.safetensors --image-size 320 --crop-size 320 --validation-share 0.3",
)
def fit(
    train_dir: Annotated[
        Path,
        typer.Argument(
            metavar="TRAIN_DIR",
            help="Folder of nominal images, or the root of a dataset (its training part is used, and its validation "
            "part if it has one).",
            show_default=False,
        ),
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model file to write.", show_default=False)],
    backbone: Annotated[
        str, typer.Option(help="Feature extractor; a wrong name lists them all.")
    ] = "efficientnet_lite0",
    layers: Annotated[str | None, typer.Option(help="Comma-separated.", show_default="the backbone's own")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weight file of the backbone.", show_default=False)] = None,
    image_size: Annotated[int, typer.Option(min=8, help="Images are resized to this square.")] = 256,
    crop_size: Annotated[
        int | None, typer.Option(min=8, help="Centre crop that is looked at.", show_default="7/8 of the image size")
    ] = None,
    coreset_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of the nominal patches kept.")] = 0.1,
    n_neighbors: Annotated[int, typer.Option(min=1, help="Neighbours that re-weight the image score.")] = 9,
    blur_sigma: Annotated[float, typer.Option(min=0, help="Gaussian blur of the anomaly map, in pixels.")] = 4.0,
    validation_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the images held out for thresholds, unless the dataset has a validation part; 0 gives a "
            "model without thresholds.",
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the split and the coreset.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model file.")] = False,
    device: Device = None,
    backend: Backend = "auto",
) -> None:
    """Learn what nominal images look like: fit PatchCore, calibrate its thresholds, save both in one file."""
    if model.exists() and (model.is_dir() or not overwrite):
        what = "is a folder" if model.is_dir() else "exists; --overwrite replaces it"
        raise ValueError(f"model: {str(model)!r} {what}")
    from . import runs
    from .io import check_folder

    check_folder(model.parent, "model")

    paths, validation = runs.nominal_images(train_dir)
    from .patchcore import PatchCore

    detector = PatchCore(
        backbone=backbone,
        layers=[name.strip() for name in layers.split(",")] if layers else None,
        weights=weights,
        image_size=image_size,
        crop_size=crop_size or max(8, round(image_size * 7 / 8)),
        coreset_ratio=coreset_ratio,
        n_neighbors=n_neighbors,
        blur_sigma=blur_sigma,
        random_state=seed,
        device=device,
        backend=backend,
    )
    with progress_bars() as progress:
        done = runs.fit(
            detector,
            paths,
            model,
            validation_share=validation_share,
            seed=seed,
            on_error=failed,
            progress=progress,
            validation=validation,
        )
    out(f"{done['n_training']} images to train on, {done['n_validation']} to validate, {done['n_failed']} skipped")
    out(
        f"memory bank {done['memory_bank'][0]} x {done['memory_bank'][1]}, image threshold "
        + (f"{done['image_threshold']:.4g}" if done["image_threshold"] is not None else "none (no validation images)")
    )
    if 0 < done["n_validation"] < 10:
        warn(f"only {done['n_validation']} validation images: the thresholds are rough")
    out(f"wrote {model} in {done['seconds']:.0f} s")
    if done["n_failed"]:
        raise typer.Exit(1)


@command(
    app,
    None,
    "ttt4as predict screw.safetensors photos/ --output out",
    "ttt4as predict screw.safetensors a.png b.png --output out --map-format npy --json | jq .score",
)
def predict(
    ctx: typer.Context,
    model: ModelFile,
    images: Annotated[  # readable=False: whether a file can be read is found out file by file
        list[Path],
        typer.Argument(metavar="IMAGES", help="Image files, and folders of them.", readable=False, show_default=False),
    ],
    output: Output,
    map_format: Annotated[
        MapFormat, typer.Option(help="Anomaly maps: 32-bit float TIFF, NPY, or not written.")
    ] = MapFormat.tiff,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Write overlays.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print each result's line of JSON as well.")] = False,
    overwrite: Overwrite = False,
    weights: MovedWeights = None,
    image_threshold: ImageThreshold = None,
    gate: Gate = True,
    preset: PresetOption = Preset.paper,
    percentile: Percentile = 99.0,
    neighbor_radius: Radius = 5,
    n_nominal: Nominal = 100,
    svm_c: SvmC = 1e-3,
    loss: SvmLoss = Loss.squared_hinge,
    nominal_sampling: NominalSampling = Sampling.grid,
    random_state: RandomState = 0,
    tol: Tol = 1e-4,
    max_iter: MaxIter = 1000,
    batch_size: BatchSize = 8,
    device: Device = None,
    backend: Backend = "auto",
) -> None:
    """Mark the anomalous pixels of images: mask, anomaly map, overlay and a line of JSON for each.

    A stopped run goes on where it was; an image that has changed since is done again. Files that cannot be read are
    named and skipped; the exit code is then 1.
    Masks and maps have the size of the image; a map is NaN, and a mask empty, outside the centre crop the model sees.
    """
    from . import runs
    from .images import list_images
    from .results import ResultFolder

    paths = list_images(images)
    detector, about = load_detector(model, weights, device, backend)
    threshold = threshold_of(detector, image_threshold, gate)
    segmenter = segmenter_of(ctx, threshold if gate else None, detector)
    settings = {
        "model": about["sha256"],
        "segmenter": settings_of(segmenter),
        "label_threshold": threshold,
        "map_format": map_format.value,
        "overlays": overlays,
    }
    from .installation import versions

    recorded = {"model": about, "overlay_scale": runs.overlay_scale(detector), "versions": versions()}
    with ResultFolder(output, settings, recorded, overwrite) as folder, progress_bars() as progress:
        count = runs.predict(
            detector,
            segmenter,
            paths,
            folder,
            threshold,
            map_format=map_format.value,
            draw_overlay=overlays,
            batch_size=batch_size,
            on_error=failed,
            on_result=_json_line if as_json else lambda record: None,
            progress=progress,
        )
    _summary(count, folder, as_json)


@command(app, None, "ttt4as evaluate screw.safetensors mvtec_ad/screw --output report")
def evaluate(
    ctx: typer.Context,
    model: ModelFile,
    dataset: Annotated[Path, typer.Argument(metavar="DATASET_DIR", help="Root of one category.", show_default=False)],
    output: Output,
    layout: Annotated[str, typer.Option(help="How the folder is laid out; a wrong name lists them all.")] = "auto",
    weights: MovedWeights = None,
    preset: PresetOption = Preset.paper,
    percentile: Percentile = 99.0,
    neighbor_radius: Radius = 5,
    n_nominal: Nominal = 100,
    svm_c: SvmC = 1e-3,
    loss: SvmLoss = Loss.squared_hinge,
    nominal_sampling: NominalSampling = Sampling.grid,
    random_state: RandomState = 0,
    tol: Tol = 1e-4,
    max_iter: MaxIter = 1000,
    batch_size: BatchSize = 8,
    device: Device = None,
    backend: Backend = "auto",
) -> None:
    """Compare the masks of THR, TTT4AS and others with the ground truth of a test set.

    Prints the tables and writes report.csv and report.json.
    """
    from .datasets import load_dataset

    found = load_dataset(dataset, layout)
    from .evaluate import evaluate as run
    from .io import check_folder

    check_folder(output, "output")
    detector, _ = load_detector(model, weights, device, backend)
    if detector.nominal_statistics_ is None:
        raise ValueError(
            f"model: {str(model)!r} is not calibrated: fit it with validation images (--validation-share > 0)"
        )
    segmenter = segmenter_of(ctx, None, detector)
    with progress_bars() as progress:
        report = run(detector, found, segmenter, batch_size=batch_size, progress=progress)
    from .installation import origin

    report.environment.update(origin())  # a report may become a committed result
    output.mkdir(parents=True, exist_ok=True)
    report.to_json(output / "report.json", images=True)
    report.to_csv(output / "report.csv")
    print_table(report.table())
    out(f"wrote {output / 'report.csv'} and {output / 'report.json'}")
    whole = report.row("ttt4as")
    if not whole["n_marked"]:
        warn("dataset: no defective image has a mask that marks a pixel of the crop: nothing tells the masks apart")
    if not whole["n_nominal"]:
        warn("dataset: no good images to test: no rankings of images, no false alarms")
    for failure in report.failures:
        failed(failure["path"], failure["reason"])
    if report.failures:
        raise typer.Exit(1)


@command(
    app,
    None,
    "ttt4as segment anomaly_map.npy features.npy --output out",
    "ttt4as segment maps/ features/ --output out --percentile 99.5 --image-threshold 2.1",
)
def segment(
    ctx: typer.Context,
    maps: Annotated[
        Path,
        typer.Argument(
            metavar="MAPS", help="NPY or NPZ, (H, W) or (B, H, W); or a folder of them.", show_default=False
        ),
    ],
    features: Annotated[
        Path,
        typer.Argument(
            metavar="FEATURES",
            help="NPY or NPZ, (C, h, w) or (B, C, h, w); or a folder with the same names.",
            show_default=False,
        ),
    ],
    output: Output,
    as_json: Annotated[bool, typer.Option("--json", help="Print each result's line of JSON as well.")] = False,
    overwrite: Overwrite = False,
    image_threshold: Annotated[
        float | None,
        typer.Option(rich_help_panel=METHOD, help="Maps whose maximum is below it stay unmarked.", show_default="none"),
    ] = None,
    preset: PresetOption = Preset.paper,
    percentile: Percentile = 99.0,
    neighbor_radius: Radius = 5,
    n_nominal: Nominal = 100,
    svm_c: SvmC = 1e-3,
    loss: SvmLoss = Loss.squared_hinge,
    nominal_sampling: NominalSampling = Sampling.grid,
    random_state: RandomState = 0,
    tol: Tol = 1e-4,
    max_iter: MaxIter = 1000,
    device: Annotated[str, typer.Option(rich_help_panel=SPEED, help="cpu, cuda or cuda:N.")] = "cpu",
    backend: Backend = "auto",
) -> None:
    """The method alone, downstream of any detector: masks from arrays of anomaly maps and features.

    In an NPZ file the array is the only one, or called anomaly_map or features. Writes masks as PNG and NPY, and a line
    of JSON for each with its status. A stopped run goes on where it was; a pair of which a file has changed since is
    done again. Files that cannot be used are named and skipped; the exit code is then 1.
    """
    from . import array_runs
    from .results import ResultFolder

    pairs, alone = array_runs.array_pairs(maps, features)
    for path in alone:
        failed(str(path), "no file of the same name in the other folder")
    segmenter = segmenter_of(ctx, image_threshold)
    with (
        ResultFolder(output, {"segmenter": settings_of(segmenter)}, None, overwrite) as folder,
        progress_bars() as progress,
    ):
        count = array_runs.segment(
            segmenter, pairs, folder, failed, _json_line if as_json else lambda record: None, progress, device
        )
    count["failed"] += len(alone)
    _summary(count, folder, as_json)


@command(
    app,
    None,
    "ttt4as serve screw.safetensors",
    "curl --data-binary @photo.png -H 'Content-Type: image/png' localhost:8080/segment | jq .regions",
)
def serve(
    ctx: typer.Context,
    model: ModelFile,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8080,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest request body.")] = 32 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest image.")] = 50_000_000,
    queue_size: Annotated[int, typer.Option(min=1, help="Images that may wait; more are turned away (503).")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Images the model takes at once.")] = 8,
    body_timeout: Annotated[float, typer.Option(help="Seconds in which a body must have arrived.")] = 10.0,
    max_uploads: Annotated[int, typer.Option(min=1, help="Bodies that may arrive at a time; more get 503.")] = 64,
    drain_seconds: Annotated[int, typer.Option(min=0, help="Time for requests under way after SIGTERM.")] = 30,
    weights: MovedWeights = None,
    image_threshold: ImageThreshold = None,
    gate: Gate = True,
    preset: PresetOption = Preset.paper,
    percentile: Percentile = 99.0,
    neighbor_radius: Radius = 5,
    n_nominal: Nominal = 100,
    svm_c: SvmC = 1e-3,
    loss: SvmLoss = Loss.squared_hinge,
    nominal_sampling: NominalSampling = Sampling.grid,
    random_state: RandomState = 0,
    tol: Tol = 1e-4,
    max_iter: MaxIter = 1000,
    device: Device = None,
    backend: Backend = "auto",
) -> None:
    """A small HTTP service: POST an image to /segment, get its mask and regions.

    Also GET /health, /model and /metrics (Prometheus). It has no authentication: listen on other addresses than this
    machine's own only behind something that has. Needs pip install 'ttt4as_fast[serve]'.
    """
    try:
        from . import serve as service
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'ttt4as_fast[serve]'") from None
    detector, _ = load_detector(model, weights, device, backend)
    threshold = threshold_of(detector, image_threshold, gate)
    segmenter = segmenter_of(ctx, threshold if gate else None, detector)
    limits = service.Limits(max_bytes, max_pixels, queue_size, max_batch, body_timeout, max_uploads)
    service.serve(detector, segmenter, threshold, host, port, limits, drain_seconds)


@command(app, None, "ttt4as info", "ttt4as info --json | jq .backends")
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What is installed and usable here: versions, backends and why not, threads, environment variables."""
    from . import installation

    found = installation.describe()
    if as_json:
        out(json.dumps(found, indent=2))
        return
    for table in installation.tables(found):
        print_table(table)


# ---------------------------------------------------------------- what commands print


def _json_line(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record))


def _summary(count: dict[str, int], folder: Any, as_json: bool) -> None:
    """The last line of a folder run, and its exit code."""
    marked = sum(record["mask_area"] > 0 for record in folder.records.values())
    text = f"{count['done']} done, {count['skipped']} done earlier, {count['failed']} failed; "
    text += f"{marked} of {len(folder.records)} marked; {folder.lines}"
    typer.echo(printable(text), err=as_json)
    if count["failed"]:
        raise typer.Exit(1)
