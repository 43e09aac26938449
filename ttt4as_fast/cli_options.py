"""The options that several commands of ``ttt4as`` share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


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
