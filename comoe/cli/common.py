"""What the commands share: where output goes, progress bars, and errors in one line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Kinds of error that a user cannot be expected to have caused.
UNEXPECTED = (AttributeError, AssertionError, IndexError, KeyError, NameError, NotImplementedError)


def one_line(error: BaseException) -> str:
    """The error's text on one line; its kind too, where the text alone would not be understood."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if not text or isinstance(error, UNEXPECTED):
        return f"{type(error).__name__}: {text}".rstrip(": ")
    return text


def warning_line(message: Any, *where: Any) -> str:
    """A warning for someone who did not write the code that warns."""
    return f"warning: {' '.join(str(message).split())}\n"


def progress_console() -> Console:
    """Where progress and remarks go: never to standard output."""
    return Console(stderr=True)


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Gives a function that prints the result as JSON; with as_json, all else that is printed while
    the command runs goes to standard error."""
    stdout = sys.stdout

    def emit(result: Any) -> None:
        json.dump(result, stdout, indent=2, allow_nan=False)
        stdout.write("\n")

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield emit


@contextlib.contextmanager
def bytes_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, rate and time left; gives update(done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _bar(text, columns) as update:
        yield update


@contextlib.contextmanager
def count_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that counts tokens; gives update(done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with _bar(text, columns) as update:
        yield update


@contextlib.contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long command; gives update(stage, done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console()) as progress:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update


@contextlib.contextmanager
def _bar(text: str, columns: tuple) -> Iterator[Callable[[int, int], None]]:
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def quiet_transformers() -> None:
    """No progress bars and no advice of transformers between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
