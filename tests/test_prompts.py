"""Reading prompts, the seeds and keys of records, the durable file, and the arguments chosen for an engine."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_infer import engine, prompts, records
from batch_infer.arguments import DEFAULT_MODEL, Arguments, check_engine_args, parse
from batch_infer.engine import Machine, Model
from batch_infer.prompts import Record
from workbench import UserError
from workbench.machine import GIB

HEADS = {"num_attention_heads": 28, "num_key_value_heads": 4}
QWEN_7B = Model("qwen", 32768, 15_230_000_000, 14_140_000_000, 57_344, 152_064, config=HEADS)
H200 = Machine("cuda", "NVIDIA H200", 1, 140.4, 4.8e12, 9.9e14)


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


# --- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"instruction": "one"}, "two"]'),
        ("a.jsonl", '{"instruction": "one"}\n\n{"prompt": "two"}\n'),
        ("a.json", '\ufeff[{"instruction": "one", "output": "ignored"}, {"prompt": "two"}]'),
        ("a.txt", "one\n\ntwo\n"),
    ],
)
def test_formats(tmp_path, name, text):
    assert [record.instruction for record in prompts.read(write(tmp_path, name, text))] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.json",
            '[{"instruction": "one"},\n {"instruction" "two"}]',
            r"a.json, line 2, column 17: not valid JSON",
        ),
        ("a.jsonl", '{"instruction": "one"}\n{oops}\n', r"a.jsonl, line 2, column 2: not valid JSON"),
        ("a.json", "[]", "no prompts in it"),
        ("a.txt", "\n\n", "no prompts in it"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, expected):
    with pytest.raises(UserError, match=expected):
        prompts.read(write(tmp_path, name, text))


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        prompts.read(tmp_path / "a.txt")


def test_both_grammars_are_refused():
    record = prompts._record(0, {"instruction": "x", "regex": "a", "json_schema": {}})
    assert record.error == "both 'regex' and 'json_schema' are given; use one"


class Words:
    """A tokenizer with a template, as far as prepare() needs one."""

    name_or_path, chat_template = "words", "yes"

    def apply_chat_template(self, messages, **_):
        return [1, *(len(word) for word in messages[0]["content"].split()), 2]

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def prepared(args: Arguments, texts: list[str], weights: str = "w", context: int = 64) -> list[Record]:
    found = [Record(index, text) for index, text in enumerate(texts)]
    prompts.prepare(found, args, Words(), context, {None: weights})
    return found


def test_keys_and_seeds_depend_on_everything_that_matters():
    args = Arguments()
    first, second = prepared(args, ["a bb", "a bb"])
    assert first.seed != second.seed
    assert first.key != second.key
    assert prepared(args, ["a bb"])[0] == first
    for changed in (replace(args, seed=1), replace(args, temperature=0.1), replace(args, max_new_tokens=9)):
        assert prepared(changed, ["a bb"])[0].key != first.key
    assert prepared(args, ["a bb"], weights="other")[0].key != first.key
    assert prepared(replace(args, raw=True), ["a bb"])[0].input_ids == [1, 2]
    assert 0 <= first.seed < 2**31


def test_room_for_the_answer_ends_with_the_context():
    args = Arguments(max_new_tokens=50)
    short, long, too_long = prepared(args, ["a", "a " * 30, "a " * 62])
    assert (short.max_new_tokens, long.max_new_tokens) == (50, 64 - 32 - 1)
    assert too_long.error == "64 prompt tokens; the context holds 64"


def test_fast_profile_sends_no_seed():
    record = Record(0, "x", max_new_tokens=4, seed=7)
    assert record.sampling_params(Arguments())["sampling_seed"] == 7
    assert "sampling_seed" not in record.sampling_params(Arguments(fast=True))


# --- the durable file ---------------------------------------------------------------------------------


HEADER = [{"identity": {"seed": 1}}, {"machine": {"gpu_name": "A"}}]


@given(st.integers(0, 500))
def test_partial_file_survives_any_cut(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("partial")
    file = records.PartialFile(folder, {"seed": 1}, {"gpu_name": "A"})
    rows = [{"index": i, "key": f"k{i}", "output": "ü" * i} for i in range(8)]
    for row in rows:
        file.append([row])
    file.close()
    path = folder / records.PARTIAL
    assert [json.loads(line) for line in path.read_text().splitlines()] == HEADER + rows
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    complete = data[:cut].count(b"\n")
    assert records.count_answers(path) == max(0, complete - 2)
    again = records.PartialFile(folder, {"seed": 1}, {"gpu_name": "A"})
    assert list(again.rows.values()) == rows[: max(0, complete - 2)]
    again.append(rows[-1:])
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == HEADER + rows[: max(0, complete - 2)] + rows[-1:]


def test_a_command_without_an_answer_claims_nothing(tmp_path):
    file = records.PartialFile(tmp_path, {"engine_args": "typo"}, {})
    file.append([{"index": 0, "key": "", "error": "empty"}])
    assert not file.path.exists()
    file.close()  # a finished run of failures only
    assert records.stored_identity(tmp_path) == {"engine_args": "typo"}
    assert records.count_answers(file.path) == 0


def test_another_machine_is_remembered(tmp_path):
    for name in ("A", "A", "B"):
        file = records.PartialFile(tmp_path, {}, {"gpu_name": name})
        file.append([{"index": 0, "key": "", "output": "x"}])
        file.close()
    assert [machine["gpu_name"] for machine in file.machines] == ["A", "B"]


def test_only_answers_with_the_same_key_count(tmp_path):
    file = records.PartialFile(tmp_path, {}, {})
    file.append([{"index": 0, "key": "a", "output": "x"}, {"index": 1, "key": "b", "error": "no"}])
    assert file.done(Record(0, "", key="a"))
    assert not file.done(Record(0, "", key="z"))
    assert not file.done(Record(1, "", key="b"))
    assert not file.done(Record(2, "", key="c"))


def test_a_text_that_cannot_be_tokenised_is_one_records_failure():
    class Picky(Words):
        def apply_chat_template(self, messages, **options):
            if "bad" in messages[0]["content"]:
                raise TypeError("no such text")
            return super().apply_chat_template(messages, **options)

    found = [Record(0, "good"), Record(1, "bad")]
    prompts.prepare(found, Arguments(), Picky(), 64, {None: "w"})
    assert found[0].error is None
    assert "cannot be tokenised" in found[1].error


# --- engine arguments ---------------------------------------------------------------------------------


def values(args: Arguments, machine: Machine = H200, model: Model = QWEN_7B, count: int = 805) -> dict:
    found = [Record(index, "x", input_ids=[1] * 50) for index in range(count)]
    return {name: value for name, (value, _) in engine.choose(args, machine, model, found).items()}


@pytest.mark.parametrize(
    ("config", "flags", "tokens"),
    [
        (HEADS, {}, 10),
        ({"num_attention_heads": 32}, {}, 65),  # no shared KV heads
        (
            HEADS | {"num_attention_heads": 32},
            {"tp_size": 8},
            17,
        ),  # KV heads are replicated: 4 queries for each
        (HEADS, {"engine_args": '{"attention_backend": "triton"}'}, 0),
        (HEADS, {"device": "cpu"}, 0),
    ],
)
def test_prompts_below_a_tile_are_counted(config, flags, tokens):
    """FlashInfer's FA2DetermineCtaTileQ: from 65 packed queries on, one tile whatever runs beside."""
    args, model = Arguments(**flags), dataclasses.replace(QWEN_7B, config=config)
    assert engine.tile_tokens(args, model) == tokens
    found = [Record(0, "x", input_ids=[1] * n) for n in (2, 64, 65)]
    if not flags:
        _, why = engine.choose(args, H200, model, found)["enable_deterministic_inference"]
        assert f"but for {1 if tokens == 10 else 2} prompts of fewer than {tokens} tokens" in why


