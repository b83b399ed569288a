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
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from batch_infer import ahead, engine_args, generate, order, parity, preflight, prompts, report, start, store
from batch_infer.arguments import Arguments, parse
from batch_infer.engine_args import EngineArgs
from batch_infer.order import Order
from batch_infer.preflight import Inputs
from batch_infer.prompts import Record
from batch_infer.store import PartialFile
from batch_infer.supervise import same_command, supervise
from workbench import UserError
from workbench.files import claim
from workbench.flags import print_given
from workbench.models import load_tokenizer
from workbench.processes import STOPPED, importing, use_short_tmpdir


@dataclass(frozen=True)
class Run:
    """What is decided before the engine starts."""

    args: Arguments
    inputs: Inputs
    records: list[Record]
    part: list[Record]  # of the records, this shard's: all, if there is one
    todo: list[Record]  # of the part, those that have no answer yet
    order: Order
    chosen: EngineArgs


def main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        print_given(argv)
        with claim(args.folder, "--output_file", args.writer):
            if args.overwrite and not store.finished_by(args.folder, args.job):
                store.stored_identity(args.folder)  # raises for files that are not this program's
            elif not args.only_looking:
                store.check_owner(args.folder, args.identity())
                if store.finished(args.folder):
                    store.check_inputs(args.folder, preflight.local_inputs(args))
                    store.remove_partial(args.folder)  # a kill may have left it
                    print(f"{args.folder} holds this run, finished; nothing to do (--overwrite starts anew)")
                    return 0
            return supervise(lambda: job(args), args.folder, args.overwrite, args.place[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def job(args: Arguments) -> int:
    """The work, in a child process; returns the exit code."""
    began = time.monotonic()
    set_up_environment(args)
    waiting = ahead.Ahead()
    with importing():
        inputs = preflight.run(args, lambda machine: ahead.begin(waiting, args, machine))  # read and check
    if args.only_looking:
        print("preflight passed" if args.preflight_only else "model and prompts are in the cache")
        return 0
    os.environ |= inputs.machine.compiler | {"HF_HUB_OFFLINE": "1"}  # preflight has fetched everything
    if args.device == "cuda":
        ahead.read_weights(Path(inputs.model.folder))
    records = tokenise(args, inputs)
    part, partial = order.shard(args, records), store.open_run(args, records, inputs.made_on)
    todo = [record for record in part if not record.error and not partial.done(record)]
    if todo and store.finished(args.folder):
        print(f"another shard has just finished this run in {args.folder}; nothing to do")
        return 0
    report.print_start(args, part, todo)

    run = decide(args, inputs, records, part, todo)
    if args.nodes[0]:
        return start.serve_first_node(run.chosen, waiting)
    this_start = report.ThisStart()
    if todo:
        engine_args.print_choices(run.chosen)
        this_start = answer(run, partial, waiting)
    if this_start is None:
        total, done = sum(not record.error for record in part), sum(map(partial.done, part))
        print(f"stopped: {done} of {total} answers are kept; {same_command(args.overwrite)} goes on from there")
        return STOPPED
    return write(run, partial, this_start, time.monotonic() - began)


def set_up_environment(args: Arguments) -> None:
    """What libraries and the engine's processes read."""
    use_short_tmpdir()
    os.environ |= engine_args.environment(args)
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.device == "cpu" and not os.access(Path.home(), os.W_OK):  # importing FlashInfer makes its folder
        os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", os.environ.get("TMPDIR", "/tmp"))
    report.quiet_libraries(args)


@importing()
def tokenise(args: Arguments, inputs: Inputs) -> list[Record]:
    tokenizer = load_tokenizer(Path(engine_args.tokenizer_folder(args, inputs.model)))
    context = engine_args.context_tokens(args, inputs.model)
    vocab_size, weights = inputs.model.config["vocab_size"], {None: inputs.model.weights_id} | inputs.adapters
    return prompts.tokenise(inputs.records, args, tokenizer, context, vocab_size, weights)


def decide(
    args: Arguments, inputs: Inputs, records: list[Record], part: list[Record], todo: list[Record]
) -> Run:
    """For what is still to answer; where nothing is, for all that was."""
    to_run = todo or [record for record in records if not record.error]
    run_order = order.decide(args, to_run)
    chosen = engine_args.decide(args, inputs.machine, inputs.model, to_run, run_order)
    return Run(args, inputs, records, part, todo, run_order, chosen)


def answer(run: Run, partial: PartialFile, waiting: ahead.Ahead | None = None) -> report.ThisStart | None:
    """Starts the engine and answers `run.todo`. None: a signal stopped it."""
    args, total = run.args, sum(not record.error for record in run.part)
    if args.device == "cuda":
        start.build_kernels(args, run.chosen, run.inputs.model, run.inputs.machine)
    started = start.start(args, run.chosen, run.inputs.model, run.todo, waiting)
    engine, stopped = started.engine, asyncio.Event()
    start.stop_on_signals(engine, stopped)
    pool_tokens = engine.get_server_info()["max_total_num_tokens"]
    parts = order.parts(run.order, run.todo, run.chosen.values["dp_size"], pool_tokens)

    async def work() -> list[dict]:
        base_answers = asyncio.create_task(parity.without_adapter(engine, args, run.todo))
        try:
            with report.progress(total, total - len(run.todo)) as on_rows:
                await generate.answer_all(
                    engine, parts, partial, stopped, on_rows, args.batch_size, run.order.schedule_policy
                )
            return [] if stopped.is_set() else await base_answers
        finally:
            base_answers.cancel()

    try:
        found = parity.check(engine, args, run.chosen.values.get("dtype"))
        began = time.monotonic()
        base_answers = engine.loop.run_until_complete(work())
        generate_s = time.monotonic() - began
    finally:
        engine.shutdown()
    if stopped.is_set():
        return None
    return report.ThisStart(started.load_s, started.compile_s, generate_s, found, base_answers)


def write(run: Run, partial: PartialFile, this_start: report.ThisStart, wall_s: float) -> int:
    """The files and the last lines, if no other shard is still at work; returns the exit code."""
    args = run.args
    fresh = [partial.rows[r.index] for r in run.todo if "output" in partial.rows.get(r.index, {})]
    gpus = run.chosen.values["dp_size"] * run.chosen.values["tp_size"]
    of_start = report.rates(fresh, this_start, run.inputs, gpus) | {"wall_s": wall_s}
    partial.close(args.shard, of_start if run.todo else None)
    partial.read()  # what other shards have by now
    code = 0 if all(map(partial.done, run.part)) else 3
    left = sum(not record.error and record.index not in partial.rows for record in run.records)
    if left:
        if store.finished(args.folder):
            print(f"another shard has written the files in {args.folder}")
        else:
            print(
                f"shard {args.shard}: done; {left} records of others are left, and who ends last writes the files"
            )
        return code
    store.export(args, run.records, partial.rows)
    of_shards = {shard: start for shard, start in partial.starts.items() if shard.endswith(f"/{args.place[1]}")}
    of_start = report.together(of_shards or {args.shard: of_start})
    summary = report.finish(args, run.inputs, run.chosen, run.records, partial, of_start)
    if not summary["failed_records"]:
        partial.remove()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
