"""The scheduler's radix tree, event by event, for figures and tests."""

import json
import os
from pathlib import Path

from . import asked_for, check_target, hook

CACHE = "sglang.srt.mem_cache.radix_cache.RadixCache"


def register() -> None:
    """mem_cache/radix_cache.py, RadixCache: after each prefill (cache_unfinished_req), each finished request
    (cache_finished_req) and each eviction (evict), the whole tree is appended as a line of JSON to the file
    that RADIX_TRACE names, while that file exists:

        event           prefill, finish or evict
        prompt_tokens, cached_tokens   of the request (prefill and finish)
        evicted         token ids from the root to the end of each removed leaf, in order (evict)
        nodes           of the tree afterwards: token_ids from the root to the node's end, in_use, hit_count
    """
    if not asked_for("radix_trace"):
        return
    check_target(f"{CACHE}.evict", needs="_delete_leaf")
    file, removed = Path(os.environ["RADIX_TRACE"]), []

    def write(cache, event: str, **facts) -> None:
        if file.exists():
            nodes = [
                {"token_ids": path(node), "in_use": node.lock_ref > 0, "hit_count": node.hit_count}
                for node in below(cache.root_node)
            ]
            with file.open("a") as out:
                out.write(json.dumps({"event": event, "nodes": nodes} | facts) + "\n")

    def after(event: str):
        def run(original, cache, request, *args, **options):
            result = original(cache, request, *args, **options)
            write(
                cache, event, prompt_tokens=len(request.origin_input_ids), cached_tokens=request.cached_tokens
            )
            return result

        return run

    def delete_leaf(original, cache, node):
        removed.append(path(node))
        return original(cache, node)

    def evict(original, cache, params):
        removed.clear()
        result = original(cache, params)
        if removed:
            write(cache, "evict", evicted=removed)
        return result

    hook(f"{CACHE}.cache_unfinished_req", after("prefill"), "AROUND")
    hook(f"{CACHE}.cache_finished_req", after("finish"), "AROUND")
    hook(f"{CACHE}._delete_leaf", delete_leaf, "AROUND")
    hook(f"{CACHE}.evict", evict, "AROUND")


def below(node) -> list:
    """All nodes of the subtree but its top, parents first."""
    found = []
    for child in node.children.values():
        found += [child, *below(child)]
    return found


def path(node) -> list[int]:
    """Token ids from the root to the node's end."""
    tokens: list[int] = []
    while node.parent is not None:
        tokens = [*node.key.token_ids, *tokens]
        node = node.parent
    return tokens
