"""One rank, from start to end: Trainer on packed rows, the loss per answer token, evaluation before and after."""

import gc
import logging
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, default_data_collator

from workbench import UserError
from workbench.files import disk_full
from workbench.processes import STOPPED

from . import adapter, kernels, report, watch
from .arguments import Arguments
from .cluster import LostRanks
from .data import IGNORE, Packed, set_up_tokenizer
from .launch import StopRequest, join_ranks
from .model import answers_only, load_model, logits_of, to_device
from .preflight import Plan

log = logging.getLogger("lora_sft")

LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
)  # gloo's


def train(
    args: Arguments, plan: Plan, work_dir: Path, resume_from: Path | None, stop: StopRequest, started_s: float
) -> int:
    """Trains as one of the ranks. Returns the exit code: 0 finished, 75 stopped and resumable."""
    folder = Path(args.output_dir)
    of_device = join_ranks(args.device, args.ddp_timeout_s)
    hf_args = training_arguments(
        args, plan, **of_device
    )  # before the model: zero.Init finds the ZeRO JSON through it
    tokenizer = AutoTokenizer.from_pretrained(plan.model_folder)
    set_up_tokenizer(tokenizer)
    train_rows, eval_rows = Packed.load(work_dir / "train.npz"), Packed.load(work_dir / "eval.npz")
    log.info("loading %s, partitioned over %d ranks", args.model_name_or_path, plan.world_size)
    model = load_model(args, plan, tokenizer)
    trainer = PackedTrainer(
        model=model,
        args=hf_args,
        train_dataset=train_rows,
        data_collator=default_data_collator,  # Trainer's choice for a tokenizer adds an attention_mask
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)

    def evaluation() -> float:
        # The model in DeepSpeed's engine, which exists once trainer.train() has begun.
        return evaluate(trainer.model_wrapped, eval_rows, args.rows_per_micro_batch, hf_args.device)

    log.info("resuming from %s" if resume_from else "starting at step 0%s", resume_from or "")
    # Metrics, progress, overflow, a stop request, checkpoint markers.
    with watch.watching(trainer, args, plan, evaluation, stop) as stopping:
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    if stopping.stopped:
        log.info("stopped at step %d, checkpoint saved; the same command resumes", trainer.state.global_step)
        return STOPPED

    eval_loss_after = evaluation()
    trainer.save_model()
    adapter.check_saved(trainer, folder, to_device(eval_rows, slice(0, 1), hf_args.device))
    report.finish(args, plan, folder, eval_loss_after, hf_args.device, started_s)
    return 0


def training_arguments(args: Arguments, plan: Plan, **of_device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=args.output_dir,
        deepspeed=plan.zero_config,
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
        fp16=plan.dtype == "fp16",
        bf16=plan.dtype == "bf16",
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
        **kernels.of_trainer(plan.kernels, plan.dtype),
        **of_device,
    )


class PackedTrainer(Trainer):
    """Trainer that counts tokens and keeps the last micro-batch for a diagnosis. The rest is Trainer's:
    token-weighted loss over ranks and accumulation, data order, schedule, checkpoints, resume."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Of this rank since the step began: real tokens, answer tokens, micro-batches whose loss is not finite.
        self.step_counts = torch.zeros(3, dtype=torch.float64)
        self.last_micro_batch: dict[str, torch.Tensor] = {}

    def training_step(self, model, inputs, num_items_in_batch=None):
        real_tokens = inputs.pop("real_tokens").sum()
        if inputs.keys() != {"input_ids", "labels", "position_ids"}:
            raise RuntimeError(
                f"{sorted(inputs)}: with an attention_mask packed documents would see each other"
            )
        self.last_micro_batch = inputs
        # Trainer's step is forward and backward (DeepSpeed's engine then steps AdamW). `labels` only tells the model to
        # compute a loss: transformers' ForCausalLMLoss takes the cross-entropy of `shift_labels` instead, and divides
        # its sum by the answer tokens of all ranks and micro-batches of the step, `num_items_in_batch`.
        with answers_only(model, inputs["labels"]) as shift_labels:
            inputs = {**inputs, "shift_labels": shift_labels, "use_cache": False}
            loss = super().training_step(model, inputs, num_items_in_batch)
        answer_tokens, nonfinite = (inputs["labels"] != IGNORE).sum(), ~torch.isfinite(loss)
        self.step_counts += torch.tensor([real_tokens, answer_tokens, nonfinite])
        return loss

    def save_model(self, output_dir=None, _internal_call=False):
        # Trainer's way through DeepSpeed gathers the frozen base as well, one linear layer after the other. This gathers
        # the adapter, and leaves everything partitioned, as DeepSpeed's checkpoint, which comes next, wants it.
        tensors = adapter.gathered(self.deepspeed)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=tensors)
            self.processing_class.save_pretrained(folder)


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


def train_rank(
    args: Arguments, plan: Plan, work_dir: Path, resume_from: Path | None, stop: StopRequest, rank: int
) -> int:
    """`train`, with what a user can mend said in one line."""
    folder, started_s = Path(args.output_dir), time.perf_counter()
    set_up_logging(folder, rank)
    stop.install()
    try:
        code = train(args, plan, work_dir, resume_from, stop, started_s)
        gc.unfreeze()
        gc.collect()  # DeepSpeed's engine ends before the process group that it uses
        dist.barrier()
        dist.destroy_process_group()
        return code
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
        if isinstance(error, dist.DistError) or any(text in str(error) for text in LOST_PEER):
            log.debug("rank %d lost another: %s", rank, error)
            raise LostRanks from error
        log.error("rank %d failed: %s: %s", rank, type(error).__name__, error)
        raise


class Terminal(logging.StreamHandler):
    """Prints above a progress bar instead of into it."""

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
    file = logging.FileHandler(folder / "training.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers = [terminal, file]
