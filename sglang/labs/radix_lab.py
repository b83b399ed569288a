"""RadixAttention, eviction and cache-aware scheduling, measured on the real SGLang Runtime.

    python sglang/labs/radix_lab.py                                  # CPU, tiny model, 3 minutes on 2 cores
    python sglang/labs/radix_lab.py --device cuda --model_path Qwen/Qwen2.5-7B-Instruct --scale 2

Four workloads whose prompts share prefixes, run with the radix cache on and off, with schedule policies of SGLang
and with the order of batch_infer/order.py, in KV pools of three sizes; with --full every policy and eviction policy
in every pool. Beside every hit rate stands the best that any order could reach. Writes radix_lab.json, radix_lab.png
(the numbers), radix_tree.svg (the scheduler's tree in the middle of a run) and radix_steps.svg (insertion, hit,
eviction).
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "common")]
import engines
import radix_figure
import radix_results

from batch_infer import preflight
from batch_infer.arguments import REHEARSAL, TINY_MODEL, Arguments
from batch_infer.order import Plan, depth_first, follow, optimum_cached_tokens
from workbench import UserError
from workbench.files import claim, commit, write_json
from workbench.flags import flag, read_flags
from workbench.machine import versions

ANSWER_TOKENS = 4
GREEDY = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
RUNNING = 32
SEEDS, FULL_SEEDS = 3, 5  # random arrival orders
PICTURE_POOL_TOKENS = 400
GRID_SETS = {
    *("disable_radix_cache", "schedule_policy", "radix_eviction_policy", "max_total_tokens"),
    *("max_running_requests", "chunked_prefill_size", "dp_size"),
}
RESULT, TREE, STEPS, TRACE = "radix_lab.json", "radix_tree", "radix_steps", "radix_trace.jsonl"

Ids = list[int]


@dataclass(frozen=True)
class Flags:
    model_path: str = flag("", "hub id or folder; empty: the tiny model")
    prompts: str = flag(
        str(REHEARSAL / "instructions.json"),
        "texts that the workloads are made of: hub data set or file, as run_sglang.py takes them",
    )
    device: str = flag("cpu", "cpu or cuda")
    scale: int = flag(1, "prompt lengths and numbers of requests, times this")
    engine_args: str = flag("{}", "JSON object of further sglang.Engine arguments")
    full: bool = flag(
        False, f"every policy, eviction policy and pool; {FULL_SEEDS} arrival orders, not {SEEDS}"
    )
    output_dir: str = flag("", "empty: rehearsal/runs/<time>-radix_lab")


# --- workloads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Conversations: token ids of each turn's new text. All but chats have one turn."""

    name: str
    conversations: list[list[Ids]]
    groups: int  # the conversations come group by group, equally many in each

    def prompt_tokens(self) -> list[int]:
        """Of each conversation's last turn."""
        return [sum(map(len, turns)) + (len(turns) - 1) * ANSWER_TOKENS for turns in self.conversations]

    def arrival_orders(self, seeds: int) -> dict[str, "Workload"]:
        """Random ones, and the worst: interleaved, so that neighbours never share more than they must."""
        count = len(self.conversations)
        size = count // self.groups
        orders = {"interleaved": sorted(range(count), key=lambda i: (i % size, i))}
        for seed in range(seeds):
            orders[f"seed {seed}"] = list(range(count))
            random.Random(seed).shuffle(orders[f"seed {seed}"])
        return {
            name: replace(self, conversations=[self.conversations[i] for i in order])
            for name, order in orders.items()
        }


