"""Fine-tuning tokens/s on two GPUs: the starter's settings, ours, and weights that no one has to gather.

    python bench/train_throughput.py starter replicated ours_bf16 replicated_bf16 --part fast.json
    python bench/train_throughput.py starter replicated --slow_link --part slow.json
    python bench/train_throughput.py --merge fast.json slow.json      # bench/results/train_throughput.json

Every row is deepspeed/main.py from preflight to saved adapter, in processes of its own, with random weights of
Llama-2-7B's shape, LoRA of rank 16 on all linear layers and full checkpointing. Documents are drawn, seeded, with
the lengths of rm-static as we estimate them (prompts of about 700 characters in several turns, answers of about
250, 4 characters a token); `--data_path FILE` takes yours, named in the result by its SHA-256 (the stand-in
tokenizer gives it about 2.5 characters a token). Each command measures `ours` first, and ratios are taken within a
command; a row that is named several times is run so often, and its median counts. `--slow_link` switches direct copies
between the GPUs off. A row that fails is recorded with its reason.

A 16 GB V100 is emulated: fp16, GPU_MEMORY_CAP_GIB=14.5, and of the attention kernels only the memory-efficient
ones, the fastest that Volta has. Matrix products are the GPU's own.

rows:
    ours              the program's defaults, fp16
    starter           its ZeRO settings: a document a row, padded to 512, 4 micro-batches a step
    replicated        weights whole on each GPU, LoRA gradients summed (DeepSpeed stage 0), without the cap
    ours_bf16, replicated_bf16               16,384 tokens a micro-batch, without the cap, all kernels
    ours_1gpu_nocap, ours_2gpu_nocap         the same tokens per GPU
    tokens_2048, tokens_2048_rank_64, tokens_4096, tokens_4096_rank_64, tokens_8192_rank_64
                      `ours` at other token budgets and LoRA ranks, without the cap: is the predicted peak right?
    two_streams, host_held, adapters_whole, one_reduction, memory_efficient_linear, hooks_of_modules, prefetch_none,
    parameters_looked_up
                      `ours` without one of its levers: gathers in a stream of their own; the host held until the GPU
                      has the layer before; LoRA tensors whole on each GPU and gathered one by one after each step; all
                      gradients reduced at the end; DeepSpeed's own linear function; a gather for every linear layer; no
                      layer gathered ahead; modules that do not remember their parameters

`--thin 256 --device cpu` with a narrow model (llama_shape.py FOLDER 64) leaves the host's time and little else: one
process, which gathers from nobody, one row of 256 tokens a micro-batch, LoRA of rank 1, the ZeRO settings in
proportion to a layer.

Rates count real tokens (`real_share` of the data's positions are not padding) and use the median step after 4
micro-batches of warm-up. Of the last step, outside those, rank 0's kernels are recorded.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "deepspeed"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
import llama_shape
import main as program
import observed_rank

from lora_sft import preflight, ranks, run_folder
from lora_sft.arguments import REHEARSAL, read_zero_config
from lora_sft.data import prepare
from workbench import UserError
from workbench.files import commit, write_json
from workbench.machine import check_model_folder

FOLDER = REHEARSAL / "runs" / "train_throughput"
RESULT = Path(__file__).resolve().parent / "results" / "train_throughput.json"
CAP_GIB = 14.5  # a V100 has 15.8 GiB; CUDA and NCCL take over 1
DOCUMENTS = 1500
WARMUP_MICRO_BATCHES = 4  # DeepSpeed records its prefetch trace in the first ones
PROFILED_STEPS = 1
ROW_TIMEOUT_S = 240
GATE = "gate"
TIMED_OUT = 124  # exit code, as of timeout(1)
# Parts of the preflight's prediction that are there before the first step, and those that come and go. Of the LoRA states
# the weights, their fp32 copy and a buffer for gradients are there; the optimizer makes its moments in the first step.
RESIDENT = ("weight shard", "reduce bucket")
TRANSIENT = ("gathered layers", "checkpointed inputs", "layer activations", "logits and loss")
STARTER_ZERO = {  # its deepspeed/utils/ds_utils.py
    "stage": 3,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 30_000_000,
    "stage3_prefetch_bucket_size": 30_000_000,
    "memory_efficient_linear": False,
}


@dataclass(frozen=True)
class Row:
    """One way to run the program. `zero` replaces zero_optimization of deepspeed/zero3.json, `zero_changes` some
    of its keys."""

    flags: dict = field(default_factory=dict)
    dtype: str = "fp16"
    zero: dict | None = None
    zero_changes: dict = field(default_factory=dict)  # None: without this key
    cap: bool = False
    one_document_a_row: bool = False
    without: str = ""  # a function of lora_sft/training.py that does nothing in this row

    @property
    def replicated(self) -> bool:
        return self.zero == {"stage": 0}


def budget(tokens: int, rank: int = 16) -> Row:
    return Row({"tokens_per_micro_batch": tokens, "lora_r": rank})


LARGE = {"tokens_per_micro_batch": 16384}  # what cards with room can take
PADDED = {"max_seq_len": 512, "tokens_per_micro_batch": 512, "gradient_accumulation_steps": 4}
ROWS = {
    "ours": Row(cap=True),
    "starter": Row(PADDED, zero=STARTER_ZERO, cap=True, one_document_a_row=True),
    "replicated": Row(zero={"stage": 0}),
    "ours_bf16": Row(LARGE, dtype="bf16"),
    "replicated_bf16": Row(LARGE, dtype="bf16", zero={"stage": 0}),
    "ours_1gpu_nocap": Row({"num_gpus": 1}),
    "ours_2gpu_nocap": Row(),
    "tokens_2048": budget(2048),
    "tokens_2048_rank_64": budget(2048, 64),
    "tokens_4096": budget(4096),
    "tokens_4096_rank_64": budget(4096, 64),
    "tokens_8192_rank_64": budget(8192, 64),
    "two_streams": Row(zero_changes={"overlap_comm": True}, cap=True),
    "host_held": Row(without="let_host_run_ahead", cap=True),
    "adapters_whole": Row(
        zero_changes={
            "stage3_param_persistence_threshold": 1_000_000,
            "stage3_prefetch_bucket_size": 202_375_168,
        },
        cap=True,
    ),
    "one_reduction": Row(zero_changes={"reduce_bucket_size": 50_000_000}, cap=True),
    "memory_efficient_linear": Row(zero_changes={"memory_efficient_linear": True}, cap=True),
    "hooks_of_modules": Row(zero_changes={"leaf_module": None}, cap=True),
    "prefetch_none": Row(zero_changes={"stage3_prefetch_bucket_size": 0}, cap=True),
    "parameters_looked_up": Row(without="remember_parameters", cap=True),
}


# --- the data -----------------------------------------------------------------------------------------


def draw_documents(model: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Rows of `prompt` and `chosen` out of words that are one token each, so that lengths are right in tokens
    with any tokenizer. Lengths are log-normal."""
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(token for token in vocab if token[0] == "▁" and token[1:].isascii() and token[1:].isalpha())
    if not words:
        raise UserError(f"--model_path {model}: its tokenizer has no words like '▁the'; give --data_path FILE")
    draw = random.Random(seed)

    def text(characters: float) -> str:
        return "".join(draw.choices(words, k=max(1, round(characters / 4)))).replace("▁", " ")

    rows = []
    for _ in range(count):
        turns = draw.choice((1, 1, 2, 2, 3, 4))
        left = max(40.0, draw.lognormvariate(6.3, 0.7) - turns * len("\n\nHuman:\n\nAssistant:"))
        parts = [left * (0.3 if turn % 2 == 0 else 0.7) / turns for turn in range(2 * turns - 1)]
        scale = left / sum(parts)
        prompt = "".join(
            f"\n\n{'Assistant' if turn % 2 else 'Human'}:{text(part * scale)}"
            for turn, part in enumerate(parts)
        )
        rows.append({"prompt": f"{prompt}\n\nAssistant:", "chosen": text(draw.lognormvariate(5.25, 0.75))})
    return rows


