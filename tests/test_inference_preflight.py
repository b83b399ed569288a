"""What stops a run before the engine starts: one line with what was found and the cure, exit code 2."""

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_infer import adapters, engine_args, machine, model, preflight, store
from batch_infer.arguments import Arguments
from batch_infer.prompts import Record
from harness import ROOT, answers, fork
from workbench import UserError, files, models
from workbench.machine import Gpu, explain_no_cuda, visible_gpus

H200 = Gpu("NVIDIA H200", memory_gib=140.4, free_gib=139.9, capability=(9, 0), bandwidth=4.9e12, flops=1e15)
V100 = replace(H200, name="Tesla V100-SXM2-16GB", memory_gib=15.8, free_gib=15.5, capability=(7, 0))

# --- GPUs ---------------------------------------------------------------------------------------------


def test_good_gpus(monkeypatch):
    monkeypatch.setattr(machine, "ask_for_gpus", lambda: (H200, replace(H200, memory_gib=140.0, link=4e11)))
    monkeypatch.setattr(machine, "driver_version", lambda: "580.95.05")
    found, text = machine.look(Arguments())
    assert (found.gpus, found.memory_gib, found.bandwidth, found.link) == (2, 140.0, 4.9e12, 4e11)
    assert found.capability == (9, 0)
    assert text == "2 x NVIDIA H200, 140.0 GiB, driver 580.95.05"


@pytest.mark.parametrize(
    ("gpus", "flags", "expected"),
    [
        ([V100], {}, "V100-SXM2-16GB, has compute capability 7.0 and SGLang needs 8.0; ask Slurm for an A100"),
        ([replace(H200, free_gib=60.0)], {}, "GPU 0: 60.0 of 140.4 GiB free, another process holds it"),
        ([H200, replace(H200, free_gib=5.0)], {}, "GPU 1: 5.0 of 140.4 GiB free"),
        ([H200], {"tp_size": 2}, "--tp_size 2 --dp_size 1: 2 GPUs needed, 1 visible"),
    ],
)
def test_gpus_that_cannot_be_used(monkeypatch, gpus, flags, expected):
    """The CPU is never a fallback: a GPU that torch cannot use stops the run."""
    monkeypatch.setattr(machine, "ask_for_gpus", lambda: tuple(gpus))
    with pytest.raises(UserError, match=expected):
        machine.look(Arguments(**flags))


def test_a_copy_over_two_nodes_needs_half_of_its_gpus_on_each(monkeypatch):
    monkeypatch.setattr(machine, "ask_for_gpus", lambda: (H200,) * 4)
    nodes = '{"nnodes": 2, "node_rank": 1}'
    assert machine.look(Arguments(tp_size=8, engine_args=nodes))[0].memory_gib == 140.4
    with pytest.raises(UserError, match="8 GPUs needed, 4 visible"):
        machine.look(Arguments(tp_size=16, engine_args=nodes))


def test_a_shared_gpu_is_a_warning_where_the_pool_is_bounded(monkeypatch):
    monkeypatch.setattr(machine, "ask_for_gpus", lambda: (replace(H200, free_gib=60.0),))
    found, text = machine.look(Arguments(engine_args='{"max_total_tokens": 1000}'))
    assert found.gpus == 1
    assert text.startswith("WARN: ")


def test_gpus_are_asked_for_in_a_process_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "driver_version", lambda: "580.95.05")
    monkeypatch.setattr(machine, "visible_gpus", lambda *given: asked.append(given) or (H200, V100))
    assert machine.ask_for_gpus() == (H200, V100)
    assert not asked

    def explain(older_driver: str, gpus: int):
        raise UserError(f"{gpus} asked for; {older_driver}")

    monkeypatch.setattr(machine, "visible_gpus", explain)
    with pytest.raises(UserError, match=r"^1 asked for; ask for a node with a newer driver"):
        machine.ask_for_gpus()


