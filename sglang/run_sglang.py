"""Answers the 805 AlpacaEval instructions with Qwen2.5-7B-Instruct on the SGLang Runtime.

    python sglang/run_sglang.py                # the assignment, on every visible GPU
    python sglang/run_sglang.py --rehearse     # the same on a CPU: tiny model, shipped instructions

    arguments -> preflight -> token ids -> engine -> every record in flight -> files

A light parent process claims the output folder and waits; its child does the work, because a dying engine
kills its process without an exception. Exit codes: 0 done, 1 a bug, 2 the input or the machine, 3 finished
and some records failed, 75 stopped and resumable.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from batch_infer import engine as runtime
from batch_infer import preflight, prompts, report
from batch_infer import records as files
from batch_infer.arguments import Arguments, parse
from workbench import UserError
from workbench.files import claim, commit, disk_full

STOPPED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        with claim(args.folder, "--output_file"):
            if args.overwrite:
                files.stored_identity(args.folder)  # raises for files that are not this program's
            elif not (args.preflight_only or args.download_only):
                files.check_owner(args.folder, args.identity())
                if files.finished(args.folder):
                    files.check_inputs(args.folder, preflight.local_inputs(args))
                    print(f"{args.folder} holds this run, finished; nothing to do (--overwrite starts anew)")
                    return 0
            return supervise(lambda: job(args), args.folder, args.overwrite)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def supervise(function: Callable[[], int], folder: Path, overwrite: bool) -> int:
    """Runs `function` in a child and returns its exit code. If the child was killed, says what is kept:
    75 if this start has gained answers, else 1 (the same command would die again)."""
    partial = folder / files.PARTIAL
    before = 0 if overwrite else files.count_answers(partial)
    parent, stops = os.getpid(), []
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run_child(function, folder, parent)

    def pass_on(number: int, _) -> None:
        stops.append(number)
        os.kill(pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a killed job may have left
    if code >= 0:
        return code
    kept = files.count_answers(partial)
    command = "the same command without --overwrite" if overwrite else "the same command"
    where = f"{kept} answers are kept; {command} goes on from there"
    if stops:
        print(f"stopped: {where}")
        return STOPPED
    name = signal.Signals(-code).name
    print(f"error: the engine's process was ended by {name}, see the lines above; {where}", file=sys.stderr)
    return STOPPED if kept > before else 1


def _run_child(function: Callable[[], int], folder: Path, parent: int) -> None:
    code = 1
    try:
        ctypes.CDLL(None).prctl(runtime.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)  # Ctrl-C reaches the parent only, which passes it on: the engine must not see it
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        code = function() if os.getppid() == parent else STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException as error:
        if isinstance(error, Exception) and disk_full(error, folder):
            print(f"error: the disk or quota of {folder} is full; free some and run it again", file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def job(args: Arguments) -> int:
    """The work, in the child."""
    began = time.monotonic()
    os.environ.update(runtime.environment(args))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report.quiet_libraries(args)
    machine = runtime.Machine(args.device)
    found = preflight.run(args, machine)
    if args.preflight_only or args.download_only:
        print("preflight passed" if args.preflight_only else "model and prompts are in the cache")
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"  # preflight has fetched everything
    from transformers import AutoTokenizer

    records, model = found["records"], found["model"]
    own_tokenizer = args.lora_path and (Path(args.lora_path) / "tokenizer_config.json").exists()
    tokenizer_folder = args.lora_path if own_tokenizer else model.folder
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    weights = {None: found["weights_id"]} | found["adapters"]
    prompts.prepare(records, args, tokenizer, runtime.context_tokens(args, model), weights)
    chosen = runtime.choose(args, machine, model, records)
    chosen["tokenizer_path"] = (tokenizer_folder, "the adapter's" if own_tokenizer else "")

    if args.own_engine_args:
        runtime.check_overrides(args)
    if args.overwrite:
        files.clear(Path(args.output_file))
    partial = files.PartialFile(args.folder, args.identity(), report.machine_of(args, machine))
    if len(partial.machines) > 1:
        print(f"WARNING: begun elsewhere, bytes are no one machine's: {partial.machines}")
    bad = [record for record in records if record.error]
    partial.append([files.failure_row(record, record.error) for record in bad])
    todo = [record for record in records if not record.error and not partial.done(record)]
    report.print_start(records, bad, todo)
    times = {"load_s": 0.0, "compile_s": 0.0, "generate_s": 0.0}
    if todo:
        runtime.print_choices(chosen)
        architectures = model.config.get("architectures") or []
        code = generate(args, chosen, architectures, todo, len(records) - len(bad), partial, times)
        if code:
            return code
    summary = files.summarise(records, partial.rows)
    if todo or not (args.folder / files.SUMMARY).exists():
        gpus = chosen["dp_size"][0] * chosen["tp_size"][0]
        summary |= report.measures(partial.rows, todo, times, machine, model, gpus)
        summary["wall_s"] = time.monotonic() - began
    else:  # nothing was generated: the times are those of the start before
        summary = files.stored_summary(args.folder) | summary
    summary["settings"] = report.settings(args, machine, found, chosen, partial.machines) | {"commit": commit()}
    files.export(Path(args.output_file), records, partial.rows, Path(args.model_path).name)
    report.plot_lengths(args, records, partial.rows)
    files.write_summary(args.folder, summary)
    partial.close()
    if not summary["failed_records"]:
        partial.remove()
    report.print_end(args, summary, runtime.serve_line(args, machine, chosen))
    return 3 if summary["failed_records"] else 0


def generate(
    args: Arguments, chosen: dict, architectures: list, todo: list, total: int, partial, times: dict
) -> int:
    """Starts the engine and answers `todo`; fills `times`. Returns 0, or 75 after a stop signal."""
    engine, times["load_s"], times["compile_s"] = runtime.start(args, chosen, architectures, todo)
    loop, stopped = engine.loop, asyncio.Event()
    # SGLang installs its own handlers with its first request; ours must come later.
    loop.run_until_complete(_create_handlers(engine))
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGQUIT, runtime.end_at_once)
    limit = runtime.WAITING_FOR_LPM if chosen["schedule_policy"][0] == "lpm" else None
    pool_tokens = engine.get_server_info()["max_total_num_tokens"]
    began = time.monotonic()
    plans = runtime.plan(args, todo, chosen["dp_size"][0], pool_tokens)
    try:
        with report.progress(total, total - len(todo)) as on_rows:
            loop.run_until_complete(runtime.answer_all(engine, plans, args, partial, stopped, limit, on_rows))
        times["generate_s"] = time.monotonic() - began
    finally:
        engine.shutdown()
    if stopped.is_set():
        done = sum("error" not in row for row in partial.rows.values())
        command = "the same command without --overwrite" if args.overwrite else "the same command"
        print(f"stopped: {done} of {total} answers are kept; {command} goes on from there")
        return STOPPED
    return 0


async def _create_handlers(engine) -> None:
    engine.tokenizer_manager.auto_create_handle_loop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
