"""LoRA fine-tuning under DeepSpeed ZeRO-3. `../main.py` is the straight path through these modules."""

from workbench import UserError

__all__ = ["UserError"]
