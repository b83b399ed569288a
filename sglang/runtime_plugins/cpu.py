"""The real SGLang Runtime on any CPU: a platform, and one named hook for each place that assumes a GPU.

Exactness. The same record gives the same bits whatever runs beside it, because every matrix product has a
constant shape: linear layers run on blocks of ROWS rows, attention on query blocks whose place and key
length depend on the absolute position only. What is left (norms, activations, softmax over the vocabulary)
is computed row by row. Holds with one OpenMP thread, for one torch build on one instruction set.
"""

import functools
import itertools
import os

from . import asked_for, check_target, hook

ROWS = 16  # rows of every matrix product


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: the platform's class, or None if this run did not ask for the CPU,
    whatever torch says about CUDA."""
    return "runtime_plugins.cpu_platform:PlainCpuPlatform" if asked_for("cpu") else None


def register() -> None:
    """Entry point `sglang.srt.plugins`: registers the hooks if this run asked for the CPU."""
    if not asked_for("cpu"):
        return
    allow_deterministic_mode()
    unpin_memory()
    mask_logits_with_xgrammar()
    hash_seeds_with_torch()
    keep_stock_operators()
    keep_gpu_communicators_off()
    if os.environ.get("RUNTIME_PLUGINS_ROW_BLOCKS", "1") == "1":  # a test switches it off to see what happens
        compute_linear_layers_in_row_blocks()
        compute_lora_in_row_blocks()
        compute_attention_in_position_blocks()


# --- what assumes a GPU -------------------------------------------------------------------------------


def allow_deterministic_mode() -> None:
    """server_args.py, DETERMINISTIC_ATTENTION_BACKEND_CHOICES: `torch_native` is not in the lists, although
    the blocks below make it batch-invariant. Uses SGLang's own extension points."""
    names = ("add_deterministic_attention_backend_choices",)
    names += ("add_radix_supported_deterministic_attention_backend_choices",)
    for name in names:
        check_target(f"sglang.srt.server_args.{name}")
    from sglang.srt import server_args

    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])


class _Unpinned:
    """The torch module for a module that asks for pinned memory, which needs a GPU's driver."""

    def __getattr__(self, name: str):
        import torch

        found = getattr(torch, name)
        if name not in ("tensor", "zeros"):
            return found

        def without_pinning(*args, **options):
            options.pop("pin_memory", None)
            return found(*args, **options)

        return without_pinning


def unpin_memory() -> None:
    """lora/layers.py, lora/backend/torch_backend.py and lora/lora.py pin tensors without asking the platform;
    so does constrained/xgrammar_backend.py, _allocate_token_bitmask."""
    import torch

    for name in ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend"):
        check_target(name, needs="pin_memory=True")
        __import__("sys").modules[name].torch = _Unpinned()
    torch.Tensor.pin_memory = lambda self, *args, **options: self

    def allocate(vocab_size: int, batch_size: int) -> torch.Tensor:
        return torch.full((batch_size, (vocab_size + 31) // 32), -1, dtype=torch.int32)

    hook("sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask", allocate, "REPLACE")


def mask_logits_with_xgrammar() -> None:
    """constrained/xgrammar_backend.py, apply_vocab_mask raises "Unsupported device" on a CPU; xgrammar itself
    has a kernel for it."""
    module = "sglang.srt.constrained.xgrammar_backend"

    def apply(logits, vocab_mask) -> None:
        import xgrammar

        xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)

    hook(f"{module}.XGrammarGrammar.apply_vocab_mask", lambda self, *a, **k: apply(*a, **k), "REPLACE")
    hook(f"{module}.XGrammarGrammarBackend.apply_vocab_mask", apply, "REPLACE")


def murmur_hash32(seed, positions, col_indices):
    """MurmurHash3 (x86, 32 bits, seed 0) of the 16 bytes (seed: 8, position: 4, column: 4), little endian.

    seed and positions [n], col_indices [m] -> int64 [n, m] in [0, 2^32). tests/test_runtime_plugins.py holds
    it against a published implementation's vectors.
    """
    import torch

    low32 = 0xFFFFFFFF

    def times(x: torch.Tensor, constant: int) -> torch.Tensor:
        # x * constant stays below 2^64 only if x is split: int64 has no unsigned product.
        high, low = x >> 16, x & 0xFFFF
        return (((high * constant & low32) << 16) + low * constant) & low32

    def mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        block = times(block, 0xCC9E2D51)
        block = times(((block << 15) | (block >> 17)) & low32, 0x1B873593)
        state = state ^ block
        state = ((state << 13) | (state >> 19)) & low32
        return (state * 5 + 0xE6546B64) & low32

    seed = seed.to(torch.int64)[:, None]
    state = torch.zeros_like(seed)
    for block in (seed & low32, (seed >> 32) & low32, positions.to(torch.int64)[:, None] & low32):
        state = mix(state, block)
    state = mix(state, col_indices.to(torch.int64)[None, :] & low32) ^ 16
    state = times(state ^ (state >> 16), 0x85EBCA6B)
    state = times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)


