"""Faults of a cluster, on a real Slurm of two nodes (slurm.sh): sglang/job.sbatch with the Runtime on the CPU.

    python -P -m pytest -s tests/cluster/inference.py      # as root, with Slurm installed; 25 minutes on two busy cores

Each prints a row: answers on disk before the fault and how many of them are lost, seconds from the fault until Slurm had
ended the job, and until it ran again. (Slurm holds a requeued job for two minutes; here it starts at once.)
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from batch_infer import store
from harness import ROOT, answers, partial_rows, stand_in, summary_of

SLURM = ROOT / "tests" / "cluster" / "slurm.sh"
TIMEOUT_S = 600


class Slurm:
    def __init__(self, state: Path, shared: Path) -> None:
        self.state, self.shared = state, shared

    def __call__(self, verb: str, *words: str) -> str:
        folders = f"{ROOT} {self.shared}"  # slurm.sh takes those below /tmp, which is each node's own
        command = ["bash", str(SLURM), str(self.state), verb, *words]
        found = subprocess.run(
            command, env=os.environ | {"SHARED": folders}, cwd=ROOT, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    def ctl(self, *words: object) -> str:
        return self("in", "ctl", *map(str, words))

    def submit(self, folder: Path, *options: str) -> str:
        """sglang/job.sbatch into `folder`, with the flags of the reference; returns the job's number."""
        folder.mkdir(exist_ok=True)
        slurm = ["sbatch", "--parsable", "--mem=2G", f"--output={folder}/%j.log", *options]
        return self.ctl(*slurm, "sglang/job.sbatch", *self.flags, "--output_file", folder / "outputs.jsonl")

    @property
    def flags(self) -> list[str]:
        flags = ["--rehearse", "--model_path", self.shared / "model", "--prompts", self.shared / "prompts.json"]
        return [*map(str, flags), *("--max_new_tokens", "48", "--max_running_requests", "2", "--dp_size", "1")]

    def jobs(self) -> dict[str, tuple[str, str]]:
        """(state, nodes) of the jobs that have not ended; of an array's, by JOB_TASK."""
        rows = [row.split("|") for row in self.ctl("squeue", "-h", "-r", "-o", "%i|%T|%N").splitlines()]
        return {job: (state, nodes) for job, state, nodes in rows}

    def wait(self, condition, what: str) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < TIMEOUT_S, f"{what}: {self.jobs()}"
            time.sleep(0.2)
        return time.monotonic() - began

    def finish(self) -> None:
        """Until no job is left; requeued ones need not wait."""

        def ended() -> bool:
            for job, (state, _) in self.jobs().items():
                if state == "PENDING":
                    self.start_now(job)
            return not self.jobs()

        self.wait(ended, "the jobs do not end")

    def start_now(self, job: str) -> None:
        time.sleep(3)  # its nodes refuse what is sent to them in the second in which it ended
        with contextlib.suppress(subprocess.CalledProcessError):  # it may have begun
            self.ctl("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="module")
def slurm():
    with (
        tempfile.TemporaryDirectory(prefix="slurm_", dir="/tmp") as state,
        tempfile.TemporaryDirectory(prefix="shared_", dir="/tmp") as shared,
    ):
        cluster = Slurm(Path(state), Path(shared))
        rows = 2 * json.loads((ROOT / "rehearsal" / "instructions.json").read_text())
        (cluster.shared / "prompts.json").write_text(json.dumps(rows))
        model = [sys.executable, ROOT / "rehearsal" / "tiny_model.py", "qwen2", cluster.shared / "model"]
        subprocess.run(model, check=True, capture_output=True)
        cluster("start", "2", "2")
        yield cluster
        cluster("stop")


@pytest.fixture(scope="module")
def whole(slurm) -> Path:
    """The folder of one run without Slurm."""
    folder = slurm.shared / "whole"
    command = [sys.executable, ROOT / "sglang" / "run_sglang.py", *slurm.flags]
    subprocess.run([*command, "--output_file", folder / "outputs.jsonl"], check=True, capture_output=True)
    return folder


def on_disk(folder: Path) -> dict[int, str]:
    return {row["index"]: row["output"] for row in partial_rows(folder) if "output" in row}


def processes(folder: Path) -> list[int]:
    """Ids of the programs that answer into `folder`, of any node, the oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"sglang/run_sglang.py" in words
            and words[0].endswith(b"python")
            and bytes(folder / "outputs.jsonl") in words
        ):
            found.append(int(path.parent.name))
    return sorted(found)


def crash(slurm, folder, job):
    slurm("crash", "n2")


def unplug(slurm, folder, job):
    slurm("unplug", "n2")


def kill_9(slurm, folder, job):
    os.kill(processes(folder)[-1], signal.SIGKILL)


def usr1(slurm, folder, job):
    slurm.ctl("scancel", "--signal=USR1", job)


def preempted(slurm, folder, job):
    slurm.ctl("scontrol", "requeue", job)


FAULTS = {
    "array, a node crashes": (["--array=1-2"], crash),
    "array, a cable is pulled": (["--array=1-2"], unplug),
    "step, a node crashes": (["-N2"], crash),
    "step, kill -9 of a process": (["-N2"], kill_9),
    "step, USR1 as before the time limit": (["-N2"], usr1),
    "array, preempted": (["--array=1-2"], preempted),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_no_answer_that_was_on_disk(slurm, whole, fault):
    options, happen = FAULTS[fault]
    folder = slurm.shared / fault.translate(str.maketrans(" ", "_", ",-"))
    slurm.submit(folder, "--exclusive", *options)
    slurm.wait(lambda: all(store.count_answers(folder, shard) >= 3 for shard in (1, 2)), "no answers")
    hit = next(name for name, (_, nodes) in slurm.jobs().items() if "n2" in nodes or "[" in nodes)
    before = on_disk(folder)
    happen(slurm, folder, hit)
    ended_s = slurm.wait(lambda: slurm.jobs()[hit][0] != "RUNNING", "the job does not end")
    if happen in (crash, unplug):
        slurm("boot" if happen is crash else "plug", "n2")
    began = time.monotonic()
    while slurm.jobs().get(hit, ("RUNNING",))[0] != "RUNNING":
        slurm.start_now(hit)
        assert time.monotonic() - began < TIMEOUT_S
    on_s = ended_s + time.monotonic() - began
    assert before.items() <= on_disk(folder).items() or (folder / "summary.json").exists()
    slurm.finish()
    outputs = [row["output"] for row in json.loads((folder / "outputs_all.json").read_text())]
    lost = sum(outputs[index] != output for index, output in before.items())
    print(f"\n| {fault} | {len(before)} | {lost} | {ended_s:.0f} | {on_s:.0f} |")
    assert lost == 0
    assert answers(folder) == answers(whole)
    assert summary_of(folder)["failed_records"] == 0


def test_three_shards_write_what_one_run_does(slurm, whole):
    folder = slurm.shared / "three"
    slurm.submit(folder, "--array=0-2")
    slurm.finish()
    assert answers(folder) == answers(whole)
    assert [shard["shard"] for shard in summary_of(folder)["shards"]] == ["1/3", "2/3", "3/3"]


def test_after_scancel_nothing_is_requeued_and_another_number_of_nodes_goes_on(slurm, whole):
    folder = slurm.shared / "cancelled"
    job = slurm.submit(folder, "-N2")
    slurm.wait(lambda: store.count_answers(folder) >= 5, "no answers")
    before, began = on_disk(folder), time.monotonic()
    slurm.ctl("scancel", job)
    slurm.wait(lambda: not slurm.jobs(), "scancel does not end it")
    print(f"\n| step, scancel | {len(before)} | 0 | {time.monotonic() - began:.0f} | by hand |")
    assert before.items() <= on_disk(folder).items()
    time.sleep(3)
    assert not slurm.jobs()
    slurm.submit(folder, "--array=1-3")
    slurm.finish()
    assert answers(folder) == answers(whole)


def test_a_second_job_in_the_folder_is_refused_and_costs_nothing(slurm, whole):
    folder = slurm.shared / "twice"
    slurm.submit(folder, "--array=1-2")
    slurm.wait(lambda: len(list(folder.glob(".lock.*"))) == 2, "no shard has begun")
    first = processes(folder)
    for pid in first:
        os.kill(pid, signal.SIGSTOP)  # it would be done before the second has begun
    second = slurm.submit(folder, "--array=1-2")
    slurm.wait(lambda: not any(job.startswith(f"{second}_") for job in slurm.jobs()), "it does not end")
    for pid in first:
        os.kill(pid, signal.SIGCONT)
    slurm.finish()
    text = "\n".join(log.read_text() for log in folder.glob("*.log"))
    assert text.count("another run is writing there; wait or name another") == 2, text
    assert answers(folder) == answers(whole)


# --- disks --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.fixture
def shard(run_inference, disk, slurm):
    """shard("1/2") -> (exit code, terminal), with an engine that takes 50 ms an answer."""

    def run(part: str):
        flags = [*slurm.flags[1:], "--output_file", disk / "outputs.jsonl", "--shard", part, "--batch_size", 1]
        return run_inference(*flags, patch=lambda: stand_in(answer_s=0.05))

    return run


def test_a_full_disk_costs_no_answer_that_was_on_it(shard, disk):
    first = shard("1/2")
    first.wait_for(lambda: store.count_answers(disk) >= 5)
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(512))
    code, text = first.wait()
    assert code == 2, text
    assert "is full; free some and run it again" in text
    before = on_disk(disk)
    assert len(before) >= 5
    (disk / "filler").unlink()
    assert shard("2/2").wait()[0] == 0
    code, text = shard("1/2").wait()
    assert code == 0, text
    assert f"{len(before)} already answered" in text
    assert summary_of(disk)["failed_records"] == 0


def test_a_read_only_folder_is_one_line(shard, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, text = shard("1/2").wait()
    assert code == 2, text
    assert f"--output_file {disk}: cannot be written (Read-only file system)" in text
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert shard("1/2").wait()[0] == 0