def test_an_adapter_runs_on_the_faster_kernels():
    for lora, backend in ((None, None), ("/adapter", "triton")):
        found = [Record(0, "x", input_ids=[1] * 50, lora=lora)]
        chosen = engine.choose(Arguments(), H200, QWEN_7B, found)
        assert chosen.get("lora_backend", (None, ""))[0] == backend


def test_h200_gets_the_assignments_engine():
    chosen = values(Arguments())
    assert chosen["attention_backend"] == "flashinfer"
    assert chosen["enable_deterministic_inference"] is True
    assert "disable_radix_cache" not in chosen
    assert chosen["cuda_graph_max_bs_decode"] >= 805
    assert "max_running_requests" not in chosen
    fast = values(Arguments(fast=True))
    assert fast["cuda_graph_max_bs_decode"] >= 805
    assert "enable_deterministic_inference" not in fast
    assert values(Arguments(), replace(H200, gpus=4))["dp_size"] == 4
    assert values(Arguments(tp_size=2), replace(H200, gpus=4))["dp_size"] == 2


@pytest.mark.parametrize("flags", [{"top_k": 50}, {"top_p": 1.0}])
def test_draws_that_sort_all_logits_run_fewer_at_once(flags):
    """Those that lean_sampler leaves to SGLang; greedy ones need no draw, and without seeds nothing is sorted."""
    chosen, free = values(Arguments(**flags)), values(Arguments())
    assert chosen["max_running_requests"] == chosen["cuda_graph_max_bs_decode"] == 256
    assert values(Arguments(**flags, max_running_requests=64))["max_running_requests"] == 64
    for other in (Arguments(**flags, temperature=0.0), Arguments(**flags, fast=True)):
        assert "max_running_requests" not in values(other)
    card = replace(H200, memory_gib=24.0)
    small, reserved = (
        values(Arguments(**flags), card),
        1 - values(Arguments(**flags), card)["mem_fraction_static"],
    )
    assert reserved * 24 > 3.5 + small["cuda_graph_max_bs_decode"] * 32 * QWEN_7B.vocab_size / 2**30 * 0.9
    assert free["cuda_graph_max_bs_decode"] > 256


