"""The `comoe` command. Thin: each command reads its arguments, calls the library and prints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer

from comoe.cli import commands
from comoe.cli.common import UNEXPECTED, one_line, warning_line

# Wrong usage. typer brought click along until 0.28 and has a copy of its own since; either way the
# base of its errors is the one that BadParameter has.
_UsageProblem = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="comoe",
    help="Runs Mixture-of-Experts language models in a memory far smaller than the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    try:
        status = app(arguments, standalone_mode=False, prog_name="comoe")
        sys.stdout.flush()
        status = status if isinstance(status, int) else 0
    except typer.Exit as stop:
        status = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except _UsageProblem as error:
        error.show()
        status = error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if debug:
            raise
        hint = "" if not isinstance(error, UNEXPECTED) else " (comoe --debug ... shows where)"
        print(f"error: {one_line(error)}{hint}", file=sys.stderr)
        status = 1
    if status == 130:  # typer's own way of saying KeyboardInterrupt, too
        print("interrupted", file=sys.stderr)
    return status


def run() -> None:
    """Entry point of the installed command."""
    warnings.formatwarning = warning_line
    sys.exit(main())
