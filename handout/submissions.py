"""What a student handed in, read as data: nothing of it runs, and nothing of it can harm the grading of the next one.

A submission is a zip or a folder that holds finetune/ and inference/, or a copy of the repository's folders that the
programs write to, with up to MOST_AROUND folders around them. Of each part the outermost folder counts; two equally
deep ones are refused. Files are read one by one under the names below, each with a limit, and never unpacked to where
their names point. Refused, with one line: symbolic links, whatever is not a plain file, more than MOST_ENTRIES or
MOST_BYTES, more than MOST_RATIO bytes out of one; text that is not UTF-8; JSON that is not valid, has NaN or
infinities, or is nested too deeply; JSONL of more than MOST_LINES.
"""

import json
import math
import os
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors import deserialize

MIB = 2**20
FOLDERS = {"finetune": ("finetune", "deepspeed/output_llama2_7b_lora"), "inference": ("inference", "sglang")}
FILES = {
    "finetune": {
        "adapter_config.json",
        "adapter_model.safetensors",
        "run_config.json",
        "summary.json",
        "metrics.jsonl",
    },
    "inference": {"outputs.jsonl", "outputs_all.json", "summary.json"},
}
# What a Mac adds to a zip, and the answers that the handout ships to compare with.
NOT_SUBMITTED = {"__MACOSX", "reference"}
MOST_AROUND = 3
LIMITS = {
    "adapter_model.safetensors": 1024 * MIB,
    "metrics.jsonl": 64 * MIB,
    "outputs.jsonl": 64 * MIB,
    "outputs_all.json": 64 * MIB,
}
OTHER_LIMIT = 4 * MIB
MOST_ENTRIES, MOST_BYTES, MOST_RATIO, MOST_LINES = 20_000, 8 * 2**30, 200, 10_000
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class Refused(Exception):
    """Why a file of a submission is not looked at: one line."""


def printable(text: object, length: int = 200) -> str:
    """One line of at most `length` plain characters, whatever a student's file or file name holds."""
    plain = str(text)[:length].encode("ascii", "backslashreplace").decode()
    return plain.translate(dict.fromkeys([*range(32), 127], " "))[:length]


