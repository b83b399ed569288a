"""Builds the rehearsal's models: seeded random weights of a real architecture, with an own tokenizer.

    python rehearsal/tiny_model.py llama|qwen2 FOLDER [--seed 0]

The folder looks like a download from the hub (config, safetensors, tokenizer), so the programs load it
through the same code as the 7B models. The tokenizers are trained on the rehearsal's own text: a
byte-fallback BPE with Llama's conventions (Metaspace, <unk> 0, BOS <s> 1, EOS </s> 2), and a byte-level BPE
with Qwen2's (<|endoftext|>, <|im_start|>, <|im_end|>, and a ChatML template).
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREFERENCES = HERE / "preferences.jsonl"
VOCAB_SIZE = 1024


def texts():
    """What the tokenizers are trained on."""
    for line in PREFERENCES.read_text().splitlines():
        row = json.loads(line)
        yield row["prompt"] + row["chosen"]


def build_tokenizer():
    """A `LlamaTokenizer` of VOCAB_SIZE entries: 3 special tokens, 256 bytes, then characters and merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    trained = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    trained.train_from_iterator(texts(), trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.model_max_length = 1024
    return tokenizer


CHATML = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def build_chatml_tokenizer():
    """A `Qwen2Tokenizer` of VOCAB_SIZE entries with a ChatML template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts(), trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHATML
    tokenizer.model_max_length = 1024
    return tokenizer


SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,  # SGLang's LoRA buffers need a multiple of 64
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    # With the usual 0.02 a frozen head of this width can hardly move a logit: nothing would be learnt.
    "initializer_range": 0.1,
}


def build_llama(folder: Path, seed: int = 0) -> Path:
    """Writes a 1.1 M parameter Llama (4 layers, hidden 128, fp32) into `folder` and returns it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return _save(LlamaForCausalLM, config, build_tokenizer(), folder, seed)


def build_qwen2(folder: Path, seed: int = 0) -> Path:
    """Writes a 1.0 M parameter Qwen2 (4 layers, hidden 128, 2 of 4 heads for KV, fp32) into `folder` and
    returns it. Its answers end by themselves after some dozens of tokens: the row of <|im_end|> in the output
    projection is longer than the others."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SHAPE, num_key_value_heads=2, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    return _save(Qwen2ForCausalLM, config, build_chatml_tokenizer(), folder, seed, longer_row=2)


def _save(model_class, config, tokenizer, folder: Path, seed: int, longer_row: int | None = None) -> Path:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config)
        if longer_row is not None:
            model.lm_head.weight[longer_row] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("architecture", choices=("llama", "qwen2"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print({"llama": build_llama, "qwen2": build_qwen2}[args.architecture](args.folder, args.seed))
