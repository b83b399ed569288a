"""Fine-tuning tokens/s on two GPUs: the starter's settings, ours, and weights that no one has to gather.

    python bench/train_throughput.py starter replicated ours_bf16 ours_1gpu_nocap ours_2gpu_nocap
    NCCL_P2P_DISABLE=1 python bench/train_throughput.py starter replicated --output slow.json    # no direct copies
    python bench/train_throughput.py ours_2gpu_nocap,tokens_per_micro_batch=4096,lora_r=64 --output budgets.json
    python bench/train_throughput.py starter --device cpu        # tries the script: tiny model, fp32

Every row is deepspeed/main.py from preflight to saved adapter, with random weights of Llama-2-7B's shape, LoRA of
rank 16 on all linear layers and full checkpointing. Documents are drawn, seeded, with the lengths of rm-static as we
estimate them (prompts of about 700 characters in several turns, answers of about 250, 4 characters a token);
`--data_path FILE` takes yours. `ours` always runs, first, and ratios are taken within a command. The result is written after every
row. Exit code 3: a row failed, its reason is in the result.

A 16 GB V100 is emulated: fp16, GPU_MEMORY_CAP_GIB=14.5, and of the attention kernels only the memory-efficient
ones, the fastest that Volta has. Matrix products are the GPU's own.

rows:
    ours                  the program's defaults, fp16
    starter               its ZeRO settings: a document a row, padded to 512, 4 micro-batches a step
    replicated            weights whole on each GPU, LoRA gradients summed (DeepSpeed stage 0), without the cap, all
                          layers computed again as in ours
    ours_bf16                               16,384 tokens a micro-batch, without the cap, all kernels
    plain, plain_bf16                       ours and ours_bf16 as transformers and PEFT compute a layer, and all layers
                                            computed again in the backward pass
    ours_1gpu_nocap, ours_2gpu_nocap        the same tokens per GPU, all layers computed again
    trl_padded, trl_packed                  TRL's SFTTrainer with the ZeRO-3 file that it ships, by --trl's Python
    ROW,NAME=VALUE,...    one of these with another flag, another key of zero3.json's zero_optimization (of trl's
                          SFTConfig), or (in capitals) environment variable; NNODES=2: as many launchers, each with its own
                          GPUs and between them sockets, as nodes have

Rates count real tokens (`real_share` of the data's positions are not padding) and use the median step after 4
micro-batches of warm-up. On a GPU the last micro-batch of rank 0 is profiled: `gpu_s` of its kernels by kind, and how long
none ran.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "deepspeed", "common", "rehearsal")
)
import main as program
import rows
import shapes

from lora_sft import launch, run_folder
from lora_sft.arguments import REHEARSAL, Arguments, parse, read_zero_config
from lora_sft.preflight import PACKAGES
from workbench import UserError
from workbench.files import commit, write_json
from workbench.machine import versions
from workbench.models import check_model_folder
from workbench.processes import die_with_parent, free_port

FOLDER = REHEARSAL / "runs" / "train_throughput"
RESULT = REHEARSAL.parent / "bench" / "results" / "train_throughput.json"
CAP_GIB = 14.5  # a V100 has 15.8 GiB; CUDA and NCCL take over 1
DOCUMENTS, HELD_OUT = 1500, 64
WARM_UP_MICRO_BATCHES = 4  # DeepSpeed records its prefetch trace in the first ones
ROW_TIMEOUT_S = 240
OBSERVED, LOG = "observed.json", "terminal.log"  # what a row leaves
STARTER_ZERO = {  # its deepspeed/utils/ds_utils.py
    "stage": 3,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_max_live_parameters": 30_000_000,
    "stage3_prefetch_bucket_size": 30_000_000,
    "memory_efficient_linear": False,
}
REPLICATED = {"stage": 0}
# Kinds of GPU kernels by their names; the others are elementwise.
KINDS = {
    "all-gathers and sums over GPUs": "nccl",
    "matrix products": "gemm|nvjet|cutlass_.*tensorop|splitK",
    "attention": "fmha|flash|attention",
    "copies": "[Mm]emcpy|[Mm]emset|copy|CatArray",
    "sums over rows": "reduce|softmax",
    "dropout": "dropout",
}


@dataclass(frozen=True)
class Row:
    """One way to run the program. `zero` replaces zero_optimization of deepspeed/zero3.json."""

    flags: dict = field(default_factory=dict)
    dtype: str = "fp16"
    zero: dict | None = None
    cap: bool = False
    one_document_a_row: bool = False


LARGE = {"tokens_per_micro_batch": 16384}  # what cards with room can take
PLAIN = {"kernels": "none", "kept_layers": 0}
PADDED = {"max_seq_len": 512, "tokens_per_micro_batch": 512, "gradient_accumulation_steps": 4}
ROWS = {
    "ours": Row(cap=True),
    "starter": Row(PADDED, zero=STARTER_ZERO, cap=True, one_document_a_row=True),
    "replicated": Row({"kept_layers": 0}, zero=REPLICATED),
    "ours_bf16": Row(LARGE, dtype="bf16"),
    "plain": Row(PLAIN, cap=True),
    "plain_bf16": Row(LARGE | PLAIN, dtype="bf16"),
    "ours_1gpu_nocap": Row({"num_gpus": 1, "kept_layers": 0}),
    "ours_2gpu_nocap": Row({"kept_layers": 0}),
    "trl_padded": Row(),
    "trl_packed": Row(),
}
RATIOS = {
    "ratio_vs_starter": ("ours", "starter"),
    "ratio_vs_ceiling": ("ours", "replicated"),
    "ratio_vs_trl": ("ours", "trl_packed,per_device_train_batch_size=8"),
    "ratio_vs_plain": ("ours", "plain"),
    "ratio_bf16_vs_plain": ("ours_bf16", "plain_bf16"),
    "scaling_1_to_2": ("ours_2gpu_nocap", "ours_1gpu_nocap"),
    "scaling_1_to_4": ("ours_2gpu_nocap,num_gpus=4", "ours_1gpu_nocap"),
    "ratio_two_nodes": ("ours,num_gpus=2,NNODES=2", "ours,num_gpus=4"),
}


def row_named(name: str) -> tuple[Row, dict, dict, dict]:
    """(row, flags, changes of zero_optimization, environment variables). Raises UserError."""
    kind, settings = rows.split(name)
    if kind not in ROWS:
        raise UserError(f"no row {name}; there are {', '.join(ROWS)} and ROW,NAME=VALUE")
    names = {entry.name for entry in fields(Arguments)}
    variables = {name: value for name, value in settings.items() if name.isupper()}
    flags = ROWS[kind].flags | {name: value for name, value in settings.items() if name in names}
    try:
        zero = {n: json.loads(value) for n, value in settings.items() if n not in names and n not in variables}
    except ValueError as error:
        raise UserError(f"{name}: neither a flag nor a JSON value of zero_optimization ({error})") from error
    parse(words(flags))
    return ROWS[kind], flags, zero, variables


def words(flags: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


# --- the data -----------------------------------------------------------------------------------------


def draw_documents(model: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Rows of `prompt` and `chosen` out of words that are one token each, so that lengths are right in tokens
    with any tokenizer. Lengths are log-normal."""
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    known = sorted(token for token in vocab if token[0] == "▁" and token[1:].isascii() and token[1:].isalpha())
    if not known:
        raise UserError(f"--model_path {model}: its tokenizer has no words like '▁the'; give --data_path FILE")
    draw = random.Random(seed)

    def text(characters: float) -> str:
        return "".join(draw.choices(known, k=max(1, round(characters / 4)))).replace("▁", " ")

    documents = []
    for _ in range(count):
        turns = draw.choice((1, 1, 2, 2, 3, 4))
        left = max(40.0, draw.lognormvariate(6.3, 0.7) - turns * len("\n\nHuman:\n\nAssistant:"))
        parts = [left * (0.3 if turn % 2 == 0 else 0.7) / turns for turn in range(2 * turns - 1)]
        scale = left / sum(parts)
        prompt = "".join(
            f"\n\n{'Assistant' if turn % 2 else 'Human'}:{text(part * scale)}"
            for turn, part in enumerate(parts)
        )
        documents.append({"prompt": f"{prompt}\n\nAssistant:", "chosen": text(draw.lognormvariate(5.25, 0.75))})
    return documents


