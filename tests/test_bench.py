"""The benchmarks of inference: the same work for every row, and ratios within a command only."""

import functools
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import ROOT, fork

sys.path.append(str(ROOT / "bench"))
import offline_throughput
import rows
import same_bytes
import shapes
import step_profile

from batch_infer.engine_args import environment
from workbench import UserError, files


def given(**changes) -> SimpleNamespace:
    """Flags of offline_throughput.py."""
    flags = {"records": None, "seed": 0, "limit": 0, "cap": 8192, "device": "cpu", "engine_args": "{}"}
    return SimpleNamespace(**flags | {"model_path": None, "lora_path": None} | changes)


def bench(script: str, *words: object, expect: int = 0) -> str:
    command = [sys.executable, "-P", str(ROOT / "bench" / script), *map(str, words), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == expect, run.stdout + run.stderr
    return run.stdout + run.stderr


# --- offline_throughput.py ----------------------------------------------------------------------------


def test_drawn_lengths_are_alpaca_evals():
    """437,212 answer tokens and 56,237 with template for the prompts; another seed draws others."""
    work = offline_throughput.workload(given(), 152064)
    assert len(work) == 805
    assert sum(tokens for _, tokens in work) == pytest.approx(437_212, rel=0.06)
    assert sum(len(ids) for ids, _ in work) == pytest.approx(56_237, rel=0.1)
    assert work == offline_throughput.workload(given(), 152064)
    assert work != offline_throughput.workload(given(seed=1), 152064)


def test_prompts_share_the_header_only():
    first, second = (offline_throughput.prompt_ids(text, 1000) for text in ("a" * 80, "b" * 400))
    assert (len(first), len(second)) == (20 + 29, 100 + 29)
    assert first[:24] == second[:24]
    assert first[24:] != second[24 : len(first)]


@pytest.mark.parametrize("row", [{}, "text", {"instruction": "a", "output_tokens": "b"}])
def test_bad_records_are_one_line(tmp_path, row):
    (tmp_path / "records.json").write_text(json.dumps([{"instruction": "a", "output_tokens": 5}, row]))
    with pytest.raises(UserError, match=r"--records .*, row 2: no instruction and output_tokens"):
        offline_throughput.workload(given(records=str(tmp_path / "records.json")), 152064)


def test_rows_are_commands_of_the_program(tmp_path):
    """A lever is a flag, an engine argument or (in capitals) an environment variable."""
    args, variables = offline_throughput.command(
        "default,tp_size=2,page_size=16,kv_cache_dtype=auto,A_B=1", given()
    )
    assert (args.fast, args.tp_size, args.dp_size, args.max_new_tokens) == (False, 2, 1, 8192)
    assert args.own_engine_args == {"page_size": 16, "kv_cache_dtype": "auto"}
    assert variables == {"A_B": "1"}
    assert offline_throughput.command("fast_dp2", given())[0].dp_size == 2
    adapter = given(model_path=str(tmp_path), lora_path=str(tmp_path))
    assert offline_throughput.command("adapter", adapter)[0].lora_path == str(tmp_path)
    with pytest.raises(UserError, match="the row adapter needs --lora_path"):
        offline_throughput.command("adapter", given())
    assert all(
        offline_throughput.command(row, given())[0].fast for row in ("fast", "sglang_defaults", "batches_64")
    )


@pytest.mark.parametrize("row", ["slow", "batches_0", "batches_64,page_size=1", "fast,page_size"])
def test_rows_that_do_not_exist_are_one_line(row):
    with pytest.raises(UserError, match=f"no row {row}"):
        offline_throughput.command(row, given())


def test_records_end_at_their_lengths_in_both_profiles():
    work = [([5, 6], 3), ([7], 4)]
    for row, seeds in (("default", [0, 1]), ("fast", [None, None])):
        args = offline_throughput.command(row, given(device="cuda", model_path="a/b"))[0]
        params = [record.sampling_params for record in offline_throughput.records_of(work, args)]
        assert [p["custom_params"] for p in params] == [{"answer_tokens": 3}, {"answer_tokens": 4}]
        assert [p.get("sampling_seed") for p in params] == seeds
        assert {p["max_new_tokens"] for p in params} == {8192}


def test_the_roofline_computes_a_shared_prefix_once():
    """Prompts of 3 and 4 tokens that share 2 and answers of 1 and 2: 5 tokens to prefill, then 2 steps at 1,000 bytes/s."""
    model = SimpleNamespace(streamed_bytes=1000, kv_bytes_per_token=10)
    rates = {"bandwidth_bytes_per_s": 1000.0, "matmul_flops_per_s": 1e6}
    found = offline_throughput.roofline_s([([1, 2, 3], 1), ([1, 2, 4, 5], 2)], model, rates)
    assert found == pytest.approx(5 * 1000 / 1e6 + (1000 + 7 * 10) / 1000 + (1000 + 5 * 10) / 1000)


def test_ratios_are_to_the_first_row_of_the_command():
    measured = [
        {"row": "fast", "seconds": 20.0},
        {"row": "default", "seconds": 25.0},
        {"row": "adapter", "error": "no"},
    ]
    found = offline_throughput.ratios({"rows": measured, "roofline_s": 10.0})
    assert found == {"ratios": {"fast": 1.0, "default": 1.25, "first_to_roofline": 2.0}}
    assert offline_throughput.ratios({"rows": measured[2:], "roofline_s": 10.0}) == {"ratios": {}}


def test_the_environment_of_a_row(monkeypatch, tmp_path):
    """Kernels of other compiler flags have a folder of their own; None unsets what run_sglang.py sets."""
    monkeypatch.setattr(os, "environ", {"FLASHINFER_WORKSPACE_BASE": str(tmp_path)})
    args = offline_throughput.command("fast", given(device="cuda", model_path="a/b"))[0]
    inputs = SimpleNamespace(machine=SimpleNamespace(compiler={"CUDA_HOME": "/cuda"}))
    offline_throughput.set_up_environment(args, inputs, {})
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path)
    assert os.environ["RUNTIME_PLUGINS"] == "lean_sampler,answer_lengths"
    offline_throughput.set_up_environment(args, inputs, dict.fromkeys(environment(args)))
    assert not {"FLASHINFER_EXTRA_CUDAFLAGS", "SGLANG_FORCE_STREAM_INTERVAL"} & os.environ.keys()
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "kernels_of_other_flags")
    assert os.environ["RUNTIME_PLUGINS"] == ",answer_lengths"


