"""Text that the bundled demo model has never seen: whole modules of the standard library.

The demo model is trained on Python sources, and these modules (with their copies and
backports in other packages) are kept out of its training text.  Every Python installation has
them, so perplexity on honest, unseen text can be measured anywhere without a download.

The sources are those of the running interpreter, so the text differs slightly between versions
of Python: compare figures only within one version, and state it next to a figure.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

__all__ = ["HELD_OUT_MODULES", "held_out_text"]

# Ordinary pure-Python modules which are single files in Python 3.10 to 3.13.
HELD_OUT_MODULES = (
    "argparse",
    "heapq",
    "textwrap",
    "csv",
    "fractions",
    "statistics",
    "shlex",
    "configparser",
    "calendar",
    "fileinput",
    "graphlib",
    "sched",
    "queue",
    "tempfile",
    "copy",
    "contextlib",
    "shelve",
    "filecmp",
    "cmd",
)


def held_out_text(max_bytes: int | None = None) -> str:
    """Return the sources of the held-out modules, joined in the order of ``HELD_OUT_MODULES``.

    With ``max_bytes`` the text is cut to that many bytes of UTF-8 (never inside a character).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = (folder / f"{name}.py" for name in HELD_OUT_MODULES)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    if max_bytes is None:
        return text
    return text.encode("utf-8")[:max_bytes].decode("utf-8", errors="ignore")