def prepare_one_document_a_row(*args) -> preflight.data.Packed:
    """`data.prepare` without packing (the self-test in the ranks goes on packing)."""
    data = preflight.data
    packing, data.best_fit = data.best_fit, lambda lengths, capacity: [[index] for index in range(len(lengths))]
    try:
        return prepare(*args)
    finally:
        data.best_fit = packing


# --- one row ------------------------------------------------------------------------------------------


@dataclass
class Started:
    """A row whose program runs, and waits before its ranks load the model until GATE is in its `folder`."""

    name: str
    pid: int
    folder: Path
    timed: slice  # of its steps


def start_row(name: str, number: int, given: argparse.Namespace, model: Path, data_path: Path) -> Started:
    """Starts the program for one row: its preflight and imports, half of a row's time, pass while the row before
    it, whose steps are over, evaluates, saves and checks."""
    row, folder = ROWS[name], FOLDER / f"{number}_{name}"
    out, log = folder / "output", folder / "terminal.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    accumulation = row.flags.get("gradient_accumulation_steps", 1)
    warmup = max(1, WARMUP_MICRO_BATCHES // accumulation)
    measured = max(1, given.micro_batches // accumulation)
    recorded = max(1, PROFILED_STEPS // accumulation)
    zero = json.loads(Path(program.Arguments().deepspeed).read_text())
    if row.zero and not row.replicated:  # the program refuses a file without ZeRO-3: see child()
        zero["zero_optimization"] = row.zero
    changed = zero["zero_optimization"] | row.zero_changes
    zero["zero_optimization"] = {key: value for key, value in changed.items() if value is not None}
    if given.thin:
        width = (
            json.loads((model / "config.json").read_text())["hidden_size"] / llama_shape.CONFIG["hidden_size"]
        )
        zero["zero_optimization"] |= {
            key: round(value * width**2)
            for key, value in zero["zero_optimization"].items()
            if key.startswith("stage3_") and not isinstance(value, bool)
        }
    write_json(folder / "zero.json", zero)
    flags = {
        "model_name_or_path": model,
        "data_path": data_path,
        "output_dir": out,
        "deepspeed": folder / "zero.json",
        "device": given.device,
        "dtype": row.dtype if given.device == "cuda" else "fp32",
        "num_gpus": 2,
        "max_train_rows": DOCUMENTS,
        "max_eval_rows": 2,
        "max_steps": warmup + measured + recorded,
        "save_steps": 10**6,
    } | row.flags
    if given.thin:
        flags |= {"max_seq_len": given.thin, "tokens_per_micro_batch": given.thin, "lora_r": 1, "num_gpus": 1}
    argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]

    def child() -> int:
        terminal = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        os.environ.pop("GPU_MEMORY_CAP_GIB", None)
        os.environ |= {"GPU_MEMORY_CAP_GIB": str(CAP_GIB)} if row.cap else {}
        os.environ |= {"NCCL_P2P_DISABLE": "1"} if given.slow_link else {}
        os.environ["HF_HUB_OFFLINE"] = "1"
        if row.one_document_a_row:
            preflight.data.prepare = prepare_one_document_a_row
        if row.replicated:
            program.read_zero_config = lambda path: read_zero_config(path) | {"zero_optimization": row.zero}
        steps = (flags["max_steps"], warmup + measured)

        def rank_of_row(function: Callable[[int], int], rank: int) -> int:
            observed_rank.prepare(rank, row, steps, out)
            while not (folder / GATE).exists():
                time.sleep(0.02)
            return function(rank)

        program.run_ranks = lambda function, world_size, work_dir: ranks.run_ranks(
            functools.partial(rank_of_row, function), world_size, work_dir
        )
        return program.main(argv)

    pid = ranks.fork(child, folder / "error")
    return Started(name, pid, folder, slice(warmup, warmup + measured))


def finish_row(started: Started, when_timed: Callable[[], None]) -> dict:
    """Lets the row go on, and returns what it measured, or its error. Calls `when_timed` once its last step is
    over."""
    row, folder = ROWS[started.name], started.folder
    began = time.monotonic()
    (folder / GATE).touch()
    code = wait(started.pid, folder / "output" / observed_rank.TIMED, when_timed)
    base = {"row": started.name, "wall_s": time.monotonic() - began, "flags": row.flags, "zero": row.zero}
    base["zero_changes"] = row.zero_changes
    if code:
        return base | failure(folder, code)
    result = base | columns(row, folder / "output", started.timed)
    beyond = result["kernels"] and result["kernels"]["not_on_volta"]
    if beyond and row.dtype == "fp16":
        result["error"] = f"kernels ran that Volta lacks: {', '.join(beyond)[:300]}"
    return result


def wait(pid: int, mark: Path | None = None, when_marked: Callable[[], None] | None = None) -> int:
    """Exit code of a forked process, or TIMED_OUT: then it was killed, and its ranks with it. `when_marked` is called
    once, when the file `mark` is there or the process has ended."""
    deadline = time.monotonic() + ROW_TIMEOUT_S
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if when_marked and (ended or mark.exists() or time.monotonic() > deadline):
            when_marked()
            when_marked = None
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return TIMED_OUT
        time.sleep(0.05)


def failure(folder: Path, code: int) -> dict:
    """Why a forked process failed, from what it left in `folder`: one line, and the last lines of all."""
    text = "".join(
        path.read_text(errors="replace") + "\n"
        for path in (folder / "terminal.log", folder / "error", folder / "error.traceback")
        if path.exists()
    )
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    error = [*told[:1], *raised[-1:], *lines[-1:], f"exit code {code}"][0]
    if code == TIMED_OUT:
        error = f"no end after {ROW_TIMEOUT_S} s; last line: {lines[-1] if lines else 'none'}"
    return {"error": error[:400], "last_lines": lines[-25:]}


def columns(row: Row, out: Path, measured: slice) -> dict:
    """The columns of a finished row, from the program's own files and what was observed."""
    from lora_sft import report

    summary, config, seen = (
        json.loads((out / file).read_text())
        for file in (run_folder.SUMMARY, run_folder.CONFIG, observed_rank.OBSERVED)
    )
    plan, arguments = config["plan"], config["arguments"]
    steps = report.read_metrics(out)
    accumulation = arguments["gradient_accumulation_steps"]
    step_s = statistics.median(step["step_time_s"] for step in steps[measured])
    ends_s = seen["step_ends_s"][measured.start - 1 : measured.stop]
    positions = arguments["tokens_per_micro_batch"] * accumulation / step_s
    documents = plan["train"]
    # Of all the data: few steps at one document a row would see long or short ones by chance.
    real = positions * documents["real_tokens"] / (documents["packed_rows"] * arguments["max_seq_len"])
    peak = report.peak_tflops(plan["gpu_name"]) if plan["dtype"] != "fp32" else None
    flops = real * plan["matmul_parameters"] / (peak * 1e12) if peak else None
    return {
        "real_tokens_per_s_per_gpu": real,
        "trained_tokens_per_s_per_gpu": real * documents["trained_tokens"] / documents["real_tokens"],
        "positions_per_s_per_gpu": positions,
        "real_share": real / positions,
        "tokens_per_document": documents["real_tokens"] / documents["documents"],
        "step_s": step_s,
        "step_times_s": [step["step_time_s"] for step in steps[measured]],
        # With logging and the next batch, which the program's step time leaves out.
        "step_to_step_s": statistics.median(b - a for a, b in itertools.pairwise(ends_s)),
        "micro_batches_per_step": accumulation,
        "losses": [step["loss"] for step in steps],
        "skipped_updates": sum(step["skipped_update"] for step in steps[measured]),
        "peak_reserved_gib": summary["peak_reserved_gib"],
        "predicted_peak_gib": None if row.replicated else plan["predicted_peak_gib"],
        "predicted_parts_gib": None if row.replicated else plan["predicted_parts_gib"],
        "measured_parts_gib": seen["memory_gib"] or None,
        "alloc_retries": seen["alloc_retries"],
        "mfu_4n": 4 * flops if flops else None,
        "hfu_6n": 6 * flops if flops else None,
        "gathered_gib_per_micro_batch": statistics.median(seen["gathered_bytes"][measured])
        / accumulation
        / 2**30,
        "kernels": seen.get("kernels"),
        "dtype": plan["dtype"],
        "world_size": plan["world_size"],
        "gpu_limit_gib": plan["gpu_limit_gib"],
        "gpu_name": plan["gpu_name"],
        "zero": config["resolved_zero_config"]["zero_optimization"],
    }


# --- one command --------------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> dict:
    """Runs the rows, `ours` first. Raises UserError if the model or the data cannot be made or read, or the part
    not written."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if given.part and not Path(given.part).absolute().parent.is_dir():
        raise UserError(f"--part {given.part}: its folder does not exist")
    # Once, and in the program's order: rows are forked from this process, which touches no GPU.
    program.set_up_environment(program.Arguments(device=given.device))
    program.import_shared_libraries()
    model = Path(given.model_path or FOLDER / "llama2-7b-shape").absolute()
    if not given.model_path:
        began, folder = time.monotonic(), FOLDER / "build"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if code := wait(ranks.fork(lambda: llama_shape.main(model), folder / "error")):
            raise UserError(failure(folder, code)["error"])
        print(f"weights of Llama-2-7B's shape: {time.monotonic() - began:.0f} s", flush=True)
    check_model_folder(model)
    data_path = Path(given.data_path or FOLDER / "documents.jsonl").absolute()
    if not given.data_path:
        rows = draw_documents(model, DOCUMENTS + 2, given.seed)
        data_path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        sha256 = hashlib.sha256(data_path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--data_path {data_path}: cannot be read ({error.strerror})") from error
    result = {
        "workload": {"drawn": not given.data_path, "file_sha256": sha256, "seed": given.seed},
        "link": "slow" if given.slow_link else "fast",
        "micro_batches": given.micro_batches,
        "thin_tokens": given.thin,
        "rows": [],
        "hardware": f"{len(os.sched_getaffinity(0))} CPU cores" if given.device == "cpu" else None,
        "versions": preflight.versions(preflight.PACKAGES),
        "commit": commit(),
    }
    names = ["ours", *given.rows]
    started: list[Started] = []

    def start_next() -> None:
        if (number := len(started)) < len(names):
            started.append(start_row(names[number], number, given, model, data_path))

    start_next()

    for number in range(len(names)):
        row = finish_row(started[number], start_next)
        result["rows"].append(row)
        result["hardware"] = row.get("gpu_name") or result["hardware"]
        if given.part:
            write_json(Path(given.part), result)
        print(line(row), flush=True)
    return result


def line(row: dict) -> str:
    """A row of the printed table."""
    if "error" in row:
        return f"{row['row']:20} {row['wall_s']:5.0f} s  failed: {row['error']}"
    kernels = row["kernels"] or {}
    cells = {
        "real tok/s/GPU": (row["real_tokens_per_s_per_gpu"], ",.0f"),
        "trained": (row["trained_tokens_per_s_per_gpu"], ",.0f"),
        "step s": (row["step_s"], ".3f"),
        "GiB": (row["peak_reserved_gib"], ".2f"),
        "predicted": (row["predicted_peak_gib"], ".2f"),
        "MFU": (row["mfu_4n"], ".3f"),
        "HFU": (row["hfu_6n"], ".3f"),
        "GiB gathered": (row["gathered_gib_per_micro_batch"], ".2f"),
        "no kernel": (kernels.get("no_kernel_share"), ".3f"),
        "only comm.": (kernels.get("communication_only_share"), ".3f"),
    }
    shown = [f"{name} {'-' if value is None else format(value, form)}" for name, (value, form) in cells.items()]
    return f"{row['row']:20} {row['wall_s']:5.0f} s  {'  '.join(shown)}"


# --- merging ------------------------------------------------------------------------------------------


def read_part(path: Path) -> dict:
    try:
        part = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--merge {path}: cannot be read ({error})") from error
    if not isinstance(part, dict) or not {"workload", "hardware", "commit", "link", "rows"} <= part.keys():
        raise UserError(f"--merge {path}: not a file that --part has written")
    return part


def rates_of(rows: list[dict]) -> dict[str, float]:
    """Real tokens/s per GPU by row, the median where a row was run several times; rows that failed are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["row"], []).append(row["real_tokens_per_s_per_gpu"])
    return {name: statistics.median(rates) for name, rates in found.items()}


def merge(parts: list[dict]) -> dict:
    """Ratios of real tokens/s within each command, their mean over commands for each link, and how far the
    predicted peaks are off. Raises UserError for parts of different data, hardware or commits."""
    for name in ("workload", "hardware", "commit"):
        found = {json.dumps(part[name], sort_keys=True) for part in parts}
        if len(found) > 1:
            raise UserError(f"--merge: the parts differ in {name}: {', '.join(sorted(found))}")
    links: dict[str, dict[str, list[float]]] = {"fast": {}, "slow": {}}
    rows = [row for part in parts for row in part["rows"] if "error" not in row]
    for part in parts:
        rates = rates_of(part["rows"])
        for name, above, below in (
            ("ratio_vs_starter", "ours", "starter"),
            ("ratio_vs_ceiling", "ours", "replicated"),
            ("ratio_bf16_vs_ceiling", "ours_bf16", "replicated_bf16"),
            ("scaling_1_to_2", "ours_2gpu_nocap", "ours_1gpu_nocap"),
        ):
            if above in rates and below in rates:
                links[part["link"]].setdefault(name, []).append(rates[above] / rates[below])
    means = {
        link: {name: statistics.mean(ratios) for name, ratios in found.items()} for link, found in links.items()
    }
    names = ("ratio_vs_starter", "ratio_vs_ceiling", "ratio_bf16_vs_ceiling", "scaling_1_to_2")
    peaks = [row["peak_reserved_gib"] for row in rows if row["row"] == "ours" and row["peak_reserved_gib"]]
    return {name: means["fast"].get(name) for name in names} | {
        "links": means,
        "peak_reserved_gib": max(peaks, default=None),
        "prediction_errors": {
            row["row"]: prediction_errors(row)
            for row in rows
            if row["measured_parts_gib"] and row["predicted_peak_gib"]
        },
        "parts": [
            # The last lines of a failure are for the person at the machine: they name its paths.
            part | {"rows": [{k: v for k, v in row.items() if k != "last_lines"} for row in part["rows"]]}
            for part in parts
        ],
    }


def prediction_errors(row: dict) -> dict[str, float]:
    """(predicted - measured) / measured, whole and part by part. `resident` is there before the first step,
    `transient` comes on top of it, `slack` is reserved and not allocated (a difference in GiB: it is small)."""
    measured, parts = row["measured_parts_gib"], row["predicted_parts_gib"]
    resident, transient = (sum(parts[name] for name in names) for names in (RESIDENT, TRANSIENT))
    size = 4 if row["dtype"] == "fp32" else 2
    lora_before = parts["LoRA states"] * (2 * size + 4) / (2 * size + 16)
    resident, transient = resident + lora_before, transient + parts["LoRA states"] - lora_before
    rises = measured["peak_allocated"] - measured["resident"]
    slack = measured["peak_reserved"] - measured["peak_allocated"]
    return {
        "peak": row["predicted_peak_gib"] / row["peak_reserved_gib"] - 1,
        "resident": resident / measured["resident"] - 1,
        "transient": transient / rises - 1,
        "slack_gib": parts["allocator slack"] - slack,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="row", help="see above")
    parser.add_argument("--part", help="file for what this command measured, written after every row")
    parser.add_argument("--data_path", help="JSON or JSONL file of rows with prompt and chosen")
    parser.add_argument("--slow_link", action="store_true", help="NCCL_P2P_DISABLE=1")
    parser.add_argument("--micro_batches", type=int, default=8, help="measured in each row")
    parser.add_argument("--thin", type=int, metavar="TOKENS", help="a narrow model: leaves the host's time")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn documents")
    parser.add_argument("--model_path", help="folder (default: random weights of Llama-2-7B's shape)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: fp32, to try the script"
    )
    parser.add_argument("--merge", nargs="+", metavar="PART", help="join parts into the result file")
    given = parser.parse_args()
    try:
        if given.merge:
            result = merge([read_part(Path(part)) for part in given.merge])
            RESULT.parent.mkdir(exist_ok=True)
            write_json(RESULT, result)
            print(json.dumps({name: value for name, value in result.items() if name != "parts"}, indent=2))
            return 0
        if given.micro_batches < 1:
            raise UserError(f"--micro_batches {given.micro_batches}: must be at least 1")
        result = measure(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rates = rates_of(result["rows"])
    if "ours" in rates:
        print(json.dumps({name: round(rate / rates["ours"], 4) for name, rate in rates.items()}))
    return 3 if any("error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
