"""The benchmark of training: what its rows run, what is counted in a rank, and ratios within a command only."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import ROOT, fork
from lora_sft import arguments, data

sys.path.append(str(ROOT / "bench"))
import llama_shape
import observed_rank
import train_throughput

from workbench import UserError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_drawn_documents_have_rm_statics_lengths(tiny_model, tokenizer):
    """About 700 characters of prompt and 250 of answer, at 4 a token; several turns; another seed, others."""
    rows = train_throughput.draw_documents(tiny_model, 1500, seed=0)
    documents, counts = data.tokenise(rows, tokenizer, 4096)
    assert counts.documents == 1500
    prompts = [document.answer_start for document in documents]
    answers = [len(document.input_ids) - document.answer_start for document in documents]
    assert sum(prompts) / 1500 == pytest.approx(700 / 4, rel=0.1)
    assert sum(answers) / 1500 == pytest.approx(250 / 4, rel=0.1)
    assert {row["prompt"].count("\n\nHuman:") for row in rows} == {1, 2, 3, 4}
    assert all(row["prompt"].endswith("\n\nAssistant:") and "Assistant" not in row["chosen"] for row in rows)
    assert rows == train_throughput.draw_documents(tiny_model, 1500, seed=0)
    assert rows != train_throughput.draw_documents(tiny_model, 1500, seed=1)


def test_a_tokenizer_without_words_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(UserError, match="its tokenizer has no words"):
        train_throughput.draw_documents(tmp_path, 1, seed=0)


def test_the_starters_rows_hold_one_document(tiny_model, tokenizer):
    rows = train_throughput.draw_documents(tiny_model, 40, seed=0)
    padded = train_throughput.prepare_one_document_a_row(rows, tokenizer, 512, 8, "train")
    packed = data.prepare(rows, tokenizer, 512, 8, "train")
    assert len(padded) == 40 > len(packed)
    assert padded.report()["real_tokens"] == packed.report()["real_tokens"]
    assert 0.3 < padded.report()["padding_share"] < 0.7


@pytest.mark.parametrize("name", train_throughput.ROWS)
def test_rows_are_commands_of_the_program(name):
    row = train_throughput.ROWS[name]
    words = [word for flag, value in row.flags.items() for word in (f"--{flag}", str(value))]
    args = arguments.parse([*words, "--dtype", row.dtype])
    assert args.dtype == row.dtype
    assert row.cap == (name in ("ours", "starter") or bool(row.zero_changes or row.without))
    assert row.replicated == name.startswith("replicated")
    if name.startswith("tokens_"):
        assert name.split("_")[1] == str(args.tokens_per_micro_batch)
        assert args.lora_r == (64 if "rank_64" in name else 16)


def test_shares_of_a_trace():
    """Kernels 0-40 and 30-50 overlap, communication 45-70, a copy 90-100, of 100 microseconds; what the CPU does
    counts for nothing."""

    def event(name, begin, end, category="kernel"):
        return {"name": name, "ts": begin, "dur": end - begin, "cat": category}

    trace = [
        event("ncclDevKernel_AllGather", 45, 70),
        event("gemm", 0, 40),
        event("pytorch_flash::flash_fwd_kernel", 30, 50),
        event("Memcpy DtoD", 90, 100, "gpu_memcpy"),
        event("cudaLaunchKernel", 0, 100, "cuda_runtime"),
        {"name": "process_name", "ph": "M"},
    ]
    shares = observed_rank.kernel_shares(trace, 100e-6)
    assert shares["no_kernel_share"] == pytest.approx(0.2)
    assert shares["communication_only_share"] == pytest.approx(0.2)
    assert shares["longest"]["gemm"] == pytest.approx(0.4)
    assert shares["not_on_volta"] == ["pytorch_flash::flash_fwd_kernel"]
    assert observed_rank.kernel_shares(trace[-2:], 100e-6) is None  # nothing recorded is not "nothing ran"


def test_the_reason_of_a_failed_row(tmp_path):
    log = tmp_path / "terminal.log"
    log.write_text(
        "loading\n  0%|\rTraceback\n  File x\ntorch.AcceleratorError: CUDA error\nCompile with `X`\n"
    )
    assert train_throughput.failure(tmp_path, 1)["error"] == "torch.AcceleratorError: CUDA error"
    log.write_text("preflight\nerror: out of GPU memory (x); use a smaller\nrank 1 ended\n")
    assert train_throughput.failure(tmp_path, 2)["error"] == "out of GPU memory (x); use a smaller"
    assert "no end after" in train_throughput.failure(tmp_path, train_throughput.TIMED_OUT)["error"]
    log.write_text("")
    assert train_throughput.failure(tmp_path, -11) == {"error": "exit code -11", "last_lines": []}


def test_a_row_without_end_is_killed(monkeypatch, tmp_path):
    import time

    from lora_sft import ranks

    monkeypatch.setattr(train_throughput, "ROW_TIMEOUT_S", 0.2)
    assert (
        train_throughput.wait(ranks.fork(lambda: time.sleep(60), tmp_path / "e")) == train_throughput.TIMED_OUT
    )
    assert train_throughput.wait(ranks.fork(lambda: 3, tmp_path / "e")) == 3


def test_the_next_row_starts_when_the_last_step_is_over(tmp_path):
    """Once: at the mark, or when the process ended without one."""
    import time

    from lora_sft import ranks

    def row() -> int:
        time.sleep(0.3)
        (tmp_path / "mark").touch()
        time.sleep(0.3)
        return 0

    calls: list[bool] = []
    process = ranks.fork(row, tmp_path / "e")
    assert train_throughput.wait(process, tmp_path / "mark", lambda: calls.append(running(process))) == 0
    assert calls == [True]
    process = ranks.fork(lambda: 1, tmp_path / "e")
    assert train_throughput.wait(process, tmp_path / "none", lambda: calls.append(running(process))) == 1
    assert calls == [True, False]


def running(pid: int) -> bool:
    return (Path("/proc") / str(pid)).exists()


def test_the_replicated_row_scales_its_loss():
    class Engine:
        optimizer = SimpleNamespace(loss_scale_config=SimpleNamespace(cur_scale=4.0))

        def backward(self, loss, scale_wrt_gas=True):
            return loss, scale_wrt_gas

    observed_rank.scale_the_loss(Engine)
    engine = Engine()
    assert engine.backward(2.0, scale_wrt_gas=False) == (8.0, False)
    engine.optimizer = SimpleNamespace()  # bf16 and fp32 have no scale
    assert engine.backward(2.0) == (2.0, True)


def part(link="fast", **changes) -> dict:
    rates = {"ours": 6000, "starter": 100, "replicated": 7500, "ours_1gpu_nocap": 8000, "ours_2gpu_nocap": 6400}
    rows = [
        {
            "row": row,
            "real_tokens_per_s_per_gpu": rate,
            "peak_reserved_gib": 14.0,
            "predicted_peak_gib": None,
            "measured_parts_gib": {"resident": 1.0},
        }
        for row, rate in rates.items()
    ]
    rows[0] |= {
        "predicted_peak_gib": 15.4,
        "predicted_parts_gib": dict.fromkeys(train_throughput.RESIDENT, 2.0)
        | dict.fromkeys(train_throughput.TRANSIENT, 2.0)
        | {"LoRA states": 2.0, "allocator slack": 1.4},
        "measured_parts_gib": {"resident": 4.0, "peak_allocated": 13.2, "peak_reserved": 14.2},
        "dtype": "fp16",  # of the LoRA states 8 of 20 bytes are there before the first step
    }
    rows.append({"row": "ours_bf16", "error": "out of GPU memory", "last_lines": ["a path"]})
    rows.append({"row": "replicated_bf16", "real_tokens_per_s_per_gpu": 1, "peak_reserved_gib": 20.0,
                 "predicted_peak_gib": None, "measured_parts_gib": None})  # fmt: skip
    same = {"workload": {"seed": 0}, "hardware": "H200", "commit": "abc"}
    return same | {"link": link, "rows": rows} | changes


def test_ratios_stay_within_a_command_and_a_link():
    slow = part("slow")
    slow["rows"][0]["real_tokens_per_s_per_gpu"] = 3000
    twice = part()
    twice["rows"][0]["real_tokens_per_s_per_gpu"] = 6600
    merged = train_throughput.merge([part(), twice, slow])
    assert merged["ratio_vs_starter"] == pytest.approx(63)  # (60 + 66) / 2
    assert merged["links"]["slow"]["ratio_vs_starter"] == pytest.approx(30)
    assert merged["ratio_vs_ceiling"] == pytest.approx(0.84)
    assert merged["scaling_1_to_2"] == pytest.approx(0.8)
    assert merged["ratio_bf16_vs_ceiling"] is None  # one of its rows failed
    assert merged["peak_reserved_gib"] == 14.0
    assert merged["prediction_errors"]["ours"] == pytest.approx(
        {"peak": 0.1, "resident": 0.2, "transient": 0.0, "slack_gib": 0.4}
    )
    assert "last_lines" not in json.dumps(merged)


def test_a_row_that_ran_several_times_counts_with_its_median():
    rows = [{"row": "ours", "real_tokens_per_s_per_gpu": rate} for rate in (100, 300, 200)]
    rows += [{"row": "starter", "real_tokens_per_s_per_gpu": 2}, {"row": "starter", "error": "out of memory"}]
    assert train_throughput.rates_of(rows) == {"ours": 200, "starter": 2}


def test_a_part_is_what_a_command_wrote(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"other\.json: not a file that --part has written"):
        train_throughput.read_part(tmp_path / "other.json")


@pytest.mark.parametrize("change", [{"workload": {"seed": 1}}, {"hardware": "V100"}, {"commit": "def"}])
def test_parts_that_do_not_belong_together_are_refused(change):
    with pytest.raises(UserError, match=f"differ in {next(iter(change))}"):
        train_throughput.merge([part(), part(**change)])


def test_llamas_shape_loads_as_a_model(libraries, tmp_path):
    """Every tensor under its name, in fp16; norms 1; the tokenizer knows as many tokens and the same words."""

    def build() -> int:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = llama_shape.build(tmp_path / "model", llama_shape.CONFIG | SMALL)
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        weight = model.model.layers[1].mlp.down_proj.weight
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result = {
            "wrong": [sorted(map(str, found[name])) for name in ("missing_keys", "unexpected_keys")],
            "dtype": str(weight.dtype),
            "std": weight.float().std().item(),
            "norms": bool((model.model.norm.weight == 1).all()),
            "same": torch.equal(weight, model.model.layers[0].mlp.down_proj.weight),
            "tokens": len(tokenizer),
            "text": tokenizer.decode(tokenizer("the answer is here")["input_ids"]),
        }
        (tmp_path / "result.json").write_text(json.dumps(result))
        return 0

    code, text = fork(build, tmp_path / "terminal.txt").wait()
    assert code == 0, text
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.pop("std") == pytest.approx(0.02, rel=0.05)
    assert result.pop("text").endswith("the answer is here")
    assert result == {
        "wrong": [[], []],
        "dtype": "torch.float16",
        "norms": True,
        "same": False,
        "tokens": 32000,
    }
    # The index is written last: a folder that has it is complete and stays as it is.
    (tmp_path / "model" / "config.json").unlink()
    llama_shape.build(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


def test_llama_2_7b_has_its_published_size():
    c = llama_shape.CONFIG
    layer = 4 * c["hidden_size"] ** 2 + 3 * c["hidden_size"] * c["intermediate_size"] + 2 * c["hidden_size"]
    outside = 2 * c["vocab_size"] * c["hidden_size"] + c["hidden_size"]
    assert c["num_hidden_layers"] * layer + outside == 6_738_415_616


@pytest.mark.long
def test_rows_on_the_cpu(tiny_model, tmp_path):
    """Replicated weights take ZeRO-3's course without gathering anything; ZeRO-3 gathers the model twice a micro-
    batch."""
    command = [sys.executable, "-P", str(ROOT / "bench" / "train_throughput.py"), "starter", "replicated"]
    command += ["tokens_2048_rank_64", "ours_1gpu_nocap", "--device", "cpu", "--model_path", str(tiny_model)]
    command += ["--micro_batches", "2", "--part", str(tmp_path / "part.json")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {row["row"]: row for row in json.loads((tmp_path / "part.json").read_text())["rows"]}
    assert list(rows) == ["ours", "starter", "replicated", "tokens_2048_rank_64", "ours_1gpu_nocap"]
    assert rows["replicated"]["losses"] == pytest.approx(rows["ours"]["losses"], abs=1e-5)
    assert len(rows["ours"]["losses"]) == 4 + 2 + 1
    size_gib = sum(path.stat().st_size for path in tiny_model.glob("*.safetensors")) / 2**30
    assert rows["replicated"]["gathered_gib_per_micro_batch"] == 0
    assert 1.5 * size_gib < rows["ours"]["gathered_gib_per_micro_batch"] < 3 * size_gib
    assert rows["ours"]["real_share"] > 0.9 > 0.6 > rows["starter"]["real_share"]
    assert rows["starter"]["zero"]["stage3_prefetch_bucket_size"] == 30_000_000
    assert rows["starter"]["micro_batches_per_step"] == 4
    assert rows["ours_1gpu_nocap"]["world_size"] == 1
    assert all(row["real_tokens_per_s_per_gpu"] > 0 for row in rows.values())


@pytest.mark.long
def test_a_failing_row_leaves_its_reason(tiny_model, tmp_path):
    rows = [{"prompt": "\n\nHuman: hello\n\nAssistant:", "chosen": " good day"}]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    command = [sys.executable, "-P", str(ROOT / "bench" / "train_throughput.py"), "--device", "cpu"]
    command += ["--model_path", str(tiny_model), "--data_path", "one.jsonl", "--part", "part.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 3, run.stdout + run.stderr
    result = json.loads((tmp_path / "part.json").read_text())
    assert "0 training and 1 evaluation rows are left" in result["rows"][0]["error"]
    assert "failed: --data_path: 0 training" in run.stdout
