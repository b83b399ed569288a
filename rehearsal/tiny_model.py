"""Builds the rehearsal's models: seeded random weights of a real architecture, with an own tokenizer.

    python rehearsal/tiny_model.py /tmp/tiny_llama [--seed 0]

The folder looks like a download from the hub (config, safetensors, tokenizer), so the programs load it
through the same code as the 7B models. The tokenizer is a byte-fallback BPE with Llama's conventions
(Metaspace, <unk> 0, BOS <s> 1, EOS </s> 2), trained on the rehearsal's own text.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREFERENCES = HERE / "preferences.jsonl"
VOCAB_SIZE = 1024


def build_tokenizer():
    """A `LlamaTokenizer` of VOCAB_SIZE entries: 3 special tokens, 256 bytes, then characters and merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    rows = [json.loads(line) for line in PREFERENCES.read_text().splitlines()]
    trained = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    trained.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.model_max_length = 1024
    return tokenizer


def build_llama(folder: Path, seed: int = 0) -> Path:
    """Writes a 1.1 M parameter Llama (4 layers, hidden 128, fp32) into `folder` and returns it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # With the usual 0.02 a frozen head of this width can hardly move a logit: nothing would be learnt.
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(build_llama(args.folder, args.seed))
