"""The order of records: the bound, the plan that reaches it, and what run_sglang.py says about it."""

import asyncio
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_infer import order
from batch_infer.arguments import Arguments
from batch_infer.order import Plan, common_prefix, depth_first, follow, optimum_cached_tokens
from batch_infer.prompts import Record
from harness import ROOT, answers, summary_of

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
    plan = depth_first(prompts, answers, pool)
    running, computed, started = set(), [], []

    async def answer(i: int, cached) -> None:
        started.append(i)
        running.add(i)
        edges = {tuple(prompts[k][: n + 1]) for k in running for n in range(len(prompts[k]))}
        assert len(edges) + sum(answers[k] for k in running) <= pool
        assert len(running) <= at_once
        shared = max((common_prefix(prompts[k], prompts[i]) for k in computed), default=0)
        longest = max((common_prefix(prompts[k], prompts[i]) for k in started[:-1]), default=0)
        assert shared == longest  # whatever it shares with one before it is computed already
        await asyncio.sleep(0)
        computed.append(i)
        if cached:
            cached()
        for _ in range((i * 7) % 5):
            await asyncio.sleep(0)
        running.discard(i)

    asyncio.run(follow(plan, answer, asyncio.Semaphore(at_once)))
    assert sorted(started) == list(range(len(prompts)))


def test_record_that_fails_holds_nobody_back():
    plan = depth_first([[1, 2], [1, 3]], [1, 1], 100)
    done = []

    async def answer(i: int, cached) -> None:
        done.append(i)  # the first never says that its prompt is computed, as when its request is refused

    asyncio.run(asyncio.wait_for(follow(plan, answer, asyncio.Semaphore(2)), 5))
    assert done == [0, 1]


# --- the decision -------------------------------------------------------------------------------------


def records(prompts: list[list[int]], lora: list[str | None] | None = None) -> list[Record]:
    lora = lora or [None] * len(prompts)
    return [
        Record(i, "", lora=of, input_ids=ids, sampling_params={"max_new_tokens": 4})
        for i, (ids, of) in enumerate(zip(prompts, lora, strict=True))
    ]


FEW_SHOT = records([[g] * 100 + [50 + q] * 10 for q in range(6) for g in range(4)])
ONLY_A_TEMPLATE = records([[1] * 24 + [100 + i] * 30 for i in range(50)])


@pytest.mark.parametrize(
    ("todo", "flags", "policy", "reason"),
    [
        (ONLY_A_TEMPLATE, {}, "fcfs", "are 0.0% of the prompts: an order would save little"),
        (FEW_SHOT[:4], {}, "fcfs", "an order would save little"),  # what a resume has left, one of each prefix
        (FEW_SHOT, {"policy": "lpm"}, "lpm", "--policy"),
        (FEW_SHOT, {"engine_args": '{"schedule_policy": "dfs-weight"}'}, "dfs-weight", "--engine_args"),
        (FEW_SHOT, {"engine_args": '{"disable_radix_cache": true}'}, "fcfs", "without the radix cache"),
    ],
)
def test_records_stay_as_they_are_where_no_order_pays(todo, flags, policy, reason):
    decided = order.decide(Arguments(**flags), todo)
    assert decided.schedule_policy == policy
    assert reason in decided.reason
    assert "depth-first" not in decided.reason
    assert order.parts(decided, todo, 2, 10_000) == [order.Part(todo, Plan(list(range(len(todo)))))]


def test_copies_get_prefixes_of_their_own():
    decided = order.decide(Arguments(), FEW_SHOT)
    assert decided.reason.startswith(
        "records come depth-first: 76% of the prompt tokens lie in shared prefixes"
    )
    parts = order.parts(decided, FEW_SHOT, 2, 10_000)
    assert [part.copy for part in parts] == [0, 1]
    assert [{record.input_ids[0] for record in part.records} for part in parts] == [{0, 1}, {2, 3}]


def test_one_prefix_is_shared_out_over_all_copies():
    one_header = records([[1] * 100 + [50 + q] * 4 for q in range(8)])
    parts = order.parts(order.decide(Arguments(), one_header), one_header, 4, 10_000)
    assert [len(part.records) for part in parts] == [2, 2, 2, 2]


def test_adapters_share_no_prefix():
    both = records([[1] * 100] * 4, ["a", "b", "a", "b"])
    [part] = order.parts(order.decide(Arguments(), both), both, 1, 10_000)
    assert len(part.plan.opener) == 2
    for later, first in part.plan.opener.items():
        assert part.records[later].lora == part.records[first].lora


# --- run_sglang.py ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_shot(tmp_path_factory) -> list:
    """Flags of a run over three headers with four questions each."""
    rows = [row["instruction"] for row in json.loads((ROOT / "rehearsal" / "instructions.json").read_text())]
    prompts = ["\n".join([*rows[4 * h : 4 * h + 4], rows[20 + q]]) for q in range(4) for h in range(3)]
    path = tmp_path_factory.mktemp("few_shot") / "prompts.json"
    path.write_text(json.dumps(prompts))
    return ["--prompts", path, "--max_new_tokens", 8]


@pytest.fixture(scope="module")
def runs(run_inference, few_shot, tmp_path_factory) -> dict:
    """(summary, answers, terminal) of three runs."""
    found = {}
    for name, flags in {
        "planned": ["--engine_args", '{"max_total_tokens": 420, "context_length": 400}'],  # a small pool
        "fcfs": ["--policy", "fcfs"],
        "two copies": ["--dp_size", 2],
    }.items():
        out = tmp_path_factory.mktemp("run")
        code, text = run_inference(*few_shot, *flags, "--output_file", out / "outputs.jsonl").wait()
        assert code == 0, text
        found[name] = summary_of(out), answers(out), text
    return found


def test_the_job_computes_a_shared_prefix_once(runs):
    summary, _, text = runs["planned"]
    assert summary["prefix_hit_rate"] == summary["optimum_hit_rate"] > 0.5
    assert summary["computed_prompt_tokens"] == summary["prompt_tokens"] - summary["cached_prompt_tokens"]
    assert re.search(r"prefix .* came from the radix tree \(optimum .*\), [\d,]+ were computed", text)
    assert "schedule_policy = fcfs: records come depth-first" in text


def test_answers_do_not_depend_on_the_policy(runs):
    assert runs["planned"][1] == runs["fcfs"][1] == runs["two copies"][1]
    assert runs["fcfs"][0]["prefix_hit_rate"] < runs["two copies"][0]["prefix_hit_rate"]
    assert "depth-first" not in runs["fcfs"][2]


def test_a_resume_says_the_order_of_what_is_left(run_inference, few_shot, tmp_path):
    """Of the leftovers none shares a prefix with another. (No engine runs here.)"""

    def stop_after_the_first_nine() -> None:
        import run_sglang

        def answer(run, partial, waiting) -> None:
            usage = {"prompt_tokens": 1, "cached_tokens": 0, "output_tokens": 1}
            row = {"output": "x", "output_ids": [1], "finish_reason": "stop"} | usage
            partial.append([row | {"index": r.index, "key": r.key} for r in run.todo if r.index < 9])

        run_sglang.answer = answer

    flags = [*few_shot, "--output_file", tmp_path / "outputs.jsonl"]
    said = []
    for _ in range(2):
        code, text = run_inference(*flags, patch=stop_after_the_first_nine).wait()
        assert code == 75, text
        said.append(re.search("schedule_policy = (.*)", text)[1])
    assert said[0].startswith("fcfs: records come depth-first")
    assert "9 already answered" in text
    assert said[1].endswith("an order would save little")
