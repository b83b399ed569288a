"""RadixAttention together with deterministic inference on FlashInfer."""

from . import asked_for, check_target, hook

# FlashInfer's prefill kernel takes the tile of queries from the batch's average length, packed: tokens times query
# heads per KV head (FA2DetermineCtaTileQ in its utils.cuh). Above this it is always the same tile; with another one
# the keys are summed up in another order.
PACKED_QUERIES_OF_SMALLER_TILES = 64


def register() -> None:
    """SGLang switches the radix cache off for FlashInfer in deterministic mode (server_args.py,
    _handle_deterministic_inference) unless the backend is in a list, for which it has an extension point
    but no command-line flag. The batch-invariant kernels themselves are SGLang's.

    A prompt that is cached as a whole would be prefilled with one token, in a batch whose average is
    so short that the tile changes with what runs beside it. So some tokens at the end of a prompt are always
    computed. Prompts that are shorter than that as a whole keep the doubt; run_sglang.py counts them."""
    if not asked_for("deterministic_radix"):
        return
    target = "sglang.srt.server_args.add_radix_supported_deterministic_attention_backend_choices"
    check_target(target)
    from sglang.srt import server_args

    server_args.add_radix_supported_deterministic_attention_backend_choices(["flashinfer"])
    hook("sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len", leave_a_full_tile, "AROUND")


def tile_tokens(query_heads: int, kv_heads: int) -> int:
    """The least query tokens of a prompt with which FlashInfer's prefill takes its largest tile."""
    return PACKED_QUERIES_OF_SMALLER_TILES // (query_heads // kv_heads) + 1


def leave_a_full_tile(original, self, input_len: int) -> int:
    """The longest prefix that may come from the cache."""
    from sglang.srt.runtime_context import get_server_args

    server_args = get_server_args()
    model, tp_size = server_args.get_model_config(), server_args.tp_size
    computed = tile_tokens(model.get_num_attention_heads(tp_size), model.get_num_kv_heads(tp_size))
    return max(0, min(original(self, input_len), input_len - computed))
