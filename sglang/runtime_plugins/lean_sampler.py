"""Top-p sampling on FlashInfer's kernels with fewer passes over the logits (batch x vocabulary, fp32).

SGLang's own path divides by the temperature, computes the softmax into a second tensor and copies it back; with
seeds it sorts every row and keeps two fp64 copies of all probabilities, which is most of a small model's step and
limits how many requests fit. The random numbers and what top-p keeps stay SGLang's and FlashInfer's.
"""

import functools

from . import asked_for, check_target

SEEDED_ROWS = 64  # of the fp64 Gumbel noise at once: 0.08 GiB for 150,000 tokens


def register() -> None:
    """Takes the place of both built-in sampling backends (deterministic mode insists on the name "pytorch")."""
    if not asked_for("lean_sampler"):
        return
    module = "sglang.srt.layers.sampler"
    check_target(f"{module}.create_sampler", needs="_CUSTOM_SAMPLER_FACTORIES")
    check_target(f"{module}.Sampler.forward", needs="_sample_from_probs")
    check_target(f"{module}.multinomial_with_seed")
    from sglang.srt.layers.sampler import register_sampler_backend

    for backend in ("flashinfer", "pytorch"):
        register_sampler_backend(backend, lambda: sampler_class()())


@functools.cache
def sampler_class() -> type:
    """A subclass of SGLang's Sampler. What it has no faster way for goes to its parent."""
    from sglang.srt.layers.sampler import Sampler

    class LeanSampler(Sampler):
        def forward(
            self, logits_output, sampling_info, return_logprob, top_logprobs, token_ids_logprobs, positions
        ):
            if (
                sampling_info.is_all_greedy
                or not sampling_info.need_top_p_sampling
                or sampling_info.need_min_p_sampling
                or sampling_info.sampling_seed is not None
                or sampling_info.has_custom_logit_processor
                or return_logprob
                or any(sampling_info.return_sampling_masks or [])
            ):
                return super().forward(
                    logits_output, sampling_info, return_logprob, top_logprobs, token_ids_logprobs, positions
                )
            from flashinfer.sampling import softmax

            logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
            probs = softmax(logits, sampling_info.temperatures.view(-1))
            tokens = self._sample_from_probs(probs, sampling_info, positions, simple_sampling_case=False)
            self._sync_token_ids_across_tp(tokens, sampling_info)
            return tokens

        def _sample_from_probs(self, probs, sampling_info, positions, simple_sampling_case):
            seeds = sampling_info.sampling_seed
            if (
                seeds is None
                or not sampling_info.need_top_p_sampling
                or sampling_info.need_top_k_sampling
                or sampling_info.need_min_p_sampling
            ):
                return super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
            return seeded_top_p(probs, sampling_info.top_ps, seeds, positions)

    return LeanSampler


def seeded_top_p(probs, top_ps, seeds, positions):
    """A token per row, (batch,) int32: the Gumbel-max trick on what top-p keeps of `probs` (batch, vocabulary), with
    noise hashed from a row's seed, its position and the token. A row's token is the same in any batch: the
    threshold is found with integer sums (is_deterministic), and everything else is within the row."""
    import torch
    from flashinfer.sampling import top_p_renorm_probs
    from sglang.srt.layers.sampler import multinomial_with_seed

    kept = top_p_renorm_probs(probs, top_ps, is_deterministic=True)
    drawn = [
        multinomial_with_seed(rows.double().log_(), *of_rows)
        for rows, *of_rows in zip(
            kept.split(SEEDED_ROWS), seeds.split(SEEDED_ROWS), positions.split(SEEDED_ROWS), strict=True
        )
    ]
    return torch.cat(drawn).view(-1).to(torch.int32)
