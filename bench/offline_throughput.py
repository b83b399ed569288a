"""All AlpacaEval answers at their reference lengths, in several ways, against the roofline of these lengths.

    python bench/offline_throughput.py fast default sglang_defaults batches_64 --records FILE --part a.json
    python bench/offline_throughput.py --merge a.json b.json      # bench/results/offline_throughput.json

Random weights of Qwen2.5-7B's shape. Every request may have 8,192 new tokens and is ended by a hook at its
reference length, which no scheduler can foresee; ordering uses only what is known before. `--records FILE` is a
JSON array with `instruction` and `output_tokens`; without it prompts and lengths are drawn, seeded, from the
quantiles below. Each command measures `fast` too, and ratios are taken within a command.

rows:
    fast              run_sglang.py --fast
    default           run_sglang.py, the reproducible profile
    sglang_defaults   SGLang's own defaults, one list call (attention on FlashInfer, no prefill graph)
    batches_64, _32   the same engine, batches one after the other; with --capped the first two batches only, and
                      what all of them would take at the same rate: an estimate
    fast_dp2          run_sglang.py --fast on two GPUs
    oracle            fast, longest answer first: counts for nothing, no one knows the lengths
    transformers      Hugging Face continuous batching (SDPA attention), the first --peer_records records; and
                      fast on the same ones
    adapter           fast with --lora_path, an adapter of the fine-tuning program, for every record
    default_adapter   default with --lora_path
    fast,NAME=VALUE   fast (or default, adapter, default_adapter) with another engine argument (JSON or text; several: one comma
                      each) or, in capital letters, environment variable: a lever
"""

import argparse
import asyncio
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "sglang"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
import qwen_shape

from batch_infer import engine as runtime
from batch_infer import preflight, records, report
from batch_infer.arguments import REHEARSAL, Arguments, parse
from batch_infer.planner import Plan, optimum_cached_tokens
from batch_infer.prompts import Record
from workbench import UserError
from workbench.files import commit, write_json

FOLDER = REHEARSAL / "runs" / "offline_throughput"
RESULT = Path(__file__).resolve().parent / "results" / "offline_throughput.json"
ANSWER_CAP = 8192
# Of AlpacaEval's 805 instructions (characters) and reference answers (characters / 4), read off the data set.
SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
PROMPT_CHARACTERS = (12, 20, 31, 38, 60, 100, 177, 321, 519, 1184, 1917)
ANSWER_TOKENS = (1, 39, 91, 153, 331, 554, 723, 873, 1017, 1327, 2024)
SGLANG_DEFAULTS = {
    "attention_backend": ("flashinfer", "FlashAttention 3, its default on Hopper, is another comparison"),
    "cuda_graph_backend_prefill": ("disabled", "its capture compiles for minutes"),
}
ENGINE_OF = {"batches_64": "sglang_defaults", "batches_32": "sglang_defaults", "oracle": "fast"}
COMPILER_FLAGS = "FLASHINFER_EXTRA_CUDAFLAGS"
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, *range(128, 833, 64), 1024)
ROWS = (
    "fast",
    "default",
    "sglang_defaults",
    "batches_64",
    "batches_32",
    "fast_dp2",
    "oracle",
    "transformers",
    "adapter",
    "default_adapter",
)
# How many batches of a capped workload are run: one takes a minute, and there are 13 of 64.
BATCHES_OF_CAPPED = 2


@dataclass
class TimedRecord(Record):
    """A record whose answer ends with its `answer_tokens`-th token."""

    answer_tokens: int = 0

    def sampling_params(self, args: Arguments) -> dict:
        return super().sampling_params(args) | {"custom_params": {"answer_tokens": self.answer_tokens}}


# --- the work -----------------------------------------------------------------------------------------


