"""RadixAttention on the real Runtime on the CPU: the planner reaches the optimum, and the figures show the tree."""

import asyncio
import itertools
import json
import os
import random
import re

import pytest
import radix_lab
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer import engine as runtime
from batch_infer import radix_figure
from batch_infer.arguments import Arguments
from batch_infer.planner import Plan, common_prefix, follow, optimum_cached_tokens
from batch_infer.prompts import Record
from harness import ROOT, fork

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5)


# --- the bound and the plan ---------------------------------------------------------------------------


def cached_in_order(prompts: list[list[int]]) -> int:
    """What an unlimited tree gives to these prompts, one after the other."""
    cached, seen = 0, []
    for prompt in prompts:
        match = max((n for other in seen for n in range(len(prompt) + 1) if prompt[:n] == other[:n]), default=0)
        cached += min(match, len(prompt) - 1)
        seen.append(prompt)
    return cached


@given(PROMPTS)
def test_bound_is_the_best_of_all_orders(prompts):
    best = max(cached_in_order(list(order)) for order in itertools.permutations(prompts))
    assert optimum_cached_tokens([[(prompt, []) for prompt in prompts]]) == best


def test_bound_counts_what_an_earlier_turn_generated():
    first, second = ([1, 2, 3], [7, 8]), ([1, 2, 3, 7, 8, 4], [9])
    assert optimum_cached_tokens([[first], [second]]) == 5
    assert optimum_cached_tokens([[first], [([1, 2, 3, 7], [])]]) == 3  # its last token is computed


@given(PROMPTS, st.lists(st.integers(1, 4), min_size=5, max_size=5), st.integers(0, 10), st.integers(1, 6))
def test_plan_computes_each_prefix_first_and_stays_in_the_pool(prompts, answers, more, at_once):
    answers = answers[: len(prompts)]
    pool = max(len(p) + a for p, a in zip(prompts, answers, strict=True)) + more
    plan = Plan.depth_first(prompts, answers, pool)
    running, computed, order = set(), [], []

    async def answer(i: int, is_computed) -> None:
        order.append(i)
        running.add(i)
        edges = {tuple(prompts[k][: n + 1]) for k in running for n in range(len(prompts[k]))}
        assert len(edges) + sum(answers[k] for k in running) <= pool
        assert len(running) <= at_once
        shared = max((common_prefix(prompts[k], prompts[i]) for k in computed), default=0)
        longest = max((common_prefix(prompts[k], prompts[i]) for k in order[:-1]), default=0)
        assert shared == longest  # whatever it shares with one before it is computed already
        await asyncio.sleep(0)
        computed.append(i)
        if is_computed:
            is_computed()
        for _ in range((i * 7) % 5):
            await asyncio.sleep(0)
        running.discard(i)

    asyncio.run(follow(plan, answer, at_once))
    assert sorted(order) == list(range(len(prompts)))


def test_record_that_fails_holds_nobody_back():
    plan = Plan.depth_first([[1, 2], [1, 3]], [1, 1], 100)
    done = []

    async def answer(i: int, is_computed) -> None:
        done.append(i)  # the first never says that its prompt is computed, as when its request is refused

    asyncio.run(asyncio.wait_for(follow(plan, answer, 2), 5))
    assert done == [0, 1]


def records(prompts: list[list[int]], lora: list[str | None] | None = None) -> list[Record]:
    lora = lora or [None] * len(prompts)
    return [
        Record(i, "", lora=of, input_ids=ids, max_new_tokens=4)
        for i, (ids, of) in enumerate(zip(prompts, lora, strict=True))
    ]


def test_prompts_that_share_only_a_template_stay_as_they_are():
    plain = records([[1] * 24 + [100 + i] * 30 for i in range(50)])
    [(todo, plan)] = runtime.plan(Arguments(), plain, 2, 10_000)
    assert todo == plain
    assert plan == Plan.as_given(50)
    assert "an order would save little" in runtime.choose_policy(Arguments(), plain)[1]


