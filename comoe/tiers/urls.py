"""URLs of stores: which strings are one, how files are named below one, and what may be shown of it."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit, urlunsplit

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)


def is_url(path: object) -> bool:
    """Whether it names a store elsewhere: `scheme://...`."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment, which may be secrets: for messages and logs."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return url.partition("://")[0] + "://..."


def below(url: str, path: str) -> str:
    """The URL of file `path` of the store at `url`; a query (a signature) stays."""
    parts = urlsplit(url)
    whole = parts.path.rstrip("/") + "/" + quote(path)
    return urlunsplit((parts.scheme, parts.netloc, whole, parts.query, ""))
