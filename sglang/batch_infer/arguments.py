"""Command line -> `Arguments`. Sampling flags carry SGLang's names."""

import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workbench import UserError
from workbench.flags import flag, path_or_hub_id, read_flags
from workbench.models import read_object, real_model
from workbench.rows import FILES, text

FOLDER = Path(__file__).resolve().parent.parent  # sglang/
REHEARSAL = FOLDER.parent / "rehearsal"
PROGRAM = "python sglang/run_sglang.py"
DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"
DEFAULT_PROMPTS = "tatsu-lab/alpaca_eval"
TINY_MODEL = "tiny_qwen2"  # folder beside the outputs that a rehearsal builds its model in
# Compute capabilities of what a job may get.
GPUS = {"a100": "8.0", "a10": "8.6", "l40s": "8.9", "h100": "9.0", "h200": "9.0", "b200": "10.0"}
POLICIES = ("planned", "fcfs", "lpm", "dfs-weight")

REHEARSAL_DEFAULTS = {
    "device": "cpu",
    "prompts": str(REHEARSAL / "instructions.json"),
    "max_new_tokens": 64,
}

# Engine arguments that say how much runs at once, not what is computed: a resumed run may change them.
RESOURCES_ONLY = {
    *("mem_fraction_static", "max_running_requests", "max_total_tokens", "schedule_conservativeness"),
    *("schedule_policy", "cuda_graph_max_bs_decode", "cuda_graph_bs_decode", "dp_size", "log_level"),
    *("watchdog_timeout", "load_balance_method", "cuda_graph_backend_prefill"),
    *("nnodes", "node_rank", "dist_init_addr"),
}

# What --jump_forward was built and tested with, of what --engine_args can change.
WITH_JUMP_FORWARD = {
    "disable_overlap_schedule": (True,),
    "grammar_backend": ("xgrammar", "llguidance"),
    "page_size": (1,),
    "pp_size": (1,),
    "speculative_algorithm": (None,),
    "disaggregation_mode": ("null",),
    "enable_dp_attention": (False,),
    "enable_hisparse": (False,),
    "dllm_algorithm": (None,),
    "reasoning_parser": (None,),
    "enable_hierarchical_cache": (False,),
}


# What a record may have of its own: flags, and what only SGLang has a name for.
NUMBER, WHOLE = ((int, float), "a number"), (int, "a whole number")
OWN_FLAGS = {"temperature": NUMBER, "top_p": NUMBER, "max_new_tokens": WHOLE, "seed": WHOLE}
PENALTIES = dict.fromkeys(("frequency_penalty", "presence_penalty"), NUMBER)
OWN_PARAMS = PENALTIES | {"stop": ((str, list), "text or a list of texts")}  # names as sglang.Engine takes them
OWN = OWN_FLAGS | OWN_PARAMS


