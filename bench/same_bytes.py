"""Whether run_sglang.py writes the same bytes, however the records run: fresh runs, few or all in flight, on other
copies, after a kill.

    python bench/same_bytes.py --records FILE            # on a GPU: random weights of Qwen2.5-7B's shape (14 GiB of files)
    python bench/same_bytes.py --device cpu              # the rehearsal's tiny model
    python bench/same_bytes.py fresh_1 in_flight_64      # these runs only
    python bench/same_bytes.py --model_path FOLDER --lora_path FOLDER    # other weights, an adapter (qwen_shape.py)

Not SGLang's dummy weights: they are 35 times smaller, attention with them is flat, and what differs does not show.
Every run is the real command in a folder of its own. A quarter of the prompts comes twice: then all of a
prompt is in the radix tree. Prints a row per run and writes bench/results/same_bytes.json; exit code 1 if a run
differs from the first or fails. With `--folder` a second command goes on: it compares with the runs that have ended there.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "sglang"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
import qwen_shape

from batch_infer import preflight
from batch_infer.arguments import REHEARSAL
from batch_infer.records import ALL, PARTIAL, SUMMARY, count_answers
from workbench import UserError
from workbench.files import commit, write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER = REHEARSAL / "runs" / "same_bytes"
RESULT = Path(__file__).resolve().parent / "results" / "same_bytes.json"
ENDED = "run.json"
KILLED, TWO_GPUS = "killed_and_resumed", "two_gpus"
RUNS = {  # name -> flags of this run alone
    "fresh_1": [],
    "fresh_2": [],
    "fresh_3": [],
    "fresh_4": [],
    "fresh_5": [],
    "in_flight_64": ["--batch_size", "64"],
    "in_flight_256": ["--batch_size", "256"],
    "running_100": ["--max_running_requests", "100"],
    KILLED: [],
    TWO_GPUS: ["--dp_size", "2"],
}


def run(name: str, command: list[str], folder: Path, kill_at: int) -> dict:
    """One run of the command. KILLED: kill -9 after `kill_at` answers, then the same command again."""
    flags = [*command, *(RUNS[name] if name == TWO_GPUS else ["--dp_size", "1", *RUNS[name]])]
    flags += ["--output_file", str(folder / "outputs.jsonl")]
    ended = folder / ENDED
    if ended.exists() and (result := json.loads(ended.read_text()))["command"] == flags:
        return result
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    killed = None
    with (folder / "terminal.txt").open("wb") as terminal:
        options = {"stdout": terminal, "stderr": subprocess.STDOUT, "cwd": ROOT}
        if name == KILLED:
            process = subprocess.Popen(flags, start_new_session=True, **options)
            while count_answers(folder / PARTIAL) < kill_at and process.poll() is None:
                time.sleep(0.05)
            process.kill()  # its child dies with it, and the engine with that
            if process.wait() != -signal.SIGKILL:
                raise UserError(
                    f"{name}: ended before {kill_at} answers were there, see {folder / 'terminal.txt'}"
                )
            killed = count_answers(folder / PARTIAL)
            time.sleep(5)
        code = subprocess.run(flags, check=False, **options).returncode
    if code:
        raise UserError(f"{name}: exit code {code}, see {folder / 'terminal.txt'}")
    summary = json.loads((folder / SUMMARY).read_text())
    answers = (folder / ALL).read_bytes()
    print(f"{name}: done, SHA-256 {hashlib.sha256(answers).hexdigest()[:12]}", flush=True)
    result = {
        "run": name,
        "command": flags,
        "sha256": hashlib.sha256(answers).hexdigest(),
        "outputs": [row["output"] for row in json.loads(answers)],
        "cached_prompt_tokens": summary["cached_prompt_tokens"],
        "output_tokens": summary["output_tokens"],
        "answers_before_the_kill": killed,
        "settings": summary["settings"],
    }
    write_json(ended, result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)} (default: all that the GPUs here allow)")
    parser.add_argument("--records", default=str(REHEARSAL / "instructions.json"), help="prompts, as --prompts")
    parser.add_argument("--limit", type=int, default=805, help="records in all, the repeated ones among them")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--at_once", type=int, default=4, help="runs at a time")
    parser.add_argument("--folder", help="of the runs (default: a new one)")
    parser.add_argument("--model_path", help="on a GPU: folder (default: random weights of Qwen2.5-7B's shape)")
    parser.add_argument("--lora_path", help="on a GPU: adapter folder, for all records")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engine_args", default='{"max_total_tokens": 100000}')
    given = parser.parse_args()
    gpus = preflight.nvml_gpus() if given.device == "cuda" else []
    if given.device == "cuda" and not gpus:
        print("error: no GPU here; --device cpu takes the rehearsal's tiny model", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        rows = [row["instruction"] for row in json.loads(Path(given.records).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(
            f"error: --records {given.records}: a JSON array of objects with instruction, please ({error!r})",
            file=sys.stderr,
        )
        return 2
    distinct = rows[: given.limit * 4 // 5]
    prompts = FOLDER / "prompts.json"
    prompts.write_text(json.dumps(distinct + distinct[: len(distinct) // 4]))
    command = [sys.executable, str(ROOT / "sglang" / "run_sglang.py"), "--prompts", str(prompts)]
    command += ["--max_new_tokens", str(given.max_new_tokens)]
    if given.device == "cpu":
        command += ["--rehearse"]
    else:
        model, adapter = given.model_path or FOLDER / "qwen2.5-7b", FOLDER / "qwen2.5-7b-adapter"
        if not given.model_path and not (adapter / "adapter_config.json").exists():  # written last
            # In a process of its own, whose memory on the GPU is free again.
            written = subprocess.run([sys.executable, qwen_shape.__file__, model, adapter], check=False)
            if written.returncode:
                print(f"error: {model}: the weights could not be written, see above", file=sys.stderr)
                return 2
        command += ["--model_path", str(model), "--engine_args", given.engine_args]
        command += ["--lora_path", given.lora_path] if given.lora_path else []
    names = given.runs or [name for name in RUNS if name != TWO_GPUS or len(gpus) > 1]
    if not set(names) <= set(RUNS):
        print(
            f"error: no run {', '.join(set(names) - set(RUNS))}; choose of {', '.join(RUNS)}", file=sys.stderr
        )
        return 2
    folder = Path(given.folder or FOLDER / time.strftime("%Y%m%d-%H%M%S")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --folder {folder}: cannot be made ({error.strerror})", file=sys.stderr)
        return 2

    def job(name: str) -> dict:
        try:
            return run(name, command, folder / name, len(distinct) // 4)
        except (UserError, OSError) as error:
            print(f"{name}: failed, {error}", flush=True)
            return {"run": name, "error": str(error)}

    results: list[dict] = []
    about = {
        "repeated_prompts": len(distinct) // 4,
        "prompts_sha256": hashlib.sha256(Path(given.records).read_bytes()).hexdigest(),
        "model_path": given.model_path,
        "lora_path": given.lora_path,
        "hardware": gpus[0]["name"] if gpus else None,
        "commit": commit(),
    }
    with ThreadPoolExecutor(given.at_once) as pool:
        for job_ended in as_completed([pool.submit(job, name) for name in names if name != TWO_GPUS]):
            results.append(job_ended.result())
            write_json(RESULT, compare(results, names) | about)
    if TWO_GPUS in names:
        results.append(job(TWO_GPUS))
        write_json(RESULT, compare(results, names) | about)
    compared = compare(results, names)
    for row in compared["runs"]:
        if "error" not in row:
            print(
                f"{row['run']:20} {row['different_records']} of {compared['records']} records differ from the first's, "
                f"{row['cached_prompt_tokens']:,} cached prompt tokens, SHA-256 {row['sha256'][:12]}"
            )
    print(f"{compared['identical_runs']} of {len(names)} runs identical")
    return 0 if compared["identical_runs"] == len(names) else 1


def compare(results: list[dict], names: list[str]) -> dict:
    """The runs so far, in the order of `names`, each against the first of them that ended."""
    results = sorted(results, key=lambda result: names.index(result["run"]))
    ended = [result for result in results if "error" not in result]
    if not ended:
        return {"identical_runs": 0, "runs": results, "records": 0}
    first, settings, rows = ended[0]["outputs"], ended[0]["settings"], []
    for result in results:
        row = {key: value for key, value in result.items() if key not in ("command", "settings", "outputs")}
        if "outputs" in result:
            pairs = enumerate(zip(first, result["outputs"], strict=True))
            different = [i for i, (one, other) in pairs if one != other]
            row |= {"different_records": len(different), "which": different}
        rows.append(row)
    return {
        "identical_runs": sum(result["sha256"] == ended[0]["sha256"] for result in ended),
        "runs": rows,
        "records": len(first),
        "engine_args": settings["engine_args"] | {"model_path": None, "tokenizer_path": None},
        "weights_id": settings["weights_id"],
        "cpu_capability": settings["cpu_capability"],
        "versions": settings["versions"],
    }


if __name__ == "__main__":
    sys.exit(main())
