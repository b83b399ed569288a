"""The output folder: whose run it is, which checkpoint counts, and files that survive a kill.

A checkpoint counts only with its marker (`complete.json`), which is written last: half-written ones are
removed at the next start and never resumed from. `summary.json` is the marker of a finished run.
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import UserError
from workbench.files import check_identity, commit, write_json
from workbench.models import weights_fingerprint

from .arguments import TINY_MODEL, Arguments
from .cluster import SHARED

if TYPE_CHECKING:
    from .preflight import Plan


MARKER = "complete.json"
CONFIG = "run_config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
EVAL_BEFORE = "eval_before.json"
ADAPTER = "adapter_model.safetensors"
PARITY = "parity.json"
OURS = (
    *(CONFIG, METRICS, SUMMARY, "training.log", EVAL_BEFORE, "loss.png", "memory.png", "README.md"),
    *(ADAPTER, PARITY, "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "runs", TINY_MODEL),
)
# What must not change between two starts of a run, by its name in the plan.
INPUTS = {
    "data_sha256": "the rows of --data_path",
    "model_revision": "the model on the hub",
    "weights_id": "the weights of --model_name_or_path",
    "dtype": "the precision that the GPU allows",
}


def holds_run(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def finished(folder: Path) -> bool:
    return (folder / SUMMARY).exists()


def nothing_to_do(folder: Path, args: Arguments, zero_config: dict) -> bool:
    """Whether the folder holds this run, finished. Raises UserError if what it holds is not this run's."""
    if args.overwrite and holds_run(folder):
        return False
    check_owner(folder, args.identity(zero_config))
    if finished(folder) and holds_run(folder):
        check_local_inputs(folder, args)
    return finished(folder)


def check_owner(folder: Path, identity: dict) -> None:
    """Raises UserError unless the folder is empty or holds a run of the same `identity`."""
    stored_path = folder / CONFIG
    if not holds_run(folder):
        # A kill may leave any of these without the others.
        ours = (*OURS, ".lock", ".disk_probe")
        names = sorted(entry.name for entry in folder.iterdir())
        foreign = [
            n
            for n in names
            if n not in ours and not n.startswith(("checkpoint-", SHARED)) and not n.endswith(".tmp")
        ]
        if foreign:
            raise UserError(
                f"--output_dir {folder}: holds {foreign[0]} but no {CONFIG}; name an empty or new folder"
            )
        return
    try:
        stored = json.loads(stored_path.read_text())["identity"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{stored_path}: cannot be read ({error}); --overwrite starts anew") from error
    cure = "name another folder, or --overwrite starts anew"
    check_identity(f"--output_dir {folder}", stored, identity, cure)


def check_same_inputs(folder: Path, plan: "Plan") -> None:
    """Raises UserError if a run to be resumed would see other data, weights or another number of ranks."""
    if not holds_run(folder) or not complete_checkpoints(folder):
        return
    stored = stored_plan(folder)
    if stored["world_size"] != plan.world_size:
        raise UserError(
            f"--output_dir {folder}: was started on {stored['world_size']} GPUs, {plan.world_size} here; ZeRO-3 "
            "checkpoints need the same number, on however many nodes (or --overwrite starts anew)"
        )
    for key, what in INPUTS.items():
        refuse_change(folder, what, stored.get(key), getattr(plan, key))


def check_local_inputs(folder: Path, args: Arguments) -> None:
    """Raises UserError if files that a finished run has read hold something else now."""
    from . import data

    stored = stored_plan(folder)
    path, model = Path(args.data_path), Path(args.model_name_or_path)
    if path.is_file():
        rows = data.split_rows(data.read_file(path), [], args.max_train_rows, args.max_eval_rows, args.seed)
        refuse_change(folder, INPUTS["data_sha256"], stored.get("data_sha256"), data.rows_sha256(*rows))
    if model.is_dir():
        refuse_change(folder, INPUTS["weights_id"], stored.get("weights_id"), weights_fingerprint(model))


def stored_plan(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())["plan"]


def refuse_change(folder: Path, what: str, stored: object, here: object) -> None:
    if stored != here:
        raise UserError(f"--output_dir {folder}: {what} changed since the run began; --overwrite starts anew")


def open_run(folder: Path, args: Arguments, zero_config: dict, plan: "Plan") -> Path | None:
    """Makes the folder this run's: clears another one if that was asked for, or returns the checkpoint to resume from.
    Raises UserError if that has seen something else."""
    if args.overwrite and holds_run(folder):
        clear(folder)
    check_same_inputs(folder, plan)
    config = {"identity": args.identity(zero_config), "arguments": asdict(args), "plan": asdict(plan)}
    write_json(folder / CONFIG, config | {"commit": commit()})
    complete = complete_checkpoints(folder)
    while complete and (problem := damage(complete[-1])):
        print(f"warning: {complete.pop()} is damaged ({problem}) and goes; the one before counts", flush=True)
    forget_after(folder, complete)
    if not complete:
        (folder / EVAL_BEFORE).unlink(missing_ok=True)
    return complete[-1] if complete else None


def add_to_config(folder: Path, **values) -> None:
    write_json(folder / CONFIG, json.loads((folder / CONFIG).read_text()) | values)


def clear(folder: Path) -> None:
    """Removes what a run wrote, and nothing else; the mark of a run goes last. The rehearsal's model stays:
    preflight has just built it."""
    names = [name for name in OURS if name not in (CONFIG, TINY_MODEL)]
    for path in [*folder.glob("checkpoint-*"), *(folder / name for name in names), folder / CONFIG]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# --- checkpoints --------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a marker, oldest first."""
    return sorted((marker.parent for marker in folder.glob(f"checkpoint-*/{MARKER}")), key=step_of)


def damage(checkpoint: Path) -> str | None:
    """The first file that has not the size that the marker says."""
    for name, size in json.loads((checkpoint / MARKER).read_text()).get("bytes", {}).items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).exists() else 0
        if found != size:
            return f"{name}: {found} of {size} bytes"
    return None


def forget_after(folder: Path, complete: list[Path]) -> None:
    """Removes half-written checkpoints, and metrics rows after the newest of the `complete` ones."""
    for path in set(folder.glob("checkpoint-*")) - set(complete):
        shutil.rmtree(path)
    metrics = folder / METRICS
    if metrics.exists():
        last_step = step_of(complete[-1]) if complete else 0
        rows = [line for line in metrics.read_text().split("\n") if line and _step_in(line) <= last_step]
        temporary = metrics.with_suffix(".tmp")
        temporary.write_text("".join(f"{row}\n" for row in rows))
        temporary.replace(metrics)


def _step_in(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed run may be cut
        return math.inf


def mark_complete(checkpoint: Path, keep: int) -> None:
    """Flushes the checkpoint to disk, writes its marker, then deletes all but the newest `keep`."""
    sizes = {}
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb") as stored:
                os.fsync(stored.fileno())
            sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
    write_json(checkpoint / MARKER, {"step": step_of(checkpoint), "bytes": sizes})
    for old in complete_checkpoints(checkpoint.parent)[:-keep]:
        (old / MARKER).unlink()
        shutil.rmtree(old)
