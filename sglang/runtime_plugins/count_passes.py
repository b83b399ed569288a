"""Counters for measurements: `engine.get_server_info()["internal_states"]` gains forward_passes, the KV
pool's free_tokens and the radix tree's evictable_tokens."""

from . import asked_for, hook


def register() -> None:
    """Entry point `sglang.srt.plugins`: hooks Scheduler.get_internal_state (managers/scheduler.py)."""
    if asked_for("count_passes"):
        hook("sglang.srt.managers.scheduler.Scheduler.get_internal_state", get_internal_state, "AROUND")


def get_internal_state(original, self, *args, **options):
    output = original(self, *args, **options)
    output.internal_state |= {
        "forward_passes": self.forward_ct,
        "free_tokens": self.token_to_kv_pool_allocator.available_size(),
        "evictable_tokens": self.tree_cache.evictable_size(),
    }
    return output