def test_torch_says_what_the_gpus_are(monkeypatch):
    import torch

    names = ("memory_clock_rate", "memory_bus_width", "clock_rate", "multi_processor_count", "total_memory")
    assert {"name", "major", "minor", *names} <= set(dir(torch._C._CudaDeviceProperties))
    h200 = dict(zip(names, (3_201_000, 6144, 1_980_000, 132, 64 * 2**30), strict=True))  # kHz, bits, kHz
    cards = [SimpleNamespace(name=f"card {i}", major=9, minor=0, **h200) for i in range(2)]
    for name, answer in {
        **{"is_available": lambda: True, "init": lambda: None, "device_count": lambda: 2},
        **{"get_device_properties": cards.__getitem__, "mem_get_info": lambda _: (63 * 2**30, 64 * 2**30)},
        "can_device_access_peer": lambda *pair: pair != (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    found = visible_gpus("", 1)
    assert [gpu.name for gpu in found] == ["card 0", "card 1"]
    assert (found[1].memory_gib, found[1].free_gib, found[1].capability) == (64, 63, (9, 0))
    assert found[1].link == 0
    assert found[1].bandwidth == pytest.approx(4.9e12, rel=0.01)
    assert found[1].flops == pytest.approx(1.07e15, rel=0.01)


def test_a_driver_too_old_for_torch(monkeypatch):
    """torch counts the GPUs that such a driver lists, and cannot use them."""
    import torch

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr("workbench.machine.driver_version", lambda: "570.124.06")
    with pytest.raises(UserError, match=r"driver 570.124.06 is too old for torch .* 580 or newer\); the cure"):
        visible_gpus("the cure", 1)


def test_each_program_asks_slurm_for_as_many_gpus_as_it_wants(monkeypatch):
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    with pytest.raises(
        UserError, match=r"no NVIDIA GPU here; ask for one \(srun --gres=gpu:1 \.\.\.\), or try"
    ):
        machine.look(Arguments())
    assert "srun --gres=gpu:2 ..." in explain_no_cuda(None, None, "", "", gpus=2)


# --- the compiler -------------------------------------------------------------------------------------


def nvcc(folder: Path, release: str) -> str:
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "nvcc"
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    script.chmod(0o755)
    return str(folder)


@pytest.fixture
def tools(monkeypatch, tmp_path) -> Path:
    """A folder for kernels, every tool on the PATH, and nvcc of CUDA 13."""
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", nvcc(tmp_path / "13", "13.2"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def test_an_nvcc_of_torchs_version_is_used(tools):
    compiler, text = machine.look_at_kernel_tools(Arguments())
    assert compiler == {}
    assert f"nvcc of CUDA 13 in {tools}/13" in text


def test_another_nvcc_is_replaced_by_the_wheels(monkeypatch, tools):
    """And that is said."""
    monkeypatch.setenv("CUDA_HOME", nvcc(tools / "12", "12.4"))
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    monkeypatch.setattr(machine, "driver_library", lambda folder: tools / "libcuda.so.580")
    compiler, text = machine.look_at_kernel_tools(Arguments())
    assert "the wheel's own (CUDA_HOME was " in text
    assert machine.nvcc_major(compiler["CUDA_HOME"]) == 13
    assert compiler["LIBRARY_PATH"].startswith(f"{tools}/.cache/cuda-libraries/")
    assert compiler["LIBRARY_PATH"].endswith(":/elsewhere")


def test_missing_kernel_tools_are_told(monkeypatch, tools):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else name)
    with pytest.raises(UserError, match=r"g\+\+ is not on the PATH .*module load gcc"):
        machine.look_at_kernel_tools(Arguments())
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tools / "file").touch()
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tools / "file"))
    with pytest.raises(UserError, match=r"kernels cannot be stored there .* set LLM_STORAGE"):
        machine.look_at_kernel_tools(Arguments())


def test_runs_that_begin_together_share_the_kernel_cache(monkeypatch, tools):
    monkeypatch.setattr(machine, "nvcc_major", lambda home: 13)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: machine.look_at_kernel_tools(Arguments()), range(200)))
    assert not list((tools / ".cache" / "flashinfer").iterdir())


def test_kernels_compiled_by_others_are_refused(monkeypatch, tools):
    """FlashInfer would load them whatever flags we set."""
    monkeypatch.syspath_prepend(tools)
    (tools / "flashinfer_jit_cache.py").touch()
    with pytest.raises(UserError, match=r"pip uninstall flashinfer-jit-cache\), or take --fast"):
        machine.look_at_kernel_tools(Arguments())
    for flags in ({"fast": True}, {"engine_args": '{"attention_backend": "triton"}'}):
        assert machine.look_at_kernel_tools(Arguments(**flags))


# --- the wheels' compiler -----------------------------------------------------------------------------

