"""What stops a run before the engine starts: one line with what was found and the cure, exit code 2."""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batch_infer import preflight
from batch_infer.arguments import Arguments, parse
from batch_infer.engine import Machine, environment
from batch_infer.prompts import Record
from workbench import UserError

H200 = {
    **{"name": "NVIDIA H200", "memory_gib": 140.4, "free_gib": 139.9, "capability": (9, 0)},
    **{"bandwidth": 4.9e12, "flops": 1e15},
}
V100 = H200 | {"name": "Tesla V100-SXM2-16GB", "memory_gib": 15.8, "free_gib": 15.5, "capability": (7, 0)}


def look(monkeypatch, gpus: list, args: Arguments | None = None, cuda=(13, 0), driver="580.95.05") -> Machine:
    monkeypatch.setattr(preflight, "nvml_gpus", lambda: gpus)
    monkeypatch.setattr(preflight, "cuda_driver_version", lambda: cuda)
    monkeypatch.setattr(preflight, "driver_version", lambda: driver)
    monkeypatch.setattr(preflight, "torch_cuda", lambda: "13.0")
    machine = Machine("cuda")
    preflight.look_at_gpus(args or Arguments(), machine)
    return machine


def test_good_gpus(monkeypatch):
    machine = look(monkeypatch, [H200, H200 | {"memory_gib": 140.0}])
    assert (machine.gpus, machine.memory_gib) == (2, 140.0)


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        ([], {"driver": None}, "no NVIDIA GPU here; ask for one .* or try the CPU rehearsal: --rehearse"),
        (
            [H200],
            {"cuda": (12, 8), "driver": "570.124.06"},
            "NVIDIA H200: NVIDIA driver 570.124.06 is too old for torch .*580",
        ),
        ([V100], {}, "V100-SXM2-16GB, has compute capability 7.0 and SGLang needs 8.0; ask Slurm for an A100"),
        ([H200 | {"free_gib": 60.0}], {}, "GPU 0: 60.0 of 140.4 GiB free, another process holds it"),
        ([H200, H200 | {"free_gib": 5.0}], {}, "GPU 1: 5.0 of 140.4 GiB free"),
        ([H200], {"args": Arguments(tp_size=2)}, "--tp_size 2 --dp_size 1: 2 GPUs needed, 1 visible"),
    ],
)
def test_gpus_that_cannot_be_used(monkeypatch, gpus, options, expected):
    """The CPU is never a fallback: a GPU that torch cannot use stops the run."""
    with pytest.raises(UserError, match=expected):
        look(monkeypatch, gpus, **options)


def test_a_shared_gpu_is_a_warning_where_the_pool_is_bounded(monkeypatch):
    args = Arguments(engine_args='{"max_total_tokens": 1000}')
    assert look(monkeypatch, [H200 | {"free_gib": 60.0}], args=args).gpus == 1


