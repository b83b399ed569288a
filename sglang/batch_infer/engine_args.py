"""The arguments of sglang.Engine: chosen from model, GPU and records, each with its reason."""

import difflib
import json
import os
import re
import shlex
import typing
from dataclasses import dataclass, replace
from pathlib import Path

from workbench import UserError
from workbench.machine import GIB

from .arguments import PENALTIES, Arguments
from .machine import Machine
from .model import Model
from .order import EXPECTED_ANSWER_TOKENS, Order
from .prompts import Record, draws

CLIP_TOKENS = 4096  # SGLang's own clip of what a request may still need (managers/schedule_policy.py)
INITIAL_RATIO = 0.7  # SGLANG_INIT_NEW_TOKEN_RATIO
MOST_COPIES, CPU_ROWS = 4, 16  # on the CPU; rows of a product (runtime_plugins/cpu.py)
SMALL_BYTES = 2**27  # weights for which a second copy's start takes longer than it saves
LONGEST_ANSWER_TOKENS = 2000  # of 805; where the cap allows, one answer is about so long
# A sum over GPUs: the time to begin one, and its rate as a share of a copy's from GPU to GPU. Two constants of one
# measurement (12a1e1e): AlpacaEval's answers take two H100 17.3 s with a copy on each, 15.3 s with a shared one. On two H200 they
# then say 0.7 s for what was 0.8 (14.9 and 14.1 s, f669022).
SUM_S, SUM_RATE = 8e-6, 0.5
EXACT = "-fmad=false"  # nvcc: no fused multiply-adds
SORTED_RUNNING, SORTED_BYTES = 256, 32  # at once, and bytes a logit, where SGLang's own seeded sampler draws


@dataclass(frozen=True)
class EngineArgs:
    """How the engine is started: its arguments by name and their reasons, its environment, and the same for people
    as the shell command of an OpenAI-compatible server."""

    values: dict[str, object]
    reasons: dict[str, str]
    environment: dict[str, str]
    serve_line: str


Choice = tuple[str, object, str]  # name, value, reason ("": not worth a line)


def decide(args: Arguments, machine: Machine, model: Model, records: list[Record], order: Order) -> EngineArgs:
    """For the `records` that will run, in their `order`. --engine_args overrides any of them."""
    args, shared = share(args, machine, model, records)
    choices = [
        ("model_path", model.folder, ""),
        ("tp_size", args.tp_size, shared),
        *_tokenizer(args, model),
        *_for_every_device(args, model, records, order),
        *_reproducible(args),
        *(
            _cpu(args, machine, model, records)
            if machine.device == "cpu"
            else _gpu(args, machine, model, records)
        ),
        *_adapters(machine, records),
        *((name, value, "--engine_args") for name, value in args.own_engine_args.items()),
    ]
    values = {name: value for name, value, _ in choices}
    reasons = {name: reason for name, _, reason in choices if reason}
    variables = environment(args)
    return EngineArgs(values, reasons, variables, serve_line(values, variables | machine.compiler))


def tokenizer_folder(args: Arguments, model: Model) -> str:
    """The adapter's own tokenizer and chat template if it has them, else the model's."""
    own = args.lora_path and (Path(args.lora_path) / "tokenizer_config.json").exists()
    return args.lora_path if own else model.folder


def context_tokens(args: Arguments, model: Model) -> int:
    """Longest prompt plus answer. Capped: the engine's position table takes 4 bytes per running request and
    position, 8 GB for a model of a million positions (mem_cache/memory_pool.py, ReqToTokenPool)."""
    return args.own_engine_args.get("context_length") or min(model.context_tokens, 32768)


def conservativeness(max_new_tokens: int) -> float:
    """Of `schedule_conservativeness`: how much room the scheduler keeps for running requests.

    SGLang admits a request while the pool holds, for each running one, ratio * min(max_new_tokens left, 4096)
    tokens; ratio starts at 0.7 * conservativeness and decays. With max_new_tokens 8192 it reserves 2,867
    tokens for answers that have 600, and keeps most of the 805 waiting. Solving ratio * reservation =
    expected answer gives the value; too low a guess costs retractions (a record is computed again), never a
    wrong answer.
    """
    reserved = INITIAL_RATIO * min(max_new_tokens, CLIP_TOKENS)
    return round(min(1.0, max(0.1, EXPECTED_ANSWER_TOKENS / reserved)), 2)


# --- what is chosen -----------------------------------------------------------------------------------


