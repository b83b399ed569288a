"""A model folder with the shape of Llama-2-7B and random weights in fp16: what the benchmarks of training load.

python bench/llama_shape.py FOLDER         # 12.6 GiB, drawn on the GPU if there is one
python bench/llama_shape.py FOLDER 64      # as many layers, 64 wide instead of 4,096: what is left is the host's time
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "rehearsal"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from workbench import UserError
from workbench.files import disk_full, write_json

CONFIG = {  # config.json of meta-llama/Llama-2-7b-hf
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
INDEX = "model.safetensors.index.json"


def build(folder: Path, config: dict = CONFIG, seed: int = 0) -> Path:
    """Writes config, tokenizer and weights (a file per layer; the index last), and returns the folder. A
    folder that holds such an index already is left alone. The tokenizer is the rehearsal's, filled up with
    tokens that no text becomes. Raises UserError if the disk is full."""
    if (folder / INDEX).exists():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder, config["vocab_size"])
        write_json(folder / "config.json", config)
        write_json(
            folder / "generation_config.json", {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        )
        write_weights(folder, config, seed)
    except Exception as error:
        if folder.exists() and disk_full(error, folder):
            raise UserError(f"{folder}: the disk is full; Llama-2-7B's shape takes 12.6 GiB in fp16") from error
        raise
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tiny_model import build_tokenizer
    from transformers import LlamaTokenizer

    small = build_tokenizer()
    small.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {f"w{i}": i for i in range(len(small), vocab_size)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.model_max_length = CONFIG["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


def write_weights(folder: Path, config: dict, seed: int) -> None:
    """Normal with `initializer_range` as standard deviation, norms 1."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layer = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    layer |= {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    files = [{"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}]
    for number in range(config["num_hidden_layers"]):
        files.append({f"model.layers.{number}.{name}": shape for name, shape in layer.items()})
    places, total_bytes = {}, 0
    for number, shapes in enumerate(files, 1):
        tensors = {}
        for name, shape in shapes.items():
            weight = torch.ones(shape, dtype=torch.float16, device=device)
            if len(shape) == 2:
                weight.normal_(0, config["initializer_range"], generator=draw)
            tensors[f"{name}.weight"] = weight.cpu()
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": places})


def thin(hidden_size: int) -> dict:
    """The configuration with narrow layers; heads are 16 wide, the vocabulary is the rehearsal tokenizer's size and
    a little more."""
    heads = hidden_size // 16
    inner = CONFIG["intermediate_size"] * hidden_size // CONFIG["hidden_size"]
    narrow = {"hidden_size": hidden_size, "intermediate_size": inner, "vocab_size": 4096}
    return CONFIG | narrow | {"num_attention_heads": heads, "num_key_value_heads": heads}


def main(folder: Path, hidden_size: int = 0) -> int:
    print(build(folder, thin(hidden_size) if hidden_size else CONFIG))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("hidden_size", type=int, nargs="?", default=0, help="a multiple of 16")
    given = parser.parse_args()
    if given.hidden_size % 16 or given.hidden_size < 0:
        parser.error(f"hidden_size {given.hidden_size}: must be a multiple of 16")
    try:
        sys.exit(main(given.folder, given.hidden_size))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
