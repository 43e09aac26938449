"""How the commands speak: results on stdout; progress bars, warnings and errors on stderr, each error one line."""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from .progress import Progress, silent

DEBUG = "TTT4AS_DEBUG"


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def escape_on_stdout() -> None:
    """From now on a name that stdout's encoding lacks is escaped, as on stderr; it would end work that is done."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """File names that are not UTF-8 with their odd bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _say_err(style: str, kind: str, text: str) -> None:
    console = _err()
    console.print(f"[{style}]{kind}:[/]", end=" ")
    console.print(printable(text), markup=False, soft_wrap=True)


def say_error(text: str) -> None:
    """One line on stderr."""
    _say_err("bold red", "error", text)


def failed(path: str, reason: str) -> None:
    """A file that is left out, and why."""
    _say_err("yellow", "skipped", f"{path}: {reason}")


def out(text: str) -> None:
    """One line on stdout, plain."""
    typer.echo(printable(text))


def command(app: typer.Typer, name: str | None, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: its docstring, with the line breaks within paragraphs undone, and examples as its help."""
    epilog = "\n\n".join(["[b]Examples[/b]", *(line.replace("[", "\\[") for line in examples)])

    def register(function: Callable[..., None]) -> Callable[..., None]:
        paragraphs = inspect.cleandoc(function.__doc__ or "").replace("[", "\\[").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        app.command(name, help=text, epilog=epilog)(user_errors()(function))
        return function

    return register


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar a stage on stderr; nothing where that is no terminal."""
    console = _err()
    if not console.is_terminal:
        yield silent
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<24}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with progress.Progress(*columns, console=console) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@contextmanager
def user_errors() -> Iterator[None]:
    """Mistakes of the user's become one line and exit code 2; anything else is a defect and keeps its traceback."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # the reader has closed the pipe: typer exits silently
        raise
    except KeyboardInterrupt:
        if debugging():
            raise
        say_error("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if debugging():
            raise
        say_error(" ".join(str(error).split()) or type(error).__name__)
        raise typer.Exit(2) from None


def warn(text: str) -> None:
    """One line on stderr."""
    _say_err("yellow", "warning", text)


def print_table(table: Any) -> None:
    """A table on stdout, its text as it stands; wide enough not to be cut where that is no terminal."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(highlight=False, markup=False, width=None if terminal else 200).print(table)
