"""The bash launcher as users start it: another folder, signals to it alone, the GPUs each rank sees."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT, fork
from lora_sft.launch import StopRequest
from workbench import UserError
from workbench.processes import free_port, use_short_tmpdir

SCRIPT = ROOT / "deepspeed" / "run_llama2_7b_lora.sh"
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}


def launch(*flags, cwd: Path, **env) -> subprocess.Popen:
    command = ["bash", str(SCRIPT), *map(str, flags)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        command, cwd=cwd, env=ENV | env, start_new_session=True, preexec_fn=as_in_a_terminal, **pipe
    )


def as_in_a_terminal() -> None:
    """A shell's background job, which these tests may run in, ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def test_user_errors_keep_exit_code_2_and_are_quick(tmp_path):
    started_s = time.monotonic()
    run = launch("--lora_dim", "8", cwd=tmp_path)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert text == "error: --lora_dim was the starter's; use --lora_r\n"
    assert time.monotonic() - started_s < 10


def test_help_exits_0(tmp_path):
    run = launch("-h", cwd=tmp_path)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "--tokens_per_micro_batch" in text


def test_works_from_another_folder_and_stops_on_a_signal_to_bash_alone(quick, libraries, tmp_path):
    """SIGTERM to the script only (not its group): saves, exits 75; the same command finishes the run. With a TMPDIR that
    is gone, and what mpirun sets for another program."""
    data = (ROOT / "rehearsal" / "preferences.jsonl").read_text()
    (tmp_path / "my rows.jsonl").write_text(data)  # relative to the caller, with a space in its name
    flags = [*quick, "--data_path", "my rows.jsonl", "--output_dir", "my out", "--save_steps", "100"]
    run = launch(*flags, cwd=tmp_path, TMPDIR=str(tmp_path / "gone"), OMPI_COMM_WORLD_LOCAL_RANK="0")
    metrics = tmp_path / "my out" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not metrics.exists():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 75, text
    assert "stopping at the end of this step and saving" in text
    assert "checkpoint saved; the same command resumes" in text
    assert len(list((tmp_path / "my out").glob("checkpoint-*/complete.json"))) == 1

    def again() -> int:
        os.chdir(tmp_path)
        return libraries.main(flags)

    code, text = fork(again, tmp_path / "again.txt").wait()
    assert code == 0, text
    assert "resuming from" in text
    assert [int(line.split('"step": ')[1].split(",")[0]) for line in metrics.read_text().splitlines()] == [
        *range(1, 7)
    ]


def test_a_stop_is_heard_even_when_its_file_cannot_be_written(tmp_path):
    """The folder of temporary files went away while the job ran: the job gets the signal itself, and a second Ctrl-C
    kills it."""
    temporary, fake = tmp_path / "temporary", tmp_path / "bin" / "python"
    temporary.mkdir()
    fake.parent.mkdir()
    fake.write_text(f"""#!{sys.executable}
import pathlib, signal, sys, time
if sys.argv[1] != "-c":
    signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(tmp_path / "heard")!r}).touch())
    pathlib.Path({str(temporary)!r}).rmdir()
    pathlib.Path({str(tmp_path / "up")!r}).touch()
    while True:
        time.sleep(0.1)
""")
    fake.chmod(0o755)
    run = launch(cwd=tmp_path, TMPDIR=str(temporary), PATH=f"{fake.parent}:/usr/bin:/bin")
    deadline = time.monotonic() + 30
    for before in ("up", "heard"):  # bash takes two signals at once for one
        while not (tmp_path / before).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGINT)
    text, _ = run.communicate(timeout=20)
    assert "killed without saving" in text
    assert run.returncode in (128 + signal.SIGKILL, 128 + signal.SIGINT)


def test_a_stop_request_without_a_folder_counts():
    request = StopRequest(Path("/nonexistent/stop"))
    assert not request
    request.ask()
    assert request


def test_sockets_find_a_short_folder(monkeypatch, tmp_path):
    long = tmp_path / ("scratch_of_a_project_" * 5)
    long.mkdir()
    for folder in (long, tmp_path / "gone"):
        monkeypatch.setenv("TMPDIR", str(folder))
        use_short_tmpdir()
        assert os.environ["TMPDIR"] == "/tmp"


def test_a_free_port_is_not_listened_on(monkeypatch):
    free = free_port()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        drawn = [free, other.getsockname()[1]]
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: drawn.pop())
        assert free_port() == free


