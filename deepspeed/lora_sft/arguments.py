"""Command line -> `Arguments`. Flags carry Hugging Face's names; a starter flag that changed is refused by name."""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workbench import UserError
from workbench.flags import flag, path_or_hub_id, read_flags
from workbench.models import real_model
from workbench.rows import FILES, read_text

FOLDER = Path(__file__).resolve().parent.parent  # deepspeed/
REHEARSAL = FOLDER.parent / "rehearsal"
TINY_MODEL = "tiny_llama"  # folder in --output_dir that a rehearsal builds its model in

# Starter flag -> what to use now.
CHANGED_FLAGS = {
    "lora_dim": "--lora_r",
    "lora_module_name": "--lora_target_modules",
    "lora_learning_rate": "--learning_rate (it is LoRA's: nothing else trains)",
    "only_optimize_lora": "nothing: only LoRA trains",
    "per_device_train_batch_size": "--tokens_per_micro_batch",
    "per_device_eval_batch_size": "--tokens_per_micro_batch",
    "num_warmup_steps": "--warmup_ratio",
    "data_split": "--max_train_rows and --max_eval_rows",
    "sft_only_data_path": "--data_path",
    "data_output_path": "nothing: data is tokenised at start, in seconds",
    "zero_stage": "deepspeed/zero3.json (or --deepspeed FILE)",
    "deepspeed_config": "--deepspeed FILE",
    "offload": "deepspeed/zero3.json: offload_param",
    "dropout": "--lora_dropout",
    "compute_fp32_loss": "nothing: the loss is always computed in fp32",
    "enable_tensorboard": "--report_to tensorboard",
    "tensorboard_path": "--report_to tensorboard (written to --output_dir)",
    "print_loss": "nothing: every step's loss is printed and in metrics.jsonl",
    "add_eot_token": "nothing: every answer ends in EOS",
    "local_rank": "nothing: the launcher starts one rank per visible GPU",
    "eval_interval": "nothing: evaluation is before and after",
    "eval_iters": "--max_eval_rows",
}

# Fused steps of a decoder layer (lora_sft/kernels.py); where Triton runs, Liger's are rms_norm, rope and swiglu.
KERNELS = ("lora", "varlen", "rms_norm", "rope", "swiglu")

# Values of the rehearsal where it must differ from the real job: 2 CPU ranks, and a model that they can train in a minute.
REHEARSAL_DEFAULTS = {"device": "cpu", "data_path": str(REHEARSAL / "preferences.jsonl"), "save_steps": 10}
OF_REAL_MODEL = {
    "max_seq_len": 160,
    "tokens_per_micro_batch": 160,
    "gradient_checkpointing": False,
    "lora_dropout": 0.0,
    "max_steps": 10,
    "learning_rate": 4e-3,
    "max_eval_rows": 4,
}
OF_TINY_MODEL = {
    "max_seq_len": 256,
    "tokens_per_micro_batch": 512,
    "num_train_epochs": 2.0,
    "learning_rate": 1e-2,
    "max_eval_rows": 40,
}


