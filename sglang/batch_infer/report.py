"""What people see: progress, the last ten lines, lengths.png, and the measures of summary.json."""

import contextlib
import hashlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from workbench.machine import versions

from .arguments import Arguments
from .engine import Choices, Machine, Model, environment
from .preflight import PACKAGES
from .prompts import Record
from .records import ALL, LENGTHS, PARTIAL, SUMMARY


def quiet_libraries(args: Arguments) -> None:
    """Switches off warnings about formats and devices that this run does not use; SGLang's spawned processes
    inherit the variables."""
    kinds = ("UserWarning", "SyntaxWarning", "FutureWarning", "DeprecationWarning")
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore::{kind}" for kind in kinds))
    warnings.simplefilter("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)  # it explains the arguments that we have just explained
    if args.device == "cpu":
        os.environ.setdefault("TORCH_LOGS", "-torch.utils.cpp_extension")  # "No CUDA runtime is found"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which looks for a GPU


def print_start(records: list[Record], bad: list[Record], todo: list[Record]) -> None:
    kept = len(records) - len(bad) - len(todo)
    tokens = sum(len(record.input_ids) for record in todo)
    print(
        f"records      {len(todo)} to answer with {tokens:,} prompt tokens"
        + (f", {kept} already answered" if kept else "")
        + (f", {len(bad)} cannot be answered" if bad else "")
    )
    for record in bad[:5]:
        print(f"  record {record.index}: {record.error}")


@contextlib.contextmanager
def progress(total: int, done: int):
    """A bar over records; yields the function that takes finished rows."""
    from tqdm import tqdm

    tokens, began = 0, time.monotonic()
    interactive = sys.stderr.isatty()
    with tqdm(
        total=total, initial=done, unit=" records", mininterval=0.2 if interactive else 10, dynamic_ncols=True
    ) as bar:

        def on_rows(rows: list[dict]) -> None:
            nonlocal tokens
            tokens += sum(row.get("output_tokens", 0) for row in rows)
            rate = tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(rows))

        yield on_rows