def build_workloads(texts: list[str], tokenizer, scale: int) -> list[Workload]:
    """Structures whose text is cut from `texts`: 12 to 24 requests of 300 to 470 tokens, times `scale` both."""
    lines = itertools.cycle(texts)

    def text(tokens: int, title: str) -> Ids:
        ids = tokenizer.encode(title, add_special_tokens=False)
        while len(ids) < tokens:
            ids += tokenizer.encode(f"{next(lines)}\n", add_special_tokens=False)
        return ids[:tokens]

    few_shot, samples, tree, chats = [], [], [], []
    for g in range(3 * scale):
        header = text(440 * scale, f"Task {g + 1}, examples:\n")
        few_shot += [[header + text(30 * scale, f"Question {q + 1}: ")] for q in range(8)]
    for g in range(4 * scale):
        samples += [[text(300 * scale, f"Puzzle {g + 1}: ")]] * 4
    for g in range(2 * scale):
        problem = text(200 * scale, f"Problem {g + 1}:\n")
        for p in range(2):
            plan = problem + text(90 * scale, f"Plan {p + 1}: ")
            tree += [[plan], *([plan + text(70 * scale, f"Step {n + 1}: ")] for n in range(3))]
    system = text(120 * scale, "You are a patient tutor.\n")
    for c in range(4 * scale):
        turns = [text(80 * scale, f"\nStudent {c + 1}, question {t + 1}: ") for t in range(3)]
        chats.append([system + turns[0], *turns[1:]])
    return [
        Workload("few_shot", few_shot, 3 * scale),
        Workload("chats", chats, len(chats)),
        Workload("samples", samples, 4 * scale),
        Workload("tree_of_thoughts", tree, 2 * scale),
    ]


# --- settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One engine."""

    radix_cache: bool = True
    policy: str = "fcfs"
    eviction: str = "lru"
    pool: str = "all"  # all: everything fits; half: of the largest tree; longest: one request

    @property
    def policies(self) -> list[str]:
        """Measured on this engine: its own, and the planned order, which leaves nothing for SGLang to decide."""
        plans = self.radix_cache and (self.policy, self.eviction) == ("fcfs", "lru")
        return [self.policy, *(["planned"] if plans else [])]


SETTINGS = [
    Setting(radix_cache=False),
    *(Setting(pool=pool) for pool in ("all", "half", "longest")),
    Setting(policy="lpm", pool="longest"),
]
FULL_SETTINGS = SETTINGS[:1] + [
    Setting(policy=policy, eviction=eviction, pool=pool)
    for pool in ("all", "half", "longest")
    for eviction in ("lru", "lfu")
    for policy in ("fcfs", "lpm", "dfs-weight")
]


