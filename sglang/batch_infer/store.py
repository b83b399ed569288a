"""What is written, so that nothing is lost: the durable partial file, resuming, and the answers.

Each start of each shard has a file of its own, `outputs.partial.SHARD.START.jsonl`, so that nothing needs a lock that
a cluster's file system may not have. It begins with the run's identity; then comes a line per finished record, synced to
disk before the next ones are taken. The files stay until every record has succeeded. `summary.json` marks a finished run
and is written last.
"""

import contextlib
import itertools
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from workbench import UserError
from workbench.files import check_identity, write_lines

from . import batch_file
from .arguments import Arguments, slurm_job
from .prompts import Record

SUMMARY = "summary.json"
ALL = "outputs_all.json"
LENGTHS = "lengths.png"
PARTIAL = re.compile(r"outputs\.partial\.(\d+)\.(\d+)\.jsonl")
EVERY = 10  # the assignment's file holds every 10th answer


def partial_files(folder: Path, shard: int = 0) -> list[Path]:
    """Of one shard or (0) of all, the earlier starts first."""
    found = [(match, path) for path in folder.glob("*") if (match := PARTIAL.fullmatch(path.name))]
    places = [(int(match[2]), int(match[1]), path) for match, path in found]
    return [path for _, number, path in sorted(places) if shard in (0, number)]


def stored_identity(folder: Path) -> dict | None:
    """The identity of the run that the folder holds, finished or not; None if it holds none."""
    summaries = [folder / SUMMARY] if (folder / SUMMARY).exists() else []
    for path in (*summaries, *partial_files(folder)):
        try:
            if found := _from_summary(path) if path in summaries else header(path).get("identity"):
                return found
        except (ValueError, KeyError, TypeError, IndexError, OSError, AttributeError) as error:
            raise UserError(
                f"{path}: not written by this program, or damaged ({error!r}); name another --output_file"
            ) from error
    return None


def stored_summary(folder: Path) -> dict:
    return json.loads((folder / SUMMARY).read_text())


def _from_summary(path: Path) -> dict:
    return stored_summary(path.parent)["settings"]["identity"]


def header(partial: Path) -> dict:
    """Its first line; {} of a run that was killed while it wrote that, which holds nothing yet."""
    with partial.open() as file:
        first = file.readline()
    return json.loads(first) if first.endswith("\n") else {}


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
    return (folder / SUMMARY).exists() and not stored_summary(folder)["failed_records"]


def count_answers(folder: Path, shard: int = 0) -> int:
    """Records that the partial files of a shard (0: of all) hold an answer of."""
    rows = itertools.chain.from_iterable(map(read_rows, partial_files(folder, shard)))
    return len({row["index"] for row in rows if "output" in row})


def read_rows(partial: Path) -> Iterator[dict]:
    """What it holds behind its first line. The last line of a killed start may be cut; another shard may be writing
    one, or may have finished the run and removed the file."""
    with contextlib.suppress(FileNotFoundError), partial.open("rb") as lines:
        next(lines, None)
        for line in lines:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def remove_partial(folder: Path) -> None:
    for path in partial_files(folder):
        path.unlink(missing_ok=True)


def clear(output_file: Path, job: str | None) -> None:
    """Removes what a run wrote, and nothing else; nothing of what `job` wrote, if this start goes on with it."""
    folder = output_file.parent
    for path in partial_files(folder):
        if job is None or header(path).get("job") != job:
            path.unlink(missing_ok=True)
    # Without a summary they are complete files of this job, or will be written anew.
    if job is None or ((folder / SUMMARY).exists() and not finished_by(folder, job)):
        for name in (LENGTHS, ALL, output_file.name, *batch_file.files(output_file), SUMMARY):
            (folder / name).unlink(missing_ok=True)


def finished_by(folder: Path, job: str | None) -> bool:
    """Whether `job` wrote the summary."""
    return (
        (folder / SUMMARY).exists() and job is not None and stored_summary(folder)["settings"].get("job") == job
    )