def test_copies_get_prefixes_of_their_own():
    few_shot = records([[g] * 100 + [50 + q] * 10 for q in range(6) for g in range(4)])
    plans = runtime.plan(Arguments(), few_shot, 2, 10_000)
    assert [{record.input_ids[0] for record in part} for part, _ in plans] == [{0, 1}, {2, 3}]
    assert "records come depth-first" in runtime.choose_policy(Arguments(), few_shot)[1]


def test_one_prefix_is_shared_out_over_all_copies():
    one_header = records([[1] * 100 + [50 + q] * 4 for q in range(8)])
    plans = runtime.plan(Arguments(), one_header, 4, 10_000)
    assert [len(part) for part, _ in plans] == [2, 2, 2, 2]


def test_engine_args_of_ones_own_are_not_planned_against():
    few_shot = records([[1] * 100 + [50 + q] * 4 for q in range(8)])
    args = Arguments(engine_args='{"disable_radix_cache": true}')
    assert runtime.plan(args, few_shot, 1, 10_000) == [(few_shot, Plan.as_given(8))]


def test_adapters_share_no_prefix():
    both = records([[1] * 100] * 4, ["a", "b", "a", "b"])
    [(ordered, plan)] = runtime.plan(Arguments(), both, 1, 10_000)
    assert len(plan.opener) == 2
    assert all(ordered[later].lora == ordered[first].lora for later, first in plan.opener.items())


# --- the Runtime --------------------------------------------------------------------------------------


def ids(*parts: tuple[int, int]) -> list[int]:
    """Token ids: each part is (a seed, how many)."""
    return [t for seed, n in parts for t in (random.Random(seed).randrange(300, 900) for _ in range(n))]


FEW_SHOT = [[ids((h, 50), (100 + h * 9 + q, 20))] for h in range(3) for q in range(3)]
PLANS = [ids((h, 30), (10 + h * 9 + p, 20)) for h in range(2) for p in range(2)]
TREE = [[plan + ids((100 + n * 9 + k, 20) if k else (0, 0))] for n, plan in enumerate(PLANS) for k in range(3)]
WORKLOADS = [radix_lab.Workload("few_shot", FEW_SHOT, 3), radix_lab.Workload("tree_of_thoughts", TREE, 2)]
# Pairs of equal prompts, one a prefix of another: 90 different orders.
SIX = [ids((1, 40)), ids((1, 40), (2, 30)), ids((3, 60))] * 2


@pytest.fixture(scope="module")
def measured(runtime, tiny_qwen2, tmp_path_factory) -> dict:
    """One engine whose pool holds the longest request only; all that the tests below look at."""
    folder = tmp_path_factory.mktemp("radix")

    def run() -> int:
        os.environ |= {"RUNTIME_PLUGINS": "cpu,radix_trace", "RADIX_TRACE": str(folder / "trace.jsonl")}
        from batch_infer.engine import fork_engine_processes

        fork_engine_processes()
        from sglang.srt.entrypoints.engine import Engine

        engine = Engine(
            **{"model_path": str(tiny_qwen2), "device": "cpu", "dtype": "float32", "mem_fraction_static": 0.3},
            **{"attention_backend": "torch_native", "disable_cuda_graph": True, "log_level": "error"},
            **{"max_total_tokens": 77, "max_running_requests": 8, "enable_deterministic_inference": True},
        )
        engine.freeze_gc()
        found = {"rows": [], "orders": []}
        for workload in WORKLOADS:
            for arrival, order in radix_lab.arrival_orders(workload).items():
                arrived = radix_lab.Workload(
                    workload.name, [workload.conversations[i] for i in order], workload.groups
                )
                for policy, arrival_order in (("fcfs", list(range(len(order)))), ("planned", None)):
                    radix_lab.empty_tree(engine)
                    row = radix_lab.run_workload(engine, arrived, arrival_order, 77)
                    found["rows"].append(
                        row | {"workload": workload.name, "policy": policy, "arrival": arrival}
                    )
        for order in sorted(set(itertools.permutations(map(tuple, SIX)))):
            radix_lab.empty_tree(engine)
            results = engine.generate(input_ids=[list(p) for p in order], sampling_params={"max_new_tokens": 1})
            found["orders"].append(sum(result["meta_info"]["cached_tokens"] for result in results))
        shown = [ids((7, 30), (8, 10)), ids((7, 30), (9, 10)), ids((10, 30)), ids((11, 36))]
        found["steps"] = radix_lab.trace(engine, shown, False, folder / "trace.jsonl")
        found["shown"] = shown
        engine.shutdown()
        (folder / "found.json").write_text(json.dumps(found))
        return 0

    code, text = fork(run, folder / "terminal.txt").wait()
    assert code == 0, text
    return json.loads((folder / "found.json").read_text())


