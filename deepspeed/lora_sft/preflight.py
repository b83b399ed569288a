"""Everything that can be known before the model loads: a PASS/FAIL table, each FAIL with its cure.

`run` also makes the plan that every rank follows (`plan.json`) and tokenises the data (`train.npz`,
`eval.npz`). It runs in a child process, because it may initialise CUDA and start tokeniser threads.
"""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

from workbench.files import write_json
from workbench.machine import (
    GIB,
    Table,
    driver_version,
    explain_hub_error,
    explain_no_cuda,
    find_model,
    has_kernels,
    versions,
)

from . import UserError, data
from .arguments import Arguments

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "tokenizers", "numpy")
CONTEXT_GIB = 1.2  # what CUDA, cuBLAS and NCCL take outside PyTorch's allocator
IN_USE = 0.78  # of what a layer saves for its backward pass, at the peak (measured at 6,144 and 16,384 tokens)
ASSUMED_GPU_GIB = 15.8  # a V100 16 GB, when there is no GPU to ask
PROGRAM = "bash deepspeed/run_llama2_7b_lora.sh"
V100_LOCK = f"make install-v100, then VENV=.venv-v100 {PROGRAM}"
OLDER_DRIVER = f"use the CUDA 12.6 environment: {V100_LOCK}"


# --- packages and GPUs --------------------------------------------------------------------------------


def choose_dtype(asked: str, device: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    """(dtype, reason). bf16 from compute capability 8.0; `torch.cuda.is_bf16_supported()` also answers True
    on Volta, where bf16 is emulated."""
    if asked != "auto":
        if asked == "bf16" and capability and capability < (8, 0):
            raise UserError(
                f"--dtype bf16: compute capability {capability[0]}.{capability[1]} has no bf16 units; use --dtype fp16"
            )
        return asked, "asked for by --dtype"
    if device == "cpu":
        return "fp32", "on CPU exact comparison is worth more than speed"
    if capability is None:
        return "fp16", "no GPU here; a V100 is assumed"
    text = f"compute capability {capability[0]}.{capability[1]}"
    return ("bf16", f"{text} has bf16 units") if capability >= (8, 0) else ("fp16", f"{text} has no bf16 units")


def look_at_gpus(args: Arguments, plan: dict) -> str:
    """Fills plan: world_size, dtype, gpu_name, capability, gpu_limit_gib, gpu_free_gib."""
    import torch

    plan |= {"gpu_name": None, "gpu_free_gib": None, "capability": None}
    try:
        cap_gib = float(os.environ.get("GPU_MEMORY_CAP_GIB") or "inf")
    except ValueError:
        raise UserError(
            f"GPU_MEMORY_CAP_GIB={os.environ['GPU_MEMORY_CAP_GIB']}: give a number of GiB"
        ) from None
    plan["gpu_limit_gib"] = min(ASSUMED_GPU_GIB - CONTEXT_GIB, cap_gib)
    plan["world_size"] = args.num_gpus or 2
    plan["dtype"], plan["dtype_reason"] = choose_dtype(args.dtype, args.device, None)
    if args.device == "cpu":
        cores = len(os.sched_getaffinity(0))
        why = "--rehearse" if args.rehearse else "--device cpu"
        return f"not used ({why}): {plan['world_size']} ranks on {cores} CPU cores"
    if not torch.cuda.is_available():
        driver = driver_version()
        if driver is None and args.preflight_only:
            return f"SKIP: no GPU here; {plan['world_size']} x {ASSUMED_GPU_GIB} GiB assumed"
        raise UserError(explain_no_cuda(driver, torch.version.cuda, torch.__version__, OLDER_DRIVER))
    try:
        torch.cuda.init()  # what is counted above is what the driver lists, not what this wheel can use
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            explain_no_cuda(driver_version(), torch.version.cuda, torch.__version__, OLDER_DRIVER)
        ) from error
    visible = torch.cuda.device_count()
    if args.num_gpus > visible:
        raise UserError(
            f"--num_gpus {args.num_gpus}, but {visible} visible (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); ask Slurm for more: --gres=gpu:{args.num_gpus}"
        )
    plan["world_size"] = args.num_gpus or visible
    devices = [torch.cuda.get_device_properties(i) for i in range(plan["world_size"])]
    for index, device in enumerate(devices):
        if not has_kernels((device.major, device.minor), torch.cuda.get_arch_list()):
            raise UserError(
                f"GPU {index}, {device.name} (compute capability {device.major}.{device.minor}), has no kernels in "
                f"torch {torch.__version__} ({' '.join(torch.cuda.get_arch_list())}); {V100_LOCK}"
            )
    capability = min((device.major, device.minor) for device in devices)
    plan["dtype"], plan["dtype_reason"] = choose_dtype(args.dtype, args.device, capability)
    plan["gpu_name"], plan["capability"] = devices[0].name, list(capability)
    plan["gpu_free_gib"] = min(torch.cuda.mem_get_info(i)[0] for i in range(plan["world_size"])) / GIB
    total_gib = min(device.total_memory for device in devices) / GIB
    plan["gpu_limit_gib"] = min(total_gib - CONTEXT_GIB, cap_gib)
    cap = f", capped to {cap_gib:g} GiB by GPU_MEMORY_CAP_GIB" if math.isfinite(cap_gib) else ""
    return f"{plan['world_size']} x {devices[0].name}, {total_gib:.1f} GiB{cap}, driver {driver_version()}"


