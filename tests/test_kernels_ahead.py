"""Kernels built ahead: which, where, and by a process that needs no GPU."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from batch_infer import kernels, machine, preflight, start
from batch_infer.arguments import FOLDER, Arguments
from batch_infer.kernels import Modules
from harness import fork
from workbench import UserError

QWEN_7B = SimpleNamespace(
    config={"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "torch_dtype": "bfloat16"}
)
LLAMA_7B = SimpleNamespace(config={"num_attention_heads": 32, "hidden_size": 4096, "dtype": "float32"})
FAST = Modules(
    "9.0", "bfloat16", head_size=128, heads=28, kv_heads=4, gpus=1, deterministic=False, attention=True
)
NAMES = """
import json, sys
sys.path.append(sys.argv[1])
from batch_infer import kernels
for fields in json.loads(sys.argv[2]):
    print(json.dumps(sorted(kernels.of_flashinfer(kernels.Modules(**fields)))))
"""


@pytest.fixture
def in_a_process(monkeypatch, tmp_path):
    """Runs a script with our packages at hand, as `begin` does: for a GPU that is not there."""
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = FOLDER

    def run(script: str, *words: object) -> list[str]:
        command = [sys.executable, "-P", "-c", script, folder, *map(str, words)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()

    return run


def test_a_run_names_what_its_modules_depend_on(monkeypatch):
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    assert kernels.needed(Arguments(fast=True), QWEN_7B, 1, "9.0") == FAST
    assert kernels.needed(Arguments(), QWEN_7B, 1, "9.0") == replace(FAST, deterministic=True)
    assert kernels.needed(Arguments(fast=True), QWEN_7B, 2, "9.0") == replace(
        FAST, heads=14, kv_heads=2, gpus=2
    )
    llama = kernels.needed(Arguments(), LLAMA_7B, 1, "8.0")
    assert (llama.dtype, llama.kv_heads, llama.head_size, llama.architecture) == ("float16", 32, 128, "8.0")
    own = Arguments(engine_args='{"attention_backend": "triton", "dtype": "half"}')
    assert not kernels.needed(own, QWEN_7B, 1, "9.0").attention
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")  # FlashInfer in the engine goes by it, too
    assert kernels.needed(Arguments(), QWEN_7B, 1, "8.0").architecture == "9.0a"


def test_a_start_builds_for_the_gpus_that_were_found(monkeypatch):
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    begun, on = [], machine.Machine("cuda", capability=(9, 0))
    monkeypatch.setattr(kernels, "begin", lambda modules, folder: begun.append((modules, folder)))
    start.build_kernels(Arguments(fast=True), SimpleNamespace(values={"tp_size": 1}), QWEN_7B, on)
    assert begun == [(FAST, machine.kernel_cache())]


def test_the_modules_are_those_of_the_profile(in_a_process):
    cases = (
        replace(FAST, deterministic=True),
        FAST,
        replace(FAST, heads=32, kv_heads=32),
        replace(FAST, attention=False),
    )
    fields = json.dumps([vars(modules) for modules in cases])
    default, fast, many_heads, other = (json.loads(line) for line in in_a_process(NAMES, fields))
    kind = "dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0"
    prefill = f"batch_prefill_with_kv_cache_{kind}_use_swa_False_use_logits_cap_False_f16qk_False"
    assert default == [prefill, "norm"]
    assert fast == default
    assert set(many_heads) - set(fast) == {
        f"batch_decode_with_kv_cache_{kind}_use_swa_False_use_logits_cap_False"
    }
    assert other == ["norm"]


def test_all_are_built_at_once_and_one_that_fails_is_told(runtime, tmp_path):
    together, mark = threading.Barrier(3, timeout=60), tmp_path / "built"

    def fails() -> None:
        together.wait()
        raise RuntimeError("nvcc said\nno")

    def target() -> None:
        from sglang.kernels.jit.utils.arch import get_jit_cuda_arch

        together.wait()
        assert os.environ["TVM_FFI_CUDA_ARCH_LIST"] == get_jit_cuda_arch().target_name == "9.0a"

    def build(second: Callable) -> int:
        os.sched_getaffinity = lambda _: range(8)
        kernels.of_flashinfer = lambda modules: {"one": together.wait, "two": second}
        kernels.of_sglang = lambda modules: {"three": target}
        return kernels.main([json.dumps(vars(FAST)), str(mark)])

    code, text = fork(lambda: build(fails), tmp_path / "first.txt").wait()
    assert (code, mark.exists()) == (1, True), text
    assert "could not be built two: no" in text.splitlines()
    mark.unlink()
    code, text = fork(lambda: build(together.wait), tmp_path / "second.txt").wait()
    assert (code, mark.exists()) == (0, True), text


def test_what_is_built_is_not_looked_at_again(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: begun.append((command, env)))
    kernels.begin(FAST, tmp_path)
    (command, environment) = begun.pop()
    assert Modules(**json.loads(command[-2])) == FAST
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["FLASHINFER_CUDA_ARCH_LIST"]) == ("", "9.0")
    (tmp_path / command[-1]).touch()
    assert kernels.begin(FAST, tmp_path) is None
    assert not begun
    kernels.begin(replace(FAST, deterministic=True), tmp_path)
    monkeypatch.setenv("FLASHINFER_EXTRA_CUDAFLAGS", "-lineinfo")
    kernels.begin(FAST, tmp_path)
    assert len({command[-1], *(other[-1] for other, _ in begun)}) == 3


def test_a_login_node_builds_where_it_can(monkeypatch, tmp_path):
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(machine, "look_at_kernel_tools", lambda args: ({}, ""))
    args, begun = Arguments(download_only=True, gpu="h100", fast=True), []
    process = SimpleNamespace(wait=lambda: 0, args=["/cache/built-1"])
    monkeypatch.setattr(kernels, "begin", lambda modules, folder: begun.append(modules) or process)
    assert preflight.build_kernels(args, QWEN_7B) == "built for h100"
    assert begun == [FAST]  # as a run on an H100 asks for them
    process.wait = lambda: 1
    assert preflight.build_kernels(args, QWEN_7B).startswith(
        "WARN: some could not be built for h100, see /cache/"
    )

    def no_tools(args):
        raise UserError("g++ is not on the PATH")

    monkeypatch.setattr(machine, "look_at_kernel_tools", no_tools)
    assert preflight.build_kernels(args, QWEN_7B) == "SKIP: g++ is not on the PATH"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_without_a_driver_kernels_are_linked_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    driver = machine.driver_library(tmp_path)
    (tmp_path / "uses.cpp").write_text('extern "C" int cuInit(unsigned); int f() { return cuInit(0); }')
    (tmp_path / "libcuda.so").symlink_to(driver)
    linked = tmp_path / "uses.so"
    command = [
        "g++",
        "-shared",
        "-fPIC",
        tmp_path / "uses.cpp",
        f"-L{tmp_path}",
        "-Wl,--no-as-needed",
        "-lcuda",
    ]
    subprocess.run([*command, "-o", linked], check=True)
    assert b"libcuda.so.1\0" in linked.read_bytes()