@pytest.mark.long
def test_rows_of_inference_on_the_cpu(tiny_qwen2, tmp_path):
    """Rows end at their lengths (the script refuses others); one that fails leaves its reason and the others run."""

    def make_adapter() -> int:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen2)
        projections = ["q_proj", "k_proj", "v_proj", "down_proj"]
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=projections))
        adapted.save_pretrained(tmp_path / "adapter")
        return 0

    code, text = fork(make_adapter, tmp_path / "child.txt").wait()
    assert code == 0, text
    out, names = (
        tmp_path / "result.json",
        ["fast", "fast,page_sise=2", "batches_4", "adapter,max_loras_per_batch=3"],
    )
    model = ["--model_path", tiny_qwen2, "--lora_path", tmp_path / "adapter"]
    bench("offline_throughput.py", *names, *model, "--output", out, expect=3)
    result = json.loads(out.read_text())
    found = {row["row"]: row for row in result["rows"]}
    assert list(found) == names
    assert "did you mean page_size" in found["fast,page_sise=2"]["error"]
    assert found[names[3]]["engine_args"]["max_loras_per_batch"] == 3
    assert result["ratios"].keys() == {"fast", *names[2:]}
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert result["workload"]["records"] == 12


def test_a_step_ends_as_its_tokens_are_drawn(tmp_path):
    """Two steps of 10 and 12 microseconds between three draws; what ran before the first one is prefill's."""
    kernels = [(0, 5, "ncclAllReduce"), (5, 2, "draw"), (8, 4, "nvjet_tst"), (15, 2, "draw")]
    kernels += [(17, 6, "nvjet_tst"), (20, 4, "ncclAllReduce"), (28, 1, "draw")]
    events = [{"cat": "kernel", "ts": begin, "dur": took, "name": name} for begin, took, name in kernels]
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": [*events, {"cat": "cpu_op"}]}).encode()))
    found = step_profile.by_kind(trace)
    assert found["profiled_s"] == pytest.approx(11e-6)
    expected = {"matrix products": 5e-6, "sums over GPUs": 2e-6, "drawing": 1.5e-6, "none": 4e-6}
    assert found["gpu_s"] == pytest.approx(expected)
    assert list(found["longest_kernels_s"]) == ["nvjet_tst", "ncclAllReduce", "draw"]


