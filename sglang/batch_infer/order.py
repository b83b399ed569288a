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

from .arguments import Arguments
from .prompts import Record

Ids = list[int]
# Ordering records pays from this share of prompt tokens on that lies in shared prefixes of as many tokens as
# SGLang's own in-batch rule needs (schedule_policy.py). A chat template's header is shorter: AlpacaEval stays
# as it is.
WORTH_PLANNING, SHARED_PREFIX_TOKENS = 0.1, 32
EXPECTED_ANSWER_TOKENS = 600  # AlpacaEval's reference answers: 543 tokens on average (characters / 4)


# --- the decision -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """How the records go to the engine."""

    schedule_policy: str  # SGLang's own, for what waits in its queue
    reason: str
    depth_first: bool = False


def decide(args: Arguments, records: list[Record]) -> Order:
    """The order of the `records` that will run."""
    own = args.own_engine_args
    if "schedule_policy" in own:
        return Order(own["schedule_policy"], "--engine_args")
    if args.policy != "planned":
        return Order(args.policy, "--policy")
    if own.get("disable_radix_cache"):
        return Order("fcfs", "without the radix cache no order saves anything")
    keys = _tree_keys(records)
    tokens = sum(map(len, keys))
    share = shared_tokens(keys, SHARED_PREFIX_TOKENS + 1) / tokens if tokens else 0.0
    if share < WORTH_PLANNING:
        found = f"prefixes of {SHARED_PREFIX_TOKENS} tokens or more are {share:.1%} of the prompts"
        return Order("fcfs", f"{found}: an order would save little")
    reason = f"records come depth-first: {share:.0%} of the prompt tokens lie in shared prefixes"
    return Order("fcfs", reason, depth_first=True)


@dataclass(frozen=True)
class Part:
    """What one copy of the engine answers, or what all of them take in turns (copy None)."""

    records: list[Record]
    plan: "Plan"
    copy: int | None = None


def parts(order: Order, records: list[Record], copies: int, pool_tokens: int) -> list[Part]:
    """The records for each copy. Depth-first, what shares a prefix goes to one copy, and each gets about an equal
    part of the tokens to compute."""
    if not order.depth_first:
        return [Part(records, Plan(list(range(len(records)))))]
    found = []
    for copy, mine in enumerate(cut(order, records, copies)):
        plan = depth_first(_tree_keys(mine), list(map(_answer_tokens, mine)), pool_tokens)
        found.append(Part(mine, plan, copy if copies > 1 else None))
    return found


