"""RadixAttention, eviction and cache-aware scheduling, measured on the real SGLang Runtime.

    python sglang/radix_lab.py                                  # CPU, tiny model, 4.5 minutes
    python sglang/radix_lab.py --device cuda --model_path Qwen/Qwen2.5-7B-Instruct --scale 2

Four workloads whose prompts share prefixes, run with the radix cache on and off, with the schedule policies
and eviction policies of SGLang and with the order of batch_infer/planner.py, in KV pools of three sizes.
Beside every hit rate stands the best that any order could reach. Writes radix_lab.json, radix_lab.png (the
numbers), radix_tree.svg (the scheduler's tree in the middle of a run) and radix_steps.svg (insertion, hit,
eviction).
"""

import itertools
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from batch_infer import engine as runtime
from batch_infer import preflight, radix_figure, report
from batch_infer.arguments import REHEARSAL, TINY_MODEL
from batch_infer.arguments import parse as parse_arguments
from batch_infer.planner import Plan, follow, optimum_cached_tokens
from workbench import UserError
from workbench.files import claim, commit, write_json
from workbench.flags import read_flags

ANSWER_TOKENS = 4
RUNNING = 32
SEEDS = 5
PICTURE_POOL_TOKENS = 400
GRID_SETS = {
    *("disable_radix_cache", "schedule_policy", "radix_eviction_policy", "max_total_tokens"),
    *("max_running_requests", "chunked_prefill_size", "dp_size"),
}
RESULT, TREE, STEPS = "radix_lab.json", "radix_tree", "radix_steps"
TRACE, LOG = "radix_trace.jsonl", "engine.log"


@dataclass
class Flags:
    model_path: str = ""
    prompts: str = str(REHEARSAL / "instructions.json")
    device: str = "cpu"
    scale: int = 1
    engine_args: str = "{}"
    full: bool = False
    output_dir: str = ""


HELP = {
    "model_path": "hub id or folder; empty: the tiny model",
    "prompts": "texts that the workloads are made of: hub data set or file, as run_sglang.py takes them",
    "device": "cpu or cuda",
    "scale": "prompt lengths and numbers of requests, times this",
    "engine_args": "JSON object of further sglang.Engine arguments",
    "full": "every policy with every eviction policy and pool, not one factor at a time",
    "output_dir": "empty: rehearsal/runs/<time>-radix_lab",
}


# --- workloads ----------------------------------------------------------------------------------------


@dataclass
class Workload:
    """Conversations: token ids of each turn's new text. All but chats have one turn."""

    name: str
    conversations: list[list[list[int]]]
    groups: int  # the conversations come group by group, equally many in each

    def prompt_tokens(self) -> list[int]:
        """Of each conversation's last turn."""
        return [sum(map(len, turns)) + (len(turns) - 1) * ANSWER_TOKENS for turns in self.conversations]

    def interleaved(self) -> list[int]:
        """The worst arrival order: neighbours never share more than they must."""
        size = len(self.conversations) // self.groups
        return sorted(range(len(self.conversations)), key=lambda i: (i % size, i))


def build_workloads(texts: list[str], tokenizer, scale: int) -> list[Workload]:
    """Structures whose text is cut from `texts`: 12 to 24 requests of 300 to 470 tokens, times `scale` both."""
    lines = itertools.cycle(texts)

    def text(tokens: int, title: str) -> list[int]:
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

    radix_cache: bool
    policy: str
    eviction: str
    pool: str  # all: everything fits; half: of the largest tree; longest: one request

    @property
    def plans(self) -> bool:
        """Whether the planner's order is measured on this engine too."""
        return self.radix_cache and (self.policy, self.eviction) == ("fcfs", "lru")


