"""Every record in flight: the engine, one request, all requests, and rows that are on disk as they end.

answer_all -> ask_all -> order.follow, a task a record -> row_of -> ask -> engine.async_generate
           -> a queue of finished rows -> PartialFile.append
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable

from workbench import UserError

from . import grammars, order
from .order import Part
from .prompts import Record
from .store import PartialFile, answer_row, failure_row

WAITING_FOR_LPM = 128  # above this many waiting requests lpm silently becomes fcfs (schedule_policy.py)

Told = (
    Callable[[], None] | None
)  # to be called once a prompt's KV is in the radix tree; None: nobody waits for it


def start_engine(values: dict[str, object]):
    """sglang.Engine with these arguments, by name; it loads the model. It logs errors only."""
    from sglang.srt.entrypoints.engine import Engine

    # Problem 2a: create the engine and return it.
    return Engine(**values)
    # End of problem 2a


async def ask(
    engine, record: Record, copy: int | None, cached: Told, waiting: asyncio.Semaphore | None
) -> dict:
    """Asks the engine for one record and returns the last result that it gives.

    engine.async_generate takes input_ids (a list of ints), sampling_params, lora_path (the record's adapter),
    routed_dp_rank (the `copy` of the engine; None: any) and stream. Awaited it gives the result; with stream=True an
    async iterator of results, each with all text so far. If `waiting` is not None a record holds it until its
    first token; then `cached`, if it is not None, is to be called: others wait for this prompt's KV. Without both
    nobody needs to know of the first token, and a stream would only cost time."""
    # Problem 2b: ask, and return the last result.
    request = {"input_ids": record.input_ids, "lora_path": record.lora, "routed_dp_rank": copy}
    if waiting is None and cached is None:
        return await engine.async_generate(**request, sampling_params=record.sampling_params)
    # A stream only tells when the first token is there: it sends the first and the last.
    params = record.sampling_params | {"stream_interval": 2**30}
    async with waiting or contextlib.nullcontext():
        stream = await engine.async_generate(**request, sampling_params=params, stream=True)
        result = await anext(stream)
    if cached:
        cached()
    async for result in stream:  # noqa: B007 (each chunk holds all text so far)
        pass
    return result
    # End of problem 2b


async def ask_all(
    parts: list[Part],
    answer: Callable[[Part, int, Told], Awaitable[None]],
    in_flight: asyncio.Semaphore,
) -> None:
    """Puts the records of all `parts` in flight at once, as far as `in_flight` lets them, and returns when all are
    answered. No part waits for another. `answer(part, i, cached)` answers part.records[i]; order.follow(part.plan,
    function, in_flight) calls function(i, cached) for each index i of part.records, as early as the plan allows, and
    returns when these are answered."""
    # Problem 2c: follow the plans of all parts together, and wait for them.
    async with asyncio.TaskGroup() as followed:
        for copy_part in parts:
            answer_one = functools.partial(answer, copy_part)
            followed.create_task(order.follow(copy_part.plan, answer_one, in_flight))
    # End of problem 2c


async def row_of(engine, record: Record, copy: int | None, cached: Told, waiting) -> dict:
    """The record's row for the partial file: its answer, or why there is none."""
    try:
        result = await ask(engine, record, copy, cached, waiting)
    except UserError:
        raise
    except Exception as error:  # whatever it is, it is this record's
        first_line = (str(error).strip() or repr(error)).splitlines()[0][:300]
        return failure_row(record, f"{type(error).__name__}: {first_line}")
    reason = result["meta_info"]["finish_reason"]
    if reason["type"] == "abort":
        why = f"aborted by the engine: {reason.get('message')}"
        if record.regex or record.json_schema:  # SGLang logs its reason only
            why += "; most likely its grammar refused the token that was drawn: try another grammar_backend"
        return failure_row(record, why)
    if error := grammars.failed(record.sampling_params, result):
        return failure_row(record, error)
    return answer_row(record, result)


async def answer_all(
    engine,
    parts: list[Part],
    partial: PartialFile,
    stopped: asyncio.Event,
    on_rows: Callable[[list[dict]], None],
    batch_size: int = 0,
    schedule_policy: str = "fcfs",
) -> None:
    """Answers all parts, at most `batch_size` records at once (0: all): none waits for another's batch, unless the
    plan lets it wait for a prefix, and an error is one record's. Finished rows are on disk before `on_rows` sees
    them. Returns early once `stopped` is set; raises OSError if rows cannot be written."""
    total = sum(len(part.records) for part in parts)
    waiting = asyncio.Semaphore(WAITING_FOR_LPM) if schedule_policy == "lpm" else None
    finished: asyncio.Queue[dict] = asyncio.Queue()

    async def answer(part: Part, i: int, cached: Told) -> None:
        finished.put_nowait(await row_of(engine, part.records[i], part.copy, cached, waiting))

    async def write() -> None:
        left = total
        while left:
            rows = [await finished.get()]
            while not finished.empty():
                rows.append(finished.get_nowait())
            # Rows on their way to the disk count as kept, also when a signal ends this.
            writing = asyncio.create_task(asyncio.to_thread(partial.append, rows))
            try:
                await asyncio.shield(writing)
            finally:
                await writing
            left -= len(rows)
            on_rows(rows)

    tasks = [
        asyncio.create_task(ask_all(parts, answer, asyncio.Semaphore(batch_size or total))),
        asyncio.create_task(write()),
    ]
    work, stop = asyncio.gather(*tasks), asyncio.create_task(stopped.wait())
    # Three ends: every row is written; a bug or a full disk; a signal (the engine's shutdown ends what is in flight).
    try:
        await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work  # raises what is a bug, or a full disk
    except BaseExceptionGroup as group:  # of the tasks below ask_all
        while isinstance(group, BaseExceptionGroup):
            group = group.exceptions[0]
        raise group from None
    finally:
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.gather(*tasks, work, stop, return_exceptions=True)
