"""What a student handed in, read as data: nothing of it runs, and nothing of it can harm the grading of the next one.

A submission is a zip or a folder that holds finetune/ and inference/, or a copy of the repository's folders that the
programs write to, with up to three folders around them. Of each part the outermost folder counts; two equally deep
ones are refused. Files are read one by one under the names below, each with a limit, and never unpacked to where their
names point. Refused, with one line: symbolic links, whatever is not a plain file, more than MOST_ENTRIES or MOST_BYTES,
more than MOST_RATIO bytes out of one; text that is not UTF-8; JSON that is not valid, has NaN or infinities, or is
nested too deeply; JSONL of more than MOST_LINES.
"""

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors import deserialize

MIB = 2**20
# A file of each part; the answers that the handout ships in reference/ to compare with are not the student's.
AROUND = r"(?P<folder>(?!(?:.*/)?reference/)(?P<around>(?:[^/]+/){0,3})"
PARTS = {
    "finetune": AROUND + r"(?:finetune|deepspeed/output_llama2_7b_lora))/"
    r"(?:adapter_config\.json|adapter_model\.safetensors|run_config\.json|summary\.json|metrics\.jsonl)",
    "inference": AROUND + r"(?:inference|sglang))/(?:outputs\.jsonl|outputs_all\.json|summary\.json)",
}
TOP_FOLDERS, MOST_DEPTH = ("finetune", "deepspeed", "inference", "sglang"), 5
LIMITS = {".safetensors": 1024 * MIB, ".jsonl": 64 * MIB, ".json": 64 * MIB}
MOST_ENTRIES, MOST_BYTES, MOST_RATIO, MOST_LINES = 20_000, 8 * 2**30, 200, 10_000
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".7z", ".rar")
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class Refused(Exception):
    """Why a file of a submission is not looked at: one line."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever the block raises becomes a Refused: zipfile raises a dozen kinds for damaged archives, and a panic of
    safetensors' Rust code is no Exception."""
    try:
        yield
    except (Refused, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise Refused(f"{what}: {printable(error)}") from error


def printable(text: object, length: int = 200) -> str:
    """One line of at most `length` plain characters, whatever a student's file or file name holds."""
    plain = str(text)[:length].encode("ascii", "backslashreplace").decode()
    return plain.translate(dict.fromkeys([*range(32), 127], " "))[:length]


def submissions_in(path: Path) -> list[Path]:
    """[path] if it is a submission itself, else what is in the folder."""
    if not path.is_dir() or any((path / name).is_dir() for name in TOP_FOLDERS):
        return [path]
    return sorted(entry for entry in path.iterdir() if entry.name[0] != "." and entry.name != "__MACOSX")


def outermost(part: str, names: Iterable[str]) -> list[str]:
    """The folders that hold files of a part, with as few folders around them as any."""
    matches = filter(None, (re.fullmatch(PARTS[part], name, re.DOTALL) for name in names))
    depths = {match["folder"]: match["around"].count("/") for match in matches}
    return sorted(folder for folder, depth in depths.items() if depth == min(depths.values()))


class Submission:
    """Reads the files of one submission. Every method raises Refused."""

    def __init__(self, path: Path) -> None:
        self.archive: zipfile.ZipFile | None = None
        self.files: dict[
            str, list[Path | zipfile.ZipInfo]
        ] = {}  # by name as on Linux; a zip may have a name twice
        if path.is_symlink():
            raise Refused("is a symbolic link")
        if path.is_dir():
            with refusing("cannot be read"):
                self._walk(path)
        elif path.is_file() and zipfile.is_zipfile(path):
            with refusing("cannot be opened as a zip"):
                self._open(path)
        else:
            raise Refused("is neither a folder nor a zip")

    def _walk(self, path: Path) -> None:
        """Files as deep as a part may be, not what is hidden or behind a link to a folder."""
        os.scandir(path).close()  # raises what walk() would pass over
        for folder, inner, files in os.walk(path):
            around = PurePosixPath(folder).relative_to(path)
            inner[:] = [name for name in inner if name[0] != "."] if len(around.parts) < MOST_DEPTH else []
            self.files |= {str(around / name): [path / around / name] for name in files}

    def _open(self, path: Path) -> None:
        """Entries with names as on Linux, none that points out of the zip."""
        self.archive = zipfile.ZipFile(path)
        entries = self.archive.infolist()
        if len(entries) > MOST_ENTRIES or sum(entry.file_size for entry in entries) > MOST_BYTES:
            limit = f"{MOST_ENTRIES:,} entries or {MOST_BYTES / 2**30:.0f} GiB unpacked"
            raise Refused(f"a zip of more than {limit}")
        for entry in entries:
            name = PurePosixPath(entry.filename.replace("\\", "/"))  # has no "." in it
            if not (entry.is_dir() or name.is_absolute() or ".." in name.parts):
                self.files.setdefault(str(name), []).append(entry)

    def read(self, part: str, name: str) -> bytes:
        """The bytes of a file of `part` (finetune or inference)."""
        places, limit = outermost(part, self.files), LIMITS[Path(name).suffix]
        if len(places) > 1:
            raise Refused(f"{part}/ is there {len(places)} times: {printable(' and '.join(places))}")
        entries = self.files.get(f"{places[0]}/{name}" if places else "")
        if not entries:
            inner = next((name for name in self.files if not places and name.lower().endswith(ARCHIVES)), None)
            within = f"; {printable(inner)} is not opened: no archive within a submission" if inner else ""
            raise Refused(f"{part}/{name} is missing{within}")
        if len(entries) > 1:
            raise Refused(f"{part}/{name}: {len(entries)} times in the zip")
        with refusing(f"{part}/{name}: cannot be read"):
            if (size := size_of(entries[0], f"{part}/{name}")) > limit:
                raise Refused(f"{part}/{name}: {size:,} bytes, at most {limit:,} are read")
            with self.archive.open(entries[0]) if self.archive else entries[0].open("rb") as content:
                return content.read(size)

    def text(self, part: str, name: str) -> str:
        content = self.read(part, name)
        if name.endswith(".jsonl") and content.count(b"\n") > MOST_LINES:
            raise Refused(f"{part}/{name}: more than {MOST_LINES:,} lines")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused(f"{part}/{name}: not UTF-8 text (byte {error.start})") from error

    def json(self, part: str, name: str, kind: type = dict) -> object:
        """A JSON object, or an array (`kind` list)."""
        value = parse(self.text(part, name), f"{part}/{name}")
        if not isinstance(value, kind):
            raise Refused(f"{part}/{name}: not a JSON {'object' if kind is dict else 'array'}")
        return value

    def jsonl(self, part: str, name: str) -> list[dict]:
        """The objects of a JSONL file."""
        lines = enumerate(self.text(part, name).split("\n"), start=1)
        rows = [parse(line, f"{part}/{name}, line {i}") for i, line in lines if line.strip()]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise Refused(f"{part}/{name}: not a JSON object a line")
        return rows

    def tensors(self, part: str, name: str) -> dict[str, np.ndarray]:
        """A safetensors file, as float arrays by name."""
        content, tensors = self.read(part, name), {}
        with refusing(f"{part}/{name}: not a safetensors file"):
            found = deserialize(content)
        for key, tensor in found:
            if (dtype := tensor["dtype"]) not in DTYPES:
                raise Refused(f"{part}/{name}: {printable(key)} is {dtype}, not a float of 16 or 32 bits")
            array = np.frombuffer(tensor["data"], DTYPES[dtype])
            array = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
            tensors[key] = array.reshape(tensor["shape"])
        return tensors


def size_of(entry: Path | zipfile.ZipInfo, shown: str) -> int:
    """Bytes of a plain file. Raises Refused for anything else, and for what a zip packs suspiciously well."""
    if isinstance(entry, Path):
        mode, size, most = entry.lstat().st_mode, entry.lstat().st_size, math.inf
    else:
        mode, size, most = (
            entry.external_attr >> 16,
            entry.file_size,
            max(MIB, MOST_RATIO * entry.compress_size),
        )
    if stat.S_ISLNK(mode):
        raise Refused(f"{shown}: a symbolic link")
    if isinstance(entry, Path) and not stat.S_ISREG(mode):
        raise Refused(f"{shown}: not a plain file")
    if size > most:
        raise Refused(f"{shown}: {entry.compress_size:,} bytes would unpack to {size:,}")
    return size


def parse(text: str, where: str) -> object:
    """JSON as the programs write it: no NaN, no infinities. Raises Refused."""

    def number(digits: str) -> float:  # also of NaN, Infinity and -Infinity
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{printable(digits, 30)} is not a finite number")
        return value

    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise Refused(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise Refused(f"{where}: not valid JSON ({printable(error)})") from error
