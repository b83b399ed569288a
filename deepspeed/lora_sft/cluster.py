"""Several nodes: Slurm, or you, starts the program once on each, and they meet in torch's TCPStore.

Node 0 owns the run: it claims the folder, asks the others what they have, checks, packs the data and tells them to
start. From then on the ranks' own collectives hold the nodes together. What a node ends with it leaves in the shared
folder, so that another can tell the cause from what follows from it.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from workbench import UserError
from workbench.files import write_json
from workbench.processes import STOPPED

ARRIVAL_S = 180.0  # until the last node has imported torch
SILENCE_S = 30  # while they prepare, nodes answer each other within a moment, or are gone
FAREWELL_S = 10.0  # for every node to hear how it ends
CAUSE_S = 4.0  # for every node to say how it ended
SHARED = ".start_"  # folders in --output_dir that hold a start's plan and tokens
START = "start.json"
ENDED = "ended-"  # files in it: what a node's ranks ended with, if not well
ALIVE = "alive-"  # and when a node was last there
LOOK_S = 5.0  # between looks at the other nodes
LOST = 74  # exit code of ranks that lost others: what others ended with is the cause
PROGRAM = "bash deepspeed/run_llama2_7b_lora.sh"


class LostRanks(Exception):
    """A collective ended because another rank did, or does not answer."""


@dataclass(frozen=True)
class Nodes:
    """How many there are, which one this is, and where node 0 listens."""

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @staticmethod
    def here() -> str:
        """The name of this one."""
        return os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    @classmethod
    def find(cls) -> "Nodes":
        """Of torch's NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, else of the Slurm step. Raises UserError."""
        env = os.environ
        if "NNODES" in env:
            try:
                found = cls(int(env["NNODES"]), int(env["NODE_RANK"]), env["MASTER_ADDR"],
                            int(env.get("MASTER_PORT", "29500")))  # fmt: skip
                if not 0 <= found.index < found.count:
                    raise ValueError
            except (KeyError, ValueError):
                raise UserError(
                    f"NNODES={env['NNODES']}: set NODE_RANK (0 is the first node) and MASTER_ADDR (its name), too"
                ) from None
            return found if found.count > 1 else cls()
        if "SLURM_STEP_ID" not in env:
            if (count := int(env.get("SLURM_JOB_NUM_NODES", "1"))) > 1:
                raise UserError(
                    f"the job has {count} nodes and this would use one of them; write: srun {PROGRAM}, or sbatch "
                    f"-N{count} deepspeed/job.sbatch"
                )
            return cls()
        count, tasks = int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_STEP_NUM_TASKS"])
        if tasks != count:
            raise UserError(
                f"{tasks} tasks on {count} node(s), but one task starts the ranks of all GPUs of its node; write: "
                f"srun -N{count} --ntasks-per-node=1 --gres=gpu:N {PROGRAM}"
            )
        if count == 1:
            return cls()
        list_hosts = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        hosts = subprocess.run(list_hosts, capture_output=True, text=True, check=True).stdout.split()
        port = 20000 + (int(env["SLURM_JOB_ID"]) * 10 + int(env["SLURM_STEP_ID"])) % 10000
        return cls(count, int(env["SLURM_PROCID"]), hosts[0], int(env.get("MASTER_PORT", port)))


@dataclass(frozen=True)
class Start:
    """What every node needs besides the plan: who has how many ranks, and where they meet."""

    shared: str  # folder of the plan and the tokens
    resume_from: str | None
    names: list[str]  # of the nodes
    ranks: list[int]  # of each
    port: int

    def save(self, work_dir: Path) -> "Start":
        write_json(work_dir / START, asdict(self))
        return self

    @classmethod
    def load(cls, work_dir: Path) -> "Start":
        return cls(**json.loads((work_dir / START).read_text()))


# --- before the ranks ---------------------------------------------------------------------------------


