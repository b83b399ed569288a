"""Top-p sampling with few passes over the logits (batch x vocabulary).

SGLang's own path copies the logits to fp32, divides by the temperature, computes the softmax into a second tensor and
copies it back; with seeds it sorts every row and keeps fp64 copies of all probabilities, which limits how many
requests fit. Here logits stay in the 16 bits in which the model computes them, and one kernel of our own
(seeded_top_p.py) does all the rest. Requests without seeds get one for each step.

A batch goes to SGLang's sampler as a whole if one of its requests has top_k, min_p, no top_p, logprobs or greedy
decoding beside sampled ones, and is drawn from fp32 if one has penalties or biases; with seeds, the others' tokens then
differ from those they get among their like.
Records of run_sglang.py all sample alike.
"""

import functools

from . import asked_for, check_target, hook


def register() -> None:
    """Takes the place of both built-in sampling backends (deterministic mode insists on the name "pytorch")."""
    if not asked_for("lean_sampler"):
        return
    module = "sglang.srt.layers.sampler"
    check_target(f"{module}.create_sampler", needs="_CUSTOM_SAMPLER_FACTORIES")
    check_target(f"{module}.Sampler.forward", needs="logits_output.next_token_logits")
    check_target(f"{module}.Sampler.compute_logprobs_only")
    from sglang.srt.layers.sampler import register_sampler_backend

    for backend in ("flashinfer", "pytorch"):
        register_sampler_backend(backend, lambda: sampler_class()())
    hook("sglang.srt.layers.logits_processor.LogitsProcessor._copy_logits_to_buffer", keep_16_bits, "AROUND")
    hook("sglang.srt.model_executor.model_runner.ModelRunner._preprocess_logits", widen_what_changes, "AROUND")


def keep_16_bits(original, self, logits, logits_metadata, use_buffer=True):
    """The logits of the next tokens go as they are into SGLang's buffer, which CUDA graphs share, instead of in fp32;
    where there is no graph they need no copy. All steps alike: the kernel sums up 32 bits in another order."""
    mode, buffer = logits_metadata.forward_mode.name, logits_metadata.next_token_logits_buffer
    if (
        logits.element_size() != 2
        or mode not in ("DECODE", "EXTEND", "MIXED")
        or logits_metadata.extend_return_logprob
        or logits.shape[-1] > self.vocab_size
        or self.final_logit_softcapping
    ):
        return original(self, logits, logits_metadata, use_buffer)
    if not use_buffer or buffer is None or buffer.shape != logits.shape:
        return logits
    return buffer.view(-1).view(logits.dtype)[: logits.numel()].view(logits.shape).copy_(logits)


def widen_what_changes(original, self, logits_output, sampling_info):
    """Penalties and biases are added in fp32 (masks of grammars are not added)."""
    penalizers = sampling_info.penalizer_orchestrator
    changes = (
        sampling_info.acc_additive_penalties,
        sampling_info.acc_scaling_penalties,
        sampling_info.logit_bias,
    )
    if any(change is not None for change in changes) or (penalizers and penalizers.is_required):
        logits_output.next_token_logits = logits_output.next_token_logits.float()
    return original(self, logits_output, sampling_info)


@functools.cache
def sampler_class() -> type:
    """A subclass of SGLang's Sampler. What it has no faster way for goes to its parent."""
    import torch
    from sglang.srt.layers.sampler import Sampler

    from .seeded_top_p import seeded_top_p

    class LeanSampler(Sampler):
        def forward(self, logits_output, sampling_info, return_logprob, top_logprobs, token_ids, positions):
            if (
                sampling_info.is_all_greedy
                or not sampling_info.need_top_p_sampling
                or sampling_info.need_min_p_sampling
                or sampling_info.need_top_k_sampling
                or sampling_info.has_custom_logit_processor
                or return_logprob
                or any(sampling_info.return_sampling_masks or [])
            ):
                logits_output.next_token_logits = logits_output.next_token_logits.float()
                return super().forward(
                    logits_output, sampling_info, return_logprob, top_logprobs, token_ids, positions
                )
            logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
            seeds = sampling_info.sampling_seed
            if seeds is None:
                seeds = torch.randint(2**31, (len(logits),), device=logits.device)
            temperatures = sampling_info.temperatures.view(-1)
            tokens = seeded_top_p(logits, temperatures, sampling_info.top_ps, seeds, positions)
            self._sync_token_ids_across_tp(tokens, sampling_info)
            return tokens

        def compute_logprobs_only(self, logits_output, *given):
            logits_output.next_token_logits = logits_output.next_token_logits.float()
            super().compute_logprobs_only(logits_output, *given)

    return LeanSampler
