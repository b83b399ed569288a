"""Files that survive a kill, one run per folder, and recognising a full disk."""

import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import UserError

CLAIM_TIMEOUT_S = 5.0  # the processes of a run that was just killed may need a moment to disappear


def to_json(value: object) -> object:
    """Replaces NaN and infinities by null, recursively: the files stay valid JSON."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: object, writer: str = "") -> None:
    """Sorted JSON, written as `write_lines` does."""
    text = json.dumps(to_json(value), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_lines(path, [text], writer)


def write_text(path: Path, text: str) -> None:
    """As `write_lines` does."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str], writer: str = "") -> None:
    """Writes a neighbour file and renames it: readers see the old file or the new one, on disk. Each `writer` that may
    write `path` at the same time names itself."""
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.writelines(lines)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


@contextmanager
def claim(folder: Path, flag: str, writer: str = ""):
    """Holds the folder against a second run while the block runs; a `writer` of several shares it with the others and
    holds its name against a second of that name. The lock is the kernel's (flock, shared with forked children) and disappears with the last process that holds
    it, however that ends. `flag` is the one that named the folder. Raises UserError."""
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks = {
                ".lock": fcntl.LOCK_SH,
                f".lock{writer}": fcntl.LOCK_EX,
            }  # without a name: one, and exclusive
            # NFS wants a file that is open for reading to share it, and for writing to hold it alone.
            found = [(held.enter_context((folder / name).open("a+")), kind) for name, kind in locks.items()]
        except OSError as error:
            raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from error
        for lock, kind in found:
            _wait_for(lock, kind, f"{flag} {folder}")
        yield


def _wait_for(lock, kind: int, where: str) -> None:
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"{where}: another run is writing there; wait or name another") from None
            time.sleep(0.1)
        except OSError as error:  # Lustre without -o flock, for one
            print(f"WARNING: {where}: no locks there ({error.strerror}); start one run at a time", flush=True)
            return None


def check_identity(where: str, stored: dict, here: dict, cure: str) -> None:
    """Raises UserError, with the flags that differ, unless the run stored `where` is of this command."""
    different = [
        f"--{key} {stored.get(key)} there, {here.get(key)} here"
        for key in sorted(stored.keys() | here.keys())
        if stored.get(key) != here.get(key)
    ]
    if different:
        raise UserError(f"{where} holds another run ({'; '.join(different)}); {cure}")


def check_room(folder: Path, flag: str, needed_bytes: int, at_once_bytes: int, cure: str) -> str:
    """Free space against what a run needs in all. What it writes `at_once` is allocated for a moment, because a
    quota does not show as free space. Returns what was found; raises UserError with the cure."""
    probe, needed = folder / ".disk_probe", shown_bytes(needed_bytes)
    try:
        with probe.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, max(1, at_once_bytes))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{flag} {folder}: {needed} needed ({error.strerror}); {cure}") from error
    finally:
        probe.unlink(missing_ok=True)
    if free < needed_bytes:
        raise UserError(f"{flag} {folder}: {shown_bytes(free)} free, {needed} needed; {cure}")
    return f"{shown_bytes(free)} free in {folder}, {needed} needed"


def shown_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error`, or what caused it, comes from a full disk or quota. torch.save and safetensors wrap
    the operating system's error in their own, so the free space is looked at too."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(seen) for text in ("No space left", "Disk quota exceeded", "os error 28")):
            return True
        seen = seen.__cause__ or seen.__context__
    texts = ("PytorchStreamWriter", "inline_container", "iostream error", "SafetensorError")
    writing = any(text in str(error) for text in texts)
    return writing and shutil.disk_usage(folder).free < 2**20


def commit(tree: Path | None = None) -> str | None:
    """Of the repository that holds `tree` (this one), with "-dirty" if files differ (results of benchmarks do not
    count); None outside git."""
    git = ["git", "-C", str((tree or Path(__file__).parent).resolve())]
    changes = [*git, "diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)bench/results"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(changes, capture_output=True).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if dirty else "")
