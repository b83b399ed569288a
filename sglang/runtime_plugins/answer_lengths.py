"""Answers end at a length that the scheduler cannot foresee, as an end-of-text token would (bench/)."""

from . import asked_for, hook


def register() -> None:
    """Entry point `sglang.srt.plugins`: hooks Req._check_token_based_finish (managers/schedule_batch.py)."""
    if asked_for("answer_lengths"):
        hook("sglang.srt.managers.schedule_batch.Req._check_token_based_finish", ends, "AROUND")


def ends(original, self, new_accepted_tokens: list[int]) -> bool:
    """A request with `custom_params = {"answer_tokens": n}` ends with its n-th token and at no other one."""
    answer_tokens = (self.sampling_params.custom_params or {}).get("answer_tokens")
    if answer_tokens is None:
        return original(self, new_accepted_tokens)
    if len(self.output_ids) < answer_tokens:
        return False
    from sglang.srt.managers.schedule_batch import FINISH_MATCHED_TOKEN

    self.finished_reason = FINISH_MATCHED_TOKEN(matched=self.output_ids[answer_tokens - 1])
    self.finished_len = answer_tokens
    return True