WHEELS_CUDA = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0]) / "cu13"
PROBE = """
#include <cooperative_groups/reduce.h>
#include <cuda.h>
#include <cuda/std/type_traits>
__global__ void kernel() {}
int probe() { kernel<<<1, 1>>>(); return cuInit(0) + cudaDeviceSynchronize(); }
"""
BUILD = """
import sys
from flashinfer.jit.core import gen_jit_spec
spec = gen_jit_spec("probe", [sys.argv[1]])
spec.build(verbose=False)
print(spec.jit_library_path)
"""
RESCALE = "__global__ void kernel(float* x, float m, float s) { x[0] = exp2f(x[1] * s - m * s); }\n"


def output_of(*words: object, env: dict[str, str] | None = None) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_machines_driver_has_links_of_its_own(tmp_path):
    for _ in range(2):  # the second time its links are there
        here = machine.compiler_of_wheels(WHEELS_CUDA, Path("/here/libcuda.so.1"), tmp_path / "links")
    other = machine.compiler_of_wheels(WHEELS_CUDA, Path("/elsewhere/libcuda.so.2"), tmp_path / "links")
    assert other["LIBRARY_PATH"] != here["LIBRARY_PATH"]
    with pytest.raises(UserError, match=r"no libcudart\.so in"):
        machine.compiler_of_wheels(tmp_path, Path("/here/libcuda.so.1"), tmp_path / "links")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_wheels_compile_flashinfers_kernels(tmp_path):
    """On a machine without a CUDA toolkit: nvcc, its headers and those FlashInfer ships must be of one version, and
    the linker must find the runtime and the driver."""
    driver = tmp_path / "libcuda.so.1"
    (tmp_path / "driver.cpp").write_text('extern "C" int cuInit(unsigned) { return 0; }')
    output_of("g++", "-shared", tmp_path / "driver.cpp", "-o", driver, f"-Wl,-soname,{driver.name}")
    (tmp_path / "probe.cu").write_text(PROBE)
    variables = machine.compiler_of_wheels(WHEELS_CUDA, driver, tmp_path / "links") | engine_args.environment(
        Arguments()
    )
    variables |= {"FLASHINFER_WORKSPACE_BASE": str(tmp_path), "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
    built = output_of(sys.executable, "-P", "-c", BUILD, tmp_path / "probe.cu", env=variables)
    needed = output_of("ldd", built.split()[-1])
    assert "libcuda.so.1" in needed
    assert "libcudart.so.13" in needed
    (ninja,) = tmp_path.rglob("probe/build.ninja")
    flags = re.findall(r"-use_fast_math|-fmad=false", ninja.read_text())
    assert flags[-1] == "-fmad=false"


def test_an_unchanged_maximum_scales_by_exactly_1(tmp_path):
    """No product of FlashInfer's prefill goes unrounded into an addition (engine_args.environment)."""
    (tmp_path / "rescale.cu").write_text(RESCALE)
    for flags, fused in ((["-use_fast_math"], True), (["-use_fast_math", "-fmad=false"], False)):
        words = [*flags, "-arch=sm_90a", "-cubin", tmp_path / "rescale.cu", "-o", tmp_path / "rescale.cubin"]
        output_of(WHEELS_CUDA / "bin" / "nvcc", *words)
        listing = output_of(WHEELS_CUDA / "bin" / "nvdisasm", tmp_path / "rescale.cubin")
        assert ("FFMA" in listing) == fused, listing


# --- packages -----------------------------------------------------------------------------------------

PLUGIN_FILES = [*sorted(path.name for path in preflight.PLUGINS.glob("*.py")), "pyproject.toml"]


@pytest.fixture
def make_is_needed(monkeypatch, tmp_path) -> Callable[[], bool]:
    """In a checkout that was just installed (the folder of its plugins is preflight.PLUGINS): whether `make install`
    would do anything."""
    plugins = tmp_path / "sglang" / "runtime_plugins"
    plugins.mkdir(parents=True)
    for name in PLUGIN_FILES:
        shutil.copy(preflight.PLUGINS / name, plugins)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "env.sh").write_text('install_environment() { mkdir -p "$1"; touch "$1/.installed"; }\n')
    subprocess.run(["make", "--silent", "install", "REAL_MODEL=no"], cwd=tmp_path, check=True)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))  # whatever comes now is newer
    monkeypatch.setattr(preflight, "PLUGINS", plugins)
    return lambda: subprocess.run(["make", "--question", "install"], cwd=tmp_path).returncode == 1


