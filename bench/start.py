"""From the command to the first answer: run_sglang.py's start in parts, the first time and then.

    python bench/start.py first again again,TREE=CHECKOUT --model_path /tmp/qwen
    python bench/start.py again --device cpu        # tries the script: make rehearse's model

Each row is the real command, in turn, on one GPU, with answers of 16 tokens; `seconds` is when it begins to answer, `parts`
when each line before that came. Ratios are to the first row.

rows:
    first               nothing is compiled: the folders of kernels are empty
    again               with the kernels of the rows before, and weights in memory if they fit
    cold                as again, but the weights are not in memory
    ROW,NAME=VALUE,...  another flag, an environment variable (in capitals), or with TREE another checkout's program
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "sglang", "common"))
import rows

from batch_infer.arguments import REHEARSAL
from batch_infer.preflight import PACKAGES
from batch_infer.store import SUMMARY
from workbench import UserError
from workbench.files import commit
from workbench.machine import versions

ROOT = REHEARSAL.parent
FOLDER = REHEARSAL / "runs" / "start"
RESULT = ROOT / "bench" / "results" / "start.json"
CACHES = ("FLASHINFER_WORKSPACE_BASE", "TVM_FFI_CACHE_DIR", "SGLANG_DG_CACHE_DIR", "TRITON_HOME")
ANSWERING = "answering"
PARTS = {
    "GPUs known": r"PASS  GPUs",
    "inputs checked": r"PASS  disk",
    "tokenised": r"records  .* to answer",
    "weights loaded": r"shards: 100%",
    "CUDA graphs captured": r"Capturing batches.* 100%",
    ANSWERING: r"\| 0/\d+ .*records/s",
}


def measure_row(name: str, given: argparse.Namespace, log: Path) -> dict:
    """Raises UserError if the command fails."""
    kind, settings = rows.split(name)
    tree = Path(settings.pop("TREE", ROOT)).absolute()
    if kind == "first":
        shutil.rmtree(FOLDER / "kernels", ignore_errors=True)
    for path in Path(given.model_path or "").glob("*.safetensors") if kind == "cold" else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    environment = os.environ | {cache: str(FOLDER / "kernels" / cache) for cache in CACHES}
    environment |= {variable: value for variable, value in settings.items() if variable.isupper()}
    flags = {
        "output_file": FOLDER / "outputs.jsonl",
        "max_new_tokens": 16,
        "dp_size": 1,
        "device": given.device,
    }
    flags |= {"fast": given.device == "cuda"}
    flags |= (
        {"model_path": given.model_path, "prompts": given.records} if given.model_path else {"rehearse": True}
    )
    flags |= {flag: value for flag, value in settings.items() if not flag.isupper()}
    command = [sys.executable, tree / "sglang" / "run_sglang.py", "--overwrite"]
    command += [f"--{flag}={value}" for flag, value in flags.items()]
    began, parts = time.monotonic(), {}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with log.open("wb") as copy:
        text = b""
        while piece := os.read(process.stdout.fileno(), 2**16):
            copy.write(piece)
            *lines, text = re.split(rb"[\r\n]", text + piece)
            for part, line in PARTS.items():  # of a bar the last state is not ended yet
                if part not in parts and any(re.search(line.encode(), seen) for seen in [*lines, text]):
                    parts[part] = round(time.monotonic() - began, 2)
    if process.wait() or ANSWERING not in parts:
        raise UserError(rows.reason(log, f"exit code {process.returncode}"))
    summary = json.loads((FOLDER / SUMMARY).read_text())
    found = {"seconds": parts[ANSWERING], "parts": parts, "commit": commit(tree)}
    return (
        found
        | {name: summary[name] for name in ("load_s", "compile_s")}
        | {"hardware": summary["settings"]["gpu_name"]}
    )


def measure(given: argparse.Namespace, output: Path) -> dict:
    if given.device == "cuda" and not given.model_path:
        raise UserError("--model_path FOLDER is needed; --device cpu tries the script")
    for name in given.rows:
        kind, settings = rows.split(name)
        if kind not in ("first", "again", "cold"):
            raise UserError(f"no row {name}; -h lists them")
        if not Path(settings.get("TREE", ROOT), "sglang", "run_sglang.py").exists():
            raise UserError(f"{name}: no checkout in {settings['TREE']}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = {"cpu_cores": len(os.sched_getaffinity(0)), "versions": versions(PACKAGES), "commit": commit()}

    def run(name: str, number: int) -> dict:
        return measure_row(name, given, FOLDER / f"row_{number}.log")

    return rows.measure(given.rows, run, lambda result: {"ratios": rows.to_first(result)}, about, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="row", help="see above")
    parser.add_argument("--model_path", help="folder, as bench/shapes.py writes it")
    parser.add_argument("--records", default=str(REHEARSAL / "instructions.json"), help="--prompts")
    sys.exit(rows.run(measure, parser, RESULT, FOLDER))
