"""Fused steps: LoRA as one function computes what PEFT does, and each run takes what its GPUs have."""

import json
from dataclasses import replace

import pytest

from harness import in_child
from lora_sft.arguments import KERNELS, Arguments, read_zero_config
from lora_sft.machine import Gpus
from workbench import UserError

HOPPER = Gpus("H100", 79.0, [9, 0], 77.9, 2, "bf16", "")
VOLTA = Gpus("V100", 15.0, [7, 0], 14.6, 2, "fp16", "")


@pytest.mark.v100
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_as_one_function_gives_pefts_output_and_gradients(libraries, tmp_path, dropout):
    """In fp64, for x, A, B and a bias, with the same elements dropped."""

    def compare():
        import torch
        from peft import LoraConfig, get_peft_model

        from lora_sft import kernels

        def gradients(fused: bool) -> list[torch.Tensor]:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(6, 10)).double()
            config = LoraConfig(
                r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False
            )
            model = get_peft_model(model, config)
            if fused:
                kernels.fuse(model, ("lora",), "fp32")
            x = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
            out = model(x)
            (out * torch.randn_like(out)).sum().backward()
            trained = [p.grad for p in model.parameters() if p.requires_grad]
            assert len(trained) == 2
            return [out.detach(), x.grad, *trained]

        for ours, pefts in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(ours, pefts)

    in_child(compare, tmp_path)


@pytest.mark.v100
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_norms_and_rotations_give_transformers_logits_and_gradients(libraries, tmp_path, model_type):
    """Of a whole model in fp64, whose norms transformers computes in 32 bits."""

    def compare():
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        from lora_sft import kernels

        def gradients(*chosen: str) -> list[torch.Tensor]:
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, **sizes, **heads)
            ).double()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, 0.3, 0.4)
            targets = ["q_proj", "k_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
            kernels.fuse(model, chosen, "fp32")
            replaced = [m for m in model.modules() if "forward" in vars(m) and hasattr(m, "variance_epsilon")]
            assert len(replaced) == (5 if chosen else 0)
            logits = model(torch.arange(30).view(2, 15)).logits
            logits.square().sum().backward()
            return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

        theirs = gradients()
        for ours, transformers in zip(gradients("rms_norm", "rope"), theirs, strict=True):
            torch.testing.assert_close(ours, transformers, rtol=1e-3, atol=1e-5)

    in_child(compare, tmp_path)


@pytest.mark.v100
def test_a_norm_rounds_where_transformers_does(libraries, tmp_path):
    """In fp16, weights and inputs far from 1: the same bits but for the sum's last one."""

    def compare():
        import torch
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        from lora_sft.kernels import rms_norm_forward

        torch.manual_seed(0)
        norm = LlamaRMSNorm(256).half()
        torch.nn.init.normal_(norm.weight, 0, 5)
        x = (torch.randn(64, 256) * 700).half()  # its squares are beyond fp16
        ours, theirs = rms_norm_forward(norm, x), norm(x)
        assert ours.dtype == torch.float16
        assert (ours != theirs).float().mean() < 0.01
        torch.testing.assert_close(ours, theirs)

    in_child(compare, tmp_path)


def test_documents_begin_where_positions_are_0(libraries, tmp_path):
    def look():
        import torch

        from lora_sft.kernels import document_ends

        assert document_ends(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])).tolist() == [0, 2, 5, 10]

    in_child(look, tmp_path)


@pytest.mark.parametrize(
    ("gpus", "model_type", "chosen", "why"),
    [
        (HOPPER, "llama", KERNELS, "9.0 runs all of them"),
        (HOPPER, "opt", ("lora", "varlen"), "does not know opt models"),
        (VOLTA, "llama", ("lora", "rms_norm", "rope"), "need bf16 and a GPU of capability 8.0"),
        (VOLTA, "gemma", ("lora",), "gemma models may compute them otherwise"),
        (replace(HOPPER, dtype="fp16"), "qwen2", ("lora", "rms_norm", "rope"), "need bf16"),
        (Gpus(None, None, None, 14.6, 2, "fp32", ""), "mistral", ("lora", "rms_norm", "rope"), "need bf16"),
    ],
)
def test_a_run_takes_what_its_gpus_and_its_model_have(libraries, tmp_path, gpus, model_type, chosen, why):
    def look():
        from lora_sft import kernels

        zero_config = read_zero_config(Arguments().deepspeed)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert kernels.choose(Arguments(), gpus, tmp_path, zero_config)[0] == chosen
        assert why in kernels.choose(Arguments(), gpus, tmp_path, zero_config)[1]
        assert kernels.choose(Arguments(kernels="none"), gpus, tmp_path, zero_config)[0] == ()
        del zero_config["zero_optimization"]["leaf_module"]
        assert "lora" not in kernels.choose(Arguments(), gpus, tmp_path, zero_config)[0]
        with pytest.raises(UserError, match="lora: without the decoder layer"):
            kernels.choose(Arguments(kernels="lora"), gpus, tmp_path, zero_config)

    in_child(look, tmp_path)
