"""Children of the program: one for the preflight, then one rank a GPU, forked from a parent that has touched no GPU.

Why not the `deepspeed` command: it kills its ranks when a SIGTERM reaches it (Slurm signals every process), it
rewrites CUDA_VISIBLE_DEVICES when the number of GPUs is given, and its launchers and every rank each import torch.
Here each rank sees CUDA_VISIBLE_DEVICES as it is and takes its LOCAL_RANK-th entry, and shares the parent's imports.

Fork safety: the parent never initialises CUDA and starts no threads; whatever does either (preflight, tokenising,
DeepSpeed) is imported and run in a child.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from workbench import UserError
from workbench.processes import STOP_SIGNALS, STOPPED, die_with_parent, free_port, importing

from .cluster import LOOK_S, LOST, LostRanks

OTHER_LAUNCHERS = (
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MV2_",
    "MPI_",
)  # DeepSpeed and accelerate would take ranks from them
GRACE_S = 10.0  # what the others may take to end after one has failed, then as long again after a SIGTERM
CAUSE = "cause"  # file in the work folder: the line that was printed when a child failed


@dataclass(frozen=True)
class Ranks:
    """Those of this node, and where they meet those of others."""

    count: int
    first: int
    world_size: int
    address: str
    port: int
    node: str = ""  # its name, if there are others

    @classmethod
    def alone(cls, count: int) -> "Ranks":
        return cls(count, 0, count, "127.0.0.1", free_port())


class StopRequest:
    """True once this process had a signal or the stop file exists. The signal creates the file, too: it does not matter
    whether Slurm signals the launcher, one rank or all processes."""

    def __init__(self, path: Path) -> None:
        self.path, self.signalled = path, False

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, *_) -> None:
        self.signalled = True
        with contextlib.suppress(OSError):  # its folder is gone
            self.path.touch()

    def __bool__(self) -> bool:
        return self.signalled or self.path.exists()


@importing()
def import_shared_libraries() -> None:
    """Before any fork, so that the children share them. These do not initialise CUDA; DeepSpeed and Trainer
    do (seen on an H200), so the ranks import those themselves."""
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def run_in_child(function: Callable[[], int], work_dir: Path, stop: StopRequest) -> int:
    """Exit code of one child that runs `function`; a stop request ends it at once."""
    return _run(lambda _: function(), Ranks.alone(1), work_dir, stop)


def run_ranks(
    function: Callable[[int], int],
    ranks: Ranks,
    work_dir: Path,
    others_lost: Callable[[], bool] | None = None,
) -> int:
    """Exit code of the children that each run `function(rank)` with torch's rendezvous variables set. They are ended if
    `others_lost`, asked every LOOK_S: gloo waits for minutes for one that is gone while connections are made."""

    def start(local_rank: int) -> int:
        for name in [name for name in os.environ if name.startswith(OTHER_LAUNCHERS)]:
            del os.environ[name]
        rank = ranks.first + local_rank
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(ranks.world_size),
            "LOCAL_WORLD_SIZE": str(ranks.count),
            "MASTER_ADDR": ranks.address,
            "MASTER_PORT": str(ranks.port),
        }
        return function(rank)

    return _run(start, ranks, work_dir, others_lost=others_lost)


def _run(
    function: Callable[[int], int],
    ranks: Ranks,
    work_dir: Path,
    stop: StopRequest | None = None,
    others_lost: Callable[[], bool] | None = None,
) -> int:
    """0 if all children return 0; 2 if one raises a UserError, which is printed once; else the code of the first that
    fails, whose traceback is printed (the others' failures follow from it). A child killed by a signal counts as 1.
    What was printed is in the file `cause`, too."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    def child(index: int) -> None:
        die_with_parent()
        try:
            sys.exit(function(index))
        except UserError as error:
            (work_dir / f"error-{index}").write_text(str(error))
            sys.exit(2)
        except LostRanks:
            time.sleep(1)  # the one that was lost is seen to end first
            sys.exit(LOST)

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the error is said below, once
    children = start_processes(child, nprocs=ranks.count, join=False, start_method="fork")
    looked_s = time.monotonic()
    try:
        while not children.join(timeout=0.1, grace_period=GRACE_S):
            lost = False
            if others_lost and time.monotonic() > looked_s + LOOK_S:
                looked_s, lost = time.monotonic(), others_lost()
            if stop or lost:
                for process in children.processes:
                    process.kill()
                    process.join()
                return LOST if lost else STOPPED
        return 0
    except (ProcessExitedException, ProcessRaisedException) as error:
        who = "the preflight" if stop is not None else f"rank {ranks.first + error.error_index}"
        if messages := dict.fromkeys(path.read_text() for path in sorted(work_dir.glob("error-*"))):
            code, cause = 2, "\nerror: ".join(messages)
        elif isinstance(error, ProcessRaisedException):
            print(error.msg, file=sys.stderr)
            code, cause = 1, f"{who} failed: {error.msg.strip().splitlines()[-1]}"
        elif error.signal_name == "SIGABRT" and ranks.node:
            return LOST  # NCCL's watchdog, after --ddp_timeout_s
        elif error.signal_name == "SIGALRM":
            code, cause = STOPPED, "node 0 does not answer any more; the same command starts again"
        elif error.signal_name:
            code, cause = 1, f"{who} was killed by {error.signal_name}"
        else:
            return error.exit_code
        print(f"error: {ranks.node and f'{ranks.node}: '}{cause}", file=sys.stderr)
        (work_dir / CAUSE).write_text(cause)
        return code


def cause(work_dir: Path) -> str:
    """What `_run` printed."""
    path = work_dir / CAUSE
    return path.read_text() if path.exists() else ""


def join_ranks(device: str, timeout_s: int) -> dict:
    """Joins DeepSpeed's process group, as a rank; returns the extra TrainingArguments that the device needs. A rank that
    does not come within `timeout_s` is lost; while the model loads, DeepSpeed's 600 s hold.

    On CPU, Trainer's own detection would not start DeepSpeed's communication (it reports MULTI_CPU), so the
    state is configured first. DeepSpeed's shared-memory op serves inference only; declaring it incompatible
    avoids a compiler run at start and a lock file that a killed run would leave.
    """
    import torch

    if device == "cuda":
        share_cores(int(os.environ["LOCAL_WORLD_SIZE"]))
        if cap := os.environ.get("GPU_MEMORY_CAP_GIB"):
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, float(cap) * 2**30 / total))
        if torch.__version__ < "2.8":  # the V100's; later ones do it unasked
            # Otherwise a gathered layer waits for NCCL's stream before its memory can be used again.
            os.environ["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
        join(timeout_s)
        return {}
    keep_freed_memory()
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join(timeout_s)
    PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}


def join(timeout_s: int) -> None:
    import deepspeed
    import torch

    deepspeed.utils.nvtx.enable_nvtx = False  # marks for NVIDIA's profilers, around each of its functions
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s))
    torch.distributed.distributed_c10d._set_pg_timeout(deepspeed.constants.default_pg_timeout)


def keep_freed_memory() -> None:
    """glibc gives large blocks back at once, and the kernel zeroes those of the next layer anew: a quarter of the
    CPU's time. Now it keeps up to 2 GiB (mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD)."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        for parameter in (-1, -3):
            ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)


def share_cores(ranks: int) -> None:
    """Otherwise each rank starts a thread on every core, and they wait for one another: checking the adapter took 36 s
    instead of 2 on 32 cores."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
