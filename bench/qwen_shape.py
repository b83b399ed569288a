"""A model folder with the shape of Qwen2.5-7B and no weights, and prompts as token ids: what the benchmarks of
this folder serve with `load_format="dummy"` (random weights).

    python bench/qwen_shape.py FOLDER
    python bench/qwen_shape.py FOLDER ADAPTER...     # random weights in files (14 GiB), and random adapters for them:
                                                     # SGLang reads an adapter the way it reads its base
"""

import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "rehearsal"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "sglang"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))

CONFIG = {  # config.json of Qwen/Qwen2.5-7B-Instruct
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_sliding_window": False,
}
TOKENS = 151643  # of its tokenizer, without special ones
# Its chat template puts about this many tokens before and after an instruction.
HEADER_TOKENS, END_TOKENS = 24, 5
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
}  # as the fine-tuning program's
CHARACTERS_PER_TOKEN = 4


def build(folder: Path) -> Path:
    """Writes config.json and a tokenizer of as many tokens, and returns the folder. The tokenizer is the
    rehearsal's, filled up with tokens that no text becomes, so that every id a random model samples has a text
    of its own."""
    from tiny_model import build_chatml_tokenizer
    from transformers import Qwen2Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    small = build_chatml_tokenizer()
    small.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {f"w{i}": i for i in range(len(small), TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=small.eos_token,
        pad_token=small.pad_token,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = small.chat_template
    tokenizer.model_max_length = CONFIG["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    return folder


def write_weights(folder: Path) -> None:
    """As transformers draws them, in bfloat16, on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def build_adapter(folder: Path, base: Path) -> Path:
    """Writes a PEFT adapter of all projections, and returns the folder. Both factors are random (a fresh adapter's
    lora_B is zero and changes nothing): it moves an output by about a tenth of its size."""
    import torch
    from safetensors.torch import save_file

    from batch_infer.preflight import projection_shapes

    torch.manual_seed(0)
    tensors, shapes, rank = {}, projection_shapes(CONFIG), ADAPTER["r"]
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            at = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{at}.lora_A.weight"] = (torch.randn(rank, inputs) / inputs**0.5).bfloat16()
            tensors[f"{at}.lora_B.weight"] = (torch.randn(outputs, rank) * 0.02).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = ADAPTER | {"base_model_name_or_path": str(base), "target_modules": list(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def prompt_ids(text: str, vocab_size: int) -> list[int]:
    """As many ids as the instruction has with its chat template around: a header that all prompts share, then
    ids drawn from the text."""
    header, own = random.Random(0), random.Random(text)
    tokens = max(1, len(text) // CHARACTERS_PER_TOKEN) + END_TOKENS
    ids = [header.randrange(3, vocab_size) for _ in range(HEADER_TOKENS)]
    return ids + [own.randrange(3, vocab_size) for _ in range(tokens)]


if __name__ == "__main__":
    model = build(Path(sys.argv[1]))
    if sys.argv[2:]:
        write_weights(model)
    print(model, *(build_adapter(Path(path), model) for path in sys.argv[2:]))