def pool_sizes(workloads: list[Workload]) -> dict[str, int]:
    """KV tokens. SGLang admits a request if more than prompt + answer + 1 tokens are free, and takes prompts up
    to pool - 7 (managers/tp_worker.py, schedule_policy.py)."""
    longest = max(max(w.prompt_tokens()) for w in workloads) + max(ANSWER_TOKENS + 2, 7)
    every = max(sum(w.prompt_tokens()) + len(w.conversations) * ANSWER_TOKENS for w in workloads)
    distinct = []
    for w in workloads:
        prompts = [list(itertools.chain(*turns)) for turns in w.conversations]
        cached = optimum_cached_tokens([[(prompt, []) for prompt in prompts]])
        distinct.append(sum(map(len, prompts)) - cached + sum(map(len, w.conversations)) * ANSWER_TOKENS)
    return {
        **{"all": every + RUNNING * longest, "half": max(max(distinct) // 2, longest), "longest": longest},
        "picture": PICTURE_POOL_TOKENS,
    }


# --- measuring ----------------------------------------------------------------------------------------


def run_workload(engine, workload: Workload, planned: bool, pool_tokens: int) -> dict:
    """Runs all conversations at once, in the order of arrival or in the planner's. Time to first token counts
    from the arrival of the turn."""
    conversations = workload.conversations
    turns: list[list[tuple[Ids, Ids]]] = [[] for _ in range(max(map(len, conversations)))]
    ttft_s, cached_tokens = [], 0
    plan = Plan(list(range(len(conversations))))
    if planned:
        first = [turns[0] for turns in conversations]
        more = [
            all_turns + ANSWER_TOKENS - len(prompt)
            for all_turns, prompt in zip(workload.prompt_tokens(), first, strict=True)
        ]
        plan = depth_first(first, more, pool_tokens)

    async def converse(i: int, cached) -> None:
        nonlocal cached_tokens
        prompt, arrived = [], began
        for number, new in enumerate(conversations[i]):
            prompt = prompt + new
            stream = await engine.async_generate(input_ids=prompt, sampling_params=GREEDY, stream=True)
            result = await anext(stream)
            ttft_s.append(time.monotonic() - arrived)
            if cached:
                cached()
            async for result in stream:  # noqa: B007 (the last chunk counts)
                pass
            if result["meta_info"]["finish_reason"]["type"] != "length":
                raise RuntimeError(f"not answered: {result['meta_info']['finish_reason']}")
            cached_tokens += result["meta_info"]["cached_tokens"]
            turns[number].append((prompt, result["output_ids"]))
            prompt, arrived = prompt + result["output_ids"], time.monotonic()

    began = time.monotonic()
    engine.loop.run_until_complete(follow(plan, converse, asyncio.Semaphore(len(conversations))))
    seconds = time.monotonic() - began
    requests = list(itertools.chain(*turns))
    prompt_tokens = sum(len(prompt) for prompt, _ in requests)
    return {
        "requests": len(requests),
        "prompt_tokens": prompt_tokens,
        "prefill_tokens": prompt_tokens - cached_tokens,
        "hit_rate": cached_tokens / prompt_tokens,
        "optimum_hit_rate": optimum_cached_tokens(turns) / prompt_tokens,
        "seconds": seconds,
        "ttft_p50_s": statistics.median(ttft_s),
        "output_tokens_per_s": sum(len(ids) for _, ids in requests) / seconds,
    }


def measure(engine, setting: Setting, workloads: list[Workload], seeds: int) -> Iterator[dict]:
    """A row for each workload, arrival order and policy on one engine."""
    pool_tokens = engine.get_server_info()["max_total_num_tokens"]
    run_workload(engine, workloads[0], True, pool_tokens)  # the first requests load what is loaded once
    for workload in workloads:
        for arrival, arrived in workload.arrival_orders(seeds).items():
            for policy in setting.policies:
                empty_tree(engine)
                row = run_workload(engine, arrived, policy == "planned", pool_tokens)
                names = {"workload": workload.name, "arrival_order": arrival, "pool_tokens": pool_tokens}
                yield asdict(setting) | row | names | {"policy": policy}


def empty_tree(engine) -> None:
    """SGLang refuses while it still has to look at the last batch's results."""
    deadline = time.monotonic() + 30
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError("the scheduler does not become idle")
        time.sleep(0.01)


# --- the live tree ------------------------------------------------------------------------------------


def trace(engine, batches: list[list[Ids]], file: Path) -> list[dict]:
    """Runs the batches one after the other; the events of the scheduler's tree meanwhile."""
    empty_tree(engine)
    file.write_text("")
    for batch in batches:
        engine.generate(input_ids=batch, sampling_params=GREEDY)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return events


def draw_trees(engine, texts: list[str], tokenizer, folder: Path) -> Iterator[str]:
    """radix_tree (20 requests at once) and radix_steps (4 one by one), in a pool of PICTURE_POOL_TOKENS."""
    lines = itertools.cycle([line for line in texts if line.isascii()] or texts)
    newline = tokenizer.encode("\n", add_special_tokens=False)

    def text(title: str, tokens: int) -> Ids:
        return tokenizer.encode(f"{title}{next(lines)}", add_special_tokens=False)[: tokens - 1] + newline

    def draw(panels: list[radix_figure.Panel], name: str) -> str:
        radix_figure.save(radix_figure.figure_of(panels, tokenizer.decode), folder / name)
        return name

    topics = ("Cooking", "History", "Physics")
    headers = [text(f"{topic}. ", 40) + text("Example: ", 30) for topic in topics]
    requests = [headers[n % 3] + text(f"{chr(65 + n)}: ", 20) for n in range(20)]
    yield draw(radix_figure.live_tree(trace(engine, [requests], folder / TRACE)), TREE)
    a, b, c = (text(f"{topic}. ", 60) + text("Example: ", 60) for topic in topics)
    endings = ((a, "First: ", 30), (a, "Second: ", 30), (b, "Third: ", 40), (c, "Fourth: ", 40))
    one_by_one = [[header + text(title, tokens)] for header, title, tokens in endings]
    yield draw(radix_figure.steps(trace(engine, one_by_one, folder / TRACE)), STEPS)


# --- the program --------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Flags:
    about = __doc__.split("\n\n")[0]
    flags = Flags(**read_flags(argv, Flags, prog="radix_lab.py", description=about))
    if flags.scale < 1:
        raise UserError(f"--scale {flags.scale}: must be at least 1")
    if flags.device == "cuda" and not flags.model_path:
        raise UserError("--device cuda needs a --model_path, such as Qwen/Qwen2.5-7B-Instruct")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-radix_lab"
    return replace(flags, output_dir=str(Path(flags.output_dir or REHEARSAL / "runs" / name).absolute()))


def main(argv: list[str]) -> int:
    try:
        flags = parse(argv)
        words = {"prompts": flags.prompts, "temperature": 0, "max_new_tokens": ANSWER_TOKENS}
        args = engines.arguments(flags, **words)
        for name in args.own_engine_args.keys() & GRID_SETS:
            raise UserError(f"--engine_args: the grid sets {name}; leave it out")
        with claim(args.folder, "--output_dir"):
            run(flags, args)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(flags: Flags, args: Arguments) -> None:
    began, folder = time.monotonic(), args.folder
    os.environ["RADIX_TRACE"] = str(folder / TRACE)
    inputs = engines.prepare(args)
    import pandas
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs.model.folder)
    texts = [record.instruction for record in inputs.records if not record.error]
    if not texts:
        raise UserError(f"--prompts {flags.prompts}: no text to make workloads of")
    workloads = build_workloads(texts, tokenizer, flags.scale)
    pools = pool_sizes(workloads)
    settings, seeds = (FULL_SETTINGS, FULL_SEEDS) if flags.full else (SETTINGS, SEEDS)

    def on_engine(setting: Setting, running: int, work: engines.Work, total: int, title: str) -> list:
        grid = {
            **{"disable_radix_cache": not setting.radix_cache, "schedule_policy": setting.policy},
            **{"radix_eviction_policy": setting.eviction, "max_total_tokens": pools[setting.pool]},
            "max_running_requests": running,
        }
        own = replace(args, engine_args=json.dumps(grid | args.own_engine_args))
        return engines.measure(own, inputs, "radix_trace", work, total, title)

    def draw(engine) -> Iterator[str]:
        return draw_trees(engine, texts, tokenizer, folder)

    on_engine(Setting(pool="picture"), 4, draw, 2, "figures of the tree")
    rows: list[dict] = []
    for setting in settings:
        title = f"radix cache {'on' if setting.radix_cache else 'off'}, pool {setting.pool}, {setting.policy}"

        def work(engine, setting: Setting = setting) -> Iterator[dict]:
            return measure(engine, setting, workloads, seeds)

        total = len(setting.policies) * len(workloads) * (seeds + 1)
        rows += on_engine(setting, RUNNING, work, total, f"{title}, {setting.eviction}")
        frame = pandas.DataFrame(rows)
        ratios = radix_results.on_against_off(frame)
        facts = facts_of(flags, inputs) | {"wall_s": time.monotonic() - began, "on_against_off": ratios}
        write_json(folder / RESULT, facts | {"rows": rows})
    radix_results.print_table(frame)
    radix_results.plot(frame, folder)
    for workload, ratio in ratios.items():
        print(
            f"{workload}: the radix cache, planned, has {ratio['throughput_ratio']:.1f} times the throughput of none "
            f"and {ratio['ttft_ratio']:.2f} of its time to first token"
        )
    print(f"written to {folder}: {RESULT}, radix_lab.png, {TREE}.svg, {STEPS}.svg")


def facts_of(flags: Flags, inputs: preflight.Inputs) -> dict:
    import torch

    settings = {name: getattr(flags, name) for name in ("device", "engine_args", "scale", "full")}
    settings |= {"model": Path(flags.model_path).name or TINY_MODEL, "answer_tokens": ANSWER_TOKENS}
    cpu = f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}"
    facts = {"commit": commit(), "versions": versions(preflight.PACKAGES)}
    return facts | {"settings": settings | {"running": RUNNING}, "hardware": inputs.machine.gpu_name or cpu}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
