"""Everything that can be known before the model loads: a PASS/FAIL table, each FAIL with its cure.

`run` also makes the plan that every rank follows (`plan.json`) and tokenises the data (`train.npz`,
`eval.npz`). It runs in a child process, because it may initialise CUDA and start tokeniser threads.
"""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from workbench import UserError
from workbench.files import check_room, write_json
from workbench.machine import Table, memory_limit_gib, versions
from workbench.models import (
    check_config,
    explain_hub_error,
    find_model,
    in_one_line,
    load_tokenizer,
    read_object,
    weights_fingerprint,
)

from . import data, memory
from .arguments import Arguments
from .machine import (
    Gpus,
    Place,
    look_at_gpus,
    look_at_host_memory,
    look_at_links,
    look_at_nodes,
)

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "tokenizers", "numpy")
PROGRAM = "bash deepspeed/run_llama2_7b_lora.sh"
PLAN = "plan.json"


@dataclass(frozen=True)
class FoundModel:
    model_folder: str
    model_revision: str | None  # on the hub
    weights_id: str  # the revision, or a hash of a local folder's weights


@dataclass(frozen=True)
class Kernels:
    kernels: tuple[str, ...]  # of arguments.KERNELS


@dataclass(frozen=True)
class DataHashes:
    """Of the rows that are trained and evaluated on, in this order."""

    data_sha256: str
    data_revision: str | None  # on the hub


@dataclass(frozen=True)
class Packing:
    """`Packed.report()` of both splits; `answer_share` of a micro-batch's positions have logits."""

    train: dict
    eval: dict
    answer_share: float


@dataclass(frozen=True)
class Sizes:
    """What is trained, how it is partitioned, and what that takes on a GPU."""

    base_parameters: int
    matmul_parameters: int
    lora_parameters: int
    zero_config: dict
    kept_layers: int  # keep their activations, the last ones
    recomputed_share: float  # of the layers
    predicted_parts_gib: dict[str, float]
    predicted_peak_gib: float


@dataclass(frozen=True)
class Plan(Gpus, FoundModel, Kernels, DataHashes, Packing, Sizes):
    """All that the ranks need to know, and run_config.json keeps."""

    versions: dict[str, str]

    @classmethod
    def load(cls, work_dir: Path) -> "Plan":
        return cls(**json.loads((work_dir / PLAN).read_text()))


def run(
    args: Arguments, zero_config: dict, work_dir: Path, others: Callable[[], list[dict]] | None = None
) -> list[Place]:
    """Prints the table; writes the plan and the packed rows. `others` gives what each other node says of itself
    (`machine.look_at_node`). Returns where the ranks will be. Raises UserError with the first failure."""
    table, plan = Table(), None
    print("preflight")
    installed = table.find("packages", look_at_packages)
    table.check("flags", lambda: look_at_names(args))
    # Login nodes, where one downloads, have no GPU.
    gpus = None if args.download_only else table.find("GPUs", lambda: look_at_gpus(args))
    if gpus:
        table.check("GPU link", lambda: look_at_links(gpus))
    places = [Place("", gpus.world_size, *memory_limit_gib())] if gpus else []
    if gpus and others:
        gpus, places = table.find("nodes", lambda: look_at_nodes(args, gpus, others())) or (None, [])
    if gpus:
        table.row("PASS", "precision", f"{gpus.dtype}: {gpus.dtype_reason}")
    model = table.find("model", lambda: look_at_model(args))
    found = table.find("data", lambda: look_at_data(args))
    chosen = packing = sizes = None
    if gpus and model:
        chosen = table.find("kernels", lambda: look_at_kernels(args, zero_config, model, gpus))
    if chosen and found:
        to_train, held_out, hashes = found
        packing = table.find("tokens", lambda: pack_rows(args, model, gpus, to_train, held_out, work_dir))
    if packing:
        sizes = table.find(
            "LoRA", lambda: look_at_lora(args, zero_config, model, gpus, packing.answer_share, chosen)
        )
    elif not args.download_only:
        table.row("SKIP", "the rest", "needs what failed above")
    if sizes:
        table.check("GPU memory", lambda: look_at_gpu_memory(args, gpus, sizes))
        table.check("host memory", lambda: look_at_host_memory(sizes.base_parameters, gpus.dtype, places))
        table.check("disk", lambda: look_at_disk(args, sizes.lora_parameters))
    if table.first_failure:
        raise UserError(table.first_failure)
    if sizes:
        parts = (gpus, model, chosen, hashes, packing, sizes)
        plan = Plan(**{name: value for part in parts for name, value in vars(part).items()}, versions=installed)
        write_json(work_dir / PLAN, asdict(plan))
    return places


def look_at_packages() -> tuple[dict[str, str], str]:
    found = versions(PACKAGES)
    return found, ", ".join(f"{name} {version}" for name, version in found.items() if name != "numpy")


