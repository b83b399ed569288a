"""The peak memory of one GPU, predicted part by part before anything loads: every formula of it stands here.

Bytes are counted from what PyTorch allocates; tests hold the parts to the tensors that autograd really keeps, for
five published shapes, and their sum to what GPUs measured.
"""

from collections.abc import Callable, Collection

import numpy as np

from workbench import UserError
from workbench.machine import GIB

from .arguments import Arguments

CONTEXT_GIB = 1.2  # what CUDA, cuBLAS and NCCL take outside PyTorch's allocator
# Log-probabilities, their gradient and that of the logits, in fp32. Half-precision logits and their fp32 copy are
# gone by then.
BYTES_PER_LOGIT = 12


def kept_bytes(config: dict, size: int, dropout: bool, kernels: Collection[str]) -> int:
    """What a decoder layer with LoRA on all its linear layers keeps of a token for its backward pass, in bytes;
    `size` is that of a number. Attention runs in a fused kernel, which repeats keys and values for every head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    attention = heads * (config.get("head_dim") or hidden // heads)
    norms = 2 * (size if "rms_norm" in kernels else 4) * hidden  # their inputs, in fp32 if they are not fused
    queries_keys_values_output = 4 * attention * size
    gate_up_and_silu = (2 if "swiglu" in kernels else 3) * inner * size
    if dropout:  # each of the seven adapters has its own copy of its input, and a mask of one byte
        adapter_inputs = (5 * hidden + attention + inner) * (size + 1)
    else:  # the query's, key's and value's are one tensor, gate's and up's another; o's is the attention's output
        adapter_inputs = (2 * hidden + inner) * size
    return norms + queries_keys_values_output + gate_up_and_silu + adapter_inputs


def gradient_bytes(config: dict, size: int) -> int:
    """Gradients of a token in flight when a layer's backward pass begins, and everything kept is still there: of the
    layer's output, of the input of down_proj, and of one of the two that it is the product of."""
    return (config["hidden_size"] + 2 * config["intermediate_size"]) * size


def gathered_parameters(base: dict[str, int], layer: float, args: Arguments, zero: dict, held: int) -> float:
    """How many parameters ZeRO-3 holds whole at once. `base`: sizes by name, a tied embedding once; `layer`: elements
    of a decoder layer; `held`: layers whose matrices autograd keeps besides. Never more than the model has."""
    total = sum(base.values())
    # A layer that has run forward is needed again when those behind it have run forward and backward, with
    # checkpointing forward once more in between: the distance counts each of them as often.
    passes = 3 if args.gradient_checkpointing else 2
    again = zero.get("stage3_max_reuse_distance", 1e9) / passes
    layers = max(zero.get("stage3_max_live_parameters", 1e9), again, layer) + held * layer
    outside = sum(size for name, size in base.items() if ".layers." not in name)  # embedding and head
    return min(layers + outside, total)


def largest_answer_share(answer_tokens: np.ndarray, max_seq_len: int, rows_per_micro_batch: int) -> float:
    """Share of a micro-batch's positions with logits that hardly any micro-batch of a run exceeds: the mean of so many
    random rows and three standard deviations, and no more than the fullest rows have. `answer_tokens` [rows]."""
    counts = np.sort(answer_tokens)[::-1]
    likely = counts.mean() + 3 * counts.std() / rows_per_micro_batch**0.5
    return float(min(likely, counts[:rows_per_micro_batch].mean()) / max_seq_len)


def predict(
    config: dict,
    base: dict[str, int],
    lora_sizes: list[int],
    args: Arguments,
    zero: dict,
    *,
    dtype: str,
    world_size: int,
    answer_share: float,
    kernels: Collection[str],
    kept_layers: int = 0,
) -> dict[str, float]:
    """Parts of the peak of one GPU in GiB. Without the last, the slack, they add up to the peak that PyTorch
    allocates; what it reserves depends on how much there is: with little it gives back what waits for reuse.

    `config`: the model's; `base`, `lora_sizes`: elements of its tensors; `zero`: zero_optimization of the JSON;
    `answer_share`: the share of a micro-batch's positions that have logits; `kernels`: the chosen ones;
    `kept_layers`: the last layers, which keep their activations under checkpointing; without it all do.
    """
    size = 4 if dtype == "fp32" else 2
    tokens, layers = args.tokens_per_micro_batch, config["num_hidden_layers"]
    base_total, lora_total = sum(base.values()), sum(lora_sizes)
    layer = sum(n for name, n in base.items() if ".layers.0." in name) + lora_total / layers
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    lora_resident = sum(n if n <= threshold else n / world_size for n in lora_sizes)
    bucket = zero.get("reduce_bucket_size", 5e8)  # allocated whole, however few train
    if not zero.get("contiguous_gradients", True):
        bucket = min(bucket, lora_total)
    kept_layers = kept_layers if args.gradient_checkpointing else layers
    kept = max(1, kept_layers) * kept_bytes(config, size, args.lora_dropout > 0, kernels)
    activations = tokens * (kept + gradient_bytes(config, size))
    fused = (
        "lora" in kernels and args.lora_target_modules == "all-linear"
    )  # keeps the parameter, not the matrix
    held = 0 if fused or zero.get("memory_efficient_linear", True) else kept_layers
    logits = tokens * answer_share * config["vocab_size"] * BYTES_PER_LOGIT
    if not kept_layers:  # gone before a layer is computed again: only what they take beyond it counts
        logits = max(0, logits - activations)
    parts = {
        "weight shard": base_total * size / world_size,
        # Weights, then a gradient and in fp32 the master weights, two moments and a gradient.
        "LoRA states": lora_resident * size + lora_total / world_size * (size + 16),
        "gathered layers": gathered_parameters(base, layer, args, zero, held) * size if world_size > 1 else 0,
        "reduce bucket": bucket * size,
        "checkpointed inputs": tokens * (layers - kept_layers) * config["hidden_size"] * size,
        "layer activations": activations,
        "logits and loss": logits,
    }
    # With two streams: blocks that one has left and the other not yet. The allocator takes more if there is more.
    two_streams = world_size > 1 and zero.get("overlap_comm", True)
    parts["allocator slack"] = (0.15 if two_streams else 0.05) * sum(parts.values())
    return {name: value / GIB for name, value in parts.items()}


def layers_to_keep(predicted_gib: Callable[[int], float], layers: int, room_gib: float) -> int:
    """How many layers may keep their activations where `predicted_gib` of so many is the peak: 4 % stay free, because a
    prediction is right within 3 %, and other processes come and go."""
    fitting = (kept for kept in range(layers, 0, -1) if predicted_gib(kept) <= 0.96 * room_gib)
    return next(fitting, 0)


def judge(
    args: Arguments, parts: dict[str, float], *, world_size: int, limit_gib: float, free_gib: float | None
) -> str:
    """The parts as a table. Raises UserError with the flag to change if their sum is above the limit of a GPU, or
    above what is free there."""
    predicted = sum(parts.values())
    unit, scale = ("GiB", 1) if predicted >= 1 else ("MiB", 1024)
    width = max(map(len, parts))
    rows = "".join(f"\n{'':26}{name:{width}} {gib * scale:6.2f} {unit}" for name, gib in parts.items())
    text = f"{predicted * scale:.2f} {unit} predicted of {limit_gib:.2f} GiB per GPU{rows}"
    if args.device == "cpu":
        return text
    if predicted > limit_gib:
        cure = what_to_change(args, parts, world_size, limit_gib)
        raise UserError(f"{text}\n{'':24}does not fit; use {cure}")
    if free_gib is not None and free_gib < min(predicted + CONTEXT_GIB, limit_gib):
        raise UserError(
            f"{free_gib:.1f} GiB free on a GPU, {predicted:.1f} needed: another process holds it (nvidia-smi)"
        )
    return text


def what_to_change(args: Arguments, parts: dict[str, float], world_size: int, limit_gib: float) -> str:
    """The flag that brings down the largest part."""
    by_tokens = sum(parts[name] for name in ("checkpointed inputs", "layer activations", "logits and loss"))
    if world_size < 2 and parts["weight shard"] > limit_gib / 2:
        return "a second GPU (--gres=gpu:2): ZeRO-3 halves the weight shard"
    if not args.gradient_checkpointing:
        return "--gradient_checkpointing"
    if parts["gathered layers"] > by_tokens:
        return f"smaller stage3_max_live_parameters and stage3_max_reuse_distance in {args.deepspeed}"
    if parts["LoRA states"] > by_tokens:
        return f"--lora_r {max(1, args.lora_r // 2)}"
    if args.tokens_per_micro_batch <= args.max_seq_len:
        return f"--max_seq_len {args.max_seq_len // 2} --tokens_per_micro_batch {args.max_seq_len // 2}"
    return f"--tokens_per_micro_batch {args.rows_per_micro_batch // 2 * args.max_seq_len}"
