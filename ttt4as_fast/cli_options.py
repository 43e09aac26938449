"""The options that several commands of ``ttt4as`` share, and the detector and segmenter that they describe."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .patchcore import PatchCore
    from .segmenter import TTT4AS


class Preset(str, Enum):
    paper = "paper"
    robust = "robust"


class Loss(str, Enum):
    squared_hinge = "squared_hinge"
    hinge = "hinge"


class Sampling(str, Enum):
    grid = "grid"
    random = "random"


class MapFormat(str, Enum):
    tiff = "tiff"
    npy = "npy"
    none = "none"


class Texture(str, Enum):
    brick = "brick"
    gravel = "gravel"
    grass = "grass"


METHOD = "Test-time training"
SPEED = "Device and speed"

PresetOption = Annotated[
    Preset,
    typer.Option(
        "--preset",
        rich_help_panel=METHOD,
        help="The published method, or labels that follow each peak, for defects of any size. 'robust' takes C, the "
        "loss, tol and max-iter of the options here, and the nominal level of a calibrated model, where there is one.",
    ),
]
ImageThreshold = Annotated[
    float | None,
    typer.Option(rich_help_panel=METHOD, help="Images scoring below it are nominal.", show_default="the model's"),
]
Gate = Annotated[bool, typer.Option("--gate/--no-gate", rich_help_panel=METHOD, help="Leave nominal images unmarked.")]
Percentile = Annotated[
    float,
    typer.Option(
        min=0, max=100, rich_help_panel=METHOD, help="Score that a peak must reach, as a percentile of its map."
    ),
]
Radius = Annotated[int, typer.Option(min=0, rich_help_panel=METHOD, help="Pixels around a peak taken as anomalous.")]
Nominal = Annotated[int, typer.Option(min=1, rich_help_panel=METHOD, help="Nominal pixels to train on.")]
SvmC = Annotated[float, typer.Option("--svm-c", "-C", rich_help_panel=METHOD, help="Weight of the SVM's loss.")]
SvmLoss = Annotated[Loss, typer.Option("--loss", rich_help_panel=METHOD, help="The SVM's loss.")]
NominalSampling = Annotated[
    Sampling, typer.Option("--nominal-sampling", rich_help_panel=METHOD, help="How nominal pixels are chosen.")
]
RandomState = Annotated[int, typer.Option(min=0, rich_help_panel=METHOD, help="Seed of random nominal sampling.")]
Tol = Annotated[float, typer.Option(rich_help_panel=METHOD, help="Relative duality gap to solve the SVM to.")]
MaxIter = Annotated[int, typer.Option(min=1, rich_help_panel=METHOD, help="Most iterations of the SVM.")]
Backend = Annotated[
    str,
    typer.Option(rich_help_panel=SPEED, help="Of every operation: 'auto' or a name that [b]ttt4as info[/b] lists."),
]
Device = Annotated[
    str | None, typer.Option(rich_help_panel=SPEED, help="cpu, cuda or cuda:N.", show_default="cuda if there is one")
]
BatchSize = Annotated[int, typer.Option(min=1, rich_help_panel=SPEED, help="Images taken at once.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", file_okay=False, help="Folder for the results, made if absent.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Do again what is done already.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="File from [b]ttt4as fit[/b].", show_default=False)]
MovedWeights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        exists=True,
        dir_okay=False,
        help="Weight file of the backbone, where the model was fitted with a local one that is elsewhere now.",
        show_default=False,
    ),
]


def load_detector(
    model: Path, weights: Path | None, device: str | None, backend: str
) -> tuple[PatchCore, dict[str, str]]:
    """The detector in a model file, and what to record of it."""
    from .io import absolute
    from .patchcore import PatchCore
    from .results import file_digest

    if not model.is_file():
        what = "is a folder, not a file from ttt4as fit" if model.is_dir() else "does not exist"
        raise FileNotFoundError(f"model: {str(model)!r} {what}")
    detector = PatchCore.load(model, device=device, backend=backend, weights=weights)
    return detector, {"path": absolute(model), "sha256": file_digest(model)}


def threshold_of(detector: PatchCore, image_threshold: float | None, gate: bool) -> float | None:
    """The image threshold given, else the model's; a gate needs one."""
    from .kernels.arrays import check_float

    given = None if image_threshold is None else check_float(image_threshold, "image_threshold", -math.inf)
    threshold = detector.image_threshold_ if given is None else given
    if gate and threshold is None:
        raise ValueError(
            "the model has no image threshold (fitted with --validation-share 0): give --image-threshold, or --no-gate"
        )
    return threshold


METHOD_OPTIONS = {
    **{name: name for name in ("preset", "percentile", "neighbor_radius", "n_nominal", "loss", "nominal_sampling")},
    **{name: name for name in ("random_state", "tol", "max_iter", "backend")},
    "svm_c": "C",
}
"""Options of the method -> arguments of TTT4AS."""


def segmenter_of(context: typer.Context, image_threshold: float | None, detector: PatchCore | None = None) -> TTT4AS:
    """TTT4AS with the options of the command that runs, and what the detector's calibration says of nominal maps."""
    from .segmenter import TTT4AS

    values = {argument: context.params[option] for option, argument in METHOD_OPTIONS.items()}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    statistics = None if detector is None else detector.nominal_statistics_
    if values["preset"] == "robust" and statistics is not None:
        values["nominal_level"] = statistics.level
    return TTT4AS(**values, image_threshold=image_threshold)


def settings_of(segmenter: TTT4AS) -> dict[str, Any]:
    """What its masks depend on: the parameters, but not the backend, which changes the speed."""
    return {name: value for name, value in segmenter.get_params().items() if name != "backend"}
