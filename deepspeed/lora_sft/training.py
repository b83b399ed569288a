"""One rank of the training run: engine, Trainer, callbacks that see, count and stop, evaluation."""

import functools
import gc
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from workbench.files import disk_full, to_json, write_json

from . import UserError, adapter, report, run_folder
from .arguments import Arguments
from .data import IGNORE, Document, Packed, pack, set_up_tokenizer
from .lora import add_adapters
from .ranks import STOPPED, StopRequest

log = logging.getLogger("lora_sft")

WARMUP_STEPS_UNTIMED = 3  # DeepSpeed records its prefetch trace in the first steps
MAX_SKIPPED_IN_A_ROW = 20


# --- start --------------------------------------------------------------------------------------------


def start_distributed(args: Arguments) -> dict:
    """Joins the process group; returns the extra TrainingArguments the device needs.

    On CPU, Trainer's own detection would not start DeepSpeed's communication (it reports MULTI_CPU), so the
    state is configured first. DeepSpeed's shared-memory op serves inference only; declaring it incompatible
    avoids a compiler run at start and a lock file that a killed run would leave.
    """
    rank = int(os.environ["LOCAL_RANK"])
    if args.device == "cuda":
        share_cores(int(os.environ["WORLD_SIZE"]))
        torch.cuda.set_device(rank)
        cap = os.environ.get("GPU_MEMORY_CAP_GIB")
        if cap:
            total = torch.cuda.get_device_properties(rank).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, float(cap) * 2**30 / total))
        if torch.__version__ < "2.8":  # the V100's; later ones do it unasked
            # Otherwise a gathered layer waits for NCCL's stream before its memory can be used again.
            os.environ["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
        deepspeed.init_distributed()
        return {}
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}


def share_cores(world_size: int) -> None:
    """Otherwise each rank starts a thread on every core, and they wait for one another: checking the adapter took 36 s
    instead of 2 on 32 cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))


def training_arguments(args: Arguments, plan: dict, **extra) -> TrainingArguments:
    return TrainingArguments(
        output_dir=args.output_dir,
        deepspeed=plan["zero_config"],
        per_device_train_batch_size=args.rows_per_micro_batch,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_ratio,  # below 1: a share of all steps
        lr_scheduler_type=args.lr_scheduler_type,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        optim="adamw_torch",
        gradient_checkpointing=args.gradient_checkpointing,
        # The reentrant kind takes less host time, but DeepSpeed 0.19.8 then books a layer's frozen weights on a module
        # around it, and at the end of the backward pass the whole model is gathered.
        gradient_checkpointing_kwargs={"use_reentrant": False},
        fp16=plan["dtype"] == "fp16",
        bf16=plan["dtype"] == "bf16",
        seed=args.seed,
        data_seed=args.seed,  # otherwise the order depends on who touched torch's generator before
        logging_steps=1,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=None,  # Trainer would delete old checkpoints before the new marker exists
        report_to=args.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=args.device == "cuda",
        **extra,
    )


def load_model(args: Arguments, plan: dict, tokenizer) -> torch.nn.Module:
    """The frozen base, partitioned over the ranks while it loads (zero.Init: Trainer's arguments exist
    already), with LoRA adapters on top."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[plan["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(plan["model_folder"], dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False  # with a cache, packed documents would see each other
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    set_seed(args.seed)  # the same lora_A on every rank
    model = add_adapters(model, args)
    model.peft_config["default"].revision = plan["model_revision"]
    model.peft_config["default"].base_model_name_or_path = args.model_name_or_path
    remember_parameters(model)
    return model


def remember_parameters(model: torch.nn.Module) -> None:
    """DeepSpeed asks a leaf module for its parameters whenever it gathers or releases it, and the whole model some
    times a step: each time a walk through PEFT's modules, 80 a layer. From here on the answers are the same; the
    model and its decoder layers remember them."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (model, model.get_base_model(), *layers):
        module.named_parameters = functools.partial(remembered, module, tuple(module.named_parameters()))


def remembered(module: torch.nn.Module, found: tuple, prefix: str = "", recurse: bool = True, **options):
    """`named_parameters` of an instance that has `found` with the default options."""
    if recurse and not prefix and not options:
        return iter(found)
    return type(module).named_parameters(module, prefix, recurse, **options)


def let_host_run_ahead(engine) -> None:
    """DeepSpeed holds the host, weight by weight, until the GPU has the layer before, so that blocks that wait for
    another stream do not pile up. Where gathers and computation share a stream there are none: memory is used again in
    the order of the stream, however far the host is ahead."""
    engine.optimizer.parameter_offload.get_param_coordinator().fast_sharding_for_leaf_module = True


# --- self-test and evaluation -------------------------------------------------------------------------


def to_device(packed: Packed, rows: slice, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs [B, S] of some packed rows, and their labels."""
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.from_numpy(getattr(packed, name)[rows].astype(np.int64)).to(device) for name in names}


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, S, V]; `use_cache=False` keeps packed documents apart, in evaluation too."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