def test_nvml_answers_are_read_without_cuda(monkeypatch):
    """A fake pynvml with two whole GPUs and a MIG slice of the second."""

    class Nvml:
        NVMLError = type("NVMLError", (Exception,), {})
        NVML_CLOCK_MEM, NVML_CLOCK_SM = "mem", "sm"
        gpus = ("GPU-aaaa1111", "GPU-bbbb2222")

        def __getattr__(self, name):
            if not name.startswith("nvml"):
                raise AttributeError(name)
            return lambda *given: self.answer(name.removeprefix("nvml").removeprefix("Device"), *given)

        def answer(self, question, handle=None, clock=None):
            mig = str(handle).startswith("MIG-")
            if mig and question in (
                "GetCudaComputeCapability",
                "GetMemoryBusWidth",
                "GetNumGpuCores",
                "GetMaxClockInfo",
            ):
                raise self.NVMLError("not supported")
            if not mig and question == "GetDeviceHandleFromMigDeviceHandle":
                raise self.NVMLError("not a MIG device")
            memory = type("Memory", (), {"total": 64 * 2**30, "free": 63 * 2**30})
            return {
                "Init": None,
                "GetCount": 2,
                "GetHandleByIndex": self.gpus[handle] if isinstance(handle, int) else None,
                "GetHandleByUUID": handle,
                "GetUUID": handle,
                "GetDeviceHandleFromMigDeviceHandle": self.gpus[1],
                "GetName": f"card {handle}",
                "GetMemoryInfo": memory,
                "GetCudaComputeCapability": [9, 0],
                "GetMemoryBusWidth": 6144,
                "GetMaxClockInfo": {"mem": 3201, "sm": 1980}.get(clock),
                "GetNumGpuCores": 16896,
            }[question]

    monkeypatch.setitem(sys.modules, "pynvml", Nvml())

    def names(visible: str | None) -> list[str]:
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return [gpu["name"] for gpu in preflight.nvml_gpus()]

    both = ["card GPU-aaaa1111", "card GPU-bbbb2222"]
    assert names("0,1") == both
    assert names("1,0") == both[::-1]
    assert names("GPU-bbbb2222") == names("GPU-bbbb") == both[1:]
    assert names("0,7,1") == both[:1]
    assert names("") == []
    assert names("MIG-cccc3333") == ["card MIG-cccc3333"]
    assert names(None) == both
    h200 = preflight.nvml_gpus()[0]
    assert h200["capability"] == (9, 0)
    assert h200["bandwidth"] == pytest.approx(4.9e12, rel=0.01)
    assert h200["flops"] == pytest.approx(1.07e15, rel=0.01)


def test_the_installed_torch_is_read_without_importing_it():
    assert preflight.torch_cuda() == "13.0"


def nvcc(folder: Path, release: str) -> str:
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "nvcc"
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    script.chmod(0o755)
    return str(folder)


