"""The commands about stores elsewhere: pull, cache, and opening a model by its URL."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from comoe.cli.common import bytes_bar, output
from comoe.config import format_bytes, parse_bytes
from comoe.tiers.urls import is_url

if TYPE_CHECKING:
    from comoe.tiers.remote_store import RemoteStore

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Another URL of the same packed folder; may be repeated. Each request goes where it should "
        "arrive first.",
    ),
]


def open_remote(url: str, sources: list[str] | None, *, dense: bool = True) -> RemoteStore:
    """The store at a URL, with a bar while what is beside the experts comes."""
    from comoe.loading import open_url

    with bytes_bar("fetching what is beside the experts") as update:
        return open_url(url, sources or (), progress=update, dense=dense)


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a packed folder.")],
    up_to: Annotated[
        str | None,
        typer.Option(
            "--up-to",
            metavar="LEVEL",
            help="The finest level wanted, as `comoe inspect` names it (2, 3, 4, 8, exact).",
        ),
    ] = None,
    source: Sources = None,
    as_json: Json = False,
) -> None:
    """Fetch a packed folder into the local cache: all of it, or every expert up to a level.

    Stopped at any moment, the same command goes on from there. Afterwards `comoe run URL` needs no source
    for what was pulled.

    Example:  comoe pull https://host/models/qwen3-packed --up-to 4
    """
    from comoe.tiers.pull import pull as run

    with output(as_json) as emit:
        if not is_url(url):
            raise ValueError(f"pull: expected the URL of a packed folder, got {url}")
        remote = open_remote(url, source)
        try:
            with bytes_bar("pulling experts") as update:
                pulled = run(remote, up_to, update)
            links = remote.sources.links.stats()
        finally:
            remote.close()
        if as_json:
            emit(pulled.summary() | {"sources": links})
            return
        print(
            f"{format_bytes(pulled.bytes)} of experts up to {pulled.level} are here, "
            f"{format_bytes(pulled.fetched)} of them fetched now in {pulled.seconds:.1f} s\n"
            f"in {pulled.folder}"
        )


def cache(
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            help="Bytes that all stores here may take together, such as 20GB; none: as long as 5% of the disk are free.",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="NAME", help="Delete a store that nobody uses."),
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete every store that nobody uses.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show, limit or empty the local cache of remote stores.

    Example:  comoe cache --limit 20GB
    """
    from comoe.tiers import cache as stored

    base = stored.root()
    with output(as_json) as emit:
        if limit is not None:
            whole = None if limit.lower() == "none" else parse_bytes(limit, "--limit")
            stored.set_limit(base, whole)
            if whole is not None:
                over = sum(map(stored.disk_bytes, stored.stores(base))) - whole
                if over > 0:
                    stored.evict(base, over)
        found = {folder.name: folder for folder in stored.stores(base)}
        for name in remove or []:
            if name not in found:
                raise ValueError(f"--remove: {name} is not in {base}; `comoe cache` lists what is")
            if stored.remove_store(found[name]) == 0 and found[name].exists():
                raise ValueError(f"--remove: {name} is in use; stop what uses it first")
        if clear:
            for folder in found.values():
                stored.remove_store(folder)
        summary: dict[str, Any] = {
            "folder": str(base),
            "limit": stored.read_limit(base),
            "stores": [_store_row(folder) for folder in stored.stores(base)],
        }
        summary["bytes"] = sum(row["bytes"] for row in summary["stores"])
        emit(summary) if as_json else _show(summary)


def _store_row(folder: Any) -> dict[str, Any]:
    from comoe.store import Store, StoreError
    from comoe.tiers import cache as stored

    try:
        whole = sum(layer.file_bytes for layer in Store.open(folder).layers)
    except (StoreError, OSError):
        whole = None  # not opened to the end
    return {
        "name": folder.name,
        "bytes": stored.disk_bytes(folder),
        "store_bytes": whole,
        "last_used": stored.last_used(folder),
        "in_use": stored.in_use(folder),
    }


def _show(summary: dict[str, Any]) -> None:
    limit = summary["limit"]
    table = Table(title=escape(summary["folder"]), title_justify="left")
    for name in ("store", "here", "experts in all", "last used"):
        table.add_column(name, justify="left" if name == "store" else "right")
    for row in summary["stores"]:
        ago = time.time() - row["last_used"]
        used = datetime.fromtimestamp(row["last_used"]).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            row["name"],
            format_bytes(row["bytes"]),
            "n/a" if row["store_bytes"] is None else format_bytes(row["store_bytes"]),
            "in use" if row["in_use"] else "now" if ago < 60 else used,
        )
    Console().print(table)
    print(
        f"{format_bytes(summary['bytes'])} in all; "
        + (f"limit {format_bytes(limit)}" if limit else "no limit but 5% of the disk left free")
    )
