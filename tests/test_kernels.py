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
                kernels.fuse_lora(model)
            x = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
            out = model(x)
            (out * torch.randn_like(out)).sum().backward()
            trained = [p.grad for p in model.parameters() if p.requires_grad]
            assert len(trained) == 2
            return [out.detach(), x.grad, *trained]

        for ours, pefts in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(ours, pefts)

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
        (VOLTA, "llama", ("lora",), "need bf16 and a GPU of capability 8.0"),
        (replace(HOPPER, dtype="fp16"), "llama", ("lora",), "need bf16"),
        (Gpus(None, None, None, 14.6, 2, "fp32", ""), "llama", ("lora",), "need bf16"),
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