def find_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Where the files of each part are: the outermost folders, by part, among the paths of all files."""
    found: dict[str, dict[int, set[str]]] = {part: {} for part in FOLDERS}
    for name in names:
        folder, _, file = name.rpartition("/")
        for part, bases in FOLDERS.items():
            for base in bases if file in FILES[part] else ():
                around = folder.removesuffix(base).split("/")[:-1]
                mine = f"/{folder}".endswith(f"/{base}") and not NOT_SUBMITTED.intersection(around)
                if mine and len(around) <= MOST_AROUND:
                    found[part].setdefault(len(around), set()).add(folder)
    return {part: sorted(folders[min(folders)]) if folders else [] for part, folders in found.items()}


class Submission:
    """Reads the files of one submission. Every method raises Refused."""

    def __init__(self, path: Path) -> None:
        self.path, self.archive = path, None
        self.entries: dict[str, list[zipfile.ZipInfo]] = {}  # of a zip, by name
        try:
            if path.is_symlink():
                raise Refused("is a symbolic link")
            if path.is_dir():
                self.parts = find_parts(self._walk())
            elif path.is_file() and zipfile.is_zipfile(path):
                self._open_zip()
                self.parts = find_parts(self.entries)
            else:
                raise Refused("is neither a folder nor a zip")
        except OSError as error:
            raise Refused(f"cannot be read ({error.strerror})") from error

    def _walk(self) -> Iterable[str]:
        """Paths of a folder's files, as deep as a part may be; what is hidden is left out."""
        os.scandir(self.path).close()  # raises what walk() would pass over
        for folder, inner, files in os.walk(self.path):
            around = PurePosixPath(folder).relative_to(self.path)
            inner[:] = [name for name in inner if name[0] != "."] if len(around.parts) < MOST_AROUND + 2 else []
            yield from (str(around / name) for name in files)

    def _open_zip(self) -> None:
        """Fills `archive` and `entries`: names as on Linux, none that points out of the zip."""
        try:
            self.archive = zipfile.ZipFile(self.path)
            entries = self.archive.infolist()
        except Exception as error:  # zipfile raises a dozen kinds for damaged archives
            raise Refused(f"cannot be opened as a zip: {printable(error)}") from error
        if len(entries) > MOST_ENTRIES or sum(entry.file_size for entry in entries) > MOST_BYTES:
            raise Refused(
                f"a zip of more than {MOST_ENTRIES:,} entries or {MOST_BYTES / 2**30:.0f} GiB unpacked"
            )
        for entry in entries:
            name = entry.filename.replace("\\", "/")
            path = PurePosixPath(name)  # has no "." in it
            if not (name.endswith("/") or path.is_absolute() or ".." in path.parts):
                self.entries.setdefault(str(path), []).append(entry)

    def _size(self, name: str) -> int | None:
        """Bytes of a file by its path in the submission; None without one."""
        if self.archive is None:
            place = self.path
            for part in PurePosixPath(name).parts:
                place = place / part
                if place.is_symlink():
                    raise Refused(f"{printable(name)}: a symbolic link")
            if not place.exists():
                return None
            if not place.is_file():
                raise Refused(f"{printable(name)}: not a plain file")
            return place.stat().st_size
        entries = self.entries.get(name, [])
        if not entries:
            return None
        if len(entries) > 1:
            raise Refused(f"{printable(name)}: {len(entries)} times in the zip")
        if stat.S_ISLNK(entries[0].external_attr >> 16):
            raise Refused(f"{printable(name)}: a symbolic link")
        size, packed = entries[0].file_size, entries[0].compress_size
        if size > MIB and size > MOST_RATIO * packed:
            raise Refused(f"{printable(name)}: {packed:,} bytes would unpack to {size:,}")
        return size

    def read(self, part: str, name: str) -> bytes:
        """The bytes of a file of `part` (finetune or inference)."""
        limit, places = LIMITS.get(name, OTHER_LIMIT), self.parts[part]
        if len(places) > 1:
            raise Refused(f"{part}/ is there {len(places)} times: {printable(' and '.join(places))}")
        path = f"{places[0]}/{name}" if places else ""
        try:
            size = self._size(path) if places else None
            if size is None:
                raise Refused(f"{part}/{name} is missing")
            if size > limit:
                raise Refused(f"{printable(path)}: {size:,} bytes, at most {limit:,} are read")
            if self.archive is None:
                return (self.path / path).read_bytes()
            with self.archive.open(self.entries[path][0]) as packed:
                return packed.read(limit)
        except (Refused, MemoryError):
            raise
        except Exception as error:  # damaged, encrypted, unreadable: zipfile raises a dozen kinds
            raise Refused(f"{part}/{name}: cannot be read: {printable(error)}") from error

    def text(self, part: str, name: str) -> str:
        content = self.read(part, name)
        if name.endswith(".jsonl") and content.count(b"\n") > MOST_LINES:
            raise Refused(f"{part}/{name}: more than {MOST_LINES:,} lines")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused(f"{part}/{name}: not UTF-8 text (byte {error.start})") from error

    def json(self, part: str, name: str) -> object:
        return parse(self.text(part, name), f"{part}/{name}")

    def object(self, part: str, name: str) -> dict:
        value = self.json(part, name)
        if not isinstance(value, dict):
            raise Refused(f"{part}/{name}: not a JSON object")
        return value

    def rows(self, part: str, name: str) -> list[dict]:
        """The objects of a JSONL file."""
        lines = self.text(part, name).split("\n")
        rows = [
            parse(line, f"{part}/{name}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()
        ]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise Refused(f"{part}/{name}: not a JSON object a line")
        return rows

    def tensors(self, part: str, name: str) -> dict[str, np.ndarray]:
        """A safetensors file, as float arrays by name."""
        try:
            found = deserialize(self.read(part, name))
        except (Refused, MemoryError):
            raise
        except BaseException as error:  # a panic of the library's Rust code is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise Refused(f"{part}/{name}: not a safetensors file: {printable(error)}") from error
        tensors = {}
        for key, tensor in found:
            if tensor["dtype"] not in DTYPES:
                raise Refused(
                    f"{part}/{name}: {printable(key)} is {tensor['dtype']}, not a float of 16 or 32 bits"
                )
            array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
            if tensor["dtype"] == "BF16":
                array = (array.astype("<u4") << 16).view("<f4")
            tensors[key] = array.reshape(tensor["shape"])
        return tensors


def parse(text: str, where: str) -> object:
    """JSON as the programs write it: no NaN, no infinities. Raises Refused."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{printable(digits, 30)} is not finite")
        return value

    try:
        return json.loads(text, parse_constant=constant, parse_float=number)
    except RecursionError as error:
        raise Refused(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise Refused(f"{where}: not valid JSON ({printable(error)})") from error
