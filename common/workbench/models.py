"""Models, adapters and data sets: folders, the hub's cache, downloads, and which weights a run used."""

import codecs
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from . import UserError
from .files import disk_full
from .machine import GIB

MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja"]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# How many bits a number has, and those that are all set in NaN and infinities only.
EXPONENT = {"F64": (64, 0x7FF << 52), "F32": (32, 0xFF << 23), "F16": (16, 0x1F << 10), "BF16": (16, 0xFF << 7)}
REAL_MODEL = Path(sys.prefix) / "models" / "SmolLM2-135M-Instruct"  # rehearsal/smollm2.py puts it there


def real_model() -> Path | None:
    """The rehearsal's model with weights that mean something, if this environment has it."""
    return REAL_MODEL if (REAL_MODEL / "config.json").exists() else None


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The snapshot folder of a hub model if config, tokenizer and every weight file are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    try:
        check_model_folder(folder)
    except UserError:
        return None
    return folder


def check_model_folder(folder: Path, weights: bool = True) -> None:
    """Raises UserError if a file that loading needs is missing or not whole; `weights=False` leaves those out."""
    for names in (("config.json",), ("tokenizer.json", "tokenizer.model")):
        if not any((folder / name).exists() for name in names):
            raise UserError(
                f"{folder}: no {' or '.join(names)} in it; not complete, or not a model in Hugging Face format"
            )
    if not weights:
        return
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.exists():
        found = read_object(index).get("weight_map")
        shards = set(map(str, found.values())) if isinstance(found, dict) else set()
        if not shards:
            raise UserError(f"{index}: names no weight files (weight_map); download it again, or remove it")
        names = sorted(shards)
    if not names:
        raise UserError(f"{folder}: no weights (*.safetensors) in it; convert or download them again")
    missing = [name for name in names if not os.path.exists(folder / name)]  # a link to nothing is missing, too
    if missing:
        raise UserError(
            f"{folder}: not complete: {len(missing)} of {len(names)} weight files missing, e.g. {missing[0]}; "
            "download the model again"
        )
    for name in names:
        check_tensors(folder / name)


def check_tensors(path: Path) -> None:
    """Raises UserError for a safetensors file that is cut or something else. Reads its header only."""
    from safetensors import SafetensorError, safe_open

    check_no_pointer(path)
    try:
        safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cut or damaged ({error}); copy or download it again") from error


def check_no_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(30)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git-LFS pointer, not the file; run `git lfs pull` in its folder")


def read_object(path: Path) -> dict:
    """A JSON object. Raises UserError."""
    check_no_pointer(path)
    raw = path.read_bytes()
    if raw.startswith(codecs.BOM_UTF8):
        raise UserError(
            f"{path}: begins with a byte order mark, which transformers does not read; save it without"
        )
    try:
        found = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object is expected, this is a {type(found).__name__}")
    return found


def check_config(folder: Path, quantised: tuple[str, ...] = ()) -> dict:
    """config.json of a model. Raises UserError for code of the model's own, which is never run, weights quantised by
    another method than those given, and a tokenizer or padding that the embedding has no rows for."""
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    path = folder / "config.json"
    config = read_object(path)
    kind, rows, padding = (config.get(name) for name in ("model_type", "vocab_size", "pad_token_id"))
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        own = ", and code that comes with a model is never run" if "auto_map" in config else ""
        raise UserError(f"{path}: model_type {kind!r} is none that transformers has{own}; use another model")
    if found := config.get("quantization_config") or config.get("compression_config"):
        method = found.get("quant_method", "a method unknown") if isinstance(found, dict) else found
        if method not in quantised:
            raise UserError(f"{path}: the weights are quantised by {method}; use those in 16 or 32 bits")
    if not isinstance(rows, int):
        raise UserError(f"{path}: vocab_size is {rows!r}; not that of a language model")
    if isinstance(padding, int) and not -rows <= padding < rows:
        raise UserError(
            f"{path}: pad_token_id {padding} is outside the embedding of {rows} rows; write null, or a token's id"
        )
    check_tokens(folder, rows, added=False)  # mirrors of Llama-2 have a <pad> there; texts are looked at
    return config


def check_tokens(folder: Path, rows: int, added: bool = True) -> None:
    """Raises UserError if the tokenizer in a model's or adapter's folder, and what it has `added`, has ids for which an
    embedding of so many `rows` has none."""
    from tokenizers import Tokenizer

    tokens: dict[str, int] = {}
    path = folder / "tokenizer.json"
    if path.exists():
        check_no_pointer(path)
        try:
            tokens |= Tokenizer.from_file(str(path)).get_vocab()
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path}: not a tokenizer ({error}); copy or download it again") from error
    if added and (folder / "added_tokens.json").exists():
        tokens |= read_object(folder / "added_tokens.json")
    for token, index in tokens.items():
        if not isinstance(index, int) or index >= rows:
            raise UserError(
                f"{folder}: its tokenizer gives {token!r} the id {index}, the embedding has {rows} rows; remove the added "
                "tokens, or use a model whose embedding was resized for them"
            )


def load_tokenizer(folder: Path):
    """Raises UserError, for code of the tokenizer's own, too."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each class of tokenizers has its own
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({in_one_line(error)})") from error


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_adapter(folder: Path) -> tuple[dict, dict[str, list[int]]]:
    """(adapter_config.json, the tensors' shapes). Raises UserError, for tensors that are empty or not finite, too."""
    import numpy as np

    for name in ADAPTER_FILES:
        if not (folder / name).exists():
            raise UserError(f"adapter {folder}: no {name}; give the folder of a finished fine-tuning run")
    settings, path = (folder / name for name in ADAPTER_FILES)
    settings = read_object(settings)
    check_tensors(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        empty = [name for name, tensor in header.items() if 0 in tensor["shape"]]
        if empty or not header:
            raise UserError(
                f"{path}: {len(empty)} of {len(header)} tensors are empty, as saved under ZeRO-3 without gathering "
                "them; save it again with the parameters gathered"
            )
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if tensor["dtype"] not in EXPONENT:
                raise UserError(f"{path}: {name} is of type {tensor['dtype']}; {', '.join(EXPONENT)} are read")
            bits, exponent = EXPONENT[tensor["dtype"]]
            start, end = tensor["data_offsets"]
            file.seek(8 + size + start)
            values = np.frombuffer(file.read(end - start), f"<u{bits // 8}")
            if (values & exponent == exponent).any():
                raise UserError(f"{path}: {name} has NaN or infinite values; the training diverged")
    return settings, {name: tensor["shape"] for name, tensor in header.items()}


def explain_hub_error(name: str, kind: str, error: Exception, flag: str, program: str) -> str:
    """One line with the cure for what huggingface_hub raised about the `kind` ('model', 'dataset') `name`,
    which was given by `flag` of the command `program`."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    text = str(error)
    if isinstance(error, HFValidationError):
        return f"{flag} {name}: neither a file or folder here nor a valid {kind} id on the hub (owner/name)"
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
    if os.path.isdir(name):
        check_model_folder(Path(name), weights)
        return Path(name), None, f"{name} (local folder)"
    if os.path.exists(name):
        raise UserError(f"{flag} {name}: is a file; give the model's folder or a hub id")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)  # offline the hub's client does not look at it
    except HFValidationError as error:
        raise UserError(explain_hub_error(name, "model", error, flag, program)) from error
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
