"""What people see: progress, summary.json, lengths.png and the last ten lines."""

import contextlib
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from workbench.files import commit, write_json
from workbench.machine import versions

from .arguments import Arguments
from .engine_args import EngineArgs
from .machine import Machine
from .model import Model
from .order import optimum_cached_tokens
from .parity import Parity
from .preflight import PACKAGES, Inputs
from .prompts import Record
from .store import ALL, LENGTHS, SUMMARY, PartialFile, slurm_job


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


def print_start(args: Arguments, records: list[Record], todo: list[Record]) -> None:
    if args.place[1] > 1:
        print(f"shard        {args.shard}: {len(records)} records")
    bad = [record for record in records if record.error]
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
    interval_s = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=total, initial=done, unit=" records", mininterval=interval_s, dynamic_ncols=True) as bar:

        def on_rows(rows: list[dict]) -> None:
            nonlocal tokens
            tokens += sum(row.get("output_tokens", 0) for row in rows)
            rate = tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(rows))

        yield on_rows


# --- how fast it could be -----------------------------------------------------------------------------


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


SECONDS = ("load_s", "compile_s", "generate_s", "wall_s")  # of a start, as `rates` and run_sglang.py name them


# --- summary.json -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThisStart:
    """What is known once all is answered and no other start of this run would tell."""

    load_s: float = 0.0
    compile_s: float = 0.0
    generate_s: float = 0.0
    parity: Parity | None = None
    without_adapter: list[dict] = field(default_factory=list)  # the base's answers to some prompts


def counts(records: list[Record], rows: dict[int, dict]) -> dict:
    """Over all records of all starts of this run."""
    answered = [rows[r.index] for r in records if "output" in rows.get(r.index, {})]
    failures = [
        {"index": r.index, "reason": rows.get(r.index, {}).get("error") or r.error or "not answered"}
        for r in records
        if "output" not in rows.get(r.index, {})
    ]
    prompt_tokens = sum(row["prompt_tokens"] for row in answered)
    cached = sum(row["cached_tokens"] for row in answered)
    by_adapter: dict[str | None, list] = {}
    for r in records:
        if "output" in rows.get(r.index, {}):
            by_adapter.setdefault(r.lora, []).append((r.input_ids, rows[r.index]["output_ids"]))
    optimum = sum(optimum_cached_tokens([requests]) for requests in by_adapter.values())
    as_asked = {r.index for r in records if "max_new_tokens" in r.own}
    truncated = [
        row["index"] for row in answered if row["finish_reason"] == "length" and row["index"] not in as_asked
    ]
    forced_runs = [tokens for row in answered for tokens in row.get("forced_runs", ())]
    return {
        "records": len(records),
        "failed_records": len(failures),
        "failures": failures,
        "truncated": truncated,
        "prompt_tokens": prompt_tokens,
        "cached_prompt_tokens": cached,
        "computed_prompt_tokens": prompt_tokens - cached,
        "prefix_hit_rate": cached / prompt_tokens if prompt_tokens else None,
        "optimum_hit_rate": optimum / prompt_tokens if prompt_tokens else None,
        "output_tokens": sum(row["output_tokens"] for row in answered),
        "retracted_records": sum(row.get("retractions", 0) > 0 for row in answered),
        "jumps": len(forced_runs),
        "forced_tokens": sum(forced_runs),
        "cap_hit_share": len(truncated) / len(answered) if answered else None,
    }


def rates(rows: list[dict], start: ThisStart, inputs: Inputs, gpus: int) -> dict:
    """What is of this start, which gave the `rows`, and its rates."""
    tokens = sum(row["output_tokens"] for row in rows)
    lengths = [(row["prompt_tokens"], row["output_tokens"]) for row in rows]
    least_s = roofline_s(lengths, inputs.model, inputs.machine, gpus)
    return asdict(start) | {
        "answered_in_this_start": len(rows),
        "tokens_per_s": tokens / start.generate_s if start.generate_s else None,
        "roofline_share": least_s / start.generate_s if least_s and start.generate_s else None,
    }


def together(starts: dict[str, dict]) -> dict:
    """What `rates` gave for each shard, as if they had run side by side: the slowest one's seconds, all answers."""
    *_, last = starts.values()
    if len(starts) == 1:
        return last
    found = {name: max(start[name] for start in starts.values()) for name in SECONDS}
    found["answered_in_this_start"] = sum(start["answered_in_this_start"] for start in starts.values())
    for name, gpus in (("tokens_per_s", 1), ("roofline_share", len(starts))):
        weighted = sum((start[name] or 0) * start["generate_s"] for start in starts.values())
        found[name] = weighted / found["generate_s"] / gpus if weighted else None
    shards = [{"shard": shard} | {name: start[name] for name in found} for shard, start in starts.items()]
    return last | found | {"shards": shards}


