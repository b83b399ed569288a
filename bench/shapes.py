"""A model folder with the shape of a published model and random weights, in the published precision.

python bench/shapes.py llama2-7b FOLDER                         # 12.6 GiB, drawn on the GPU if there is one
python bench/shapes.py qwen2.5-7b FOLDER --adapter FOLDER       # 14.2 GiB, and a random LoRA adapter of rank 16
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("rehearsal", "common"))
from workbench import UserError
from workbench.files import disk_full, write_json

LLAMA = {  # config.json of meta-llama/Llama-2-7b-hf
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False},
    **{"torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2},
}
SHAPES = {
    "llama2-7b": LLAMA,
    "tinyllama-1.1b": LLAMA  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
    | {"max_position_embeddings": 2048},
    "qwen2.5-7b": {  # Qwen/Qwen2.5-7B-Instruct
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False},
        **{"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
        "use_sliding_window": False,
    },
}
CHATML_TOKENS = 151643  # of Qwen2.5's tokenizer, without special ones


def build(name: str, folder: Path, weights: bool = True, **changes: object) -> Path:
    """Writes config, tokenizer and (unless SGLang's load_format="dummy" draws them) weights, and returns the
    folder; one that exists is left alone. `changes`: of the configuration. Raises UserError if the disk is full."""
    if folder.exists():
        return folder
    config, unfinished = SHAPES[name] | changes, folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_json(unfinished / "config.json", config)
        write_tokenizer(unfinished, config)
        if weights:
            write_weights(unfinished, config)
    except Exception as error:
        if unfinished.exists() and disk_full(error, unfinished):
            raise UserError(f"{folder}: the disk is full; the shape of {name} does not fit") from error
        raise
    return unfinished.rename(folder)


def write_tokenizer(folder: Path, config: dict) -> None:
    """The rehearsal's, filled up with tokens that no text becomes: every id that a random model draws has a text."""
    import tiny_model

    small, tokens, special = tiny_model.build_tokenizer, config["vocab_size"], {}
    if config["model_type"] == "qwen2":
        small, tokens = tiny_model.build_chatml_tokenizer, min(CHATML_TOKENS, tokens)
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        special["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    small = small()
    small.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {f"w{i}": i for i in range(len(small), tokens)}
    tokenizer = type(small)(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], **special)
    tokenizer.chat_template = small.chat_template
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


def write_weights(folder: Path, config: dict) -> None:
    """As transformers draws them, the same wherever GPU and torch are the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, config["torch_dtype"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="4GB")  # as Qwen2.5's files are


def write_adapter(base: Path, folder: Path) -> None:
    """Both factors are random: a fresh adapter's lora_B is zero and changes nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora, autocast_adapter_dtype=False).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter for it")
    given = parser.parse_args()
    try:
        print(build(given.name, given.folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.adapter:
        write_adapter(given.folder, given.adapter)
    return 0


if __name__ == "__main__":
    sys.exit(main())
