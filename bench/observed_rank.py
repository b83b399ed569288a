"""What train_throughput.py does inside each rank of the program: a row's kernels, and what is counted there."""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.files import write_json

if TYPE_CHECKING:
    from train_throughput import Row

OBSERVED = "observed.json"
TIMED = "timed"  # this file: the last step is over
NOT_ON_VOLTA = ("flash", "cudnn", "triton")  # in names of kernels; those of matrix products have none of them


def prepare(rank: int, row: "Row", steps: tuple[int, int], out: Path) -> None:
    """Imports what a rank of the program does, makes in it what is special about `row`, and has it watched.
    `steps`: how many it has, and how many of them before rank 0's kernels are recorded. Rank 0 will leave OBSERVED
    in `out`."""
    import torch

    cuda = os.environ["DS_ACCELERATOR"] == "cuda"
    if cuda:
        torch.cuda.set_device(rank)  # before an import below initialises CUDA on GPU 0
        if row.dtype == "fp16":
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
    from lora_sft import training

    if row.replicated:
        import deepspeed.runtime.engine

        # DeepSpeed updates one flat tensor for the optimizers that it takes for fused, else hundreds one by one.
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
        scale_the_loss(deepspeed.runtime.engine.DeepSpeedEngine)
        training.let_host_run_ahead = lambda engine: None
        # The check writes into rank 0's adapter and leaves it to ZeRO to tell the others.
        training.adapter.check = lambda *_: "not checked: the weights are not partitioned"
    if row.without:
        setattr(training, row.without, lambda *_: None)
    observe(training, steps, out if rank == 0 else None, cuda)


def scale_the_loss(engine_class: type) -> None:
    """DeepSpeed 0.19.8 unscales fp16 gradients without ZeRO, too, but scales the loss for its ZeRO optimizers only."""
    backward = engine_class.backward

    @functools.wraps(backward)
    def scaled(engine, loss, *args, **kwargs):
        scaler = getattr(engine.optimizer, "loss_scale_config", None)
        return backward(engine, loss * scaler.cur_scale if scaler else loss, *args, **kwargs)

    engine_class.backward = scaled


def observe(training, steps: tuple[int, int], out: Path | None, cuda: bool) -> None:
    """Keeps the run from saving a checkpoint, and makes the rank that has an `out` leave there what it gathered,
    its memory and its kernels' times."""
    import torch
    from deepspeed.comm.torch import TorchBackend

    last, before_recording = steps
    seen: dict = {"gathered_bytes": [], "step_ends_s": [], "memory_gib": {}, "alloc_retries": None}
    gathered = [0]

    def counting(method: Callable, first: str) -> Callable:
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            outputs = args[0] if args else kwargs[first]
            tensors = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            gathered[0] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return method(self, *args, **kwargs)

        return call

    TorchBackend.all_gather_into_tensor = counting(TorchBackend.all_gather_into_tensor, "output_tensor")
    TorchBackend.all_gather = counting(TorchBackend.all_gather, "tensor_list")
    TorchBackend.all_gather_coalesced = counting(TorchBackend.all_gather_coalesced, "output_tensors")

    class Observer(training.RunCallback):
        def on_train_begin(self, *args, **kwargs):
            if cuda:
                seen["memory_gib"]["resident"] = torch.cuda.memory_allocated() / 2**30
            super().on_train_begin(*args, **kwargs)

        def on_step_begin(self, hf_args, state, control, **kwargs):
            if out and cuda and state.global_step == before_recording:
                seen["memory_gib"]["peak_allocated"] = torch.cuda.max_memory_allocated() / 2**30
                seen["memory_gib"]["peak_reserved"] = torch.cuda.max_memory_reserved() / 2**30
                seen["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
                torch.cuda.synchronize()
                self.recording_s = time.perf_counter()
            gathered[0] = 0
            super().on_step_begin(hf_args, state, control, **kwargs)

        def on_step_end(self, hf_args, state, control, **kwargs):
            super().on_step_end(hf_args, state, control, **kwargs)
            control.should_save = False  # a checkpoint at the last step would only cost time
            seen["gathered_bytes"].append(gathered[0])
            seen["step_ends_s"].append(time.perf_counter())
            if out and state.global_step == last:
                if cuda:
                    torch.cuda.synchronize()
                    window_s = time.perf_counter() - self.recording_s
                    self.profiler.stop()
                (out / TIMED).touch()
                if cuda:
                    self.profiler.export_chrome_trace(str(out / "trace.json"))
                    trace = json.loads((out / "trace.json").read_text(errors="replace"), strict=False)
                    (out / "trace.json").unlink()
                    seen["kernels"] = kernel_shares(trace["traceEvents"], window_s)
                write_json(out / OBSERVED, seen)

    training.RunCallback = Observer


def kernel_shares(trace: list[dict], window_s: float) -> dict | None:
    """Shares of `window_s`, which contains these events of a Chrome trace (times in microseconds): nothing runs
    on the GPU; nothing but communication; and each of the longest kernels, by name. None without any kernel
    (the driver lets only administrators record them, say)."""
    work = [event for event in trace if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        return None
    window_us = window_s * 1e6

    def covered_us(events: list[dict]) -> float:
        total, end = 0.0, float("-inf")
        for event in sorted(events, key=lambda event: event["ts"]):
            total += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
            end = max(end, event["ts"] + event["dur"])
        return total

    by_name: dict[str, float] = {}
    for event in work:
        by_name[event["name"]] = by_name.get(event["name"], 0.0) + event["dur"] / window_us
    computing = [event for event in work if "nccl" not in event["name"].lower()]
    busy_us = covered_us(work)
    names = [name for name in by_name if any(word in name.lower() for word in NOT_ON_VOLTA)]
    return {
        "no_kernel_share": 1 - busy_us / window_us,
        "communication_only_share": (busy_us - covered_us(computing)) / window_us,
        "longest": {name[:100]: by_name[name] for name in sorted(by_name, key=by_name.get)[-12:]},
        "not_on_volta": sorted(name[:100] for name in names),
    }