@pytest.fixture
def ranks(transformers, tmp_path):
    """ranks(function) -> (exit code, output) of two ranks that call `function(rank)`."""
    from lora_sft.launch import Ranks, run_ranks

    def run(function):
        work_dir = tmp_path / "work"
        work_dir.mkdir()
        return fork(lambda: run_ranks(function, Ranks.alone(2), work_dir), tmp_path / "terminal.txt").wait()

    return run


@pytest.mark.v100
def test_a_rank_killed_by_a_signal_makes_the_exit_code_1(ranks):
    code, text = ranks(lambda rank: os.kill(os.getpid(), 9) if rank else 0)
    assert (code, text) == (1, "error: rank 1 was killed by SIGKILL\n")


@pytest.mark.v100
def test_ranks_that_stop_give_75(ranks):
    assert ranks(lambda rank: 75) == (75, "")


@pytest.mark.v100
def test_an_error_of_the_user_is_one_line_whatever_the_other_ranks_see_of_it(ranks):
    def rank_main(rank: int) -> int:
        if rank:
            time.sleep(0.5)
            raise UserError("the disk is full")
        raise RuntimeError("connection closed by peer")

    assert ranks(rank_main) == (2, "error: the disk is full\n")


@pytest.mark.v100
def test_a_rank_that_waits_for_one_that_has_failed_is_killed_without_a_word(ranks, monkeypatch):
    """As NCCL does after an "out of memory" elsewhere; a stop request does not reach it."""
    monkeypatch.setattr("lora_sft.launch.GRACE_S", 0.2)

    def rank_main(rank: int) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank:
            time.sleep(60)
        raise UserError("out of GPU memory")

    assert ranks(rank_main) == (2, "error: out of GPU memory\n")


@pytest.mark.v100
def test_a_bug_prints_the_traceback_of_the_first_rank_that_fails(ranks):
    def rank_main(rank: int) -> int:
        time.sleep(0.5 * rank)
        raise RuntimeError(f"bug of rank {rank}")

    code, text = ranks(rank_main)
    assert code == 1
    assert text.count("Traceback") == 1
    assert "RuntimeError: bug of rank 0" in text