@dataclass(frozen=True)
class Arguments:
    """One run. Defaults are the assignment's: Qwen2.5-7B-Instruct on the 805 AlpacaEval instructions."""

    model_path: str = flag(
        DEFAULT_MODEL, "hub id or folder of the model (default with --lora_path: the adapter's base)"
    )
    lora_path: str = flag("", "PEFT adapter folder; its tokenizer and chat template are used")
    prompts: str = flag(
        DEFAULT_PROMPTS,
        "hub data set with alpaca_eval.json, or a file: JSON array, JSONL, OpenAI batch lines, or .txt with a prompt a line",
    )
    output_file: str = flag(
        str(FOLDER / "outputs.jsonl"),
        "every 10th answer; outputs_all.json, summary.json and lengths.png are written beside it",
    )
    temperature: float = flag(0.7, "0 is greedy")
    top_p: float = flag(0.95, "nucleus sampling")
    top_k: int = flag(-1, "-1: off")
    max_new_tokens: int = flag(8192, "cap of an answer, lowered where the context ends")
    seed: int = flag(42, "every record's own seed is derived from it, the record's index and its prompt")
    raw: bool = flag(False, "no chat template: the prompt's text as it is")
    fast: bool = flag(False, "without SGLang's deterministic mode: faster, two runs differ")
    policy: str = flag(
        "planned",
        f"order of the records, one of {', '.join(POLICIES)}; planned: depth-first by shared prefix, each prefix "
        "computed once; the others are SGLang's own",
    )
    jump_forward: bool = flag(
        False, "text that a regex or schema forces is computed in one pass (no overlap scheduler)"
    )
    batch_size: int = flag(0, "records in flight at once (0: all of them)")
    max_running_requests: int = flag(0, "requests the scheduler runs at once (0: chosen from the GPU)")
    tp_size: int = flag(
        0, "GPUs that share one copy of the model (0: one; with --fast as link and records suggest)"
    )
    dp_size: int = flag(
        0, "copies of the model (0: as many as the visible GPUs, or at most 4 CPU cores, allow)"
    )
    engine_args: str = flag("{}", "JSON object of sglang.Engine arguments that override what is chosen here")
    shard: str = flag(
        "1/1", "K/N: answers the K-th of N parts, for job arrays; the tasks of srun take theirs from Slurm"
    )
    device: str = flag("cuda", "cuda or cpu; the CPU is never chosen silently")
    rehearse: bool = flag(
        False, "small model and shipped instructions on the CPU, everything else as in the real job"
    )
    overwrite: bool = flag(False, "start anew in a folder that holds a run")
    preflight_only: bool = flag(False, "print the PASS/FAIL table and stop")
    download_only: bool = flag(False, "fetch model and prompts into HF_HOME and stop (for login nodes)")
    gpu: str = flag("", f"with --download_only: build the job's kernels, too, for its {', '.join(GPUS)}")

    @property
    def folder(self) -> Path:
        return Path(self.output_file).parent

    @property
    def reproducible(self) -> bool:
        """Whether the profile promises bytes; on the CPU it always does."""
        return not self.fast or self.device == "cpu"

    @property
    def only_looking(self) -> bool:
        return self.preflight_only or self.download_only

    @property
    def place(self) -> tuple[int, int]:
        """(number of this shard, from 1; how many there are)"""
        number, shards = self.shard.split("/")
        return int(number), int(shards)

    @property
    def writer(self) -> str:
        """Distinguishes shards, or the nodes of an engine, that share the output folder; "" of what has it alone."""
        if self.nodes[1] > 1:
            return f".node{self.nodes[0]}"
        return f".{self.place[0]}" if self.place[1] > 1 else ""

    @property
    def job(self) -> str | None:
        """The Slurm job that other shards, or an earlier start, may have begun: --overwrite keeps what it wrote."""
        return slurm_job() if self.place[1] > 1 or "SLURM_RESTART_COUNT" in os.environ else None

    @property
    def nodes(self) -> tuple[int, int]:
        """(rank of this node, how many there are) of an engine that is spread over nodes"""
        own = self.own_engine_args
        return own.get("node_rank", 0), own.get("nnodes", 1)

    @property
    def own_engine_args(self) -> dict:
        return json.loads(self.engine_args)

    def identity(self) -> dict:
        """What makes two commands the same run: every flag that changes the answers."""
        other = {"output_file", "policy", "batch_size", "max_running_requests", "dp_size", "overwrite"}
        other |= {"preflight_only", "download_only", "gpu", "rehearse", "shard"}
        same = {name: value for name, value in asdict(self).items() if name not in other}
        changing = {name: value for name, value in self.own_engine_args.items() if name not in RESOURCES_ONLY}
        same["tp_size"] = self.tp_size or 1
        same["engine_args"] = json.dumps(changing, sort_keys=True)
        if self.rehearse and Path(self.model_path).parent == self.folder:
            same["model_path"] = TINY_MODEL  # built in each output folder from the same seed
        return same


def slurm_job() -> str | None:
    """The same for all tasks of an array or a step, and when they are requeued; another for the next step of a job."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return job and f"{job}.{os.environ.get('SLURM_STEP_ID', 'batch')}"


def slurm_shard() -> str:
    """Of a task that srun started beside others."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    return f"{int(os.environ['SLURM_PROCID']) + 1}/{tasks}" if tasks > 1 else "1/1"


def parse(argv: list[str]) -> Arguments:
    """Reads flags. Paths are relative to the caller's folder. Raises UserError with one line; -h exits 0."""
    given = read_flags(
        argv,
        Arguments,
        prog="run_sglang.py",
        description="Answers a list of prompts with the SGLang Runtime, every record in flight together.",
        epilog="Arguments of sglang.Engine itself go into --engine_args.",
    )
    if given.get("rehearse"):
        stamp = slurm_job() or time.strftime("%Y%m%d-%H%M%S")
        given = REHEARSAL_DEFAULTS | given
        given.setdefault("output_file", str(REHEARSAL / "runs" / stamp / "outputs.jsonl"))
    args = _with_paths(Arguments(**given))
    check_ranges(args)
    own = _checked_engine_args(args)
    if own.get("nnodes", 1) > 1:  # the tasks of srun are the nodes of one engine
        own.setdefault("node_rank", int(os.environ.get("SLURM_PROCID", 0)))
    elif "shard" not in given:
        args = replace(args, shard=slurm_shard())
    args = replace(args, engine_args=json.dumps(own, sort_keys=True))
    if args.overwrite and (args.nodes[1] > 1 or (args.place[1] > 1 and not slurm_job())):
        raise UserError(
            "--overwrite: one shard outside a Slurm job, or one node of an engine, would remove what the others write; "
            "remove the old files yourself, or name another --output_file"
        )
    if "model_path" in given:
        return args
    if args.lora_path:
        return replace(args, model_path=_base_of(Path(args.lora_path)))
    if args.rehearse:
        return replace(args, model_path=str(real_model() or args.folder / TINY_MODEL))
    return args