def test_small_cards_get_graphs_that_their_pool_can_fill():
    for memory_gib in (24.0, 40.0, 80.0):
        chosen = values(Arguments(fast=True), replace(H200, memory_gib=memory_gib))
        pool_gib = chosen["mem_fraction_static"] * memory_gib - QWEN_7B.weight_bytes / GIB
        assert pool_gib > 0
        tokens = pool_gib * GIB / QWEN_7B.kv_bytes_per_token
        assert chosen["cuda_graph_max_bs_decode"] <= max(8, tokens / 600 + 8)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match=r"15.8 GiB, but the weights take 14.2 .*use a larger GPU, or --tp_size 2"
    ):
        values(Arguments(), replace(H200, memory_gib=15.8))


def test_conservativeness_keeps_room_for_expected_answers():
    """At its start SGLang reserves 0.7 * conservativeness * min(max_new_tokens, 4096) per running request."""
    assert 0.7 * engine.conservativeness(8192) * 4096 == pytest.approx(600, rel=0.03)
    assert engine.conservativeness(128) == 1.0


def test_million_token_models_are_capped():
    model = replace(QWEN_7B, context_tokens=1_010_000, dual_chunk=True)
    chosen = values(Arguments(), model=model)
    assert chosen["context_length"] == 32768
    assert json.loads(chosen["json_model_override_args"]) == {"dual_chunk_attention_config": None}


def test_engine_args_override_and_unknown_names_are_refused():
    args = parse(["--engine_args", '{"schedule_policy": "lpm"}'])
    assert values(args)["schedule_policy"] == "lpm"
    with pytest.raises(UserError, match="no argument schedule_polcy; did you mean schedule_policy"):
        check_engine_args({"schedule_polcy": 1}, {"schedule_policy": None, "dp_size": None})
    with pytest.raises(UserError, match="schedule_policy 'best'; choose lpm, fcfs"):
        check_engine_args({"schedule_policy": "best"}, {"schedule_policy": ["lpm", "fcfs"]})


def test_serve_line_quotes_what_a_shell_would_split():
    import shlex

    chosen = {
        "model_path": ("/a folder/model", ""),
        "enable_deterministic_inference": (True, "x"),
        "json_model_override_args": ('{"a": null}', "x"),
        "lora_paths": ({"/b/c d": "/b/c d"}, "x"),
    }
    words = shlex.split(engine.serve_line(Arguments(), Machine("cuda"), chosen))
    assert words[words.index("--model-path") + 1] == "/a folder/model"
    assert words[words.index("--lora-paths") + 1] == "c d=/b/c d"
    assert words[0] == "RUNTIME_PLUGINS=deterministic_radix,fused_norm,lean_sampler"
    assert "FLASHINFER_USE_CUDA_NORM=1" in words
    assert "FLASHINFER_EXTRA_CUDAFLAGS=-fmad=false" in words
    drafting = Arguments(engine_args='{"speculative_algorithm": "NGRAM"}')
    assert "RUNTIME_PLUGINS=deterministic_radix,fused_norm" in engine.serve_line(
        drafting, Machine("cuda"), chosen
    )
    assert "lean_sampler" not in engine.serve_line(drafting, Machine("cuda"), chosen)
    assert words[-2:] == ["--host", "127.0.0.1"]


