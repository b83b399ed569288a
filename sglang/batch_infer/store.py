"""What is written, so that nothing is lost: the durable partial file, resuming, and the answers.

`outputs.partial.jsonl` starts with the run's identity; then a line per finished record, synced to disk
before the next ones are taken. It stays until every record has succeeded. `summary.json` marks a finished
run and is written last.
"""

import io
import itertools
import json
import os
import threading
from pathlib import Path

from workbench import UserError
from workbench.files import check_identity, write_lines

from . import batch_file
from .arguments import Arguments
from .prompts import Record

SUMMARY = "summary.json"
ALL = "outputs_all.json"
LENGTHS = "lengths.png"
PARTIAL = "outputs.partial.jsonl"
EVERY = 10  # the assignment's file holds every 10th answer


def stored_identity(folder: Path) -> dict | None:
    """The identity of the run that the folder holds, finished or not; None if it holds none."""
    for path, read in ((folder / SUMMARY, _from_summary), (folder / PARTIAL, _from_partial)):
        if path.exists():
            try:
                return read(path)
            except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
                raise UserError(
                    f"{path}: not written by this program, or damaged ({error!r}); name another --output_file"
                ) from error
    return None


def stored_summary(folder: Path) -> dict:
    return json.loads((folder / SUMMARY).read_text())


def _from_summary(path: Path) -> dict:
    return stored_summary(path.parent)["settings"]["identity"]


def _from_partial(path: Path) -> dict | None:
    with path.open() as file:
        first = file.readline()
    # A run killed while it wrote its first line holds nothing yet.
    return json.loads(first)["identity"] if first.endswith("\n") else None


def check_owner(folder: Path, identity: dict) -> None:
    """Raises UserError if the folder holds a run of another command."""
    stored = stored_identity(folder)
    if stored is not None:
        cure = "name another --output_file, or --overwrite starts anew"
        check_identity(str(folder), stored, identity, cure)


def check_inputs(folder: Path, here: dict) -> None:
    """Raises UserError if a local file that the finished run read has changed since."""
    stored = stored_summary(folder)["settings"]
    for name, value in here.items():
        if stored.get(name) != value:
            raise UserError(
                f"{folder} holds this run, finished, but {name} changed since; name another --output_file, or "
                "--overwrite starts anew"
            )


def finished(folder: Path) -> bool:
    """Whether every record of the folder's run has succeeded."""
    return (folder / SUMMARY).exists() and not (folder / PARTIAL).exists()


def count_answers(partial: Path) -> int:
    """Records that the partial file holds an answer of."""
    if not partial.exists():
        return 0
    with partial.open("rb") as lines:
        next(lines, None)
        rows = (line for line in lines if line.endswith(b"\n") and b'"output": ' in line)
        return len({json.loads(row)["index"] for row in rows})


