"""The real SGLang Runtime on any CPU: a platform, and one named hook for each place that assumes a GPU.

Exactness. The same record gives the same bits whatever runs beside it. A row of a product does not depend on how
many rows there are, as long as these are a multiple of 16 in linear layers and of 8 in attention, whose tiles begin at
absolute positions (tests try many numbers). What is left (norms, activations, softmax over the vocabulary) is computed
row by row. Holds with one OpenMP thread (with two, some rows differ on AVX-512), for one torch build on one
instruction set.
"""

import itertools
import os
import random
from typing import TYPE_CHECKING, NamedTuple

from . import asked_for, check_target, hook

ROWS, MOST_ROWS = 16, 256  # of a linear layer's product
QUERIES, KEYS, MOST_TILES = 16, 64, 64  # positions of attention's tiles, and how many at once

if TYPE_CHECKING:
    from torch import Tensor


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
    draw_without_sorting()
    keep_stock_operators()
    keep_gpu_communicators_off()
    wait_for_requests()
    if os.environ.get("RUNTIME_PLUGINS_ROW_BLOCKS", "1") == "1":  # a test switches it off to see what happens
        compute_linear_layers_in_row_blocks()
        compute_lora_in_row_blocks()
        compute_attention_in_tiles()


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


def draw(probs, top_ks, top_ps, min_ps, need_min_p, seeds, positions):
    """A token per row of `probs` [n, vocabulary] -> int32 [n], by the row's own seed and position. All others
    are [n], too; without `seeds` every draw is new.

    Nothing is sorted (as in seeded_top_p.py): a token is drawn from all, and if those above it hold more than
    top_p, or are top_k or more, or it lies below min_p of the largest, again from those above it."""
    import torch

    seeds = torch.randint(2**31, (len(probs),)) if seeds is None else seeds
    numbers = [
        random.Random(f"{seed} {place}") for seed, place in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]
    tokens = torch.zeros(len(probs), dtype=torch.int32)
    rows, left = torch.arange(len(probs)), probs
    while len(rows):
        upto = left.cumsum(-1)
        target = upto[:, -1] * torch.tensor([1 - numbers[row].random() for row in rows])
        # In (0, all]: the first token that reaches it has a probability above 0. NaNs give the last one.
        token = torch.searchsorted(upto, target[:, None]).clamp_(max=probs.shape[1] - 1)
        tokens[rows] = token[:, 0].int()
        chosen = left.gather(1, token)
        left = torch.where(left > chosen, left, 0)
        outside = (left.sum(-1) > top_ps[rows]) | ((left > 0).sum(-1) >= top_ks[rows])
        if need_min_p:
            outside |= chosen[:, 0] < min_ps[rows] * probs[rows].amax(-1)
        rows, left = rows[outside], left[outside]
    return tokens


def draw_without_sorting() -> None:
    """layers/sampler.py, top_k_top_p_min_p_sampling_from_probs_torch and sampling_from_probs_torch, sort the
    vocabulary and hash each of its entries (a Triton kernel) for every token."""
    import torch

    def from_all(probs, sampling_seed=None, positions=None):
        no_limit = torch.full((len(probs),), probs.shape[1] + 1)
        return draw(probs, no_limit, no_limit, None, False, sampling_seed, positions)

    sampler = "sglang.srt.layers.sampler"
    hook(f"{sampler}.top_k_top_p_min_p_sampling_from_probs_torch", draw, "REPLACE")
    hook(f"{sampler}.sampling_from_probs_torch", from_all, "REPLACE")


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


def wait_for_requests() -> None:
    """managers/data_parallel_controller.py, event_loop asks for requests without pause: with a copy of the model for
    each core it would take a quarter of their time."""
    target = "sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop"
    check_target(target, needs="self.recv_from_tokenizer, flags=zmq.NOBLOCK")

    def event_loop(self) -> None:
        from sglang.srt.managers.data_parallel_controller import sock_recv

        while True:
            self.soft_watchdog.feed()
            if self.recv_from_tokenizer.poll(1000):
                self._request_dispatcher(sock_recv(self.recv_from_tokenizer))

    hook(target, event_loop, "REPLACE")


# --- constant shapes ----------------------------------------------------------------------------------


def linear(x, weight, bias=None):
    """x [..., k] @ weight [n, k].T + bias. Rows are padded with zeros to a multiple of ROWS, at most MOST_ROWS
    in a product: a row's bits do not depend on how many rows there are."""
    import torch
    from torch.nn import functional

    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if rows % ROWS:
        flat = functional.pad(flat, (0, 0, 0, -rows % ROWS))
    blocks = [functional.linear(block, weight, bias) for block in flat.split(MOST_ROWS)]
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
        records = zip(info.weight_indices_cpu.tolist(), info.seg_lens_cpu.tolist(), strict=True)
        for slot, same in itertools.groupby(records, key=lambda record: record[0]):
            length, rank = sum(length for _, length in same), int(info.lora_ranks_cpu[slot])
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


class Tiles(NamedTuple):
    """How the attention of some queries is computed: a block of a record's queries against KEYS of its keys at a
    time, which begin at a multiple of KEYS. Computed once for all layers."""

    blocks: int
    queries: int  # of a block: positions that begin at a multiple of it
    places: list[int]  # [new]: where the queries are among blocks * queries
    block: "Tensor"  # [tiles], ascending
    slots: "Tensor"  # [tiles, KEYS]: in the KV pool
    mask: "Tensor"  # [tiles, 1, rows, KEYS]: -inf where a key is behind its query


