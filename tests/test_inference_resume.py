"""Nothing is lost: kills, a full disk, bad records and failures, on the real Runtime on the CPU."""

import asyncio
import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from harness import answers, children_of, partial_rows, summary_of


def kill_after(rows: int, number: int, pids) -> callable:
    """A patch for the job's process: sends a signal to pids() once that many answers are on disk."""

    def patch() -> None:
        from batch_infer.store import PartialFile

        append = PartialFile.append

        def counting(self, new):
            append(self, new)
            if new and len(self.rows) >= rows:
                for pid in pids():
                    os.kill(pid, number)
                if number == signal.SIGKILL:
                    time.sleep(30)  # death comes meanwhile

        PartialFile.append = counting

    return patch


@pytest.mark.long
def test_a_run_that_dies_again_and_again_ends_with_the_uninterrupted_files(
    run_inference, flags, uninterrupted_inference, tmp_path
):
    """kill -9 of the job, of an engine's process and of the parent, and SIGTERM: each start goes on from there."""
    out = ["--batch_size", 1, "--output_file", tmp_path / "outputs.jsonl"]
    kept = 0
    for rows, number, pids, code in (
        (2, signal.SIGKILL, lambda: [os.getpid()], 75),
        (4, signal.SIGKILL, lambda: children_of(os.getpid())[-1:], 75),
        (6, signal.SIGTERM, lambda: [os.getppid()], 75),
        (8, signal.SIGKILL, lambda: [os.getppid()], -signal.SIGKILL),
    ):
        found, text = run_inference(*flags, *out, patch=kill_after(rows, number, pids)).wait()
        assert found == code, text
        assert not kept or f"{kept} already answered" in text
        kept = len(partial_rows(tmp_path))
        assert kept >= rows
        assert not (tmp_path / "summary.json").exists()
    code, text = run_inference(*flags, *out).wait()
    assert code == 0, text
    assert f"{kept} already answered" in text
    assert answers(tmp_path) == answers(uninterrupted_inference)
    assert summary_of(tmp_path)["output_tokens"] == summary_of(uninterrupted_inference)["output_tokens"]


def test_full_disk_keeps_what_is_written(run_inference, flags, uninterrupted_inference, tmp_path):
    def patch() -> None:
        from batch_infer.store import PartialFile

        write = PartialFile._write

        def failing(self, rows):
            if len(self.rows) >= 3:
                self._out.write(b'{"index": 3, "cut')
                self._out.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, rows)

        PartialFile._write = failing

    out = ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, *out, patch=patch).wait()
    assert code == 2, text
    assert "is full; free some and run it again" in text
    assert "Traceback" not in text
    code, text = run_inference(*flags, *out).wait()
    assert code == 0, text
    assert answers(tmp_path) == answers(uninterrupted_inference)