def cut(order: Order, records: list[Record], count: int) -> list[list[Record]]:
    """`count` contiguous parts of the order, with about as many tokens to compute each."""
    answers = list(map(_answer_tokens, records))
    if order.depth_first:
        whole = depth_first(_tree_keys(records), answers, float("inf"))
        # What a record has of its own: a shared prefix is computed by each part that gets some of its records.
        costs = {i: answers[i] + whole.leaves[i].depth - whole.leaves[i].parent.depth for i in whole.order}
    else:
        costs = {i: answers[i] + len(record.input_ids) for i, record in enumerate(records)}
    done, total, found = 0, sum(costs.values()), [[] for _ in range(count)]
    for i, cost in costs.items():
        found[done * count // total].append(records[i])
        done += cost
    return found


def shard(args: Arguments, records: list[Record]) -> list[Record]:
    """What this shard is to answer, and with the first the records that cannot be. It depends on the records alone, not
    on what is answered already: shards start when they like."""
    number, shards = args.place
    if shards == 1:
        return records
    good = [record for record in records if not record.error]
    mine = cut(decide(args, good), good, shards)[number - 1]
    return mine if number > 1 else mine + [record for record in records if record.error]


def _answer_tokens(record: Record) -> int:
    return min(record.sampling_params["max_new_tokens"], EXPECTED_ANSWER_TOKENS)


def _tree_keys(records: list[Record]) -> list[Ids]:
    """What the radix tree finds them under: KV of different adapters is never shared."""
    adapters = sorted({record.lora or "" for record in records})
    return [[-1 - adapters.index(record.lora or ""), *record.input_ids] for record in records]


# --- the tree of all prompts --------------------------------------------------------------------------


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


def shared_tokens(prompts: list[Ids], least: int) -> int:
    """Prompt tokens in prefixes of at least `least` tokens that an earlier prompt has too."""
    shared = (common_prefix(a, b) for a, b in itertools.pairwise(sorted(prompts)))
    return sum(tokens for tokens in shared if tokens >= least)


def optimum_cached_tokens(turns: Iterable[Iterable[tuple[Ids, Ids]]]) -> int:
    """The most prompt tokens that any order can take from the tree.

    `turns`: (prompt, generated) pairs; a later turn's prompt may go on from what an earlier turn generated.
    Every token on a distinct edge of the tree of all prompts is computed once, unless an earlier turn
    generated it: SGLang stores generated tokens too (the last one only with its overlap scheduler, which has
    begun the next step by then; it counts here). A prompt's last token is always computed, for its logits, so
    a prompt that equals an earlier one costs one token; of a prompt and its own prefix the shorter goes first,
    which costs none. Depth-first order attains this if the pool holds the longest request: whatever the next
    request shares with an earlier one, it shares with the one just before it, and that one's path is the last
    to be evicted (arXiv 2312.07104, theorem 3.1).
    """
    stored: list[Ids] = []  # sorted, so that a prompt's longest match is one of its two neighbours
    cached = 0
    for requests in turns:
        for prompt, generated in sorted(requests):
            place = bisect.bisect(stored, prompt)
            near = stored[max(0, place - 1) : place + 1]
            match = max((common_prefix(prompt, other) for other in near), default=0)
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


@dataclass(frozen=True)
class Plan:
    """An order of requests, what each must wait for, and how many tokens may be in use at once."""

    order: list[int]
    pool_tokens: float = float("inf")
    leaves: dict[int, Node] = field(default_factory=dict)  # empty: no request waits for another
    opener: dict[int, int] = field(default_factory=dict)  # request -> the one that computes what they share
    answer_tokens: dict[int, int] = field(default_factory=dict)

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


def depth_first(prompts: list[Ids], answer_tokens: list[int], pool_tokens: float) -> Plan:
    """Request i has `prompts[i]` and is expected to generate `answer_tokens[i]`; the KV pool holds
    `pool_tokens`. Equal prompts keep their order."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    leaves, opener = {}, {}
    path, before = [Node(0)], None
    for i in order:
        shared = 0 if before is None else common_prefix(prompts[before], prompts[i])
        below = None
        while path[-1].depth > shared:
            below = path.pop()
        if path[-1].depth < shared:  # they part within an edge: split it
            path.append(Node(shared, path[-1], below.opener, below.longest))
            below.parent = path[-1]
        if shared:
            opener[i] = path[-1].opener
        if len(prompts[i]) > shared:
            path.append(Node(len(prompts[i]), path[-1], i))
        leaves[i], before = path[-1], i
        for node in path:
            node.longest = max(node.longest, len(prompts[i]) + answer_tokens[i])
    return Plan(order, pool_tokens, leaves, opener, dict(enumerate(answer_tokens)))


# --- following it -------------------------------------------------------------------------------------

Answer = Callable[[int, Callable[[], None] | None], Awaitable[None]]


async def follow(plan: Plan, answer: Answer, in_flight: asyncio.Semaphore) -> None:
    """Runs `answer(i, cached)` for each request, as early as the plan and `in_flight` allow. If `cached` is not None
    others wait for it: to be called once the prompt's KV is in the tree, that is with the first token."""
    cached_events = {i: asyncio.Event() for i in set(plan.opener.values())}
    used_tokens, finished = 0, asyncio.Event()

    async def run(i: int) -> None:
        nonlocal used_tokens
        try:
            if i in plan.opener:
                await cached_events[plan.opener[i]].wait()
            await answer(i, cached_events[i].set if i in cached_events else None)
        finally:
            if i in cached_events:
                cached_events[i].set()  # whatever became of it, nobody waits for it any longer
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
