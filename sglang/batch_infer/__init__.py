"""Batch inference on the SGLang Runtime. `../run_sglang.py` is the straight path through these modules."""
