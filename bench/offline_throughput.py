"""AlpacaEval's 805 answers at their reference lengths: run_sglang.py, SGLang's defaults, batches, the roofline.

    python bench/offline_throughput.py fast default sglang_defaults batches_64 --records FILE
    python bench/offline_throughput.py fast,tp_size=2 fast_dp2 --records FILE --output two_gpus.json
    python bench/offline_throughput.py fast batches_4 --device cpu        # tries the script: tiny model, few records

Random weights of Qwen2.5-7B's shape. Every request may have 8,192 new tokens and is ended by a hook at its
reference length, which no scheduler can foresee. `--records FILE` holds rows with `instruction` and
`output_tokens`; without it prompts and lengths are drawn, seeded, from AlpacaEval's quantiles. Ratios are to the first row
of the command (default: fast). Each row has an engine of its own; the result is written after every row. Exit
code 3: a row failed, its reason is in the result.

rows:
    fast                  run_sglang.py --fast
    default               run_sglang.py, the reproducible profile
    fast_dp2              run_sglang.py --fast on two GPUs, a copy on each
    adapter               run_sglang.py --fast --lora_path, for every record
    ROW,NAME=VALUE,...    one of these with another flag, engine argument or (in capitals) environment variable
    sglang_defaults       SGLang's own defaults, one list call (attention on FlashInfer, no prefill graph)
    batches_64            the same engine, batches of 64 one after the other
    vllm, vllm_dp2        vLLM's defaults, by --vllm's Python; a half of the records on each of two GPUs
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "sglang", "common"))
import rows
import run_sglang
import shapes

from batch_infer import engine_args, order, preflight, report, start, store
from batch_infer.arguments import REHEARSAL, Arguments, parse
from batch_infer.engine_args import EngineArgs
from batch_infer.machine import Machine
from batch_infer.model import Model
from batch_infer.preflight import Inputs
from batch_infer.prompts import Record
from batch_infer.report import ThisStart
from workbench import UserError
from workbench.files import commit, write_json
from workbench.machine import versions
from workbench.rows import read_rows

ROOT = REHEARSAL.parent
FOLDER = REHEARSAL / "runs" / "offline_throughput"
RESULT = ROOT / "bench" / "results" / "offline_throughput.json"
ROW = re.compile(r"(fast|default|fast_dp2|adapter|vllm|vllm_dp2)(,\w+=[^,]*)*|sglang_defaults|batches_[1-9]\d*")
SGLANG_DEFAULTS = {
    "attention_backend": "flashinfer",  # FlashAttention 3, its default on Hopper, is another comparison
    "cuda_graph_backend_prefill": "disabled",  # its capture compiles for minutes
    "dp_size": 1,
}
# Of AlpacaEval's 805 instructions (characters) and reference answers (characters / 4), read off the data set.
SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
PROMPT_CHARACTERS = (12, 20, 31, 38, 60, 100, 177, 321, 519, 1184, 1917)
ANSWER_TOKENS = (1, 39, 91, 153, 331, 554, 723, 873, 1017, 1327, 2024)
# Qwen2.5's chat template puts about this many tokens before and after an instruction.
HEADER_TOKENS, END_TOKENS, CHARACTERS_PER_TOKEN = 24, 5, 4

Work = list[tuple[list[int], int]]  # prompt ids and answer tokens of each record


# --- the work -----------------------------------------------------------------------------------------


def workload(given: argparse.Namespace, vocab_size: int) -> Work:
    """Raises UserError for a file that is not as described above."""
    if given.records:
        texts = [_row(*numbered, given.records) for numbered in read_rows(Path(given.records), "--records")]
    else:
        draw = random.Random(given.seed)
        texts = [
            ("x" * between(PROMPT_CHARACTERS, draw) + str(i), between(ANSWER_TOKENS, draw)) for i in range(805)
        ]
    texts = texts[: given.limit or None]
    return [(prompt_ids(text, vocab_size), min(tokens, given.cap)) for text, tokens in texts]


def _row(number: int, row: object, path: str) -> tuple[str, int]:
    try:
        return str(row["instruction"]), max(1, int(row["output_tokens"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--records {path}, row {number}: no instruction and output_tokens ({error!r})"
        ) from error


def between(values: tuple, draw: random.Random) -> int:
    """A draw from the distribution with these values at SHARES, linear between them."""
    share = draw.random()
    above = next(i for i, limit in enumerate(SHARES) if share <= limit and i)
    low, high = SHARES[above - 1], SHARES[above]
    return round(values[above - 1] + (values[above] - values[above - 1]) * (share - low) / (high - low))


def prompt_ids(text: str, vocab_size: int) -> list[int]:
    """As many ids as the instruction has with its chat template around: a header that all prompts share, then
    ids drawn from the text."""
    header, own = random.Random(0), random.Random(text)
    tokens = max(1, len(text) // CHARACTERS_PER_TOKEN) + END_TOKENS
    ids = [header.randrange(3, vocab_size) for _ in range(HEADER_TOKENS)]
    return ids + [own.randrange(3, vocab_size) for _ in range(tokens)]


def records_of(work: Work, args: Arguments) -> list[Record]:
    """As `prompts.tokenise` makes them, but that they end at their length."""
    params = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    found = []
    for index, (ids, tokens) in enumerate(work):
        own = params | ({"sampling_seed": index} if args.reproducible else {})
        own["custom_params"] = {"answer_tokens": tokens}
        lora = args.lora_path or None
        found.append(Record(index, "", lora=lora, input_ids=ids, sampling_params=own, key=str(index)))
    return found


# --- the roofline -------------------------------------------------------------------------------------


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


def measure_rates(hidden: int, inner: int) -> dict[str, float]:
    """This GPU's: bytes/s of a large copy (read and written), FLOP/s of the best of the model's own matrix products."""
    import torch

    target, source = torch.empty(2, 2**32, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * source.numel() / seconds_of(functools.partial(target.copy_, source), 20)
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    best, weight = 0.0, draw(2 * inner, hidden)
    for batch in range(128, 4097, 128):
        product = functools.partial(torch.nn.functional.linear, draw(batch, hidden), weight)
        best = max(best, 2 * batch * weight.numel() / seconds_of(product, 10))
    return {"bandwidth_bytes_per_s": bandwidth, "matmul_flops_per_s": best}


def roofline_s(work: Work, model: Model, rates: dict[str, float]) -> float:
    """Of one GPU of these rates: each prompt token that no other prompt has is computed once, then every step takes
    the larger of its memory and its arithmetic."""
    lengths = [(len(ids), tokens) for ids, tokens in work]
    shared = order.optimum_cached_tokens([[(ids, []) for ids, _ in work]])
    flops = (sum(prompt for prompt, _ in lengths) - shared) * model.streamed_bytes  # 2 a weight of 2 bytes
    gpu = Machine("cuda", bandwidth=rates["bandwidth_bytes_per_s"], flops=rates["matmul_flops_per_s"])
    return flops / gpu.flops + report.roofline_s(lengths, model, gpu)


# --- one row ------------------------------------------------------------------------------------------


def command(row: str, given: argparse.Namespace) -> tuple[Arguments, dict[str, str]]:
    """run_sglang.py's arguments for a row, and the environment variables among its levers. Raises UserError."""
    if not ROW.fullmatch(row):
        raise UserError(f"no row {row}; -h lists them")
    kind, settings = rows.split(row)
    settings = {} if kind.startswith("vllm") else settings  # its own
    flags = {"device": given.device, "output_file": FOLDER / "outputs.jsonl", "max_new_tokens": given.cap}
    flags |= {"prompts": REHEARSAL / "instructions.json", "fast": kind != "default"}
    flags["dp_size"] = 2 if kind == "fast_dp2" else 1
    flags |= {"model_path": given.model_path} if given.model_path else {"rehearse": True}
    if kind == "adapter":
        if not given.lora_path:
            raise UserError("the row adapter needs --lora_path FOLDER")
        flags["lora_path"] = given.lora_path
    names = {entry.name for entry in fields(Arguments)}
    flags |= {name: value for name, value in settings.items() if name in names}
    own = {n: value_of(v) for n, v in settings.items() if n not in names and not n.isupper()}
    flags["engine_args"] = json.dumps(parse(["--engine_args", given.engine_args]).own_engine_args | own)
    args = parse([f"--{name}={value}" for name, value in flags.items()])
    return args, {name: value for name, value in settings.items() if name.isupper()}


