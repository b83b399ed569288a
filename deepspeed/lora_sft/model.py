"""The frozen base with LoRA adapters, and logits only where the loss needs them."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from . import kernels
from .arguments import Arguments
from .data import IGNORE, Packed
from .preflight import Plan

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(args: Arguments, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """The base, partitioned over the ranks while it loads, and LoRA on top. Trainer's arguments must exist already:
    they hold the ZeRO configuration, which transformers looks up here (`zero.Init`)."""
    model = AutoModelForCausalLM.from_pretrained(
        plan.model_folder, dtype=DTYPES[plan.dtype], attn_implementation=kernels.attention(plan.kernels)
    )
    model.config.use_cache = False  # with a cache, packed documents would see each other
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    set_seed(args.seed)  # the same lora_A on every rank
    model = add_adapters(model, args)
    # What the adapter's file will name as its base.
    model.peft_config["default"].revision = plan.model_revision
    model.peft_config["default"].base_model_name_or_path = args.model_name_or_path
    if (
        not args.gradient_checkpointing
    ):  # with it Trainer does this: else ZeRO-3 releases the first layer before its turn
        model.enable_input_require_grads()
    kernels.fuse(model, plan.kernels, plan.dtype)
    remember_modules(model)
    return model


def add_adapters(model: PreTrainedModel, args: Arguments) -> PeftModel:
    """Freezes `model`, and adds what trains instead to the linear layers that `args.lora_targets` names.

    A layer with the frozen weight W [out, in] then computes  W x + alpha / r * B A dropout(x)  (Hu et al. 2021, arXiv
    2106.09685): A = lora_A [r, in] is random, from torch's generator, and B = lora_B [out, r] zero, so nothing changes
    before the first step. `args` gives r, alpha, the dropout and the targets.

    Expected: the model wrapped by PEFT (task type CAUSAL_LM); `requires_grad` of the adapters and of nothing else; and
    adapters in the base's dtype. PEFT's default would make them fp32, without a word: DeepSpeed scales the loss only if
    what trains is fp16, and keeps fp32 master weights anyway.
    """
    # Problem 1c: configure LoRA from the flags (peft) and return the model wrapped with it.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)
    # End of problem 1c


def remember_modules(model: PeftModel) -> None:
    """DeepSpeed asks the model and each decoder layer for its parameters whenever it gathers or releases one, and each
    time walks through PEFT's modules, 80 a layer; before each step it and Trainer walk through all of them, while the GPU
    waits. From here on they remember the answer, and whether they train."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (model, model.get_base_model(), *layers):
        module.named_parameters = functools.partial(_remembered, module, tuple(module.named_parameters()))
    model.modules = tuple(model.modules()).__iter__
    model.train = functools.partial(_train, model)


def _remembered(module: torch.nn.Module, found: tuple, prefix: str = "", recurse: bool = True, **options):
    """`named_parameters` of a module that has `found` with the default options."""
    if recurse and not prefix and not options:
        return iter(found)
    return type(module).named_parameters(module, prefix, recurse, **options)


def _train(model: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return model if model.training == mode else type(model).train(model, mode)


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