def workload(given: argparse.Namespace, vocab_size: int) -> list[TimedRecord]:
    """The records. Raises UserError for a file that is not as described above."""
    if given.records:
        rows = _read(Path(given.records))
    else:
        draw = random.Random(given.seed)
        rows = [
            ("x" * _between(PROMPT_CHARACTERS, draw) + str(i), _between(ANSWER_TOKENS, draw))
            for i in range(805)
        ]
    if given.capped:  # as raw prompts do: about a fifth of the answers runs to the cap
        chosen = random.Random(given.seed).sample(range(len(rows)), len(rows) // 5)
        rows = [(text, ANSWER_CAP if i in set(chosen) else n) for i, (text, n) in enumerate(rows)]
    found = []
    for index, (text, tokens) in enumerate(rows[: given.limit or None]):
        record = TimedRecord(index, text, answer_tokens=min(tokens, given.cap))
        record.input_ids = qwen_shape.prompt_ids(text, vocab_size)
        record.max_new_tokens, record.seed, record.key = given.cap, index, str(index)
        found.append(record)
    return found


def _between(values: tuple, draw: random.Random) -> int:
    """A draw from the distribution with these values at SHARES, linear between them."""
    share = draw.random()
    above = next(i for i, limit in enumerate(SHARES) if share <= limit and i)
    low, high = SHARES[above - 1], SHARES[above]
    return round(values[above - 1] + (values[above] - values[above - 1]) * (share - low) / (high - low))


def _read(path: Path) -> list[tuple[str, int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(row["instruction"], max(1, int(row["output_tokens"]))) for row in rows]
    except OSError as error:
        raise UserError(f"--records {path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--records {path}: a JSON array of objects with instruction and output_tokens, please ({error!r})"
        ) from error


# --- the rates of this GPU ----------------------------------------------------------------------------


def seconds_of(function: Callable, times: int) -> float:
    """Of one call, by CUDA events."""
    import torch

    for _ in range(2):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def normal(*shape: int):
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def measure_rates(pipe) -> None:
    """Sends bytes/s of a large copy (read and written), FLOP/s of the best of the model's own matrix products, and
    the seconds of a decode step's matrix products for some batches."""
    import torch
    from torch.nn.functional import linear

    target, source = torch.empty(2, 2**32, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * source.numel() / seconds_of(functools.partial(target.copy_, source), 20)
    hidden, inner = qwen_shape.CONFIG["hidden_size"], qwen_shape.CONFIG["intermediate_size"]
    best, weight = 0.0, normal(2 * inner, hidden)
    for rows in range(128, 4097, 128):
        took = seconds_of(functools.partial(linear, normal(rows, hidden), weight), 10)
        best = max(best, 2 * rows * weight.numel() / took)
    pipe.send(
        {
            "bandwidth_bytes_per_s": bandwidth,
            "matmul_flops_per_s": best,
            "decode_matmul_s": decode_matmul_s(qwen_shape.CONFIG),
        }
    )


def decode_matmul_s(shape: dict) -> dict[int, float]:
    """{batch: seconds} of all matrix products of a decode step and nothing else: every layer has its own weights,
    q, k and v their bias, and a CUDA graph launches them."""
    import torch
    from torch.nn.functional import linear

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    qkv = hidden + 2 * hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    of_layer = [(qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [normal(*size) for _ in range(shape["num_hidden_layers"]) for size in of_layer]
    weights.append(normal(shape["vocab_size"], hidden))
    bias, step_s = normal(qkv), {}

    def products(inputs: dict) -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight, bias if weight.shape[0] == qkv else None)

    for rows in DECODE_BATCHES:
        inputs = {columns: normal(rows, columns) for columns in (hidden, inner)}
        products(inputs)  # cuBLAS allocates its workspace before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            products(inputs)
        step_s[rows] = seconds_of(graph.replay, 5)
    return step_s


def kernel_floor_s(lengths: list[tuple[int, int]], model, bandwidth: float, step_s: dict[int, float]) -> float:
    """Seconds of all decode steps with these matrix products (between measured batches: linear) and, after them,
    the KV at the memory's measured rate: nothing for norms, rotations, sampling or between kernels."""
    batches, total = sorted(step_s), 0.0
    for running, kv_tokens in report.decode_steps(lengths):
        above = min((batch for batch in batches if batch >= running), default=batches[-1])
        below = max((batch for batch in batches if batch < above), default=above)
        share = (running - below) / (above - below) if above > below else 0
        total += step_s[below] + share * (step_s[above] - step_s[below])
        total += kv_tokens * model.kv_bytes_per_token / bandwidth
    return total


def floors(todo: list[TimedRecord], model, rates: dict) -> tuple[float, float]:
    """Seconds on one GPU of these rates: (roofline, matrix products and then the KV)."""
    bandwidth, flops = rates["bandwidth_bytes_per_s"], rates["matmul_flops_per_s"]
    lengths = [(len(record.input_ids), record.answer_tokens) for record in todo]
    shared = optimum_cached_tokens([[(record.input_ids, []) for record in todo]])
    computed = sum(prompt for prompt, _ in lengths) - shared
    prefill_s = computed * model.streamed_bytes / flops  # 2 FLOPs a weight of 2 bytes
    gpu = runtime.Machine("cuda", bandwidth=bandwidth, flops=flops)
    step_s = {int(batch): seconds for batch, seconds in rates["decode_matmul_s"].items()}
    return (
        prefill_s + report.roofline_s(lengths, model, gpu),
        prefill_s + kernel_floor_s(lengths, model, bandwidth, step_s),
    )


# --- the rows -----------------------------------------------------------------------------------------


def serve(names: list[str], todo: list[TimedRecord], given: argparse.Namespace, model, pipe) -> None:
    """Starts the engine of these rows, and sends a row for each."""
    kind, *lever = ENGINE_OF.get(names[0], names[0]).split(",")
    words = [
        "--model_path",
        model.folder,
        "--device",
        given.device,
        "--output_file",
        str(FOLDER / "outputs.jsonl"),
    ]
    words += ["--max_new_tokens", str(given.cap), "--dp_size", "2" if kind == "fast_dp2" else "1"]
    settings = dict(setting.split("=", 1) for setting in lever)
    own = json.loads(given.engine_args) | {k: _value(v) for k, v in settings.items() if not k.isupper()}
    words += ["--engine_args", json.dumps(own)] + (["--fast"] if kind.startswith(("fast", "adapter")) else [])
    args = parse(words)
    if "adapter" in kind:
        todo = [replace(record, lora=str(Path(given.lora_path).absolute())) for record in todo]
    machine = given.machine
    chosen = runtime.choose(args, machine, model, todo)
    environment = runtime.environment(args)
    if kind == "sglang_defaults" and given.device == "cuda":
        own = {name: (value, "--engine_args") for name, value in args.own_engine_args.items()}
        chosen = {"model_path": (model.folder, ""), "dp_size": (1, "")} | SGLANG_DEFAULTS | own
        for name in environment:
            os.environ.pop(name, None)
        environment = {"RUNTIME_PLUGINS": ""}
    ours = runtime.environment(args).get(COMPILER_FLAGS)
    os.environ.update(environment | {k: v for k, v in settings.items() if k.isupper()})
    if os.environ.get(COMPILER_FLAGS) != ours:
        # In the same folder ninja would compile every module anew, and once more for the next row.
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(FOLDER / "kernels_of_other_flags")
    os.environ["RUNTIME_PLUGINS"] += ",answer_lengths"
    runtime.print_choices(chosen)
    engine, load_s, compile_s = runtime.start(args, chosen, model.config["architectures"], todo)
    for name in names:
        engine.flush_cache()
        work = sorted(todo, key=lambda record: -record.answer_tokens) if name == "oracle" else todo
        batch = int(name.partition("batches_")[2] or 0)
        if batch and given.capped:
            work = work[: BATCHES_OF_CAPPED * batch]
        if kind == "sglang_defaults":
            seconds, answers = list_calls(engine, work, args, batch or len(work))
        else:
            seconds, answers = one_each(engine, work, args)
        short = [
            a["index"] for a, r in zip(answers, work, strict=True) if a["output_tokens"] != r.answer_tokens
        ]
        if short:
            raise UserError(f"{name}: records {short[:5]} did not end at their length")
        estimate = {"estimated_from_records": len(work)} if len(work) < len(todo) else {}
        whole = math.ceil(len(todo) / batch) / BATCHES_OF_CAPPED if estimate else 1
        pipe.send(
            estimate
            | {
                "row": name,
                "seconds": seconds * whole,
                "tokens_per_s": sum(answer["output_tokens"] for answer in answers) / seconds,
                "cached_prompt_tokens": sum(answer["cached_tokens"] for answer in answers),
                "load_s": load_s,
                "compile_s": compile_s,
                "engine_args": {key: value for key, (value, _) in chosen.items() if key != "model_path"},
            }
        )
    engine.shutdown()


def _value(text: str) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def one_each(engine, todo: list[TimedRecord], args: Arguments) -> tuple[float, list[dict]]:
    """As run_sglang.py does it, durable lines included. (seconds, a row per record in order)"""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / records.PARTIAL).unlink(missing_ok=True)
    partial = records.PartialFile(FOLDER, {}, {})
    plans = [(todo, Plan.as_given(len(todo)))]
    began = time.monotonic()
    with report.progress(len(todo), 0) as on_rows:
        engine.loop.run_until_complete(
            runtime.answer_all(engine, plans, args, partial, asyncio.Event(), None, on_rows)
        )
    seconds = time.monotonic() - began
    partial.close()
    failed = [row["error"] for row in partial.rows.values() if "error" in row]
    if failed:
        raise UserError(f"{len(failed)} records failed: {failed[0]}")
    return seconds, [partial.rows[record.index] for record in todo]


def list_calls(engine, todo: list[TimedRecord], args: Arguments, batch: int) -> tuple[float, list[dict]]:
    """Batches one after the other: each waits for its longest answer."""
    answers, began = [], time.monotonic()
    for first in range(0, len(todo), batch):
        part = todo[first : first + batch]
        results = engine.generate(
            input_ids=[record.input_ids for record in part],
            sampling_params=[record.sampling_params(args) for record in part],
        )
        answers += [records.answer_row(*pair) for pair in zip(part, results, strict=True)]
    return time.monotonic() - began, answers


def peer(todo: list[TimedRecord], given: argparse.Namespace, folder: str, pipe) -> None:
    """Hugging Face continuous batching. Its requests know their length before (`max_new_tokens`)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    device = torch.device(given.device)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.eval().set_attn_implementation("sdpa")
    sampling = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.95, eos_token_id=-1, pad_token_id=0)
    loaded = time.monotonic()
    with model.continuous_batching_context_manager(generation_config=sampling) as manager:
        began = time.monotonic()
        for record in todo:
            manager.add_request(record.input_ids, max_new_tokens=record.answer_tokens, eos_token_id=-1)
        tokens = 0
        for _ in todo:
            result = manager.get_result(timeout=given.peer_timeout_s)
            if result is None or result.error:
                raise UserError(f"transformers: {result.error if result else 'no result in time'}")
            tokens += len(result.generated_tokens)
        seconds = time.monotonic() - began
    if tokens != sum(record.answer_tokens for record in todo):
        raise UserError("transformers: answers did not end at their length")
    pipe.send(
        {"row": "transformers", "seconds": seconds, "tokens_per_s": tokens / seconds, "load_s": began - loaded}
    )


# --- one command --------------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> dict:
    folder = given.model_path or str(qwen_shape.build(FOLDER / "qwen2.5-7b-shape"))
    words = ["--device", given.device, "--model_path", folder, "--engine_args", given.engine_args]
    words += ["--prompts", str(REHEARSAL / "instructions.json"), "--output_file", str(FOLDER / "outputs.jsonl")]
    args = parse(words)
    os.environ.update(runtime.environment(args))
    report.quiet_libraries(args)
    FOLDER.mkdir(parents=True, exist_ok=True)
    given.machine = runtime.Machine(given.device)
    model = preflight.run(args, given.machine)["model"]
    todo = workload(given, model.vocab_size)
    lengths = [(len(record.input_ids), record.answer_tokens) for record in todo]
    result = {
        "workload": {
            "model": Path(folder).name,
            "records": len(todo),
            "prompt_tokens": sum(prompt for prompt, _ in lengths),
            "output_tokens": sum(answer for _, answer in lengths),
            "longest_answer_tokens": max(answer for _, answer in lengths),
            "file_sha256": given.records and hashlib.sha256(Path(given.records).read_bytes()).hexdigest(),
            "capped_fifth": given.capped,
            "seed": given.seed,
        },
        "rows": [],
        "hardware": given.machine.gpu_name or f"{len(os.sched_getaffinity(0))} CPU cores",
        "gpus": given.machine.gpus,
        "versions": preflight.versions(preflight.PACKAGES),
        "commit": commit(),
    }
    log = FOLDER / "engines.log"
    log.unlink(missing_ok=True)
    if given.device == "cuda":
        result["rates"] = next(runtime.in_a_process(log, measure_rates))
        result["roofline_s"], result["kernel_floor_s"] = floors(todo, model, result["rates"])
        # Two copies take turns, and each has its longest answer to wait for.
        halves = [floors(half, model, result["rates"]) for half in (todo[::2], todo[1::2]) if half]
        result["roofline_dp2_s"], result["kernel_floor_dp2_s"] = map(max, zip(*halves, strict=True))
        print(f"roofline of these lengths: {result['roofline_s']:.2f} s", flush=True)
        print(f"matrix products, then KV at the memory's rate: {result['kernel_floor_s']:.2f} s", flush=True)
    rows = list(dict.fromkeys(["fast", *given.rows]))
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(ENGINE_OF.get(name, name), []).append(name)
    for kind, names in groups.items():
        jobs = [(serve, names, todo, given, model)]
        if kind == "transformers":
            few = todo[: given.peer_records]
            jobs = [(peer, few, given, folder), (serve, ["fast"], few, given, model)]
        for job in jobs:
            for row in runtime.in_a_process(log, *job):
                if kind == "transformers":
                    row |= {
                        "row": "transformers" if job[0] is peer else "fast_on_the_same",
                        "records": len(few),
                    }
                print(
                    f"{row['row']:18} {row['seconds']:8.2f} s {row['tokens_per_s']:10,.0f} tokens/s", flush=True
                )
                result["rows"].append(row)
                if given.part:
                    write_json(Path(given.part), result)
    return result


# --- merging ------------------------------------------------------------------------------------------


def merge(parts: list[dict]) -> dict:
    """Ratios of each command to its own `fast`; those of the plain workload also under names of their own, from the
    first part that has them."""
    merged: dict = {"parts": parts, "ratios": {}}
    for part in parts:
        kind = "capped_fifth" if part["workload"]["capped_fifth"] else "reference"
        kind += "" if part["workload"]["file_sha256"] else "_drawn"
        kind += "" if part["workload"]["records"] == 805 else f"_{part['workload']['records']}_records"
        rows = {row["row"]: row["seconds"] for row in part["rows"]}
        ratios = {name: rows[name] / rows["fast"] for name in rows if "records" not in _row(part, name)}
        if "transformers" in rows:
            ratios["transformers"] = rows["transformers"] / rows["fast_on_the_same"]
        if part.get("roofline_s"):
            ratios["roofline"] = rows["fast"] / part["roofline_s"]
            if part.get("kernel_floor_s"):
                ratios["kernel_floor"] = rows["fast"] / part["kernel_floor_s"]
            if "fast_dp2" in rows and part.get("roofline_dp2_s"):
                ratios["roofline_of_dp2"] = rows["fast_dp2"] / part["roofline_dp2_s"]
            if "default" in rows:
                ratios["roofline_of_default"] = rows["default"] / part["roofline_s"]
        merged["ratios"].setdefault(kind, []).append(ratios)
    plain = merged["ratios"].get("reference", [])
    for name, row in {
        "ratio_vs_batches_64": "batches_64",
        "ratio_vs_batches_32": "batches_32",
        "ratio_vs_defaults": "sglang_defaults",
        "ratio_vs_transformers": "transformers",
        "ratio_default_to_fast": "default",
        "ratio_to_roofline": "roofline",
    }.items():
        merged[name] = next((ratios[row] for ratios in plain if row in ratios), None)
    merged["dp2_scaling"] = next((1 / ratios["fast_dp2"] for ratios in plain if "fast_dp2" in ratios), None)
    return merged


def _row(part: dict, name: str) -> dict:
    return next(row for row in part["rows"] if row["row"] == name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help="see above")
    parser.add_argument("--records", help="JSON array with instruction and output_tokens")
    parser.add_argument("--capped", action="store_true", help="a fifth of the answers runs to the cap")
    parser.add_argument("--limit", type=int, default=0, help="the first records only (0: all)")
    parser.add_argument("--cap", type=int, default=ANSWER_CAP, help="max_new_tokens of every request")
    parser.add_argument("--peer_records", type=int, default=64)
    parser.add_argument("--peer_timeout_s", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_path", help="folder (default: the shape of Qwen2.5-7B)")
    parser.add_argument("--lora_path", help="adapter folder of the rows adapter and default_adapter")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engine_args", default='{"load_format": "dummy"}')
    parser.add_argument("--part", help="file for what this command measured")
    parser.add_argument("--merge", nargs="+", metavar="PART", help="join parts into the result file")
    given = parser.parse_args()
    try:
        for row in given.rows:
            if row not in ROWS and not re.fullmatch(
                r"(fast|default|adapter|default_adapter)(,\w+=[^,]*)+", row
            ):
                raise UserError(f"no row {row}; there are {', '.join(ROWS)} and fast,NAME=VALUE")
            if "adapter" in row.partition(",")[0] and not given.lora_path:
                raise UserError(f"the row {row} needs --lora_path FOLDER")
        if given.merge:
            try:
                result = merge([json.loads(Path(part).read_text()) for part in given.merge])
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"--merge: files that --part has written, please ({error!r})") from error
            write_json(RESULT, result)
            for kind, ratios in result["ratios"].items():
                for one in ratios:
                    print(kind, json.dumps({name: round(value, 3) for name, value in sorted(one.items())}))
            return 0
        result = measure(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = {row["row"]: row["seconds"] for row in result["rows"]}
    print(json.dumps({name: round(seconds / rows["fast"], 3) for name, seconds in rows.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