def _for_every_device(args: Arguments, model: Model, records: list[Record], order: Order) -> list[Choice]:
    context = context_tokens(args, model)
    most = max((record.flag(args, "max_new_tokens") for record in records), default=args.max_new_tokens)
    longer = "a longer position table would take GPU memory"
    room = f"answers of about {EXPECTED_ANSWER_TOKENS} tokens, not {most}, are kept room for"
    choices = [
        ("context_length", context, "the model's" if context == model.context_tokens else longer),
        ("random_seed", args.seed, "--seed"),
        ("schedule_policy", order.schedule_policy, order.reason),
        ("schedule_conservativeness", conservativeness(most), room),
        ("constrained_json_disable_any_whitespace", True, "JSON answers are compact"),
    ]
    # With its overlap scheduler SGLang counts tokens for the penalties a step late; bytes then depend on the batch.
    if args.jump_forward or any(set(PENALTIES) & record.own.keys() for record in records):
        what = "--jump_forward" if args.jump_forward else "a penalty"
        why = f"{what} must know a step's tokens before the next is planned"
        choices.append(("disable_overlap_schedule", True, why))
    if model.dual_chunk:
        why = "dual-chunk attention would switch RadixAttention off; these prompts are far below its chunk"
        choices.append(("json_model_override_args", '{"dual_chunk_attention_config": null}', why))
    return choices


def share(args: Arguments, machine: Machine, model: Model, records: list[Record]) -> tuple[Arguments, str]:
    """`args` with the number of GPUs that share one copy, one or two, and why. A step reads the weights once: of a copy on
    each GPU all of them, of a shared one a half; but each layer then adds up two results over the link. What else a
    step takes is the same both ways. Four that share one were slower than two pairs (f978da3: 16.9 and 10.5 s). Copies
    where bytes are promised: they must not depend on the number of GPUs."""
    fixed = args.tp_size or args.dp_size or args.own_engine_args.keys() & {"tp_size", "dp_size", "nnodes"}
    if fixed or args.reproducible or machine.gpus < 2:
        return replace(args, tp_size=args.tp_size or 1), "--tp_size" if args.tp_size else ""
    one_each = replace(args, tp_size=1)
    if not (machine.link and machine.bandwidth):
        return one_each, "a copy on each GPU: none reads another's memory"
    unmeasured = args.jump_forward or "quantization_config" in model.config or any(r.lora for r in records)
    if unmeasured:
        return (
            one_each,
            "a copy on each GPU: --tp_size was not measured with adapters, jump-forward or quantised weights",
        )
    caps = [record.flag(args, "max_new_tokens") for record in records]
    answers = sum(min(cap, EXPECTED_ANSWER_TOKENS) for cap in caps)
    tokens = answers + sum(len(record.input_ids) for record in records)
    sums, row_bytes = 2 * model.config["num_hidden_layers"], 2 * model.config["hidden_size"]

    def seconds(gpus: int) -> float:
        copies = machine.gpus // gpus
        steps = min(max(caps), LONGEST_ANSWER_TOKENS) + answers / copies / (args.max_running_requests or 2048)
        read_s = steps * model.streamed_bytes / gpus / machine.bandwidth
        sum_s = steps * SUM_S + tokens / copies * row_bytes / (SUM_RATE * machine.link)
        return read_s + (gpus - 1) * sums * sum_s

    heads = model.config["num_attention_heads"]
    found = {n: seconds(n) for n in (1, 2) if machine.gpus % n == 0 and heads % n == 0}
    best = min(found, key=found.get)
    told = ", ".join(f"{n}: {found[n]:.1f} s" for n in found)
    link = f"{machine.link / 1e9:.0f} GB/s from GPU to GPU"
    return replace(
        args, tp_size=best
    ), f"reading weights and adding up, by GPUs that share a copy: {told} ({link})"


def _tokenizer(args: Arguments, model: Model) -> list[Choice]:
    folder = tokenizer_folder(args, model)
    return [("tokenizer_path", folder, "" if folder == model.folder else "the adapter's")]


def _reproducible(args: Arguments) -> list[Choice]:
    why = "the same bytes in every run (--fast: without)"
    return [("enable_deterministic_inference", True, why)] if args.reproducible else []


def _adapters(machine: Machine, records: list[Record]) -> list[Choice]:
    adapters = sorted({record.lora for record in records if record.lora})
    if not adapters:
        return []
    backend = ("triton", "measured faster than csgmv, SGLang's default")
    if machine.device == "cpu":
        backend = ("torch_native", "the others are GPU kernels")
    return [
        ("lora_paths", {path: path for path in adapters}, "adapters of --lora_path and of the records"),
        ("max_loras_per_batch", min(len(adapters) + 1, 8), "the base model takes a place too"),
        ("lora_backend", *backend),
    ]


