"""Jump-forward decoding: text that the grammar forces is appended as tokens and computed in one pass.

SGLang paper (arXiv 2312.07104), "Efficient constrained decoding with compressed finite state machine": runs
of states with one way out are merged, and a run is decoded at once. SGLang removed it from its runtime in
pull request 4032; the grammar backends (constrained/xgrammar_backend.py, llguidance_backend.py,
try_jump_forward) still say what is forced, and nothing asks them. Four things differ from the removed code:

* In place. A running request keeps its KV slots and its lock on the radix tree; the forced tokens extend it,
  as a chunk of a chunked prefill does. Nothing is released, inserted or matched again.
* It pays. What is forced in a pass must outweigh what the pass costs all running requests.
* No pass of its own. All other running requests decode their next token in the same pass (SGLang's mixed
  batch, schedule_batch.py, mix_with_running).
* No token is changed afterwards. The removed code tokenised the whole answer again (issue 2045: quality).
  Here tokens that the model has chosen stay. llguidance gives ids; xgrammar's text is tokenised, and the
  tokens at its end that the free text behind it could change are left to the model.
"""

import functools

from . import asked_for, check_target, hook

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
# What may stand before and behind a forced text; a token that any of them changes is not stable.
BEFORE = ("\n", "a", "0", '"', " ")
# How many decode steps a pass with a jump costs the requests beside it (measured). On the
# CPU a mixed pass takes no longer than a decode step; on a GPU it runs without the decode CUDA graph.
GPU_COST = 6
COST_IN_STEPS = {"cpu": 0}
BEHIND = ("a", "e", "S", "0", "_", " ", '"', ",", ".", "}", "\n", "\u00e9")


def register() -> None:
    """Entry point `sglang.srt.plugins`: registers the hooks if this run asked for jump-forward."""
    if not asked_for("jump_forward"):
        return
    batch = "sglang.srt.managers.schedule_batch"
    check_target(f"{batch}.ScheduleBatch.mix_with_running", needs="mix_running_indices")
    check_target(f"{batch}.ScheduleBatch.prepare_for_extend", needs="alloc_for_extend")
    check_target(f"{batch}.Req.update_finish_state", needs="finished_len")
    check_target(f"{batch}.Req.get_fill_ids", needs="full_untruncated_fill_ids")
    processor = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    check_target(f"{processor}.process_batch_result_prefill", needs="req not in batch.decoding_reqs")
    check_target("sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.try_jump_forward", needs="[], s")
    check_target(
        "sglang.srt.constrained.llguidance_backend.GuidanceGrammar.try_jump_forward", needs='ff_tokens, ""'
    )
    check_target(f"{SCHEDULER}.get_next_batch_to_run", needs="self.get_new_batch_prefill(running_batch)")
    hook(f"{SCHEDULER}.__init__", initialise, "AROUND")
    hook(f"{SCHEDULER}._add_request_to_queue", add_request_to_queue, "AROUND")
    hook(f"{SCHEDULER}.get_new_batch_prefill", get_new_batch_prefill, "AROUND")


# --- hooks --------------------------------------------------------------------------------------------


def initialise(original, self, *args, **options) -> None:
    """Refuses what jump-forward was not built for, instead of being wrong. RuntimeError ends the engine."""
    original(self, *args, **options)
    refused = {
        "the overlap scheduler (the next step is in flight before its last token is known); "
        "set disable_overlap_schedule": self.enable_overlap,
        "speculative decoding": not self.spec_algorithm.is_none(),
        "disaggregation": self.disaggregation_mode.name != "NULL",
        "pp_size above 1": self.ps.pp_size > 1,
        "page_size above 1": self.page_size > 1,
        "data-parallel attention": self.require_mlp_sync,
        "sliding-window or state-space layers": self.is_hybrid_swa or self.is_hybrid_ssm,
        "diffusion models": self.dllm_config is not None,
        "hisparse": self.enable_hisparse,
        "reasoning parsers": bool(self.server_args.reasoning_parser),
        "the hierarchical cache": self.server_args.enable_hierarchical_cache,
    }
    for reason, found in refused.items():
        if found:
            raise RuntimeError(f"runtime_plugins: jump_forward does not work with {reason}")


def add_request_to_queue(original, self, req, *args, **options):
    """Scheduler._add_request_to_queue: what the grammar forces first (and, after a retraction, next) enters
    with the prefill that comes anyway."""
    if may_jump(req):
        append_forced(req, forced_tokens(req))
    return original(self, req, *args, **options)


def get_new_batch_prefill(original, self, running_batch):
    """Scheduler.get_new_batch_prefill: where there is no prefill to run, and the next pass would be a decode
    step, it becomes a mixed batch if any running request can jump."""
    plan = original(self, running_batch)
    if plan.batch_to_run is None:
        return jump(self, plan.running_batch) or plan
    for req in plan.batch_to_run.reqs:  # forced tokens in the radix tree are not cached prompt tokens
        req.cached_tokens = min(req.cached_tokens, len(req.origin_input_ids))
    return plan


# --- what is forced -----------------------------------------------------------------------------------


