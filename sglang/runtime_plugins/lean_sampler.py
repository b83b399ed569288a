"""Top-p sampling with few passes over the logits (batch x vocabulary, fp32).

SGLang's own path divides by the temperature, computes the softmax into a second tensor and copies it back; with
seeds it sorts every row and keeps fp64 copies of all probabilities, which limits how many requests fit. Here
FlashInfer's softmax takes the temperature along, and a draw by seeds is one kernel of our own (seeded_top_p.py), as
FlashInfer's sampling kernels have one seed for a batch.

A batch goes to SGLang's sampler as a whole if one of its requests has top_k, min_p, no top_p, logprobs or greedy
decoding beside sampled ones; with seeds, the others' tokens then differ from those they get among their like.
Records of run_sglang.py all sample alike.
"""

import functools

from . import asked_for, check_target


def register() -> None:
    """Takes the place of both built-in sampling backends (deterministic mode insists on the name "pytorch")."""
    if not asked_for("lean_sampler"):
        return
    module = "sglang.srt.layers.sampler"
    check_target(f"{module}.create_sampler", needs="_CUSTOM_SAMPLER_FACTORIES")
    check_target(f"{module}.Sampler.forward", needs="_sample_from_probs")
    from sglang.srt.layers.sampler import register_sampler_backend

    for backend in ("flashinfer", "pytorch"):
        register_sampler_backend(backend, lambda: sampler_class()())


@functools.cache
def sampler_class() -> type:
    """A subclass of SGLang's Sampler. What it has no faster way for goes to its parent."""
    from sglang.srt.layers.sampler import Sampler

    class LeanSampler(Sampler):
        def forward(self, logits_output, sampling_info, return_logprob, top_logprobs, token_ids, positions):
            seeds = sampling_info.sampling_seed
            if (
                sampling_info.is_all_greedy
                or not sampling_info.need_top_p_sampling
                or sampling_info.need_min_p_sampling
                or (sampling_info.need_top_k_sampling and seeds is not None)
                or sampling_info.has_custom_logit_processor
                or return_logprob
                or any(sampling_info.return_sampling_masks or [])
            ):
                return super().forward(
                    logits_output, sampling_info, return_logprob, top_logprobs, token_ids, positions
                )
            logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
            temperatures, top_ps = sampling_info.temperatures.view(-1), sampling_info.top_ps
            if seeds is not None:
                from .seeded_top_p import seeded_top_p

                tokens = seeded_top_p(logits, temperatures, top_ps, seeds, positions)
            else:
                from flashinfer.sampling import softmax

                probs = softmax(logits, temperatures)
                tokens = self._sample_from_probs(probs, sampling_info, positions, simple_sampling_case=False)
            self._sync_token_ids_across_tp(tokens, sampling_info)
            return tokens

    return LeanSampler
