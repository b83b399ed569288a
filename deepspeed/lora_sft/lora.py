"""LoRA on a frozen base: for the ranks on the partitioned model, for preflight on one without memory."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from .arguments import Arguments


def add_adapters(model: PreTrainedModel, args: Arguments) -> PeftModel:
    """Freezes `model` and adds to the linear layers that `args.lora_targets` names what trains instead: the pairs
    lora_A [r, in] (random, from torch's generator) and lora_B [out, r] (zero), in the base's dtype."""
    # Problem 1c: configure LoRA from the flags (peft) and return the model wrapped with it. One thing fails
    # silently otherwise: DeepSpeed scales the loss only if what trains is fp16, so the adapters must keep the
    # base's dtype, and PEFT's default would not.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
    )
    # DeepSpeed keeps fp32 master weights anyway.
    return get_peft_model(model, config, autocast_adapter_dtype=False)
    # End of problem 1c
