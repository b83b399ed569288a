"""Whether run_sglang.py writes the same bytes, however the records run.

    python bench/same_bytes.py fresh_1 fresh_2 in_flight_64 running_100 killed_and_resumed --records FILE
    python bench/same_bytes.py fresh_1 two_gpus --model_path FOLDER --lora_path FOLDER
    python bench/same_bytes.py fresh_1 jump_forward --json_every 1 --temperature 0 --model_path FOLDER \
        --engine_args '{"grammar_backend": "llguidance"}'
    python bench/same_bytes.py fresh_1 killed_and_resumed --device cpu        # the rehearsal's model

On a GPU: random weights of Qwen2.5-7B's shape in files (14.2 GiB), not SGLang's dummy ones; they are 35 times
smaller, attention with them is flat, and what differs does not show. Every run is the real command, in turn, in a folder of
its own. A fifth of the records repeats a prompt: then all of it is in the radix tree. "ratios" are the shares of answers that
differ from the first run's.

rows:
    fresh_N               the command on one GPU
    in_flight_N           at most N records in flight (--batch_size)
    running_N             at most N of them running (--max_running_requests)
    killed_and_resumed    killed with -9 once a quarter is answered, then the same command again
    two_gpus              a copy on each of two GPUs (--dp_size 2)
    shared_N              one copy shared by two GPUs (--tp_size 2)
    jump_forward          forced text in one pass (--jump_forward); the same text with llguidance only
"""

import argparse
import functools
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "sglang", "common"))
import rows
import shapes

from batch_infer.arguments import REHEARSAL
from batch_infer.store import ALL, SUMMARY, count_answers
from workbench import UserError
from workbench.files import commit
from workbench.machine import driver_version
from workbench.rows import read_rows

ROOT = REHEARSAL.parent
FOLDER = REHEARSAL / "runs" / "same_bytes"
RESULT = ROOT / "bench" / "results" / "same_bytes.json"
KILLED = "killed_and_resumed"
COUNTS = ("failed_records", "cached_prompt_tokens", "output_tokens", "forced_tokens", "generate_s", "parity")
OWN_FLAGS = {"two_gpus": ["--dp_size", "2"], "jump_forward": ["--dp_size", "1", "--jump_forward"]}
DEFAULT_RUNS = ["fresh_1", "fresh_2", "in_flight_64", "running_100", KILLED]


def schema_of(index: int) -> dict:
    """One of four: little forced text, half of it, most of it, and nested."""
    word, name = {"type": "string", "maxLength": 12}, {"enum": ["red", "green", "blue"]}
    four = [
        {"answer": {"type": "string", "maxLength": 60}},
        {"name_of_the_person": word, "preferred_colour": word},
        {"does_the_person_agree_with_it": {"type": "boolean"}, "preferred_colour_of_the_person": name},
        {"people": {"type": "array", "items": object_of({"name": word, "colour": name}), "maxItems": 2}},
    ]
    return object_of(four[index % 4])


def object_of(properties: dict) -> dict:
    names = {"properties": properties, "required": list(properties)}
    return {"type": "object", "additionalProperties": False} | names


def flags_of(run: str) -> list[str]:
    """A run's own flags. Raises UserError for an unknown one."""
    if run in OWN_FLAGS:
        return OWN_FLAGS[run]
    kind, _, number = run.rpartition("_")
    own = {
        "fresh": [],
        "shared": ["--tp_size", "2"],
        "in_flight": ["--batch_size", number],
        "running": ["--max_running_requests", number],
    }
    if run != KILLED and (kind not in own or not re.fullmatch(r"[1-9]\d*", number)):
        raise UserError(f"no row {run}; -h lists them")
    return ["--dp_size", "1", *own.get(kind, [])]


def measure_row(run: str, number: int, *, command: list[str], kill_at: int, first: dict) -> dict:
    """One run of the command, compared with the first that ended, which it becomes in `first` if there is none. Raises
    UserError if it fails."""
    folder = FOLDER / run
    command = [*command, *flags_of(run), "--output_file", str(folder / "outputs.jsonl")]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    killed = kill_once(command, folder, kill_at) if run == KILLED else None
    with (folder / "terminal.txt").open("ab") as terminal:
        code = subprocess.run(command, stdout=terminal, stderr=subprocess.STDOUT).returncode
    if code not in (0, 3):  # 3: some records failed, an answer that its schema does not allow, say
        raise UserError(f"exit code {code}, see {folder / 'terminal.txt'}")
    summary, answers = json.loads((folder / SUMMARY).read_text()), (folder / ALL).read_bytes()
    outputs, settings = [row["output"] for row in json.loads(answers)], summary["settings"]
    first.setdefault("outputs", outputs)
    which = [i for i, pair in enumerate(zip(first["outputs"], outputs, strict=True)) if pair[0] != pair[1]]
    return {
        "sha256": hashlib.sha256(answers).hexdigest(),
        "records": len(outputs),
        "different_records": len(which),
        "which": which[:20],
        **{name: summary[name] for name in COUNTS},
        "answers_before_the_kill": killed,
        "hardware": settings["gpu_name"] or settings["cpu_capability"],
        **{name: settings[name] for name in ("weights_id", "adapter_id", "versions")},
        "engine_args": {
            k: v for k, v in settings["engine_args"].items() if not k.endswith(("_path", "_paths"))
        },
    }


