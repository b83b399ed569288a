"""Fixtures. Real DeepSpeed and the real SGLang Runtime on the CPU, quickly: every run is forked from this
process (harness.py)."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from harness import ROOT, Process, fork
from workbench.processes import importing

# Our folders deepspeed/ and sglang/ must not shadow the installed packages (python -m pytest puts the
# current folder on the path).
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]

# What a test that needs a GPU gives its own process: there are none in this one.
os.environ.setdefault("GPUS_FOR_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # What run_sglang.py sets on the CPU: SGLang reads it at import, which happens here once.
    "SGLANG_PLATFORM": "plain_cpu",
    "RUNTIME_PLUGINS": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_INTERPRET": "1",  # Triton decides when it is imported
    "TORCH_LOGS": "-torch.utils.cpp_extension",
}
for name in list(os.environ):
    if name in ("STOP_FILE", "GPU_MEMORY_CAP_GIB", "NNODES") or name.startswith("SLURM"):
        del os.environ[name]

settings.register_profile("repository", deadline=None, database=None, max_examples=50)
settings.load_profile("repository")


def pytest_collection_modifyitems(items):
    """The longest files first, so that the two workers of `make test`, which take a file each, end together."""
    longest = ("test_training", "test_resume", "test_inference", "test_jump_forward", "test_radix_lab")
    items.sort(key=lambda item: item.path.stem not in longest)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session")
@importing()
def transformers():
    """Imports what every run needs, once per worker."""
    import matplotlib.pyplot  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401


@pytest.fixture(scope="session")
@importing()
def libraries(transformers):
    """Imports what fine-tuning needs. The last ones are otherwise imported in every rank, at its first step."""
    import main
    import networkx  # noqa: F401
    import torch._dynamo  # noqa: F401

    import lora_sft.train  # noqa: F401

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


def _build(scratch: Path, name: str) -> Path:
    sys.path.insert(0, str(ROOT / "rehearsal"))
    import tiny_model

    def build() -> int:
        {"tiny_llama": tiny_model.build_llama, "tiny_qwen2": tiny_model.build_qwen2}[name](scratch / name)
        return 0

    code, text = fork(build, scratch / f"{name}.txt").wait()
    assert code == 0, text
    return scratch / name


@pytest.fixture(scope="session")
def tiny_model(scratch, transformers) -> Path:
    """The rehearsal's Llama, as a folder."""
    return _build(scratch, "tiny_llama")


@pytest.fixture(scope="session")
def tiny_qwen2(scratch, transformers) -> Path:
    """The rehearsal's Qwen2, as a folder."""
    return _build(scratch, "tiny_qwen2")


@pytest.fixture(scope="session")
@importing()
def runtime(transformers, tiny_qwen2):
    """Imports SGLang, whose processes are forked from here on."""
    import run_sglang
    import xgrammar  # noqa: F401

    from batch_infer.start import fork_engine_processes

    fork_engine_processes(str(tiny_qwen2))
    return run_sglang


@pytest.fixture(scope="session")
def run_inference(runtime, tiny_qwen2, tmp_path_factory):
    """run_inference(*flags, patch=None) -> Process: sglang/run_sglang.py --rehearse with these flags."""
    terminals = tmp_path_factory.mktemp("terminals")
    numbers = iter(range(1000))

    def run(*flags, patch: Callable[[], None] | None = None) -> Process:
        def program() -> int:
            if patch:
                patch()
            words = [str(flag) for flag in flags]
            if "--model_path" not in words and "--lora_path" not in words:
                words += ["--model_path", str(tiny_qwen2)]
            return runtime.main(["--rehearse", *words])

        return fork(program, terminals / f"{next(numbers)}.txt")

    return run


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


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """12 of the shipped instructions, two of them the same."""
    rows = json.loads((ROOT / "rehearsal" / "instructions.json").read_text())[:11]
    path = tmp_path_factory.mktemp("prompts") / "few.json"
    path.write_text(json.dumps([*rows, rows[0]]))
    return path


@pytest.fixture(scope="session")
def flags(few) -> list:
    """Of an inference run over `few` that takes seconds."""
    return ["--prompts", few, "--max_new_tokens", 32, "--max_running_requests", 4]


@pytest.fixture(scope="session")
def uninterrupted_inference(run_inference, flags, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed, with what it printed in terminal.txt."""
    out = tmp_path_factory.mktemp("uninterrupted")
    code, text = run_inference(*flags, "--output_file", out / "outputs.jsonl").wait()
    assert code == 0, text
    (out / "terminal.txt").write_text(text)
    return out


@pytest.fixture(scope="session")
def adapter(libraries, quick, tmp_path_factory) -> Path:
    """Trained by the fine-tuning program of this repository."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    flags = [*quick, "--learning_rate", "0.02", "--output_dir", str(out)]
    code, text = fork(lambda: libraries.main(flags), out.parent / "terminal.txt").wait()
    assert code == 0, text
    return out
