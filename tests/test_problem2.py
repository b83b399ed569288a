"""Problem 2, as students can check it: `python -P -m pytest tests/test_problem2.py`."""

import asyncio
import json

import pytest

from batch_infer.arguments import Arguments
from batch_infer.engine import answer_all, environment
from batch_infer.planner import Plan
from batch_infer.prompts import Record
from batch_infer.records import PartialFile
from harness import ROOT


class FakeEngine:
    """Answers as sglang.Engine does, some milliseconds later, and counts what it holds meanwhile."""

    def __init__(self) -> None:
        self.in_flight = self.most_in_flight = self.waiting = self.most_waiting = 0
        self.started: list[tuple] = []  # ids; first tokens by then; records in flight by then
        self.first_tokens = 0

    async def async_generate(self, input_ids, sampling_params, stream=False, **_):
        results = self.results(input_ids)
        if stream:
            return results
        return [result async for result in results][-1]

    async def results(self, ids):
        self.started.append((ids, self.first_tokens, self.in_flight))
        self.in_flight, self.waiting = self.in_flight + 1, self.waiting + 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.most_waiting = max(self.most_waiting, self.waiting)
        await asyncio.sleep(0.02)
        self.waiting, self.first_tokens = self.waiting - 1, self.first_tokens + 1
        try:
            if ids == [13]:
                raise ValueError("no such adapter")
            for text in ("a", "a b"):
                meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": len(ids), "cached_tokens": 0}
                yield {"text": text, "output_ids": [1, 2], "meta_info": meta | {"completion_tokens": 2}}
                await asyncio.sleep(0.02)
        finally:
            self.in_flight -= 1


@pytest.fixture
def ask(tmp_path):
    """ask(prompts, order=None, waiting_limit=None, **flags) -> (engine, rows by index)."""

    def run(prompts, order=None, waiting_limit=None, **flags):
        engine, partial = FakeEngine(), PartialFile(tmp_path, {}, {})
        records = [Record(i, "", input_ids=ids, max_new_tokens=8) for i, ids in enumerate(prompts)]

        async def answer():
            plans = [(records, order or Plan.as_given(len(records)))]
            args, stopped = Arguments(**flags), asyncio.Event()
            await answer_all(engine, plans, args, partial, stopped, waiting_limit, lambda _: None)

        asyncio.run(answer())
        return engine, partial.rows

    return run


MANY = [[number] for number in range(20, 70)]


def test_2b_2c_all_records_are_in_flight_together(ask):
    engine, rows = ask(MANY)
    assert engine.most_in_flight == len(MANY)
    assert [rows[i]["output"] for i in range(len(MANY))] == ["a b"] * len(MANY)


def test_2b_2c_batch_size_limits_them(ask):
    engine, rows = ask(MANY, batch_size=7)
    assert engine.most_in_flight == 7
    assert len(rows) == len(MANY)


def test_2b_2c_so_many_wait_for_their_first_token(ask):
    engine, rows = ask(MANY, waiting_limit=5)
    assert engine.most_waiting == 5
    assert len(rows) == len(MANY)


def test_2b_2c_a_shared_prefix_is_computed_once(ask):
    """In the plan's order; the others start when the first of them has its first token, not when it has ended."""
    prompts = [[1, 2, 3, number] for number in (9, 7, 8)]
    engine, _ = ask(prompts, order=Plan.depth_first(prompts, [2] * 3, 1000))
    assert engine.started == [(prompts[1], 0, 0), (prompts[2], 1, 1), (prompts[0], 1, 2)]


def test_2b_2c_a_bad_record_costs_no_other(ask):
    _, rows = ask([[12], [13], [14]])
    assert [rows[i].get("output") for i in range(3)] == ["a b", None, "a b"]
    assert rows[1]["error"] == "ValueError: no such adapter"


def test_2d_the_reproducible_profile_keeps_the_radix_cache():
    def plugins(**flags) -> set[str]:
        return set(filter(None, environment(Arguments(**flags))["RUNTIME_PLUGINS"].split(",")))

    assert plugins() == {"deterministic_radix"}
    assert plugins(jump_forward=True) == {"deterministic_radix", "jump_forward"}
    assert plugins(fast=True) == set()
    assert plugins(fast=True, jump_forward=True) == {"jump_forward"}


def test_2a_the_engine_answers_and_the_radix_cache_is_hit(run_inference, tmp_path):
    rows = json.loads((ROOT / "rehearsal" / "instructions.json").read_text())[:11]
    prompts, out = tmp_path / "few.json", tmp_path / "outputs.jsonl"
    prompts.write_text(json.dumps([*rows, rows[0]]))
    flags = ["--prompts", prompts, "--max_new_tokens", 16, "--max_running_requests", 4, "--output_file", out]
    code, text = run_inference(*flags).wait()
    assert code == 0, text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["records"], summary["failed_records"]) == (12, 0)
    assert summary["cached_prompt_tokens"] > 0
    assert summary["settings"]["engine_args"]["max_running_requests"] == 4
