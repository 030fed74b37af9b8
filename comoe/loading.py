"""comoe.load and comoe.offload: a model whose experts live within a budget."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config import CoMoEConfig, parse_bytes
from comoe.tiers.urls import is_url

if TYPE_CHECKING:
    from comoe.tiers.remote_store import RemoteStore


def register() -> None:
    """Teaches transformers the packed format; afterwards plain `from_pretrained(folder)` works.

    May be called more than once.
    """
    from comoe.hf.quantizer import register as register_quantizer

    register_quantizer()


def load(
    path: str | os.PathLike | RemoteStore,
    memory: str | int | None = None,
    *,
    exact: bool = False,
    sources: Sequence[str] = (),
    **options: Any,
):
    """A transformers model that keeps within `memory`, beside the interpreter's own baseline.

    path: a folder made by `comoe pack`, an unpacked checkpoint folder, or a hub id; the last two are
    packed into a cache on first use. Or the URL of a packed folder on any server (docs/remote.md),
    or what `open_url` returned for it, which the model then closes.
    sources: URLs of other places that have the same packed folder, beside `path`, which is one then.
    memory: bytes, or a size such as "4.7GB": dense weights, KV cache, experts and workspace. None: what
    the machine has available now.
    exact: use only the original weights, so that the tokens are those of plain transformers.
    options: other fields of CoMoEConfig, and `dtype`, which from_pretrained gets.

    Returns a model of transformers' own class; `model.comoe` is its Runtime (`set_memory`, `stats`,
    `describe`, `close`). Raises BudgetError when the model cannot run in `memory`, StoreError when the
    store is damaged, and UnsupportedModelError for a model that has no experts comoe knows.
    """
    dtype = options.pop("dtype", "auto")
    config = CoMoEConfig.create(memory=memory, exact=exact, **options)
    register()
    from comoe.hf.load import load_packed

    if is_url(path) or is_open(path):
        remote = open_url(path, sources) if is_url(path) else path
        try:
            with remote.loading():
                return load_packed(remote.folder, config, dtype)
        except BaseException:
            remote.close()
            raise
    if sources:
        raise ValueError(f"sources: expected none beside a folder; {path} is not a URL")
    return load_packed(packed_folder(path), config, dtype)


def open_url(
    url: str,
    sources: Sequence[str] = (),
    *,
    progress: Callable[[int, int], None] | None = None,
    dense: bool = True,
) -> RemoteStore:
    """The packed folder at a URL, opened: what is beside the experts is in the local cache afterwards.

    sources: URLs of other places that have the same.  progress(done, total): bytes fetched; None: a line on
    standard error.  dense: with False, only what describes the experts. Close it, or give it to `load`.
    """
    from comoe.tiers.remote_store import RemoteStore

    report = progress or _print_progress("fetched what is beside the experts")
    remote = RemoteStore.open(list(dict.fromkeys([url, *sources])), progress=report, dense=dense)
    if remote.offline:
        print(
            f"comoe: no source answers ({remote.offline}); using what is in {remote.folder}",
            file=sys.stderr,
        )
    return remote


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer of a packed or unpacked folder, of a hub id, or of a packed folder's URL."""
    from transformers import AutoTokenizer

    from comoe.packing import TOKENIZER_FILES

    if is_url(path):
        remote = open_url(path)
        remote.close()
        path = remote.folder
    # transformers makes an empty tokenizer where it finds no file.
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"load_tokenizer: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the original model's there"
        )
    return AutoTokenizer.from_pretrained(path)


def offload(
    model,
    memory: str | int,
    *,
    exact: bool = False,
    folder: str | os.PathLike | None = None,
    **options: Any,
):
    """Moves the experts of a model that is in memory into a store, and runs them from there.

    The MoE layers are replaced in place once the whole store is written, so that a full disk costs
    nothing. folder: where the store goes; None: a temporary folder that `model.comoe.close()` and
    the end of the process remove. Returns the same model; the rest is as for `load`.
    """
    config = CoMoEConfig.create(memory=parse_bytes(memory), exact=exact, **options)
    from comoe.hf.offload import offload_model

    return offload_model(model, config, None if folder is None else Path(folder))


def is_open(path: object) -> bool:
    """Whether it is what `open_url` returns."""
    return hasattr(path, "loading")


def packed_folder(path: str | os.PathLike) -> Path:
    """The packed folder for `path`: itself, or one in the cache, which is packed first if need be."""
    from comoe.packing import is_packed, pack

    folder = Path(path)
    if not folder.is_dir():
        folder = _from_hub(str(path))
    if is_packed(folder):
        return folder
    packed = cache_root() / "packed" / f"{folder.resolve().name}-{_fingerprint(folder)}"
    if not is_packed(packed):
        print(f"comoe: packing {folder} into {packed} (once)", file=sys.stderr)
        packed.parent.mkdir(parents=True, exist_ok=True)
        pack(folder, packed, progress=_print_progress("packed"))
    return packed


def cache_root() -> Path:
    """Where packed copies go: $XDG_CACHE_HOME/comoe, by default ~/.cache/comoe."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "comoe"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"load: {name} is not a folder; give a model folder or a hub id")
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"load: {name} is neither a folder here nor a model that could be fetched from the hub ({error})"
        ) from error


def _fingerprint(folder: Path) -> str:
    """Names, sizes and times of a checkpoint's files: changes when the checkpoint does."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr((str(folder.resolve()), stats)).encode()).hexdigest()[:12]


def _print_progress(what: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\rcomoe: {what} {done / max(total, 1):6.1%}", end=end, file=sys.stderr)

    return show