def test_other_models_are_left_out(monkeypatch):
    import os

    monkeypatch.setattr(os, "environ", {})
    engine.skip_other_models(["NoSuchModel"])
    assert not os.environ
    engine.skip_other_models(["Qwen2ForCausalLM"])
    names = os.environ["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert "qwen2" not in names
    assert {"llama", "deepseek_v2"} <= set(names)


def test_roofline_is_the_sum_over_steps():
    from batch_infer.report import roofline_s

    machine = replace(H200, bandwidth=1e12, flops=1e15)
    model = replace(QWEN_7B, streamed_bytes=1_000_000, kv_bytes_per_token=1000)
    lengths = [(10, 3), (20, 1)]
    # step 0: both run, 30 KV tokens; steps 1 and 2: the first alone, with 11 and 12
    expected = (1_000_000 * 3 + 1000 * (30 + 11 + 12)) / 1e12
    assert roofline_s(lengths, model, machine) == pytest.approx(expected)
    slow = replace(machine, flops=1e9)
    assert roofline_s(lengths, model, slow) == pytest.approx(1_000_000 * (2 + 1 + 1) / 1e9)
    assert roofline_s(lengths, model, Machine("cpu")) is None


# --- flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_new_tokes", "5"], "unknown argument --max_new_tokes; did you mean --max_new_tokens?"),
        (["--mem_fraction_static", "0.9"], "unknown argument --mem_fraction_static; -h lists all flags"),
        (["--temperature", "-1"], "--temperature -1.0: must be at least 0"),
        (["--seed", "4294967296"], r"--seed 4294967296: must be below 2\*\*32"),
        (["--engine_args", '{"context_length": "512"}'], "context_length must be a whole number"),
        (["--top_p", "0"], r"--top_p 0.0: must be in \(0, 1\]"),
        (["--top_k", "0"], "--top_k 0: must be -1"),
        (["--device", "tpu"], "--device tpu: choose cuda or cpu"),
        (["--engine_args", "{'a': 1}"], "--engine_args, column 2: not valid JSON"),
        (["--engine_args", "[1]"], "--engine_args: expected a JSON object"),
        (["--prompts", "no/such/file.json"], "--prompts no/such/file.json: no such file or folder"),
        (["--prompts", "missing.jsonl"], "--prompts missing.jsonl: no such file or folder"),
        (["--model_path", "./nowhere"], "--model_path ./nowhere: no such file or folder"),
        (["--lora_path", "nowhere"], "--lora_path nowhere: no such file or folder"),
        (["--max_new_tokens", "many"], "argument --max_new_tokens: invalid int value: 'many'"),
    ],
)
def test_bad_flags_are_one_line(flags, expected):
    with pytest.raises(UserError, match=expected) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_defaults_are_the_assignments():
    args = parse([])
    assert (args.model_path, args.temperature, args.top_p, args.max_new_tokens) == (
        DEFAULT_MODEL,
        0.7,
        0.95,
        8192,
    )
    assert Path(args.output_file).parts[-2:] == ("sglang", "outputs.jsonl")
    assert not args.raw


def test_only_what_changes_answers_is_identity(tmp_path):
    here = parse(["--output_file", str(tmp_path / "a.jsonl"), "--dp_size", "2", "--batch_size", "5"])
    assert here.identity() == parse([]).identity()
    assert parse(["--temperature", "0"]).identity() != here.identity()
    more_memory = parse(["--engine_args", '{"mem_fraction_static": 0.8}'])
    assert more_memory.identity() == parse([]).identity()
    assert parse(["--engine_args", '{"quantization": "fp8"}']).identity() != parse([]).identity()
    one, other = (parse(["--rehearse", "--output_file", str(tmp_path / n / "o.jsonl")]) for n in "ab")
    assert one.identity() == other.identity()
