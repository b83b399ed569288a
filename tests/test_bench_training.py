"""The benchmark of training: what its rows run, and ratios within a command only."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from harness import ROOT
from lora_sft import arguments, data

sys.path.append(str(ROOT / "bench"))
import train_throughput

from workbench import UserError


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
    padded = train_throughput.without_packing(data.prepare)(rows, tokenizer, 512, 8, "train")
    packed = data.prepare(rows, tokenizer, 512, 8, "train")
    assert len(padded) == 40 > len(packed)
    assert padded.report()["real_tokens"] == packed.report()["real_tokens"]
    assert 0.3 < padded.report()["padding_share"] < 0.7


@pytest.mark.parametrize("name", train_throughput.ROWS)
def test_rows_are_commands_of_the_program(name):
    row, flags, zero, variables = train_throughput.row_named(name)
    args = arguments.parse(train_throughput.words(flags | {"dtype": row.dtype}))
    assert args.dtype == ("bf16" if "bf16" in name else "fp16")
    assert row.cap == (name in ("ours", "starter", "plain"))
    assert (row.zero == train_throughput.REPLICATED) == name.startswith("replicated")
    assert zero == variables == {}


def test_levers_are_flags_or_keys_of_zero_optimization():
    _, flags, zero, variables = train_throughput.row_named(
        "ours_bf16,lora_r=64,overlap_comm=true,reduce_bucket_size=5,NNODES=2"
    )
    assert flags == {"tokens_per_micro_batch": 16384, "lora_r": "64"}
    assert zero == {"overlap_comm": True, "reduce_bucket_size": 5}
    assert variables == {"NNODES": "2"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("theirs", "no row theirs; there are ours, starter"),
        ("ours,lora_r", "no row ours,lora_r"),
        ("ours,lora_r=a", "--lora_r: invalid int value"),
        ("ours,overlap_comm=yes", "ours,overlap_comm=yes: neither a flag nor a JSON value"),
    ],
)
def test_rows_that_do_not_exist_are_one_line(name, message):
    with pytest.raises(UserError, match=message):
        train_throughput.row_named(name)


def test_a_row_without_end_is_killed(monkeypatch, tmp_path):
    def run() -> dict:
        return train_throughput.run_program(train_throughput.ROWS["ours"], [], tmp_path, {})

    monkeypatch.setattr(train_throughput, "ROW_TIMEOUT_S", 1)
    monkeypatch.setattr(train_throughput.program, "main", lambda argv: time.sleep(60))
    with pytest.raises(UserError, match="exit code -14"):
        train_throughput.rows.in_child(run, tmp_path / "terminal.log")
    monkeypatch.setattr(train_throughput.program, "main", lambda argv: 75)
    assert train_throughput.rows.in_child(run, tmp_path / "terminal.log") == {"code": 75}


def test_the_replicated_row_scales_its_loss():
    class Engine:
        optimizer = SimpleNamespace(loss_scale_config=SimpleNamespace(cur_scale=4.0))

        def backward(self, loss, scale_wrt_gas=True):
            return loss, scale_wrt_gas

    train_throughput.scale_the_loss(Engine)
    engine = Engine()
    assert engine.backward(2.0, scale_wrt_gas=False) == (8.0, False)
    engine.optimizer = SimpleNamespace()  # bf16 and fp32 have no scale
    assert engine.backward(2.0) == (2.0, True)


def test_ratios_are_of_rows_of_the_same_command():
    rates = {"ours": 6000, "starter": 100, "replicated": 7500, "ours_1gpu_nocap": 8000, "ours_2gpu_nocap": 6400}
    rates["plain_bf16"] = 1  # ours_bf16 fails
    same = {"peak_reserved_gib": None, "predicted_peak_gib": None, "gpu_name": "H100"}
    rows = [{"row": row, "real_tokens_per_s_per_gpu": rate} | same for row, rate in rates.items()]
    rows[0] |= {"peak_reserved_gib": 10.0, "predicted_peak_gib": 11.0}
    rows.append({"row": "ours_bf16", "error": "out of GPU memory"})
    found = train_throughput.ratios({"rows": rows})
    named = {"ratio_vs_starter": 60, "ratio_vs_ceiling": 0.8, "scaling_1_to_2": 0.8}
    assert found["ratios"] == {row: rate / 6000 for row, rate in rates.items()} | named
    assert found["prediction_errors"] == {"ours": pytest.approx(0.1)}
    assert found["hardware"] == "H100"
    assert train_throughput.ratios({"rows": rows[-1:]})["ratios"] == {}


@pytest.mark.long
def test_rows_of_training_on_the_cpu(tiny_model, tmp_path):
    """Replicated weights take ZeRO-3's course; a row that fails leaves its reason, and the others run."""
    rows = [
        "starter",
        "replicated",
        "ours_1gpu_nocap,lora_r=4",
        "ours,max_seq_len=4096",
        "ours,num_gpus=1,NNODES=2",
    ]
    command = [sys.executable, "-P", str(ROOT / "bench" / "train_throughput.py"), *rows, "--device", "cpu"]
    command += ["--model_path", str(tiny_model), "--micro_batches", "2", "--output", "result.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 3, run.stdout + run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    found = {row["row"]: row for row in result["rows"]}
    assert list(found) == ["ours", *rows]
    assert "must be a multiple" in found[rows[3]]["error"]
    assert found[rows[4]]["adapter_sha256"] == found["ours"]["adapter_sha256"]
    assert found["replicated"]["losses"] == pytest.approx(found["ours"]["losses"], abs=1e-5)
    assert found["replicated"]["zero"]["stage"] == 0
    assert len(found["ours"]["losses"]) == 4 + 2
    assert found["ours"]["real_share"] > 0.9 > 0.6 > found["starter"]["real_share"]
    assert found["starter"]["zero"]["stage3_prefetch_bucket_size"] == 30_000_000
    assert found["starter"]["micro_batches_per_step"] == 4
    assert found[rows[2]]["world_size"] == 1
    assert result["ratios"]["ratio_vs_starter"] > 0