@contextmanager
def answers_only(model: torch.nn.Module, labels: torch.Tensor) -> Iterator[torch.Tensor]:
    """While it lasts, `model` computes logits only where the next token has a label: [1, N, V] instead of
    [B, S, V]. The loss needs no others, and with rm-static N is about a quarter of B x S. Yields these next
    tokens [1, N], which transformers takes as `shift_labels`."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    positions = (targets != IGNORE).nonzero().squeeze(1)

    def select(_module, inputs):
        return (inputs[0].flatten(0, 1).index_select(0, positions)[None],)

    head = getattr(model, "module", model).get_output_embeddings()
    handle = head.register_forward_pre_hook(select, prepend=True)  # before ZeRO-3's own
    try:
        yield targets[positions][None]
    finally:
        handle.remove()


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
    alone = pack([first], 64, pad_id=0)
    tail = logits_of(model, to_device(together, slice(None), device))[0, 37 : 37 + 21].float()
    expected = logits_of(model, to_device(alone, slice(None), device))[0, :21].float()
    if not torch.isfinite(expected).all():
        where = first_nonfinite(model, to_device(alone, slice(None), device))
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


@torch.no_grad()
def evaluate(model: torch.nn.Module, packed: Packed, rows_per_micro_batch: int, device: torch.device) -> float:
    """Mean loss per answer token (nats): sum over all ranks / count over all ranks, each row once.

    `len(packed)` must be a multiple of ranks x rows_per_micro_batch (pad-only rows count nothing).
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    starts = range(rank * rows_per_micro_batch, len(packed), world_size * rows_per_micro_batch)
    for start in tqdm(starts, desc="evaluating", unit="micro-batch", leave=False, disable=rank != 0):
        batch = to_device(packed, slice(start, start + rows_per_micro_batch), device)
        with answers_only(model, batch["labels"]) as targets:
            logits = logits_of(model, batch)
        total[0] += F.cross_entropy(logits[0].float(), targets[0], reduction="sum").double()
        total[1] += targets.numel()
    if world_size > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


# --- the Trainer --------------------------------------------------------------------------------------


