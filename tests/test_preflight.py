"""Preflight's arithmetic and messages, and the table of a whole run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from harness import ROOT, fork
from lora_sft import UserError, data, preflight
from lora_sft.arguments import Arguments, read_zero_config
from workbench import machine

ZERO = read_zero_config(str(ROOT / "deepspeed" / "zero3.json"))["zero_optimization"]

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}


def llama_parameters(config: dict) -> dict[str, int]:
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    sizes = {"model.embed_tokens.weight": v * h, "lm_head.weight": v * h, "model.norm.weight": h}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        sizes |= {f"{at}self_attn.{name}.weight": h * h for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        sizes |= {f"{at}mlp.{name}.weight": h * i for name in ("gate_proj", "up_proj", "down_proj")}
        sizes |= {f"{at}{name}.weight": h for name in ("input_layernorm", "post_attention_layernorm")}
    return sizes


def predicted(
    args: Arguments, world_size: int = 2, answer_share: float = 1.0, zero: dict = ZERO
) -> dict[str, float]:
    h, i, r = 4096, 11008, args.lora_r
    lora = [r * h, h * r] * 4 + [r * h, i * r] * 2 + [r * i, h * r]
    plan = {"dtype": "fp16", "world_size": world_size, "answer_share": answer_share}
    return preflight.predict_memory(LLAMA_2_7B, llama_parameters(LLAMA_2_7B), lora * 32, args, plan, zero)


def test_llama_2_7b_has_its_published_size():
    assert sum(llama_parameters(LLAMA_2_7B).values()) == 6_738_415_616


@pytest.mark.parametrize(
    ("tokens", "rank", "measured_gib"),
    [
        (2048, 16, 9.93),
        (2048, 64, 11.07),
        (4096, 16, 10.77),
        (8192, 16, 13.06),
        (8192, 64, 14.39),
        (16384, 16, 17.63),  # in bf16
    ],
)
def test_predicted_peak_agrees_with_the_reserved_one(tokens, rank, measured_gib):
    """Measured on 2 H100s, random weights of Llama-2-7B's shape (bench/README.md)."""
    parts = predicted(replace(Arguments(), tokens_per_micro_batch=tokens, lora_r=rank), answer_share=0.28)
    assert sum(parts.values()) == pytest.approx(measured_gib, rel=0.02)


def test_one_gpu_gathers_nothing():
    """The same, on one of them."""
    parts = predicted(Arguments(), world_size=1, answer_share=0.28, zero=ZERO | {"overlap_comm": True})
    assert sum(parts.values()) == pytest.approx(18.44, rel=0.02)


def test_settings_of_other_people_are_not_predicted_too_low():
    """The starter's (bench/train_throughput.py): DeepSpeed allocates the whole reduce bucket, 0.93 GiB. Measured 8.90."""
    starter = {"stage3_max_live_parameters": 3e7, "stage3_param_persistence_threshold": 10_000}
    args = replace(Arguments(), max_seq_len=512, tokens_per_micro_batch=512)
    parts = predicted(args, answer_share=0.28, zero=starter)
    assert parts["reduce bucket"] == pytest.approx(0.93, abs=0.01)
    assert 8.90 < sum(parts.values()) < 1.2 * 8.90


@pytest.mark.parametrize(("tokens", "measured_gib"), [(4096, 13.96), (2048, 11.23)])
def test_gathers_in_a_stream_of_their_own_take_more(tokens, measured_gib):
    """Measured with the real command on 2 H200s, fp16, logits everywhere."""
    zero = ZERO | {"overlap_comm": True, "stage3_param_persistence_threshold": 1_000_000}
    parts = predicted(replace(Arguments(), tokens_per_micro_batch=tokens), zero=zero)
    assert sum(parts.values()) == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "world_size", "measured_gib"), [(8192, 2, 12.52), (16384, 2, 16.85), (6144, 1, 16.60)]
)
def test_predicted_parts_agree_with_the_allocated_peak(tokens, world_size, measured_gib):
    """Of bench/train_throughput.py's rows on H100s, the one on one GPU with an older JSON: what was allocated, not what
    the allocator kept besides."""
    parts = predicted(replace(Arguments(), tokens_per_micro_batch=tokens), world_size, answer_share=0.3)
    assert sum(parts.values()) - parts["allocator slack"] == pytest.approx(measured_gib, rel=0.03)


