"""Answers the 805 AlpacaEval instructions with Qwen2.5-7B-Instruct on the SGLang Runtime.

    python sglang/run_sglang.py                # the assignment, on every visible GPU
    python sglang/run_sglang.py --rehearse     # the same on a CPU: tiny model, shipped instructions

    read -> check -> decide -> start -> answer -> write

Exit codes: 0 done, 1 a bug, 2 the input or the machine, 3 finished and some records failed, 75 stopped and
resumable.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from batch_infer import engine_args, generate, order, preflight, prompts, report, start, store
from batch_infer.arguments import Arguments, parse
from batch_infer.engine_args import EngineArgs
from batch_infer.order import Order
from batch_infer.preflight import Inputs
from batch_infer.prompts import Record
from batch_infer.store import PartialFile
from batch_infer.supervise import same_command, supervise
from workbench import UserError
from workbench.files import claim
from workbench.processes import STOPPED


def main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        with claim(args.folder, "--output_file"):
            if args.overwrite:
                store.stored_identity(args.folder)  # raises for files that are not this program's
            elif not args.only_looking:
                store.check_owner(args.folder, args.identity())
                if store.finished(args.folder):
                    store.check_inputs(args.folder, preflight.local_inputs(args))
                    print(f"{args.folder} holds this run, finished; nothing to do (--overwrite starts anew)")
                    return 0
            return supervise(lambda: job(args), args.folder, args.overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def job(args: Arguments) -> int:
    """The work, in a child process; returns the exit code."""
    began = time.monotonic()
    set_up_environment(args)
    inputs = preflight.run(args)  # read and check
    if args.only_looking:
        print("preflight passed" if args.preflight_only else "model and prompts are in the cache")
        return 0
    os.environ |= inputs.machine.compiler | {"HF_HUB_OFFLINE": "1"}  # preflight has fetched everything
    records = tokenise(args, inputs)
    partial, todo = store.open_run(args, records, inputs.made_on)
    report.print_start(records, todo)

    to_run = todo or [record for record in records if not record.error]
    run_order = order.decide(args, to_run)
    chosen = engine_args.decide(args, inputs.machine, inputs.model, to_run, run_order)
    stopped, times = False, report.Times()
    if todo:
        engine_args.print_choices(chosen)
        total = sum(not record.error for record in records)
        stopped, times = answer(args, inputs, chosen, run_order, todo, partial, total)
    if stopped:
        done = sum("error" not in row for row in partial.rows.values())
        print(f"stopped: {done} of {total} answers are kept; {same_command(args.overwrite)} goes on from there")
        return STOPPED
    return write(args, inputs, chosen, records, todo, partial, times, began)


def set_up_environment(args: Arguments) -> None:
    """What libraries and the engine's processes read."""
    os.environ |= engine_args.environment(args)
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report.quiet_libraries(args)


def tokenise(args: Arguments, inputs: Inputs) -> list[Record]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine_args.tokenizer_folder(args, inputs.model))
    context = engine_args.context_tokens(args, inputs.model)
    weights = {None: inputs.model.weights_id} | inputs.adapters
    return prompts.tokenise(inputs.records, args, tokenizer, context, weights)


def answer(
    args: Arguments,
    inputs: Inputs,
    chosen: EngineArgs,
    run_order: Order,
    todo: list[Record],
    partial: PartialFile,
    total: int,
) -> tuple[bool, report.Times]:
    """Starts the engine and answers `todo`. Returns whether a signal stopped it, and the times."""
    started = start.start(args, chosen, inputs.model, todo)
    engine, stopped = started.engine, asyncio.Event()
    start.stop_on_signals(engine, stopped)
    began = time.monotonic()
    pool_tokens = engine.get_server_info()["max_total_num_tokens"]
    parts = order.parts(run_order, todo, chosen.values["dp_size"], pool_tokens)
    try:
        with report.progress(total, total - len(todo)) as on_rows:
            work = generate.answer_all(
                engine, parts, partial, stopped, on_rows, args.batch_size, run_order.schedule_policy
            )
            engine.loop.run_until_complete(work)
        generate_s = time.monotonic() - began
    finally:
        engine.shutdown()
    return stopped.is_set(), report.Times(started.load_s, started.compile_s, generate_s)


def write(
    args: Arguments,
    inputs: Inputs,
    chosen: EngineArgs,
    records: list[Record],
    todo: list[Record],
    partial: PartialFile,
    times: report.Times,
    began: float,
) -> int:
    """The files and the last lines; returns the exit code."""
    store.export(Path(args.output_file), records, partial.rows, Path(args.model_path).name)
    if todo or not (args.folder / store.SUMMARY).exists():
        fresh = [partial.rows[r.index] for r in todo if "output" in partial.rows.get(r.index, {})]
        gpus = chosen.values["dp_size"] * chosen.values["tp_size"]
        of_start = report.rates(fresh, times, inputs, gpus) | {"wall_s": time.monotonic() - began}
    else:  # nothing was generated: the times are those of the start before
        of_start = store.stored_summary(args.folder)
    summary = report.finish(args, inputs, chosen, records, partial, of_start)
    partial.close()
    if not summary["failed_records"]:
        partial.remove()
    return 3 if summary["failed_records"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
