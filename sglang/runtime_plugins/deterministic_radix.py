"""RadixAttention together with deterministic inference on FlashInfer."""

from . import asked_for, check_target, hook

# FlashInfer's prefill kernel takes one of three tiles of queries, by the batch's average of packed queries: a prompt's
# computed tokens times query heads per KV head (FA2DetermineCtaTileQ in its utils.cuh). With another tile the keys are
# summed up in another order.
LARGEST_OF_SMALLER_TILES = (16, 64)


def register() -> None:
    """SGLang switches the radix cache off for FlashInfer in deterministic mode (server_args.py,
    _handle_deterministic_inference) unless the backend is in a list, for which it has an extension point
    but no command-line flag. The batch-invariant kernels themselves are SGLang's.

    So that a prompt always takes the tile of its length: enough tokens at its end are computed although they are
    cached, and only prompts of one tile are prefilled together."""
    if not asked_for("deterministic_radix"):
        return
    target = "sglang.srt.server_args.add_radix_supported_deterministic_attention_backend_choices"
    check_target(target)
    from sglang.srt import server_args

    server_args.add_radix_supported_deterministic_attention_backend_choices(["flashinfer"])
    hook("sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len", keep_the_tile, "AROUND")
    hook("sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", one_tile_a_batch, "AROUND")


def tile(tokens: int, heads_per_kv_head: int) -> int:
    """Which of the three tiles, 0 to 2."""
    return sum(tokens * heads_per_kv_head > largest for largest in LARGEST_OF_SMALLER_TILES)


def least_tokens(tokens: int, heads_per_kv_head: int) -> int:
    """So many of a prompt's `tokens` take the same tile as all of them."""
    smaller = (0, *LARGEST_OF_SMALLER_TILES)[tile(tokens, heads_per_kv_head)]
    return smaller // heads_per_kv_head + 1


def _heads_per_kv_head() -> int:
    from sglang.srt.runtime_context import get_server_args

    server_args = get_server_args()
    model, tp_size = server_args.get_model_config(), server_args.tp_size
    return model.get_num_attention_heads(tp_size) // model.get_num_kv_heads(tp_size)


def keep_the_tile(original, self, input_len: int) -> int:
    """The longest prefix that may come from the cache."""
    return max(0, min(original(self, input_len), input_len - least_tokens(input_len, _heads_per_kv_head())))


def one_tile_a_batch(original, self, req, *args, **kwargs):
    """A request that would take another tile than the batch's first waits for the next batch."""
    if self.can_run_list and _tile_of(req) != _tile_of(self.can_run_list[0]):
        from sglang.srt.managers.schedule_policy import AddReqResult

        return AddReqResult.CONTINUE
    return original(self, req, *args, **kwargs)


def _tile_of(req) -> int:
    return tile(len(req.full_untruncated_fill_ids) - len(req.prefix_indices), _heads_per_kv_head())