ONE_FACTOR_AT_A_TIME = [
    Setting(False, "fcfs", "lru", "all"),
    Setting(True, "fcfs", "lru", "all"),
    Setting(True, "lpm", "lru", "all"),
    Setting(True, "fcfs", "lru", "half"),
    Setting(True, "fcfs", "lfu", "half"),
    Setting(True, "fcfs", "lru", "longest"),
    Setting(True, "lpm", "lru", "longest"),
    Setting(True, "dfs-weight", "lru", "longest"),
]
EVERYTHING = ONE_FACTOR_AT_A_TIME[:1] + [
    Setting(True, policy, eviction, pool)
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
    return {"all": every + RUNNING * longest, "half": max(max(distinct) // 2, longest), "longest": longest}


# --- measuring ----------------------------------------------------------------------------------------


def run_workload(engine, workload: Workload, order: list[int] | None, pool_tokens: int) -> dict:
    """Runs all conversations at once, arriving in `order`; None: in the planner's. Time to first token counts
    from the arrival of the turn."""
    conversations = workload.conversations
    params = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    turns: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(max(map(len, conversations)))]
    ttft_s, cached_tokens = [], 0
    plan = Plan(order or [])
    if order is None:
        later = [
            total + ANSWER_TOKENS - len(c[0])
            for total, c in zip(workload.prompt_tokens(), conversations, strict=True)
        ]
        plan = Plan.depth_first([c[0] for c in conversations], later, pool_tokens)

    async def converse(i: int, computed) -> None:
        nonlocal cached_tokens
        prompt, arrived = [], began
        for number, new in enumerate(conversations[i]):
            prompt = prompt + new
            stream = await engine.async_generate(input_ids=prompt, sampling_params=params, stream=True)
            result = await anext(stream)
            ttft_s.append(time.monotonic() - arrived)
            if computed:
                computed()
            async for result in stream:  # noqa: B007 (the last chunk counts)
                pass
            if result["meta_info"]["finish_reason"]["type"] != "length":
                raise RuntimeError(f"not answered: {result['meta_info']['finish_reason']}")
            cached_tokens += result["meta_info"]["cached_tokens"]
            turns[number].append((prompt, result["output_ids"]))
            prompt, arrived = prompt + result["output_ids"], time.monotonic()

    began = time.monotonic()
    engine.loop.run_until_complete(follow(plan, converse, len(conversations)))
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


def arrival_orders(workload: Workload) -> dict[str, list[int]]:
    orders = {"interleaved": workload.interleaved()}
    for seed in range(SEEDS):
        order = list(range(len(workload.conversations)))
        random.Random(seed).shuffle(order)
        orders[f"seed {seed}"] = order
    return orders


def measure(engine, setting: Setting, workloads: list[Workload], rows) -> None:
    """All workloads in all arrival orders on one engine; sends each row through the pipe `rows`."""
    pool_tokens = engine.get_server_info()["max_total_num_tokens"]
    planned = ("planned",) if setting.plans else ()
    run_workload(engine, workloads[0], None, pool_tokens)  # the first requests load what is loaded once
    for workload in workloads:
        for arrival, order in arrival_orders(workload).items():
            arrived = Workload(workload.name, [workload.conversations[i] for i in order], workload.groups)
            for policy in (setting.policy, *planned):
                empty_tree(engine)
                given = None if policy == "planned" else list(range(len(order)))
                row = run_workload(engine, arrived, given, pool_tokens)
                names = {"workload": workload.name, "arrival_order": arrival, "pool_tokens": pool_tokens}
                rows.send(asdict(setting) | row | names | {"policy": policy})


def empty_tree(engine) -> None:
    """SGLang refuses while it still has to look at the last batch's results."""
    deadline = time.monotonic() + 30
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError("the scheduler does not become idle")
        time.sleep(0.01)


# --- the live tree ------------------------------------------------------------------------------------


def trace(engine, conversations: list[list[int]], together: bool, file: Path) -> list[dict]:
    """Runs the prompts at once or one after the other; the events of the scheduler's tree meanwhile."""
    empty_tree(engine)
    file.write_text("")
    params = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    for batch in [conversations] if together else [[ids] for ids in conversations]:
        engine.generate(input_ids=batch, sampling_params=params)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return events


def live_tree(events: list[dict]) -> list[tuple[str, list[dict]]]:
    """The moment of the last prefill: requests run, and what was evicted so far is known."""
    last = max(n for n, event in enumerate(events) if event["event"] == "prefill")
    nodes = events[last]["nodes"]
    tokens = sum(len(edge) for edge in radix_figure.edges(nodes))
    title = f"The scheduler's radix tree after {sum(e['event'] == 'prefill' for e in events)} requests: "
    return [(f"{title}{len(nodes)} nodes, {tokens} tokens of KV", events[: last + 1])]


def steps(events: list[dict]) -> list[tuple[str, list[dict]]]:
    """Insertion, hit, a full pool, and the eviction that makes room for one request more."""
    prefills = [n for n, event in enumerate(events) if event["event"] == "prefill"]
    panels = []
    for name, end in (("Insert", prefills[0]), ("Hit", prefills[1]), ("Another prefix", prefills[2])):
        event = events[end]
        computed = event["prompt_tokens"] - event["cached_tokens"]
        panels.append(
            (f"{name}: {event['cached_tokens']} tokens from the tree, {computed} computed", events[: end + 1])
        )
    evicted = sum(len(event["evicted"]) for event in events[: prefills[3]] if "evicted" in event)
    title = (
        f"The pool is full: the {evicted} least recently used leaves are evicted for a request without a match"
    )
    return [
        (f"{n}. {title}", part)
        for n, (title, part) in enumerate([*panels, (title, events[: prefills[3] + 1])], 1)
    ]


def draw_trees(engine, texts: list[str], tokenizer, folder: Path) -> None:
    """radix_tree and radix_steps, from an engine whose pool holds PICTURE_POOL_TOKENS."""
    lines = itertools.cycle([line for line in texts if line.isascii()] or texts)

    def text(title: str, tokens: int) -> list[int]:
        return tokenizer.encode(f"{title}{next(lines)}", add_special_tokens=False)[: tokens - 1] + newline

    newline = tokenizer.encode("\n", add_special_tokens=False)
    topics = ("Cooking", "History", "Physics")
    headers = [text(f"{topic}. ", 40) + text("Example: ", 30) for topic in topics]
    requests = [headers[n % 3] + text(f"{chr(65 + n)}: ", 20) for n in range(20)]
    events = trace(engine, requests, True, folder / TRACE)
    radix_figure.save(radix_figure.figure_of(live_tree(events), tokenizer.decode), folder / TREE)
    a, b, c = (text(f"{topic}. ", 60) + text("Example: ", 60) for topic in topics)
    shown = [
        a + text("First: ", 30),
        a + text("Second: ", 30),
        b + text("Third: ", 40),
        c + text("Fourth: ", 40),
    ]
    events = trace(engine, shown, False, folder / TRACE)
    radix_figure.save(radix_figure.figure_of(steps(events), tokenizer.decode), folder / STEPS)


# --- results ------------------------------------------------------------------------------------------


def aggregate(rows: list[dict]) -> list[dict]:
    """One line per workload and setting: over the random arrival orders, and the interleaved one."""
    lines = []
    keys = ("workload", "pool", "eviction", "radix_cache", "policy")
    for _, group in itertools.groupby(
        sorted(rows, key=lambda r: [str(r[k]) for k in keys]), key=lambda r: [r[k] for k in keys]
    ):
        group = list(group)
        seeds = [row for row in group if row["arrival_order"].startswith("seed")]
        worst = next(row for row in group if row["arrival_order"] == "interleaved")
        line = {key: worst[key] for key in (*keys, "pool_tokens", "optimum_hit_rate")}
        for name in ("hit_rate", "prefill_tokens", "ttft_p50_s", "output_tokens_per_s"):
            values = [row[name] for row in seeds]
            line |= {name: statistics.mean(values), f"{name}_range": (min(values), max(values))}
        lines.append(line | {"hit_rate_interleaved": worst["hit_rate"]})
    return lines


def print_table(lines: list[dict]) -> None:
    print(
        f"{'workload':17}{'pool':>15} {'cache':6}{'evict':6}{'policy':11}{'hit rate (range)':>22}{'interleaved':>12}"
        f"{'optimum':>9}{'prefill':>9}{'TTFT p50':>10}{'tokens/s':>10}"
    )
    for line in lines:
        low, high = line["hit_rate_range"]
        pool = f"{line['pool']} {line['pool_tokens']:,}"
        print(
            f"{line['workload']:17}{pool:>15} {'on' if line['radix_cache'] else 'off':6}{line['eviction']:6}"
            f"{line['policy']:11}{line['hit_rate']:>8.1%} ({low:5.1%}-{high:5.1%})"
            f"{line['hit_rate_interleaved']:>12.1%}{line['optimum_hit_rate']:>9.1%}{line['prefill_tokens']:>9,.0f}"
            f"{line['ttft_p50_s']:>9.3f}s{line['output_tokens_per_s']:>10,.0f}"
        )


def on_against_off(lines: list[dict]) -> dict[str, dict[str, float]]:
    """Per workload, where everything fits: the radix cache with planned order against no radix cache."""
    ratios = {}
    off = {line["workload"]: line for line in lines if not line["radix_cache"]}
    for on in lines:
        if (on["pool"], on["policy"], on["eviction"]) == ("all", "planned", "lru") and on["workload"] in off:
            other = off[on["workload"]]
            ratios[on["workload"]] = {
                "throughput_ratio": on["output_tokens_per_s"] / other["output_tokens_per_s"],
                "ttft_ratio": on["ttft_p50_s"] / other["ttft_p50_s"],
            }
    return ratios


def plot(lines: list[dict], folder: Path) -> None:
    """radix_lab.png: a panel per question, a group of bars per workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(line["workload"] for line in lines))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.6), layout="constrained")
    on, off = {"radix_cache": True, "eviction": "lru"}, {"radix_cache": False}
    small, big = on | {"pool": "longest"}, on | {"pool": "all", "policy": "fcfs"}
    by_policy = {policy: small | {"policy": policy} for policy in ("fcfs", "dfs-weight", "lpm", "planned")}
    by_pool = {
        f"{policy}, pool: {pool}": on | {"pool": pool, "policy": policy}
        for policy in ("fcfs", "planned")
        for pool in ("longest", "half", "all")
    }
    half = {"radix_cache": True, "pool": "half"}
    by_eviction = {name: half | {"policy": "fcfs", "eviction": name} for name in ("lru", "lfu")}
    on_off = {"radix cache off": off, "on, fcfs": big, "on, planned": big | {"policy": "planned"}}
    for axis, title, column, bars in (
        (axes[0, 0], "hit rate, the pool holds one request", "hit_rate", by_policy),
        (axes[0, 1], "hit rate by pool size", "hit_rate", by_pool),
        (axes[0, 2], "hit rate by eviction policy, half pool", "hit_rate", by_eviction),
        (
            axes[1, 0],
            "prefill tokens computed",
            "prefill_tokens",
            on_off,
        ),
        (axes[1, 1], "time to first token, median [s]", "ttft_p50_s", on_off),
        (axes[1, 2], "throughput [output tokens/s]", "output_tokens_per_s", on_off),
    ):
        for number, (label, wanted) in enumerate(bars.items()):
            found = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
            heights = [line[column] for line in found]
            at = [
                names.index(line["workload"]) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars)
                for line in found
            ]
            reach = [
                [abs(line[column] - end) for line, end in zip(found, ends, strict=True)]
                for ends in zip(*(line[f"{column}_range"] for line in found), strict=True)
            ]
            axis.bar(at, heights, 0.8 / len(bars), label=label, yerr=reach, ecolor="#555555", capsize=2)
            if column == "hit_rate":
                axis.plot(at, [line["hit_rate_interleaved"] for line in found], "kv", markersize=4)
        if column == "hit_rate":
            for place, name in enumerate(names):
                bound = next(line["optimum_hit_rate"] for line in lines if line["workload"] == name)
                axis.hlines(bound, place - 0.45, place + 0.45, colors="C3", linestyles="--", zorder=3)
            axis.set_ylim(0, 1.02)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(title)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False)
    figure.suptitle(
        "Bars: mean of 5 random arrival orders, whiskers their range; triangles: interleaved arrival; "
        "dashed: the best any order can reach"
    )
    figure.savefig(folder / "radix_lab.png", dpi=110)
    plt.close(figure)


# --- the program --------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Flags:
    given = read_flags(argv, Flags, HELP, {}, prog="radix_lab.py", description=__doc__.split("\n\n")[0])
    flags = Flags(**given)
    if flags.scale < 1:
        raise UserError(f"--scale {flags.scale}: must be at least 1")
    if flags.device == "cuda" and not flags.model_path:
        raise UserError("--device cuda needs a --model_path, such as Qwen/Qwen2.5-7B-Instruct")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-radix_lab"
    flags.output_dir = str(Path(flags.output_dir or REHEARSAL / "runs" / name).absolute())
    return flags


def main(argv: list[str]) -> int:
    try:
        flags = parse(argv)
        folder = Path(flags.output_dir)
        with claim(folder, "--output_dir"):
            return run(flags, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(flags: Flags, folder: Path) -> int:
    began = time.monotonic()
    words = {
        **{"device": flags.device, "prompts": flags.prompts, "output_file": folder / RESULT, "temperature": 0},
        **{"max_new_tokens": ANSWER_TOKENS, "dp_size": 1, "fast": True, "engine_args": flags.engine_args},
        **({"model_path": flags.model_path} if flags.model_path else {"rehearse": True}),
    }
    args = parse_arguments([f"--{name}={value}" for name, value in words.items()])
    own = args.own_engine_args
    for name in own.keys() & GRID_SETS:
        raise UserError(f"--engine_args: the grid sets {name}; leave it out")
    os.environ.update(runtime.environment(args))
    os.environ["RUNTIME_PLUGINS"] += ",radix_trace"
    os.environ["RADIX_TRACE"] = str(folder / TRACE)
    report.quiet_libraries(args)
    machine = runtime.Machine(args.device)
    found = preflight.run(args, machine)
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = found["model"]
    if args.device == "cpu":  # once, for all engines; on a GPU it would initialise CUDA before the fork
        runtime.skip_other_models(model.config["architectures"])
        import sglang.srt.managers.scheduler  # noqa: F401
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    texts = [record.instruction for record in found["records"] if not record.error]
    if not texts:
        raise UserError(f"--prompts {flags.prompts}: no text to make workloads of")
    workloads = build_workloads(texts, tokenizer, flags.scale)
    pools = pool_sizes(workloads) | {"picture": PICTURE_POOL_TOKENS}

    def with_engine(setting: Setting, running: int, work, pipe) -> None:
        engine_args = {
            **{"disable_radix_cache": not setting.radix_cache, "schedule_policy": setting.policy},
            **{"radix_eviction_policy": setting.eviction, "max_total_tokens": pools[setting.pool]},
            **{"max_running_requests": running},
        }
        args.engine_args = json.dumps(engine_args | own)
        chosen = runtime.choose(args, machine, model, found["records"])
        if args.device == "cpu":
            runtime.fork_engine_processes()
        engine, _, _ = runtime.start(args, chosen, model.config["architectures"], [])
        work(engine, pipe)
        engine.shutdown()

    def pictures(engine, _) -> None:
        draw_trees(engine, texts, tokenizer, folder)

    settings = EVERYTHING if flags.full else ONE_FACTOR_AT_A_TIME
    rows: list[dict] = []
    for _ in runtime.in_a_process(
        folder / LOG, with_engine, Setting(True, "fcfs", "lru", "picture"), 4, pictures
    ):
        pass
    with tqdm(
        total=sum(1 + setting.plans for setting in settings) * len(workloads) * (SEEDS + 1), unit=" runs"
    ) as bar:
        for setting in settings:
            bar.set_postfix_str(" ".join(str(value) for value in asdict(setting).values()))
            for row in runtime.in_a_process(
                folder / LOG,
                with_engine,
                setting,
                RUNNING,
                lambda engine, pipe, s=setting: measure(engine, s, workloads, pipe),
            ):
                rows.append(row)
                bar.update()
            store(folder, flags, machine, rows, time.monotonic() - began)
    lines = aggregate(rows)
    print_table(lines)
    plot(lines, folder)
    for workload, ratios in on_against_off(lines).items():
        print(
            f"{workload}: the radix cache, planned, has {ratios['throughput_ratio']:.1f} times the throughput of none "
            f"and {ratios['ttft_ratio']:.2f} of its time to first token"
        )
    print(f"written to {folder}: {RESULT}, radix_lab.png, {TREE}.svg, {STEPS}.svg")
    return 0


def store(folder: Path, flags: Flags, machine: runtime.Machine, rows: list[dict], wall_s: float) -> None:
    import torch

    result = {
        **{
            "rows": rows,
            "wall_s": wall_s,
            "commit": commit(),
            "versions": preflight.versions(preflight.PACKAGES),
        },
        "on_against_off": on_against_off(aggregate(rows)),
        "hardware": machine.gpu_name
        or f"{os.cpu_count()} CPU cores, {torch.backends.cpu.get_cpu_capability()}",
        "settings": {
            "device": flags.device,
            "engine_args": flags.engine_args,
            "scale": flags.scale,
            "full": flags.full,
            "running": RUNNING,
        }
        | {"model": Path(flags.model_path).name or TINY_MODEL, "answer_tokens": ANSWER_TOKENS},
    }
    write_json(folder / RESULT, result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
