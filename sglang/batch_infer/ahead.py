"""The engine's processes and weights, begun while this one still reads and checks.

SGLang spawns them when all is decided, and each then imports for 10 s what this one has imported before; where copies are
served, a process between the two imports it once more. Here they are spawned as soon as a GPU is found, import, and wait
for what to do. (For the CPU they are forked: start.py.)
"""

import contextlib
import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from workbench.machine import memory_limit_gib
from workbench.processes import free_port, importing

from .arguments import Arguments
from .machine import Machine

SPAWN, PROCESS = multiprocessing.get_context("spawn"), multiprocessing.Process
CONTROLLER = "sglang.srt.managers.data_parallel_controller"  # begins a scheduler for each copy
MODULES = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    CONTROLLER,
)
# Of a file: so many pieces of 16 MiB that come at this rate (bytes/s) are in memory, or on a disk that needs no help.
PIECES, MEMORY_RATE = 8, 1.5e9


class Ahead:
    """Processes that wait. Within it SGLang takes them for those that it asks for; where none waits nothing changes."""

    def __init__(self, modules: tuple[str, ...] = MODULES) -> None:
        self.modules = modules
        self.waiting: list[tuple[BaseProcess, Connection]] = []

    def begin(self, children: list[int], variables: dict[str, str]) -> None:
        """A process for each of `children`, which begins so many of its own, with `variables` in its environment."""
        for count in children:
            reading, writing = SPAWN.Pipe(duplex=False)
            process = SPAWN.Process(target=wait_for_work, args=(reading, self.modules, count, variables))
            process.start()
            reading.close()
            self.waiting.append((process, writing))

    def process(self, target: Callable, args: tuple = (), kwargs: dict | None = None) -> BaseProcess:
        """As multiprocessing.Process, whose `start` hands the work to one that waits, with the environment of then."""
        if not self.waiting:
            return PROCESS(target=target, args=args, kwargs=kwargs or {})
        process, work = self.waiting.pop(0)

        def hand_over() -> None:
            with contextlib.suppress(BrokenPipeError):  # it has died: SGLang looks after its processes
                work.send((dict(os.environ), target, args, kwargs or {}))

        process.start = hand_over
        return process

    def __enter__(self) -> None:
        multiprocessing.Process = self.process

    def __exit__(self, *_) -> None:
        multiprocessing.Process = PROCESS
        self.close()

    def close(self) -> None:
        """Those that still wait end."""
        while self.waiting:
            self.waiting.pop()[1].close()


def wait_for_work(work: Connection, modules: tuple[str, ...], children: int, variables: dict[str, str]) -> None:
    os.environ |= variables
    ahead = Ahead(modules)
    ahead.begin([0] * children, variables)
    with importing():
        for name in modules:
            importlib.import_module(name)
    if CONTROLLER in modules:
        take_own_ports()
    try:
        environment, target, args, kwargs = work.recv()
    except EOFError:  # the run has ended
        return
    os.environ.clear()
    os.environ.update(environment)
    if target.__module__ != CONTROLLER:
        ahead.close()
    with ahead:
        target(*args, **kwargs)


def take_own_ports() -> None:
    """SGLang asks Linux for a free port for each copy and listens there seconds later: until then it may be given to any
    process that asks, as gloo and NCCL do."""
    from sglang.srt import server_args

    server_args.get_free_port = free_port


def begin(ahead: Ahead, args: Arguments, machine: Machine) -> None:
    """As many as the engine will ask for, as far as is known: a scheduler for each GPU, the detokenizer, and before copies
    their controller."""
    preloads = args.own_engine_args.get("enable_memory_saver")  # SGLang does, a library into its own
    if machine.device != "cuda" or args.only_looking or preloads:
        return
    # So that a scheduler binds itself to its GPU's NUMA node: else SGLang does it as it spawns.
    os.environ.setdefault("SGLANG_NUMA_BIND_V2", "0")
    shared = -(-(args.tp_size or 1) // args.nodes[1])  # a copy may be spread over nodes
    copies = args.dp_size or max(1, machine.gpus // shared)
    schedulers = [copies * shared] if copies > 1 else [0] * shared
    ahead.begin([*schedulers, 0], machine.compiler | {"HF_HUB_OFFLINE": "1"})


def read_weights(folder: Path) -> threading.Thread | None:
    """Reads `folder`'s weights, so that the engine finds them in memory when all is imported; it stops where they come as
    fast as from memory. None: they would drive one another out. (Of posix_fadvise's WILLNEED Linux reads the first
    megabytes only.)"""
    files = sorted(folder.glob("*.safetensors"))
    if sum(path.stat().st_size for path in files) > memory_limit_gib()[0] / 2 * 2**30:
        return None

    def read() -> None:
        piece = memoryview(bytearray(2**24))
        for path in files:
            began, pieces = time.monotonic(), 0
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:  # the engine says it
                while file.readinto(piece):
                    pieces += 1
                    if pieces == PIECES and time.monotonic() - began < pieces * len(piece) / MEMORY_RATE:
                        break

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread
