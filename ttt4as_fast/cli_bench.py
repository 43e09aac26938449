"""``ttt4as bench``: the commands of the benchmark suite. What they do lies in ``benchmarks/``, loaded when one runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from .cli_options import MovedWeights
from .terminal import command, out, print_table, progress_bars, user_errors, warn

bench_app = typer.Typer(no_args_is_help=False, rich_markup_mode="rich")

Threads = Annotated[
    int | None, typer.Option(min=1, help="For both sides of every comparison.", show_default="all processors")
]
Data = Annotated[
    Path | None, typer.Option(help="Data set to take the images from.", show_default="textures of scikit-image")
]
Results = Annotated[
    Path, typer.Option("--output", "-o", file_okay=False, help="Folder for the result files (JSON), made if absent.")
]
Readme = Annotated[
    Path | None, typer.Option(help="Markdown file whose block between the bench:begin and bench:end marks to renew.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of crops, defects and draws.")]
_RESULTS = Path("bench-results")


def _suite(name: str) -> ModuleType:
    """A module of the benchmark suite, which is installed as ``ttt4as_fast.benchmarks``."""
    try:
        return importlib.import_module(f"{__package__}.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.benchmarks":
            raise
        raise ValueError("the benchmark suite is not installed with this copy: reinstall the package") from None


def _begin(threads: int | None, output: Path) -> int:
    """What precedes every measurement: the folder is tried, threads are pinned before libraries load, all is printed.

    Returns the number of threads. Warns where the machine is busy, or a peer's BLAS does not know the processor.
    """
    from .io import check_folder

    check_folder(output, "output")
    machine = _suite("machine")
    threads = machine.processors() if threads is None else threads
    counts = machine.pin(threads)
    out(f"{threads} thread(s) for both sides: {', '.join(counts)}")
    _warn_if_busy(machine.load_of_others(), "use")
    old = machine.outdated(counts, machine.instruction_set())
    if old:
        warn(
            f"kernels older than this processor: {', '.join(old)}: peers are slower than they need be. "
            "OPENBLAS_CORETYPE=SkylakeX names others"
        )
    return threads


def _warn_if_busy(share: float | None, verb: str) -> None:
    if share is not None and share > _suite("machine").BUSY:
        warn(f"other programs {verb} {share:.0%} of this machine's processors: trust no time here, and ratios little")


def _finish(content: dict[str, Any], tables: list[Any], output: Path) -> None:
    """Tables on the screen, the result file, what is absent; exit code 1 where an output missed its gate."""
    for table in tables:
        print_table(table)
    for name, reason in content.get("absent_peers", {}).items():
        out(f"not measured: {name} ({reason})")
    out(f"wrote {_suite('results_file').save(content, output)}")
    _warn_if_busy(content["load_of_others"], "used")
    if not _suite("results_file").all_passed(content):
        warn("an output missed the reference: no speed-up is printed for it")
        raise typer.Exit(1)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@bench_app.callback(
    invoke_without_command=True, epilog="[b]Examples[/b]\n\nttt4as bench --quick\n\nttt4as bench --report report/"
)
@user_errors()
def headline(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Two shapes, few rounds: under half a minute.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write report.html and digest.md here, from the results in --output (the package's own if there is no "
            "such folder); measures nothing."
        ),
    ] = None,
    readme: Readme = None,
    threads: Threads = None,
    data: Data = None,
    seed: Seed = 0,
    output: Results = _RESULTS,
) -> None:
    """What test-time training adds to the time of an image, by stage, beside the published recipe."""
    if context.invoked_subcommand is not None:  # which would not hear of them
        given = [name for name in context.params if _given(context, name)]
        if given:
            raise ValueError(f"{given[0]}: expected after {context.invoked_subcommand!r}, got before it")
        return
    if report is not None:
        results = _suite("results_file").RESULTS if output == _RESULTS and not output.is_dir() else output
        for path in _suite("report").write(results, report, readme):
            out(f"wrote {path}, from the results in {results}")
        return
    if readme is not None:
        raise ValueError("readme: expected it beside --report only")
    threads = _begin(threads, output)
    suite = _suite("headline")
    names, seconds, bank = (suite.QUICK, 1.0, 4096) if quick else (suite.FULL, 6.0, 16_384)
    with progress_bars() as progress:
        content = suite.run(names, threads, seconds, seed, data, bank, progress=progress)
    _finish(content, [suite.table(content), suite.stage_table(content)], output)


@command(
    bench_app, "all", "ttt4as bench all --output benchmarks/results", "ttt4as bench all --suites 'growth|cpu' --again"
)
def everything(
    suites: Annotated[str, typer.Option(help="Pattern of the suites to measure.", show_default="all")] = "",
    again: Annotated[bool, typer.Option("--again", help="Also those whose result is current.")] = False,
    threads: Threads = None,
    data: Data = None,
    output: Results = _RESULTS,
) -> None:
    """Every suite whose results are committed, each in a process of its own: about half an hour on two cores.

    A suite whose result is there, from the same code, machine and number of threads, is kept: a run that was stopped
    goes on where it was. masks, which needs a data set, is not among them.
    """
    runner = _suite("suites")
    chosen = runner.chosen(suites)
    threads = _begin(threads, output)
    options = () if data is None else ("--data", str(data.resolve()))
    outcomes = runner.run(chosen, output, threads, options, again, out)
    for outcome in outcomes:
        planned = outcome.suite.minutes
        out(f"{outcome.suite.name:<14}{outcome.status:<15}{outcome.minutes:5.1f} min of {planned:g} planned")
    if any(outcome.status not in ("measured", "kept") for outcome in outcomes):
        raise typer.Exit(1)


@command(bench_app, "cpu", "ttt4as bench cpu", "ttt4as bench cpu --rows knn --threads 1")
def cpu(
    rows: Annotated[str, typer.Option(help="Pattern of the groups to measure.", show_default="all")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="For each comparison.")] = 4.0,
    threads: Threads = None,
    data: Data = None,
    output: Results = _RESULTS,
) -> None:
    """Each operation on the CPU against its peers: scikit-learn, FAISS, SciPy, scikit-image, torch, anomalib."""
    threads = _begin(threads, output)
    suite = _suite("cpu")
    with progress_bars() as progress:
        content = suite.run(suite.Plan(seconds=seconds, data=data), threads, rows, progress=progress)
    _finish(content, [suite.table(content)], output)


@command(bench_app, "growth", "ttt4as bench growth")
def growth(
    seconds: Annotated[float, typer.Option(min=0.1, help="For each point.")] = 1.5,
    threads: Threads = None,
    data: Data = None,
    output: Results = _RESULTS,
) -> None:
    """How time and memory grow with map, channels, grid, samples, batch and bank."""
    threads = _begin(threads, output)
    suite = _suite("growth")
    with progress_bars() as progress:
        content = suite.run(suite.Plan(seconds=seconds, data=data), threads, progress=progress)
    _finish(content, [suite.table(content)], output)


@command(
    bench_app,
    "latency",
    "ttt4as bench latency --rate 30",
    "ttt4as bench latency --workload dinov2_vits14 --calls 10000",
)
def latency(
    workload: Annotated[str, typer.Option(help="Shape of the features; a wrong name lists them all.")] = "wrn50",
    calls: Annotated[int, typer.Option(min=10, help="Images in each run.")] = 3000,
    rate: Annotated[float, typer.Option(min=0.1, help="Images a second that the camera takes.")] = 50.0,
    threads: Threads = None,
    data: Data = None,
    output: Results = _RESULTS,
) -> None:
    """Latency under a steady camera, alone and beside a busy thread; throughput; cold start."""
    known = _suite("workloads").WORKLOADS
    if workload not in known:
        raise ValueError(f"workload: expected one of {', '.join(known)}, got {workload!r}")
    threads = _begin(threads, output)
    suite = _suite("latency")
    with progress_bars() as progress:
        content = suite.run(workload, threads, calls, rate, data=data, progress=progress)
    _finish(content, suite.tables(content), output)


@command(bench_app, "integrations", "ttt4as bench integrations", "ttt4as bench integrations --hosts 'FAISS|scikit'")
def integrations(
    hosts: Annotated[str, typer.Option(help="Pattern of the hosts to measure.", show_default="all")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="For each comparison.")] = 4.0,
    threads: Threads = None,
    data: Data = None,
    output: Results = _RESULTS,
) -> None:
    """anomalib, scikit-learn, PyTorch, FAISS and the HTTP service, each as it is and with one line switched."""
    threads = _begin(threads, output)
    suite = _suite("integrations")
    with progress_bars() as progress:
        content = suite.run(suite.Plan(seconds=seconds, data=data), threads, hosts, progress=progress)
    _finish(content, [suite.table(content)], output)


@command(
    bench_app,
    "masks",
    "ttt4as bench masks mvtec_ad/screw",
    "ttt4as bench masks mvtec_ad/screw --image-size 320 --crop-size 320",
)
def masks(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET_DIR", help="Root of one category.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Model from [b]ttt4as fit[/b].", show_default="one is fitted")
    ] = None,
    weights: MovedWeights = None,
    image_size: Annotated[int, typer.Option(min=8, help="Of the model that is fitted.")] = 256,
    crop_size: Annotated[int, typer.Option(min=8, help="Of the model that is fitted.")] = 224,
    threads: Threads = None,
    output: Results = _RESULTS,
) -> None:
    """Every way to make a mask on identical maps, beside the figures printed in the paper where it has the category."""
    if weights is not None and model is None:
        raise ValueError("weights: belong to a model that was fitted with them: give --model")
    threads = _begin(threads, output)
    suite = _suite("masks")
    with progress_bars() as progress:
        content = suite.run(dataset, model, image_size, crop_size, threads, progress=progress, weights=weights)
    _finish(content, suite.tables(content), output)
