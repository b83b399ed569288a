"""Rows as people have them: files of them, and their forms as the turns of a chat:
[{"role": "user", "content": "Hi"}, ...]."""

import csv
import io
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

from . import UserError

# The keys of each form, the likeliest first. An `instruction` may have an `input`, and every form a `system` text.
TRAINING_FORMS = (("prompt", "chosen"), ("instruction", "output"), ("messages",), ("conversations",))
PROMPT_FORMS = (("instruction",), ("prompt",), ("messages",), ("conversations",))
ROW_KEYS = {key for form in TRAINING_FORMS for key in form}

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_FILES = {  # first bytes -> cure
    b"PK\x03\x04": "a zip or Excel file: export it as CSV",
    b"\x1f\x8b": "a gzip file: unpack it with gunzip",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"PAR1": "a parquet file: name it .parquet",
}


# --- files -------------------------------------------------------------------------------------------


def read_rows(path: Path, flag: str) -> list[tuple[int, object]]:
    """(number, row) of a JSON array, an object around one, .csv, .tsv or .parquet (rows counted from 1), or of JSONL
    (lines). A line that is JSON, but more than Python can hold, is given as a UserError with the reason. Raises
    UserError, which names the file that `flag` gave, and the place."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        rows = _parquet(path, flag)
    elif kind in DELIMITERS:
        rows = _table(read_text(path, flag), DELIMITERS[kind], f"{flag} {path}")
    else:
        rows = _json(read_text(path, flag), f"{flag} {path}")
    if not rows:
        raise UserError(f"{flag} {path}: no rows in it")
    return rows


def read_text(path: Path, flag: str) -> str:
    """UTF-8, with or without a byte order mark; line ends as they are. Raises UserError."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        cure = next(
            (cure for start, cure in OTHER_FILES.items() if content.startswith(start)), "save it as UTF-8"
        )
        raise UserError(
            f"{flag} {path}, line {line}: not UTF-8 text (byte {error.start} of the file); {cure}"
        ) from error
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from error


def _parquet(path: Path, flag: str) -> list[tuple[int, object]]:
    import pyarrow.parquet

    try:  # from memory and without threads: this process forks others
        file = pyarrow.BufferReader(path.read_bytes())
        rows = pyarrow.parquet.ParquetFile(file).read(use_threads=False).to_pylist()
    except Exception as error:  # its errors have no common class
        raise UserError(
            f"{flag} {path}: not readable as parquet ({' '.join(str(error).split())[:200]})"
        ) from error
    return list(enumerate(rows, 1))


def _table(text: str, delimiter: str, where: str) -> list[tuple[int, object]]:
    """Of CSV whose first line names the columns; an empty cell is None."""
    csv.field_size_limit(2**31 - 1)  # 128 KiB a cell otherwise
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        for row in reader:
            if None in row or None in row.values() or len(row) < len(reader.fieldnames):
                raise csv.Error(
                    f"not {len(reader.fieldnames)} cells, each with a name of its own in the first line"
                )
            rows.append((len(rows) + 1, {name: cell or None for name, cell in row.items()}))
    except csv.Error as error:
        cure = f"quote a text that holds {delimiter!r}, a quote or a line break"
        raise UserError(
            f"{where}, row {len(rows) + 1} (line {reader.reader.line_num}): {error}; {cure}"
        ) from error
    return rows


def _json(text: str, where: str) -> list[tuple[int, object]]:
    if text.lstrip().startswith("["):
        rows = _parse(text, 1, where)
        if isinstance(rows, UserError):
            raise UserError(f"{where}, row {_too_much(text)}: {rows}")
        return list(enumerate(rows, 1))
    try:  # not splitlines(): JSON may hold U+2028 and the like as they are
        lines = enumerate(text.split("\n"), 1)
        rows = [(number, _parse(line, number, where)) for number, line in lines if line.strip()]
    except UserError as error:
        try:
            rows = [(1, _parse(text, 1, where))]  # one object over several lines
        except UserError:
            raise error from None
    if len(rows) == 1 and isinstance(around := rows[0][1], dict) and not around.keys() & ROW_KEYS:
        lists = [
            key for key, value in around.items() if isinstance(value, list) and {dict} == {*map(type, value)}
        ]
        if len(lists) > 1:
            raise UserError(f"{where}: expected a list of rows, found {repr(lists)[1:-1][:200]}; keep one")
        rows = list(enumerate(around[lists[0]], 1)) if lists else rows
    return rows