def may_jump(req) -> bool:
    """Whether only ids decide what the request does next. Requests that want something per token, or whose
    sampling counts tokens, decode as ever."""
    params = req.sampling_params
    wants = (req.return_logprob, req.return_hidden_states, req.return_sampling_mask, req.return_routed_experts)
    counts = (params.frequency_penalty, params.presence_penalty, params.min_new_tokens)
    inputs = (req.session, req.input_embeds, req.multimodal_inputs, req.positional_embed_overrides)
    return (
        req.grammar is not None
        and not req.finished()
        and req.to_finish is None
        and not any(wants)
        and not any(counts)
        and params.repetition_penalty == 1.0
        and req.custom_logit_processor is None
        and all(value is None for value in inputs)
    )


def forced_tokens(req) -> list[int]:
    """Ids of what the grammar forces next; changes nothing."""
    try:
        ids, text = req.grammar.try_jump_forward(req.tokenizer) or ((), "")
    except UnicodeDecodeError:  # xgrammar: the forced bytes begin or end inside a character
        return []
    return list(ids) if ids else list(stable_tokens(req.tokenizer, text))


@functools.lru_cache(maxsize=4096)
def stable_tokens(tokenizer, text: str) -> tuple[int, ...]:
    """The first tokens of `text`, as the tokenizer writes it in the middle of a text, that stay the same
    whatever of BEHIND follows. () if there are none."""
    if not text:
        return ()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for before in BEFORE:
        start = encode(before)
        stable = encode(before + text)
        if stable[: len(start)] != start:
            continue  # the text's beginning merges with it
        for behind in BEHIND:
            other = encode(before + text + behind)
            same = [one == two for one, two in zip(stable, other, strict=False)]
            stable = stable[: [*same, False].index(False)]
        if len(stable) >= len(start):
            return tuple(stable[len(start) :])
    return ()


def append_forced(req, ids: list[int]) -> int:
    """Appends ids to the answer, up to the first that the grammar does not take (a tokenizer's other spelling)
    or that would end the request (EOS, stop, max_new_tokens), which is left to the next decode step. Returns
    how many were appended."""
    count = 0
    for token in ids:
        req.output_ids.append(token)
        req.update_finish_state()
        try:
            if req.finished():
                raise ValueError("ends the request")
            req.grammar.accept_token(token)
        except ValueError:
            req.output_ids.pop()
            req.finished_reason = req.finished_len = None
            break
        count += 1
    if count:
        # SGLang's own way out, a list with a value per token: lengths of the runs where they begin.
        info = req.customized_info = req.customized_info or {}
        runs = info.setdefault("forced_runs", [])
        runs += [0] * (len(req.output_ids) - count - len(runs)) + [count] + [0] * (count - 1)
    return count


# --- the pass -----------------------------------------------------------------------------------------


def jump(scheduler, running):
    """The NextBatchPlan in which requests of `running` (a ScheduleBatch) jump and the others decode, or None
    if none can, or pool or prefill budget have no room."""
    import torch
    from sglang.srt.managers.schedule_batch import NextBatchPlan, ScheduleBatch
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    if not running.has_grammar or running.return_logprob:  # mixed batches have no logprobs
        return None
    budget = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
    forced = {}
    for index, req in enumerate(running.reqs):
        ids = forced_tokens(req) if may_jump(req) else []
        if ids and len(ids) < budget:
            forced[index] = ids
            budget -= len(ids) + 1
    gained = sum(len(ids) for ids in forced.values())
    if not forced or gained < COST_IN_STEPS.get(scheduler.device, GPU_COST) * len(running.reqs):
        return None
    need = len(running.reqs) + gained  # KV slots
    evict_from_tree_cache(scheduler.tree_cache, need)
    if scheduler.token_to_kv_pool_allocator.available_size() < need:
        return None
    jumpers = []
    for index, ids in forced.items():
        req = running.reqs[index]
        first = req.kv_committed_len  # the last sampled token has no KV yet
        if append_forced(req, ids):
            slots = scheduler.req_to_token_pool.req_to_token[req.req_pool_idx, :first]
            req.prefix_indices = slots.to(torch.int64, copy=True)
            req._refresh_fill_ids()
            req.set_extend_range(first, req.seqlen)
            req.already_computed = first  # decoded tokens are no cache hits
            jumpers.append(index)
    if not jumpers:
        return None
    batch = ScheduleBatch.init_new(
        [running.reqs[index] for index in jumpers],
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    batch.prefill_stats = prefill_stats(scheduler, batch, running)
    others = [i for i, req in enumerate(running.reqs) if i not in jumpers and not req.finished()]
    full = running.batch_is_full
    running.filter_batch(keep_indices=others)
    if others:
        running.prepare_for_decode()
        batch.mix_with_running(running)
    batch.decoding_reqs = batch.reqs  # the radix tree gets what it would have got from decode steps
    return NextBatchPlan(batch_to_run=batch, running_batch=ScheduleBatch(reqs=[], batch_is_full=full))


def prefill_stats(scheduler, batch, running):
    """What SGLang's log line of a pass wants to know."""
    from sglang.srt.managers.scheduler_components.metrics_reporter import PrefillStats, QueueCount

    return PrefillStats(
        log_input_tokens=batch.extend_num_tokens,
        log_hit_tokens=0,
        new_token_ratio=scheduler.new_token_ratio_tracker.current,
        num_running_reqs=QueueCount.from_reqs(running.reqs, scheduler.enable_priority_scheduling),
        num_new_seqs=len(batch.reqs),
    )