def link_between(matrix: str, first: int, second: int) -> str:
    """The entry of `nvidia-smi topo -m` for two GPUs (NV18, PIX, SYS, ...). Raises ValueError without one."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines()]
    mine = [row for row in rows if row and row[0] == f"GPU{first}" and len(row) > second + 1]
    if len(mine) < 2:  # the header line starts with GPU0 too
        mine = [row for row in mine if "X" in row]
    if not mine:
        raise ValueError(f"no row for GPU {first}")
    return mine[-1][1 + second]


def look_at_links(plan: dict) -> str | None:
    """NVLink or PCIe between the GPUs: on PCIe the all-gathers of ZeRO-3 set the pace."""
    if plan["gpu_name"] is None or plan["world_size"] < 2:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(plan["world_size"])))
    try:
        indices = [int(index) for index in visible.split(",")][: plan["world_size"]]
        command = ["nvidia-smi", "topo", "-m"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        links = {pair: link_between(output, *pair) for pair in itertools.combinations(indices, 2)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return "SKIP: nvidia-smi does not tell how the GPUs are linked"
    for (first, second), link in links.items():
        if not link.startswith("NV"):
            return (
                f"WARN: PCIe ({link}) between GPU {first} and GPU {second}: gathers are slow, keep "
                "--tokens_per_micro_batch high"
            )
    return f"NVLink between all pairs ({', '.join(sorted(set(links.values())))})"


# --- model and data -----------------------------------------------------------------------------------


def look_at_model(args: Arguments, plan: dict) -> str:
    """Finds or fetches the model. Fills plan: model_folder, model_revision."""
    folder, plan["model_revision"], found = find_model(args.model_name_or_path, "--model_name_or_path", PROGRAM)
    plan["model_folder"] = str(folder)
    return found


def look_at_data(args: Arguments, plan: dict, rows: dict) -> str:
    """Reads rows. Fills plan: data_sha256, data_revision; and rows: train, eval."""
    path = Path(args.data_path)
    if path.exists():
        train, test, revision = data.read_file(path), [], None
    else:
        try:
            train, test, revision = data.read_hub(args.data_path, local_files_only=True)
        except UserError:
            raise
        except Exception:  # not in the cache (datasets and the hub each have their own error for it)
            try:
                train, test, revision = data.read_hub(args.data_path, local_files_only=False)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    explain_hub_error(args.data_path, "dataset", error, "--data_path", PROGRAM)
                ) from error
    rows["train"], rows["eval"] = data.split_rows(
        train, test, args.max_train_rows, args.max_eval_rows, args.seed
    )
    plan |= {"data_sha256": data.rows_sha256(rows["train"], rows["eval"]), "data_revision": revision}
    return f"{args.data_path}: {len(rows['train']):,} of {len(train):,} rows to train, {len(rows['eval']):,} to evaluate"


def look_at_names(args: Arguments) -> None:
    """Names that only a library can judge."""
    from transformers import SchedulerType
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    schedules = [schedule.value for schedule in SchedulerType]
    if args.lr_scheduler_type not in schedules:
        raise UserError(f"--lr_scheduler_type {args.lr_scheduler_type}: choose {', '.join(schedules)}")
    reporters = ("none", "all", *INTEGRATION_TO_CALLBACK)
    if args.report_to not in reporters:
        raise UserError(f"--report_to {args.report_to}: choose {', '.join(reporters)}")


# --- LoRA, ZeRO, memory -------------------------------------------------------------------------------


def look_at_lora(args: Arguments, plan: dict, zero_config: dict) -> str:
    """Builds the model without memory ("meta") and counts. Fills plan: parameters, zero_config (resolved)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .lora import add_adapters

    config = AutoConfig.from_pretrained(plan["model_folder"])
    if args.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: the model was trained for {config.max_position_embeddings} positions"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matmul = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in embedding)
    if config.tie_word_embeddings:
        matmul += config.vocab_size * config.hidden_size
    linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    for name in args.lora_targets if isinstance(args.lora_targets, list) else []:
        if name.split(".")[-1] not in linear:  # PEFT complains only if none of them matches
            raise UserError(
                f"--lora_target_modules {name}: matches no module of the model; it has {', '.join(linear)}"
            )
    with torch.device("meta"):
        model = add_adapters(model, args)
    lora_sizes = [p.numel() for name, p in model.named_parameters() if "lora_" in name]
    classes = {type(module).__name__ for module in model.modules()}
    leaf = zero_config["zero_optimization"].get("leaf_module", {}).get("classes", [])
    for name in leaf:
        if name.split(".")[-1] not in classes:
            layer = next((c for c in sorted(classes) if c.endswith("DecoderLayer")), "none")
            raise UserError(
                f"--deepspeed {args.deepspeed}: leaf_module class {name} matches no module (the model's is {layer})"
            )
    plan["zero_config"] = json.loads(json.dumps(zero_config))
    zero = plan["zero_config"]["zero_optimization"]
    if plan["world_size"] == 1:
        # DeepSpeed waits for the stream of the gathers before every layer, though there is nothing to gather; that one
        # must not be the stream of the computation.
        zero["overlap_comm"] = True
    plan |= {
        "base_parameters": sum(base.values()),
        "matmul_parameters": matmul,
        "lora_parameters": sum(lora_sizes),
    }
    plan["predicted_parts_gib"] = predict_memory(config.to_dict(), base, lora_sizes, args, plan, zero)
    plan["predicted_peak_gib"] = sum(plan["predicted_parts_gib"].values())
    return f"{len(lora_sizes)} tensors, {sum(lora_sizes) / 1e6:.1f} M of {sum(base.values()) / 1e6:,.1f} M parameters train"


