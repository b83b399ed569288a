"""sglang.Engine: its arguments chosen from the machine, each with its reason, and every record in flight."""

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import signal
import threading
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from workbench import UserError
from workbench.machine import GIB

from . import planner
from .arguments import Arguments, check_engine_args
from .planner import Plan
from .prompts import Record
from .records import PartialFile, answer_row, failure_row

PR_SET_PDEATHSIG = 1
EXPECTED_ANSWER_TOKENS = 600  # AlpacaEval's reference answers: 543 tokens on average (characters / 4)
CLIP_TOKENS = 4096  # SGLang's own clip of what a request may still need (managers/schedule_policy.py)
INITIAL_RATIO = 0.7  # SGLANG_INIT_NEW_TOKEN_RATIO
WAITING_FOR_LPM = 128  # above this many waiting requests lpm silently becomes fcfs (schedule_policy.py)
# Ordering records pays from this share of prompt tokens on that lies in shared prefixes of as many tokens as
# SGLang's own in-batch rule needs (schedule_policy.py). A chat template's header is shorter: AlpacaEval stays
# as it is.
WORTH_PLANNING, SHARED_PREFIX_TOKENS = 0.1, 32
EXACT = "-fmad=false"  # nvcc: no fused multiply-adds
SORTED_RUNNING, SORTED_BYTES = 256, 32  # at once, and bytes a logit, where SGLang's own seeded sampler draws


@dataclass
class Machine:
    """What preflight found. On the CPU only `device` is set."""

    device: str
    gpu_name: str | None = None
    gpus: int = 0
    memory_gib: float = 0.0
    bandwidth: float = 0.0  # bytes/s, from the memory's clock and bus width
    flops: float = 0.0  # dense fp16/bf16 tensor FLOP/s, from cores and clock
    compiler: dict[str, str] = field(default_factory=dict)  # environment of the wheel's nvcc, where it is used


@dataclass
class Model:
    """What the configuration says, enough to size pools."""

    folder: str
    context_tokens: int  # trained positions
    weight_bytes: int  # in 16 bits
    streamed_bytes: int  # of them, what every decode step reads: all but the gathered input embedding
    kv_bytes_per_token: int
    vocab_size: int
    dual_chunk: bool = False
    config: dict = field(default_factory=dict)


Choices = dict[str, tuple[object, str]]  # argument -> (value, reason)


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


def context_tokens(args: Arguments, model: Model) -> int:
    """Longest prompt plus answer. Capped: the engine's position table takes 4 bytes per running request and
    position, 8 GB for a model of a million positions (mem_cache/memory_pool.py, ReqToTokenPool)."""
    return args.own_engine_args.get("context_length") or min(model.context_tokens, 32768)


def choose(args: Arguments, machine: Machine, model: Model, records: list[Record]) -> Choices:
    """The arguments of sglang.Engine, by name. --engine_args overrides any of them."""
    chosen: Choices = {"model_path": (model.folder, "")}
    context = context_tokens(args, model)
    why = "the model's" if context == model.context_tokens else "a longer position table would take GPU memory"
    chosen["context_length"] = (context, why)
    chosen["random_seed"] = (args.seed, "--seed")
    chosen["schedule_policy"] = choose_policy(args, records)
    chosen["schedule_conservativeness"] = (
        conservativeness(args.max_new_tokens),
        f"answers of about {EXPECTED_ANSWER_TOKENS} tokens, not {args.max_new_tokens}, are kept room for",
    )
    chosen["constrained_json_disable_any_whitespace"] = (True, "JSON answers are compact")
    if args.reproducible:
        short = sum(len(r.input_ids) < tile_tokens(args, model) for r in records if not r.error)
        but = f", but for {short} prompts of fewer than {tile_tokens(args, model)} tokens" if short else ""
        chosen["enable_deterministic_inference"] = (True, f"the same bytes in every run{but} (--fast: without)")
    if args.jump_forward:
        why = "--jump_forward must know a step's tokens before it plans the next"
        chosen["disable_overlap_schedule"] = (True, why)
    if model.dual_chunk:
        chosen["json_model_override_args"] = (
            '{"dual_chunk_attention_config": null}',
            "dual-chunk attention would switch RadixAttention off; these prompts are far below its chunk",
        )
    if machine.device == "cpu":
        chosen |= _choose_cpu(args, model, context)
    else:
        chosen |= _choose_gpu(args, machine, model, records)
    adapters = sorted({r.lora for r in records if r.lora and not r.error})
    if adapters:
        chosen["lora_paths"] = ({path: path for path in adapters}, "adapters of --lora_path and of the records")
        chosen["max_loras_per_batch"] = (min(len(adapters) + 1, 8), "the base model takes a place too")
        chosen["lora_backend"] = ("triton", "measured faster than csgmv, SGLang's default")
        if machine.device == "cpu":
            chosen["lora_backend"] = ("torch_native", "the others are GPU kernels")
    for name, value in args.own_engine_args.items():
        chosen[name] = (value, "--engine_args")
    return chosen


