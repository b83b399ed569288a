"""What both programs ask about the machine, the hub and the installation, each failure with its cure."""

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from . import UserError
from .files import disk_full

GIB = 2**30
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja"]
DRIVER_NEEDED = {13: 580, 12: 525}  # CUDA major version of the wheel -> NVIDIA driver branch


class Table:
    """Prints one row per check as it is done and remembers the first failure."""

    def __init__(self) -> None:
        self.first_failure: str | None = None

    def row(self, verdict: str, name: str, text: str) -> None:
        print(f"  {verdict:4}  {name:14}  {text}", flush=True)

    def check(self, name: str, function: Callable[[], str | None]) -> bool:
        """Runs one check. It returns what it found (None: nothing to say, no row) or raises UserError."""
        try:
            found = function()
        except UserError as error:
            self.row("FAIL", name, str(error))
            self.first_failure = self.first_failure or str(error)
            return False
        if found is not None:
            verdict, _, text = (
                found.partition(":") if found.startswith(("WARN:", "SKIP:")) else ("PASS", "", found)
            )
            self.row(verdict, name, text.strip())
        return True


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package metadata: importing `deepspeed` could find this repository's folder."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"{name} is not installed; run `make install` (or pip install -r requirements.txt)"
            ) from error
    return found


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None if this machine has no NVIDIA device."""
    text = Path("/proc/driver/nvidia/version")
    if text.exists():
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)", text.read_text())
        return match.group(1) if match else "unknown"
    return "unknown" if Path("/dev/nvidiactl").exists() else None


def explain_no_cuda(driver: str | None, wheel_cuda: str | None, torch_version: str, older_driver: str) -> str:
    """One line for `torch.cuda.is_available() == False`: what was found, what is needed, the cure.
    `older_driver` is the program's way out for a driver that this wheel cannot use."""
    if driver is None:
        return "no NVIDIA GPU here; ask for one (srun --gres=gpu:2 ...), or try the CPU rehearsal: --rehearse"
    if wheel_cuda is None:
        return (
            f"an NVIDIA driver {driver} is here, but torch {torch_version} is a CPU build; run `make install`"
        )
    needed = DRIVER_NEEDED.get(int(wheel_cuda.split(".")[0]), 0)
    if driver != "unknown" and int(driver.split(".")[0]) < needed:
        return (
            f"NVIDIA driver {driver} is too old for torch {torch_version} (CUDA {wheel_cuda} needs driver {needed} "
            f"or newer); {older_driver}"
        )
    return (
        f"an NVIDIA driver ({driver}) is here, but torch {torch_version} sees no GPU; "
        f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}: is a GPU allocated to this job?"
    )


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a wheel built for `arch_list` (sm_75, ..., compute_90) runs on a GPU: binary code of the same
    major and a lower or equal minor capability, or PTX of a lower or equal one."""
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = re.sub(r"\D", "", number)
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


# --- models ----------------------------------------------------------------------------------------------


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
