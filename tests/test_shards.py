"""Several nodes answer one list of prompts: what each takes, who writes the files, and what a lost one costs."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
from collections import Counter

import pytest

from batch_infer import order, preflight, store
from batch_infer.arguments import Arguments, parse
from batch_infer.prompts import Record
from harness import answers, fork, killed_at, partial_rows, stand_in, summary_of
from workbench import UserError, files

# --- which part ---------------------------------------------------------------------------------------


def few_shot(groups: int, questions: int) -> list[Record]:
    """Prompts that come in turns of the prefix of each group."""
    return [
        Record(i, "", input_ids=[i % groups] * 100 + [500 + i] * 10, sampling_params={"max_new_tokens": 4})
        for i in range(groups * questions)
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 60])
def test_shards_take_every_record_once_and_stay_contiguous(shards):
    bad = Record(48, "", error="empty")
    records = [*few_shot(8, 6), bad]
    parts = [order.shard(Arguments(shard=f"{k}/{shards}"), records) for k in range(1, shards + 1)]
    assert sorted(record.index for part in parts for record in part) == list(range(49))
    assert bad in parts[0]
    if 1 < shards <= 8:
        assert max(map(len, parts)) - min(map(len, parts)) <= 6
        # A prefix is computed again only where a part begins within its group.
        assert sum(len({r.input_ids[0] for r in part if r.input_ids}) for part in parts) <= 8 + shards - 1


def test_without_an_order_parts_follow_the_file():
    records = [Record(i, "", input_ids=[i] * 20, sampling_params={"max_new_tokens": 80}) for i in range(30)]
    parts = [order.shard(Arguments(shard=f"{k}/3"), records) for k in (1, 2, 3)]
    assert [[record.index for record in part] for part in parts] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 30)),
    ]


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, [], "1/1"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, [], "3/4"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, [], "1/1"),  # the batch script itself, no task of a step
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ["--shard", "5/8"], "5/8"),
    ],
)
def test_a_task_of_srun_knows_its_part(environment, flags, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parse(flags).shard == expected


def test_the_nodes_of_one_engine_are_no_shards(monkeypatch):
    """SGLang's own nnodes goes through; the rank is the task's, and node 0 alone claims the folder."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    own = {"nnodes": 2, "dist_init_addr": "n1:20000"}
    args = parse(["--engine_args", json.dumps(own), "--tp_size", "16"])
    assert (args.shard, args.nodes, args.writer) == ("1/1", (1, 2), ".node1")
    assert args.own_engine_args == own | {"node_rank": 1}
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert args.identity() == parse(["--engine_args", json.dumps(own), "--tp_size", "16"]).identity()


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "a/b", "1/0", "1.5/2"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=r"must be K/N with K from 1 to N"):
        parse(["--shard", text])


# --- one folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [(".1", ".2", False), (".1", ".1", True), (".1", "", True), ("", ".1", True)],
)
def test_shards_share_a_folder_and_nobody_else_does(first, second, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CLAIM_TIMEOUT_S", 0.1)

    def again() -> int:
        with files.claim(tmp_path, "--output_file", second):
            return 0

    with files.claim(tmp_path, "--output_file", first):
        code, text = fork(again, tmp_path / "terminal.txt").wait()
    assert (code, "another run is writing there" in text) == ((1, True) if refused else (0, False)), text


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with files.claim(tmp_path, "--output_file"):
        pass
    assert "no locks there (Function not implemented); start one run at a time" in capsys.readouterr().out


def test_two_starts_never_write_in_one_file(tmp_path):
    """Also where no lock keeps them apart: both saw the same files when they began."""
    first, second = (store.PartialFile(tmp_path, {"seed": 1}, {}, shard=2) for _ in range(2))
    for i in range(6):
        (first if i % 2 else second).append([{"index": i, "key": "", "output": str(i)}])
    assert [path.name for path in store.partial_files(tmp_path)] == [
        "outputs.partial.2.1.jsonl",
        "outputs.partial.2.2.jsonl",
    ]
    third = store.PartialFile(tmp_path, {"seed": 1}, {})
    assert {i: row["output"] for i, row in third.rows.items()} == {i: str(i) for i in range(6)}
    assert (store.count_answers(tmp_path, 2), store.count_answers(tmp_path, 1)) == (6, 0)


def test_shards_build_the_rehearsals_model_at_the_same_time(transformers, tmp_path):
    builders = [
        fork(lambda: preflight.build_tiny_model(tmp_path / "tiny_qwen2") or 0, tmp_path / f"{k}.txt")
        for k in range(3)
    ]
    for builder in builders:
        code, text = builder.wait()
        assert code == 0, text
    assert (tmp_path / "tiny_qwen2" / "model.safetensors").exists()
    assert not list(tmp_path.glob(".tiny_qwen2*"))


# --- the files ----------------------------------------------------------------------------------------


def test_two_shards_write_what_one_run_does(run_inference, flags, uninterrupted_inference, tmp_path):
    """The real Runtime."""
    out = ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, *out, "--shard", "2/2").wait()
    assert code == 0, text
    assert "shard 2/2: done; 6 records of others are left" in text
    assert not (tmp_path / "summary.json").exists()
    code, text = run_inference(*flags, *out, "--shard", "1/2").wait()
    assert code == 0, text
    assert answers(tmp_path) == answers(uninterrupted_inference)
    assert not list(tmp_path.glob("outputs.partial*"))
    found, alone = summary_of(tmp_path), summary_of(uninterrupted_inference)
    for name in ("records", "failures", "prompt_tokens", "output_tokens", "optimum_hit_rate"):
        assert found[name] == alone[name]
    assert [shard["shard"] for shard in found["shards"]] == ["1/2", "2/2"]
    assert found["answered_in_this_start"] == 12
    assert found["generate_s"] == max(shard["generate_s"] for shard in found["shards"])
    assert (tmp_path / "lengths.png").read_bytes() == (uninterrupted_inference / "lengths.png").read_bytes()


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """A file of 40 prompts and a bad one."""
    path = tmp_path_factory.mktemp("prompts") / "forty.json"
    path.write_text(json.dumps([f"Say {i}." for i in range(40)] + [""]))
    return path


