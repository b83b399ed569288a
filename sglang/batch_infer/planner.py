"""Cache-aware order of requests: a prefix that several prompts share is computed once, whatever the pool holds.

SGLang keeps the KV of finished requests in a radix tree and reuses the longest matching prefix. What it finds
there depends on the order: two requests that share a prefix and start in the same step both compute it, and
where the pool is small a prefix is evicted before its next user comes, if others come in between. Visiting
the tree of all prompts depth first reaches the optimum as soon as the pool holds the longest request (SGLang
paper, arXiv 2312.07104, theorem 3.1), and for a known list of prompts that is simply the sorted list.
"""

import asyncio
import bisect
import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

Ids = list[int]


def common_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix, by bisection (slices are compared in C)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def optimum_cached_tokens(turns: Iterable[Iterable[tuple[Ids, Ids]]]) -> int:
    """The most prompt tokens that any order can take from the tree; optimum_hit_rate is its share of all.

    `turns`: (prompt, generated) pairs; a later turn's prompt may go on from what an earlier turn generated.
    Every token on a distinct edge of the tree of all prompts is computed once, unless an earlier turn
    generated it: SGLang stores generated tokens too (the last one only with its overlap scheduler, which has
    begun the next step by then; it counts here). A prompt's
    last token is always computed, for its logits, so a prompt that equals an earlier one costs one token; of
    a prompt and its own prefix the shorter goes first, which costs none. Depth-first order attains this if
    the pool holds the longest request: whatever the next request shares with an earlier one, it shares with
    the one just before it, and that one's path is the last to be evicted (arXiv 2312.07104, theorem 3.1).
    """
    stored: list[Ids] = []  # sorted, so that a prompt's longest match is one of its two neighbours
    cached = 0
    for requests in turns:
        for prompt, generated in sorted(requests):
            place = bisect.bisect(stored, prompt)
            match = max(
                (common_prefix(prompt, near) for near in stored[max(0, place - 1) : place + 1]), default=0
            )
            cached += min(match, len(prompt) - 1)
            bisect.insort(stored, prompt + generated)
    return cached


@dataclass
class Node:
    """An edge of the tree of all prompts, and what is below it."""

    depth: int  # tokens from the root to the edge's end
    parent: "Node | None" = None
    opener: int = 0  # the first request below, in depth-first order: it computes this edge
    longest: int = 0  # most tokens that a request below needs, prompt and answer
    unfinished: int = 0  # requests below that have been started and not finished


@dataclass
class Plan:
    """An order of requests, what each must wait for, and how many tokens may be in use at once."""

    order: list[int]
    pool_tokens: float = float("inf")
    leaves: dict[int, Node] = field(default_factory=dict)  # empty: no request waits for another
    opener: dict[int, int] = field(default_factory=dict)  # request -> the one that computes what they share
    answer_tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    def as_given(cls, requests: int) -> "Plan":
        return cls(list(range(requests)))

    @classmethod
    def depth_first(cls, prompts: list[Ids], answer_tokens: list[int], pool_tokens: float) -> "Plan":
        """Request i has `prompts[i]` and is expected to generate `answer_tokens[i]`; the KV pool holds
        `pool_tokens`. Equal prompts keep their order."""
        plan = cls(sorted(range(len(prompts)), key=prompts.__getitem__), pool_tokens)
        plan.answer_tokens = dict(enumerate(answer_tokens))
        path, before = [Node(0)], None
        for i in plan.order:
            shared = 0 if before is None else common_prefix(prompts[before], prompts[i])
            below = None
            while path[-1].depth > shared:
                below = path.pop()
            if path[-1].depth < shared:  # they part within an edge: split it
                path.append(Node(shared, path[-1], below.opener, below.longest))
                below.parent = path[-1]
            if shared:
                plan.opener[i] = path[-1].opener
            if len(prompts[i]) > shared:
                path.append(Node(len(prompts[i]), path[-1], i))
            plan.leaves[i], before = path[-1], i
            for node in path:
                node.longest = max(node.longest, len(prompts[i]) + answer_tokens[i])
        return plan

    def room_tokens(self, i: int) -> int:
        """What must be free before request `i` starts: for the longest request below the topmost edge that no
        unfinished request holds. So the next ones below it will find room beside those that run now, and
        their shared prefix is not evicted while they wait."""
        node, top = self.leaves[i], None
        while node.depth and not node.unfinished:
            node, top = node.parent, node
        return (top.longest if top else self.leaves[i].depth + self.answer_tokens[i]) - node.depth

    def change_tokens(self, i: int, step: int) -> int:
        """Counts request `i` in (step 1) or out (-1); returns by how many tokens what is in use changes."""
        tokens, node = self.answer_tokens[i], self.leaves[i]
        while node.depth:
            if node.unfinished == (0 if step == 1 else 1):
                tokens += node.depth - node.parent.depth
            node.unfinished += step
            node = node.parent
        return step * tokens


def shared_tokens(prompts: list[Ids], least: int) -> int:
    """Prompt tokens in prefixes of at least `least` tokens that an earlier prompt has too."""
    ordered = sorted(prompts)
    shared = (common_prefix(a, b) for a, b in itertools.pairwise(ordered))
    return sum(tokens for tokens in shared if tokens >= least)


Answer = Callable[[int, Callable[[], None] | None], Awaitable[None]]


async def follow(plan: Plan, answer: Answer, at_once: int) -> None:
    """Runs `answer(i, computed)` for each request, as early as the plan allows and at most `at_once` together.
    If `computed` is not None others wait for it: to be called once the prompt's KV is in the tree, that is
    with the first token."""
    computed = {i: asyncio.Event() for i in set(plan.opener.values())}
    in_flight, used_tokens, finished = asyncio.Semaphore(at_once), 0, asyncio.Event()

    async def run(i: int) -> None:
        nonlocal used_tokens
        try:
            if i in plan.opener:
                await computed[plan.opener[i]].wait()
            await answer(i, computed[i].set if i in computed else None)
        finally:
            if i in computed:
                computed[i].set()  # whatever became of it, nobody waits for it any longer
            if plan.leaves:
                used_tokens += plan.change_tokens(i, -1)
            in_flight.release()
            finished.set()

    async with asyncio.TaskGroup() as tasks:
        for i in plan.order:
            await in_flight.acquire()
            if plan.leaves:
                while used_tokens and used_tokens + plan.room_tokens(i) > plan.pool_tokens:
                    finished.clear()
                    await finished.wait()
                used_tokens += plan.change_tokens(i, 1)
            tasks.create_task(run(i))
