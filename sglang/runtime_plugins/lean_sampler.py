"""Top-p sampling with few passes over the logits (batch x vocabulary).

SGLang's own path divides the logits by the temperature, computes the softmax into a second tensor and copies it back;
with seeds it sorts every row and keeps fp64 copies of all probabilities, which limits how many requests fit. Here one
kernel of our own (seeded_top_p.py) does all of it. Requests without seeds get one for each step.

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
    check_target(f"{module}.Sampler.forward", needs="logits_output.next_token_logits")
    from sglang.srt.layers.sampler import register_sampler_backend

    for backend in ("flashinfer", "pytorch"):
        register_sampler_backend(backend, lambda: sampler_class()())


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

    return LeanSampler