def test_kernel_tools(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("CUDA_HOME", nvcc(tmp_path / "13", "13.2"))
    assert "nvcc of CUDA 13 in" in preflight.look_at_kernel_tools(Arguments(), Machine("cuda"))
    # One of another major version is replaced by the wheel's, and that is said.
    monkeypatch.setenv("CUDA_HOME", nvcc(tmp_path / "12", "12.4"))
    machine = Machine("cuda")
    monkeypatch.setattr(preflight, "driver_library", lambda: tmp_path / "libcuda.so.580")
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    assert "the wheel's own (CUDA_HOME was " in preflight.look_at_kernel_tools(Arguments(), machine)
    assert os.environ["CUDA_HOME"] == machine.compiler["CUDA_HOME"] != str(tmp_path / "12")
    assert os.environ["LIBRARY_PATH"] == machine.compiler["LIBRARY_PATH"]
    assert machine.compiler["LIBRARY_PATH"].startswith(f"{tmp_path}/.cache/cuda-libraries/")
    assert machine.compiler["LIBRARY_PATH"].endswith(":/elsewhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "12"))
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else name)
    with pytest.raises(UserError, match=r"g\+\+ is not on the PATH .*module load gcc"):
        preflight.look_at_kernel_tools(Arguments(), Machine("cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"kernels cannot be stored there .* set LLM_STORAGE"):
        preflight.look_at_kernel_tools(Arguments(), Machine("cuda"))


def test_runs_that_begin_together_share_the_kernel_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(preflight, "nvcc_major", lambda home: 13)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: preflight.look_at_kernel_tools(Arguments(), Machine("cuda")), range(200)))
    assert not list((tmp_path / ".cache" / "flashinfer").iterdir())


def test_kernels_compiled_by_others_are_refused(monkeypatch, tmp_path):
    """FlashInfer would load them whatever flags we set."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flashinfer_jit_cache.py").touch()
    with pytest.raises(UserError, match=r"pip uninstall flashinfer-jit-cache\), or take --fast"):
        preflight.look_at_kernel_tools(Arguments(), Machine("cuda"))
    monkeypatch.setenv("CUDA_HOME", nvcc(tmp_path / "13", "13.2"))
    for flags in ({"fast": True}, {"engine_args": '{"attention_backend": "triton"}'}):
        assert preflight.look_at_kernel_tools(Arguments(**flags), Machine("cuda"))


def test_the_wheels_compile_flashinfers_kernels(tmp_path):
    """On a machine without a CUDA toolkit: nvcc, its headers and those FlashInfer ships must be of one version, and
    the linker must find the runtime and the driver."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    driver = tmp_path / "libcuda.so.1"
    (tmp_path / "driver.cpp").write_text('extern "C" int cuInit(unsigned) { return 0; }')
    words = ["g++", "-shared", str(tmp_path / "driver.cpp"), "-o", str(driver), f"-Wl,-soname,{driver.name}"]
    subprocess.run(words, check=True)
    (cuda,) = (Path(path) / "cu13" for path in importlib.util.find_spec("nvidia").submodule_search_locations)
    for _ in range(2):  # the second time its links are there
        variables = preflight.compiler_of_wheels(cuda, driver, tmp_path / "links")
    other = preflight.compiler_of_wheels(cuda, Path("/elsewhere/libcuda.so.2"), tmp_path / "links")
    assert other["LIBRARY_PATH"] != variables["LIBRARY_PATH"], "another machine's driver has links of its own"
    with pytest.raises(UserError, match=r"no libcudart\.so in"):
        preflight.compiler_of_wheels(tmp_path, driver, tmp_path / "links")
    (tmp_path / "probe.cu").write_text(
        "#include <cooperative_groups/reduce.h>\n#include <cuda.h>\n#include <cuda/std/type_traits>\n"
        "__global__ void kernel() {}\nint probe() { kernel<<<1, 1>>>(); return cuInit(0) + cudaDeviceSynchronize(); }\n"
    )
    program = (
        "import sys\nfrom flashinfer.jit.core import gen_jit_spec\n"
        "spec = gen_jit_spec('probe', [sys.argv[1]])\nspec.build(verbose=False)\nprint(spec.jit_library_path)"
    )
    variables |= {"FLASHINFER_WORKSPACE_BASE": str(tmp_path), "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
    variables |= environment(Arguments())
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "probe.cu")]
    built = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    needed = subprocess.run(
        ["ldd", built.stdout.split()[-1]], capture_output=True, text=True, check=True
    ).stdout
    assert "libcuda.so.1" in needed
    assert "libcudart.so.13" in needed
    # An unchanged maximum must scale by exactly 1: no product unrounded (engine.environment).
    (ninja,) = tmp_path.rglob("probe/build.ninja")
    flags = re.findall(r"-use_fast_math|-fmad=false", ninja.read_text())
    assert flags[-1] == "-fmad=false"
    (tmp_path / "rescale.cu").write_text(
        "__global__ void kernel(float* x, float m, float s) { x[0] = exp2f(x[1] * s - m * s); }\n"
    )
    for given, fused in ((["-use_fast_math"], True), (["-use_fast_math", "-fmad=false"], False)):
        cubin = tmp_path / "rescale.cubin"
        words = [*given, "-arch=sm_90a", "-cubin", str(tmp_path / "rescale.cu"), "-o", str(cubin)]
        subprocess.run([cuda / "bin" / "nvcc", *words], check=True)
        listing = subprocess.run([cuda / "bin" / "nvdisasm", cubin], capture_output=True, text=True, check=True)
        assert ("FFMA" in listing.stdout) == fused, listing.stdout