def _parse(text: str, line: int, where: str) -> object:
    """The value, or a UserError (not raised) if it is JSON but more than Python can hold."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "" if line + error.lineno > 2 else "; read are a JSON array, JSONL, .csv, .tsv and .parquet"
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}, {place}: not valid JSON ({error.msg}){hint}") from error
    except RecursionError:
        return UserError("nested too deeply; remove what is not needed")
    except ValueError:
        return UserError(f"a number of more than {sys.get_int_max_str_digits()} digits; write it as text")


def _too_much(text: str) -> int:
    """The first row of a JSON array that Python cannot hold, counted from 1."""
    decoder, at, number = json.JSONDecoder(), text.index("[") + 1, 1
    with suppress(RecursionError, ValueError):
        while True:
            _, at = decoder.raw_decode(text, re.compile(r"[\s,]*").match(text, at).end())
            number += 1
    return number


# --- forms -------------------------------------------------------------------------------------------


def turns(row: object, forms: tuple[tuple[str, ...], ...]) -> list[dict[str, str]]:
    """The turns of a row in one of `forms`; a null counts as absent. Raises UserError, which does not name the row."""
    if isinstance(row, UserError):  # read_rows gives it for a line that cannot be held
        raise row
    if not isinstance(row, dict):
        raise UserError(f"expected an object, found {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    form = next((keys for keys in forms if row.keys() >= set(keys)), None)
    if form is None:
        nearest = max(forms, key=lambda keys: len(row.keys() & set(keys)))
        missing = next(key for key in nearest if key not in row)
        known = ", or ".join(" and ".join(keys) for keys in forms)
        raise UserError(f"no text under '{missing}'; a row has {known} (found: {repr(list(row))[1:-1][:200]})")
    for key in ("history", "tools"):
        if row.get(key):
            raise UserError(f"'{key}' is not read; remove it, or write it into the turns of 'messages'")
    system = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    if form[0] in ("messages", "conversations"):
        return system + _chat(row, form[0])
    question = text(row, form[0])
    if form[0] == "instruction" and row.get("input"):
        question += "\n\n" + text(row, "input")
    answers = [{"role": "assistant", "content": text(row, key)} for key in form[1:]]
    return [*system, {"role": "user", "content": question}, *answers]


def _chat(row: dict, key: str) -> list[dict[str, str]]:
    """From [{role, content}] or ShareGPT's [{from, value}], under either key. The system's turn can only be the first."""
    found = []
    for turn in row[key] if isinstance(row[key], list) else [row[key]]:
        where = f"turn {len(found) + 1} of '{key}'"
        if not isinstance(turn, dict):
            raise UserError(f"{where} must be an object with 'role' and 'content', found {type(turn).__name__}")
        try:
            names = ("from", "value") if "from" in turn else ("role", "content")
            given, content = (text(turn, name) for name in names)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        role = ROLES.get(given)
        if role is None or (role == "system" and found):
            raise UserError(
                f"{where}: no role {given[:40]!r} here; a chat has system (first only), user and assistant"
            )
        found.append({"role": role, "content": content})
    if not found:
        raise UserError(f"no turns under '{key}'")
    return found


def text(row: dict, key: str) -> str:
    """row[key]. Raises UserError unless it is text that a tokenizer can read."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"'{key}' must be text, found {type(value).__name__}")
    bad = value.find("\0")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        bad = error.start
    if bad >= 0:
        raise UserError(f"'{key}' holds U+{ord(value[bad]):04X}, half an emoji or a NUL; remove it")
    return value