def value_of(text: str) -> object:
    """JSON, or the text as it is."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def set_up_environment(args: Arguments, inputs: Inputs, own: dict[str, str | None]) -> None:
    """run_sglang.py's environment, then the row's `own` (None: not set), and answers that end at their lengths."""
    run_sglang.set_up_environment(args)
    flags = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS")
    os.environ.update(inputs.machine.compiler | {name: value or "" for name, value in own.items()})
    for name in [name for name, value in own.items() if value is None]:
        del os.environ[name]
    if os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS") != flags:
        # In the same folder ninja would compile every module anew, and once more for the next row.
        base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(base / "kernels_of_other_flags")
    os.environ["RUNTIME_PLUGINS"] = os.environ.get("RUNTIME_PLUGINS", "") + ",answer_lengths"


def decide(args: Arguments, inputs: Inputs, work: Work) -> run_sglang.Run:
    records = records_of(work, args)
    return run_sglang.decide(args, inputs, records, records, records)


def ours(
    row: str, given: argparse.Namespace, inputs: Inputs, work: Work
) -> tuple[EngineArgs, ThisStart, list[dict]]:
    """As run_sglang.py answers, durable lines included; a row of the partial file for each record."""
    args, environment = command(row, given)
    set_up_environment(args, inputs, environment)
    engine_args.check_own(args.own_engine_args)
    run = decide(args, inputs, work)
    store.remove_partial(FOLDER)
    partial = store.PartialFile(FOLDER, {}, {})
    times = run_sglang.answer(run, partial)
    partial.close()
    return run.chosen, times, [partial.rows[record.index] for record in run.todo]


def theirs(
    row: str, given: argparse.Namespace, inputs: Inputs, work: Work
) -> tuple[EngineArgs, ThisStart, list[dict]]:
    """SGLang's defaults and list calls, batches one after the other: each waits for its longest answer."""
    args, _ = command("fast", given)
    records = records_of(work, args)
    chosen = EngineArgs(
        SGLANG_DEFAULTS | {"model_path": inputs.model.folder} | args.own_engine_args, {}, {}, ""
    )
    ours = dict.fromkeys(engine_args.environment(args))
    if args.device == "cpu":  # where they do not run
        chosen, ours = run_sglang.decide(args, inputs, records, records, records).chosen, {}
    set_up_environment(args, inputs, ours)
    started = start.start(args, chosen, inputs.model, records)
    batch, answers, began = int(row.partition("batches_")[2] or len(records)), [], time.monotonic()
    for first in range(0, len(records), batch):
        part = records[first : first + batch]
        params = [record.sampling_params for record in part]
        results = started.engine.generate(
            input_ids=[record.input_ids for record in part], sampling_params=params
        )
        answers += [store.answer_row(*pair) for pair in zip(part, results, strict=True)]
    times = ThisStart(started.load_s, started.compile_s, time.monotonic() - began)
    started.engine.shutdown()
    return chosen, times, answers


