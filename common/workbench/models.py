"""Models and data sets: folders, the hub's cache, downloads, and which weights a run used."""

import hashlib
import json
import shutil
from pathlib import Path

from . import UserError
from .files import disk_full
from .machine import GIB

MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja"]


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The snapshot folder of a hub model if config, tokenizer and every weight file are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    try:
        check_model_folder(folder)
    except UserError:
        return None
    return folder


def check_model_folder(folder: Path, weights: bool = True) -> None:
    """Raises UserError if a file that loading needs is missing; `weights=False` leaves those out."""
    for names in (("config.json",), ("tokenizer.json", "tokenizer.model")):
        if not any((folder / name).exists() for name in names):
            raise UserError(f"{folder}: no {' or '.join(names)}; is this a model in Hugging Face format?")
    if not weights:
        return
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).exists())
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(shards)} weight files missing, e.g. {missing[0]}"
            )
    elif not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no weights (*.safetensors) in it; convert or download them again")


def explain_hub_error(name: str, kind: str, error: Exception, flag: str, program: str) -> str:
    """One line with the cure for what huggingface_hub raised about the `kind` ('model', 'dataset') `name`,
    which was given by `flag` of the command `program`."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    text = str(error)
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError: look at it first
        if get_token() is None:
            return f"{name} is gated and there is no token; ask for access on its page, then `hf auth login`"
        if "awaiting" in text or "pending" in text:
            return f"{name}: your request for access is pending; wait for the mail, or use another {flag}"
        return f"{name}: your token has no access; ask for it on the model's page with the same account"
    if isinstance(error, RepositoryNotFoundError):
        return f"{flag} {name}: neither a file here nor a {kind} on the hub (private ones need `hf auth login`)"
    return (
        f"{name} is not complete in the cache and the hub cannot be reached ({type(error).__name__}); on a node with "
        f"internet run: {program} --download_only"
    )


def find_model(name: str, flag: str, program: str, weights: bool = True) -> tuple[Path, str | None, str]:
    """(folder, revision on the hub or None, what was found) of a local folder, a cached or a fetched model.
    Raises UserError with the cure."""
    if Path(name).is_dir():
        check_model_folder(Path(name), weights)
        return Path(name), None, f"{name} (local folder)"
    if Path(name).exists():
        raise UserError(f"{flag} {name}: is a file; give the model's folder or a hub id")
    folder = cached_model(name)
    found = "complete in the cache"
    if folder is None:
        from huggingface_hub import HfApi, snapshot_download

        try:
            HfApi().auth_check(name)
            check_download_space(name)
            print(f"        fetching {name} (once)", flush=True)
            folder = Path(snapshot_download(name, allow_patterns=MODEL_FILES, max_workers=4))
        except UserError:
            raise
        except Exception as error:
            if disk_full(error, Path.home()):
                raise UserError(
                    f"{hub_cache()}: disk or quota full while fetching {name}; set LLM_STORAGE"
                ) from error
            raise UserError(explain_hub_error(name, "model", error, flag, program)) from error
        check_model_folder(folder)
        found = "fetched"
    return folder, folder.name, f"{name} at {folder.name[:12]}, {found}"


def hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def check_download_space(name: str) -> None:
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(name, files_metadata=True).siblings or []
    size = sum(file.size or 0 for file in siblings if file.rfilename.endswith(".safetensors"))
    cache = hub_cache()
    blobs = cache / f"models--{name.replace('/', '--')}" / "blobs"
    size -= sum(path.stat().st_size for path in blobs.glob("*"))  # what an interrupted download has left
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < size:
        raise UserError(
            f"{cache}: {free / GIB:.1f} GiB free, {name} needs {size / GIB:.1f}; "
            "set LLM_STORAGE to a larger disk"
        )


def fingerprint(paths: list[Path]) -> str:
    """Hash of files: of their content up to 1 GiB in all, else of 64 KiB in every 16 MiB."""
    digest = hashlib.sha256()
    small = sum(path.stat().st_size for path in paths) < GIB
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, 2**24):
                file.seek(start)
                digest.update(file.read(2**24 if small else 2**16))
    return digest.hexdigest()[:32]


def weights_fingerprint(folder: Path) -> str:
    return fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