def new_shared_folder(folder: Path) -> Path:
    """A new one in the output folder; its random name is one that no file system has cached as missing. What a killed
    start left goes: the caller has claimed the folder."""
    import tempfile

    for old in folder.glob(f"{SHARED}*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=SHARED, dir=folder))


def open_store(nodes: Nodes):
    """torch's TCPStore, whose server runs in a thread of node 0: call it in a child. Raises UserError."""
    from torch.distributed import TCPStore

    patience = timedelta(seconds=ARRIVAL_S)
    try:
        return TCPStore(
            nodes.address, nodes.port, is_master=nodes.index == 0, timeout=patience, wait_for_workers=False
        )
    except RuntimeError as error:
        where = f"{nodes.address}:{nodes.port}"
        if nodes.index == 0:
            raise UserError(f"{where} cannot be listened on; set another MASTER_PORT on all nodes") from error
        raise UserError(f"node 0 does not answer at {where}; is the program started on all nodes?") from error


@contextmanager
def leading(nodes: Nodes, shared: Path) -> Iterator:
    """On node 0, while the nodes prepare: yields the store. The others hear how it ends, whatever happens."""
    store, told = open_store(nodes), []
    store.set("shared", str(shared))
    try:
        yield store
        told.append(0)
    except UserError:
        told.append(2)
        raise
    finally:
        if not store.check(["message"]):
            tell(store, nodes, {"end": (told or [1])[0]}, FAREWELL_S)


def tell(store, nodes: Nodes, message: dict, patience_s: float) -> bool:
    """Sets what the others wait for, and stays until they have read it; False: one has not."""
    store.set("message", json.dumps(message))
    deadline = time.monotonic() + patience_s
    while store.add("left", 0) < nodes.count - 1:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def dismiss(nodes: Nodes, code: int) -> None:
    """Node 0 ends before it has asked anything: so do the others."""
    if nodes.count > 1 and nodes.index == 0:
        tell(open_store(nodes), nodes, {"end": code}, FAREWELL_S)


def gather(store, nodes: Nodes) -> list[dict]:
    """On node 0: what the other nodes say of themselves (`ask`'s `facts`), in their order. Raises UserError."""
    import torch

    keys = [f"facts-{index}" for index in range(1, nodes.count)]
    try:
        store.wait(keys, timedelta(seconds=ARRIVAL_S))
    except torch.distributed.DistError as error:
        missing = [key.split("-")[1] for key in keys if not store.check([key])]
        raise UserError(
            f"node {', '.join(missing)} of 0 to {nodes.count - 1} did not come within {ARRIVAL_S:.0f} s"
        ) from error
    found = [json.loads(store.get(key)) for key in keys]
    if ended := [facts["name"] for facts in found if "ended" in facts]:
        print(f"error: {', '.join(ended)}: ended too early; the same command starts again", file=sys.stderr)
        sys.exit(STOPPED)
    return found


def give_up(nodes: Nodes) -> int:
    """On another node whose `ask` was killed or failed: node 0 need not wait for it."""
    signal.alarm(SILENCE_S)
    open_store(nodes).set(f"facts-{nodes.index}", json.dumps({"ended": True, "name": nodes.here()}))
    return 0


def ask(nodes: Nodes, work_dir: Path, facts: Callable[[], dict]) -> int:
    """On the other nodes, in a child: says what this one has, and waits for node 0. Returns the exit code that all end
    with; 0 and a `start.json` in `work_dir`: go on."""
    import torch

    try:
        store = open_store(nodes)
        wait_for(store, "shared", "message")
        if store.check(["shared"]):
            shared, found = Path(store.get("shared").decode()), {"problem": None}
            signal.alarm(0)  # what this node does by itself may take its time
            try:
                if not shared.is_dir():
                    raise UserError(f"--output_dir {shared.parent}: no file system that all nodes share")
                found |= facts()
            except UserError as error:
                found["problem"] = str(error)
            signal.alarm(SILENCE_S)
            store.set(f"facts-{nodes.index}", json.dumps(found | {"name": nodes.here()}))
        wait_for(store, "message")
        message = json.loads(store.get("message"))
        store.add("left", 1)
        signal.alarm(0)
    except torch.distributed.DistError as error:
        why = str(error).splitlines()[0]
        print(f"error: {nodes.here()}: node 0 is gone ({why}); the same command starts again", file=sys.stderr)
        return STOPPED
    if "end" in message:
        return message["end"]
    Start(**message).save(work_dir)
    return 0


def wait_for(store, *keys: str) -> None:
    """Until one of them is set. TCPStore waits for ever for a server that is silent: SIGALRM ends this process then, also
    in what it asks next."""
    signal.alarm(SILENCE_S)
    while not any(store.check([key]) for key in keys):
        time.sleep(0.2)
        signal.alarm(SILENCE_S)


# --- while the ranks train ----------------------------------------------------------------------------


class Others:
    """The other nodes, as the shared folder shows them: a collective does not always notice that a node is gone."""

    def __init__(self, nodes: Nodes, shared: Path, patience_s: float) -> None:
        self.shared, self.own = shared, shared / f"{ALIVE}{nodes.index}"
        self.patience_s = max(patience_s, 2 * LOOK_S)  # looks of two nodes drift past each other
        others = (index for index in range(nodes.count) if index != nodes.index)
        self.seen = {shared / f"{ALIVE}{index}": (0, 0.0) for index in others}  # when it was there, silent for

    def lost(self) -> bool:
        """Called every LOOK_S: says that this node is there; True if another has ended badly or is silent. Looks are
        counted, not time: a file system that stands still for a while makes nobody silent."""
        with contextlib.suppress(OSError):
            self.own.touch()  # needs no room on a full disk
        for path, (known, silent_s) in self.seen.items():
            now = modified(path)
            self.seen[path] = (now, silent_s + LOOK_S if now == known else 0.0)
        silent = any(silent_s > self.patience_s for _, silent_s in self.seen.values())
        return self.shared.is_dir() and (silent or any(self.shared.glob(f"{ENDED}*")))

    def leave(self) -> None:
        """This node ends well, and others may take longer."""
        with contextlib.suppress(OSError):
            os.utime(self.own, (0, 0))


def modified(path: Path) -> float:
    """0: not yet; an own value each time it is asked: the node has left. NFS shows what is new to who opens a file."""
    with contextlib.suppress(OSError), path.open() as file:
        return os.fstat(file.fileno()).st_mtime or time.monotonic()
    return 0.0


# --- after the ranks ----------------------------------------------------------------------------------


def explain_end(nodes: Nodes, start: Start, code: int, cause: str, checkpoint: Path | None) -> int:
    """The exit code of this node, whose ranks ended with `code` and this `cause`. If they only lost others: the other
    node's code, or 75 if that one is silent."""
    if code in (0, STOPPED):
        return code
    shared = Path(start.shared)
    resume = f"last complete checkpoint: {checkpoint or 'none yet'}; the same command goes on from there"
    with contextlib.suppress(OSError):  # a full disk may be what ended it
        write_json(shared / f"{ENDED}{nodes.index}", {"name": nodes.here(), "code": code, "cause": cause})
    if code != LOST:
        print(resume, file=sys.stderr)
        return code
    deadline = time.monotonic() + CAUSE_S
    ended: dict[int, dict] = {}
    while time.monotonic() < deadline:
        ended = {
            int(path.name.split("-")[1]): json.loads(path.read_text()) for path in shared.glob(f"{ENDED}*[0-9]")
        }
        if len(ended) == nodes.count or any(end["code"] != LOST for end in ended.values()):
            break
        time.sleep(0.2)
    causes = [end for _, end in sorted(ended.items()) if end["code"] != LOST]
    silent = [name for index, name in enumerate(start.names) if index not in ended]
    if causes:
        text, code = f"{causes[0]['name']} ended first: {causes[0]['cause']}", causes[0]["code"]
    elif silent:
        text, code = f"no answer from {', '.join(silent)} any more", STOPPED
    else:
        text, code = f"the connections between the {'nodes' if nodes.count > 1 else 'ranks'} failed", STOPPED
    if nodes.index == min((index for index, end in ended.items() if end["code"] == LOST), default=nodes.index):
        print(f"error: {text}; {resume}", file=sys.stderr)
    return code