def look_at_names(args: Arguments) -> None:
    """Names that only a library can judge."""
    from transformers import SchedulerType
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    schedules = [schedule.value for schedule in SchedulerType]
    if args.lr_scheduler_type not in schedules:
        raise UserError(f"--lr_scheduler_type {args.lr_scheduler_type}: choose {', '.join(schedules)}")
    reporters = ("none", "all", *INTEGRATION_TO_CALLBACK)
    if args.report_to not in reporters:
        raise UserError(f"--report_to {args.report_to}: choose {', '.join(reporters)}")
    if args.report_to not in ("none", "all", *get_available_reporting_integrations()):
        raise UserError(
            f"--report_to {args.report_to}: it is not installed here; install it, or leave the flag out"
        )


# --- model and data -----------------------------------------------------------------------------------


def look_at_model(args: Arguments) -> tuple[FoundModel, str]:
    """Finds or fetches the model."""
    folder, revision, found = find_model(args.model_name_or_path, "--model_name_or_path", PROGRAM)
    check_config(folder)
    return FoundModel(str(folder), revision, revision or weights_fingerprint(folder)), found


def look_at_kernels(args: Arguments, zero_config: dict, model: FoundModel, gpus: Gpus) -> tuple[Kernels, str]:
    from . import kernels

    chosen, why = kernels.choose(args, gpus, Path(model.model_folder), zero_config)
    return Kernels(chosen), f"fused: {', '.join(chosen) or 'nothing'} ({why})"


def look_at_data(args: Arguments) -> tuple[tuple[list[dict], list[dict], DataHashes], str]:
    """(rows to train on, rows to evaluate on, which they are)."""
    path = Path(args.data_path)
    if path.exists():
        train, test, revision = data.read_file(path), [], None
    else:
        train, test, revision = fetch_rows(args.data_path)
    to_train, held_out = data.split_rows(train, test, args.max_train_rows, args.max_eval_rows, args.seed)
    hashes = DataHashes(data.rows_sha256(to_train, held_out), revision)
    text = f"{args.data_path}: {len(to_train):,} of {len(train):,} rows to train, {len(held_out):,} to evaluate"
    return (to_train, held_out, hashes), text


def fetch_rows(name: str) -> tuple[list[dict], list[dict], str]:
    """From the hub's cache, else from the hub."""
    for offline in (True, False):
        try:
            return data.read_hub(name, local_files_only=offline)
        except UserError:
            raise
        except Exception as error:  # not in the cache (datasets and the hub each have their own error for it)
            problem = error
    raise UserError(explain_hub_error(name, "dataset", problem, "--data_path", PROGRAM)) from problem


def pack_rows(
    args: Arguments, model: FoundModel, gpus: Gpus, to_train: list[dict], held_out: list[dict], work_dir: Path
) -> tuple[Packing, str]:
    """Rows -> train.npz and eval.npz in `work_dir`, which the ranks read."""
    folder = Path(model.model_folder)
    tokenizer, vocab_size = load_tokenizer(folder), read_object(folder / "config.json")["vocab_size"]
    data.set_up_tokenizer(tokenizer)
    per_forward = gpus.world_size * args.rows_per_micro_batch
    per_step = per_forward * args.gradient_accumulation_steps
    packed = data.prepare(to_train, tokenizer, args.max_seq_len, per_step, "train")
    evaluation = data.prepare(held_out, tokenizer, args.max_seq_len, per_forward, "eval")
    if beyond := sorted(
        int(i) for i in {packed.input_ids.max(), evaluation.input_ids.max()} if i >= vocab_size
    ):
        raise UserError(
            f"--data_path: texts hold {tokenizer.decode(beyond[:1])!r}, which the tokenizer of {folder} gives the id "
            f"{beyond[0]}, and the embedding has {vocab_size} rows; remove it from the texts"
        )
    packed.save(work_dir / "train.npz")
    evaluation.save(work_dir / "eval.npz")
    report = packed.report()
    skipped = sum(value for key, value in report.items() if key.startswith("skipped_"))
    text = (
        f"{report['documents']:,} documents in {report['packed_rows']:,} rows of {args.max_seq_len}: "
        f"{report['padding_share']:.1%} padding, {report['trained_share']:.0%} trained; {report['prompt_cut']} cut, "
        f"{skipped} skipped, {report['space_inserted']} joined by a space"
    )
    if skipped >= report["rows"] / 10:
        text = f"WARN: {text}; {data.why_skipped(to_train, packed.counts, tokenizer, args.max_seq_len)}"
    share = memory.largest_answer_share(packed.answer_tokens, args.max_seq_len, args.rows_per_micro_batch)
    return Packing(report, evaluation.report(), share), text


# --- LoRA, ZeRO, memory, disk -------------------------------------------------------------------------


