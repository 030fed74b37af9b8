"""The `comoe` command. Thin: each command reads its arguments, calls the library and prints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer

from comoe.cli import commands
from comoe.cli.common import UNEXPECTED, one_line

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
    warnings.formatwarning = lambda message, *rest: f"warning: {' '.join(str(message).split())}\n"
    try:
        result = app(arguments, standalone_mode=False, prog_name="comoe")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except _UsageProblem as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        hint = "" if not isinstance(error, UNEXPECTED) else " (comoe --debug ... shows where)"
        print(f"error: {one_line(error)}{hint}", file=sys.stderr)
        return 1


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
