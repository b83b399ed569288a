"""LoRA fine-tuning under DeepSpeed ZeRO-3. `../main.py` is the straight path through these modules."""