def clear(output_file: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    names = (LENGTHS, ALL, output_file.name, SUMMARY, PARTIAL)
    for path in (*(output_file.parent / name for name in names), *batch_file.files(output_file)):
        path.unlink(missing_ok=True)


class PartialFile:
    """The durable file of a running job. It comes into being with the first answer: a command that never
    gives one leaves the folder to others. `append` may be called from any thread."""

    def __init__(self, folder: Path, identity: dict, machine: dict) -> None:
        """`machine`: what bytes depend on; each start adds its own if it differs from the last."""
        self.path = folder / PARTIAL
        self.rows: dict[int, dict] = {}  # index -> the row written last
        self._same_id: dict[int, int] = {}  # one object for each token id, not for each token
        self.machines: list[dict] = []
        self._lock = threading.Lock()
        self._complete = self._read()
        self._out = None
        self._pending = [{"identity": identity}] if self._complete == 0 else []
        if self.machines[-1:] != [machine]:
            self.machines.append(machine)
            self._pending.append({"machine": machine})

    def _read(self) -> int:
        """Reads the rows; returns the number of bytes that are complete lines of JSON."""
        complete = 0
        with self.path.open("rb") if self.path.exists() else io.BytesIO() as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                complete += len(line)
                if "index" in row:
                    self._keep(row)
                elif "machine" in row:
                    self.machines.append(row["machine"])
        return complete

    def done(self, record: Record) -> bool:
        """Whether the record was answered, with the same prompt, parameters and weights."""
        row = self.rows.get(record.index)
        return row is not None and row["key"] == record.key and "error" not in row

    def append(self, rows: list[dict]) -> None:
        """Writes rows and waits until they are on disk. Raises OSError when there is no room."""
        with self._lock:
            self._pending += rows
            if self._complete or any("output" in row for row in rows):
                self._write(self._pending)
                self._pending = []
            for row in rows:
                self._keep(row)

    def _keep(self, row: dict) -> None:
        if ids := row.get("output_ids"):
            row = row | {"output_ids": list(map(self._same_id.setdefault, ids, ids))}
        self.rows[row["index"]] = row

    def _write(self, rows: list[dict]) -> None:
        if self._out is None:
            self._out = self.path.open("r+b" if self.path.exists() else "wb")
            self._out.truncate(self._complete)  # the last line of a killed run may be cut
            self._out.seek(self._complete)
        self._out.writelines(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows)
        self._out.flush()
        os.fsync(self._out.fileno())
        self._complete = self._out.tell()

    def close(self) -> None:
        """Writes what is pending too: a run of failures only is finished, and keeps their reasons."""
        if self._pending:
            self._write(self._pending)
        if self._out is not None:
            self._out.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def answer_row(record: Record, result: dict) -> dict:
    """A row of the partial file from what the engine returned."""
    meta = result["meta_info"]
    return {
        "index": record.index,
        "key": record.key,
        "output": result["text"],
        "output_ids": result["output_ids"],
        "finish_reason": meta["finish_reason"]["type"],
        "prompt_tokens": meta["prompt_tokens"],
        "cached_tokens": meta["cached_tokens"],
        "output_tokens": meta["completion_tokens"],
        "retractions": meta.get("num_retractions", 0),
        "forced_runs": [tokens for tokens in meta.get("forced_runs", ()) if tokens],  # --jump_forward
    }


def failure_row(record: Record, reason: str) -> dict:
    return {"index": record.index, "key": record.key, "error": reason}


def export(output_file: Path, records: list[Record], rows: dict[int, dict], generator: str) -> None:
    """Writes `output_file` (every 10th record, the starter's keys in its order), outputs_all.json (AlpacaEval's array)
    and for a batch file its two files. A record without an answer keeps its place with an empty output."""
    pairs = [(record.instruction, rows.get(record.index, {}).get("output", "")) for record in records]
    lines = (
        json.dumps({"output": output, "instruction": instruction}) + "\n"
        for instruction, output in pairs[::EVERY]
    )
    write_lines(output_file, lines)
    # json.dumps(array, indent=1), an element at a time: all answers would be held a second and a third time.
    elements = (
        ("," if i else "[")
        + json.dumps([{"instruction": instruction, "output": output, "generator": generator}], indent=1)[1:-2]
        for i, (instruction, output) in enumerate(pairs)
    )
    write_lines(output_file.parent / ALL, itertools.chain(elements, ["\n]\n"]))
    if any(record.custom_id for record in records):
        answered = [(record.custom_id, record.raw, rows.get(record.index, {})) for record in records]
        batch_file.write(output_file, answered, generator)


def open_run(args: Arguments, records: list[Record], made_on: dict) -> tuple[PartialFile, list[Record]]:
    """The partial file of this run, with the reasons of its bad `records`, and the records that are still to answer.
    --overwrite removes what is there."""
    if args.overwrite:
        clear(Path(args.output_file))
    partial = PartialFile(args.folder, args.identity(), made_on)
    if len(partial.machines) > 1:
        print(f"WARNING: begun elsewhere, bytes are no one machine's: {partial.machines}")
    partial.append([failure_row(record, record.error) for record in records if record.error])
    return partial, [record for record in records if not record.error and not partial.done(record)]