@dataclass(frozen=True)
class Arguments:
    """One run. Defaults are the assignment's: Llama-2-7B, rm-static, two 16 GB GPUs."""

    model_name_or_path: str = flag("meta-llama/Llama-2-7b-hf", "hub id or local folder of the base model")
    data_path: str = flag(
        "Dahoas/rm-static", "hub data set, or a JSON/JSONL file of rows with 'prompt' and 'chosen'"
    )
    output_dir: str = flag(
        str(FOLDER / "output_llama2_7b_lora"),
        "adapter, metrics, plots and checkpoints; the same command resumes from there",
    )
    deepspeed: str = flag(str(FOLDER / "zero3.json"), "ZeRO configuration (JSON) without batch sizes")
    max_train_rows: int = flag(8000, "training rows after a seeded shuffle; -1: all")
    max_eval_rows: int = flag(500, "evaluation rows; -1: all")
    # Problem 1a: choose LoRA's rank, scale (alpha / r), dropout and the modules that get adapters, and what a
    # forward pass may hold: tokens of a micro-batch (a multiple of --max_seq_len), and whether activations are
    # recomputed. The test of 1a, 1b and 1c predicts the peak of two 16 GB GPUs, part by part (on the cluster
    # `--preflight_only` does).
    lora_r: int = flag(16, "rank of the adapters")
    lora_alpha: int = flag(32, "adapter output is scaled by alpha / r")
    lora_dropout: float = flag(0.05, "on the adapter's input")
    lora_target_modules: str = flag(
        "all-linear", "'all-linear' or names separated by commas, e.g. q_proj,v_proj"
    )
    tokens_per_micro_batch: int = flag(8192, "per GPU and forward pass; a multiple of --max_seq_len")
    gradient_checkpointing: bool = flag(
        True, "recompute activations in backward: less memory, a third more compute"
    )
    # End of problem 1a
    kept_layers: int = flag(
        -1,
        "last decoder layers that checkpointing leaves out, so nothing is computed again; -1: as many as fit the GPU",
    )
    max_seq_len: int = flag(1024, "tokens of a packed row; a longer prompt is cut from the left")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    num_train_epochs: float = flag(1.0, "passes over the training rows")
    max_steps: int = flag(-1, "stop after so many optimizer steps; -1: by epochs")
    learning_rate: float = flag(2e-4, "peak learning rate of the adapters")
    warmup_ratio: float = flag(0.03, "share of steps with rising learning rate")
    lr_scheduler_type: str = flag(
        "cosine", "a transformers schedule: cosine, linear, constant_with_warmup, ..."
    )
    weight_decay: float = flag(0.0, "AdamW's")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    dtype: str = flag(
        "auto", "auto, fp16, bf16 or fp32; auto: bf16 from compute capability 8.0, fp16 below, fp32 on CPU"
    )
    kernels: str = flag(
        "auto", f"fused steps, joined by '+': {', '.join(KERNELS)}; none, or auto: all that the GPUs can run"
    )
    device: str = flag("cuda", "cuda or cpu; the CPU is never chosen silently")
    num_gpus: int = flag(0, "ranks to start on a node; 0: every GPU in CUDA_VISIBLE_DEVICES (2 on the CPU)")
    seed: int = flag(42, "shuffle, adapter initialisation, dropout")
    save_steps: int = flag(50, "optimizer steps between checkpoints")
    save_total_limit: int = flag(2, "complete checkpoints to keep")
    ddp_timeout_s: int = flag(30, "how long a rank waits for the others, or three steps: a node may be gone")
    report_to: str = flag("none", "none, tensorboard, wandb, ... (as in transformers)")
    rehearse: bool = flag(
        False, "small model and shipped data on 2 CPU ranks, everything else as in the real job"
    )
    overwrite: bool = flag(False, "start anew in an --output_dir that holds a run")
    preflight_only: bool = flag(False, "print the PASS/FAIL table and stop; needs no GPU")
    download_only: bool = flag(False, "fetch model and data into HF_HOME and stop (for login nodes)")

    @property
    def rows_per_micro_batch(self) -> int:
        return self.tokens_per_micro_batch // self.max_seq_len

    @property
    def lora_targets(self) -> str | list[str]:
        """As LoraConfig takes it."""
        if self.lora_target_modules == "all-linear":
            return self.lora_target_modules
        return [name.strip() for name in self.lora_target_modules.split(",")]

    def identity(self, zero_config: dict) -> dict:
        """What makes two commands the same run: everything that changes the numbers."""
        other = {"output_dir", "deepspeed", "save_steps", "save_total_limit", "ddp_timeout_s", "report_to"}
        other |= {"preflight_only", "download_only", "num_gpus", "overwrite"}
        zero_sha256 = hashlib.sha256(json.dumps(zero_config, sort_keys=True).encode()).hexdigest()
        same = {key: value for key, value in asdict(self).items() if key not in other}
        return same | {"deepspeed": f"sha256 {zero_sha256[:12]}"}


def parse(argv: list[str]) -> Arguments:
    """Reads flags. Paths are relative to the caller's folder. Raises UserError with one line; -h exits 0."""
    description = "Fine-tunes Llama-2-7B with LoRA under DeepSpeed ZeRO-3."
    program = "run_llama2_7b_lora.sh"
    given = read_flags(argv, Arguments, CHANGED_FLAGS, prog=program, description=description)
    named = "model_name_or_path" in given
    real = None if named else real_model()
    if given.get("rehearse"):
        output_dir = str(REHEARSAL / "runs" / time.strftime("%Y%m%d-%H%M%S"))
        of_model = OF_REAL_MODEL | {"model_name_or_path": str(real)} if real else OF_TINY_MODEL
        given = REHEARSAL_DEFAULTS | of_model | {"output_dir": output_dir} | given
    args = Arguments(**given)
    args = replace(
        args,
        output_dir=str(Path(args.output_dir).absolute()),
        deepspeed=str(Path(args.deepspeed).absolute()),
        model_name_or_path=path_or_hub_id("model_name_or_path", args.model_name_or_path),
        data_path=path_or_hub_id("data_path", args.data_path, FILES),
    )
    _check_ranges(args)
    if args.rehearse and not named and not real:
        args = replace(args, model_name_or_path=str(Path(args.output_dir) / TINY_MODEL))
    return args