class PartialFile:
    """The durable rows of a running job: those of the starts before and of other shards, and this start's own file. That
    one comes into being with the first answer: a command that never gives one leaves the folder to others. `append` may
    be called from any thread."""

    def __init__(
        self,
        folder: Path,
        identity: dict,
        machine: dict,
        shard: int = 1,
        job: str | None = None,
        keys: dict[int, str] | None = None,
    ) -> None:
        """`machine`: what bytes depend on. `keys`: the records' by index; rows with another key do not count (None: all
        do)."""
        self.folder, self.keys, self.machine, self.shard = folder, keys, machine, shard
        self.rows: dict[int, dict] = {}  # index -> its first answer, else how it failed last
        self.starts: dict[str, dict] = {}  # by shard (K/N): what its last start left with `close`
        self._same_id: dict[int, int] = {}  # one object for each token id, not for each token
        self._lock = threading.Lock()
        self._out = None
        self._pending = [{"identity": identity, "job": job}, {"machine": machine}]
        self.read()
        before = [int(PARTIAL.fullmatch(path.name)[2]) for path in partial_files(folder, shard)]
        self.path = self._numbered(max(before, default=0) + 1)

    def _numbered(self, start: int) -> Path:
        return self.folder / f"outputs.partial.{self.shard}.{start}.jsonl"

    def read(self) -> None:
        """Reads what is on disk, of other shards too."""
        self.machines, self.starts = [], {}
        with tempfile.TemporaryFile(dir=self.folder):
            pass  # NFS lists a folder from memory, unless this machine has changed it
        for path in partial_files(self.folder):
            for row in read_rows(path):
                if "index" in row:
                    self._keep(row)
                elif "start" in row:
                    self.starts[row["shard"]] = row["start"]
                elif "machine" in row and row["machine"] not in self.machines:
                    self.machines.append(row["machine"])
        if self.machine not in self.machines:
            self.machines.append(self.machine)

    def done(self, record: Record) -> bool:
        """Whether the record was answered, with the same prompt, parameters and weights."""
        row = self.rows.get(record.index)
        return row is not None and row["key"] == record.key and "error" not in row

    def append(self, rows: list[dict]) -> None:
        """Writes rows and waits until they are on disk. Raises OSError when there is no room."""
        with self._lock:
            self._pending += rows
            if self._out or any("output" in row for row in rows):
                self._write(self._pending)
                self._pending = []
            for row in rows:
                self._keep(row)

    def _keep(self, row: dict) -> None:
        before = self.rows.get(row["index"], {})
        if self.keys is not None and self.keys.get(row["index"]) != row["key"]:
            return
        if "output" in before and before["key"] == row["key"]:
            return
        if ids := row.get("output_ids"):
            row = row | {"output_ids": list(map(self._same_id.setdefault, ids, ids))}
        self.rows[row["index"]] = row

    def _write(self, rows: list[dict]) -> None:
        while self._out is None:
            try:
                self._out = self.path.open("xb")  # never a file of another start, whatever locks are worth here
            except FileExistsError:
                self.path = self._numbered(int(PARTIAL.fullmatch(self.path.name)[2]) + 1)
        self._out.writelines(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows)
        self._out.flush()
        os.fsync(self._out.fileno())

    def close(self, shard: str = "", start: dict | None = None) -> None:
        """Writes what this `start` was, and what is pending: others must know of failures."""
        rows = self._pending + ([{"shard": shard, "start": start}] if start else [])
        if start or any("index" in row for row in rows):
            self._write(rows)
        if self._out is not None:
            self._out.close()

    def remove(self) -> None:
        remove_partial(self.folder)


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


def export(args: Arguments, records: list[Record], rows: dict[int, dict]) -> None:
    """Writes --output_file (every 10th record, the starter's keys in its order), outputs_all.json (AlpacaEval's array)
    and for a batch file its two files. A record without an answer keeps its place with an empty output."""
    output_file, generator = Path(args.output_file), Path(args.model_path).name
    pairs = [(record.instruction, rows.get(record.index, {}).get("output", "")) for record in records]
    lines = (
        json.dumps({"output": output, "instruction": instruction}) + "\n"
        for instruction, output in pairs[::EVERY]
    )
    write_lines(output_file, lines, args.writer)
    # json.dumps(array, indent=1), an element at a time: all answers would be held a second and a third time.
    elements = (
        ("," if i else "[")
        + json.dumps([{"instruction": instruction, "output": output, "generator": generator}], indent=1)[1:-2]
        for i, (instruction, output) in enumerate(pairs)
    )
    write_lines(output_file.parent / ALL, itertools.chain(elements, ["\n]\n"]), args.writer)
    if any(record.custom_id for record in records):
        answered = [(r.custom_id, r.raw, rows.get(r.index, {"error": r.error})) for r in records]
        batch_file.write(output_file, answered, generator, args.writer)


def open_run(args: Arguments, records: list[Record], made_on: dict) -> PartialFile:
    """The rows that this run has. --overwrite removes what is there."""
    if args.overwrite:
        clear(Path(args.output_file), args.job)
    keys = {record.index: record.key for record in records if not record.error}
    partial = PartialFile(args.folder, args.identity(), made_on, args.place[0], slurm_job(), keys)
    if len(partial.machines) > 1:
        print(f"WARNING: begun elsewhere, bytes are no one machine's: {partial.machines}")
    return partial
