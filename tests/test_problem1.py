"""Problem 1, as students can check it: `python -P -m pytest tests/test_problem1.py`."""

import json

from harness import ROOT, in_child
from lora_sft.arguments import parse, read_zero_config

LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008  # elements of a layer of Llama-2-7B
CARD_GIB = 14.6  # what a card of 16 GB leaves to PyTorch


def test_1a_1b_1c_training_fits_into_two_cards_of_16_gb(transformers, tmp_path):
    """Llama-2-7B in fp16, as `--preflight_only` predicts it (`pytest -rP` shows the parts)."""
    args = parse([])
    zero_config = read_zero_config(args.deepspeed)

    def predict():
        from transformers import LlamaConfig

        from lora_sft.machine import Gpus
        from lora_sft.preflight import FoundModel, Kernels, look_at_gpu_memory, look_at_lora

        LlamaConfig().save_pretrained(tmp_path)  # its defaults are Llama-2-7B's shape
        gpus = Gpus(None, None, None, gpu_limit_gib=CARD_GIB, world_size=2, dtype="fp16", dtype_reason="V100")
        answer_share = 0.35  # of rm-static's tokens, about
        sizes, _ = look_at_lora(
            args, zero_config, FoundModel(str(tmp_path), None, ""), gpus, answer_share, Kernels(())
        )
        print(look_at_gpu_memory(args, gpus, sizes))

    in_child(predict, tmp_path)


def test_1a_a_micro_batch_is_worth_its_gathers():
    """Every micro-batch gathers the whole model: below 2,048 tokens the gathers take most of the time."""
    assert parse([]).tokens_per_micro_batch >= 2048


def test_1c_only_adapters_train_and_they_get_gradients(transformers, tiny_model, tmp_path):
    def look():
        import torch
        from transformers import AutoModelForCausalLM

        from lora_sft.model import add_adapters

        args = parse(["--lora_r", "4", "--lora_target_modules", "q_proj,down_proj"])
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        model = add_adapters(model, args)
        model.gradient_checkpointing_enable({"use_reentrant": True})  # the Trainer does it after this, too
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 4 * 2 * 2  # layers, modules, A and B
        assert all("lora_" in name for name in trained)
        assert {p.dtype for p in trained.values()} == {torch.bfloat16}, "adapters in the base's dtype"
        assert all(p.shape[0 if "lora_A" in name else 1] == 4 for name, p in trained.items())
        config = model.peft_config["default"]
        assert (config.lora_alpha, config.lora_dropout) == (args.lora_alpha, args.lora_dropout)
        model.train()
        ids = torch.arange(16)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)

    in_child(look, tmp_path)


def test_1b_zero_gathers_whole_layers_with_their_adapters():
    zero = read_zero_config(str(ROOT / "deepspeed" / "zero3.json"))["zero_optimization"]
    adapter_tensor = parse([]).lora_r * 11008
    smallest = parse([]).lora_r * 4096
    assert zero["stage3_param_persistence_threshold"] < smallest, "adapters come and go with their layer"
    assert any(name.endswith("DecoderLayer") for name in zero["leaf_module"]["classes"]), "not by linear layers"
    assert zero["stage3_max_live_parameters"] >= 2 * LAYER, "the layer that runs and the one gathered ahead"
    assert zero["stage3_prefetch_bucket_size"] >= LAYER, "less than a layer is no layer ahead"
    assert zero["reduce_bucket_size"] >= adapter_tensor, "one reduction for many gradients"


def test_a_short_rehearsal_learns(adapter):
    summary = json.loads((adapter / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["perplexity_after"] < summary["perplexity_before"]
    assert (adapter / "adapter_model.safetensors").is_file()