def _cpu(args: Arguments, machine: Machine, model: Model, records: list[Record]) -> list[Choice]:
    copies, why = args.dp_size, "--dp_size"
    if not copies:
        # A copy has one thread (runtime_plugins/cpu.py), fp32 weights, and SGLang's 1.5 GiB.
        room = int(machine.memory_gib / (2 * model.weight_bytes / GIB + 1.5))
        small = model.weight_bytes < SMALL_BYTES
        copies = max(1, min(MOST_COPIES, machine.cores, room, 1 if small else -(-len(records) // CPU_ROWS)))
        why = f"a copy for each of {copies} cores" if copies > 1 else "one scheduler process"
    half = -(-len(records) // copies // 2 // CPU_ROWS) * CPU_ROWS
    running, context = args.max_running_requests or max(CPU_ROWS, min(64, half)), context_tokens(args, model)
    pool = 2 * context + running * min(context, 512)
    return [
        ("device", "cpu", "--rehearse" if args.rehearse else "--device cpu"),
        ("dtype", "float32", "on the CPU exact comparison is worth more than speed"),
        ("attention_backend", "torch_native", "FlashInfer's kernels need a GPU"),
        ("dp_size", copies, why),
        (
            "max_running_requests",
            running,
            "they share each reading of the weights; later ones find a prefix in the tree",
        ),
        ("max_total_tokens", pool, "KV pool: two contexts and 512 tokens for each running request"),
        ("mem_fraction_static", 0.3, "of host memory, at most"),
        ("cuda_graph_backend_decode", "disabled", "no GPU"),
        ("cuda_graph_backend_prefill", "disabled", "no GPU"),
    ]


def _gpu(args: Arguments, machine: Machine, model: Model, records: list[Record]) -> list[Choice]:
    """Raises UserError where weights and one record do not fit."""
    dp = args.dp_size or max(1, machine.gpus // args.tp_size)
    # What lean_sampler leaves to SGLang: with seeds it sorts every row and keeps fp64 copies.
    ways = draws(records, args)
    sorts = args.reproducible and (ways == {"all"} or (args.top_k != -1 and ways != {"greedy"}))
    limit = args.max_running_requests or (SORTED_RUNNING if sorts else 2048)
    wanted = max(1, min(limit, args.batch_size or len(records), -(-len(records) // dp)))
    # Outside the pool: CUDA context, FlashInfer's workspace (2 GiB), activations; and for each running record a CUDA
    # graph's share and an fp32 row of the vocabulary (SGLang's buffer of logits).
    fixed_gib = 3.5
    record_gib = 0.004 + (SORTED_BYTES if sorts else 4) * model.config["vocab_size"] / GIB
    kv_gib = model.kv_bytes_per_token / args.tp_size * (EXPECTED_ANSWER_TOKENS + 64) / GIB
    left_gib = machine.memory_gib - fixed_gib - model.weight_bytes / GIB / args.tp_size
    fits = int(left_gib / (kv_gib + record_gib))
    if fits < 1:
        raise UserError(
            f"{machine.gpu_name}: {machine.memory_gib:.1f} GiB, but the weights take {model.weight_bytes / GIB:.1f} and "
            f"{fixed_gib + record_gib:.1f} must stay free; use a larger GPU, or --tp_size {2 * args.tp_size}"
        )
    reserve_gib = fixed_gib + min(wanted, fits) * record_gib
    fraction = int(min(0.9, 1 - reserve_gib / machine.memory_gib) * 100) / 100
    graphs = (min(wanted, fits) + 7) // 8 * 8
    chunk = 8192 if machine.memory_gib > 60 else 4096 if machine.memory_gib > 35 else 2048
    copies = "--dp_size" if args.dp_size else f"{machine.gpus} visible GPUs, {args.tp_size} per copy"
    free = f"{reserve_gib:.1f} GiB stay free for workspace, graphs and sampling"
    choices = [
        ("attention_backend", "flashinfer", "the assignment's kernels"),
        ("dp_size", dp, copies),
        ("mem_fraction_static", fraction, free),
        ("cuda_graph_max_bs_decode", graphs, "covers the running batch: above it every step runs eagerly"),
        (
            "cuda_graph_backend_prefill",
            "disabled",
            "its capture compiles for minutes, prefill is a second here",
        ),
        ("chunked_prefill_size", chunk, f"for {machine.memory_gib:.0f} GiB"),
    ]
    if args.max_running_requests or sorts:
        why = "with top_k, or without top_p, a seeded draw sorts all logits"
        why = "--max_running_requests" if args.max_running_requests else why
        choices.append(("max_running_requests", limit, why))
    if args.tp_size > 1 and re.search("[^0-9,]", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        choices.append(("disable_custom_all_reduce", True, "it reads numbers only in CUDA_VISIBLE_DEVICES"))
    return choices


# --- environment --------------------------------------------------------------------------------------


def environment(args: Arguments) -> dict[str, str]:
    """What the engine's processes read: which of runtime_plugins are on, and on the CPU one OpenMP thread per
    scheduler (sums have one order), no GPU, and no torch.compile (it would compile for minutes).

    Without SGLANG_FORCE_STREAM_INTERVAL every request's new tokens travel to the detokenizer every 50 steps, and
    those of requests that began together in the same step; here only finished answers count."""
    jump_forward = ["jump_forward"] if args.jump_forward else []
    common = {"SGLANG_FORCE_STREAM_INTERVAL": str(2**30)}
    if args.device == "cpu":
        return common | {
            "SGLANG_PLATFORM": "plain_cpu",
            "RUNTIME_PLUGINS": ",".join(["cpu", *jump_forward]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
    fused_norm = ["fused_norm"] if args.reproducible else []
    # A draft's logits are not only drawn from.
    sampler = [] if args.own_engine_args.get("speculative_algorithm") else ["lean_sampler"]
    plugins = [*keep_radix(args.reproducible), *fused_norm, *jump_forward, *sampler]
    return common | {
        "RUNTIME_PLUGINS": ",".join(plugins),
        # One kernel for norms, whatever else is installed: the one whose bytes were compared.
        "FLASHINFER_USE_CUDA_NORM": "1",
        # One module of attention for all, as in deterministic mode: else prefill takes FlashAttention 3's on Hopper, of
        # which a file compiles four times as long.
        "SGLANG_FLASHINFER_USE_PAGED": "1",
        "FLASHINFER_EXTRA_CUDAFLAGS": _compiler_flags(),
    }


def keep_radix(deterministic: bool) -> list[str]:
    """The plugin, as a list of one name of sglang/runtime_plugins, that keeps RadixAttention on for FlashInfer: in
    its `deterministic` mode SGLang switches the radix cache off. [] where none is needed."""
    # Problem 2d: return the list. (A rehearsal does not come here, so only a test and the cluster tell.)
    return ["deterministic_radix"] if deterministic else []
    # End of problem 2d


def _compiler_flags() -> str:
    """For FlashInfer's kernels: the user's own, and every product rounded before it is added. A fused multiply-add
    in its prefill made some answers depend on what the radix cache had held (docs/inference.md)."""
    own = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS", "").split()
    return " ".join([*(flag for flag in own if flag != EXACT), EXACT])


# --- for people ---------------------------------------------------------------------------------------


def print_choices(chosen: EngineArgs) -> None:
    print("engine arguments")
    for name, reason in chosen.reasons.items():
        value = chosen.values[name]
        print(f"  {name} = {', '.join(value) if name == 'lora_paths' else value}: {reason}")


def serve_line(values: dict[str, object], variables: dict[str, str]) -> str:
    """The shell command of a server on 127.0.0.1 with the same engine in the same environment."""
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    words += ["sglang", "serve", "--model-type", "llm"]
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "lora_paths":
            names = [Path(path).name for path in value]
            names = names if len(set(names)) == len(names) else [f"adapter{i}" for i in range(len(names))]
            words += [flag, *(shlex.quote(f"{n}={path}") for n, path in zip(names, value, strict=True))]
        elif value is True:
            words.append(flag)
        elif value is not False and value is not None:
            text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            words += [flag, shlex.quote(text)]
    return " ".join([*words, "--host", "127.0.0.1"])


# --- --engine_args ------------------------------------------------------------------------------------


def check_own(own: dict) -> None:
    """Raises UserError for a name or value in --engine_args that SGLang does not have."""
    from sglang.srt.server_args import ServerArgs

    hints = typing.get_type_hints(ServerArgs, include_extras=True)
    for name, value in own.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
            cure = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--engine_args: sglang.Engine has no argument {name}{cure}")
        allowed = _allowed(hints[name])
        if allowed and value is not None and value not in allowed:
            raise UserError(f"--engine_args: {name} {value!r}; choose {', '.join(map(str, allowed))}")


def _allowed(hint: object) -> list | None:
    """The values that SGLang's own command line allows, from the annotation of an argument."""
    return next(filter(None, (getattr(extra, "choices", None) for extra in typing.get_args(hint)[1:])), None)
