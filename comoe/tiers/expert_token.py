"""The token that callers of serve-experts must send: a file, so that it is in no command line and no log."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path

LEAST_TOKEN = 16  # characters


def read_token(path: str | Path) -> str:
    """The first line of a file that only its owner can read. Raises ValueError if it will not do."""
    path = Path(path)
    try:
        lines = path.read_text("ascii").splitlines()
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(
            f"token file: {path} cannot be read ({error.strerror}); make one: comoe serve-experts --make-token {path}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"token file: {path}: expected ASCII text") from error
    token = lines[0].strip() if lines else ""
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        raise ValueError(
            f"token file: {path}: expected a first line of at least {LEAST_TOKEN} printable characters "
            "without spaces"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"token file: others may read {path}; chmod 600 {path}")
    return token


def make_token(path: str | Path) -> None:
    """Writes a new token of 256 bits, readable by its owner only. Raises FileExistsError."""
    path = Path(path)
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secrets.token_urlsafe(32) + "\n")
