"""Problem 2, as students can check it: `python -P -m pytest tests/test_problem2.py`."""

import asyncio

import pytest

from batch_infer import generate
from batch_infer.arguments import Arguments
from batch_infer.engine_args import environment
from batch_infer.order import Part, Plan, depth_first
from batch_infer.prompts import Record
from batch_infer.store import PartialFile
from harness import summary_of


class FakeEngine:
    """Answers as sglang.Engine does, some milliseconds later, and counts what it holds meanwhile."""

    ERROR = "ValueError: no such adapter"

    def __init__(self) -> None:
        self.requests: list[tuple] = []  # ids, adapter, copy, new tokens
        self.in_flight = self.most_in_flight = self.waiting = self.most_waiting = 0
        self.started: list[tuple] = []  # ids; first tokens by then; records in flight by then
        self.first_tokens = 0

    async def async_generate(
        self, input_ids, sampling_params, stream=False, lora_path=None, routed_dp_rank=None
    ):
        self.requests.append((input_ids, lora_path, routed_dp_rank, sampling_params["max_new_tokens"]))
        results = self.results(input_ids)
        if stream:
            return results
        return [result async for result in results][-1]

    async def results(self, ids):
        self.started.append((ids, self.first_tokens, self.in_flight))
        self.in_flight, self.waiting = self.in_flight + 1, self.waiting + 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            await asyncio.sleep(0.02)
            self.waiting, self.first_tokens = self.waiting - 1, self.first_tokens + 1
            if ids == [13]:
                raise ValueError("no such adapter")
            for text in ("a", "a b"):
                meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": len(ids), "cached_tokens": 0}
                yield {"text": text, "output_ids": [1, 2], "meta_info": meta | {"completion_tokens": 2}}
                await asyncio.sleep(0.02)
        finally:
            self.in_flight -= 1


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """ask(prompts, planned=False, copies=1, adapter=None, batch_size=0, waiting_limit=None, stop_after=None) ->
    (engine, rows by index). With two copies the first half of the prompts is for the first. Rows that fail without a
    reason of the engine's fail the test."""

    def run(prompts, planned=False, copies=1, adapter=None, batch_size=0, waiting_limit=None, stop_after=None):
        engine, partial = FakeEngine(), PartialFile(tmp_path, {}, {})
        engine.in_flight_at_rows = []
        records = [
            Record(i, "", lora=adapter, input_ids=ids, sampling_params={"max_new_tokens": 8})
            for i, ids in enumerate(prompts)
        ]
        parts, half = [], -(-len(records) // copies)
        for copy in range(copies):
            mine = records[copy * half : (copy + 1) * half]
            ids = [record.input_ids for record in mine]
            plan = depth_first(ids, [2] * len(mine), 1000) if planned else Plan(list(range(len(mine))))
            parts.append(Part(mine, plan, copy if copies > 1 else None))
        monkeypatch.setattr(generate, "WAITING_FOR_LPM", waiting_limit)

        async def answer():
            stopped = asyncio.Event()

            def on_rows(rows):
                engine.in_flight_at_rows.append(engine.in_flight)
                if stop_after is not None and len(partial.rows) >= stop_after:
                    stopped.set()

            policy = "lpm" if waiting_limit else "fcfs"
            work = generate.answer_all(engine, parts, partial, stopped, on_rows, batch_size, policy)
            await asyncio.wait_for(work, timeout=20)
            assert engine.in_flight == 0, "nothing runs on after the end or a stop"

        asyncio.run(answer())
        for row in partial.rows.values():
            assert row.get("error", FakeEngine.ERROR) == FakeEngine.ERROR
        return engine, partial.rows

    return run


MANY = [[number] for number in range(20, 70)]


def test_2b_2c_all_records_are_in_flight_together(ask):
    engine, rows = ask(MANY)
    assert engine.most_in_flight == len(MANY)
    assert [rows[i]["output"] for i in range(len(MANY))] == ["a b"] * len(MANY)


@pytest.mark.parametrize(("copies", "batch_size"), [(1, 7), (2, 7), (2, 1)])
def test_2b_2c_batch_size_limits_them(ask, copies, batch_size):
    """However many copies of the engine there are."""
    prompts = [[1, 2, 3, number] for number in range(9)] + [[4, 5, 6, number] for number in range(9)]
    engine, rows = ask(prompts, planned=True, copies=copies, batch_size=batch_size)
    assert engine.most_in_flight == batch_size
    assert len(rows) == len(prompts)


def test_2b_2c_so_many_wait_for_their_first_token(ask):
    engine, rows = ask(MANY, waiting_limit=5)
    assert engine.most_waiting == 5
    assert len(rows) == len(MANY)


def test_2b_2c_a_shared_prefix_is_computed_once(ask):
    """In the plan's order; the others start when the first of them has its first token, not when it has ended."""
    prompts = [[1, 2, 3, number] for number in (9, 7, 8)]
    engine, _ = ask(prompts, planned=True)
    assert engine.started == [(prompts[1], 0, 0), (prompts[2], 1, 1), (prompts[0], 1, 2)]


@pytest.mark.parametrize("waiting_limit", [None, 1])
def test_2b_2c_a_bad_record_costs_no_other(ask, waiting_limit):
    """Nor its place among those that may wait."""
    _, rows = ask([[12], [13], [14]], waiting_limit=waiting_limit)
    assert [rows[i].get("output") for i in range(3)] == ["a b", None, "a b"]
    assert rows[1]["error"] == FakeEngine.ERROR


@pytest.mark.parametrize("waiting_limit", [None, 5])
def test_2b_2c_a_request_names_adapter_and_parameters(ask, waiting_limit):
    engine, _ = ask([[12]], adapter="trained", waiting_limit=waiting_limit)
    assert engine.requests == [([12], "trained", None, 8)]


def test_2b_2c_each_copy_answers_its_own_records(ask):
    engine, rows = ask(MANY, copies=2)
    assert sorted(request[:3] for request in engine.requests) == [
        (ids, None, int(i >= len(MANY) / 2)) for i, ids in enumerate(MANY)
    ]
    assert len(rows) == engine.most_in_flight == len(MANY)


def test_2b_2c_answers_are_on_disk_while_others_run(ask):
    """So a killed job keeps them."""
    engine, _ = ask(MANY, batch_size=7)
    assert len(engine.in_flight_at_rows) > 1
    assert max(engine.in_flight_at_rows) > 0


def test_2b_2c_a_stopped_job_ends_without_the_rest(ask):
    _, rows = ask(MANY, batch_size=7, stop_after=7)
    assert 7 <= len(rows) < 30


def test_2d_the_reproducible_profile_keeps_the_radix_cache():
    def plugins(**flags) -> set[str]:
        return set(environment(Arguments(**flags))["RUNTIME_PLUGINS"].split(",")) - {
            "lean_sampler",
            "fused_norm",
        }

    assert plugins() == {"deterministic_radix"}
    assert plugins(jump_forward=True) == {"deterministic_radix", "jump_forward"}
    assert plugins(fast=True) == set()
    assert plugins(fast=True, jump_forward=True) == {"jump_forward"}


def test_2a_the_engine_answers_and_the_radix_cache_is_hit(uninterrupted_inference):
    summary = summary_of(uninterrupted_inference)
    assert (summary["records"], summary["failed_records"]) == (12, 0)
    assert summary["cached_prompt_tokens"] > 0
    assert summary["settings"]["engine_args"]["max_running_requests"] == 4
