"""What a decoding step is made of: its time, and that of its kernels by kind, for several numbers of running records.

    python bench/step_profile.py fast fast,tp_size=2
    python bench/step_profile.py fast --running 4 --device cpu      # tries the script, without the profiler

Rows are those of offline_throughput.py that run_sglang.py answers, with random weights of Qwen2.5-7B's shape. For each
number of `--running` as many records of `--context` prompt tokens, all of them in the radix tree, decode together.
`step_s` is taken without the profiler; then SGLang's own (torch.profiler), which slows the host, sees some 16 steps of the
first GPU. `none` is the time in which no kernel ran, "sums over GPUs" also that in which one GPU waits for the other.
`all_steps_s` adds up the steps of offline_throughput.py's records; between the numbers measured in a straight line.
"""

import argparse
import functools
import gzip
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import numpy
import offline_throughput as bench
import rows
import run_sglang
import shapes

from batch_infer import preflight, start
from batch_infer.preflight import PACKAGES, Inputs
from batch_infer.prompts import Record
from workbench import UserError
from workbench.files import commit
from workbench.machine import versions

FOLDER = bench.REHEARSAL / "runs" / "step_profile"
RESULT = bench.RESULT.with_name("step_profile.json")
STEPS = 16
# Kinds of kernels by their names, the first that matches; the others are elementwise.
KINDS = {
    "sums over GPUs": "all_?reduce|nccl|cross_device",
    "norms": "[Nn]orm",
    "attention": "[Pp]refill|[Dd]ecode|[Mm]ergeState|VariableLengthMerge|fmha",
    "matrix products": "gemm|gemv|nvjet|cutlass|splitK",
    "copies": "[Mm]emcpy|[Mm]emset",
    "drawing": "^draw$",
}


def measure_row(row: str, given: argparse.Namespace, inputs: Inputs, lengths: list[int]) -> dict:
    """An entry of `by_running` for each number; `lengths` (tokens) of answers whose steps are added up."""
    args, environment = bench.command(row, given)
    bench.set_up_environment(args, inputs, environment)
    vocab_size = inputs.model.config["vocab_size"]
    texts = ["x" * 4 * given.context + str(index) for index in range(max(given.running))]
    prompts = [bench.prompt_ids(text, vocab_size)[-given.context :] for text in texts]
    run = bench.decide(args, inputs, [(ids, 5 * STEPS) for ids in prompts])
    started = start.start(args, run.chosen, inputs.model, run.todo)
    found = {}
    for running in given.running:
        folder = FOLDER / f"{run.chosen.values['tp_size']}_{running}"
        shutil.rmtree(folder, ignore_errors=True)
        generate = functools.partial(answer_s, started.engine, run.todo[:running])
        generate(1)  # the prompts are in the tree from here on
        short_s, long_s = (min(generate(steps) for _ in range(3)) for steps in (STEPS, 5 * STEPS))
        found[running] = {"step_s": (long_s - short_s) / (4 * STEPS)}
        if args.device == "cuda":
            started.engine.start_profile(
                output_dir=str(folder),
                num_steps=STEPS,
                activities=["GPU"],
                profile_by_stage=True,
                with_stack=False,
            )
            generate(3 * STEPS)
            found[running] |= by_kind(next(folder.glob("*TP-0*DECODE*")))
    started.engine.shutdown()
    return {
        "by_running": found,
        "all_steps_s": all_steps_s(found, lengths),
        "engine_args": {k: run.chosen.values[k] for k in ("tp_size", "dp_size")},
    }


def all_steps_s(by_running: dict[int, dict], lengths: list[int]) -> dict[str, float]:
    """Seconds of all steps, and of their kernels by kind, in which answers of these `lengths` (tokens) begin together."""
    running, known = [sum(n > step for n in lengths) for step in range(max(lengths))], sorted(by_running)
    seen = {n: {"step": by_running[n]["step_s"]} | by_running[n].get("gpu_s", {}) for n in known}
    kinds = sorted({kind for found in seen.values() for kind in found} - {"none"})
    return {kind: sum(numpy.interp(running, known, [seen[n].get(kind, 0.0) for n in known])) for kind in kinds}


def answer_s(engine, records: list[Record], tokens: int) -> float:
    """Seconds in which each of the `records` is answered with as many `tokens`."""
    params = [record.sampling_params | {"max_new_tokens": tokens, "custom_params": None} for record in records]
    prompts = [record.input_ids for record in records]
    began = time.monotonic()
    engine.generate(input_ids=prompts, sampling_params=[own | {"ignore_eos": True} for own in params])
    return time.monotonic() - began


def by_kind(trace: Path) -> dict:
    """Of SGLang's file, seconds a step: each ends as its tokens are drawn."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    drawn = [end for _, end, name in spans if name == "draw"]
    steps = len(drawn) - 1
    spans = [span for span in spans if drawn[0] < span[1] <= drawn[-1]]
    kinds, busy_s = rows.by_kind(spans, KINDS)
    names = Counter()
    for begin, end, name in spans:
        names[name[:90]] += (end - begin) / steps / 1e6
    profiled_s = (drawn[-1] - drawn[0]) / steps / 1e6
    return {
        "profiled_s": profiled_s,
        "gpu_s": {kind: took / steps for kind, took in kinds.items()} | {"none": profiled_s - busy_s / steps},
        "longest_kernels_s": dict(names.most_common(12)),
    }


def measure(given: argparse.Namespace, output: Path) -> dict:
    gpu = given.device == "cuda"
    given.lora_path = given.model_path = None
    given.limit, given.seed = 0, 0
    given.cap, given.engine_args = 8192 if gpu else 64, '{"load_format": "dummy"}' if gpu else "{}"
    for folder in (FOLDER, bench.FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    if gpu:
        given.model_path = str(shapes.build("qwen2.5-7b", FOLDER / "qwen2.5-7b-shape", weights=False))
    if min(given.running) < 1:
        raise UserError(f"--running {min(given.running)}: must be at least 1")
    for row in given.rows:
        bench.command(row, given)
        if row.startswith(("vllm", "sglang", "batches")):
            raise UserError(f"{row}: only rows that run_sglang.py answers are profiled")
    first = bench.command(given.rows[0], given)[0]
    run_sglang.set_up_environment(first)
    inputs = preflight.run(first)
    lengths = [tokens for _, tokens in bench.workload(given, inputs.model.config["vocab_size"])]
    about = {"hardware": inputs.machine.gpu_name, "gpus": inputs.machine.gpus, "context": given.context}
    about |= {"model": Path(inputs.model.folder).name, "versions": versions(PACKAGES), "commit": commit()}

    def row_in_child(row: str, number: int) -> dict:
        return rows.in_child(lambda: measure_row(row, given, inputs, lengths), FOLDER / f"row_{number}.log")

    return rows.measure(given.rows, row_in_child, lambda result: {"ratios": {}}, about, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="row", help="see above")
    parser.add_argument("--running", type=int, nargs="+", default=[800, 400, 100, 8])
    parser.add_argument("--records", help="as offline_throughput.py's")
    parser.add_argument("--context", type=int, default=400, help="tokens of each prompt")
    sys.exit(rows.run(measure, parser, RESULT, FOLDER))
