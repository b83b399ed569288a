"""Does this machine compute what the reference's did? Both rehearsals, compared with handout/reference/.

    python handout/reference.py            # fresh runs, then the comparison
    python handout/reference.py --write    # staff: the fresh runs become the reference

The runs are reproducible: rehearsals on the CPU with one thread a process, inference greedy and one record at a time,
so that also the prefix hits of every record are the same. With the reference's instruction set and lock every byte of
the answers must be, and every loss to 5 digits (processors with one instruction set still round training differently);
elsewhere more differs, and records, their order, prompt ids, prefix hits and the first token of every answer must be
the same. A part without a folder in handout/reference/ is left out.

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
from workbench.flags import flag, read_flags

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


@dataclass(frozen=True)
class Flags:
    output_dir: str = flag("", "fresh runs go here, in place of older ones (empty: build/reference/<time>)")
    write: bool = flag(False, "staff: replace handout/reference/")


def finetune(folder: Path) -> dict:
    """Trains in `folder`; returns the fingerprint. Raises UserError."""
    command = [
        "bash",
        "deepspeed/run_llama2_7b_lora.sh",
        "--rehearse",
        "--overwrite",
        "--model_name_or_path",
        str(tiny_model("llama", folder)),
        "--output_dir",
        str(folder),
    ]
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        raise UserError(f"{folder}: the training rehearsal failed, see above")
    rows, summary = json_lines(folder / "metrics.jsonl"), json.loads((folder / "summary.json").read_text())
    return {
        "real_tokens": [row["real_tokens"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "eval_losses": [summary["eval_loss_before"], summary["eval_loss_after"]],
    }


def tiny_model(architecture: str, folder: Path) -> Path:
    """The tiny random model, also where a real one is installed: the comparison takes seconds."""
    model = folder.with_name(f"tiny_{architecture}")
    command = [sys.executable, str(ROOT / "rehearsal" / "tiny_model.py"), architecture, str(model)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise UserError(f"{model}: the tiny model could not be built")
    return model


def inference(folder: Path) -> dict:
    """Answers the shipped instructions with the tiny base model; returns the fingerprint. Raises UserError."""
    import run_sglang

    from batch_infer import prompts
    from batch_infer.arguments import parse
    from batch_infer.store import PartialFile

    flags = ["--rehearse", "--overwrite", "--temperature", "0", "--max_new_tokens", "32", "--batch_size", "1"]
    model = tiny_model("qwen2", folder)
    flags += ["--model_path", str(model), "--output_file", str(folder / "outputs.jsonl")]
    PartialFile.remove = lambda partial: partial.path.replace(folder / ANSWERS)
    if run_sglang.main(flags):
        raise UserError(f"{folder}: the inference rehearsal failed, see above")
    from transformers import AutoTokenizer

    args, tokenizer = parse(flags), AutoTokenizer.from_pretrained(model)
    read = prompts.read(Path(args.prompts))
    records = prompts.tokenise(read, args, tokenizer, 1024, len(tokenizer), {None: ""})
    rows = sorted((row for row in json_lines(folder / ANSWERS) if "index" in row), key=lambda row: row["index"])
    return {
        "instructions": [row["instruction"] for row in json.loads((folder / "outputs_all.json").read_text())],
        "prompt_ids_sha256": [sha256(json.dumps(record.input_ids).encode()) for record in records],
        "cached_tokens": [row["cached_tokens"] for row in rows],
        "first_tokens": [row["output_ids"][0] for row in rows],
        "answers_sha256": [sha256((folder / name).read_bytes()) for name in FILES["inference"][:2]],
    }


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def machine() -> dict:
    """What bytes depend on."""
    import torch

    lock = sha256((ROOT / "requirements.txt").read_bytes())
    return {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": 1, "lock_sha256": lock}


def store(folder: Path, part: str) -> None:
    """Copies what is small into handout/reference/, without the paths of this machine."""
    (REFERENCE / part).mkdir(parents=True, exist_ok=True)
    for name in (*FILES[part], FINGERPRINT):
        text = (folder / part / name).read_text()
        text = text.replace(str(folder / part), part).replace(str(ROOT), ".")
        (REFERENCE / part / name).write_text(text)


def compare(folder: Path, part: str) -> bool:
    """Prints what differs from the reference; returns whether anything that must not does."""
    ours, theirs = (json.loads((base / part / FINGERPRINT).read_text()) for base in (folder, REFERENCE))
    here, there = ours["machine"], theirs["machine"]
    other = [f"{name} {here[name]}, there {there[name]}" for name in there if here[name] != there[name]]
    compared = f"what rounding leaves alone ({'; '.join(other)})" if other else "everything"
    found = differences(ours, theirs)
    print(f"{part:12} {'DIFFERS: ' + ', '.join(found) if found else 'the same'}; compared: {compared}")
    return bool(found)


def differences(ours: dict, theirs: dict) -> list[str]:
    """What differs between two fingerprints of a part, of what must not: losses by more than LOSS_TOLERANCE."""

    def same(name: str) -> bool:
        one, other = ours.get(name), theirs[name]
        if not name.endswith("losses") or len(one) != len(other):
            return one == other
        return all(math.isclose(*pair, rel_tol=LOSS_TOLERANCE) for pair in zip(one, other, strict=True))

    names = theirs.keys() - {"machine"} if ours["machine"] == theirs["machine"] else set(ON_ANY_MACHINE)
    return [name for name in theirs if name in names and not same(name)]


def main(argv: list[str]) -> int:
    try:
        description = "Compares this machine with the reference's on the CPU rehearsals."
        flags = Flags(**read_flags(argv, Flags, prog="reference.py", description=description))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(flags.output_dir or ROOT / "build" / "reference" / stamp).absolute()
        parts = [part for part in FILES if flags.write or (REFERENCE / part).is_dir()]
        for part in parts:
            found = {"finetune": finetune, "inference": inference}[part](folder / part)
            write_json(folder / part / FINGERPRINT, {"machine": machine(), **found})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.write:
        for part in parts:
            store(folder, part)
        return 0
    return int(any([compare(folder, part) for part in parts]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