def test_missing_and_stale_plugins(monkeypatch, tmp_path):
    assert "sglang 0.5.17" in preflight.look_at_packages()
    other = tmp_path / "plugins"
    shutil.copytree(preflight.PLUGINS, other)
    (other / "cpu.py").write_text("changed")
    monkeypatch.setattr(preflight, "PLUGINS", other)
    with pytest.raises(UserError, match=r"another version; run `make install` \(or pip install --no-deps"):
        preflight.look_at_packages()

    def missing(name):
        if name == "assignment-runtime-plugins":
            raise preflight.importlib.metadata.PackageNotFoundError(name)
        return found(name)

    found = preflight.importlib.metadata.distribution
    monkeypatch.setattr(preflight.importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match="runtime_plugins is not installed; run `make install`"):
        preflight.look_at_packages()


# --- adapters -----------------------------------------------------------------------------------------

CONFIG = {
    **{"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    "num_hidden_layers": 2,
}


def adapter(folder: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "base"} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.layers."
    shapes = {
        f"{prefix}0.self_attn.q_proj.lora_A.weight": [2, 8],
        f"{prefix}0.self_attn.v_proj.lora_B.weight": [4, 2],
        f"{prefix}1.mlp.down_proj.lora_A.weight": [2, 16],
    } | (tensors or {})
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def test_good_adapter(tmp_path):
    preflight.check_adapter(adapter(tmp_path / "a"), CONFIG)


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({"use_dora": True}, {}, "DoRA is not served by SGLang"),
        ({"use_rslora": True}, {}, "rsLoRA would be served with the wrong scale"),
        ({"peft_type": "IA3"}, {}, "IA3 adapters are not served"),
        ({"rank_pattern": {"q_proj": 4}}, {}, "rank_pattern is not served"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save is not served"),
        ({"lora_bias": True}, {}, "lora_bias is not served"),
        ({}, {"base_model.model.lm_head.lora_A.weight": [2, 8]}, "lm_head.lora_A.weight is not a projection"),
        ({}, {"base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": [32, 2]}, "trained on another base"),
        (
            {},
            {"base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": [16, 2]},
            "this model 16 in 2 layers",
        ),
        (
            {},
            {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": [2, 8]},
            "layer 1 adapts q_proj but not v_proj",
        ),
        (
            {},
            {"base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight": [4, 2]},
            "layer 1 adapts k_proj but not q_proj",
        ),
        (
            {},
            {"base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight": [4, 2]},
            "layer 1 adapts v_proj but not q_proj",
        ),
        (
            {},
            {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": [2, 8]},
            "layer 0 adapts up_proj but not gate_proj",
        ),
    ],
)
def test_adapters_that_cannot_be_served(tmp_path, config, tensors, expected):
    with pytest.raises(UserError, match=expected):
        preflight.check_adapter(adapter(tmp_path / "a", config, tensors), CONFIG)


def test_an_adapter_that_cannot_be_read(tmp_path):
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        preflight.check_adapter(folder, CONFIG)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        preflight.check_adapter(folder, CONFIG)


def test_dummy_weights_with_an_adapter(tmp_path):
    folder = str(adapter(tmp_path / "a"))
    model = argparse.Namespace(config=CONFIG)
    for load_format, refused in (("auto", False), ("dummy", True)):
        args = Arguments(engine_args=json.dumps({"load_format": load_format}))
        found = {"records": [Record(0, "x", lora=folder)], "model": model}
        with pytest.raises(UserError, match="dummy reads none") if refused else contextlib.nullcontext():
            preflight.look_at_adapters(args, found)


def test_a_retrained_adapter_has_another_fingerprint(tmp_path):
    folder = adapter(tmp_path / "a")
    args = Arguments(lora_path=str(folder))
    before = preflight.local_inputs(args)
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace('"r": 2', '"r": 2, "lora_alpha": 64')
    )
    assert preflight.local_inputs(args) != before


def test_a_model_of_another_kind(run_inference, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"n_head": 12}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    code, text = run_inference("--model_path", model, "--output_file", tmp_path / "o" / "outputs.jsonl").wait()
    assert code == 2
    assert "not that of a Llama- or Qwen2-like language model" in text.splitlines()[-1]


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
        (
            ["--engine_args", '{"mem_fraction": 0.5}'],
            "no argument mem_fraction; did you mean mem_fraction_static",
        ),
        (
            ["--engine_args", '{"schedule_policy": "best"}'],
            "--engine_args: schedule_policy 'best'; choose lpm, ",
        ),
        (["--engine_args", '{"page_size": "x"}'], "--engine_args: SGLang refuses them: "),
        (["--lora_path", "."], "no adapter_config.json that names the base model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_inference, tmp_path, flags, expected):
    code, text = run_inference("--output_file", tmp_path / "outputs.jsonl", *flags).wait()
    assert code == 2, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in text


def test_a_refused_command_harms_nothing(run_inference, tmp_path):
    """A typo in --engine_args neither claims the folder nor, with --overwrite, removes a finished run."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("Say something.\n")
    flags = ["--prompts", prompts, "--max_new_tokens", 2, "--output_file", tmp_path / "o" / "outputs.jsonl"]
    assert run_inference(*flags, "--engine_args", '{"quantisation": "fp8"}').wait()[0] == 2
    code, text = run_inference(*flags).wait()
    assert code == 0, text
    before = sorted(path.name for path in (tmp_path / "o").iterdir())
    code, text = run_inference(*flags, "--overwrite", "--engine_args", '{"typo_x": 1}').wait()
    assert code == 2, text
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == before


def test_files_of_another_program_are_left_alone(run_inference, tmp_path):
    (tmp_path / "summary.json").write_text('{"eval_loss_after": 1.0}')
    for flags in ([], ["--overwrite"]):
        code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl").wait()
        assert code == 2
        assert "not written by this program, or damaged" in text
    assert (tmp_path / "summary.json").exists()


def test_bad_prompt_file_names_its_line(run_inference, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "fine"}\n{"instruction": broken}\n')
    code, text = run_inference("--prompts", path, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 2
    assert "prompts.jsonl, line 2, column 17: not valid JSON" in text.splitlines()[-1]


def test_no_gpu_is_no_reason_for_the_cpu(runtime, tiny_qwen2, tmp_path):
    from harness import fork

    flags = ["--model_path", str(tiny_qwen2), "--output_file", str(tmp_path / "outputs.jsonl")]
    code, text = fork(lambda: runtime.main(flags), tmp_path / "terminal.txt").wait()
    assert code == 2
    assert "error: no NVIDIA GPU here" in text


def test_two_runs_in_one_folder(runtime, tmp_path):
    from workbench.files import claim

    args = parse(["--rehearse", "--output_file", str(tmp_path / "outputs.jsonl")])
    with claim(args.folder, "--output_file"):
        from harness import fork

        flags = ["--rehearse", "--output_file", str(tmp_path / "outputs.jsonl")]
        code, text = fork(lambda: runtime.main(flags), tmp_path / "terminal.txt").wait()
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

    cache = tmp_path / "hub"
    for kind, name, files in (
        ("models", "some/model", tiny_qwen2.iterdir()),
        ("datasets", "tatsu-lab/alpaca_eval", [tmp_path / "alpaca_eval.json"]),
    ):
        repo = cache / f"{kind}--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("c0ffee" * 6)
        snapshot = repo / "snapshots" / ("c0ffee" * 6)
        snapshot.mkdir(parents=True)
        (tmp_path / "alpaca_eval.json").write_text('[{"instruction": "Say something.", "output": "x"}]')
        for path in files:
            shutil.copy(path, snapshot / path.name)

    def patch() -> None:
        constants.HF_HUB_CACHE = str(cache)
        import huggingface_hub.file_download as file_download

        file_download.constants.HF_HUB_CACHE = str(cache)

    flags = ["--model_path", "some/model", "--prompts", "tatsu-lab/alpaca_eval", "--preflight_only"]
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl", patch=patch).wait()
    assert code == 0, text
    assert "some/model at c0ffeec0ffee, complete in the cache" in text
    assert "tatsu-lab/alpaca_eval: 1 records" in text