def _check_ranges(args: Arguments) -> None:
    for name in ("max_seq_len", "tokens_per_micro_batch", "gradient_accumulation_steps", "lora_r", "lora_alpha",
                 "save_steps", "save_total_limit", "ddp_timeout_s"):  # fmt: skip
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.max_seq_len < 16:
        raise UserError(f"--max_seq_len {args.max_seq_len}: at least 16 tokens are needed for a document")
    if args.tokens_per_micro_batch % args.max_seq_len:
        raise UserError(
            f"--tokens_per_micro_batch {args.tokens_per_micro_batch}: must be a multiple of --max_seq_len "
            f"{args.max_seq_len}"
        )
    if args.kept_layers < -1:
        raise UserError(f"--kept_layers {args.kept_layers}: must be -1, 0 or more")
    if args.num_train_epochs <= 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: must be above 0")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "num_gpus"):
        value = getattr(args, name)
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value}: must not be negative")
    if not 0 <= args.lora_dropout < 1 or not 0 <= args.warmup_ratio < 1:
        raise UserError("--lora_dropout and --warmup_ratio: must be in [0, 1)")
    for name, choices in (("dtype", ("auto", "fp16", "bf16", "fp32")), ("device", ("cuda", "cpu"))):
        if getattr(args, name) not in choices:
            *others, last = choices
            raise UserError(f"--{name} {getattr(args, name)}: choose {', '.join(others)} or {last}")
    unknown = sorted(set(args.kernels.split("+")) - set(KERNELS))
    if unknown and args.kernels not in ("auto", "none"):
        raise UserError(
            f"--kernels {args.kernels}: {unknown[0]!r} is none of {', '.join(KERNELS)} (joined by '+')"
        )


# --- the ZeRO configuration ---------------------------------------------------------------------------

# Trainer fills these from the flags; in the file they could only contradict them.
FILLED_BY_TRAINER = {
    "train_batch_size": "--tokens_per_micro_batch",
    "train_micro_batch_size_per_gpu": "--tokens_per_micro_batch",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "optimizer": "--learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type",
    "gradient_clipping": "--max_grad_norm",
}


def read_zero_config(path: str) -> dict:
    """The ZeRO JSON as a dict, with what Trainer fills in set to "auto". Raises UserError."""
    text = read_text(Path(path), "--deepspeed")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--deepspeed {path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path}: expected a JSON object")
    for key, name in FILLED_BY_TRAINER.items():
        if key in config:
            raise UserError(f"--deepspeed {path}: remove '{key}'; it is set by {name}")
    for section in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"--deepspeed {path}: {section} must be a JSON object")
        for key, value in config.get(section, {}).items():
            line = text[: text.find(json.dumps(key))].count("\n") + 1
            _check_zero_value(f"--deepspeed {path}, line {line}", key, value)
    if config.get("zero_optimization", {}).get("stage") != 3:
        raise UserError(f"--deepspeed {path}: zero_optimization.stage must be 3 (the base model is sharded)")
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return config | dict.fromkeys((*batch, "gradient_clipping"), "auto")


def _check_zero_value(where: str, key: str, value: object) -> None:
    if isinstance(value, str) and value.startswith("TODO"):
        problem, _, hint = value.partition(": ")
        raise UserError(f"{problem} ({where}): {key}: {hint}")
    if isinstance(value, str) and value != "auto":
        raise UserError(f"{where}: {key} must not be text, but is {value!r}")
    elements = key.endswith(("_size", "_threshold", "_parameters", "_distance")) and value != "auto"
    if elements and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
        raise UserError(f"{where}: {key} must be a number of elements, but is {value!r}")
    if key == "overlap_comm" and not isinstance(value, bool):
        raise UserError(f"{where}: overlap_comm must be true or false, but is {json.dumps(value)}")
    if key == "leaf_module":
        names = value.get("classes") if isinstance(value, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f'{where}: leaf_module must be {{"classes": [names of classes]}}')
