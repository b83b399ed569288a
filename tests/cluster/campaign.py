"""Breaks runs of fine-tuning on two nodes, resumes them, and compares what they end with. Needs root and Slurm.

    python -P tests/cluster/campaign.py [--kills 100] [--only NAME ...] [--seed 0]

Where cables matter the nodes are Slurm's (slurm.sh); the many kills use processes of this machine, forked from one that
has imported the libraries. Nothing is lost: every checkpoint that was complete before the fault is there afterwards or
has been followed by a newer one, and each run ends with the bytes of the one that nothing disturbed.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "deepspeed", "common", "rehearsal")]
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
}

from harness import Process, children_of, fork  # noqa: E402
from workbench.processes import free_port  # noqa: E402

FLAGS = [
    "--rehearse",
    "--max_train_rows",
    "40",
    "--max_eval_rows",
    "6",
    "--max_seq_len",
    "192",
    "--tokens_per_micro_batch",
    "192",
    "--save_steps",
    "2",
    "--learning_rate",
    "0.02",
]
STEPS = 6
ENDS_WITHIN_S = 60.0
SLURMS_DEFAULTS = {"SLURMD_TIMEOUT": "300", "KILL_WAIT": "30"}  # so that it does not notice first


@dataclass
class Row:
    """A kind of fault: seconds from it to the end of the run, and from the next start to its first new step."""

    tried: int = 0
    lost: int = 0
    ended_s: list[float] = field(default_factory=list)
    went_on_s: list[float] = field(default_factory=list)

    def markdown(self, name: str) -> str:
        spans = (f"{min(s):.1f} to {max(s):.1f}" if s else "-" for s in (self.ended_s, self.went_on_s))
        return f"| {name} | {self.tried} | {self.lost} | {' | '.join(spans)} |"


class Run:
    """A run in a folder of its own that is started again and again."""

    def __init__(self, campaign: "Campaign", name: str, steps: int = STEPS) -> None:
        self.campaign, self.out, self.planned = campaign, campaign.folder / name, steps
        self.flags = [*FLAGS, "--max_steps", str(steps), "--model_name_or_path", str(campaign.model)]
        self.flags += ["--output_dir", str(self.out)]
        self.processes: list[Process] = []

    def start(self, nodes: int = 2, *more: str) -> None:
        """On processes of this machine."""
        port, address = str(free_port()), "127.0.0.1"
        self.processes = [
            fork(
                lambda: self.campaign.program.main([*self.flags, "--num_gpus", str(2 // nodes), *more]),
                self.campaign.folder / f"terminal-{time.monotonic_ns()}-{index}.txt",
                {"NNODES": str(nodes), "NODE_RANK": str(index), "MASTER_ADDR": address, "MASTER_PORT": port,
                 "SLURMD_NODENAME": f"n{index + 1}"},
            )
            for index in range(nodes)
        ]  # fmt: skip

    def wait(self) -> list[int]:
        return [process.wait(ENDS_WITHIN_S + 60)[0] for process in self.processes]

    def steps(self) -> int:
        path = self.out / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def complete(self) -> set[int]:
        return {int(path.parent.name.split("-")[1]) for path in self.out.glob("checkpoint-*/complete.json")}

    def texts(self) -> str:
        return "\n".join(process.text() for process in self.processes)

    def lost(self, before: set[int]) -> bool:
        return bool(before) and max(self.complete(), default=0) < max(before)

    def same_bytes(self) -> bool:
        return self.adapter() == self.campaign.expected(self.planned)

    def adapter(self) -> bytes:
        return (self.out / "adapter_model.safetensors").read_bytes()

    def finish(self, row: Row, nodes: int = 1) -> None:
        """The same command again, to its end."""
        had, started_s = max(self.complete(), default=0), time.monotonic()
        self.start(nodes)
        began = (
            "resuming from",
            "starting at step",
            "finished; nothing to do",
        )  # what a kill left is cut off by then
        self.processes[0].wait_for(
            lambda: (
                any(text in self.texts() for text in began)
                and (self.steps() > had or (self.out / "summary.json").exists())
            )
        )
        row.went_on_s.append(time.monotonic() - started_s)
        codes = self.wait()
        if any(codes) or not self.same_bytes():
            row.lost += 1
            print(f"codes {codes}, same bytes: {not any(codes) and self.same_bytes()}\n{self.texts()[-3000:]}")


class Campaign:
    def __init__(self, folder: Path, seed: int) -> None:
        import main as program
        import matplotlib.pyplot  # noqa: F401
        import networkx  # noqa: F401
        import torch._dynamo  # noqa: F401
        from tiny_model import build_llama

        import lora_sft.train  # noqa: F401

        self.program, self.folder, self.draw = program, folder, random.Random(seed)
        self.rows: dict[str, Row] = {}
        self.slurm_started = False
        self.model = folder / "tiny"
        assert fork(lambda: build_llama(self.model) and 0, folder / "tiny.txt").wait()[0] == 0
        self.expected(STEPS)
        two, started_s = Run(self, "two"), time.monotonic()
        two.start(2)
        assert two.wait() == [0, 0] and two.same_bytes(), two.texts()  # noqa: PT018
        self.run_s = time.monotonic() - started_s
        print(f"an undisturbed run takes {self.run_s:.1f} s", flush=True)

    @functools.cache  # noqa: B019
    def expected(self, steps: int) -> bytes:
        """The adapter of a run that nothing disturbed."""
        run = Run(self, f"undisturbed-{steps}", steps)
        run.start(1)
        assert run.wait() == [0], run.texts()
        return run.adapter()

    def row(self, name: str) -> Row:
        return self.rows.setdefault(name, Row())

    def strike(self, run: Run, name: str, fault: Callable[[], None], codes: tuple[int, ...]) -> Row:
        """`fault()` now; waits for the end of the run and counts."""
        row, before, struck_s = self.row(name), run.complete(), time.monotonic()
        fault()
        found = run.wait()
        row.tried += 1
        row.ended_s.append(time.monotonic() - struck_s)
        wrong = [code for code in found if code not in codes]
        if wrong or run.lost(before) or row.ended_s[-1] > ENDS_WITHIN_S or "Traceback" in run.texts():
            row.lost += 1
            print(f"{name}: codes {found} after {row.ended_s[-1]:.0f} s\n{run.texts()[-3000:]}")
        return row

    # --- processes of this machine ----------------------------------------------------------------------

    def kills(self, count: int) -> None:
        """kill -9 at random moments from the start to the end, up to five a run, of a node or of one rank."""
        number = done = 0
        while done < count:
            run, number, row = Run(self, f"kills-{number}"), number + 1, None
            for _ in range(self.draw.randint(2, 5)):
                run.start(self.draw.choice((1, 2)))
                time.sleep(self.draw.uniform(0.0, 0.9) * self.run_s)
                victim = self.draw.choice(run.processes)
                children = children_of(victim.pid)
                if any(process.ended() for process in run.processes):
                    run.wait()
                    break
                if children and self.draw.random() < 0.5:
                    name, pid = "kill -9 of a rank, or of what checks", children[-1]
                else:
                    name, pid = "kill -9 of all of a node's processes", -victim.pid
                row = self.strike(
                    run, name, lambda pid=pid: os.kill(pid, signal.SIGKILL), (-signal.SIGKILL, 0, 1, 75)
                )
                done += 1
            if row:
                run.finish(row, self.draw.choice((1, 2)))
                print(f"{done} kills", flush=True)
            shutil.rmtree(run.out, ignore_errors=True)

    def meeting(self, tries: int) -> None:
        """kill -9 of a node while the ranks meet, where gloo waits for minutes for one that is gone."""
        for number in range(tries):
            run = Run(self, f"meeting-{number}")
            run.start(2)
            run.processes[0].wait_for(lambda run=run: "starting at step" in run.texts())
            time.sleep(0.02 * number)
            victim = -run.processes[1].pid
            name = "kill -9 of a node while the ranks meet or load"
            self.strike(run, name, lambda pid=victim: os.kill(pid, signal.SIGKILL), (-signal.SIGKILL, 75))

    def disk_full(self) -> None:
        run = Run(self, "disk_full")
        run.out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", run.out], check=True)
        try:
            for filled in (5.0, 3.0, 1.0):  # MiB that are left: preflight, the first checkpoints
                run.start(2)
                step = {5.0: 0, 3.0: 1, 1.0: 3}[filled]
                run.processes[0].wait_for(lambda step=step: run.steps() >= step)

                def fill(left=filled):
                    free = shutil.disk_usage(run.out).free - int(left * 2**18)
                    (run.out / "filler.tmp").write_bytes(b"." * max(0, free))

                self.strike(run, "disk full", fill, (2, 75))
                (run.out / "filler.tmp").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=64m", run.out], check=True)
            run.finish(self.row("disk full"))
        finally:
            subprocess.run(["umount", "-l", run.out], check=True)

    def read_only(self) -> None:
        run = Run(self, "read_only")
        run.start(2)
        run.processes[0].wait_for(lambda: run.steps() >= 3)
        for process in run.processes:
            os.killpg(process.pid, signal.SIGKILL)
        run.wait()
        subprocess.run(["mount", "--bind", run.out, run.out], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", run.out], check=True)
        try:
            self.strike(run, "read-only folder", lambda: run.start(2), (2,))
        finally:
            subprocess.run(["umount", run.out], check=True)
        run.finish(self.row("read-only folder"), 2)

    def damaged(self) -> None:
        """A file of the last complete checkpoint is cut: the run says so and goes on from the one before."""
        for pattern in ("global_step*/*rank_1*optim_states.pt", "trainer_state.json", "scheduler.pt"):
            run = Run(self, f"damaged-{pattern.split('.')[0][-9:]}")
            run.start(2)
            run.processes[0].wait_for(lambda run=run: max(run.complete(), default=0) >= 4)
            for process in run.processes:
                os.killpg(process.pid, signal.SIGKILL)
            run.wait()
            last = run.out / f"checkpoint-{max(run.complete())}"
            path = next(last.glob(pattern))
            os.truncate(path, path.stat().st_size // 2)
            run.finish(self.row("a damaged checkpoint"), 2)
            self.row("a damaged checkpoint").tried += 1
            if f"{last} is damaged" not in run.texts():
                self.row("a damaged checkpoint").lost += 1
                print(run.texts()[-3000:])

    def two_jobs(self) -> None:
        run = Run(self, "two_jobs")
        run.start(2)
        first = run.processes
        first[0].wait_for(lambda: run.steps() >= 1)
        row = self.strike(run, "two jobs in one folder", lambda: run.start(2), (2,))
        run.processes = first
        if run.wait() != [0, 0] or not run.same_bytes():
            row.lost += 1

    # --- Slurm's nodes ----------------------------------------------------------------------------------

    def slurm(self, *words: object, **options) -> subprocess.CompletedProcess:
        command = [str(HERE / "slurm.sh"), str(self.folder / "slurm"), *map(str, words)]
        return subprocess.run(command, text=True, check=True, **options)

    def start_slurm(self) -> None:
        if not self.slurm_started:
            self.slurm(
                "start",
                env=os.environ | {"SHARED": f"{ROOT} {self.folder}"} | SLURMS_DEFAULTS,
                stdout=subprocess.DEVNULL,
            )
            self.slurm_started = True

    def ctl(self, *words: object) -> str:
        """What a command on the login node prints; "?" where Slurm has no time for it."""
        command = [str(HERE / "slurm.sh"), str(self.folder / "slurm"), "in", "ctl", *map(str, words)]
        run = subprocess.run(command, text=True, capture_output=True, cwd=ROOT, check=False)
        return "?" if run.returncode else run.stdout.strip()

    def job(self, name: str, fault: list[str], steps: int = STEPS) -> None:
        """job.sbatch on two nodes. It goes on by itself, but after scancel: then the same command does."""
        self.start_slurm()
        run, row = Run(self, f"job-{name.split()[-1]}", steps), self.row(f"job.sbatch: {name}")
        run.out.mkdir()
        log = run.out.with_suffix(".txt")
        options = ["--parsable", "-N2", "--gres=gpu:2", "--mem=4G", f"--output={log}", f"--chdir={ROOT}"]
        job = self.ctl("sbatch", *options, "deepspeed/job.sbatch", "--num_gpus", "1", *run.flags)

        def state() -> str:
            return self.ctl("squeue", "--noheader", "--job", job, "--format=%T")

        def begun() -> int:
            return sum(log.read_text().count(text) for text in ("resuming from", "starting at step"))

        def until(condition: Callable[[], bool]) -> None:
            for _ in range(600):
                if condition():
                    return
                time.sleep(0.3)
            raise AssertionError(f"{name}: {state()}\n{log.read_text()[-3000:]}")

        until(lambda: run.steps() >= 2)
        before, struck_s = run.complete(), time.monotonic()
        self.slurm(*(word.replace("JOB", job) for word in fault))
        ended = ("PENDING", "", *(["COMPLETING"] if fault[0] == "crash" else []))  # as long as its node is down
        until(lambda: state() in ended)
        row.tried += 1
        row.ended_s.append(time.monotonic() - struck_s)
        if fault[0] == "crash":
            self.slurm("boot", fault[1])
            until(lambda: state() in ("PENDING", ""))
        lost, had, started_s = run.lost(before), max(run.complete(), default=0), time.monotonic()
        starts = begun()
        if not state():
            run.finish(row, 2)
        else:  # Slurm holds a requeued job for two minutes; at once, nodes refuse what is sent to them
            time.sleep(3)
            release = ["scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=10"]
            until(lambda: [self.ctl(*release), state()][1] != "PENDING")
            until(lambda: not state() or (begun() > starts and run.steps() > had))
            row.went_on_s.append(time.monotonic() - started_s)
            until(lambda: not state())
        if lost or not run.same_bytes():
            row.lost += 1
            print(log.read_text()[-3000:])

    def on_slurm(self, name: str, fault: list[str], repair: list[list[str]], tries: int) -> None:
        """`fault` while srun runs on two nodes."""
        self.start_slurm()
        for number in range(tries):
            run, row = Run(self, f"{name.split()[-1]}-{number}"), self.row(name)
            run.out.mkdir()
            command = f"{HERE}/slurm.sh {self.folder}/slurm in ctl srun -N2 --gres=gpu:2 --wait=10 bash {ROOT}/deepspeed/"
            command = [*f"{command}run_llama2_7b_lora.sh --num_gpus 1".split(), *run.flags]
            with (run.out.parent / f"{run.out.name}.txt").open("w") as log:
                env = os.environ | {"VENV": str(Path(sys.executable).parent.parent)}
                srun = subprocess.Popen(command, stdout=log, stderr=log, env=env)
                while run.steps() < 1 + 2 * number and srun.poll() is None:
                    time.sleep(0.05)
                before, struck_s = run.complete(), time.monotonic()
                self.slurm(*fault)
                while "error: " not in Path(log.name).read_text() and srun.poll() is None:
                    time.sleep(0.05)
                row.ended_s.append(time.monotonic() - struck_s)
                try:
                    srun.wait(300)
                except subprocess.TimeoutExpired:
                    srun.kill()
                    print(f"srun does not return:\n{Path(log.name).read_text()[-6000:]}")
                    row.lost += 1
            row.tried += 1
            self.row(f"{name}: until srun returned").ended_s.append(time.monotonic() - struck_s)
            text = Path(log.name).read_text()
            said = "no answer from n2 any more" in text or "the connections between the nodes failed" in text
            if not said or run.lost(before) or row.ended_s[-1] > ENDS_WITHIN_S:
                row.lost += 1
                print(text[-3000:])
            for words in repair:
                self.slurm(*words)
            run.finish(row)

    def main(self, kills: int, only: list[str]) -> int:
        todo = {
            "kills": lambda: self.kills(kills),
            "meeting": lambda: self.meeting(10),
            "disk_full": self.disk_full,
            "read_only": self.read_only,
            "damaged": self.damaged,
            "two_jobs": self.two_jobs,
            "crash": lambda: self.on_slurm("a node crashes", ["crash", "n2"], [["boot", "n2"]], 2),
            "unplug": lambda: self.on_slurm("a node's cable is pulled", ["unplug", "n2"], [["plug", "n2"]], 2),
        }
        signal_job = ["in", "ctl", "scancel", "--batch", "JOB"]
        jobs = {
            "USR1": [*signal_job, "--signal=USR1"],
            "TERM": [*signal_job, "--signal=TERM"],
            "scancel": ["in", "ctl", "scancel", "JOB"],
            "preempted": ["in", "ctl", "scontrol", "requeue", "JOB"],
            "a node crashes": ["crash", "n2"],
        }
        limit = ["in", "ctl", "scontrol", "update", "JobId=JOB", "TimeLimit=2"]  # USR1 comes 120 s before
        todo["jobs"] = lambda: [self.job(*named) for named in jobs.items()]
        todo["limit"] = lambda: self.job("the time limit", limit, 150)
        try:
            for name in only or todo:
                todo[name]()
                print(*(row.markdown(name) for name, row in self.rows.items()), sep="\n", flush=True)
        finally:
            if self.slurm_started:
                self.slurm("stop")
            print("| fault | times | lost | s until the run ended | s from the next start until it went on |")
            print("|---|---|---|---|---|")
            print("\n".join(row.markdown(name) for name, row in self.rows.items()))
            print(json.dumps({name: vars(row) for name, row in self.rows.items()}))
        return sum(row.lost for row in self.rows.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the table of what was done
    with tempfile.TemporaryDirectory(prefix="campaign_", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        sys.exit(1 if Campaign(Path(scratch), given.seed).main(given.kills, given.only) else 0)