def test_what_is_installed_stays(make_is_needed):
    (preflight.PLUGINS / "__pycache__").mkdir()
    assert "sglang 0.5.17" in preflight.look_at_packages()
    assert not make_is_needed()


@pytest.mark.parametrize("name", [*PLUGIN_FILES, "added.py", "removed"])
def test_a_plugin_of_another_version_is_noticed_and_make_install_mends_it(make_is_needed, name):
    path = preflight.PLUGINS / name
    if name == "removed":
        (preflight.PLUGINS / "fused_norm.py").unlink()
    elif name == "added.py":
        path.touch()
    else:
        path.write_text(path.read_text().replace(":register", ":another") + "\n")
    with pytest.raises(UserError, match=r"another version; run `make install` \(or pip install --no-deps"):
        preflight.look_at_packages()
    assert make_is_needed()


def test_missing_plugins(monkeypatch):
    found = importlib.metadata.distribution

    def missing(name: str):
        if name == "assignment-runtime-plugins":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match="runtime_plugins is not installed; run `make install`"):
        preflight.look_at_packages()


def test_engine_args_are_checked_in_a_process_of_their_own(monkeypatch):
    """SGLang's import initialises CUDA, after which no fork may use it."""

    def check(own: dict) -> None:
        raise UserError(f"{own} in {os.getpid()}")

    monkeypatch.setattr(engine_args, "check_own", check)
    with pytest.raises(UserError, match=r"^\{'page_size': 1\} in ") as error:
        preflight.look_at_engine_args({"page_size": 1})
    assert not str(error.value).endswith(f" {os.getpid()}")


# --- models and adapters ------------------------------------------------------------------------------

CONFIG = {
    **{"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 64, "model_type": "qwen2"},
}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 4400000\n"
LAYER = "base_model.model.model.layers."


def write_tensors(path: Path, shapes: dict[str, list[int]], kind: str = "F32", value: bytes = bytes(4)) -> None:
    header, data = {}, b""
    for name, shape in shapes.items():
        end = len(data) + math.prod(shape) * len(value)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), end]}
        data += value * math.prod(shape)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def adapter_of(folder: Path, settings: dict | None = None, tensors: dict | None = None, **values) -> Path:
    """`tensors` that are None are left out."""
    folder.mkdir()
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "bias": "none"}
    known["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(known | (settings or {})))
    shapes = {f"0.self_attn.{name}.lora_A": [2, 8] for name in ("q_proj", "v_proj")}
    shapes |= {"0.self_attn.q_proj.lora_B": [8, 2], "0.self_attn.v_proj.lora_B": [4, 2]}
    shapes |= {"1.mlp.down_proj.lora_A": [2, 16], "1.mlp.down_proj.lora_B": [8, 2]} | (tensors or {})
    shapes = {f"{LAYER}{name}.weight": shape for name, shape in shapes.items() if shape}
    write_tensors(folder / "adapter_model.safetensors", shapes, **values)
    return folder


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_head": 12, "vocab_size": 32}')
    with pytest.raises(UserError, match="not that of a Llama- or Qwen2-like language model"):
        model.read(tmp_path, None, "", "cpu")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model_type": "mygpt", "auto_map": {}},
            "model_type 'mygpt' is none .* code that comes with a model is never",
        ),
        ({"pad_token_id": 32}, "pad_token_id 32 is outside the embedding of 32 rows"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "the weights are quantised by bitsandbytes",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised by awq"),
    ],
)
def test_models_that_would_end_in_a_traceback(tmp_path, changes, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError, match=expected):
        model.read(tmp_path, None, "", "cpu")


