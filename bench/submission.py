"""What one async_generate per record costs against one list call: the same records, one engine, turn about.

    python bench/submission.py [--records 100] [--max_new_tokens 64] [--rounds 7] [--device cpu]

Prints the median of the rounds' ratios with its range and writes bench/results/submission.json. The list call cannot isolate a bad
record, keeps nothing on disk before its end and shows no progress; run_sglang.py does not use it.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "sglang"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from batch_infer import engine as runtime
from batch_infer import preflight, prompts, records
from batch_infer.arguments import REHEARSAL, parse
from batch_infer.planner import Plan
from workbench.files import commit, write_json

RESULT = Path(__file__).resolve().parent / "results" / "submission.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model_path", default="")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine_args", default="{}")
    given = parser.parse_args()

    folder = REHEARSAL / "runs" / "submission"
    words = ["--device", given.device, "--max_new_tokens", str(given.max_new_tokens)]
    words += ["--engine_args", given.engine_args, "--output_file", str(folder / "outputs.jsonl")]
    words += ["--prompts", str(REHEARSAL / "instructions.json")]
    words += ["--model_path", given.model_path] if given.model_path else ["--rehearse"]
    args = parse(words)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(runtime.environment(args))
    machine = runtime.Machine(args.device)
    found = preflight.run(args, machine)
    shipped = found["records"]
    todo = [
        prompts.Record(index, f"{index}. {shipped[index % len(shipped)].instruction}")
        for index in range(given.records)
    ]
    from transformers import AutoTokenizer

    model = found["model"]
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    prompts.prepare(todo, args, tokenizer, runtime.context_tokens(args, model), {None: found["weights_id"]})
    chosen = runtime.choose(args, machine, model, todo)
    engine, _, _ = runtime.start(args, chosen, model.config["architectures"], todo)

    plans = [(todo, Plan.as_given(len(todo)))]

    def list_call() -> float:
        began = time.monotonic()
        engine.generate(
            input_ids=[record.input_ids for record in todo],
            sampling_params=[record.sampling_params(args) for record in todo],
        )
        return time.monotonic() - began

    def one_each() -> float:
        (folder / records.PARTIAL).unlink(missing_ok=True)
        partial = records.PartialFile(folder, {}, {})
        began = time.monotonic()
        engine.loop.run_until_complete(
            runtime.answer_all(engine, plans, args, partial, asyncio.Event(), None, lambda rows: None)
        )
        took = time.monotonic() - began
        partial.close()
        return took

    seconds: dict[str, list[float]] = {"list_call": [], "one_each": []}
    for turn in range(given.rounds + 1):  # the first turn warms up
        order = [("list_call", list_call), ("one_each", one_each)]
        for name, function in order if turn % 2 else reversed(order):
            engine.flush_cache()
            took = function()
            if turn:
                seconds[name].append(took)
    engine.shutdown()
    ratios = sorted(one / every for one, every in zip(seconds["one_each"], seconds["list_call"], strict=True))
    ratio = statistics.median(ratios)
    print(
        f"one each / list call: median {ratio:.3f} of {len(ratios)} rounds ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    result = {
        "ratio_one_each_to_list_call": ratio,
        "ratio_lowest": ratios[0],
        "ratio_highest": ratios[-1],
        "seconds": seconds,
        "config": vars(given),
        "hardware": machine.gpu_name or f"{len(os.sched_getaffinity(0))} CPU cores",
        "versions": preflight.versions(preflight.PACKAGES),
        "commit": commit(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, result)
    print(json.dumps({"ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