def test_best_of_all_orders_on_the_runtime_is_the_bound(measured):
    bound = optimum_cached_tokens([[(prompt, []) for prompt in SIX]])
    assert len(measured["orders"]) == 90
    assert max(measured["orders"]) == bound
    assert min(measured["orders"]) < bound / 2
    assert measured["orders"][0] == bound  # the sorted one


@pytest.mark.parametrize("workload", [workload.name for workload in WORKLOADS])
def test_planner_reaches_the_bound_from_every_arrival_order(measured, workload):
    rows = [row for row in measured["rows"] if row["workload"] == workload]
    planned = {row["arrival"]: row for row in rows if row["policy"] == "planned"}
    fcfs = {row["arrival"]: row for row in rows if row["policy"] == "fcfs"}
    assert len(planned) == 1 + radix_lab.SEEDS
    for row in planned.values():
        assert row["hit_rate"] == row["optimum_hit_rate"] > 0.4
    assert fcfs["interleaved"]["hit_rate"] < 0.05
    mean = sum(row["hit_rate"] for name, row in fcfs.items() if name != "interleaved") / radix_lab.SEEDS
    assert mean < 0.7 * planned["interleaved"]["hit_rate"]


def test_trace_shows_insertion_hit_and_eviction(measured):
    events, shown = measured["steps"], measured["shown"]
    prefills = [event for event in events if event["event"] == "prefill"]
    assert [event["cached_tokens"] for event in prefills] == [0, 30, 0, 0]
    first = {tuple(node["token_ids"]): node["in_use"] for node in prefills[0]["nodes"]}
    assert first == {tuple(shown[0]): True}
    second = {tuple(node["token_ids"]): node["in_use"] for node in prefills[1]["nodes"]}
    assert second[tuple(shown[1][:30])] is True  # the node was split where the prompts part
    assert second[tuple(shown[0])] is False
    evicted = [path for event in events for path in event.get("evicted", ())]
    assert evicted[0][:40] == shown[0]  # the least recently used leaf goes first
    assert shown[0] in evicted
    assert shown[1] not in evicted or evicted.index(shown[0]) < evicted.index(shown[1])
    for event in events:
        live = [tuple(node["token_ids"]) for node in event["nodes"]]
        assert len(live) == len(set(live))
        assert sum(len(edge) for edge in radix_figure.edges(event["nodes"])) <= 77


