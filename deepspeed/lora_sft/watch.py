"""What happens around the steps, one trade a callback: self-test, first evaluation, metrics rows, progress, overflow,
stop request, checkpoint markers."""

import gc
import inspect
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from workbench import UserError
from workbench.files import to_json, write_json

from . import report, run_folder
from .arguments import Arguments
from .data import Document, pack
from .launch import StopRequest
from .model import answers_only, logits_of, to_device
from .preflight import Plan

log = logging.getLogger("lora_sft")

MAX_SKIPPED_IN_A_ROW = 20


class NothingLeft(Exception):
    """The run was killed after its last step: only the end is left."""


@contextmanager
def watching(
    trainer: Trainer, args: Arguments, plan: Plan, evaluation: Callable[[], float], stop: StopRequest
) -> Iterator["Stop"]:
    """While it lasts, `trainer` has these callbacks. Yields the one that knows whether the run was stopped."""
    folder = Path(args.output_dir)
    metrics = Metrics(trainer, folder, plan.dtype)
    before = EvaluationBefore(folder, plan.dtype, evaluation)
    progress, stopped = Progress(metrics, before, plan.train["rows"]), Stop(stop)
    callbacks = [
        SetUp(trainer, folder, plan),
        before,
        ForgetForwardOnly(trainer, plan),
        metrics,
        progress,
        Overflow(trainer, metrics, folder, plan.dtype),
        stopped,  # after Overflow: a run that is stopped saves, whatever the last step was
        Checkpoints(folder, args.save_total_limit),
        Patience(args.ddp_timeout_s),  # after the others' collectives
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        yield stopped
    except NothingLeft:
        pass
    finally:
        progress.close()


# --- before the first step ----------------------------------------------------------------------------


class SetUp(TrainerCallback):
    """DeepSpeed's engine as this run wants it, and the proof that packed documents are apart."""

    def __init__(self, trainer: Trainer, folder: Path, plan: Plan) -> None:
        self.trainer, self.folder, self.plan = trainer, folder, plan

    def on_train_begin(self, hf_args, state, control, **_):
        engine = self.trainer.model_wrapped
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            # DeepSpeed would end the run with an exception; Overflow counts and explains instead.
            scaler.raise_error_at_min_scale = False
        keep_activations(engine.module, self.plan.kept_layers)  # Trainer has just switched checkpointing on
        if not engine.zero_overlap_comm():
            let_host_run_ahead(engine)
        gc.collect()
        gc.freeze()  # to look through all that stays holds each rank at another time, and the others wait
        error = packing_self_test(engine, engine.module.config.vocab_size, hf_args.device)
        log.info("packing self-test passed: relative error %.1e between packed and separate documents", error)
        if state.is_world_process_zero:
            run_folder.add_to_config(self.folder, resolved_zero_config=hf_args.hf_deepspeed_config.config)

    def on_epoch_begin(self, hf_args, state, control, **_):
        if state.global_step >= state.max_steps:
            raise NothingLeft  # Trainer would look only after one more step


def keep_activations(model: torch.nn.Module, kept: int) -> None:
    """Switches checkpointing off in the last layers: what they keep is gone when the first are computed again."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[len(layers) - kept :]:
        layer.gradient_checkpointing = False


def let_host_run_ahead(engine) -> None:
    """DeepSpeed holds the host, weight by weight, until the GPU has the layer before, so that blocks that wait for
    another stream do not pile up. Where gathers and computation share a stream there are none: memory is used again in
    the order of the stream, however far the host is ahead."""
    engine.optimizer.parameter_offload.get_param_coordinator().fast_sharding_for_leaf_module = True


@torch.no_grad()
def packing_self_test(model: torch.nn.Module, vocab_size: int, device: torch.device) -> float:
    """Compares a document's logits packed behind another one with those alone; returns the relative error.

    Raises UserError if they differ by more than rounding: a transformers version that no longer derives the
    block-diagonal mask from `position_ids` would otherwise train on documents that see each other.
    """
    draw = np.random.default_rng(0)
    first, second = (Document(draw.integers(3, vocab_size, n).tolist(), 1) for n in (21, 37))
    model.eval()
    together = pack([second, first], 64, pad_id=0)  # best fit puts the longer one first
    alone = to_device(pack([first], 64, pad_id=0), slice(None), device)
    tail = logits_of(model, to_device(together, slice(None), device))[0, 37 : 37 + 21].float()
    expected = logits_of(model, alone)[0, :21].float()
    if not torch.isfinite(expected).all():
        where = first_nonfinite(model, alone)
        raise UserError(f"the base model's forward pass overflows in {where}; use --dtype bf16 or fp32")
    model.train()
    error = ((tail - expected).norm() / expected.norm()).item()
    limit = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if not error < limit:
        raise UserError(
            f"packing self-test: packed documents see each other (relative error {error:.2g} above {limit}); "
            "install the versions of requirements.txt"
        )
    return error


class EvaluationBefore(TrainerCallback):
    """The loss of the base model, once a run; a resumed one keeps it."""

    def __init__(self, folder: Path, dtype: str, evaluation: Callable[[], float]) -> None:
        self.path, self.dtype, self.evaluation = folder / run_folder.EVAL_BEFORE, dtype, evaluation
        self.seconds = 0.0

    def on_train_begin(self, hf_args, state, control, **_):
        if self.path.exists():
            return
        started_s = time.perf_counter()
        loss = self.evaluation()
        self.seconds = time.perf_counter() - started_s
        log.info("evaluation before training: loss %.4f", loss)
        if not math.isfinite(loss):
            raise UserError(f"the loss before training is {loss}: the base model does not fit {self.dtype}")
        if state.is_world_process_zero:
            write_json(self.path, {"eval_loss_before": loss})


class ForgetForwardOnly(TrainerCallback):
    """DeepSpeed keeps which weights to release when, from the passes so far: forward only. It would not look again when
    backward passes come, and a model that may stay whole would be gathered anew for each. Others do not gain: what they
    would keep where forward turns into backward is memory."""

    def __init__(self, trainer: Trainer, plan: Plan) -> None:
        self.trainer, zero = trainer, plan.zero_config["zero_optimization"]
        self.whole = zero.get("stage3_max_reuse_distance", 1e9) > zero.get("stage3_max_live_parameters", 1e9)

    def on_train_begin(self, hf_args, state, control, **_):
        if not self.whole:
            return
        coordinator = self.trainer.model_wrapped.optimizer.parameter_offload.get_param_coordinator()
        if coordinator.is_complete_trace():
            coordinator._invalidate_trace()
        release = type(coordinator)._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(release).nonlocals["func"].cache_clear()


# --- each step ----------------------------------------------------------------------------------------


class Metrics(TrainerCallback):
    """A row of metrics.jsonl a step. `row` is the last step's, the same on every rank but for its peaks; `loss`,
    `learning_rate` and `grad_norm` come into it when Trainer logs them."""

    def __init__(self, trainer: Trainer, folder: Path, dtype: str) -> None:
        self.trainer, self.path, self.dtype = trainer, folder / run_folder.METRICS, dtype
        self.row: dict = {"step_of_start": 0}

    def on_step_begin(self, hf_args, state, control, **_):
        self.started_s = time.perf_counter()

    def on_step_end(self, hf_args, state, control, **_):
        if hf_args.device.type == "cuda":
            torch.cuda.synchronize()
        step_time_s = time.perf_counter() - self.started_s
        optimizer, counts = self.trainer.model_wrapped.optimizer, self.trainer.step_counts
        sums = counts.to(hf_args.device, copy=True)
        counts.zero_()
        dist.all_reduce(sums)
        real_tokens, trained_tokens, nonfinite = sums.tolist()
        self.row = {
            "step": state.global_step,
            "step_of_start": self.row["step_of_start"] + 1,
            "epoch": state.epoch,
            "step_time_s": step_time_s,
            "real_tokens": int(real_tokens),
            "trained_tokens": int(trained_tokens),
            "tokens_per_s_per_gpu": real_tokens / hf_args.world_size / step_time_s,
            "peak_reserved_gib": report.peak_reserved_gib(hf_args.device),
            "peak_host_rss_gib": report.peak_host_rss_gib(),
            "loss_scale": optimizer.loss_scale if self.dtype == "fp16" else None,
            "skipped_update": bool(getattr(optimizer, "overflow", False)),
            "nonfinite_loss": bool(nonfinite),
        }

    def on_log(self, hf_args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        self.row |= {
            "loss": None if self.row["nonfinite_loss"] else logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]) if "grad_norm" in logs else None,
        }
        if state.is_world_process_zero:
            with self.path.open("a") as out:
                out.write(json.dumps(to_json(self.row), sort_keys=True) + "\n")


class Progress(TrainerCallback):
    """The bar, which owns the terminal; training.log gets a line a step. Once it is known how long a step takes, when
    the run will end."""

    def __init__(self, metrics: Metrics, before: EvaluationBefore, train_rows: int) -> None:
        self.metrics, self.before, self.train_rows = metrics, before, train_rows
        self.bar: tqdm | None = None
        self.timed_s: list[float] = []

    def on_train_begin(self, hf_args, state, control, **_):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", smoothing=0.1)

    def on_log(self, hf_args, state, control, logs=None, **_):
        if self.bar is None or "loss" not in (logs or {}):
            return
        row = self.metrics.row
        shown = "non-finite" if row["loss"] is None else f"{row['loss']:.4f}"
        rate = f"{row['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU"
        self.bar.set_postfix_str(f"loss {shown}, {rate}", refresh=False)
        self.bar.update(row["step"] - self.bar.n)
        log.debug(
            "step %d/%d loss %s, %.2f s, %s", row["step"], state.max_steps, shown, row["step_time_s"], rate
        )
        if row["skipped_update"]:
            log.debug("step %d: update skipped (overflow), loss scale now %g", row["step"], row["loss_scale"])
        if row["step_of_start"] > report.WARM_UP_STEPS:
            self.timed_s.append(row["step_time_s"])
            if len(self.timed_s) == 3:
                report.announce_end(
                    statistics.median(self.timed_s), self.before.seconds, state, self.train_rows
                )

    def close(self) -> None:
        """What is printed next starts on a line of its own."""
        if self.bar is not None:
            self.bar.close()


class Stop(TrainerCallback):
    """Ends the run after this step, with a checkpoint, if a stop was requested on any rank."""

    def __init__(self, request: StopRequest) -> None:
        self.request, self.stopped = request, False

    def on_step_end(self, hf_args, state, control, **_):
        asked = torch.tensor(float(bool(self.request)), device=hf_args.device)
        dist.all_reduce(asked)  # all ranks stop at the same step
        if asked.item():
            self.stopped = True
            control.should_save = control.should_training_stop = True


class Patience(TrainerCallback):
    """How long a rank waits for another: a node whose cable was pulled never answers. From step to step they are together;
    while the model loads or a checkpoint is written one may take longer, and DeepSpeed's 600 s hold. So they do in the
    first step, which tells how long one takes: NCCL counts from when the host, which may be a step ahead, has asked."""

    def __init__(self, timeout_s: int) -> None:
        self.timeout_s, self.step_s, self.began_s = timeout_s, None, 0.0

    def on_step_begin(self, hf_args, state, control, **_):
        self.began_s = time.monotonic()
        if self.step_s is not None:
            patience_s = max(self.timeout_s, 3 * self.step_s)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=patience_s))

    def on_step_end(self, hf_args, state, control, **_):
        self.step_s = max(self.step_s or 0.0, time.monotonic() - self.began_s)
        if control.should_save or control.should_training_stop:
            dist.distributed_c10d._set_pg_timeout(default_pg_timeout)


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete, and deletes old ones after that."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def on_save(self, hf_args, state, control, **_):
        dist.barrier()  # every rank has written its part
        if state.is_world_process_zero:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            run_folder.mark_complete(checkpoint, self.keep)
            log.debug("saved %s", checkpoint)
        dist.barrier()


# --- overflow -----------------------------------------------------------------------------------------


class Overflow(TrainerCallback):
    """Keeps spoiled steps from being saved; ends a run that cannot recover with a diagnosis."""

    def __init__(self, trainer: Trainer, metrics: Metrics, folder: Path, dtype: str) -> None:
        self.trainer, self.metrics, self.folder, self.dtype = trainer, metrics, folder, dtype
        self.skipped_in_a_row = 0
        self.last_good_step = 0  # its forward pass was finite, so the weights before its update were good

    def on_step_end(self, hf_args, state, control, **_):
        skipped, nonfinite = self.metrics.row["skipped_update"], self.metrics.row["nonfinite_loss"]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped or nonfinite:
            control.should_save = False  # good checkpoints must not be rotated away by spoiled ones
        else:
            self.last_good_step = state.global_step
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.give_up(
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row were skipped for overflow", state.global_step
            )
        if nonfinite and self.dtype != "fp16":  # there is no loss scale that could help
            self.give_up("the loss is not finite", state.global_step)

    def give_up(self, what: str, step: int) -> None:
        """Every rank runs the passes: their gathers are collective."""
        engine, inputs = self.trainer.model_wrapped, self.trainer.last_micro_batch
        if where := first_nonfinite(engine, inputs):
            advice = f"the forward pass is already non-finite ({where}): lower --learning_rate or --lora_alpha"
        else:
            where = first_nonfinite_gradient(engine, inputs) or "none in the last micro-batch"
            advice = (
                f"the forward pass is finite, so gradients overflow (first: {where}): lower --learning_rate, "
                "--lora_alpha or --max_seq_len, or use --dtype bf16 on a GPU of compute capability 8.0 or higher"
            )
        complete = run_folder.complete_checkpoints(self.folder)
        good = [path for path in complete if run_folder.step_of(path) < self.last_good_step]
        raise UserError(
            f"{what} (step {step}, loss scale {engine.optimizer.loss_scale:g}); {advice}; "
            f"last good checkpoint: {good[-1] if good else 'none yet'}"
        )


def first_nonfinite(engine: torch.nn.Module, micro_batch: dict[str, torch.Tensor]) -> str | None:
    """Runs a forward pass on all ranks and names the first module on any rank with a non-finite output."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output
            if found or not torch.is_tensor(tensor) or not tensor.is_floating_point():
                return
            if not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in engine.module.named_modules()
        if (name and not list(module.children()))
        or name.endswith(("self_attn", "mlp"))
        or isinstance(module, BaseTunerLayer)
    ]
    with torch.no_grad():
        logits_of(engine, micro_batch)
    for hook in hooks:
        hook.remove()
    return first_of_all_ranks(found)


def first_nonfinite_gradient(engine: torch.nn.Module, micro_batch: dict[str, torch.Tensor]) -> str | None:
    """Runs forward and backward at the current loss scale on all ranks and names the first trainable tensor
    (the backward pass goes from the last layer to the first) whose gradient is non-finite on any rank."""
    found: list[str] = []

    def watch(name: str):
        def hook(gradient):
            if not found and not torch.isfinite(gradient).all():
                found.append(name)

        return hook

    hooks = [p.register_hook(watch(name)) for name, p in engine.module.named_parameters() if p.requires_grad]
    with answers_only(engine, micro_batch["labels"]) as shift_labels:
        engine.backward(engine(**micro_batch, shift_labels=shift_labels, use_cache=False).loss)
    for hook in hooks:
        hook.remove()
    return first_of_all_ranks(found)


def first_of_all_ranks(found: list[str]) -> str | None:
    """The first entry of the lowest rank that has one. Collective."""
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, found[0] if found else None)
    return next((name for name in names if name), None)