@pytest.fixture(scope="module")
def isolated(run_inference, tmp_path_factory) -> tuple[Path, list, str]:
    """A run with bad records among good ones: its folder, its flags and its terminal."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    rows = [
        "Say something.",
        {"instruction": ""},
        {"instruction": "word " * 3000},
        {"instruction": "A number please.", "regex": "[0-9]{3}-[a-f]{2}"},
        {"instruction": "A broken regex.", "regex": "(["},
        {"instruction": "Some JSON.", "json_schema": schema},
        {"instruction": "A broken schema.", "json_schema": {"type": "nonsense"}},
        {"instruction": "An adapter.", "lora": "/no/such/adapter"},
        {"no instruction": 1},
        {"prompt": "The last one."},
    ]
    folder = tmp_path_factory.mktemp("isolated")
    (folder / "rows.json").write_text(json.dumps(rows))
    flags = [
        "--prompts",
        folder / "rows.json",
        "--max_new_tokens",
        24,
        "--output_file",
        folder / "out" / "outputs.jsonl",
    ]
    code, text = run_inference(*flags).wait()
    assert code == 3, text
    return folder / "out", flags, text


def test_bad_records_cost_no_other_record(isolated):
    out, _, text = isolated
    summary = summary_of(out)
    reasons = {failure["index"]: failure["reason"] for failure in summary["failures"]}
    assert set(reasons) == {1, 2, 4, 6, 7, 8}
    assert reasons[1] == "the instruction is empty"
    assert "prompt tokens; the context holds 1024" in reasons[2]
    assert reasons[4].startswith("invalid regex")
    assert reasons[6].startswith("invalid json_schema")
    assert "no adapter_config.json" in reasons[7]
    assert "no text under 'instruction'" in reasons[8]
    outputs = [row["output"] for row in json.loads((out / "outputs_all.json").read_text())]
    assert all(outputs[index] for index in (0, 9))
    assert all(not outputs[index] for index in reasons)
    assert "6 cannot be answered" in text


def test_structured_records_obey_their_grammar(isolated):
    outputs = [row["output"] for row in json.loads((isolated[0] / "outputs_all.json").read_text())]
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", outputs[3])
    assert isinstance(json.loads(outputs[5])["ok"], bool)


def test_failures_are_tried_again_and_counted(isolated, run_inference):
    out, flags, _ = isolated
    before = answers(out)
    code, text = run_inference(*flags).wait()
    assert code == 3
    assert "0 to answer" in text
    assert answers(out) == before


def test_an_answer_that_failed_once_succeeds_later(run_inference, flags, uninterrupted_inference, tmp_path):
    def patch() -> None:
        from sglang.srt.entrypoints.engine import Engine

        stock = Engine.async_generate

        async def sometimes(self, **request):
            if request["sampling_params"]["sampling_seed"] % 3 == 0:
                raise RuntimeError("injected")
            return await stock(self, **request)

        Engine.async_generate = sometimes

    out = ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, *out, patch=patch).wait()
    assert code == 3, text
    failed = summary_of(tmp_path)["failed_records"]
    assert 0 < failed < 12
    code, text = run_inference(*flags, *out).wait()
    assert code == 0, text
    assert f"{12 - failed} already answered" in text
    assert answers(tmp_path) == answers(uninterrupted_inference)


def test_a_run_ends_when_its_bad_record_has_left_the_prompts(run_inference, tmp_path):
    """Then no partial file stays, and the same command finds nothing to do. (No engine runs here.)"""

    def answer_at_once() -> None:
        import run_sglang

        def answer(run, partial, waiting):
            usage = {"prompt_tokens": 1, "cached_tokens": 0, "output_tokens": 1}
            row = {"output": "x", "output_ids": [1], "finish_reason": "stop"} | usage
            partial.append([row | {"index": record.index, "key": record.key} for record in run.todo])
            return run_sglang.report.ThisStart(1.0, 0.0, 1.0)

        run_sglang.answer = answer

    prompts, out = tmp_path / "rows.json", tmp_path / "out"
    flags = ["--prompts", prompts, "--output_file", out / "outputs.jsonl"]
    for rows, expected, left in ((["One.", ""], 3, True), (["One."], 0, False), (["One."], 0, False)):
        prompts.write_text(json.dumps(rows))
        code, text = run_inference(*flags, patch=answer_at_once).wait()
        assert (code, bool(list(out.glob("outputs.partial*")))) == (expected, left), text
        assert summary_of(out)["records"] == len(rows)
    assert "nothing to do" in text


def test_a_row_on_its_way_to_the_disk_when_a_signal_comes_is_kept(monkeypatch):
    """Otherwise the last line would count one less than the file holds."""
    from batch_infer import generate
    from batch_infer.order import Part, Plan
    from batch_infer.prompts import Record

    async def answered(*_) -> dict:
        return {"index": 0}

    class SlowDisk:
        kept = 0

        def append(self, rows: list[dict]) -> None:
            self.loop.call_soon_threadsafe(self.stopped.set)
            time.sleep(0.3)
            self.kept += len(rows)

    async def stop_while_writing() -> int:
        disk = SlowDisk()
        disk.loop, disk.stopped = asyncio.get_running_loop(), asyncio.Event()
        parts = [Part([Record(0, "", input_ids=[1]), Record(1, "", input_ids=[2])], Plan([0, 1]), None)]
        await generate.answer_all(None, parts, disk, disk.stopped, lambda rows: None, batch_size=1)
        return disk.kept

    monkeypatch.setattr(generate, "row_of", answered)
    assert asyncio.run(stop_while_writing()) == 1
