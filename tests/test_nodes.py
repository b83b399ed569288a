"""Several nodes: what Slurm or torch's names say, what each node brings, and how the end of one reaches the others.

The nodes are processes of this machine; tests/cluster/ has real ones, with cables."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness import children_of
from lora_sft import cluster, machine
from lora_sft.arguments import Arguments
from lora_sft.cluster import Nodes
from workbench import UserError
from workbench.processes import free_port

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}


@pytest.fixture
def start_nodes(start, quick):
    """start_nodes(*flags, patches={index: function}) -> the processes of two nodes with a rank each."""

    def run(*flags, patches: dict | None = None) -> list:
        port = str(free_port())
        env = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            start(
                *quick, "--num_gpus", 1, "--learning_rate", "0.02", *flags, patch=(patches or {}).get(index),
                env=env | {"NODE_RANK": str(index), "SLURMD_NODENAME": f"n{index + 1}"},
            )
            for index in (0, 1)
        ]  # fmt: skip

    return run


def step_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# --- who there is ---------------------------------------------------------------------------------------


def found(monkeypatch, **env) -> Nodes:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return Nodes.find()


def test_one_node_without_a_word(monkeypatch):
    assert found(monkeypatch) == Nodes()
    assert found(monkeypatch, **STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}) == Nodes()
    assert found(monkeypatch, NNODES="1", NODE_RANK="0", MASTER_ADDR="here") == Nodes()


def test_torchs_names_come_first(monkeypatch):
    env = STEP | {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "first"}
    assert found(monkeypatch, **env) == Nodes(4, 2, "first", 29500)
    for name, value in (("NODE_RANK", "4"), ("NNODES", "two")):
        with pytest.raises(UserError, match=r"set NODE_RANK \(0 is the first node\) and MASTER_ADDR"):
            found(monkeypatch, **env | {name: value})


def test_slurms_step_says_which_node_this_is(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[5-6]" ] && echo n5 && echo n6\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[5-6]", "PATH": path}
    assert found(monkeypatch, **env) == Nodes(2, 1, "n5", 20073)


def test_what_would_use_a_part_of_the_job_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"4 tasks on 2 node\(s\).*; write: srun -N2 --ntasks-per-node=1 "):
        found(monkeypatch, **STEP, SLURM_STEP_NUM_TASKS="4")
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(UserError, match="the job has 2 nodes and this would use one of them; write: srun bash"):
        found(monkeypatch, SLURM_JOB_NUM_NODES="2")


# --- what each has --------------------------------------------------------------------------------------


def of_node(name: str, **gpus) -> dict:
    given = machine.Gpus("A100", 30.0, [8, 0], 39.0, 4, "bf16", "")
    facts = {"name": name, "problem": None, "text": "4 x A100", "link": None, "memory": [64.0, "left"]}
    return facts | {"gpus": vars(replace(given, **gpus))}


def test_the_weakest_node_decides():
    mine = machine.Gpus("A100", 35.0, [8, 0], 39.0, 4, "bf16", "")
    others = [
        of_node("n2", gpu_free_gib=9.0),
        of_node("n3", capability=[7, 0], gpu_limit_gib=14.6, world_size=2),
    ]
    others[0] |= {"memory": [3.0, "left of the job's memory limit"], "link": "WARN: PCIe"}
    (gpus, places), text = machine.look_at_nodes(Arguments(), mine, others)
    assert (gpus.world_size, gpus.gpu_free_gib, gpus.gpu_limit_gib) == (10, 9.0, 14.6)
    assert (gpus.dtype, gpus.capability) == ("fp16", [7, 0])
    assert text == "WARN: 3, 10 ranks; n2, n3: 4 x A100; n2: PCIe"
    assert [place.ranks for place in places] == [4, 4, 2]
    with pytest.raises(UserError, match=r"^3.0 GiB left of the job's memory limit of n2, about 22.6 needed"):
        machine.look_at_host_memory(6_738_415_616, "fp16", places)


def test_a_node_that_cannot_is_named():
    others = [of_node("n2"), of_node("n3") | {"problem": "no NVIDIA GPU here"}]
    with pytest.raises(UserError, match=r"^n3: no NVIDIA GPU here$"):
        machine.look_at_nodes(Arguments(), machine.Gpus(None, None, None, 1.0, 2, "fp32", ""), others)


def test_a_folder_that_only_the_first_node_sees_is_one_line(start_nodes, tmp_path):
    def hide():
        is_dir = Path.is_dir
        Path.is_dir = lambda self: cluster.SHARED not in self.name and is_dir(self)

    first, second = start_nodes("--output_dir", tmp_path / "out", patches={1: hide})
    (code, text), (other_code, other_text) = first.wait(), second.wait()
    assert (code, other_code) == (2, 2)
    assert f"error: n2: --output_dir {tmp_path / 'out'}: no file system that all nodes share\n" in text
    assert "error" not in other_text


def test_a_first_node_that_falls_silent_while_it_checks_ends_the_others(start_nodes, tmp_path):
    def freeze():
        from lora_sft import preflight

        preflight.look_at_model = lambda args: os.kill(0, signal.SIGSTOP)

    def be_impatient():
        """And late: node 0 stands still before it is asked for the first time."""
        cluster.SILENCE_S, wait_for = 2, cluster.wait_for

        def wait_later(store, *keys):
            time.sleep(1 if keys == ("message",) else 0)
            wait_for(store, *keys)

        cluster.wait_for = wait_later

    first, second = start_nodes("--output_dir", tmp_path / "out", patches={0: freeze, 1: be_impatient})
    try:
        code, text = second.wait(60)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert code == 75
    assert text.endswith("error: node 0 does not answer any more; the same command starts again\n")


def test_what_a_node_does_by_itself_may_take_longer_than_an_answer(monkeypatch, tmp_path):
    class Store(dict):
        def check(self, keys):
            return keys[0] in self

        set, add = dict.__setitem__, dict.__setitem__

    store = Store(shared=str(tmp_path).encode(), message=json.dumps({"end": 3}))
    monkeypatch.setattr(cluster, "open_store", lambda nodes: store)
    monkeypatch.setattr(cluster, "SILENCE_S", 1)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("taken for silent"))
    try:
        code = cluster.ask(Nodes(2, 1), tmp_path, lambda: time.sleep(1.2) or {"text": "4 x A100"})
        assert (code, signal.alarm(0)) == (3, 0)  # nothing is armed any more
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert json.loads(store["facts-1"])["text"] == "4 x A100"


def test_a_node_whose_check_is_killed_before_it_speaks_is_not_waited_for(start_nodes, tmp_path):
    def die():
        cluster.ask = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    first, second = start_nodes("--output_dir", tmp_path / "out", patches={1: die})
    code, text = first.wait(60)
    assert code == 75
    assert "ended too early; the same command starts again" in text
    assert second.wait(60)[0] == 1


def test_a_node_that_is_gone_before_it_hears_to_start_is_lost(start_nodes, tmp_path):
    def die():
        wait_for = cluster.wait_for

        def wait(store, *keys):
            return os.kill(os.getpid(), signal.SIGKILL) if keys == ("message",) else wait_for(store, *keys)

        cluster.wait_for = wait

    def be_impatient():
        cluster.SILENCE_S = 1

    first, second = start_nodes("--output_dir", tmp_path / "out", patches={0: be_impatient, 1: die})
    (code, text), (other_code, other_text) = first.wait(30), second.wait(30)
    assert (code, other_code) == (75, 1)
    assert "error: no answer from n2 any more; last complete checkpoint: none yet" in text
    assert "the preflight was killed by SIGKILL" in other_text


def test_an_end_before_the_meeting_ends_all(start_nodes, adapter, tmp_path):
    for flags, expected in ((("--lora_r", "0"), 2), ((), 0)):
        first, second = start_nodes("--num_gpus", "2", *flags, "--output_dir", adapter)
        assert first.wait()[0] == expected
        code, text = second.wait(60)
        assert (code, text) == (expected, "")


# --- training -------------------------------------------------------------------------------------------


def test_two_nodes_compute_what_one_does(start_nodes, adapter, tmp_path):
    processes = start_nodes("--output_dir", tmp_path / "out")
    for process in processes:
        code, text = process.wait()
        assert code == 0, text
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert not list((tmp_path / "out").glob(".start_*"))


@pytest.mark.long
def test_a_node_that_falls_silent_ends_the_others_and_one_node_resumes(
    start_nodes, start, quick, adapter, tmp_path
):
    out = tmp_path / "out"
    first, second = start_nodes("--output_dir", out)
    first.wait_for(lambda: step_of(out) >= 3)
    os.killpg(second.pid, signal.SIGKILL)
    started_s = time.monotonic()
    code, text = first.wait(60)
    assert code == 75, text
    assert time.monotonic() - started_s < 30
    last = text.splitlines()[-1]
    assert last.startswith("error: no answer from n2 any more; last complete checkpoint: ")
    assert last.endswith("; the same command goes on from there")
    code, text = start(*quick, "--learning_rate", "0.02", "--output_dir", out).wait()
    assert code == 0, text
    assert "resuming from" in text
    assert (out / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_a_rank_killed_on_another_node_is_named(start_nodes, tmp_path):
    out = tmp_path / "out"
    first, second = start_nodes("--output_dir", out)
    first.wait_for(lambda: step_of(out) >= 1)
    os.kill(children_of(second.pid)[-1], signal.SIGKILL)
    (code, text), (other_code, other_text) = first.wait(60), second.wait(60)
    assert (code, other_code) == (1, 1)
    assert "error: n2: rank 1 was killed by SIGKILL\n" in other_text
    assert "error: n2 ended first: rank 1 was killed by SIGKILL; last complete checkpoint: " in text
    assert "Traceback" not in text + other_text


def hang():
    """As gloo, which waits for minutes for the address of a rank that is gone."""
    import lora_sft.train

    lora_sft.train.train_rank = lambda *_: time.sleep(100)


def test_a_node_that_is_gone_before_its_ranks_have_met_is_lost(start_nodes, tmp_path):
    out = tmp_path / "out"
    first, second = start_nodes("--output_dir", out, "--ddp_timeout_s", 1, patches={0: hang, 1: hang})
    first.wait_for(lambda: len(list(out.glob(f"{cluster.SHARED}*/{cluster.ALIVE}*"))) == 2)
    os.killpg(second.pid, signal.SIGKILL)
    code, text = first.wait(30)
    assert code == 75
    assert "error: no answer from n2 any more; last complete checkpoint: none yet" in text


def test_who_is_there(tmp_path):
    first, second = (cluster.Others(Nodes(2, index), tmp_path, patience_s=9) for index in (0, 1))
    assert [node.lost() for _ in range(3) for node in (first, second)] == [False] * 6
    assert [first.lost() for _ in range(4)] == [False, False, False, True]  # the first look saw a new sign
    second.lost()
    assert not first.lost()
    second.leave()
    assert not any(first.lost() for _ in range(5))
    (tmp_path / f"{cluster.ENDED}1").touch()
    assert first.lost()
    elsewhere = cluster.Others(Nodes(2, 0), tmp_path / "removed by the node that ended last", patience_s=9)
    assert not any(elsewhere.lost() for _ in range(5))


def test_ranks_that_hang_end_when_others_have_failed(start_nodes, tmp_path):

    def fail():
        import lora_sft.train

        lora_sft.train.train_rank = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    first, second = start_nodes("--output_dir", tmp_path / "out", patches={0: hang, 1: fail})
    assert second.wait(60)[0] == 1
    code, text = first.wait(30)
    assert code == 1
    assert "error: n2 ended first: rank 1 was killed by SIGKILL; last complete checkpoint: none yet" in text


def test_a_silent_rank_is_given_up_after_the_timeout(start_nodes, tmp_path):
    """As behind a pulled cable: nothing comes, and no connection closes."""
    out = tmp_path / "out"
    first, second = start_nodes("--output_dir", out, "--ddp_timeout_s", 3, "--save_steps", 100)
    first.wait_for(lambda: step_of(out) >= 2)
    os.killpg(second.pid, signal.SIGSTOP)
    try:
        code, text = first.wait(60)
    finally:
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    assert code == 75, text
    assert "error: no answer from n2 any more; last complete checkpoint: " in text
    assert "Traceback" not in text


def test_a_stop_on_one_node_stops_all(start_nodes, tmp_path):
    out = tmp_path / "out"
    processes = start_nodes("--output_dir", out)
    processes[0].wait_for(lambda: step_of(out) >= 1)
    os.kill(processes[1].pid, signal.SIGUSR1)
    assert [process.wait(60)[0] for process in processes] == [75, 75]
    assert json.loads((next(out.glob("checkpoint-*")) / "complete.json").read_text())