def _with_paths(args: Arguments) -> Arguments:
    output = Path(args.output_file).absolute()
    if output.is_dir():
        raise UserError(f"--output_file {output}: is a folder; name a file, such as .../outputs.jsonl")
    if output.name in ("outputs_all.json", "summary.json") or output.name.startswith("outputs.partial."):
        raise UserError(f"--output_file {output}: this name is taken; use outputs.jsonl")
    return replace(
        args,
        output_file=str(output),
        model_path=path_or_hub_id("model_path", args.model_path),
        prompts=path_or_hub_id("prompts", args.prompts, (*FILES, ".txt")),
        lora_path=args.lora_path and path_or_hub_id("lora_path", args.lora_path, ("",)),
    )


def check_ranges(args: Arguments) -> None:
    """Raises UserError with the flag that is out of range."""
    least = {"temperature": 0, "max_new_tokens": 1, "batch_size": 0, "max_running_requests": 0}
    for name, limit in (least | {"tp_size": 0, "dp_size": 0, "seed": 0}).items():
        value = getattr(args, name)
        if not (value >= limit and math.isfinite(value)):
            raise UserError(f"--{name} {value}: must be at least {limit}")
    place = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not place or not 1 <= int(place[1]) <= int(place[2]):
        raise UserError(f"--shard {args.shard}: must be K/N with K from 1 to N, such as 2/8")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: must be below 2**32")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: must be in (0, 1]")
    if args.top_k < 1 and args.top_k != -1:
        raise UserError(f"--top_k {args.top_k}: must be -1 (off) or at least 1")
    if args.policy not in POLICIES:
        raise UserError(f"--policy {args.policy}: choose {', '.join(POLICIES)}")
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: choose cuda or cpu")
    if args.gpu and args.gpu not in GPUS:
        raise UserError(f"--gpu {args.gpu}: choose {', '.join(GPUS)}")
    if args.gpu and not args.download_only:
        raise UserError("--gpu goes with --download_only; a run builds for the GPU that it finds")


def own_params(given: object) -> dict:
    """The `sampling_params` of one record, which go before the flags. Raises UserError."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"'sampling_params' must be an object, found {type(given).__name__}")
    own = {name: value for name, value in given.items() if value is not None}
    for name, value in own.items():
        if name not in OWN:
            raise UserError(f"'sampling_params' has no {name[:40]!r} for one record; it has {', '.join(OWN)}")
        kind, what = OWN[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"'{name}' must be {what}, found {type(value).__name__}")
        most = 2 if name in PENALTIES else 2**64  # SGLang's own limit
        if name != "stop" and not abs(value) <= most:
            raise UserError(f"'{name}' must be between -{most} and {most}")
    for stop in [own["stop"]] if isinstance(own.get("stop"), str) else own.get("stop", ()):
        if not text({"stop": stop}, "stop"):
            raise UserError("'stop' is empty; leave it out")
    try:
        check_ranges(replace(Arguments(), **{n: v for n, v in own.items() if n in OWN_FLAGS and n != "seed"}))
    except UserError as error:
        raise UserError(str(error).removeprefix("--")) from error
    return own


def _checked_engine_args(args: Arguments) -> dict:
    try:
        own = json.loads(args.engine_args)
    except json.JSONDecodeError as error:
        raise UserError(f"--engine_args, column {error.colno}: not valid JSON ({error.msg})") from error
    if not isinstance(own, dict):
        raise UserError('--engine_args: expected a JSON object, such as \'{"schedule_policy": "lpm"}\'')
    for name in ("context_length", "dp_size", "tp_size", "nnodes"):
        value = own.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"--engine_args: {name} must be a whole number of at least 1")
    for name, values in WITH_JUMP_FORWARD.items() if args.jump_forward else ():
        if own.get(name, values[0]) not in values:
            raise UserError(
                f"--jump_forward works with {name} {' or '.join(map(repr, values))}, not {own[name]!r}: "
                "change --engine_args or leave the flag out"
            )
    return own


def _base_of(adapter: Path) -> str:
    try:
        base = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    except UserError as error:
        raise UserError(
            f"--lora_path {adapter}: no adapter_config.json that names the base ({error})"
        ) from error
    if not isinstance(base, str):
        raise UserError(f"--lora_path {adapter}: adapter_config.json names no base; name it with --model_path")
    if base.startswith("/") and not Path(base).is_dir():
        raise UserError(f"--lora_path {adapter}: its base {base} is not there; name the base with --model_path")
    return base