def settings(args: Arguments, inputs: Inputs, chosen: EngineArgs, machines: list[dict]) -> dict:
    """Everything that an equal run needs to have equal. `machines`: of all starts of this run."""
    # A jump depends on what runs beside it, and where the text is tokenised otherwise the answer changes.
    profile = "reproducible" if args.reproducible and not args.jump_forward else "fast"
    return inputs.made_on | {
        "identity": args.identity(),
        "job": slurm_job(),
        "profile": profile if len(machines) < 2 else "mixed",
        "machines": machines,
        "arguments": asdict(args),
        "engine_args": chosen.values,
        "environment": chosen.environment,
        "gpus": inputs.machine.gpus,
        "versions": versions(PACKAGES),
        "model_revision": inputs.model.revision,
        "weights_id": inputs.model.weights_id,
        "adapters": inputs.adapters,
        "adapter_id": inputs.adapters.get(args.lora_path),
        "prompts_sha256": inputs.prompts_sha256,
        "prompts_revision": inputs.prompts_revision,
        "seed": args.seed,
        "commit": commit(),
    }


def finish(
    args: Arguments,
    inputs: Inputs,
    chosen: EngineArgs,
    records: list[Record],
    partial: PartialFile,
    of_start: dict,
) -> dict:
    """Writes lengths.png and, last of all, summary.json; prints the last lines; returns the summary. `of_start`:
    from `rates`."""
    found = settings(args, inputs, chosen, partial.machines)
    summary = of_start | counts(records, partial.rows) | {"settings": found}
    for row in summary["without_adapter"]:
        row["with_adapter"] = partial.rows.get(row["index"], {}).get("output")
    plot_lengths(args, records, partial.rows)
    write_json(args.folder / SUMMARY, summary, args.writer)
    print_end(args, summary, chosen.serve_line)
    return summary


# --- the end ------------------------------------------------------------------------------------------


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
    temporary = args.folder / f"{LENGTHS}{args.writer}.tmp"  # another shard may end now, too
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(args.folder / LENGTHS)
    plt.close(figure)


def one_line(text: str) -> str:
    return textwrap.shorten(text, 240, placeholder=" ...")


def share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def promise(args: Arguments, summary: dict) -> str:
    """What the profile says about the bytes."""
    profile = summary["settings"]["profile"]
    text = {
        "reproducible": "the same command gives the same bytes",
        "fast": "two runs differ",
        "mixed": "begun on another machine or lock; start anew for bytes",
    }[profile]
    if not summary["retracted_records"]:
        return text
    # Their last tokens were computed by decoding, then again by prefilling: on a GPU by another kernel.
    again = f"{summary['retracted_records']} records were computed again because the KV pool was full"
    if args.device == "cpu" or profile == "fast":
        return f"{text}; {again}"
    return f"{text}, but {again} and may differ: --max_running_requests"


def print_end(args: Arguments, summary: dict, serve_line: str) -> None:
    lines = []
    if summary["answered_in_this_start"]:
        compiled = f", {summary['compile_s']:.0f} s compiling kernels" if summary["compile_s"] else ""
        roof = summary["roofline_share"]
        lines += [
            f"time         {summary['load_s']:.0f} s to load{compiled}, {summary['generate_s']:.1f} s to generate",
            f"throughput   {summary['tokens_per_s']:,.0f} tokens/s"
            + ("" if roof is None else f", {share(roof)} of the roofline"),
        ]
    lines += [
        f"tokens       {summary['output_tokens']:,} in {summary['records'] - summary['failed_records']} answers",
        f"prefix       {share(summary['prefix_hit_rate'])} of {summary['prompt_tokens']:,} prompt tokens came from the "
        f"radix tree (optimum {share(summary['optimum_hit_rate'])}), {summary['computed_prompt_tokens']:,} were computed",
    ]
    for row in summary["without_adapter"]:
        lines += [
            f"prompt       {one_line(row['instruction'])}",
            f"  base       {one_line(row['output'])}",
            f"  adapter    {one_line(row['with_adapter'] or 'failed')}",
        ]
    if args.jump_forward:
        lines.append(f"jumps        {summary['jumps']:,} with {summary['forced_tokens']:,} forced tokens")
    lines += [
        f"cap          {share(summary['cap_hit_share'])} of the answers were cut",
        f"profile      {summary['settings']['profile']}: {promise(args, summary)}",
        f"answers      {args.output_file} (every 10th)",
        f"all          {args.folder / ALL}; {SUMMARY}, {LENGTHS} beside it",
    ]
    if summary["failed_records"]:
        lines.append(f"FAILED       {summary['failed_records']} records; the same command tries them again")
        lines += [f"  record {failure['index']}: {failure['reason']}" for failure in summary["failures"][:5]]
    print(*lines, f"serve        {serve_line}", sep="\n")