def kill_once(command: list[str], folder: Path, kill_at: int) -> int:
    """Kills the command with -9 once it has `kill_at` answers; returns how many it had."""
    with (folder / "terminal.txt").open("wb") as terminal:
        process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.STDOUT, start_new_session=True)
        while count_answers(folder) < kill_at and process.poll() is None:
            time.sleep(0.02)
        process.kill()  # its child dies with it, and the engine with that
        if process.wait() != -signal.SIGKILL:
            raise UserError(f"ended before {kill_at} answers were there, see {folder / 'terminal.txt'}")
    answered = count_answers(folder)
    time.sleep(5)  # until the GPU's memory is free again
    return answered


def prepare(given: argparse.Namespace) -> tuple[list[str], dict]:
    """The command that all runs share, and what the result says about it. Raises UserError."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    given_rows = [row for _, row in read_rows(Path(given.records), "--records")]
    if not all(isinstance(row, dict) and "instruction" in row for row in given_rows):
        raise UserError(f"--records {given.records}: every row must have an instruction")
    distinct: list[dict] = [{"instruction": row["instruction"]} for row in given_rows][: given.limit * 4 // 5]
    for index in range(0, len(distinct) if given.json_every else 0, given.json_every or 1):
        distinct[index]["json_schema"] = schema_of(index // given.json_every)
    prompts = FOLDER / "prompts.json"
    prompts.write_text(json.dumps(distinct + distinct[: len(distinct) // 4]))
    command = [sys.executable, str(ROOT / "sglang" / "run_sglang.py"), "--prompts", str(prompts)]
    command += ["--max_new_tokens", str(given.max_new_tokens), "--temperature", str(given.temperature)]
    command += ["--lora_path", given.lora_path] if given.lora_path else []
    about = {"repeated_prompts": len(distinct) // 4, "commit": commit()}
    about |= {"json_every": given.json_every, "temperature": given.temperature}
    about["prompts_sha256"] = hashlib.sha256(Path(given.records).read_bytes()).hexdigest()
    if given.device == "cpu":
        return [*command, "--rehearse"], about
    if driver_version() is None:
        raise UserError("no GPU here; --device cpu takes the rehearsal's tiny model")
    model = Path(given.model_path or FOLDER / "qwen2.5-7b")
    # In a process of its own, whose memory on the GPU is free again.
    write_weights = [sys.executable, shapes.__file__, "qwen2.5-7b", model]
    if not given.model_path and not model.exists() and subprocess.run(write_weights).returncode:
        raise UserError(f"{model}: the weights could not be written, see above")
    return [*command, "--model_path", str(model), "--engine_args", given.engine_args], about


def measure(given: argparse.Namespace, output: Path) -> dict:
    """Raises UserError for what is wrong before the first run."""
    runs = given.rows or DEFAULT_RUNS
    for run in runs:
        flags_of(run)
    command, about = prepare(given)
    run = functools.partial(measure_row, command=command, kill_at=about["repeated_prompts"], first={})
    return rows.measure(runs, run, ratios, about, output)


def ratios(result: dict) -> dict:
    done = [row for row in result["rows"] if "error" not in row]
    return {"ratios": {row["row"]: row["different_records"] / row["records"] for row in done}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"default: {' '.join(DEFAULT_RUNS)}")
    parser.add_argument("--records", default=str(REHEARSAL / "instructions.json"), help="rows with instruction")
    parser.add_argument("--limit", type=int, default=805, help="records in all, the repeated ones among them")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--json_every", type=int, default=0, help="every so many records get a JSON schema")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--model_path", help="on a GPU: folder")
    parser.add_argument("--lora_path", help="on a GPU: adapter folder, for all records")
    parser.add_argument(
        "--engine_args",
        default='{"max_total_tokens": 100000}',
        help="on a GPU; by default a pool that the records do not fit, so that prefixes are evicted",
    )
    sys.exit(rows.run(measure, parser, RESULT, FOLDER))