class PackedTrainer(Trainer):
    """Trainer that counts tokens and keeps the last micro-batch for a diagnosis. The rest is Trainer's:
    token-weighted loss over ranks and accumulation, data order, schedule, checkpoints, resume."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step_counts = torch.zeros(2, dtype=torch.float64)  # real tokens, answer tokens on this rank
        self.last_micro_batch: dict[str, torch.Tensor] = {}
        self.nonfinite_loss = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        real_tokens = inputs.pop("real_tokens")
        self.step_counts += torch.tensor([real_tokens.sum(), (inputs["labels"] != IGNORE).sum()])
        if inputs.keys() != {"input_ids", "labels", "position_ids"}:
            raise RuntimeError(
                f"{sorted(inputs)}: with an attention_mask packed documents would see each other"
            )
        self.last_micro_batch = inputs
        with answers_only(model, inputs["labels"]) as shift_labels:
            inputs = {**inputs, "shift_labels": shift_labels, "use_cache": False}
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.nonfinite_loss |= not torch.isfinite(loss).item()
        return loss

    def save_model(self, output_dir=None, _internal_call=False):
        # Trainer's way through DeepSpeed gathers the frozen base as well, one linear layer after the other. This gathers
        # the adapter, and leaves everything partitioned, as DeepSpeed's checkpoint, which comes next, wants it.
        tensors = adapter.gathered(self.deepspeed)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=tensors)

    def _run_epoch(self, *args, **kwargs):
        # A run that was killed after its last step has nothing left to train; Trainer would only look at
        # this flag after one more step.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)


class RunCallback(TrainerCallback):
    """What happens around the steps: self-test and first evaluation, metrics row, progress bar, stop
    request, loss scale watch, checkpoint marker."""

    def __init__(self, args: Arguments, plan: dict, eval_rows: Packed, stop: StopRequest) -> None:
        self.args, self.plan, self.eval_rows, self.stop = args, plan, eval_rows, stop
        self.folder = Path(args.output_dir)
        self.trainer: PackedTrainer  # set once the Trainer exists
        self.bar: tqdm | None = None
        self.stopped = False
        self.skipped_in_a_row = 0
        self.last_good_step = 0  # its forward pass was finite, so the weights before its update were good
        self.row: dict = {}
        self.step_times_s: list[float] = []  # of this process
        self.evaluation_s = 0.0

    def on_train_begin(self, hf_args, state, control, **_):
        engine = self.trainer.model_wrapped
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            # DeepSpeed would end the run with an exception; on_step_end counts and explains instead.
            scaler.raise_error_at_min_scale = False
        if not engine.zero_overlap_comm():
            let_host_run_ahead(engine)
        error = packing_self_test(engine, engine.module.config.vocab_size, hf_args.device)
        log.info("packing self-test passed: relative error %.1e between packed and separate documents", error)
        before = self.folder / run_folder.EVAL_BEFORE
        if not before.exists():
            started_s = time.perf_counter()
            loss = evaluate(engine, self.eval_rows, self.args.rows_per_micro_batch, hf_args.device)
            self.evaluation_s = time.perf_counter() - started_s
            log.info("evaluation before training: loss %.4f", loss)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss before training is {loss}: the base model does not fit {self.plan['dtype']}"
                )
            if state.is_world_process_zero:
                write_json(before, {"eval_loss_before": loss})
            dist.barrier()
        if state.is_world_process_zero:
            config = json.loads((self.folder / run_folder.CONFIG).read_text())
            config["resolved_zero_config"] = hf_args.hf_deepspeed_config.config
            write_json(self.folder / run_folder.CONFIG, config)
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", smoothing=0.1)
        if state.global_step >= state.max_steps:  # killed after the last step: only the end is left
            control.should_training_stop = True

    def on_step_begin(self, hf_args, state, control, **_):
        self.started_s = time.perf_counter()

    def on_step_end(self, hf_args, state, control, **_):
        if hf_args.device.type == "cuda":
            torch.cuda.synchronize()
        step_time_s = time.perf_counter() - self.started_s
        trainer, engine = self.trainer, self.trainer.model_wrapped
        flags = torch.tensor([float(bool(self.stop)), float(trainer.nonfinite_loss)], dtype=torch.float64)
        sums = torch.cat([trainer.step_counts, flags]).to(hf_args.device)
        dist.all_reduce(sums)  # all ranks stop at the same step
        real_tokens, trained_tokens, stop, nonfinite = sums.tolist()
        trainer.step_counts.zero_()
        trainer.nonfinite_loss = False
        skipped = bool(getattr(engine.optimizer, "overflow", False))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        tokens_per_gpu = real_tokens / hf_args.world_size
        self.row = {
            "step": state.global_step,
            "epoch": state.epoch,
            "step_time_s": step_time_s,
            "real_tokens": int(real_tokens),
            "trained_tokens": int(trained_tokens),
            "tokens_per_s_per_gpu": tokens_per_gpu / step_time_s,
            "peak_reserved_gib": report.peak_reserved_gib(hf_args.device),
            "peak_host_rss_gib": report.peak_host_rss_gib(),
            "loss_scale": engine.optimizer.loss_scale if self.plan["dtype"] == "fp16" else None,
            "skipped_update": skipped,
            "nonfinite_loss": bool(nonfinite),
        }
        self.step_times_s.append(step_time_s)
        if len(self.step_times_s) == 2 * WARMUP_STEPS_UNTIMED and state.is_world_process_zero:
            median_s = statistics.median(self.step_times_s[WARMUP_STEPS_UNTIMED:])
            report.announce_end(median_s, self.evaluation_s, state, self.plan["train"]["rows"])
        if skipped or nonfinite:
            control.should_save = False  # good checkpoints must not be rotated away by spoiled ones
        else:
            self.last_good_step = state.global_step
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.give_up(engine, state, f"{MAX_SKIPPED_IN_A_ROW} updates in a row were skipped for overflow")
        if nonfinite and self.plan["dtype"] != "fp16":
            self.give_up(engine, state, "the loss is not finite")
        if stop:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def give_up(self, engine, state, what: str) -> None:
        """Ends the run with a diagnosis. Every rank runs the passes: their gathers are collective."""
        good = [
            c
            for c in run_folder.complete_checkpoints(self.folder)
            if run_folder.step_of(c) < self.last_good_step
        ]
        inputs = self.trainer.last_micro_batch
        if where := first_nonfinite(engine, inputs):
            advice = f"the forward pass is already non-finite ({where}): lower --learning_rate or --lora_alpha"
        else:
            where = first_nonfinite_gradient(engine, inputs) or "none in the last micro-batch"
            advice = (
                f"the forward pass is finite, so gradients overflow (first: {where}): lower --learning_rate, "
                "--lora_alpha or --max_seq_len, or use --dtype bf16 on a GPU of compute capability 8.0 or higher"
            )
        raise UserError(
            f"{what} (step {state.global_step}, loss scale {engine.optimizer.loss_scale:g}); {advice}; "
            f"last good checkpoint: {good[-1] if good else 'none yet'}"
        )

    def on_log(self, hf_args, state, control, logs=None, **_):
        if not self.row or "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        loss = None if self.row["nonfinite_loss"] else logs["loss"]
        row = self.row | {
            "loss": loss,
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]) if "grad_norm" in logs else None,
        }
        self.row = {}
        with (self.folder / run_folder.METRICS).open("a") as out:
            out.write(json.dumps(to_json(row), sort_keys=True) + "\n")
        rate = row["tokens_per_s_per_gpu"]
        shown = "non-finite" if loss is None else f"{loss:.4f}"
        self.bar.set_postfix_str(f"loss {shown}, {rate:,.0f} tokens/s/GPU", refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        # The bar owns the terminal; the file gets a line a step.
        log.debug("step %d/%d loss %s, %.2f s, %.0f tokens/s/GPU", row["step"], state.max_steps, shown,
                  row["step_time_s"], rate)  # fmt: skip
        if row["skipped_update"]:
            log.debug("step %d: update skipped (overflow), loss scale now %g", row["step"], row["loss_scale"])

    def on_save(self, hf_args, state, control, **_):
        dist.barrier()  # every rank has written its part
        if state.is_world_process_zero:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            run_folder.mark_complete(checkpoint, self.args.save_total_limit)
            log.debug("saved %s", checkpoint)
        dist.barrier()


def first_nonfinite(engine: torch.nn.Module, micro_batch: dict[str, torch.Tensor]) -> str | None:
    """Runs a forward pass on all ranks and names the first module on any rank with a non-finite output."""
    found: list[str] = []
    hooks = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output
            if found or not torch.is_tensor(tensor) or not tensor.is_floating_point():
                return
            if not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    for name, module in engine.module.named_modules():
        if (name and not list(module.children())) or name.endswith(("self_attn", "mlp")):
            hooks.append(module.register_forward_hook(watch(name)))
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


# --- one rank, start to end ---------------------------------------------------------------------------


class Terminal(logging.StreamHandler):
    """Prints above the progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record))
        except OSError:  # the terminal is gone; the run goes on and training.log has the line
            self.handleError(record)