def test_predicted_parts():
    parts = predicted(Arguments())
    assert parts["weight shard"] == pytest.approx(6_738_415_616 / 2**30)  # 2 bytes over 2 GPUs
    assert parts["checkpointed inputs"] == pytest.approx(2.0)  # 32 layers x 8,192 tokens x 4,096 x 2 bytes
    logits = 8192 * 32000 * 20 / 2**30
    assert parts["logits and loss"] == pytest.approx(logits - parts["layer activations"])
    assert predicted(Arguments(), answer_share=0.25)["logits and loss"] == 0  # a layer takes more, later
    everything = predicted(replace(Arguments(), gradient_checkpointing=False), answer_share=0.25)
    assert everything["logits and loss"] == pytest.approx(logits / 4)
    assert predicted(Arguments(), 4)["weight shard"] == pytest.approx(parts["weight shard"] / 2)
    assert predicted(replace(Arguments(), lora_r=64))["LoRA states"] == pytest.approx(
        4 * parts["LoRA states"], rel=0.3
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_gathers_share_the_stream_where_there_are_any(libraries, tiny_model, tmp_path, world_size):
    """On one GPU DeepSpeed would wait before every layer for the stream of the gathers, and so for the computation."""

    def look() -> int:
        args = Arguments()
        plan = {"dtype": "fp32", "world_size": world_size, "model_folder": str(tiny_model), "answer_share": 0.3}
        preflight.look_at_lora(args, plan, read_zero_config(args.deepspeed))
        print(plan["zero_config"]["zero_optimization"]["overlap_comm"])
        return 0

    assert fork(look, tmp_path / "terminal.txt").wait() == (0, f"{world_size == 1}\n")


def test_matrices_that_autograd_keeps_are_counted():
    args = replace(Arguments(), gradient_checkpointing=False)
    assert predicted(args)["gathered layers"] == pytest.approx(6_738_415_616 * 2 / 2**30)
    assert predicted(Arguments())["gathered layers"] < 2


def test_the_likely_most_answer_tokens_of_a_micro_batch():
    labels = np.full((100, 10), data.IGNORE, np.int32)
    labels[:10, :] = 1  # a tenth of the rows is all answer
    packed = data.Packed(labels, labels, labels, np.full(100, 10))
    assert packed.largest_answer_share(1) == 1.0
    assert packed.largest_answer_share(25) == pytest.approx(0.1 + 3 * 0.3 / 5)
    assert packed.largest_answer_share(100) == pytest.approx(0.1)


def test_what_does_not_fit_names_the_flag():
    args = replace(Arguments(), tokens_per_micro_batch=8192)
    parts = predicted(args)
    plan = {"predicted_parts_gib": parts, "predicted_peak_gib": sum(parts.values()), "gpu_limit_gib": 14.5}
    plan |= {"gpu_free_gib": 15.0, "world_size": 2}
    with pytest.raises(UserError, match=r"does not fit; use --tokens_per_micro_batch 4096"):
        preflight.judge_memory(args, plan)
    plan |= {"predicted_peak_gib": 12.0, "gpu_free_gib": 3.0}
    with pytest.raises(UserError, match="another process holds it"):
        preflight.judge_memory(args, plan)


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
    assert machine.has_kernels(capability, arch_list) is runs


def test_precision_follows_the_capability():
    assert preflight.choose_dtype("auto", "cuda", (7, 0))[0] == "fp16"
    assert preflight.choose_dtype("auto", "cuda", (7, 5))[0] == "fp16"
    assert preflight.choose_dtype("auto", "cuda", (8, 0))[0] == "bf16"
    assert preflight.choose_dtype("auto", "cpu", None)[0] == "fp32"
    assert "7.0" in preflight.choose_dtype("auto", "cuda", (7, 0))[1]
    with pytest.raises(UserError, match="use --dtype fp16"):
        preflight.choose_dtype("bf16", "cuda", (7, 0))


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
    import re

    assert re.search(expected, machine.explain_no_cuda(driver, wheel, "2.11.0", preflight.OLDER_DRIVER))


def test_gpus_that_the_driver_lists_and_the_wheel_cannot_use(monkeypatch):
    """An old driver: NVML counts the GPU, CUDA does not start."""
    import torch

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(preflight, "driver_version", lambda: "535.104.05")
    with pytest.raises(UserError, match=r"driver 535.104.05 is too old .* needs driver 580"):
        preflight.look_at_gpus(Arguments(), {})
    monkeypatch.setenv("GPU_MEMORY_CAP_GIB", "much")
    with pytest.raises(UserError, match="GPU_MEMORY_CAP_GIB=much: give a number"):
        preflight.look_at_gpus(Arguments(), {})


def test_more_gpus_asked_for_than_visible(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"--num_gpus 2, but 1 visible .*--gres=gpu:2"):
        preflight.look_at_gpus(replace(Arguments(), num_gpus=2), {})


def test_link_between_gpus():
    matrix = (
        "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n\nLegend:\n"
    )
    assert preflight.link_between(matrix, 0, 1) == "NV18"
    assert preflight.link_between(matrix, 1, 0) == "NV18"
    with pytest.raises(ValueError, match="no row for GPU 5"):
        preflight.link_between(matrix, 5, 6)


def test_hub_errors_name_the_cure(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def error(kind, text):
        return kind(text, response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))

    def explain(kind, error, name="meta-llama/Llama-2-7b-hf"):
        flag = "--data_path" if kind == "dataset" else "--model_name_or_path"
        return machine.explain_hub_error(name, kind, error, flag, preflight.PROGRAM)

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
    import shutil

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

    flags = [*quick, "--model_name_or_path", "some/llama", "--max_steps", "2", "--output_dir", tmp_path / "out"]
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


def test_the_cpu_is_never_a_silent_fallback(start, tiny_model, tmp_path):
    data = ROOT / "rehearsal" / "preferences.jsonl"
    flags = ["--model_name_or_path", tiny_model, "--data_path", data, "--output_dir", tmp_path / "out"]
    code, text = start(*flags).wait()
    assert code == 2
    assert "error: no NVIDIA GPU here; ask for one (srun --gres=gpu:2 ...)" in text


def test_host_memory_is_limited_by_the_cgroup(monkeypatch):
    plan = {"base_parameters": 6_738_415_616, "dtype": "fp16", "world_size": 2}
    monkeypatch.setattr(
        preflight, "memory_limit_gib", lambda: (8.0, "left of the job's memory limit (Slurm --mem)")
    )
    with pytest.raises(UserError, match=r"8.0 GiB left of the job's memory limit .* ask for --mem=21G"):
        preflight.look_at_host_memory(plan)
    monkeypatch.undo()
    left, what = preflight.memory_limit_gib()
    assert left > 0
    assert what


def test_predicted_end_is_compared_with_slurms(monkeypatch, caplog):
    import logging
    import time
    from types import SimpleNamespace

    from lora_sft import report

    monkeypatch.setattr(report.log, "propagate", True)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    with caplog.at_level(logging.INFO, "lora_sft"):
        report.announce_end(10.0, 100.0, SimpleNamespace(max_steps=500, global_step=5), 8000)
        report.announce_end(1.0, 1.0, SimpleNamespace(max_steps=500, global_step=5), 8000)
    # (600 s - 100 s) / 10 s * 0.9 = 45 steps and 5 done, of 500: a tenth of the rows
    assert "or start anew with --overwrite --max_train_rows 79" in caplog.messages[0]
    assert "NOT fit" not in caplog.messages[1]
    assert "Slurm ends the job at" in caplog.messages[1]


def test_disk_that_is_too_small_fails_early(monkeypatch, tmp_path):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(10, 10, 2**20))
    args = replace(Arguments(), output_dir=str(tmp_path))
    with pytest.raises(UserError, match="free some"):
        preflight.look_at_disk(args, {"lora_parameters": 40_000_000})
    assert list(tmp_path.iterdir()) == []