def vllm(row: str, given: argparse.Namespace, inputs: Inputs, work: Work) -> dict:
    """peers.py with the row's levers as arguments of vllm.LLM. Raises UserError."""
    kind, settings = rows.split(row)
    if not given.vllm:
        raise UserError("the row vllm needs --vllm PYTHON, with vLLM 0.26.0")
    own = {name: value_of(value) for name, value in settings.items()}
    args, _ = command("fast", given)
    copies = 2 if kind == "vllm_dp2" else 1
    results = [FOLDER / f"vllm_{copy}.json" for copy in range(copies)]
    spec = {
        "engine_args": {"model": inputs.model.folder} | args.own_engine_args | own,
        "sampling": {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")},
        "wait_for": [str(result.with_suffix(".ready")) for result in results],
    }
    processes = []
    for copy, result in enumerate(results):
        for path in (result, result.with_suffix(".ready")):
            path.unlink(missing_ok=True)
        write_json(result.with_suffix(".spec"), spec | {"work": work[copy::copies]})
        words = [*shlex.split(given.vllm), "-P", ROOT / "bench" / "peers.py", "vllm"]
        words += [result.with_suffix(".spec"), result]
        gpu = {"CUDA_VISIBLE_DEVICES": rows.visible_gpus()[copy]} if copies > 1 else {}
        processes.append(subprocess.Popen(words, env=os.environ | gpu))
    if any([process.wait() for process in processes]):
        raise UserError("vLLM failed")
    found = [json.loads(result.read_text()) for result in results]
    times = {name: max(part[name] for part in found) for name in ("seconds", "load_s")}
    tokens = sum(tokens for _, tokens in work)
    return found[0] | times | {"tokens_per_s": tokens / times["seconds"], "engine_args": spec["engine_args"]}


def measure_row(row: str, given: argparse.Namespace, inputs: Inputs, work: Work) -> dict:
    """Raises UserError if a record failed or did not end at its length."""
    if row.startswith("vllm"):
        return vllm(row, given, inputs, work)
    run = theirs if row.startswith(("sglang", "batches")) else ours
    chosen, times, answers = run(row, given, inputs, work)
    for answer, (_, tokens) in zip(answers, work, strict=True):
        if answer.get("output_tokens") != tokens:
            why = answer.get("error") or f"{answer['output_tokens']} tokens instead of {tokens}"
            raise UserError(f"record {answer['index']}: {why}")
    return {
        "seconds": times.generate_s,
        "tokens_per_s": sum(tokens for _, tokens in work) / times.generate_s,
        "cached_prompt_tokens": sum(answer["cached_tokens"] for answer in answers),
        "load_s": times.load_s,
        "compile_s": times.compile_s,
        "engine_args": {name: value for name, value in chosen.values.items() if not name.endswith("_path")},
    }


# --- one command --------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, output: Path) -> dict:
    """Raises UserError for what is wrong before the first row."""
    gpu = given.device == "cuda"
    given.limit = (0 if gpu else 12) if given.limit is None else given.limit
    given.cap = given.cap or (8192 if gpu else 16)
    given.engine_args = given.engine_args or ('{"load_format": "dummy"}' if gpu else "{}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if gpu and not given.model_path:
        given.model_path = str(shapes.build("qwen2.5-7b", FOLDER / "qwen2.5-7b-shape", weights=False))
    commands = {row: command(row, given)[0] for row in given.rows or ["fast"]}
    first = min(commands.values(), key=lambda args: not args.lora_path)
    run_sglang.set_up_environment(first)
    inputs = preflight.run(first)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for row, args in commands.items():
        if gpu and args.tp_size * args.dp_size > inputs.machine.gpus:
            raise UserError(f"{row}: {args.tp_size * args.dp_size} GPUs needed, {inputs.machine.gpus} visible")
    work = workload(given, inputs.model.config["vocab_size"])
    found = about(given, inputs, work)
    if gpu:
        sizes = inputs.model.config["hidden_size"], inputs.model.config["intermediate_size"]
        found["rates"] = rows.in_child(lambda: measure_rates(*sizes), FOLDER / "rates.log")
        found["roofline_s"] = roofline_s(work, inputs.model, found["rates"])
        print(f"roofline of these lengths: {found['roofline_s']:.2f} s", flush=True)
    if inputs.machine.gpus > 1:
        chosen = decide(command("fast,dp_size=0", given)[0], inputs, work).chosen
        found["fast_chooses"] = {name: chosen.values[name] for name in ("tp_size", "dp_size")}
        found["fast_chooses"]["why"] = chosen.reasons["tp_size"]

    def row_in_child(row: str, number: int) -> dict:
        return rows.in_child(lambda: measure_row(row, given, inputs, work), FOLDER / f"row_{number}.log")

    return rows.measure(list(commands), row_in_child, ratios, found, output)


def about(given: argparse.Namespace, inputs: Inputs, work: Work) -> dict:
    return {
        "workload": {
            "records": len(work),
            "prompt_tokens": sum(len(ids) for ids, _ in work),
            "output_tokens": sum(tokens for _, tokens in work),
            "longest_answer_tokens": max(tokens for _, tokens in work),
            "file_sha256": given.records and hashlib.sha256(Path(given.records).read_bytes()).hexdigest(),
        },
        "config": {name: getattr(given, name) for name in ("limit", "cap", "seed", "engine_args")}
        | {"model": Path(inputs.model.folder).name, "adapter": bool(given.lora_path)},
        "hardware": inputs.machine.gpu_name or f"{len(os.sched_getaffinity(0))} CPU cores",
        "gpus": inputs.machine.gpus,
        "versions": versions(preflight.PACKAGES),
        "commit": commit(),
    }


def ratios(result: dict) -> dict:
    """To the first row's seconds, and that row's to the roofline of one GPU."""
    found = rows.to_first(result)
    if found and "roofline_s" in result:
        found["first_to_roofline"] = result["rows"][0]["seconds"] / result["roofline_s"]
    return {"ratios": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help="see above")
    parser.add_argument("--records", help="JSON array or JSONL: instruction, output_tokens")
    parser.add_argument("--limit", type=int, help="the first records only (0: all; on the CPU 12)")
    parser.add_argument("--cap", type=int, help="max_new_tokens of every request (8192; on the CPU 16)")
    parser.add_argument("--seed", type=int, default=0, help="of drawn prompts and lengths")
    parser.add_argument(
        "--model_path", help="folder (default: Qwen2.5-7B's shape; on the CPU the rehearsal's model)"
    )
    parser.add_argument("--lora_path", help="adapter folder of the row adapter")
    parser.add_argument("--vllm", help="command of a Python that has vLLM")
    parser.add_argument("--engine_args", help='JSON object (default: {"load_format": "dummy"}; on the CPU {})')
    sys.exit(rows.run(measure, parser, RESULT, FOLDER))