# --- figures ------------------------------------------------------------------------------------------


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes meet, as matplotlib draws them."""
    renderer = figure.canvas.get_renderer()
    texts = [text for axis in figure.axes for text in axis.texts] + list(figure.texts)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.x1 <= figure.bbox.x1, label
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


def event(paths: list[list[int]], in_use: list[bool], **facts) -> dict:
    nodes = [{"token_ids": p, "in_use": u, "hit_count": 1} for p, u in zip(paths, in_use, strict=True)]
    return {"nodes": nodes} | facts


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_labels_of_20_requests_do_not_overlap(seed):
    draw = random.Random(seed)
    headers = [[1000 + h] * draw.randint(1, 80) for h in range(draw.randint(1, 5))]
    leaves = [draw.choice(headers) + [n] * draw.randint(1, 60) for n in range(20)]
    paths = [*headers, *leaves]
    last = event(paths, [draw.random() < 0.3 for _ in paths], evicted=[leaves[0] + [7, 7], [9, 9, 9]])
    figure = radix_figure.figure_of([("A title", [last])], lambda tokens: "Ŵord$_{x}\n" * len(tokens))
    assert overlaps(figure) == []
    import matplotlib.pyplot as plt

    plt.close(figure)


def test_steps_of_the_live_run_are_drawn(measured, tmp_path):
    panels = radix_lab.steps(measured["steps"])
    assert [re.sub(r"\d+", "#", title.split(":")[0]) for title, _ in panels] == [
        *("#. Insert", "#. Hit", "#. Another prefix", "#. The pool is full")
    ]
    figure = radix_figure.figure_of(panels, lambda tokens: "word " * len(tokens))
    assert overlaps(figure) == []
    radix_figure.save(figure, tmp_path / "radix_steps")
    drawn = (tmp_path / "radix_steps.svg").read_text()
    assert "evicted 1." in drawn
    assert "1. Insert: 0 tokens from the tree, 40 computed" in drawn


# --- run_sglang.py ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_shot_file(tmp_path_factory):
    rows = [row["instruction"] for row in json.loads((ROOT / "rehearsal" / "instructions.json").read_text())]
    prompts = ["\n".join([*rows[4 * h : 4 * h + 4], rows[20 + q]]) for q in range(4) for h in range(3)]
    path = tmp_path_factory.mktemp("few_shot") / "prompts.json"
    path.write_text(json.dumps(prompts))
    return path


@pytest.fixture(scope="module")
def runs(run_inference, few_shot_file, tmp_path_factory) -> dict:
    found = {}
    for name, flags in {
        "planned": [],
        "fcfs": ["--policy", "fcfs"],
        "two copies": ["--dp_size", 2],
        "small pool": ["--engine_args", '{"max_total_tokens": 420, "context_length": 400}'],
    }.items():
        out = tmp_path_factory.mktemp("run")
        flags = [
            "--prompts",
            few_shot_file,
            "--max_new_tokens",
            8,
            "--output_file",
            out / "outputs.jsonl",
            *flags,
        ]
        code, text = run_inference(*flags).wait()
        assert code == 0, text
        summary = json.loads((out / "summary.json").read_text())
        found[name] = (summary, (out / "outputs_all.json").read_bytes(), text)
    return found


@pytest.mark.parametrize("name", ["planned", "small pool"])
def test_the_job_computes_a_shared_prefix_once(runs, name):
    summary, _, text = runs[name]
    assert summary["prefix_hit_rate"] == summary["optimum_hit_rate"] > 0.5
    assert summary["computed_prompt_tokens"] == summary["prompt_tokens"] - summary["cached_prompt_tokens"]
    assert re.search(r"prefix .* came from the radix tree \(optimum .*\), [\d,]+ were computed", text)
    assert "records come depth-first" in text


def test_answers_do_not_depend_on_the_policy(runs):
    assert len({outputs for name, (_, outputs, _) in runs.items() if name != "small pool"}) == 1
    assert runs["fcfs"][0]["prefix_hit_rate"] < runs["planned"][0]["prefix_hit_rate"]
    assert runs["two copies"][0]["prefix_hit_rate"] > runs["fcfs"][0]["prefix_hit_rate"]


# --- the lab ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device tpu: choose cuda or cpu"),
        (["--scale", "0"], "--scale 0: must be at least 1"),
        (["--device", "cuda"], "--device cuda needs a --model_path"),
        (["--prompts", "/nowhere.json"], "/nowhere.json"),
        (["--ful"], "did you mean --full?"),
        (["--engine_args", "{bad"], "--engine_args, column 2: not valid JSON"),
        (["--engine_args", '{"schedule_policy": "lpm"}'], "the grid sets schedule_policy"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    assert radix_lab.main([*flags, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.long
def test_the_default_grid(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, str(ROOT / "sglang" / "radix_lab.py"), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "radix_lab.json").read_text())
    assert result["wall_s"] < 300
    names = {
        *("workload", "radix_cache", "policy", "eviction", "pool_tokens", "hit_rate", "optimum_hit_rate"),
        *("prefill_tokens", "seconds", "arrival_order", "ttft_p50_s", "output_tokens_per_s"),
    }
    assert all(row.keys() >= names for row in result["rows"])
    for row in result["rows"]:
        if row["policy"] == "planned" and row["workload"] != "chats":
            assert row["hit_rate"] == row["optimum_hit_rate"], row
    few_shot = result["on_against_off"]["few_shot"]
    assert few_shot["throughput_ratio"] >= 3
    assert few_shot["ttft_ratio"] <= 0.5
    for name in ("radix_lab.png", "radix_tree.svg", "radix_steps.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