def look_at_lora(
    args: Arguments, zero_config: dict, model: FoundModel, gpus: Gpus, answer_share: float, chosen: Kernels
) -> tuple[Sizes, str]:
    """Builds the model without memory ("meta"), counts, and predicts the peak."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .model import add_adapters

    try:
        config = AutoConfig.from_pretrained(model.model_folder, trust_remote_code=False)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        positions = config.max_position_embeddings
    except Exception as error:  # each class of models has its own
        raise UserError(
            f"{model.model_folder}/config.json: no language model ({in_one_line(error)})"
        ) from error
    if args.max_seq_len > positions:
        raise UserError(f"--max_seq_len {args.max_seq_len}: the model was trained for {positions} positions")
    base = {name: parameter.numel() for name, parameter in network.named_parameters()}
    matmul = matmul_parameters(network)
    check_targets(args, network)
    check_leaf_classes(args, zero_config, network)
    with torch.device("meta"):
        network = add_adapters(network, args)
    lora_sizes = [p.numel() for name, p in network.named_parameters() if "lora_" in name]
    zero_config = resolve(zero_config, gpus.world_size, sum(base.values()))
    predict = functools.partial(
        memory.predict, config.to_dict(), base, lora_sizes, args, zero_config["zero_optimization"], dtype=gpus.dtype,
        world_size=gpus.world_size, answer_share=answer_share, kernels=chosen.kernels,
    )  # fmt: skip
    layers = config.num_hidden_layers
    kept = min(args.kept_layers, layers) if args.gradient_checkpointing else layers
    if kept < 0:  # on the CPU and where a GPU is only assumed, all are computed again
        room_gib = min(gpus.gpu_limit_gib, gpus.gpu_free_gib - memory.CONTEXT_GIB) if gpus.gpu_free_gib else 0
        kept = memory.layers_to_keep(lambda kept: sum(predict(kept_layers=kept).values()), layers, room_gib)
    parts = predict(kept_layers=kept)
    sizes = Sizes(
        base_parameters=sum(base.values()),
        matmul_parameters=matmul,
        lora_parameters=sum(lora_sizes),
        zero_config=zero_config,
        kept_layers=kept,
        recomputed_share=1 - kept / layers,
        predicted_parts_gib=parts,
        predicted_peak_gib=sum(parts.values()),
    )
    text = f"{len(lora_sizes)} tensors, {sum(lora_sizes) / 1e6:.1f} M of {sum(base.values()) / 1e6:,.1f} M parameters train"
    return sizes, text


def matmul_parameters(network) -> int:
    """Elements of the matrices that a token is multiplied with: a tied embedding counts, as the head."""
    import torch

    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, torch.nn.Embedding)}
    count = sum(p.numel() for p in network.parameters() if p.dim() == 2 and id(p) not in embeddings)
    tied = network.config.tie_word_embeddings
    return count + (network.config.vocab_size * network.config.hidden_size if tied else 0)


def check_targets(args: Arguments, network) -> None:
    """PEFT complains only if none of the names matches."""
    import torch

    linear = {name.split(".")[-1] for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in args.lora_targets if isinstance(args.lora_targets, list) else []:
        if name.split(".")[-1] not in linear:
            has = ", ".join(sorted(linear))
            raise UserError(f"--lora_target_modules {name}: matches no module of the model; it has {has}")


def check_leaf_classes(args: Arguments, zero_config: dict, network) -> None:
    classes = sorted({type(module).__name__ for module in network.modules()})
    for name in zero_config["zero_optimization"].get("leaf_module", {}).get("classes", []):
        if name.split(".")[-1] not in classes:
            layer = next((found for found in classes if found.endswith("DecoderLayer")), "none")
            raise UserError(
                f"--deepspeed {args.deepspeed}: leaf_module class {name} matches no module (the model's is {layer})"
            )


def resolve(zero_config: dict, world_size: int, parameters: int) -> dict:
    """The configuration in force. On one GPU DeepSpeed waits for the stream of the gathers before every layer, though
    there is nothing to gather; that one must not be the stream of the computation. A model that may be whole stays so
    from forward to backward: DeepSpeed counts a module's weights again for each one around it."""
    zero_config = copy.deepcopy(zero_config)
    zero = zero_config["zero_optimization"]
    if world_size == 1:
        zero["overlap_comm"] = True
    if parameters <= zero.get("stage3_max_live_parameters", 1e9):
        zero["stage3_max_reuse_distance"] = 10 * zero.get("stage3_max_live_parameters", 10**9)
    return zero_config


def look_at_gpu_memory(args: Arguments, gpus: Gpus, sizes: Sizes) -> str:
    again = f"activations of {sizes.recomputed_share:.0%} of the layers are computed again; "
    return again + memory.judge(
        args, sizes.predicted_parts_gib, world_size=gpus.world_size, limit_gib=gpus.gpu_limit_gib,
        free_gib=gpus.gpu_free_gib,
    )  # fmt: skip


def look_at_disk(args: Arguments, lora_parameters: int) -> str:
    """Room for the checkpoints, one more while it is written, and the adapter."""
    checkpoint = lora_parameters * (4 + 14)
    needed = checkpoint * (args.save_total_limit + 1) + lora_parameters * 4
    cure = "free some, name another --output_dir, or lower --save_total_limit"
    return check_room(Path(args.output_dir), "--output_dir", needed, checkpoint, cure)