def set_up_logging(folder: Path, rank: int) -> None:
    """INFO to the terminal of rank 0, everything to training.log with times; libraries only warn."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if rank:
        log.addHandler(logging.NullHandler())
        return
    terminal = Terminal(sys.stdout)
    terminal.setLevel(logging.INFO)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(folder / "training.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers = [terminal, file]


def train_rank(args: Arguments, plan: dict, work_dir: Path, rank: int, stop: StopRequest) -> int:
    """Trains as one of the ranks; returns the exit code (0 finished, 75 stopped and resumable)."""
    folder = Path(args.output_dir)
    set_up_logging(folder, rank)
    stop.install()
    started_s = time.perf_counter()
    try:
        return _train(args, plan, work_dir, stop, folder, started_s)
    except UserError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({str(error).split('. ')[0]}); use a smaller --tokens_per_micro_batch "
            f"(now {args.tokens_per_micro_batch}) or --lora_r; checkpoints are kept"
        ) from error
    except Exception as error:
        if disk_full(error, folder):
            raise UserError(
                f"the disk or quota of {folder} is full; free some space and run the same command: it resumes "
                "from the last complete checkpoint"
            ) from error
        log.error("rank %d failed: %s: %s", rank, type(error).__name__, error)
        raise


def _train(args, plan, work_dir, stop, folder, started_s) -> int:
    extra = start_distributed(args)
    hf_args = training_arguments(args, plan, **extra)
    tokenizer = AutoTokenizer.from_pretrained(plan["model_folder"])
    set_up_tokenizer(tokenizer)
    train_rows, eval_rows = Packed.load(work_dir / "train.npz"), Packed.load(work_dir / "eval.npz")
    log.info("loading %s, partitioned over %d ranks", args.model_name_or_path, hf_args.world_size)
    model = load_model(args, plan, tokenizer)
    callback = RunCallback(args, plan, eval_rows, stop)
    trainer = callback.trainer = PackedTrainer(
        model=model,
        args=hf_args,
        train_dataset=train_rows,
        data_collator=default_data_collator,  # Trainer's choice for a tokenizer adds an attention_mask
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    resume_from = plan["resume_from"]
    log.info("resuming from %s" if resume_from else "starting at step 0%s", resume_from or "")
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    finally:
        if callback.bar:
            callback.bar.close()  # what is printed next starts on a line of its own
    if callback.stopped:
        log.info("stopped at step %d, checkpoint saved; the same command resumes", trainer.state.global_step)
        return STOPPED

    engine = trainer.model_wrapped
    eval_loss_after = evaluate(engine, eval_rows, args.rows_per_micro_batch, hf_args.device)
    trainer.save_model()
    dist.barrier()  # rank 0 writes, every rank reads
    log.debug("adapter saved")
    # The first step of a warm-up has learning rate 0.
    learning = any(entry.get("learning_rate", 0) > 0 for entry in trainer.state.log_history)
    checked = adapter.check(engine, folder, to_device(eval_rows, slice(0, 1), hf_args.device), learning)
    log.info("adapter checked: %s", checked)
    peak_gib = torch.tensor([report.peak_reserved_gib(hf_args.device) or 0.0], device=hf_args.device)
    dist.all_reduce(peak_gib, dist.ReduceOp.MAX)
    if hf_args.process_index == 0:
        report.finish(
            args, plan, folder, eval_loss_after, peak_gib.item() or None, time.perf_counter() - started_s
        )
    del trainer, engine, model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return 0
