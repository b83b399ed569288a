"""Is the saved adapter the one that was trained? Checked against the live, partitioned tensors; and parity.json, with which
whoever serves it can check the rest of the way (sglang/batch_infer/parity.py)."""

import json
import logging
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer

from workbench.files import write_text

from .data import IGNORE
from .model import logits_of
from .run_folder import ADAPTER, PARITY

log = logging.getLogger("lora_sft")


class AdapterError(RuntimeError):
    """The saved adapter is not what was trained: a bug, not the user's fault."""


def check_saved(trainer: Trainer, folder: Path, batch: dict[str, torch.Tensor]) -> None:
    """`check` of what `trainer` has just saved. Collective."""
    dist.barrier()  # rank 0 writes, every rank reads
    log.debug("adapter saved")
    # The first step of a warm-up has learning rate 0.
    learning = any(entry.get("learning_rate", 0) > 0 for entry in trainer.state.log_history)
    log.info("adapter checked: %s", check(trainer.model_wrapped, folder, batch, learning))


def gathered(engine) -> dict[str, torch.Tensor]:
    """The adapter's full tensors on the CPU, under the names of the live parameters. Collective: call it on every
    rank. Gathers LoRA tensors only (some 100 MB), never the base."""
    engine.empty_partition_cache()  # none may be on its way, with a layer gathered ahead
    adapter = lora_parameters(engine)
    with deepspeed.zero.GatheredParameters(list(adapter.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in adapter.items()}


def lora_parameters(engine) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if "lora_" in name}


def problems(stored: dict[str, torch.Tensor], expected_keys: set[str], learning: bool = True) -> list[str]:
    """What is wrong with an adapter file: missing or unexpected keys, empty or non-finite tensors, lora_B
    all zero (nothing learnt; not looked at if `learning` is False)."""
    found = []
    if missing := expected_keys - stored.keys():
        found.append(f"{len(missing)} keys missing, e.g. {min(missing)}")
    if surplus := stored.keys() - expected_keys:
        found.append(f"{len(surplus)} unexpected keys, e.g. {min(surplus)}")
    for name, tensor in stored.items():
        if tensor.numel() == 0:
            found.append(f"{name} is empty")
        elif not torch.isfinite(tensor).all():
            found.append(f"{name} has non-finite values")
    b_tensors = [tensor for name, tensor in stored.items() if "lora_B" in name]
    if learning and not any(tensor.any() for tensor in b_tensors):
        found.append("every lora_B is zero: nothing was learnt")
    return found


@torch.no_grad()
def check(engine, folder: Path, batch: dict[str, torch.Tensor], learning: bool = True) -> str:
    """Compares the file in `folder` with the live tensors, then loads it into the live base; writes parity.json.

    The second part overwrites the live adapter with zeros (logits must change to the base's) and then with
    the file's tensors (logits [B, S, V] must be the trained ones again, bit for bit). Collective. Returns
    one line for the log; raises AdapterError on every rank.
    """
    # Under the names of the saved file.
    live = get_peft_model_state_dict(engine.module, gathered(engine), save_embedding_layers=False)
    stored = load_file(folder / ADAPTER)
    found = problems(stored, set(live), learning)
    found += [f"{name} differs from the live tensor" for name in live if name in stored
              and not torch.equal(stored[name], live[name].to(stored[name].dtype))]  # fmt: skip
    if found:
        raise AdapterError(f"{folder / ADAPTER}: " + "; ".join(found[:5]))

    def logits() -> torch.Tensor:
        result = logits_of(engine, batch)
        engine.optimizer.empty_partition_cache()  # a tensor that is being gathered ahead cannot be written to
        return result

    engine.eval()
    trained = logits()
    overwrite(engine, {name: torch.zeros_like(tensor) for name, tensor in stored.items()})
    base = logits()
    overwrite(engine, stored)
    reloaded = logits()
    engine.train()
    if not torch.equal(reloaded, trained):
        raise AdapterError(
            f"{folder / ADAPTER}: logits differ after loading by {(reloaded - trained).abs().max()}"
        )
    if dist.get_rank() == 0:
        parity = {"dtype": str(trained.dtype), "answers": answers_in(batch, trained)}
        write_text(folder / PARITY, json.dumps(parity))
    effect = (trained - base).abs().max().item()
    if learning and effect == 0:
        raise AdapterError(f"{folder / ADAPTER}: the adapter does not change the base's logits")
    size_mib = (folder / ADAPTER).stat().st_size / 2**20
    return (
        f"{len(stored)} tensors, {size_mib:.1f} MiB, file equals live, reload equals live (effect {effect:.2g})"
    )


def answers_in(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> list[dict]:
    """Of each document with an answer in the first packed row: its token ids, where the answer begins, and the natural
    logarithm of each answer token's probability. `logits` [B, S, V]."""
    ids, places, labels = (batch[name][0].tolist() for name in ("input_ids", "position_ids", "labels"))
    starts = [i for i, place in enumerate(places) if place == 0]
    found = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        first = next((i for i in range(start, end) if labels[i] != IGNORE), None)
        if first is None:  # padding
            continue
        answer = batch["input_ids"][0, first:end]
        of_all = logits[0, first - 1 : end - 1].float().log_softmax(-1)
        logprobs = of_all.gather(1, answer[:, None])[:, 0].tolist()
        found.append({"input_ids": ids[start:end], "answer_start": first - start, "logprobs": logprobs})
    return found


def overwrite(engine, tensors: dict[str, torch.Tensor]) -> None:
    """Writes `tensors` (names of the saved file) into the live adapter. Collective."""
    adapter = lora_parameters(engine)
    with deepspeed.zero.GatheredParameters(list(adapter.values()), modifier_rank=0):
        if dist.get_rank() == 0:
            for name, parameter in adapter.items():
                parameter.copy_(tensors[name.replace(".default.", ".")])