def predict_memory(
    config: dict, base: dict[str, int], lora_sizes: list[int], args: Arguments, plan: dict, zero: dict
) -> dict[str, float]:
    """Peak memory of one GPU in GiB, part by part; without the last, the slack, the parts add up to the peak that
    PyTorch allocates. What it reserves depends on how much there is: with little it gives back what waits for reuse.

    Bytes per token of a layer are those of Llama with LoRA on every linear layer, where dropout copies each
    adapter's input; not all are there at once (IN_USE). 20 bytes per logit are the half-precision logits, their
    fp32 copy, log-softmax and both gradients; `answer_share` of a micro-batch's positions have logits. They are gone
    before a layer is computed again, so only what they take beyond a layer counts. Without checkpointing and without
    ZeRO-3's memory-efficient linear layers autograd keeps every gathered matrix until its backward pass. A test
    holds the prediction to what GPUs measured (Llama-2-7B's shape, fp16).
    """
    size = 4 if plan["dtype"] == "fp32" else 2
    world, tokens = plan["world_size"], args.tokens_per_micro_batch
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    base_total, lora_total = sum(base.values()), sum(lora_sizes)
    lora_resident = sum(n if n <= threshold else n / world for n in lora_sizes)
    layer = sum(n for name, n in base.items() if ".layers.0." in name) + lora_total / layers
    outside = sum(n for name, n in base.items() if ".layers." not in name)  # embedding and head
    # A layer that has run forward is needed again when those behind it have run forward and backward, with checkpointing
    # forward once more in between: the distance counts each of them as often.
    again = zero.get("stage3_max_reuse_distance", 1e9) / (3 if args.gradient_checkpointing else 2)
    reused = max(zero.get("stage3_max_live_parameters", 1e9), again, layer)
    if not args.gradient_checkpointing and not zero.get("memory_efficient_linear", True):
        reused = base_total
    dropout = 3 if args.lora_dropout else 0  # a copy and a one-byte mask of every adapter's input
    per_token = (16 * hidden + 6 * inner) * size + (6 * hidden + inner) * dropout
    checkpointed = layers * hidden * size if args.gradient_checkpointing else 0
    bucket = zero.get("reduce_bucket_size", 5e8)  # allocated whole, however few train
    if not zero.get("contiguous_gradients", True):
        bucket = min(bucket, lora_total)
    layer_activations = tokens * per_token * (IN_USE if args.gradient_checkpointing else layers)
    logits = tokens * plan["answer_share"] * vocab * 20
    parts = {
        "weight shard": base_total * size / world,
        "LoRA states": lora_resident * size + lora_total / world * (size + 16),
        "gathered layers": (min(reused, base_total - outside) + outside) * size if world > 1 else 0,
        "reduce bucket": bucket * size,
        "checkpointed inputs": checkpointed * tokens,
        "layer activations": layer_activations,
        "logits and loss": max(0, logits - layer_activations if args.gradient_checkpointing else logits),
    }
    # With two streams: blocks that one has left and the other not yet. The allocator takes more if there is more.
    two_streams = world > 1 and zero.get("overlap_comm", True)
    parts["allocator slack"] = (0.15 if two_streams else 0.05) * sum(parts.values())
    return {name: value / GIB for name, value in parts.items()}


