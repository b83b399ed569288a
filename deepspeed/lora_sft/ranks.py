"""Starts one rank per GPU by forking this process, which has imported torch and touched no GPU.

Why not the `deepspeed` command: it kills its ranks when a SIGTERM reaches it (Slurm signals every process),
it rewrites CUDA_VISIBLE_DEVICES when the number of GPUs is given, and its two launcher processes and every
rank each import torch. Here each rank sees CUDA_VISIBLE_DEVICES as it is and takes its LOCAL_RANK-th entry,
shares the parent's imports, and the exit code of the first rank that fails is the program's.

Fork safety: the parent never initialises CUDA and starts no threads; whatever does either (preflight,
tokenising, DeepSpeed) is imported and run in a child.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from . import UserError

STOPPED = 75  # EX_TEMPFAIL: stopped on request, the same command resumes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_S = 20.0  # how long the other ranks may take to end after one has failed

_PR_SET_PDEATHSIG = 1


def fork(function: Callable[[], int], error_file: Path) -> int:
    """Runs `function` in a forked child and returns the child's pid. The child exits with its return value,
    2 after a UserError (its text goes to `error_file` for the parent to print), 1 after any other error."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # A child whose parent is killed must not go on writing into the output folder.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        code = function()
    except UserError as error:
        error_file.write_text(str(error))
        code = 2
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        error_file.with_suffix(".traceback").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_in_child(function: Callable[[], int], work_dir: Path, stop: "StopRequest") -> int:
    """Runs `function` in one child and returns its exit code; a stop request ends it at once."""
    return wait([fork(function, work_dir / "error")], [work_dir / "error"], stop)


def run_ranks(function: Callable[[int], int], world_size: int, work_dir: Path) -> int:
    """Forks `world_size` ranks that each call `function(rank)` with torch's rendezvous variables set."""
    port = free_port()
    errors = [work_dir / f"error-{rank}" for rank in range(world_size)]

    def start(rank: int) -> int:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        return function(rank)

    pids = [fork(lambda rank=rank: start(rank), errors[rank]) for rank in range(world_size)]
    return wait(pids, errors)


def wait(pids: list[int], errors: list[Path], stop: "StopRequest | None" = None) -> int:
    """Waits for all children; kills the rest `GRACE_S` after the first failure, and all after a `stop`.

    Returns 0 if all returned 0; 2 if one raised a UserError, which is printed once; else the code of the
    first that failed, whose traceback is printed (the others' failures follow from it). A child killed by a
    signal counts as 1.
    """
    failed: list[tuple[int, int]] = []  # (rank, exit code), in the order of their end
    deadline, running = float("inf"), dict(enumerate(pids))
    while running:
        if stop:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return STOPPED
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[rank]
                if code := os.waitstatus_to_exitcode(status):
                    failed.append((rank, code))
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    if not failed:
        return 0
    if messages := dict.fromkeys(path.read_text() for path in errors if path.exists()):
        for message in messages:
            print(f"error: {message}", file=sys.stderr)
        return 2
    rank, code = failed[0]
    if code < 0:
        print(f"error: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        return 1
    if (trace := errors[rank].with_suffix(".traceback")).exists():
        print(trace.read_text(), file=sys.stderr)
    return code


def free_port() -> int:
    """A TCP port that is free now; the kernel hands out another one each time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StopRequest:
    """True once the stop file exists. A signal to this process creates the same file: it does not matter
    whether Slurm signals the launcher, one rank or all processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: self.path.touch())

    def __bool__(self) -> bool:
        return self.path.exists()
