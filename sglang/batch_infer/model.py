"""What a model folder's configuration says, enough to size the KV pool and to check adapters."""

from dataclasses import dataclass
from pathlib import Path

from workbench import UserError
from workbench.models import check_config

NUMBERS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    "max_position_embeddings",
)
# With kernels of SGLang for them; --device cpu has none.
QUANTISED = ("awq", "gptq", "fp8", "compressed-tensors")


@dataclass(frozen=True)
class Model:
    """A Llama- or Qwen2-like language model on disk."""

    folder: str
    config: dict
    context_tokens: int  # trained positions, or the window if there is one
    weight_bytes: int  # in 16 bits
    streamed_bytes: int  # of them, what every decode step reads: all but the gathered input embedding
    kv_bytes_per_token: int
    revision: str | None = None  # on the hub
    weights_id: str = ""  # the revision, or a hash of the weights

    @property
    def dual_chunk(self) -> bool:
        return bool(self.config.get("dual_chunk_attention_config"))


def read(folder: Path, revision: str | None, weights_id: str, device: str) -> Model:
    """Raises UserError for another kind of model."""
    config = check_config(folder, QUANTISED if device == "cuda" else ())
    optional = {name: config.get(name) or 1 for name in ("num_key_value_heads", "head_dim")}
    for name, value in ({name: config.get(name) for name in NUMBERS} | optional).items():
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{folder}/config.json: {name} is {value!r}; not that of a Llama- or Qwen2-like language model"
            )
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    layers = config["num_hidden_layers"]
    linear = layers * sum(a * b for a, b in projection_shapes(config).values())
    table = config["vocab_size"] * config["hidden_size"]  # input embedding and output projection: one each
    return Model(
        folder=str(folder),
        config=config,
        context_tokens=min(config["max_position_embeddings"], sliding_window(config) or 2**62),
        weight_bytes=2 * (linear + table * (1 if config.get("tie_word_embeddings") else 2)),
        streamed_bytes=2 * (linear + table),
        kv_bytes_per_token=2 * layers * kv_heads * head_size * 2,
        revision=revision,
        weights_id=weights_id,
    )


def sliding_window(config: dict) -> int | None:
    """How many tokens some layer looks back on; None: on all. SGLang 0.5.17 gives full attention to every layer of
    Qwen2, Qwen3, Mistral and Phi-3, on GPUs, too: it is right up to this many tokens of prompt and answer."""
    qwen, window = config["model_type"].startswith("qwen"), config.get("sliding_window")
    if config["model_type"] == "llama" or not config.get("use_sliding_window", not qwen):
        return None
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    if isinstance(kinds, list):
        some = "sliding_attention" in kinds
    else:
        some = not qwen or not isinstance(first, int) or first < config["num_hidden_layers"]
    return window if some and isinstance(window, int) and window > 0 else None


def projection_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """(in, out) of a decoder layer's linear layers, Llama's and Qwen2's names."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * size
    return {
        **{"q_proj": (hidden, heads * size), "k_proj": (hidden, kv), "v_proj": (hidden, kv)},
        **{"o_proj": (heads * size, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner)},
        "down_proj": (inner, hidden),
    }
