"""Processes begun ahead take the engine's work with the environment of then, and end where there is none."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batch_infer import ahead
from batch_infer.ahead import Ahead
from batch_infer.arguments import FOLDER, Arguments
from batch_infer.machine import Machine
from workbench.processes import importing

# Spawned processes import a file by its name: this one's functions are not theirs to find.
SCRIPT = """
import json, multiprocessing, os, sys
sys.path += sys.argv[1:]
from batch_infer import ahead

ahead.CONTROLLER = "__mp_main__"  # as the function that follows is known where it runs
own_ports = []
ahead.take_own_ports = lambda: own_ports.append("taken")


def tell(sender):
    sender.send((os.getpid(), os.environ.get("OF_START"), os.environ.get("OF_BEGIN"), *own_ports))


def begin_another(sender):  # as SGLang's controller of copies
    receiver, of_child = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=tell, args=(of_child,))
    process.start()
    sender.send((os.getpid(), process.pid == receiver.recv()[0]))
    process.join()


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    waiting = ahead.Ahead(modules=("json", ahead.CONTROLLER))
    waiting.begin([1, 0, 0, 0], {"OF_BEGIN": "ahead"})
    processes = [process for process, _ in waiting.waiting]
    os.environ["OF_START"] = "then"
    said = []
    with waiting:
        for target in (begin_another, tell):
            taken = multiprocessing.Process(target=target, args=(sender,))
            taken.start()
            pid, *rest = receiver.recv()
            said.append([taken in processes, pid == taken.pid, *rest])
            taken.join()
            said[-1].append(taken.exitcode)
        processes[2].kill()
        processes[2].join()
        dead = multiprocessing.Process(target=tell, args=(sender,))
        dead.start()
        said.append([dead.exitcode])
    processes[-1].join(20)  # nobody asked for it
    said.append([processes[-1].exitcode])
    fresh = multiprocessing.Process(target=tell, args=(sender,))
    fresh.start()
    said.append([fresh in processes, *receiver.recv()[1:]])
    fresh.join()
    print(json.dumps(said))
"""


def test_processes_that_wait_do_the_work(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-P", tmp_path / "script.py", FOLDER, FOLDER.parent / "common"]
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    assert said == [
        [True, True, True, 0],
        [True, True, "then", None, "taken", 0],
        [-9],
        [0],
        [False, "then", None],
    ]


@pytest.mark.parametrize(
    ("flags", "gpus", "children"),
    [({}, 1, [0, 0]), ({}, 4, [4, 0]), ({"tp_size": 2}, 2, [0, 0, 0]), ({"tp_size": 2}, 4, [4, 0])],
)
def test_as_many_as_the_engine_asks_for(monkeypatch, flags, gpus, children):
    monkeypatch.setenv("SGLANG_NUMA_BIND_V2", "0")
    begun = []
    waiting = SimpleNamespace(begin=lambda counts, variables: begun.append((counts, variables)))
    machine = Machine("cuda", gpus=gpus, compiler={"CUDA_HOME": "/cuda"})
    ahead.begin(waiting, Arguments(**flags), machine)
    assert begun == [(children, {"CUDA_HOME": "/cuda", "HF_HUB_OFFLINE": "1"})]


def test_garbage_is_collected_again_after_imports_that_fail():
    @importing()
    def fail() -> None:
        assert not gc.isenabled()
        raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_imports_leave_out_what_nothing_here_calls(transformers):
    from transformers.generation import candidate_generator

    assert not candidate_generator.is_sklearn_available()
    assert not hasattr(candidate_generator, "roc_curve")


def test_none_where_they_are_forked_or_not_needed():
    waiting = Ahead()
    ahead.begin(waiting, Arguments(device="cpu"), Machine("cpu"))
    ahead.begin(waiting, Arguments(preflight_only=True), Machine("cuda", gpus=1))
    ahead.begin(waiting, Arguments(engine_args='{"enable_memory_saver": true}'), Machine("cuda", gpus=1))
    assert not waiting.waiting


def test_weights_are_read_where_they_fit_into_memory_and_are_not_there_yet(monkeypatch, tmp_path):
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(2**25 + number))
    (tmp_path / "blob").write_bytes(bytes(2**25))
    (tmp_path / "model-00003.safetensors").symlink_to("blob")  # as in the hub's cache

    def so_far() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    def bytes_read(folder: Path) -> int:
        before, thread = so_far(), ahead.read_weights(folder)
        if thread:
            thread.join(20)
        return so_far() - before

    assert 3 * 2**25 <= bytes_read(tmp_path) < 3 * 2**25 + 2**20
    monkeypatch.setattr(ahead, "PIECES", 1)
    monkeypatch.setattr(ahead, "MEMORY_RATE", 1)  # what comes faster is in memory
    assert 3 * 2**24 <= bytes_read(tmp_path) < 3 * 2**24 + 2**20
    monkeypatch.setattr(ahead, "memory_limit_gib", lambda: (2 * 3 * 2**25 / 2**30, "a test"))
    assert bytes_read(tmp_path) < 2**20