def judge_memory(args: Arguments, plan: dict) -> str:
    """Raises UserError with the flag to change if the predicted peak does not fit."""
    predicted, limit = plan["predicted_peak_gib"], plan["gpu_limit_gib"]
    width = max(map(len, plan["predicted_parts_gib"]))
    unit, scale = ("GiB", 1) if predicted >= 1 else ("MiB", 1024)
    parts = "".join(
        f"\n{'':26}{name:{width}} {gib * scale:6.2f} {unit}"
        for name, gib in plan["predicted_parts_gib"].items()
    )
    text = f"{predicted * scale:.2f} {unit} predicted of {limit:.2f} GiB per GPU{parts}"
    if args.device == "cpu":
        return text
    if predicted > limit:
        gib = plan["predicted_parts_gib"]
        by_tokens = sum(gib[name] for name in ("checkpointed inputs", "layer activations", "logits and loss"))
        flag = f"--tokens_per_micro_batch {args.rows_per_micro_batch // 2 * args.max_seq_len}"
        if args.tokens_per_micro_batch <= args.max_seq_len:
            flag = f"--max_seq_len {args.max_seq_len // 2} --tokens_per_micro_batch {args.max_seq_len // 2}"
        if not args.gradient_checkpointing:
            flag = "--gradient_checkpointing"
        elif gib["gathered layers"] > by_tokens:
            flag = f"smaller stage3_max_live_parameters and stage3_max_reuse_distance in {args.deepspeed}"
        elif gib["LoRA states"] > by_tokens:
            flag = f"--lora_r {max(1, args.lora_r // 2)}"
        if plan["world_size"] < 2 and plan["predicted_parts_gib"]["weight shard"] > limit / 2:
            flag = "a second GPU (--gres=gpu:2): ZeRO-3 halves the weight shard"
        raise UserError(f"{text}\n{'':24}does not fit; use {flag}")
    free = plan["gpu_free_gib"]
    if free is not None and free < min(predicted + CONTEXT_GIB, limit):
        raise UserError(
            f"{free:.1f} GiB free on a GPU, {predicted:.1f} needed: another process holds it (nvidia-smi)"
        )
    return text


def memory_limit_gib() -> tuple[float, str]:
    """Host memory this job may still use, and what sets it: the machine or a cgroup (Slurm's --mem)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    best = (int(fields["MemAvailable"].split()[0]) / 2**20, "available on this machine")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, limit_name, usage_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A limit may stand at any level above the process.
        folder = root / group.lstrip("/")
        for level in (folder, *folder.parents):
            if root not in (level, *level.parents):
                break
            try:
                limit = int((level / limit_name).read_text())
                used = int((level / usage_name).read_text())
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", (level / "memory.stat").read_text(), re.M
                )
            except (OSError, ValueError):  # "max", or a controller that is not mounted
                continue
            left = (limit - used + (int(cached.group(1)) if cached else 0)) / GIB
            best = min(best, (left, "left of the job's memory limit (Slurm --mem)"))
    return best


def look_at_host_memory(plan: dict) -> str:
    """Every rank reads all weights, one after the other; the pages are shared and can be dropped."""
    left, what = memory_limit_gib()
    size = 4 if plan["dtype"] == "fp32" else 2
    weights = plan["base_parameters"] * size / GIB
    needed = weights + 2.5 * plan["world_size"]
    if left < needed:
        raise UserError(
            f"{left:.1f} GiB {what}, about {needed:.1f} needed to load the weights; ask for --mem={needed * 1.2:.0f}G"
        )
    if left < weights * plan["world_size"]:
        return f"WARN: {left:.1f} GiB {what}; below {weights * plan['world_size']:.1f} loading may be slow"
    return f"{left:.1f} GiB {what}, about {needed:.1f} needed"


def look_at_disk(args: Arguments, plan: dict) -> str:
    """Free space for the checkpoints, and whether a quota lets us have one checkpoint's worth of it."""
    folder = Path(args.output_dir)
    checkpoint = plan["lora_parameters"] * (4 + 14)
    needed = checkpoint * (args.save_total_limit + 1) + plan["lora_parameters"] * 4
    probe = folder / ".disk_probe"
    try:
        free = shutil.disk_usage(folder).free
        with probe.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, max(1, checkpoint))
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: {needed / GIB:.2f} GiB are needed ({error.strerror}); free some"
        ) from error
    finally:
        probe.unlink(missing_ok=True)
    if free < needed:
        raise UserError(
            f"--output_dir {folder}: {free / GIB:.2f} GiB free, {needed / GIB:.2f} needed; free some, name another "
            "--output_dir, or lower --save_total_limit"
        )
    return f"{free / GIB:.1f} GiB free in {folder}, {needed / GIB:.2f} needed"


# --- all of it ----------------------------------------------------------------------------------------


def run(args: Arguments, zero_config: dict, work_dir: Path) -> int:
    """Prints the table; writes plan.json and the packed rows. Raises UserError with the first failure."""
    table, plan, rows = Table(), {}, {}
    print("preflight")
    table.check(
        "packages", lambda: ", ".join(f"{k} {v}" for k, v in versions(PACKAGES).items() if k != "numpy")
    )
    table.check("flags", lambda: look_at_names(args))
    # Login nodes, where one downloads, have no GPU.
    gpus = not args.download_only and table.check("GPUs", lambda: look_at_gpus(args, plan))
    if gpus:
        table.check("GPU link", lambda: look_at_links(plan))
        table.row("PASS", "precision", f"{plan['dtype']}: {plan['dtype_reason']}")
    model = table.check("model", lambda: look_at_model(args, plan))
    table.check("data", lambda: look_at_data(args, plan, rows))
    tokens = gpus and model and rows and table.check("tokens", lambda: tokenise(args, plan, rows, work_dir))
    if tokens and table.check("LoRA", lambda: look_at_lora(args, plan, zero_config)):
        table.check("GPU memory", lambda: judge_memory(args, plan))
        table.check("host memory", lambda: look_at_host_memory(plan))
        table.check("disk", lambda: look_at_disk(args, plan))
    elif not tokens and not args.download_only:
        table.row("SKIP", "the rest", "needs what failed above")
    if table.first_failure:
        raise UserError(table.first_failure)
    write_json(work_dir / "plan.json", plan | {"versions": versions(PACKAGES)})
    return 0


def tokenise(args: Arguments, plan: dict, rows: dict, work_dir: Path) -> str:
    """Rows -> train.npz and eval.npz in `work_dir`. Fills plan: train, eval (reports), answer_share."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan["model_folder"])
    data.set_up_tokenizer(tokenizer)
    per_forward = plan["world_size"] * args.rows_per_micro_batch
    for split, multiple in (("train", per_forward * args.gradient_accumulation_steps), ("eval", per_forward)):
        packed = data.prepare(rows[split], tokenizer, args.max_seq_len, multiple, split)
        packed.save(work_dir / f"{split}.npz")
        plan[split] = packed.report()
        if split == "train":
            plan["answer_share"] = packed.largest_answer_share(args.rows_per_micro_batch)
    report = plan["train"]
    skipped = sum(value for key, value in report.items() if key.startswith("skipped_"))
    return (
        f"{report['documents']:,} documents in {report['packed_rows']:,} rows of {args.max_seq_len}: "
        f"{report['padding_share']:.1%} padding, {report['trained_share']:.0%} trained; {report['prompt_cut']} cut, "
        f"{skipped} skipped, {report['space_inserted']} joined by a space"
    )
