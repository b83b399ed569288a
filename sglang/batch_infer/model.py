"""What a model folder's configuration says, enough to size the KV pool and to check adapters."""

import json
from dataclasses import dataclass
from pathlib import Path

from workbench import UserError


@dataclass(frozen=True)
class Model:
    """A Llama- or Qwen2-like language model on disk."""

    folder: str
    config: dict
    context_tokens: int  # trained positions
    weight_bytes: int  # in 16 bits
    streamed_bytes: int  # of them, what every decode step reads: all but the gathered input embedding
    kv_bytes_per_token: int
    revision: str | None = None  # on the hub
    weights_id: str = ""  # the revision, or a hash of the weights

    @property
    def heads(self) -> tuple[int, int]:
        """(query heads, KV heads)"""
        heads = self.config["num_attention_heads"]
        return heads, self.config.get("num_key_value_heads") or heads

    @property
    def dual_chunk(self) -> bool:
        return bool(self.config.get("dual_chunk_attention_config"))


def read(folder: Path, revision: str | None, weights_id: str) -> Model:
    """Raises UserError for another kind of model."""
    try:
        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        layers = config["num_hidden_layers"]
        linear = layers * sum(a * b for a, b in projection_shapes(config).values())
        table = config["vocab_size"] * config["hidden_size"]  # input embedding and output projection: one each
        return Model(
            folder=str(folder),
            config=config,
            context_tokens=config["max_position_embeddings"],
            weight_bytes=2 * (linear + table * (1 if config.get("tie_word_embeddings") else 2)),
            streamed_bytes=2 * (linear + table),
            kv_bytes_per_token=2 * layers * kv_heads * head_size * 2,
            revision=revision,
            weights_id=weights_id,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/config.json: not that of a Llama- or Qwen2-like language model ({error!r})"
        ) from error


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
