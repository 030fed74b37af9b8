"""python -m comoe: the same as the `comoe` command."""

from comoe.cli import run

run()