def cut(req_to_token, slots: list[int], firsts: list[int], counts: list[int], group: int) -> list[Tiles]:
    """For records whose tokens' slots are in the rows slots[i] of `req_to_token`, and whose positions firsts[i] to
    firsts[i] + counts[i] - 1 are queries, with `group` heads for one of KV. About MOST_TILES at once: keys are copied.
    """
    queries = 1 if max(counts) == 1 else QUERIES
    parts, tiles = [[]], 0
    for slot, first, count in zip(slots, firsts, counts, strict=True):
        for start in range(first - first % queries, first + count, queries):
            if tiles >= MOST_TILES:
                parts, tiles = [*parts, []], 0
            parts[-1].append((slot, start, max(start, first), min(start + queries, first + count)))
            tiles += start // KEYS + 1
    return [_tiles(req_to_token, blocks, queries, group) for blocks in parts]


def _tiles(req_to_token, blocks: list[tuple[int, int, int, int]], queries: int, group: int) -> Tiles:
    """A block is its row of `req_to_token`, its start, its first query and the end of its queries."""
    import torch

    places = [i * queries + q - start for i, (_, start, low, end) in enumerate(blocks) for q in range(low, end)]
    slot, start, _, end = torch.tensor(blocks).T
    block = torch.arange(len(blocks)).repeat_interleave(start // KEYS + 1)
    keys = torch.cat([torch.arange(0, first + 1, KEYS) for first in start.tolist()])
    keys = keys[:, None] + torch.arange(KEYS)
    rows = torch.arange(-(-queries * group // 8) * 8) // group
    hidden = keys[:, None, None, :] > start[block, None, None, None] + rows[:, None]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    slots = req_to_token[slot[block, None], keys.minimum(end[block, None] - 1)]
    return Tiles(len(blocks), queries, places, block, slots, mask)


def attend(query, k_cache, v_cache, tiles: Tiles, scaling: float):
    """Causal attention; query [new, heads, size], k_cache and v_cache [slots, kv_heads, size] -> [new, heads, size].

    One block may hold one query or QUERIES, for a product's rows are a multiple of 8; its tiles are added up in their
    order."""
    import torch
    from torch.nn import functional

    heads, size = query.shape[1:]
    blocks = query.new_zeros(tiles.blocks * tiles.queries, heads, size)
    blocks[tiles.places] = query
    # The queries of the heads that share one of KV are rows of one product.
    rows = blocks.view(tiles.blocks, tiles.queries, k_cache.shape[1], -1, size).transpose(1, 2).flatten(2, 3)
    used = rows.shape[2]
    rows = functional.pad(rows, (0, 0, 0, tiles.mask.shape[2] - used))
    keys, values = (
        cache.index_select(0, tiles.slots.flatten()).view(*tiles.slots.shape, *cache.shape[1:]).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts, log_sums = flash(
        rows[tiles.block],
        keys.to(query.dtype),
        values.to(query.dtype),
        attn_mask=tiles.mask.to(query.dtype),
        scale=scaling,
    )

    index = tiles.block[:, None, None].expand_as(log_sums)
    largest = log_sums.new_full(rows.shape[:3], float("-inf")).scatter_reduce_(0, index, log_sums, "amax")
    weights = (log_sums - largest[tiles.block]).exp_()
    sums = torch.zeros_like(largest).index_add_(0, tiles.block, weights)
    result = query.new_zeros(*sums.shape, values.shape[-1]).index_add_(
        0, tiles.block, parts * weights[..., None]
    )
    result = (result / sums[..., None])[:, :, :used].unflatten(2, (tiles.queries, -1)).transpose(1, 2)
    return result.reshape(len(blocks), heads, -1)[tiles.places]


def compute_attention_in_tiles() -> None:
    """layers/attention/torch_native_backend.py: _run_sdpa_forward_extend pads the query to the whole sequence,
    _run_sdpa_forward_decode uses one row, each record by record; sliding windows and encoders stay stock.
    init_forward_metadata comes once per pass: its layers share the tiles."""
    import torch

    name = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"

    def begin(original, self, forward_batch):
        self.tiles = None
        return original(self, forward_batch)

    def run(self, query, output, k_cache, v_cache, req_to_token, slots, firsts, counts, scaling):
        if self.tiles is None:
            group = query.shape[1] // k_cache.shape[1]
            self.tiles = cut(req_to_token, slots.tolist(), firsts.tolist(), counts, group)
        queries = query.split([len(tiles.places) for tiles in self.tiles])
        parts = zip(queries, self.tiles, strict=True)
        return torch.cat([attend(part, k_cache, v_cache, tiles, scaling) for part, tiles in parts], out=output)

    def extend(original, self, *tensors, scaling=None, causal=False, encoder_lens=None, **options):
        *common, _seq_lens, prefix_lens, extend_lens, encoder_lens = (*tensors, encoder_lens)[:10]
        if not causal or encoder_lens is not None or options.get("sliding_window_size") is not None:
            return original(self, *tensors, scaling=scaling, causal=causal, **options)
        return run(self, *common, prefix_lens, extend_lens.tolist(), scaling)

    def decode(original, self, *tensors, scaling=None, encoder_lens=None, **options):
        *common, seq_lens, encoder_lens = (*tensors, encoder_lens)[:8]
        if encoder_lens is not None or options.get("sliding_window_size") is not None:
            return original(self, *tensors, scaling=scaling, **options)
        return run(self, *common, seq_lens - 1, [1] * len(seq_lens), scaling)

    hook(f"{name}.init_forward_metadata", begin, "AROUND")
    hook(f"{name}._run_sdpa_forward_extend", extend, "AROUND")
    hook(f"{name}._run_sdpa_forward_decode", decode, "AROUND")
