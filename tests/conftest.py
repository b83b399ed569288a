"""Real DeepSpeed on CPU ranks, quickly: this process imports the libraries once and every run is forked.

Nothing here may start a thread or compute with torch in this process: children are forked from it.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Our folders deepspeed/ and sglang/ must not shadow the installed packages (python -m pytest puts the
# current folder on the path).
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for name in ("STOP_FILE", "GPU_MEMORY_CAP_GIB", "SLURM_JOB_END_TIME"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repository", deadline=None, database=None, max_examples=50)
settings.load_profile("repository")


def pytest_collection_modifyitems(items):
    """Quick files first, so that a slip shows in seconds."""
    slow = ("test_training", "test_resume", "test_launcher")
    items.sort(key=lambda item: item.path.stem in slow)


@dataclass
class Process:
    """A forked program: its pid and the file that its terminal output goes to."""

    pid: int
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, timeout_s: float = 240) -> tuple[int, str]:
        """(exit code, output); a signal's number is negative, as in subprocess."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), self.text()
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"no end after {timeout_s} s:\n{self.text()[-3000:]}")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Returns once `condition()` holds; fails the test if the program ends or takes too long first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            assert not ended, f"ended early ({status}):\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.text()[-3000:]}"
            time.sleep(0.005)


def fork(function: Callable[[], int], output: Path, env: dict[str, str] | None = None) -> Process:
    """Runs `function` in a forked child in a session of its own; it exits with the returned code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output)
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update(env or {})
        code = function()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session")
def libraries():
    """Imports what a run needs, once per session (20 s of CPU time)."""
    import lora_sft.training
    import main

    return main


@pytest.fixture
def start(libraries, tmp_path):
    """start(*flags, env=None) -> Process: deepspeed/main.py with these flags, forked."""
    numbers = iter(range(1000))

    def run(*flags: str, env: dict[str, str] | None = None) -> Process:
        argv = [str(flag) for flag in flags]
        return fork(lambda: libraries.main(argv), tmp_path / f"terminal-{next(numbers)}.txt", env)

    return run


@pytest.fixture(scope="session")
def tiny_model(scratch, libraries) -> Path:
    """The rehearsal's Llama, as a folder."""
    sys.path.insert(0, str(ROOT / "rehearsal"))
    from tiny_model import build_llama

    def build() -> int:
        build_llama(scratch / "tiny_llama")
        return 0

    code, text = fork(build, scratch / "build.txt").wait()
    assert code == 0, text
    return scratch / "tiny_llama"


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    from lora_sft.data import set_up_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    set_up_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def quick(tiny_model) -> list[str]:
    """Flags of a rehearsal that trains 6 short steps."""
    return [
        *("--rehearse", "--model_name_or_path", str(tiny_model), "--max_train_rows", "40", "--max_eval_rows", "6"),
        *("--max_seq_len", "192", "--tokens_per_micro_batch", "192", "--max_steps", "6", "--save_steps", "2"),
    ]