def hash_seeds_with_torch() -> None:
    """sglang/kernels/ops/sampling/murmur_hash.py is a Triton kernel; layers/sampler.py, multinomial_with_seed,
    draws a record's tokens from it (record's seed, position, vocabulary index)."""
    hook("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash32, "REPLACE")


def keep_stock_operators() -> None:
    """batch_invariant_ops/batch_invariant_ops.py, enable_batch_invariant_mode, replaces matmul and others by
    Triton kernels."""
    target = "sglang.srt.batch_invariant_ops.batch_invariant_ops.enable_batch_invariant_mode"
    hook(target, lambda *args, **options: None, "REPLACE")


def keep_gpu_communicators_off() -> None:
    """distributed/parallel_state.py, GroupCoordinator.__init__, creates CUDA communicators at tp_size > 1;
    gloo does the work then."""
    import inspect

    target = "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__"
    check_target(target, needs="use_pynccl")

    def initialise(original, *args, **options):
        bound = inspect.signature(original).bind(*args, **options)
        for name in bound.signature.parameters:
            if name.startswith("use_") and name != "use_message_queue_broadcaster":
                bound.arguments[name] = False
        return original(*bound.args, **bound.kwargs)

    hook(target, initialise, "AROUND")


# --- constant shapes ----------------------------------------------------------------------------------


def linear(x, weight, bias=None):
    """x [..., k] @ weight [n, k].T + bias, computed on blocks of exactly ROWS rows (the last one padded with
    zeros), so that a row's bits do not depend on how many rows there are."""
    import torch
    from torch.nn import functional

    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if rows % ROWS:
        flat = functional.pad(flat, (0, 0, 0, -rows % ROWS))
    blocks = [functional.linear(block, weight, bias) for block in flat.split(ROWS)]
    result = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return result[:rows].view(*x.shape[:-1], -1)


def compute_linear_layers_in_row_blocks() -> None:
    """layers/quantization/unquant.py, UnquantizedLinearMethod.apply and UnquantizedEmbeddingMethod.apply, and
    the output projection in layers/logits_processor.py, LogitsProcessor._compute_lm_head."""

    def apply(self, layer, x, bias=None):
        return linear(x, layer.weight, bias)

    def compute_lm_head(original, self, hidden_states, lm_head, embedding_bias=None):
        if not hasattr(lm_head, "weight"):
            return original(self, hidden_states, lm_head, embedding_bias)
        return linear(hidden_states.to(lm_head.weight.dtype), lm_head.weight, embedding_bias)

    unquant = "sglang.srt.layers.quantization.unquant"
    for name in ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
        hook(f"{unquant}.{name}.apply", apply, "REPLACE")
    hook("sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head", compute_lm_head, "AROUND")


def compute_lora_in_row_blocks() -> None:
    """lora/torch_ops/__init__.py, sgemm_lora_a_fwd and sgemm_lora_b_fwd: one product per run of records with
    the same adapter, whose length depends on what else runs."""
    import torch

    def segments(info):
        """(rows, adapter slot, rank, scaling) of each run of rows with the same adapter."""
        start = 0
        for slot, length in zip(info.weight_indices_cpu.tolist(), info.seg_lens_cpu.tolist(), strict=True):
            rank = int(info.lora_ranks_cpu[slot])
            if rank and length:
                yield slice(start, start + length), slot, rank, float(info.scalings_cpu[slot])
            start += length

    def lora_a(inputs, weights, batch_info, num_slices=1):
        width = weights.shape[1] if weights.numel() else 0
        output = torch.zeros(inputs.shape[0], width, dtype=inputs.dtype)
        for rows, slot, rank, scaling in segments(batch_info) if width else ():
            used = num_slices * rank
            output[rows, :used] = linear(inputs[rows], weights[slot, :used]) * scaling
        return output

    def lora_b(inputs, weights, batch_info, slice_offsets, base_output=None):
        offsets = slice_offsets.tolist()
        if base_output is None:
            base_output = torch.zeros(inputs.shape[0], offsets[-1], dtype=inputs.dtype)
        for rows, slot, rank, _ in segments(batch_info) if weights.numel() else ():
            for index, (start, end) in enumerate(itertools.pairwise(offsets)):
                part = inputs[rows, index * rank : (index + 1) * rank]
                base_output[rows, start:end] += linear(part, weights[slot, start:end, :rank])
        return base_output

    hook("sglang.srt.lora.torch_ops.sgemm_lora_a_fwd", lora_a, "REPLACE")
    hook("sglang.srt.lora.torch_ops.sgemm_lora_b_fwd", lora_b, "REPLACE")


@functools.lru_cache(maxsize=4096)
def _causal_mask(start: int, dtype):
    """[ROWS, start + ROWS]: row r sees positions up to start + r."""
    import torch

    hidden = torch.ones(ROWS, start + ROWS, dtype=torch.bool).triu(start + 1)
    return torch.zeros(ROWS, start + ROWS, dtype=dtype).masked_fill_(hidden, float("-inf"))


def attend(query, k_cache, v_cache, tokens, scaling: float | None):
    """Causal attention of one record's newest tokens, in blocks that depend on the absolute position only.

    query [new, heads, size]; k_cache and v_cache [slots, kv_heads, size]; tokens [total]: the slots of
    positions 0 to total - 1, the query's last. A query at position p always runs as row p % ROWS of a block
    of ROWS queries against the keys up to that block's last position (masked; where there is none yet, the
    first key stands in): the same shapes whether its prefix came from the cache, from another chunk or from
    this pass. Returns [new, heads, size].
    """
    from torch.nn import functional

    new, heads, size = query.shape
    total = tokens.shape[0]
    first = total - new
    slots = functional.pad(tokens, (0, -total % ROWS), value=int(tokens[0]))
    keys = k_cache[slots].to(query.dtype).transpose(0, 1)[None]
    values = v_cache[slots].to(query.dtype).transpose(0, 1)[None]
    output = query.new_empty(new, heads, values.shape[-1])
    for start in range(first - first % ROWS, total, ROWS):
        low, high = max(start, first), min(start + ROWS, total)
        block = query.new_zeros(1, heads, ROWS, size)
        block[0, :, low - start : high - start] = query[low - first : high - first].transpose(0, 1)
        result = functional.scaled_dot_product_attention(
            block,
            keys[:, :, : start + ROWS],
            values[:, :, : start + ROWS],
            attn_mask=_causal_mask(start, query.dtype),
            scale=scaling,
            enable_gqa=keys.shape[1] != heads,
        )
        output[low - first : high - first] = result[0, :, low - start : high - start].transpose(0, 1)
    return output


def compute_attention_in_position_blocks() -> None:
    """layers/attention/torch_native_backend.py: _run_sdpa_forward_extend pads the query to the whole sequence,
    _run_sdpa_forward_decode uses one row; sliding windows and encoders stay stock."""
    name = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"

    def run(query, output, k_cache, v_cache, req_to_token, slots, firsts, counts, scaling):
        start = 0
        for slot, first, count in zip(slots.tolist(), firsts.tolist(), counts, strict=True):
            rows, tokens = slice(start, start + count), req_to_token[slot, : first + count]
            output[rows] = attend(query[rows], k_cache, v_cache, tokens, scaling)
            start += count
        return output

    def extend(original, self, *tensors, scaling=None, causal=False, encoder_lens=None, **options):
        *common, _seq_lens, prefix_lens, extend_lens, encoder_lens = (*tensors, encoder_lens)[:10]
        if not causal or encoder_lens is not None or options.get("sliding_window_size") is not None:
            return original(self, *tensors, scaling=scaling, causal=causal, **options)
        return run(*common, prefix_lens, extend_lens.tolist(), scaling)

    def decode(original, self, *tensors, scaling=None, encoder_lens=None, **options):
        *common, seq_lens, encoder_lens = (*tensors, encoder_lens)[:8]
        if encoder_lens is not None or options.get("sliding_window_size") is not None:
            return original(self, *tensors, scaling=scaling, **options)
        return run(*common, seq_lens - 1, [1] * len(seq_lens), scaling)

    hook(f"{name}._run_sdpa_forward_extend", extend, "AROUND")
    hook(f"{name}._run_sdpa_forward_decode", decode, "AROUND")