def test_steps_of_records_are_added_up_by_how_many_run():
    """Two run for a step, one for two more: what lies between 1 and 3 is on a straight line."""
    by_running = {3: {"step_s": 5.0, "gpu_s": {"norms": 1.0, "none": 9.0}}, 1: {"step_s": 3.0, "gpu_s": {}}}
    assert step_profile.all_steps_s(by_running, [1, 3]) == pytest.approx({"step": 10.0, "norms": 0.5})


# --- start.py -----------------------------------------------------------------------------------------


def test_a_start_in_parts(tiny_qwen2, tmp_path):
    out = tmp_path / "start.json"
    bench("start.py", "again", "again,temprature=0", "--model_path", tiny_qwen2, "--output", out, expect=3)
    result = json.loads(out.read_text())
    first, wrong = result["rows"]
    assert "temprature" in wrong["error"]
    order = [first["parts"][name] for name in ("GPUs known", "inputs checked", "tokenised", "answering")]
    assert order == sorted(order)
    assert first["seconds"] == order[-1] > first["load_s"] > 0
    assert result["ratios"] == {"again": 1.0}


# --- rows.py ------------------------------------------------------------------------------------------


def test_a_row_that_dies_leaves_its_last_line(tmp_path, capfd):
    def dies():
        print("loading")
        raise ValueError("no such kernel")

    message = r"ValueError: no such kernel \(.* exit code 1; see .*row\.log"
    with capfd.disabled(), pytest.raises(UserError, match=message):
        rows.in_child(dies, tmp_path / "row.log")
    assert rows.in_child(lambda: {"seconds": 1.5}, tmp_path / "row.log") == {"seconds": 1.5}


def test_the_reason_of_a_failed_program_is_its_own_error(tmp_path):
    log = tmp_path / "row.log"
    assert rows.reason(log, "exit code -11") == f"exit code -11 (exit code -11; see {log})"
    log.write_text("loading\n  0%|\rTraceback\n  File x\ntorch.AcceleratorError: CUDA error\n")
    assert rows.reason(log, "exit code 1").startswith("torch.AcceleratorError: CUDA error (exit code 1")
    log.write_text("preflight\nerror: out of GPU memory (x); use a smaller\nrank 1 ended\n")
    assert rows.reason(log, "exit code 2").startswith("out of GPU memory (x); use a smaller (exit code 2")


def test_the_result_is_there_after_every_row_and_a_failing_row_leaves_its_reason(tmp_path):
    written, out = [], tmp_path / "result.json"

    def measure_row(name: str, number: int) -> dict:
        written.append(json.loads(out.read_text())["ratios"] if out.exists() else None)
        if name == "bad":
            raise UserError("no such flag")
        return {"seconds": float(number)}

    def ratios(result: dict) -> dict:
        return {"ratios": len(result["rows"])}

    result = rows.measure(["a", "bad", "b"], measure_row, ratios, {"commit": None}, out)
    assert written == [None, 1, 2]
    assert json.loads(out.read_text()) == result
    assert result["rows"][1:] == [{"row": "bad", "error": "no such flag"}, {"row": "b", "seconds": 2.0}]


# --- same_bytes.py ------------------------------------------------------------------------------------


def test_flags_of_the_runs():
    assert same_bytes.flags_of("fresh_7") == same_bytes.flags_of("killed_and_resumed") == ["--dp_size", "1"]
    assert same_bytes.flags_of("in_flight_64") == ["--dp_size", "1", "--batch_size", "64"]
    assert same_bytes.flags_of("shared_5") == ["--dp_size", "1", "--tp_size", "2"]
    assert same_bytes.flags_of("running_100") == ["--dp_size", "1", "--max_running_requests", "100"]
    assert same_bytes.flags_of("two_gpus") == ["--dp_size", "2"]
    assert "--jump_forward" in same_bytes.flags_of("jump_forward")
    for run in ("fresh", "in_flight_", "running_all"):
        with pytest.raises(UserError, match=f"no row {run}"):
            same_bytes.flags_of(run)


