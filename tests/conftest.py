"""Fixtures. Real DeepSpeed on CPU ranks, quickly: every run is forked from this process (harness.py)."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from harness import ROOT, Process, fork

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

settings.register_profile("repository", deadline=None, database=None, max_examples=50)
settings.load_profile("repository")


def pytest_collection_modifyitems(items):
    """Quick files first, so that a slip shows in seconds."""
    slow = ("test_training", "test_resume", "test_launcher")
    items.sort(key=lambda item: item.path.stem in slow)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session")
def libraries():
    """Imports what a run needs, once per session (20 s of CPU time)."""
    # The last ones are otherwise imported in every forked rank, at the first step.
    import main
    import matplotlib.pyplot  # noqa: F401
    import networkx  # noqa: F401
    import torch._dynamo  # noqa: F401

    import lora_sft.training  # noqa: F401

    return main


@pytest.fixture
def start(libraries, tmp_path):
    """start(*flags, env=None, patch=None) -> Process: deepspeed/main.py with these flags, forked; `patch()`
    runs in the child first, to observe or to break something there."""
    numbers = iter(range(1000))

    def run(*flags, env: dict[str, str] | None = None, patch: Callable[[], None] | None = None) -> Process:
        def program() -> int:
            if patch:
                patch()
            return libraries.main([str(flag) for flag in flags])

        return fork(program, tmp_path / f"terminal-{next(numbers)}.txt", env)

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
    from transformers import AutoTokenizer

    from lora_sft.data import set_up_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    set_up_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def quick(tiny_model) -> list[str]:
    """Flags of a rehearsal that trains 6 short steps."""
    return [
        *(
            "--rehearse",
            "--model_name_or_path",
            str(tiny_model),
            "--max_train_rows",
            "40",
            "--max_eval_rows",
            "6",
        ),
        *("--max_seq_len", "192", "--tokens_per_micro_batch", "192", "--max_steps", "6", "--save_steps", "2"),
    ]
