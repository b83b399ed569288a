"""LoRA fine-tuning under DeepSpeed ZeRO-3. `../main.py` is the straight path through these modules."""


class UserError(Exception):
    """The user's input or machine is at fault: the message says what, where and the cure; exit code 2."""