@pytest.fixture(scope="module")
def shard(run_inference, forty):
    """shard(folder, "1/3", patch=stand_in, more=[]) -> Process, with an engine that answers at once."""

    def run(folder, part, patch=stand_in, more=()):
        out = ["--output_file", folder / "outputs.jsonl", "--shard", part]
        return run_inference("--prompts", forty, "--batch_size", 1, *out, *more, patch=patch)

    return run


@pytest.fixture(scope="module")
def whole(shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, text = shard(folder, "1/1").wait()
    assert code == 3, text
    return folder


def slow() -> None:
    stand_in(answer_s=0.2)


def test_shards_that_run_together_end_with_the_same_files(shard, whole, tmp_path):
    running = [shard(tmp_path, f"{k}/4", slow) for k in range(1, 5)]
    codes = [process.wait() for process in running]
    assert Counter(code for code, _ in codes) == {0: 3, 3: 1}, codes  # the bad record is of the first
    assert answers(tmp_path) == answers(whole)
    assert summary_of(tmp_path)["failures"] == summary_of(whole)["failures"]


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_killed_shards_and_another_number_of_them_lose_nothing(shard, whole, tmp_path, rounds):
    """kill -9 while answers or files are written (an engine that answers at once); whoever is left finishes."""
    rng = random.Random(rounds)
    for number in range(rounds):
        folder = tmp_path / str(number)
        for shards in (3, 2):
            points = [
                (rng.choice(("partial", "partial", "outputs", "summary")), rng.randint(1, 8))
                for _ in range(shards)
            ]
            running = [
                shard(folder, f"{k}/{shards}", killed_at(name, at, rng.random() < 0.5))
                for k, (name, at) in enumerate(points, 1)
            ]
            before = {row["index"]: row["output"] for row in partial_rows(folder) if "output" in row}
            assert all(process.wait()[0] in (0, 1, 3, 75) for process in running)
            after = {row["index"]: row["output"] for row in partial_rows(folder) if "output" in row}
            assert before.items() <= after.items()
        code, text = shard(folder, "1/1").wait()
        assert code == 3, text
        assert answers(folder) == answers(whole)


def test_overwrite_spares_what_the_same_slurm_job_wrote(shard, whole, tmp_path, monkeypatch):
    """Its other shards, and its starts before it was requeued; what another job wrote goes."""
    shutil.copytree(whole, tmp_path / "out")
    for job, kept in (("7", 0), ("7", 21), ("8", 0)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        code, text = shard(tmp_path / "out", "1/2", more=["--overwrite"]).wait()
        assert code == 3, text
        assert (f"{kept} already answered" in text) == bool(kept), text
        assert len({row["index"] for row in partial_rows(tmp_path / "out") if "output" in row}) == 21
        assert not (tmp_path / "out" / "summary.json").exists()
    code, text = shard(tmp_path / "out", "2/2", more=["--overwrite"]).wait()
    assert code == 0, text
    assert answers(tmp_path / "out") == answers(whole)
    monkeypatch.delenv("SLURM_JOB_ID")
    code, text = shard(tmp_path / "out", "1/2", more=["--overwrite"]).wait()
    assert code == 2
    assert "--overwrite: one shard outside a Slurm job" in text


def test_a_stopped_shard_goes_on(shard, whole, tmp_path):
    process = shard(tmp_path, "1/2", slow)
    process.wait_for(lambda: len(partial_rows(tmp_path)) > 3)
    os.kill(process.pid, signal.SIGUSR1)
    code, text = process.wait()
    assert code == 75, text
    kept = store.count_answers(tmp_path, 1)
    assert f"stopped: {kept} of 21 answers are kept" in text
    assert shard(tmp_path, "2/2").wait()[0] == 0
    code, text = shard(tmp_path, "1/2").wait()
    assert code == 3, text
    assert f"{kept} already answered" in text
    assert answers(tmp_path) == answers(whole)
