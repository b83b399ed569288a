"""A model folder with the shape of Qwen2.5-7B and no weights, and prompts as token ids: what the benchmarks of
this folder serve with `load_format="dummy"` (random weights).

    python bench/qwen_shape.py FOLDER
    python bench/qwen_shape.py FOLDER ADAPTER        # random weights in files (14 GiB) and a random adapter for them:
                                                     # SGLang reads an adapter the way it reads its base
"""

import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "rehearsal"))

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


def write_weights(folder: Path, adapter: Path) -> None:
    """Weights as transformers draws them, in bfloat16, on the GPU if there is one, and a LoRA adapter of all
    projections for them. Both its factors are random: a fresh adapter's lora_B is zero and changes nothing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)  # the same weights wherever GPU and torch are the same: bytes can be compared
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora, autocast_adapter_dtype=False).save_pretrained(adapter)


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
        write_weights(model, Path(sys.argv[2]))
    print(model)