def test_same_bytes_compares_with_the_first_run_that_ended(monkeypatch, tmp_path):
    written = {"failed": None, "first": ["x", "y"], "other": ["x", "z"]}

    def run(command: list[str], **_) -> SimpleNamespace:
        folder = Path(command[-1]).parent
        if not written[folder.name]:
            return SimpleNamespace(returncode=2)
        (folder / same_bytes.ALL).write_text(json.dumps([{"output": text} for text in written[folder.name]]))
        names = ("gpu_name", "weights_id", "adapter_id", "versions")
        settings = dict.fromkeys(names, "x") | {"engine_args": {"model_path": "/a", "dp_size": 1}}
        (folder / same_bytes.SUMMARY).write_text(
            json.dumps(dict.fromkeys(same_bytes.COUNTS, 1) | {"settings": settings})
        )
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(same_bytes, "FOLDER", tmp_path)
    monkeypatch.setattr(same_bytes, "flags_of", lambda run: [])
    monkeypatch.setattr(same_bytes.subprocess, "run", run)
    measure = functools.partial(same_bytes.measure_row, command=["run"], kill_at=1, first={})
    found = rows.measure(list(written), measure, same_bytes.ratios, {}, tmp_path / "result.json")
    assert [row.get("different_records") for row in found["rows"]] == [None, 0, 1]
    assert found["rows"][2]["which"] == [1]
    assert found["rows"][1]["engine_args"] == {"dp_size": 1}
    assert "exit code 2, see " in found["rows"][0]["error"]
    assert found["ratios"] == {"first": 0, "other": 0.5}


@pytest.mark.long
def test_the_bytes_are_the_same_after_a_kill(tmp_path):
    words = ["fresh_1", "killed_and_resumed", "--limit", 20, "--max_new_tokens", 16]
    text = bench("same_bytes.py", *words, "--output", tmp_path / "result.json")
    assert '{"fresh_1": 0.0, "killed_and_resumed": 0.0}' in text
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["different_records"] for row in result["rows"]] == [0, 0]
    assert 4 <= result["rows"][1]["answers_before_the_kill"] < 20
    assert result["repeated_prompts"] == 4


# --- shapes.py ----------------------------------------------------------------------------------------


SIZES = {"llama2-7b": 6_738_415_616, "tinyllama-1.1b": 1_100_048_384, "qwen2.5-7b": 7_615_616_512}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_have_their_published_sizes(name):
    c = shapes.SHAPES[name]
    hidden, kv = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * c["intermediate_size"] + 2 * hidden
    layer += hidden + 2 * kv if c["model_type"] == "qwen2" else 0  # biases
    tables = 1 if c["tie_word_embeddings"] else 2
    assert c["num_hidden_layers"] * layer + tables * c["vocab_size"] * hidden + hidden == SIZES[name]


@pytest.mark.parametrize("name", ["llama2-7b", "qwen2.5-7b"])
def test_a_shape_loads_as_a_model(transformers, tmp_path, name):
    """With its precision, random weights and a tokenizer of as many tokens that knows the words of the rehearsal's."""
    small = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}

    def build() -> int:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = shapes.build(name, tmp_path / "model", **small | heads)
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        assert str(model.dtype) == f"torch.{shapes.SHAPES[name]['torch_dtype']}"
        assert 0.01 < model.model.layers[1].mlp.down_proj.weight.float().std().item() < 0.06
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == small["vocab_size"]
        assert tokenizer.decode(tokenizer("the answer is here")["input_ids"]).endswith("the answer is here")
        (folder / "config.json").unlink()
        shapes.build(name, folder)  # a folder that is there is complete and stays as it is
        assert not (folder / "config.json").exists()
        return 0

    code, text = fork(build, tmp_path / "terminal.txt").wait()
    assert code == 0, text


# --- the commit that a result names -------------------------------------------------------------------


def test_results_of_benchmarks_do_not_make_a_commit_dirty(monkeypatch, tmp_path):
    """A script that writes its result before it ends would otherwise mark its own next run."""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    (tmp_path / "bench" / "results").mkdir(parents=True)
    result, program = tmp_path / "bench" / "results" / "a.json", tmp_path / "program.py"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert files.commit(tmp_path) is None
    result.write_text("{}")
    program.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = files.commit(tmp_path)
    assert len(head) == 40
    result.write_text("[]")
    assert files.commit(tmp_path) == head
    program.write_text("changed")
    assert files.commit(tmp_path) == head + "-dirty"
