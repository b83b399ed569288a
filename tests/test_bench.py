"""The benchmarks of inference: the same work for every row, and ratios within a command only."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from harness import ROOT, fork

sys.path.append(str(ROOT / "bench"))
import batch_invariance
import offline_throughput
import qwen_shape
import same_bytes

from batch_infer.arguments import Arguments
from batch_infer.engine import environment
from workbench import UserError, files

GIVEN = {"records": None, "seed": 0, "capped": False, "limit": 0, "cap": 8192}


def test_drawn_lengths_are_alpaca_evals():
    """437,212 answer tokens and 56,237 with template for the prompts; another seed draws others."""
    records = offline_throughput.workload(argparse.Namespace(**GIVEN), 152064)
    assert len({record.key for record in records}) == len(records) == 805
    assert sum(record.answer_tokens for record in records) == pytest.approx(437_212, rel=0.06)
    assert sum(len(record.input_ids) for record in records) == pytest.approx(56_237, rel=0.1)
    again = offline_throughput.workload(argparse.Namespace(**GIVEN), 152064)
    assert records == again
    other = offline_throughput.workload(argparse.Namespace(**GIVEN | {"seed": 1}), 152064)
    assert [r.answer_tokens for r in records] != [r.answer_tokens for r in other]
    capped = offline_throughput.workload(argparse.Namespace(**GIVEN | {"capped": True}), 152064)
    assert sum(record.answer_tokens == 8192 for record in capped) == 161


def test_prompts_share_the_header_only():
    first, second = (qwen_shape.prompt_ids(text, 1000) for text in ("a" * 80, "b" * 400))
    assert (len(first), len(second)) == (20 + 29, 100 + 29)
    assert first[: qwen_shape.HEADER_TOKENS] == second[: qwen_shape.HEADER_TOKENS]
    assert first[qwen_shape.HEADER_TOKENS :] != second[qwen_shape.HEADER_TOKENS : len(first)]


@pytest.mark.parametrize(
    "text", ["[{}]", "not json", '["text"]', '[{"instruction": "a", "output_tokens": "b"}]']
)
def test_bad_records_are_one_line(tmp_path, text):
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(UserError, match=r"--records .*: a JSON array of objects with instruction"):
        offline_throughput.workload(
            argparse.Namespace(**GIVEN | {"records": tmp_path / "records.json"}), 152064
        )


def test_ratios_stay_within_a_command():
    def part(file, roofline, **seconds):
        return {
            "workload": {"capped_fifth": False, "file_sha256": file, "records": 805},
            "roofline_s": roofline,
            "kernel_floor_s": roofline * 1.2,
            "rows": [{"row": row, "seconds": value} for row, value in seconds.items()],
        }

    merged = offline_throughput.merge(
        [
            part("abc", 10.0, fast=20.0, batches_64=100.0),
            part("abc", 10.0, fast=10.0, batches_64=30.0, default=15.0, fast_dp2=5.0),
            part(None, 10.0, fast=1.0, batches_64=99.0),
        ]
    )
    assert merged["ratio_vs_batches_64"] == 5.0  # the first part's; drawn lengths stand apart
    assert merged["ratio_to_roofline"] == 2.0
    assert merged["ratio_default_to_fast"] == 1.5
    assert merged["dp2_scaling"] == 2.0
    assert merged["ratio_vs_defaults"] is None
    assert merged["ratios"]["reference_drawn"] == [
        {"fast": 1.0, "batches_64": 99.0, "roofline": 0.1, "kernel_floor": 1 / 12}
    ]


def test_the_kernel_floor_is_the_sum_over_steps():
    """Two records of 1 and 3 tokens: steps of 2, 1 and 1 running, with 10 + 20, 21 and 22 tokens of KV."""
    model = argparse.Namespace(kv_bytes_per_token=100)
    found = offline_throughput.kernel_floor_s([(10, 1), (20, 3)], model, 1000.0, {1: 5.0, 3: 9.0})
    assert found == pytest.approx(7 + 5 + 5 + (30 + 21 + 22) / 10)


@pytest.mark.long
def test_rows_on_the_cpu(tiny_qwen2, tmp_path):
    """Rows end at their lengths (the script refuses others); of a capped workload two batches stand for all."""
    adapter = tmp_path / "adapter"

    def make_adapter() -> int:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen2)
        projections = ["q_proj", "k_proj", "v_proj", "down_proj"]
        peft.get_peft_model(base, peft.LoraConfig(target_modules=projections)).save_pretrained(adapter)
        return 0

    code, text = fork(make_adapter, tmp_path / "child.txt").wait()
    assert code == 0, text
    command = [
        sys.executable,
        "-P",
        str(ROOT / "bench" / "offline_throughput.py"),
        "batches_32",
        "transformers",
        "default_adapter,max_loras_per_batch=3",
    ]
    command += ["--device", "cpu", "--model_path", str(tiny_qwen2), "--limit", "80", "--cap", "10", "--capped"]
    command += ["--peer_records", "4", "--engine_args", "{}", "--part", str(tmp_path / "part.json")]
    command += ["--lora_path", str(adapter)]
    subprocess.run(command, check=True, cwd=tmp_path)
    rows = {row["row"]: row for row in json.loads((tmp_path / "part.json").read_text())["rows"]}
    assert list(rows) == [
        "fast",
        "batches_32",
        "transformers",
        "fast_on_the_same",
        "default_adapter,max_loras_per_batch=3",
    ]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["batches_32"]["estimated_from_records"] == 64
    served = rows["default_adapter,max_loras_per_batch=3"]["engine_args"]
    assert served["lora_paths"] == {str(adapter): str(adapter)}
    assert served["max_loras_per_batch"] == 3
    assert served["enable_deterministic_inference"]


def test_same_bytes_compares_the_runs_that_ended():
    """In the order asked for, whichever ended first; a failed run is no identical one."""
    settings = {"engine_args": {}, "weights_id": "w", "cpu_capability": "AVX2", "versions": {}}
    same = {"command": [], "settings": settings, "sha256": "a", "outputs": ["x", "y"]}
    results = [
        {"run": "other"} | same | {"sha256": "b", "outputs": ["x", "z"]},
        {"run": "failed", "error": "exit code 2"},
        {"run": "first"} | same,
    ]
    compared = same_bytes.compare(results, ["first", "failed", "other"])
    assert compared["identical_runs"] == 1
    assert compared["weights_id"] == "w"
    assert [row["run"] for row in compared["runs"]] == ["first", "failed", "other"]
    assert compared["runs"][2] == {
        "run": "other",
        "sha256": "b",
        "different_records": 1,
        "which": [1],
    }
    assert same_bytes.compare(results[1:2], ["failed"])["identical_runs"] == 0


def test_results_of_benchmarks_do_not_make_a_commit_dirty(monkeypatch, tmp_path):
    """A script that writes its result before it ends would otherwise mark its own next run."""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    (tmp_path / "bench" / "results").mkdir(parents=True)
    result, program = tmp_path / "bench" / "results" / "a.json", tmp_path / "program.py"
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert files.commit() is None
    result.write_text("{}")
    program.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = files.commit()
    assert len(head) == 40
    result.write_text("[]")
    assert files.commit() == head
    program.write_text("changed")
    assert files.commit() == head + "-dirty"


def test_batch_invariance_names_the_module_that_looks_at_its_neighbours(tmp_path):
    """On the real ModelRunner: nothing differs, until one projection adds the number of its rows."""
    import tiny_model

    def run() -> int:
        os.environ.update(environment(Arguments(device="cpu")))
        runner = batch_invariance.Runner(tiny_model.build_qwen2(tmp_path / "model"), "cpu")
        rows = batch_invariance.measure(runner, 6)
        assert len(rows) == 2 * len(batch_invariance.BATCHES) + 3 * len(batch_invariance.CACHED_TOKENS)
        assert {row["different_prompts"] for row in rows} == {0}, rows
        layer = runner.runner.model.model.layers[1].mlp.down_proj
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * (1 + 1e-3 * len(inputs[0])),))
        alone = batch_invariance.measure(runner, 6)[0]
        assert alone["different_prompts"] == 6
        assert alone["first_difference"] == {"model.layers.1.mlp.down_proj": 6}
        return 0

    code, text = fork(run, tmp_path / "child.txt").wait()
    assert code == 0, text
