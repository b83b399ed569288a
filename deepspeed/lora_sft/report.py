"""What people see of a run: predicted end, summary.json, loss.png, memory.png, the last ten lines."""

import datetime
import json
import logging
import math
import os
import resource
import shlex
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.files import write_json

from .arguments import FOLDER, Arguments
from .run_folder import ADAPTER, EVAL_BEFORE, METRICS, SUMMARY

if TYPE_CHECKING:  # graders read summaries without them
    import torch

    from .preflight import Plan

log = logging.getLogger("lora_sft")

WARM_UP_STEPS = 3  # of every start: DeepSpeed records its prefetch trace

# Dense matrix peak of the half-precision units, TFLOP/s (vendors' data sheets), by part of the GPU's name.
PEAK_TFLOPS = {
    "V100": 125,
    "T4": 65,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "A6000": 155,
    "L40": 181,
    "L40S": 362,
    "A30": 165,
    "L4": 121,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
}


def peak_tflops(gpu_name: str | None) -> float | None:
    names = [name for name in PEAK_TFLOPS if name in (gpu_name or "")]
    return PEAK_TFLOPS[max(names, key=len)] if names else None


def peak_reserved_gib(device: "torch.device") -> float | None:
    """Most memory PyTorch's allocator has held on this GPU so far; None on CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved(device) / 2**30


def peak_host_rss_gib() -> float:
    """Most host memory this rank has used so far (ru_maxrss is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def announce_end(step_time_s: float, evaluation_s: float, state, train_rows: int) -> None:
    """Prints when the last step and the evaluation after it will be done, compared with Slurm's end of the
    job if there is one."""
    steps_left = state.max_steps - state.global_step
    remaining_s = steps_left * step_time_s + evaluation_s
    end_s = time.time() + remaining_s
    clock = time.strftime("%H:%M:%S", time.localtime(end_s))
    text = (
        f"{step_time_s:.1f} s a step: step {state.max_steps} at about {clock} (in {remaining_s / 60:.0f} min)"
    )
    job_end_s = slurms_end_s()
    if math.isfinite(job_end_s):
        text += f"; Slurm ends the job at {time.strftime('%H:%M:%S', time.localtime(job_end_s))}"
        if end_s > job_end_s:
            fitting = (
                0.9 * max(0.0, job_end_s - time.time() - evaluation_s) / step_time_s
            )  # steps; 10 % in hand
            rows = int(train_rows * min(1.0, (state.global_step + fitting) / state.max_steps))
            text += (
                ". It will NOT fit: run the same command again in another job (it resumes), or start anew with "
                f"--overwrite --max_train_rows {max(2, rows)}"
            )
    log.info(text)


def slurms_end_s() -> float:
    """When Slurm ends this job, in seconds since 1970; infinite without one. Older versions tell only `squeue`."""
    if text := os.environ.get("SLURM_JOB_END_TIME"):
        return float(text)
    ask = ["squeue", "--noheader", "--job", os.environ.get("SLURM_JOB_ID", ""), "--format=%e"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return datetime.datetime.fromisoformat(found).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # no Slurm, or "N/A"
        return math.inf


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def summarise(
    rows: list[dict],
    *,
    world_size: int,
    matmul_parameters: int,
    gpu_name: str | None,
    dtype: str,
    recomputed_share: float,
) -> dict:
    """Totals and rates from the rows of metrics.jsonl; rates leave out the warm-up of every start.

    MFU counts 4N FLOPs a real token (forward and the gradient towards activations; LoRA computes no
    gradient of the N base matrix weights), HFU up to 6N: `recomputed_share` of the layers run forward
    twice. N excludes the embedding. Attention scores are left out (under 2 % at 1,024 tokens).
    """
    timed = [row for row in rows if row["step_of_start"] > WARM_UP_STEPS] or rows
    seconds = sum(row["step_time_s"] for row in timed)
    rate = sum(row["real_tokens"] for row in timed) / world_size / seconds
    peak = peak_tflops(gpu_name) if dtype != "fp32" else None
    mfu = rate * 4 * matmul_parameters / (peak * 1e12) if peak else None
    return {
        "steps": len(rows),
        "skipped_updates": sum(row["skipped_update"] for row in rows),
        "train_tokens": sum(row["real_tokens"] for row in rows),
        "trained_tokens": sum(row["trained_tokens"] for row in rows),
        "tokens_per_s_per_gpu": rate,
        "train_s": sum(row["step_time_s"] for row in rows),
        "mfu_4n": mfu,
        "hfu_6n": mfu * (1 + recomputed_share / 2) if mfu else None,
        "peak_tflops_assumed": peak,
    }


def finish(
    args: Arguments,
    plan: "Plan",
    folder: Path,
    eval_loss_after: float,
    device: "torch.device",
    started_s: float,
) -> None:
    """Writes the plots and, last of all, summary.json (the mark of a finished run); prints the last lines. Collective:
    the peak is the highest of all ranks. `started_s`: `time.perf_counter()` when this start began."""
    import torch
    import torch.distributed as dist

    peak = torch.tensor(peak_reserved_gib(device) or 0.0, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if dist.get_rank():
        return
    rows = read_metrics(folder)
    # A resumed run has several processes.
    peak_gib = max(
        (gib for gib in (peak.item(), *(row["peak_reserved_gib"] for row in rows)) if gib), default=None
    )
    before = json.loads((folder / EVAL_BEFORE).read_text())["eval_loss_before"]
    totals = summarise(
        rows,
        world_size=plan.world_size,
        matmul_parameters=plan.matmul_parameters,
        gpu_name=plan.gpu_name,
        dtype=plan.dtype,
        recomputed_share=plan.recomputed_share,
    )
    summary = totals | {
        "eval_loss_before": before,
        "eval_loss_after": eval_loss_after,
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(eval_loss_after),
        "peak_reserved_gib": peak_gib,
        "predicted_peak_gib": plan.predicted_peak_gib,
        "peak_host_rss_gib": max(row["peak_host_rss_gib"] for row in rows),
        "train_rows": plan.train["documents"],
        "eval_rows": plan.eval["documents"],
        "padding_share": plan.train["padding_share"],
        "trained_share": plan.train["trained_share"],
        "rows_skipped": sum(value for key, value in plan.train.items() if key.startswith("skipped_")),
        "rows_cut": plan.train["prompt_cut"],
        "world_size": plan.world_size,
        "dtype": plan.dtype,
        "gpu_name": plan.gpu_name,
        "wall_s": time.perf_counter() - started_s,
    }
    plot_loss(folder / "loss.png", rows, before, eval_loss_after)
    plot_memory(folder / "memory.png", rows, plan)
    write_json(folder / SUMMARY, summary)
    for line in last_lines(folder, summary):
        log.info(line)


def last_lines(folder: Path, summary: dict) -> tuple[str, ...]:
    mfu, predicted = "unknown here", summary["predicted_peak_gib"]
    if summary["mfu_4n"]:
        mfu = f"{summary['mfu_4n']:.1%} (4N), HFU {summary['hfu_6n']:.1%} (6N)"
    peak = f"{summary['peak_host_rss_gib']:.2f} GiB of host memory"
    if summary["peak_reserved_gib"]:
        peak = f"{summary['peak_reserved_gib']:.2f} GiB of GPU memory"
    predicted = f"{predicted:.2f} GiB" if predicted >= 1 else f"{predicted * 1024:.0f} MiB"
    merge = shlex.quote(str(FOLDER / "merge_adapter.py"))
    return (
        "",
        f"perplexity   {summary['perplexity_before']:.3f} before, {summary['perplexity_after']:.3f} after (loss "
        f"{summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f} on {summary['eval_rows']} rows)",
        f"throughput   {summary['tokens_per_s_per_gpu']:,.0f} real tokens/s per GPU, MFU {mfu}",
        f"peak         {peak} per rank, {predicted} predicted for a GPU",
        f"tokens       {summary['train_tokens']:,} seen, {summary['trained_share']:.0%} of positions trained, "
        f"{summary['padding_share']:.1%} padding",
        f"rows         {summary['train_rows']} trained, {summary['rows_skipped']} skipped, {summary['rows_cut']} cut; "
        f"{summary['skipped_updates']} updates skipped for overflow",
        f"time         {summary['steps']} steps in {summary['train_s']:.0f} s; {summary['wall_s']:.0f} s for this start, "
        "its steps and evaluation",
        f"summary      {folder / SUMMARY}",
        f"plots        {folder / 'loss.png'}, memory.png",
        f"adapter      {folder / ADAPTER}",
        f"next         python {merge} --adapter {shlex.quote(str(folder))} --output_dir MERGED_MODEL",
    )


# --- plots --------------------------------------------------------------------------------------------


def plot_loss(path: Path, rows: list[dict], before: float, after: float) -> None:
    """Loss of every step, its moving average, and the evaluation losses at both ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if points:
        steps, losses = zip(*points, strict=True)
        window = max(1, len(losses) // 20)
        axes.plot(
            steps, losses, color="tab:blue", alpha=0.35 if window > 1 else 1, linewidth=1, label="training loss"
        )
        averages = [sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
                    for i in range(len(losses))]  # fmt: skip
        if window > 1:
            axes.plot(steps, averages, color="tab:blue", label=f"mean of {window} steps")
    last = rows[-1]["step"]
    axes.plot(
        [0, last], [before, after], "o", color="tab:red", label="evaluation loss before and after", zorder=3
    )
    for x, loss, side, above in ((0, before, "left", 8), (last, after, "right", -16)):
        axes.annotate(
            f"{loss:.3f}", (x, loss), xytext=(0, above), textcoords="offset points", ha=side, color="tab:red"
        )
    axes.margins(y=0.12)
    axes.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", title="LoRA fine-tuning: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_memory(path: Path, rows: list[dict], plan: "Plan") -> None:
    """Left: the predicted peak, part by part. Right: what was measured, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    parts = plan.predicted_parts_gib
    unit, scale = ("GiB", 1) if plan.predicted_peak_gib >= 1 else ("MiB", 1024)
    labels = sorted(parts, key=parts.get)
    values = [parts[name] * scale for name in labels]
    bars = left.barh(labels, values, color="tab:blue")
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.margins(x=0.18)
    left.set(xlabel=unit, title=f"predicted peak of one GPU: {plan.predicted_peak_gib * scale:.2f} {unit}")
    steps = [row["step"] for row in rows]
    if rows[-1]["peak_reserved_gib"] is not None:
        right.plot(steps, [row["peak_reserved_gib"] for row in rows], label="measured (rank 0)")
        right.axhline(plan.predicted_peak_gib, color="tab:orange", linestyle="--", label="predicted")
        right.axhline(plan.gpu_limit_gib, color="tab:red", label="limit")
        right.set(ylabel="GiB", title="peak reserved GPU memory")
        right.legend()
    else:
        right.plot(steps, [row["peak_host_rss_gib"] for row in rows])
        right.set(ylabel="GiB", title="host memory, rank 0 (no GPU in this run)")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    right.set_xlabel("optimizer step")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
