"""Does this machine compute what the reference's did? Both rehearsals, compared with handout/reference/.

    python handout/reference.py            # fresh runs, then the comparison
    python handout/reference.py --write    # staff: the fresh runs become the reference

The runs are reproducible: rehearsals on the CPU with one thread a process, inference greedy and one record at a time,
so that also the prefix hits of every record are the same. With the reference's instruction set and lock every byte of
the answers must be, and every loss to 5 digits (processors with one instruction set still round training differently);
elsewhere more differs, and records, their order, prompt ids, prefix hits and
the first token of every answer must be the same. A part without a folder in handout/reference/ is left out.

Exit codes: 0 the same, 1 not, 2 a run failed.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "sglang"))
from workbench import UserError
from workbench.files import write_json
from workbench.flags import read_flags

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "handout" / "reference"
FILES = {
    "finetune": ("metrics.jsonl", "run_config.json", "summary.json"),
    "inference": ("outputs.jsonl", "outputs_all.json", "summary.json"),
}
ANSWERS = "answers.jsonl"  # the durable rows of the inference run, which a finished run deletes
FINGERPRINT = "fingerprint.json"
LOSS_TOLERANCE = 1e-5  # relative; between two processors 3e-7 was seen
ON_ANY_MACHINE = ("real_tokens", "instructions", "prompt_ids_sha256", "cached_tokens", "first_tokens")


@dataclass
class Flags:
    output_dir: str = ""
    write: bool = False


HELP = {
    "output_dir": "fresh runs go here, in place of older ones",
    "write": "staff: replace handout/reference/",
}


def finetune(folder: Path) -> dict:
    """Trains in `folder`; returns the fingerprint. Raises UserError."""
    command = [
        "bash",
        str(ROOT / "deepspeed" / "run_llama2_7b_lora.sh"),
        "--rehearse",
        "--overwrite",
        "--output_dir",
        str(folder),
    ]
    if subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        raise UserError(f"{folder}: the training rehearsal failed, see above")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "real_tokens": [row["real_tokens"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "eval_losses": [summary["eval_loss_before"], summary["eval_loss_after"]],
    }


def inference(folder: Path) -> dict:
    """Answers the shipped instructions with the tiny base model; returns the fingerprint. Raises UserError."""
    import run_sglang

    from batch_infer import prompts
    from batch_infer.arguments import TINY_MODEL, parse
    from batch_infer.records import PartialFile

    flags = ["--rehearse", "--overwrite", "--temperature", "0", "--max_new_tokens", "32", "--batch_size", "1"]
    flags += ["--output_file", str(folder / "outputs.jsonl")]
    PartialFile.remove = lambda partial: partial.path.replace(folder / ANSWERS)
    if run_sglang.main(flags):
        raise UserError(f"{folder}: the inference rehearsal failed, see above")
    from transformers import AutoTokenizer

    args = parse(flags)
    records = prompts.read(Path(args.prompts))
    prompts.prepare(records, args, AutoTokenizer.from_pretrained(folder / TINY_MODEL), 1024, {None: ""})
    rows = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    rows = sorted((row for row in rows if "index" in row), key=lambda row: row["index"])
    return {
        "instructions": [row["instruction"] for row in json.loads((folder / "outputs_all.json").read_text())],
        "prompt_ids_sha256": [sha256(json.dumps(record.input_ids).encode()) for record in records],
        "cached_tokens": [row["cached_tokens"] for row in rows],
        "first_tokens": [row["output_ids"][0] for row in rows],
        "answers_sha256": [sha256((folder / name).read_bytes()) for name in FILES["inference"][:2]],
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def machine() -> dict:
    """What bytes depend on."""
    import torch

    lock = sha256((ROOT / "requirements.txt").read_bytes())
    return {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": 1, "lock_sha256": lock}


def run(folder: Path, parts: list[str]) -> None:
    """Fresh runs of `parts` in `folder`, each with its fingerprint. Raises UserError."""
    for part in parts:
        found = {"finetune": finetune, "inference": inference}[part](folder / part)
        write_json(folder / part / FINGERPRINT, {"machine": machine(), **found})


def store(folder: Path, parts: list[str]) -> None:
    """Copies what is small into handout/reference/, without the paths of this machine."""
    for part in parts:
        (REFERENCE / part).mkdir(parents=True, exist_ok=True)
        for name in (*FILES[part], FINGERPRINT):
            text = (folder / part / name).read_text()
            text = text.replace(str(folder / part), part).replace(str(ROOT), ".")
            (REFERENCE / part / name).write_text(text)


def differences(ours: dict, theirs: dict) -> list[str]:
    """What differs between two fingerprints of a part, of what must not."""
    same_machine = ours["machine"] == theirs["machine"]
    return [
        name
        for name in theirs
        if name != "machine" and (same_machine or name in ON_ANY_MACHINE) and not agree(name, ours, theirs)
    ]


def agree(name: str, ours: dict, theirs: dict) -> bool:
    """Losses to LOSS_TOLERANCE, everything else exactly."""
    one, other = ours.get(name), theirs[name]
    if not name.endswith("losses") or len(one) != len(other):
        return one == other
    return all(math.isclose(*pair, rel_tol=LOSS_TOLERANCE) for pair in zip(one, other, strict=True))


def main(argv: list[str]) -> int:
    try:
        description = "Compares this machine with the reference's on the CPU rehearsals."
        flags = Flags(**read_flags(argv, Flags, HELP, {}, prog="reference.py", description=description))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(flags.output_dir or ROOT / "build" / "reference" / stamp).absolute()
        parts = [part for part in FILES if flags.write or (REFERENCE / part).is_dir()]
        run(folder, parts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.write:
        store(folder, parts)
        return 0
    different = False
    for part in parts:
        ours, theirs = (json.loads((base / part / FINGERPRINT).read_text()) for base in (folder, REFERENCE))
        found = differences(ours, theirs)
        other = [f"{name} {ours['machine'][name]}, there {theirs['machine'][name]}" for name in theirs["machine"]
                 if ours["machine"][name] != theirs["machine"][name]]  # fmt: skip
        compared = "everything" if not other else f"what rounding leaves alone ({'; '.join(other)})"
        print(f"{part:12} {'DIFFERS: ' + ', '.join(found) if found else 'the same'}; compared: {compared}")
        different = different or bool(found)
    return int(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