def tile_tokens(args: Arguments, model: Model) -> int:
    """Prompts of at least so many tokens are prefilled with one tile of FlashInfer's kernel, whatever runs
    beside them (runtime_plugins/deterministic_radix.py); on the CPU every prompt is exact."""
    if args.device == "cpu" or args.own_engine_args.get("attention_backend", "flashinfer") != "flashinfer":
        return 0
    from runtime_plugins import deterministic_radix  # preflight has said if it is not installed

    heads = model.config["num_attention_heads"]
    kv_heads = model.config.get("num_key_value_heads") or heads
    return deterministic_radix.tile_tokens(heads // args.tp_size, max(1, kv_heads // args.tp_size))


def choose_policy(args: Arguments, records: list[Record]) -> tuple[str, str]:
    if args.policy != "planned":
        return args.policy, "--policy"
    share = _shared_share(records)
    if share < WORTH_PLANNING:
        return (
            "fcfs",
            f"prefixes of {SHARED_PREFIX_TOKENS} tokens or more are {share:.1%} of the prompts: an order would save little",
        )
    return "fcfs", f"records come depth-first: {share:.0%} of the prompt tokens lie in shared prefixes"


def _tree_keys(records: list[Record]) -> list[list[int]]:
    """What the radix tree finds them under: KV of different adapters is never shared."""
    adapters = sorted({record.lora or "" for record in records})
    return [[-1 - adapters.index(record.lora or ""), *record.input_ids] for record in records]


def _shared_share(records: list[Record]) -> float:
    keys = _tree_keys([record for record in records if not record.error])
    tokens = sum(len(key) for key in keys)
    return planner.shared_tokens(keys, SHARED_PREFIX_TOKENS + 1) / tokens if tokens else 0.0


def plan(
    args: Arguments, records: list[Record], copies: int, pool_tokens: int
) -> list[tuple[list[Record], Plan]]:
    """The records and their order for each of the engine's copies: what shares a prefix goes to one copy, and
    each gets about an equal part of the tokens to compute. One entry if the copies take turns."""
    own = args.own_engine_args.keys() & {"schedule_policy", "disable_radix_cache"}
    if args.policy != "planned" or own or _shared_share(records) < WORTH_PLANNING:
        return [(records, Plan.as_given(len(records)))]
    answers = [min(record.max_new_tokens, EXPECTED_ANSWER_TOKENS) for record in records]
    keys = _tree_keys(records)
    whole = Plan.depth_first(keys, answers, pool_tokens)
    # What a record has of its own: a shared prefix is computed by each copy that gets a part of its records.
    costs = [answers[i] + whole.leaves[i].depth - whole.leaves[i].parent.depth for i in whole.order]
    done, total, parts = 0, sum(costs), [[] for _ in range(copies)]
    for i, cost in zip(whole.order, costs, strict=True):
        parts[done * copies // total].append(i)
        done += cost
    return [
        (
            [records[i] for i in part],
            Plan.depth_first([keys[i] for i in part], [answers[i] for i in part], pool_tokens),
        )
        for part in parts
    ]


def _choose_cpu(args: Arguments, model: Model, context: int) -> Choices:
    running = args.max_running_requests or 16
    pool = 2 * context + running * min(context, 1024)
    return {
        "device": ("cpu", "--rehearse" if args.rehearse else "--device cpu"),
        "dtype": ("float32", "on the CPU exact comparison is worth more than speed"),
        "attention_backend": ("torch_native", "FlashInfer's kernels need a GPU"),
        "dp_size": (args.dp_size or 1, "--dp_size" if args.dp_size else "one scheduler process"),
        "tp_size": (args.tp_size, "--tp_size"),
        "max_running_requests": (running, "a block of 16 rows is computed at once"),
        "max_total_tokens": (pool, "KV pool: two contexts and 1,024 tokens for each running request"),
        "mem_fraction_static": (0.3, "of host memory, at most"),
        "cuda_graph_backend_decode": ("disabled", "no GPU"),
        "cuda_graph_backend_prefill": ("disabled", "no GPU"),
    }


def _choose_gpu(args: Arguments, machine: Machine, model: Model, records: list[Record]) -> Choices:
    dp = args.dp_size or max(1, machine.gpus // args.tp_size)
    waiting = sum(not record.error for record in records)
    # What lean_sampler leaves to SGLang: with seeds it sorts every row and keeps fp64 copies.
    sorts = args.reproducible and args.temperature > 0 and (args.top_k != -1 or args.top_p == 1)
    limit = args.max_running_requests or (SORTED_RUNNING if sorts else 2048)
    wanted = max(1, min(limit, args.batch_size or waiting, -(-waiting // dp)))
    # Outside the pool: CUDA context, FlashInfer's workspace (2 GiB), activations; and for each running record a CUDA
    # graph's share and an fp32 row of the vocabulary (SGLang's buffer of logits).
    fixed_gib, record_gib = 3.5, 0.004 + (SORTED_BYTES if sorts else 4) * model.vocab_size / GIB
    kv_gib = model.kv_bytes_per_token / args.tp_size * (EXPECTED_ANSWER_TOKENS + 64) / GIB
    left_gib = machine.memory_gib - fixed_gib - model.weight_bytes / GIB / args.tp_size
    fits = int(left_gib / (kv_gib + record_gib))
    if fits < 1:
        raise UserError(
            f"{machine.gpu_name}: {machine.memory_gib:.1f} GiB, but the weights take {model.weight_bytes / GIB:.1f} and "
            f"{fixed_gib + record_gib:.1f} must stay free; use a larger GPU, or --tp_size {2 * args.tp_size}"
        )
    graphs = (min(wanted, fits) + 7) // 8 * 8
    reserve_gib = fixed_gib + min(wanted, fits) * record_gib
    fraction = int(min(0.9, 1 - reserve_gib / machine.memory_gib) * 100) / 100
    chosen = {
        "attention_backend": ("flashinfer", "the assignment's kernels"),
        "dp_size": (
            dp,
            "--dp_size" if args.dp_size else f"{machine.gpus} visible GPUs, {args.tp_size} per copy",
        ),
        "tp_size": (args.tp_size, "--tp_size"),
        "mem_fraction_static": (
            fraction,
            f"{reserve_gib:.1f} GiB stay free for workspace, graphs and sampling",
        ),
        "cuda_graph_max_bs_decode": (graphs, "covers the running batch: above it every step runs eagerly"),
        "cuda_graph_backend_prefill": (
            "disabled",
            "its capture compiles for minutes, prefill is a second here",
        ),
        "chunked_prefill_size": (
            8192 if machine.memory_gib > 60 else 4096 if machine.memory_gib > 35 else 2048,
            f"for {machine.memory_gib:.0f} GiB",
        ),
    }
    if args.max_running_requests or sorts:
        why = (
            "--max_running_requests"
            if args.max_running_requests
            else "with top_k, or without top_p, a seeded draw sorts all logits"
        )
        chosen["max_running_requests"] = (limit, why)
    return chosen


def print_choices(chosen: Choices) -> None:
    print("engine arguments")
    for name, (value, reason) in chosen.items():
        if reason:
            shown = ", ".join(value) if name == "lora_paths" else value
            print(f"  {name} = {shown}: {reason}")


# --- environment and the equivalent server ------------------------------------------------------------


def environment(args: Arguments) -> dict[str, str]:
    """What the engine's processes read: which of runtime_plugins are on, and on the CPU one OpenMP thread per
    scheduler (sums have one order), no GPU, and no torch.compile (it would compile for minutes).

    Without SGLANG_FORCE_STREAM_INTERVAL every request's new tokens travel to the detokenizer every 50 steps, and
    those of requests that began together in the same step; here only finished answers count."""
    whole_answers = {"SGLANG_FORCE_STREAM_INTERVAL": str(2**30)}
    jump_forward = ["jump_forward"] if args.jump_forward else []
    if args.device == "cpu":
        return {
            "SGLANG_PLATFORM": "plain_cpu",
            "RUNTIME_PLUGINS": ",".join(["cpu", *jump_forward]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        } | whole_answers
    # Problem 2d: keep RadixAttention on. In its deterministic mode, which the reproducible profile uses, SGLang
    # switches the radix cache off for FlashInfer. One of sglang/runtime_plugins keeps it on: put its name into a list
    # `keep_radix`, which is empty where it is not needed. (A rehearsal does not come here, so only a test and the
    # cluster tell.)
    keep_radix = ["deterministic_radix"] if args.reproducible else []
    # End of problem 2d
    fused_norm = ["fused_norm"] if args.reproducible else []
    # A draft's logits are not only drawn from.
    sampler = [] if args.own_engine_args.get("speculative_algorithm") else ["lean_sampler"]
    plugins = ",".join([*keep_radix, *fused_norm, *jump_forward, *sampler])
    # One kernel for norms, whatever else is installed: the one whose bytes were compared.
    kernels = {"FLASHINFER_USE_CUDA_NORM": "1", "FLASHINFER_EXTRA_CUDAFLAGS": _compiler_flags()}
    return {"RUNTIME_PLUGINS": plugins} | kernels | whole_answers


def _compiler_flags() -> str:
    """For FlashInfer's kernels: the user's own, and every product rounded before it is added.

    With each tile of keys FlashInfer's prefill (update_mdo_states in its prefill.cuh) multiplies what a query has summed
    up by 2 ** (m_before * scale - m * scale). Where a tile leaves the maximum m as it was, that is 1; fused into one
    multiply-add, which rounds only one of the two products, it is 1 plus or minus a bit. A query meets such tiles behind
    its own position, as many as the tile of queries that it stands in needs, so that what came from the radix cache, and not
    only what it holds, decided some answers."""
    own = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS", "").split()
    return " ".join([*(flag for flag in own if flag != EXACT), EXACT])


def serve_line(args: Arguments, machine: Machine, chosen: Choices) -> str:
    """The shell command of an OpenAI-compatible server on 127.0.0.1 with the same engine."""
    variables = environment(args) | machine.compiler
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    words += ["sglang", "serve", "--model-type", "llm"]
    for name, (value, _) in chosen.items():
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


# --- starting -----------------------------------------------------------------------------------------


class CompileWatch(threading.Thread):
    """Adds up the seconds in which a compiler runs below this process: FlashInfer and SGLang compile kernels
    when they first need them, on a new machine for 1 to 4 minutes, without a word."""

    COMPILERS = ("nvcc", "cicc", "ptxas", "cc1plus", "ninja")

    def __init__(self, interval_s: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.interval_s, self.compile_s = interval_s, 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        import psutil

        me, last = psutil.Process(), time.monotonic()
        while not self._stopped.wait(self.interval_s):
            now, names = time.monotonic(), set()
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    names.add(child.name())
            if names & set(self.COMPILERS):
                if not self.compile_s:
                    print("compiling GPU kernels (first run on this machine: 1 to 4 minutes)", flush=True)
                self.compile_s += now - last
            last = now

    def stop(self) -> float:
        self._stopped.set()
        return self.compile_s


def skip_other_models(architectures: list[str]) -> None:
    """SGLang's scheduler imports every model it knows, 6 s of CPU time; its own switch for leaving some out
    takes module names. A model that no module of its own defines leaves the switch alone."""
    folder = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "models"
    modules = {path.stem: path.read_text() for path in folder.glob("*.py")}
    pattern = re.compile("|".join(rf"^class {re.escape(name)}\b" for name in architectures), re.M)
    needed = {name for name, text in modules.items() if architectures and pattern.search(text)}
    if needed:
        os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(modules.keys() - needed)))


def fork_engine_processes() -> None:
    """SGLang spawns its processes, each with 15 s of imports; from now on they are forked and share ours. For
    the CPU only, where labs and tests start many engines."""
    import sglang.srt.managers.scheduler  # noqa: F401 (what the forked ones share)
    from sglang.srt.entrypoints import engine

    set_start_method = engine.mp.set_start_method
    engine.mp.set_start_method = lambda method, force: set_start_method("fork", force=True)


def in_a_process(log: Path, function, *arguments):
    """Runs function(*arguments, pipe) in a forked process (an engine that dies takes its process along) and
    yields what it sends. What the process prints goes to `log`. Raises its UserError, and one if it dies."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        receiving.close()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            function(*arguments, sending)
        except UserError as error:
            sending.send(error)
        os._exit(0)  # an engine's exit handlers wait for processes that it has already ended

    process = context.Process(target=run)
    process.start()
    sending.close()
    try:
        while True:
            result = receiving.recv()
            if isinstance(result, UserError):
                raise result
            yield result
    except EOFError:
        process.join()
    finally:
        process.kill()  # its engine ends with it
    if process.exitcode:
        raise UserError(f"the engine's process ended with exit code {process.exitcode}; see {log}")


def _choices(hint: object) -> list | None:
    """The values that SGLang's own command line allows, from the annotation of an argument."""
    return next(filter(None, (getattr(extra, "choices", None) for extra in typing.get_args(hint)[1:])), None)


def check_overrides(args: Arguments) -> None:
    """Raises UserError for a name or value in --engine_args that SGLang does not have."""
    from sglang.srt.server_args import ServerArgs

    hints = typing.get_type_hints(ServerArgs, include_extras=True)
    check_engine_args(args.own_engine_args, {name: _choices(hint) for name, hint in hints.items()})


def start(args: Arguments, chosen: Choices, architectures: list[str], records: list[Record]):
    """(engine, load_s, compile_s). On a GPU it warms up with the first of the records. Raises UserError for
    --engine_args that SGLang refuses."""
    skip_other_models(architectures)
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()  # they extend what ServerArgs accepts
    began, watch = time.monotonic(), CompileWatch()
    if args.device == "cuda":
        watch.start()
    try:
        # Problem 2a: create `engine`. ServerArgs takes the values of `chosen` by name (their reasons are for
        # people) and checks them, Engine takes them as server_args. Let SGLang log errors only, unless `chosen`
        # says otherwise.
        arguments = ServerArgs(**{"log_level": "error"} | {name: value for name, (value, _) in chosen.items()})
        engine = Engine(server_args=arguments)
        # End of problem 2a
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        if not args.own_engine_args:
            raise
        last_line = (str(error).strip() or repr(error)).splitlines()[-1]
        raise UserError(f"--engine_args: SGLang refuses them: {last_line}") from error
    if args.device == "cuda":
        # Compiles what is still missing: prefill, decode and sampling as this run uses them, then (the second
        # time) prefill behind a cached prefix. Nothing of it stays in the cache.
        sample = [record for record in records if not (record.regex or record.json_schema)][:2]
        sample *= chosen["dp_size"][0]  # round robin reaches every copy
        # SGLang refuses a list of no adapters where it serves none.
        adapters = [record.lora for record in sample] if any(record.lora for record in sample) else None
        for _ in range(2 if sample else 0):
            params = [
                record.sampling_params(args) | {"max_new_tokens": min(4, record.max_new_tokens)}
                for record in sample
            ]
            with contextlib.suppress(ValueError):  # a record that SGLang refuses fails later, alone
                engine.generate(
                    input_ids=[record.input_ids for record in sample],
                    sampling_params=params,
                    lora_path=adapters,
                )
        engine.flush_cache()
    engine.freeze_gc()  # a full garbage collection of SGLang's million objects stops decoding for 0.4 s
    compile_s = watch.stop()
    return engine, time.monotonic() - began - compile_s, compile_s


def end_at_once() -> None:
    """For SIGQUIT, which SGLang sends when one of its processes has died. Its own handler first dumps the
    stacks of the living ones for up to a minute; finished answers are on disk, so nothing needs saving."""
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid())


# --- every record in flight ---------------------------------------------------------------------------


async def answer_all(
    engine,
    plans: list[tuple[list[Record], Plan]],
    args: Arguments,
    partial: PartialFile,
    stopped: asyncio.Event,
    waiting_limit: int | None,
    on_rows: Callable[[list[dict]], None],
) -> None:
    """One async_generate per record, all at once (--batch_size limits them): none waits for another's batch,
    unless the plan lets it wait for a prefix, and an error is one record's. With several plans each is for a
    copy of the engine. Finished rows are on disk before `on_rows` sees them.

    `waiting_limit` bounds the requests that have no token yet: with the lpm policy SGLang falls back to fcfs
    while more than 128 wait. Returns early once `stopped` is set; raises OSError if rows cannot be written.
    """
    finished: asyncio.Queue = asyncio.Queue()
    left = sum(len(records) for records, _ in plans)
    waiting = asyncio.Semaphore(waiting_limit or left)

    # Problem 2b: write `generate`, which asks the engine for one record and returns the last result it gives.
    # engine.async_generate takes input_ids, sampling_params, lora_path (the record's adapter), routed_dp_rank
    # (the copy of the engine; None: any) and stream. Awaited it gives the result; with stream=True an iterator
    # of results, each with all text so far. Until its first token a record holds the semaphore `waiting`. Then
    # `computed`, if it is not None, is to be called: others wait for this prompt's KV. Without a waiting_limit
    # and `computed` nobody needs to know of the first token, and a stream would only cost time.
    async def generate(record: Record, copy: int | None, computed: Callable | None) -> dict:
        request = {"input_ids": record.input_ids, "lora_path": record.lora, "routed_dp_rank": copy}
        params = record.sampling_params(args)
        async with waiting:
            if waiting_limit is None and computed is None:
                return await engine.async_generate(**request, sampling_params=params)
            # A stream only tells when the first token is there: it sends the first and the last.
            params |= {"stream_interval": 2**30}
            stream = await engine.async_generate(**request, sampling_params=params, stream=True)
            result = await anext(stream)
        if computed:
            computed()
        async for result in stream:  # noqa: B007 (each chunk holds all text so far)
            pass
        return result

    # End of problem 2b

    async def answer(record: Record, copy: int | None, computed: Callable | None) -> None:
        try:
            result = await generate(record, copy, computed)
            reason = result["meta_info"]["finish_reason"]
            if reason["type"] == "abort":
                row = failure_row(record, f"aborted by the engine: {reason.get('message')}")
            else:
                row = answer_row(record, result)
        except Exception as error:  # whatever it is, it is this record's
            first_line = (str(error).strip() or repr(error)).splitlines()[0][:300]
            row = failure_row(record, f"{type(error).__name__}: {first_line}")
        finished.put_nowait(row)

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(stopped.wait())]
    for copy, (records, order) in enumerate(plans):
        rank = copy if len(plans) > 1 else None
        # Problem 2c: put all records in flight at once, without waiting for any (--batch_size, if it is not 0,
        # limits how many, in equal parts for the copies). planner.follow(order, function, at_once) calls
        # function(i, computed) for each index i of `records`, in the plan's order, and waits for the answers: so it
        # runs as a task of its own. The task belongs into `tasks`, which are watched and, after a stop, cancelled.
        at_once = max(1, args.batch_size // len(plans)) if args.batch_size else max(1, len(records))

        def ask(i: int, computed: Callable | None, records=records, rank=rank):
            return answer(records[i], rank, computed)

        tasks.append(loop.create_task(planner.follow(order, ask, at_once)))
        # End of problem 2c
    get = loop.create_task(finished.get())
    try:
        while left and not stopped.is_set():
            running = [task for task in tasks if not task.done()]
            await asyncio.wait([get, *running], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[1:]:
                if task.done():
                    task.result()  # raises what is a bug of the plan
            if get.done():
                rows = [get.result()]
                while not finished.empty():
                    rows.append(finished.get_nowait())
                await loop.run_in_executor(None, partial.append, rows)
                left -= len(rows)
                on_rows(rows)
                get = loop.create_task(finished.get())
    finally:
        for task in (*tasks, get):
            task.cancel()
        await asyncio.gather(*tasks, get, return_exceptions=True)