def without_packing(prepare: Callable) -> Callable:
    """`data.prepare` that gives each document a row (the self-test in the ranks goes on packing)."""
    from lora_sft import data

    def prepare_rows(*args):
        packing = data.best_fit
        data.best_fit = lambda lengths, capacity: [[index] for index in range(len(lengths))]
        try:
            return prepare(*args)
        finally:
            data.best_fit = packing

    return prepare_rows


# --- one row ------------------------------------------------------------------------------------------


def measure_row(name: str, number: int, *, given: argparse.Namespace, model: Path, data_path: Path) -> dict:
    """Runs the program, with its output in a log. Raises UserError with the reason if it fails."""
    row, flags, zero_changes, variables = row_named(name)
    folder = FOLDER / f"row_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name.startswith("trl"):
        run = functools.partial(run_trl, name, given, model, data_path, folder)
        return rows.in_child(run, folder / LOG)
    zero = json.loads(Path(Arguments().deepspeed).read_text())
    if row.zero != REPLICATED:  # the program refuses a file without ZeRO-3: see run_program()
        zero["zero_optimization"] = (row.zero or zero["zero_optimization"]) | zero_changes
    write_json(folder / "zero.json", zero)
    accumulation = flags.get("gradient_accumulation_steps", 1)
    warm_up = max(1, WARM_UP_MICRO_BATCHES // accumulation)
    steps = warm_up + max(1, given.micro_batches // accumulation)
    flags = {
        **{"model_name_or_path": model, "data_path": data_path, "output_dir": folder / "output"},
        **{"deepspeed": folder / "zero.json", "device": given.device, "num_gpus": 2, "max_steps": steps},
        **{"max_train_rows": DOCUMENTS, "max_eval_rows": HELD_OUT, "save_steps": 10**6},
        "dtype": row.dtype,
        **({"dtype": "fp32", "tokens_per_micro_batch": 1024} if given.device == "cpu" else {}),
    } | flags
    run = functools.partial(run_program, row, words(flags), folder, variables)
    code = rows.in_child(run, folder / LOG)["code"]
    if code:
        raise UserError(rows.reason(folder / LOG, f"exit code {code}"))
    return columns(row, folder / "output", warm_up)


def run_program(row: Row, argv: list[str], folder: Path, variables: dict[str, str]) -> dict:
    """The exit code of deepspeed/main.py with what is special about `row`, in this process. Killed if it hangs."""
    os.environ.pop("GPU_MEMORY_CAP_GIB", None)
    os.environ |= ({"GPU_MEMORY_CAP_GIB": str(CAP_GIB)} if row.cap else {}) | variables
    args = parse(argv)
    node, micro_batches = start_nodes(args.num_gpus), args.max_steps * args.gradient_accumulation_steps
    signal.alarm(ROW_TIMEOUT_S)
    if row.one_document_a_row:
        from lora_sft import data

        data.prepare = without_packing(data.prepare)
    if row.zero == REPLICATED:
        program.read_zero_config = lambda path: read_zero_config(path) | {"zero_optimization": REPLICATED}
    run_ranks = launch.run_ranks
    launch.run_ranks = lambda function, *rest: run_ranks(
        functools.partial(run_rank, row, folder, micro_batches, function), *rest
    )
    code = program.main(argv)
    if node:
        os._exit(code)
    return {"code": code}


def start_nodes(gpus: int) -> int:
    """Forks the other nodes of NNODES and returns which this process is. NCCL takes one of another host id for one on
    another machine."""
    nodes = int(os.environ.get("NNODES", "1"))
    if nodes == 1:
        return 0
    os.environ |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for node in range(1, nodes):
        if os.fork() == 0:
            die_with_parent()
            os.environ["NODE_RANK"] = str(node)
            break
    rank = int(os.environ["NODE_RANK"])
    mine = ",".join(rows.visible_gpus()[rank * gpus :][:gpus])
    os.environ |= {"NCCL_HOSTID": f"node{rank}", "CUDA_VISIBLE_DEVICES": mine}
    return rank


def run_trl(name: str, given: argparse.Namespace, model: Path, data_path: Path, folder: Path) -> dict:
    """peers.py on the same documents. Raises UserError."""
    _, flags, settings, variables = row_named(name)
    if not given.trl:
        raise UserError(f"the row {name} needs --trl PYTHON, with TRL 1.16.0")
    settings |= {n: json.loads(value) for n, value in flags.items() if n not in ("dtype", "num_gpus")}
    lora = {name: getattr(Arguments(), name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
    lora["r"] = lora.pop("lora_r")
    spec = {
        **{"model": str(model), "documents": str(data_path), "rows": DOCUMENTS, "settings": settings},
        **{"dtype": flags.get("dtype", "fp16"), "cap_gib": float(variables.get("GPU_MEMORY_CAP_GIB", 0))},
        **{"gpus": int(flags.get("num_gpus", 2)), "port": free_port()},
        **{"packing": name.startswith("trl_packed"), "steps": given.micro_batches},
        **{"warm_up": WARM_UP_MICRO_BATCHES, "lora": lora},
    }
    write_json(folder / "spec.json", spec)
    words = [*shlex.split(given.trl), "-P", Path(__file__).with_name("peers.py"), "trl", folder / "spec.json"]
    subprocess.run([*words, folder / "result.json"], timeout=ROW_TIMEOUT_S, check=False)
    if not (folder / "result.json").exists():
        raise UserError(rows.reason(folder / LOG, "TRL failed"))
    return json.loads((folder / "result.json").read_text())


def run_rank(row: Row, folder: Path, micro_batches: int, function: Callable[[int], int], rank: int) -> int:
    """A rank of the program, with what is special about `row`; rank 0 leaves its peak of allocated memory."""
    import torch

    cuda = os.environ["DS_ACCELERATOR"] == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before an import below initialises CUDA on GPU 0
        if row.dtype == "fp16":
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
    if row.zero == REPLICATED:
        replicate()
    profiled = profile_last_micro_batch(micro_batches) if rank == 0 and cuda else {}
    code = function(rank)
    if rank == 0 and cuda:
        stats = torch.cuda.memory_stats()
        seen = profiled | {"peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30}
        write_json(folder / OBSERVED, seen | {"alloc_retries": stats["num_alloc_retries"]})
    return code


def profile_last_micro_batch(number: int) -> dict:
    """Profiles Trainer's forward and backward pass of that number; the result is filled in then."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    from transformers import Trainer

    step, count, found = Trainer.training_step, itertools.count(1), {}

    def training_step(*args, **kwargs):
        if next(count) != number:
            return step(*args, **kwargs)
        torch.cuda.synchronize()
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            loss = step(*args, **kwargs)
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
        spans = sorted(
            (e.time_range.start, e.time_range.end, e.name)
            for e in seen.events()
            if e.device_type == DeviceType.CUDA
        )
        kinds, busy_s = rows.by_kind(spans, KINDS)
        found["gpu_s"] = kinds | {"none": (spans[-1][1] - spans[0][0]) / 1e6 - busy_s, "in all": wall_s}
        return loss

    Trainer.training_step = training_step
    return found


def replicate() -> None:
    """Makes the program, which is made for ZeRO-3, run with DeepSpeed's stage 0."""
    import deepspeed.runtime.engine
    import torch

    from lora_sft import adapter, watch

    # DeepSpeed updates one flat tensor for the optimizers that it takes for fused, else hundreds one by one.
    deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
    scale_the_loss(deepspeed.runtime.engine.DeepSpeedEngine)
    watch.let_host_run_ahead = lambda engine: None
    watch.ForgetForwardOnly.on_train_begin = lambda *_, **__: None
    # The check writes into rank 0's adapter and leaves it to ZeRO to tell the others.
    adapter.check = lambda *_: "not checked: the weights are not partitioned"


def scale_the_loss(engine_class: type) -> None:
    """DeepSpeed 0.19.8 unscales fp16 gradients without ZeRO, too, but scales the loss for its ZeRO optimizers only."""
    backward = engine_class.backward

    @functools.wraps(backward)
    def scaled(engine, loss, *args, **kwargs):
        scaler = getattr(engine.optimizer, "loss_scale_config", None)
        return backward(engine, loss * scaler.cur_scale if scaler else loss, *args, **kwargs)

    engine_class.backward = scaled


def columns(row: Row, out: Path, warm_up: int) -> dict:
    """The columns of a finished row, from the program's own files. The prediction is of ZeRO-3."""
    from lora_sft.report import read_metrics

    summary, config = (json.loads((out / file).read_text()) for file in (run_folder.SUMMARY, run_folder.CONFIG))
    plan, arguments, steps = config["plan"], config["arguments"], read_metrics(out)
    observed = out.with_name(OBSERVED)
    step_s = statistics.median(step["step_time_s"] for step in steps[warm_up:])
    positions = arguments["tokens_per_micro_batch"] * arguments["gradient_accumulation_steps"] / step_s
    documents = plan["train"]
    # Of all the data: few steps at one document a row would see long or short ones by chance.
    real_share = documents["real_tokens"] / (documents["packed_rows"] * arguments["max_seq_len"])
    predicted = {name: plan[name] for name in ("predicted_peak_gib", "predicted_parts_gib")}
    adapter = (out / "adapter_model.safetensors").read_bytes()
    return {
        "real_tokens_per_s_per_gpu": positions * real_share,
        "real_share": real_share,
        "step_s": step_s,
        "step_times_s": [step["step_time_s"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
        "micro_batches_per_step": arguments["gradient_accumulation_steps"],
        "zero": config["resolved_zero_config"]["zero_optimization"],
        **{
            name: summary[name]
            for name in ("skipped_updates", "peak_reserved_gib", "mfu_4n", "hfu_6n", "eval_loss_after")
        },
        **(dict.fromkeys(predicted) if row.zero == REPLICATED else predicted),
        **(json.loads(observed.read_text()) if observed.exists() else {}),
        **{
            name: plan[name]
            for name in ("dtype", "world_size", "gpu_limit_gib", "gpu_name", "kernels", "kept_layers")
        },
    }


# --- one command --------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, output: Path) -> dict:
    """Runs the rows, `ours` first. Raises UserError for what is wrong before the first one."""
    names = list(dict.fromkeys(["ours", *given.rows]))
    if given.micro_batches < 1:
        raise UserError(f"--micro_batches {given.micro_batches}: must be at least 1")
    for name in names:
        row_named(name)
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Once, and in the program's order: rows are forked from this process, which touches no GPU.
    program.set_up_environment(Arguments(device=given.device))
    launch.import_shared_libraries()
    built = not given.model_path and rows.in_child(lambda: build(given.device), FOLDER / "model.log")["folder"]
    model = Path(given.model_path or built).absolute()
    check_model_folder(model)
    data_path = Path(given.data_path or FOLDER / "documents.jsonl").absolute()
    if not given.data_path:
        documents = draw_documents(model, DOCUMENTS + HELD_OUT, given.seed)
        data_path.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    try:
        sha256 = hashlib.sha256(data_path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--data_path {data_path}: cannot be read ({error.strerror})") from error
    about = {
        "workload": {"drawn": not given.data_path, "file_sha256": sha256, "seed": given.seed},
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "micro_batches": given.micro_batches,
        "versions": versions(PACKAGES),
        "commit": commit(),
    }
    run = functools.partial(measure_row, given=given, model=model, data_path=data_path)
    return rows.measure(names, run, ratios, about, output)


def build(device: str) -> dict:
    """The model's folder. On a GPU, so in a process of its own."""
    if device == "cuda":
        return {"folder": str(shapes.build("llama2-7b", FOLDER / "llama2-7b-shape"))}
    import tiny_model

    return {"folder": str(tiny_model.build_llama(FOLDER / "tiny_llama"))}


def ratios(result: dict) -> dict:
    """Ratios of real tokens/s per GPU, (predicted - measured) / measured of the peaks, and what they were measured on."""
    done = [row for row in result["rows"] if "error" not in row]
    rates = {row["row"]: row["real_tokens_per_s_per_gpu"] for row in done}
    peaks = {row["row"]: (row.get("predicted_peak_gib"), row["peak_reserved_gib"]) for row in done}
    to_ours = {name: rate / rates["ours"] for name, rate in rates.items()} if "ours" in rates else {}
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= rates.keys()}
    return {
        "ratios": to_ours | {name: rates[above] / rates[below] for name, (above, below) in pairs.items()},
        "prediction_errors": {
            name: p / measured - 1 for name, (p, measured) in peaks.items() if p and measured
        },
        "hardware": done[0]["gpu_name"] or f"{len(os.sched_getaffinity(0))} CPU cores" if done else None,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help="see above")
    parser.add_argument("--data_path", help="JSON or JSONL file of rows with prompt and chosen")
    parser.add_argument("--trl", help="command of a Python that has TRL")
    parser.add_argument("--micro_batches", type=int, default=8, help="measured in each row")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn documents")
    parser.add_argument(
        "--model_path", help="folder (default: Llama-2-7B's shape; on the CPU the rehearsal's model)"
    )
    sys.exit(rows.run(measure, parser, RESULT, FOLDER))