@pytest.mark.v100
def test_ranks_die_with_their_parent(transformers, tmp_path):
    from lora_sft.launch import Ranks, run_ranks

    def wait(rank: int) -> int:
        (tmp_path / f"rank{rank}").write_text(str(os.getpid()))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a stop request is: torch's own way to end a rank
        time.sleep(60)
        return 0

    program = fork(lambda: run_ranks(wait, Ranks.alone(2), tmp_path), tmp_path / "terminal.txt")
    program.wait_for(lambda: all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)))
    time.sleep(0.2)
    pids = [int((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in pids
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_see_exactly_the_gpus_that_were_given(start, quick, tmp_path):
    """CUDA_VISIBLE_DEVICES=2,3: both ranks see both, and rank r takes the r-th."""

    def pretend_two_gpus():
        import torch

        import lora_sft.train
        from lora_sft import preflight
        from lora_sft.machine import Gpus

        def look_at_gpus(args):
            return Gpus(None, None, None, 14.6, 2, "fp16", "pretended"), "pretended"

        def train_rank(args, plan, work_dir, resume_from, stop, rank):
            seen = [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK", "WORLD_SIZE")]
            (tmp_path / f"rank{rank}").write_text(" ".join([*seen, chosen[0]]))
            return 0

        chosen = []
        torch.cuda.set_device = lambda device: chosen.append(f"cuda:{device}")
        preflight.look_at_gpus, lora_sft.train.train_rank = look_at_gpus, train_rank

    flags = [*quick, "--device", "cuda", "--output_dir", tmp_path / "out"]
    code, text = start(*flags, env={"CUDA_VISIBLE_DEVICES": "2,3"}, patch=pretend_two_gpus).wait()
    assert code == 0, text
    seen = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert seen == ["2,3 0 0 2 cuda:0", "2,3 1 1 2 cuda:1"]


def test_the_launcher_leaves_cuda_visible_devices_alone(tmp_path):
    """From bash to the program: a python that only writes down what it was given."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$CUDA_VISIBLE_DEVICES|$*" > {tmp_path}/seen\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"
    run = launch("--seed", "7", cwd=tmp_path, CUDA_VISIBLE_DEVICES="2,3", PATH=path)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 0, text
    assert (tmp_path / "seen").read_text() == f"2,3|{ROOT}/deepspeed/main.py --seed 7\n"


def test_a_signal_while_the_job_ends_does_not_change_the_exit_code(tmp_path):
    """bash answers 143 for an interrupted `wait`; the job's own code must come through."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\ntouch {tmp_path}/up\nsleep 1.5\nexit 75\n')
    fake.chmod(0o755)
    # `touch` (the stop file) takes longer than the job, so the job ends while the trap runs.
    slow = tmp_path / "bin" / "touch"
    slow.write_text('#!/bin/sh\ncase "$1" in */lora_stop*) sleep 3 ;; esac\n/usr/bin/touch "$1"\n')
    slow.chmod(0o755)
    run = launch(cwd=tmp_path, PATH=f"{fake.parent}:/usr/bin:/bin")
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 75, text


def sourced(command: str, **env) -> str:
    """Output of a bash command after `source env.sh`, in a clean environment."""
    clean = {"HOME": "/nonexistent", "PATH": "/usr/bin:/bin"} | {key: str(value) for key, value in env.items()}
    script = f"source {ROOT / 'env.sh'} && {command}"
    return subprocess.run(["bash", "-c", script], env=clean, capture_output=True, text=True, check=True).stdout


def test_one_variable_moves_every_cache(tmp_path):
    moved = dict(line.split("=", 1) for line in sourced("env", LLM_STORAGE=tmp_path / "big").splitlines())
    names = ("PIP_CACHE_DIR", "UV_CACHE_DIR", "HF_HOME", "FLASHINFER_WORKSPACE_BASE", "TVM_FFI_CACHE_DIR")
    for name in (*names, "TRITON_HOME", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        assert moved[name].startswith(str(tmp_path / "big")), name
    assert sourced("echo $HF_HOME", LLM_STORAGE=tmp_path / "big", HF_HOME="/mine") == "/mine\n"
    assert "HF_HOME" not in sourced("env")


@pytest.mark.parametrize(
    ("gpus", "why"),
    [
        ("7.0, 580.65.06", "compute capability 7.0"),
        ("9.0, 580.65.06\n9.0, 570.12", "driver 570.12"),
        ("7.5, 580.65.06", None),
        ("No devices were found", None),
    ],
)
def test_an_old_gpu_takes_its_own_environment(tmp_path, gpus, why):
    """A copy of env.sh beside two environments, and an nvidia-smi that answers `gpus`."""
    shutil.copy(ROOT / "env.sh", tmp_path)
    for name in (".venv", ".venv-v100"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to("/usr/bin/true")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{gpus}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)

    def chosen(**env) -> str:
        script = f"set -euo pipefail; source {tmp_path}/env.sh; use_v100_environment; command -v python"
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | env
        return subprocess.run(
            ["bash", "-c", script], env=env, capture_output=True, text=True, check=True
        ).stdout

    ours, old = (f"{tmp_path}/{name}/bin/python\n" for name in (".venv", ".venv-v100"))
    assert chosen() == (f"GPU with {why}: the environment is .venv-v100\n{old}" if why else ours)
    assert chosen(VENV=".venv") == ours
    assert chosen(CUDA_VISIBLE_DEVICES="") == ours


@pytest.mark.parametrize("whom", ["the script", "every process"])
def test_a_signal_at_the_very_start_ends_with_75(tmp_path, whom):
    """Slurm may signal before the job has begun, and signals all processes of a step."""
    for delay_s in (0.02, 0.05, 0.1):
        run = launch("--rehearse", "--output_dir", "out", cwd=tmp_path)
        time.sleep(delay_s)
        (os.kill if whom == "the script" else os.killpg)(run.pid, signal.SIGUSR1)
        text, _ = run.communicate(timeout=60)
        assert run.returncode == 75, text
        assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_active_environment_without_deepspeed_does_not_count(tmp_path):
    """Clusters like to activate a bare conda base."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/usr/bin/false")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    if not (ROOT / ".venv").exists():
        pytest.skip("no .venv in this checkout")
    assert sourced("command -v python", CONDA_PREFIX=tmp_path, PATH=path) == f"{ROOT}/.venv/bin/python\n"
    ours = f"{sys.prefix}/bin:/usr/bin:/bin"
    assert sourced("command -v python", VIRTUAL_ENV=sys.prefix, PATH=ours) == f"{sys.prefix}/bin/python\n"
    with pytest.raises(subprocess.CalledProcessError):  # mistyped: never another environment silently
        sourced("true", VENV=".venv-v1000")
