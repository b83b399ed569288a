"""Preflight's messages, and the table of a whole run."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from harness import ROOT
from lora_sft import machine, memory, preflight
from lora_sft.arguments import Arguments, read_zero_config
from workbench import UserError
from workbench import machine as workbench_machine
from workbench.models import explain_hub_error


def test_the_likely_most_answer_tokens_of_a_micro_batch():
    answer_tokens = np.array([10] * 10 + [0] * 90)  # a tenth of the rows is all answer
    shares = [memory.largest_answer_share(answer_tokens, 10, rows) for rows in (1, 25, 100)]
    assert shares == pytest.approx([1.0, 0.1 + 3 * 0.3 / 5, 0.1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_gathers_share_the_stream_where_there_are_any(world_size):
    """On one GPU DeepSpeed would wait before every layer for the stream of the gathers, and so for the computation."""
    given = read_zero_config(Arguments().deepspeed)
    resolved = preflight.resolve(given, world_size, 7 * 10**9)["zero_optimization"]
    assert resolved["overlap_comm"] is (world_size == 1)
    assert resolved["stage3_max_reuse_distance"] == given["zero_optimization"]["stage3_max_reuse_distance"]
    assert given["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], False),  # V100 and the CUDA 13 wheel
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 1), ["sm_90", "compute_90"], True),
    ],
)
def test_wheel_has_kernels(capability, arch_list, runs):
    assert workbench_machine.has_kernels(capability, arch_list) is runs


def test_precision_follows_the_capability():
    assert machine.choose_dtype("auto", "cuda", (7, 0))[0] == "fp16"
    assert machine.choose_dtype("auto", "cuda", (7, 5))[0] == "fp16"
    assert machine.choose_dtype("auto", "cuda", (8, 0))[0] == "bf16"
    assert machine.choose_dtype("auto", "cpu", None)[0] == "fp32"
    assert "7.0" in machine.choose_dtype("auto", "cuda", (7, 0))[1]
    with pytest.raises(UserError, match="use --dtype fp16"):
        machine.choose_dtype("bf16", "cuda", (7, 0))


@pytest.mark.parametrize(
    ("driver", "wheel", "expected"),
    [
        (None, "13.0", "no NVIDIA GPU here"),
        (
            "535.104.05",
            "13.0",
            r"driver 535.104.05 is too old .* needs driver 580 or newer\); use the CUDA 12.6",
        ),
        ("580.159.04", "13.0", "sees no GPU; CUDA_VISIBLE_DEVICES="),
        ("580.159.04", None, "is a CPU build"),
    ],
)
def test_unusable_gpu_is_explained(driver, wheel, expected):
    text = workbench_machine.explain_no_cuda(driver, wheel, "2.11.0", machine.OLDER_DRIVER, 2)
    assert re.search(expected, text)


def test_gpus_that_the_driver_lists_and_the_wheel_cannot_use(monkeypatch):
    """An old driver: NVML counts the GPU, CUDA does not start."""
    import torch

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(workbench_machine, "driver_version", lambda: "535.104.05")
    with pytest.raises(UserError, match=r"driver 535.104.05 is too old .* needs driver 580"):
        machine.look_at_gpus(Arguments())
    monkeypatch.setenv("GPU_MEMORY_CAP_GIB", "much")
    with pytest.raises(UserError, match="GPU_MEMORY_CAP_GIB=much: give a number"):
        machine.look_at_gpus(Arguments())


def gpu(capability: tuple[int, int] = (8, 0), free_gib: float = 40.0) -> workbench_machine.Gpu:
    return workbench_machine.Gpu("A100", 40.0, free_gib, capability, 1.5e12, 3e14)


def test_more_gpus_asked_for_than_visible(monkeypatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda *_: (gpu(),))
    with pytest.raises(UserError, match=r"--num_gpus 2, but 1 visible .*--gres=gpu:2"):
        machine.look_at_gpus(replace(Arguments(), num_gpus=2))


def test_the_weakest_gpu_decides(monkeypatch):
    monkeypatch.setattr(machine, "visible_gpus", lambda *_: (gpu(), gpu((7, 0), 3.0)))
    monkeypatch.setattr(machine, "check_kernels", lambda gpus: None)
    found, text = machine.look_at_gpus(Arguments())
    assert (found.world_size, found.dtype, found.capability, found.gpu_free_gib) == (2, "fp16", [7, 0], 3.0)
    assert text.startswith("2 x A100, 40.0 GiB, driver ")


def test_link_between_gpus():
    matrix = (
        "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n\nLegend:\n"
    )
    assert machine.link_between(matrix, 0, 1) == "NV18"
    assert machine.link_between(matrix, 1, 0) == "NV18"
    with pytest.raises(ValueError, match="no row for GPU 5"):
        machine.link_between(matrix, 5, 6)


def test_hub_errors_name_the_cure(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def error(kind, text):
        return kind(text, response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))

    def explain(kind, error, name="meta-llama/Llama-2-7b-hf"):
        flag = "--data_path" if kind == "dataset" else "--model_name_or_path"
        return explain_hub_error(name, kind, error, flag, preflight.PROGRAM)

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    gated = error(GatedRepoError, "Access to model is restricted")
    assert "there is no token; ask for access on its page, then `hf auth login`" in explain("model", gated)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert "your token has no access" in explain("model", gated)
    pending = error(GatedRepoError, "Your request to access model is awaiting a review from the repo authors.")
    assert "pending" in explain("model", pending)
    missing = error(RepositoryNotFoundError, "404")
    assert "--data_path no/such: neither a file here" in explain("dataset", missing, "no/such")
    assert f"{preflight.PROGRAM} --download_only" in explain("model", ConnectionError("offline"))


def fill_cache(folder, tiny_model, name="some/llama"):
    """Lays the tiny model out as a download of the hub model `name`, and returns the snapshot folder."""
    repo = folder / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_offline_node_with_a_complete_cache_works(start, quick, tiny_model, tmp_path):
    fill_cache(tmp_path / "hf", tiny_model)

    def use_cache():
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_CACHE = str(tmp_path / "hf" / "hub")
        huggingface_hub.constants.HF_HUB_OFFLINE = True

    flags = [*quick, "--model_name_or_path", "some/llama", "--max_steps", "1", "--output_dir", tmp_path / "out"]
    code, text = start(*flags, patch=use_cache).wait()
    assert code == 0, text
    assert f"some/llama at {'a' * 12}, complete in the cache" in text
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "some/llama"
    assert adapter["revision"] == "a" * 40


def test_incomplete_cache_offline_says_what_to_do(start, quick, tiny_model, tmp_path):
    (fill_cache(tmp_path / "hf", tiny_model) / "model.safetensors").unlink()

    def use_cache():
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_CACHE = str(tmp_path / "hf" / "hub")
        huggingface_hub.constants.HF_HUB_OFFLINE = True

    flags = [*quick, "--model_name_or_path", "some/llama", "--output_dir", tmp_path / "out"]
    code, text = start(*flags, patch=use_cache).wait()
    assert code == 2
    assert "some/llama is not complete in the cache and the hub cannot be reached" in text


def test_preflight_only_needs_no_gpu_and_leaves_no_run(start, tiny_model, tmp_path):
    data = ROOT / "rehearsal" / "preferences.jsonl"
    flags = ["--preflight_only", "--model_name_or_path", tiny_model, "--data_path", data]
    code, text = start(*flags, "--output_dir", tmp_path / "out").wait()
    assert code == 0, text
    assert "SKIP  GPUs            no GPU here; 2 x 15.8 GiB assumed" in text
    assert "weight shard" in text
    assert "preflight passed" in text
    assert not (tmp_path / "out" / "run_config.json").exists()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_act": "no-such"}, "config.json: no language model "),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised by gptq"),
        ("tokenizer_config.json", {"bos_token": 5}, "the tokenizer cannot be loaded"),
    ],
)
def test_a_model_that_transformers_cannot_build(start, quick, tiny_model, tmp_path, file, changes, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    flags = [*quick, "--preflight_only", "--model_name_or_path", tmp_path / "model"]
    code, text = start(*flags, "--output_dir", tmp_path / "out").wait()
    assert code == 2, text
    assert message in text.splitlines()[-1]
    assert "Traceback" not in text


def test_the_cpu_is_never_a_silent_fallback(start, tiny_model, tmp_path):
    data = ROOT / "rehearsal" / "preferences.jsonl"
    flags = ["--model_name_or_path", tiny_model, "--data_path", data, "--output_dir", tmp_path / "out"]
    code, text = start(*flags).wait()
    assert code == 2
    assert "error: no NVIDIA GPU here; ask for one (srun --gres=gpu:2 ...)" in text


def test_host_memory_is_limited_by_the_cgroup():
    place = machine.Place("", 2, 8.0, "left of the job's memory limit (Slurm --mem)")
    with pytest.raises(UserError, match=r"8.0 GiB left of the job's memory limit .* ask for --mem=21G"):
        machine.look_at_host_memory(6_738_415_616, "fp16", [place])
    left, what = machine.memory_limit_gib()
    assert left > 0
    assert what


@pytest.mark.parametrize("told_by", ["SLURM_JOB_END_TIME", "squeue"])
def test_predicted_end_is_compared_with_slurms(monkeypatch, caplog, tmp_path, told_by):
    import logging
    import time
    from types import SimpleNamespace

    from lora_sft import report

    monkeypatch.setattr(report.log, "propagate", True)
    end_s = int(time.time()) + 600
    if told_by == "squeue":  # Slurm 22.05
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end_s))
        (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$3" = 7 ] && echo {text}\n')
        (tmp_path / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv(
        "SLURM_JOB_ID" if told_by == "squeue" else told_by, "7" if told_by == "squeue" else str(end_s)
    )
    with caplog.at_level(logging.INFO, "lora_sft"):
        report.announce_end(10.0, 100.0, SimpleNamespace(max_steps=500, global_step=5), 8000)
        report.announce_end(1.0, 1.0, SimpleNamespace(max_steps=500, global_step=5), 8000)
    # (600 s - 100 s) / 10 s * 0.9 = 45 steps and 5 done, of 500: a tenth of the rows
    assert "or start anew with --overwrite --max_train_rows 79" in caplog.messages[0]
    assert "NOT fit" not in caplog.messages[1]
    assert "Slurm ends the job at" in caplog.messages[1]


def test_disk_that_is_too_small_fails_early(tmp_path):
    args = replace(Arguments(), output_dir=str(tmp_path))
    with pytest.raises(
        UserError, match=r"--output_dir .* needed.*; free some, name another --output_dir, or lower --save"
    ):
        preflight.look_at_disk(args, 10**15)
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_only_the_tokenizer_knows_is_refused_in_texts_alone(start, quick, tiny_model, tmp_path):
    """As the <pad> of some mirrors of Llama-2."""
    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_model, folder)
    (folder / "added_tokens.json").write_text('{"<pad>": 1024}')
    flags = [*quick, "--preflight_only", "--model_name_or_path", folder, "--output_dir", tmp_path / "out"]
    code, text = start(*flags).wait()
    assert code == 0, text
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " <pad> me"}
    rows.write_text(f"{json.dumps(row)}\n" * 20)
    code, text = start(*flags, "--data_path", rows).wait()
    assert code == 2, text
    assert "texts hold '<pad>', which the tokenizer of" in text
