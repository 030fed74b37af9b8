"""A store anywhere that fsspec can read by range: s3, gs, hf, file and so on. Credentials are fsspec's matter."""

from __future__ import annotations

from typing import Any

from comoe.tiers.source import BadAnswer, Gone, Refused, SourceError, Transfer, Unreachable
from comoe.tiers.urls import redacted

PART = 8 << 20  # bytes per call: fsspec gives whole results, and cannot be stopped within one


class FsspecSource:
    """Files below `url`, as fsspec names it (`hf://user/repo`, `s3://bucket/path`, ...)."""

    def __init__(self, url: str):
        self.name = redacted(url)
        import fsspec

        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            # Both name what is missing, and neither the URL's secrets.
            raise ValueError(f"{self.name}: fsspec cannot open it: {_plain(error)}") from None
        self._root = root.rstrip("/")

    def read_into(
        self, path: str, offset: int, view: memoryview, transfer: Transfer, size: int | None = None
    ) -> None:
        at = 0
        while at < len(view):
            count = min(PART, len(view) - at)
            data = self._cat(path, offset + at, offset + at + count)
            transfer.begin_body()
            if len(data) != count:
                raise BadAnswer(
                    f"{self.name}: {path}: {count:,} bytes asked for at {offset + at:,}, {len(data):,} came"
                )
            view[at : at + count] = data
            at += count
            transfer.progress(count)

    def read_all(self, path: str, most: int, transfer: Transfer) -> bytes:
        size = self._call(path, lambda at: self._fs.info(at)["size"])
        if size is not None and size > most:
            raise BadAnswer(
                f"{self.name}: {path}: {size:,} bytes, more than the {most:,} it may have"
            )
        data = self._cat(path, None, None)
        transfer.begin_body()
        transfer.progress(len(data))
        if size is not None and len(data) != size:
            raise BadAnswer(f"{self.name}: {path}: {size:,} bytes expected, {len(data):,} came")
        return data

    def probe(self, path: str, seconds: float, transfer: Transfer) -> bool:
        try:
            return len(self._cat(path, 0, 1)) == 1
        except Unreachable:
            return False
        except SourceError:
            return True

    def forget(self, path: str) -> None:
        self._fs.invalidate_cache()

    def close(self) -> None:
        pass

    def _cat(self, path: str, begin: int | None, end: int | None) -> bytes:
        return self._call(path, lambda at: self._fs.cat_file(at, start=begin, end=end))

    def _call(self, path: str, read: Any) -> Any:
        where = f"{self.name}: {path}"
        try:
            return read(f"{self._root}/{path}")
        except FileNotFoundError:
            raise Gone(f"{where}: no such file; is the URL that of a packed folder?") from None
        except PermissionError:
            raise Refused(f"{where}: not allowed; credentials are missing or wrong") from None
        except SourceError:
            raise
        except Exception as error:  # each file system raises kinds of its own
            raise Unreachable(f"{where}: {type(error).__name__}") from None


def _plain(error: Exception) -> str:
    """An error's text without anything that looks like a URL."""
    return " ".join(redacted(word) if "://" in word else word for word in str(error).split())