def test_some_quantised_weights_are_left_to_sglangs_kernels(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "awq"}}))
    assert model.read(tmp_path, None, "", "cuda").context_tokens == 64


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 16),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, 64),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2}, 64),
        ({"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}, 64),
        ({"sliding_window": 16, "max_window_layers": 0}, 64),  # Qwen's default is off
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "llama", "sliding_window": 16}, 64),
    ],
)
def test_a_window_of_attention_limits_the_context(tmp_path, changes, context):
    """SGLang computes full attention, which is the same up to so many tokens."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    assert model.read(tmp_path, None, "", "cpu").context_tokens == context


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ("config.json", b"[]", "a JSON object is expected, this is a list"),
        ("tokenizer.json", POINTER, "tokenizer.json: a Git-LFS pointer"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        (
            "model.safetensors",
            POINTER,
            "model.safetensors: a Git-LFS pointer, not the file; run `git lfs pull`",
        ),
        ("model.safetensors", b"x" * 100, "model.safetensors: cut or damaged"),
        ("model.safetensors.index.json", b'{"metadata": {}}', "names no weight files"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "b"}}',
            "not complete: 1 of 1 weight files missing",
        ),
        ("model.safetensors", None, "not complete: 1 of 1 weight files missing, e.g. model.safetensors"),
    ],
)
def test_model_folders_that_are_not_whole(tmp_path, name, content, expected):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    write_tensors(tmp_path / "model.safetensors", {"a": [2]})
    read_folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is None:  # a purged cache
        (tmp_path / name).symlink_to("/nonexistent/blob")
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_folder(tmp_path)


def read_folder(folder: Path) -> None:
    models.check_model_folder(folder)
    models.check_config(folder)


@pytest.mark.parametrize("name", ["Llama 2 7b", "../Qwen2-tiny/", "saves/qwen/tiny"])
def test_a_name_that_no_hub_has(name):
    with pytest.raises(
        UserError, match=f"--model_path {name}: neither a file or folder here nor a valid model id"
    ):
        models.find_model(name, "--model_path", "program")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
NAMES = {
    "config.json": (*CONFIG, "pad_token_id", "auto_map", "quantization_config", "head_dim", "sliding_window")
    + ("use_sliding_window", "layer_types", "max_window_layers"),
    "model.safetensors.index.json": ("weight_map",),
    "adapter_config.json": (
        "r",
        "lora_alpha",
        "target_modules",
        "peft_type",
        "bias",
        "base_model_name_or_path",
    ),
    "tokenizer.json": ("model", "added_tokens", "version"),
    "added_tokens.json": ("<pad>",),
}


@given(st.sampled_from(sorted(NAMES)), st.data())
def test_whatever_a_folders_json_says_is_read_or_refused(name, data):
    """One line, never another exception."""
    some = st.dictionaries(st.sampled_from(NAMES[name]), JSON, max_size=2)
    change = data.draw(some | JSON | st.binary(max_size=40))
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder), adapter_of(Path(folder) / "a")
        write_tensors(base / "model.safetensors", {"a": [2]})
        files = (
            {"config.json": CONFIG, "tokenizer.json": {}}
            if name != "tokenizer.json"
            else {"config.json": CONFIG}
        )
        for file, content in (
            files | {"model.safetensors.index.json": {"weight_map": {"a": "model.safetensors"}}}
        ).items():
            (base / file).write_text(json.dumps(content))
        target = (adapter if name.startswith(("a", "t")) else base) / name
        known = json.loads(target.read_text()) if target.exists() else {}
        change = known | change if isinstance(change, dict) else change
        target.write_bytes(change if isinstance(change, bytes) else json.dumps(change).encode())
        refusal = ""
        try:
            models.check_model_folder(base)
            if name == "config.json":
                (base / "tokenizer.json").unlink()
                model.read(base, None, "", "cpu")
            adapters.check(adapter, CONFIG)
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal


def test_sizes_are_those_of_the_published_model(tmp_path):
    qwen_7b = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
    }
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(qwen_7b | heads))
    found = model.read(tmp_path, None, "", "cpu")
    assert found.weight_bytes == pytest.approx(2 * 7_615_616_512, rel=1e-4)  # without biases and norms
    assert found.weight_bytes - found.streamed_bytes == 2 * 152064 * 3584
    assert found.kv_bytes_per_token == 57_344


def test_good_adapter(tmp_path):
    adapters.check(adapter_of(tmp_path / "a"), CONFIG)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": True}, "DoRA is not served by SGLang"),
        ({"use_rslora": True}, "rsLoRA would be served with the wrong scale"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not served"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not served"),
        ({"lora_bias": True}, "lora_bias is not served"),
        ({"something_new": 1}, "something_new is not served by SGLang"),
        ({"bias": "all"}, "bias 'all' is not served"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not served"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"r": 4}, r"has shape \[2, 8\]; r 4 and this model's 2 layers want \[4, 8\]"),
        (
            {"target_modules": "^(q|v|down)_proj$"},
            r'is no list .* those of \["down_proj", "q_proj", "v_proj"\]: write',
        ),
        ({"target_modules": ["q_proj", "v_proj"]}, "is no list of this model's projections"),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]},
            "is no list of this model's projections",
        ),
    ],
)
def test_adapters_whose_settings_are_not_served(tmp_path, settings, expected):
    with pytest.raises(UserError, match=expected):
        adapters.check(adapter_of(tmp_path / "a", settings), CONFIG)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"0.lm_head.lora_A": [2, 8]}, "lm_head.lora_A.weight is not a projection"),
        ({"0.self_attn.q_proj.lora_C": [2, 8]}, "q_proj.lora_C.weight is not a projection"),
        ({"0.self_attn.q_proj.lora_B": [32, 2]}, r"was trained on another base \(base\), .* want \[8, 2\]"),
        ({"7.self_attn.q_proj.lora_B": [8, 2]}, "this model's 2 layers want"),
        ({"0.self_attn.q_proj.lora_A": []}, "layer 0 adapts q_proj.B but not q_proj.A"),
        ({"0.self_attn.v_proj.lora_A": [], "0.self_attn.v_proj.lora_B": []}, "adapts q_proj.. but not v_proj"),
        ({"0.self_attn.q_proj.lora_A": [], "0.self_attn.q_proj.lora_B": []}, "adapts v_proj.. but not q_proj"),
        ({"1.mlp.up_proj.lora_A": [2, 8], "1.mlp.up_proj.lora_B": [16, 2]}, "up_proj.. but not gate_proj"),
    ],
)
def test_adapters_whose_tensors_do_not_fit(tmp_path, tensors, expected):
    with pytest.raises(UserError, match=expected):
        adapters.check(adapter_of(tmp_path / "a", tensors=tensors), CONFIG)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "F32", "value": struct.pack("<f", math.nan)}, "has NaN or infinite values"),
        ({"kind": "F32", "value": struct.pack("<f", -math.inf)}, "has NaN or infinite values"),
        ({"kind": "F16", "value": struct.pack("<e", math.inf)}, "has NaN or infinite values"),
        ({"kind": "BF16", "value": struct.pack("<f", math.nan)[2:]}, "has NaN or infinite values"),
        ({"kind": "BF16", "value": struct.pack("<f", -3e38)[2:]}, None),
        ({"kind": "F16", "value": struct.pack("<e", 65504.0)}, None),
        ({"kind": "U8", "value": b"a"}, "is of type U8"),
        ({"tensors": {"0.self_attn.q_proj.lora_A": [0]}}, "1 of 6 tensors are empty, as saved under ZeRO-3"),
    ],
)
def test_adapters_whose_numbers_are_none(tmp_path, values, expected):
    folder = adapter_of(tmp_path / "a", **values)
    if expected is None:
        return adapters.check(folder, CONFIG)
    with pytest.raises(UserError, match=expected):
        adapters.check(folder, CONFIG)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adapter_model.safetensors", "cut or damaged"), ("adapter_config.json", "not valid JSON")],
)
def test_an_adapter_that_cannot_be_read_costs_its_record_only(tmp_path, name, expected):
    good, bad = adapter_of(tmp_path / "good"), adapter_of(tmp_path / "bad")
    (bad / name).write_bytes((bad / name).read_bytes()[:-9])
    (bad / "added_tokens.json").write_text("{}")
    records = [Record(0, "x"), Record(1, "x", lora=str(good)), Record(2, "x", lora=str(bad))]
    checked, hashes = adapters.check_all(records, "", CONFIG)
    assert [bool(record.error) for record in checked] == [False, False, True]
    assert expected in checked[2].error
    assert set(hashes) == {str(good)}


def test_tokens_beyond_the_bases_vocabulary(tmp_path):
    folder = adapter_of(tmp_path / "a")
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 31}')
    adapters.check(folder, CONFIG)
    (folder / "added_tokens.json").write_text('{"<pad>": 32}')
    with pytest.raises(UserError, match="gives '<pad>' the id 32, the embedding has 32 rows"):
        adapters.check(folder, CONFIG)


def test_dummy_weights_with_an_adapter(tmp_path):
    folder = str(adapter_of(tmp_path / "a"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    base, records = model.read(tmp_path, None, "", "cpu"), [Record(0, "x", lora=folder)]
    (checked, hashes), text = preflight.look_at_adapters(Arguments(), base, records)
    assert (checked, hashes.keys(), text) == (records, {folder}, "1 in the records")
    with pytest.raises(UserError, match="dummy reads none"):
        preflight.look_at_adapters(Arguments(engine_args='{"load_format": "dummy"}'), base, records)


def test_a_retrained_adapter_has_another_fingerprint(tmp_path):
    folder = adapter_of(tmp_path / "a")
    args = Arguments(lora_path=str(folder))
    before = preflight.local_inputs(args)
    settings = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(settings.replace('"r": 2', '"r": 2, "lora_alpha": 64'))
    assert preflight.local_inputs(args) != before


# --- whole commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--model_path", "no-such/model"],
            "no-such/model is not complete in the cache and the hub cannot be reached",
        ),
        (
            ["--prompts", "no-such/prompts"],
            "no-such/prompts is not complete in the cache and the hub cannot be",
        ),
        (["--output_file", "/proc/nowhere/outputs.jsonl"], "--output_file /proc/nowhere: cannot be written"),
        (["--engine_args", '{"page_size": "x"}'], "--engine_args: SGLang refuses them: "),
        (["--lora_path", "."], "no adapter_config.json that names the base"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_inference, tmp_path, flags, expected):
    code, text = run_inference("--output_file", tmp_path / "outputs.jsonl", *flags).wait()
    assert code == 2, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in text


def test_a_refused_command_harms_nothing(run_inference, flags, uninterrupted_inference, tmp_path):
    """A typo in --engine_args neither claims the folder nor, with --overwrite, removes a finished run."""
    for folder in (tmp_path / "new", tmp_path / "finished"):
        if folder.name == "finished":
            shutil.copytree(uninterrupted_inference, folder)
        before = store.stored_identity(folder), sorted(path.name for path in folder.glob("o*"))
        more = [
            "--overwrite",
            "--engine_args",
            '{"quantisation": "fp8"}',
            "--output_file",
            folder / "outputs.jsonl",
        ]
        code, text = run_inference(*flags, *more).wait()
        assert code == 2, text
        assert "no argument quantisation; did you mean quantization?" in text
        assert (store.stored_identity(folder), sorted(path.name for path in folder.glob("o*"))) == before
    assert answers(tmp_path / "finished") == answers(uninterrupted_inference)


def test_files_of_another_program_are_left_alone(run_inference, tmp_path):
    (tmp_path / "summary.json").write_text('{"eval_loss_after": 1.0}')
    for flags in ([], ["--overwrite"]):
        code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl").wait()
        assert code == 2
        assert "not written by this program, or damaged" in text
    assert (tmp_path / "summary.json").exists()


def test_no_gpu_is_no_reason_for_the_cpu(runtime, tiny_qwen2, tmp_path):
    flags = ["--model_path", str(tiny_qwen2), "--output_file", str(tmp_path / "outputs.jsonl")]
    code, text = fork(lambda: runtime.main(flags), tmp_path / "terminal.txt").wait()
    assert code == 2
    assert re.search(
        "error: (no NVIDIA GPU here|an NVIDIA driver)", text
    )  # there may be one that tests do not see


def test_two_runs_in_one_folder(run_inference, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "CLAIM_TIMEOUT_S", 0.2)
    with files.claim(tmp_path, "--output_file"):
        code, text = run_inference("--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 2
    assert "another run is writing there" in text


def test_download_only_and_preflight_only_start_no_engine(run_inference, tmp_path):
    out = ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference("--download_only", *out).wait()
    assert code == 0, text
    assert "model and prompts are in the cache" in text
    code, text = run_inference("--preflight_only", *out).wait()
    assert code == 0, text
    assert text.rstrip().endswith("preflight passed")
    assert not (tmp_path / "outputs.jsonl").exists()


def test_full_hub_cache_works_offline(run_inference, tiny_qwen2, tmp_path, monkeypatch):
    """Laid out as a download of the hub: model and the data set's plain JSON."""
    from huggingface_hub import constants

    rows = tmp_path / "alpaca_eval.json"
    rows.write_text('[{"instruction": "Say something.", "output": "x"}]')
    for name, contents in (
        ("models--some--model", tiny_qwen2.iterdir()),
        ("datasets--tatsu-lab--alpaca_eval", [rows]),
    ):
        repo = tmp_path / "hub" / name
        snapshot = repo / "snapshots" / ("c0ffee" * 6)
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(snapshot.name)
        for path in contents:
            shutil.copy(path, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    flags = ["--model_path", "some/model", "--prompts", "tatsu-lab/alpaca_eval", "--preflight_only"]
    code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    assert "some/model at c0ffeec0ffee, complete in the cache" in text
    assert "tatsu-lab/alpaca_eval: 1 records" in text