def decode_steps(lengths: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(running records, tokens of their KV) in each step, if all (prompt, answer) token counts start together."""
    running, prompt_tokens, ended = len(lengths), sum(prompt for prompt, _ in lengths), 0
    by_answer = sorted(lengths, key=lambda pair: pair[1])
    for step in range(by_answer[-1][1]):
        while by_answer[ended][1] <= step:
            running, prompt_tokens, ended = running - 1, prompt_tokens - by_answer[ended][0], ended + 1
        yield running, prompt_tokens + running * step


def roofline_s(lengths: list[tuple[int, int]], model: Model, machine: Machine, gpus: int = 1) -> float | None:
    """Least seconds for these (prompt, answer) token counts with everything in flight, on `gpus` GPUs.

    A decode step takes at least the larger of its bytes (weights without the gathered input embedding, and
    the KV of every running record) over the memory's peak rate, and 2 FLOPs per weight and running record
    over the peak rate of the tensor cores (roofline model: Williams, Waterman, Patterson 2009). None where
    either rate is unknown, as on a CPU.
    """
    if not (machine.bandwidth and machine.flops and lengths):
        return None
    seconds = 0.0
    for running, kv_tokens in decode_steps(lengths):
        moved = model.streamed_bytes + kv_tokens * model.kv_bytes_per_token
        seconds += max(moved / machine.bandwidth, model.streamed_bytes * running / machine.flops)
    return seconds / gpus


def measures(
    rows: dict[int, dict], todo: list[Record], times: dict, machine: Machine, model: Model, gpus: int
) -> dict:
    """Times and rates of this start (the counts of summary.json are over all starts of the run)."""
    fresh = [rows[record.index] for record in todo if "output" in rows.get(record.index, {})]
    tokens = sum(row["output_tokens"] for row in fresh)
    least_s = roofline_s([(row["prompt_tokens"], row["output_tokens"]) for row in fresh], model, machine, gpus)
    return times | {
        "answered_in_this_start": len(fresh),
        "tokens_per_s": tokens / times["generate_s"] if times["generate_s"] else None,
        "roofline_share": least_s / times["generate_s"] if least_s and times["generate_s"] else None,
    }


def machine_of(args: Arguments, machine: Machine) -> dict:
    """What bytes depend on beside the command: GPU or instruction set, the lock, and on GPUs our own sampler."""
    import torch

    lock = Path(__file__).resolve().parents[2] / "requirements.txt"
    own = {}
    if args.device == "cuda":
        import runtime_plugins

        files = [
            Path(runtime_plugins.__file__).with_name(name)
            for name in ("fused_norm.py", "lean_sampler.py", "seeded_top_p.py")
        ]
        own["kernels_sha256"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return own | {
        "gpu_name": machine.gpu_name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if args.device == "cpu" else None,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
    }


def settings(args: Arguments, machine: Machine, found: dict, chosen: Choices, machines: list[dict]) -> dict:
    """Everything that an equal run needs to have equal. `machines`: of all starts of this run."""
    # A jump depends on what runs beside it, and where the text is tokenised otherwise the answer changes.
    profile = "reproducible" if args.reproducible and not args.jump_forward else "fast"
    return machine_of(args, machine) | {
        "identity": args.identity(),
        "profile": profile if len(machines) < 2 else "mixed",
        "machines": machines,
        "arguments": vars(args),
        "engine_args": {name: value for name, (value, _) in chosen.items()},
        "environment": environment(args),
        "gpus": machine.gpus,
        "versions": versions(PACKAGES),
        "model_revision": found["revision"],
        "weights_id": found["weights_id"],
        "adapters": found["adapters"],
        "adapter_id": found["adapters"].get(args.lora_path),
        "prompts_sha256": found["prompts_sha256"],
        "prompts_revision": found["prompts_revision"],
        "seed": args.seed,
    }


def plot_lengths(args: Arguments, records: list[Record], rows: dict[int, dict]) -> None:
    """lengths.png: how long the answers are, and how many were cut by the cap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    answered = [rows[r.index] for r in records if "output" in rows.get(r.index, {})]
    if not answered:
        return
    ended = [row["output_tokens"] for row in answered if row["finish_reason"] != "length"]
    cut = [row["output_tokens"] for row in answered if row["finish_reason"] == "length"]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    longest = max(row["output_tokens"] for row in answered)
    labels = [f"ended by themselves ({len(ended)})", f"cut ({len(cut)})"]
    axis.hist([ended, cut], bins=40, range=(0, longest * 1.02), stacked=True, label=labels, color=["C0", "C3"])
    if longest > 0.5 * args.max_new_tokens:
        axis.axvline(args.max_new_tokens, color="C3", linestyle="--", label=f"cap ({args.max_new_tokens})")
    axis.set(xlabel="answer length [tokens]", ylabel="records", title=f"{len(answered)} answers")
    axis.legend()
    figure.savefig(args.folder / LENGTHS, dpi=120)
    plt.close(figure)


def print_end(args: Arguments, summary: dict, serve_line: str) -> None:
    def share(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.1%}"

    if summary["answered_in_this_start"]:
        compiled = f", {summary['compile_s']:.0f} s compiling kernels" if summary["compile_s"] else ""
        print(
            f"time         {summary['load_s']:.0f} s to load{compiled}, {summary['generate_s']:.1f} s to generate"
        )
        roof = (
            "" if summary["roofline_share"] is None else f", {share(summary['roofline_share'])} of the roofline"
        )
        print(f"throughput   {summary['tokens_per_s']:,.0f} tokens/s{roof}")
    print(
        f"tokens       {summary['output_tokens']:,} in {summary['records'] - summary['failed_records']} answers"
    )
    print(
        f"prefix       {share(summary['prefix_hit_rate'])} of {summary['prompt_tokens']:,} prompt tokens came from the "
        f"radix tree (optimum {share(summary['optimum_hit_rate'])}), {summary['computed_prompt_tokens']:,} were computed"
    )
    if args.jump_forward:
        print(f"jumps        {summary['jumps']:,} with {summary['forced_tokens']:,} forced tokens")
    print(f"cap          {share(summary['cap_hit_share'])} of the answers were cut")
    profile = summary["settings"]["profile"]
    promise = {
        "reproducible": "the same command gives the same bytes",
        "fast": "two runs differ",
        "mixed": "begun on another machine or lock; start anew for bytes",
    }[profile]
    if summary["retracted_records"]:
        # Their last tokens were computed by decoding, then again by prefilling: on a GPU by another kernel.
        again = f"{summary['retracted_records']} records were computed again because the KV pool was full"
        as_promised = args.device == "cpu" or profile == "fast"
        promise += f"; {again}" if as_promised else f", but {again} and may differ: --max_running_requests"
    print(f"profile      {profile}: {promise}")
    print(f"answers      {args.output_file} (every 10th)")
    print(f"all          {args.folder / ALL}; {SUMMARY}, {LENGTHS} beside it")
    if summary["failed_records"]:
        print(
            f"FAILED       {summary['failed_records']} records; the same command tries them again ({PARTIAL})"
        )
        for failure in summary["failures"][:5]:
            print(f"  record {failure['index']}: {failure['reason']}")
    print(f"serve        {serve_line}")
