"""Reading prompts, the seeds and keys of records, the durable file, and the arguments chosen for an engine."""

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_infer import engine_args, order, preflight, prompts, start, store
from batch_infer.arguments import DEFAULT_MODEL, Arguments, parse
from batch_infer.engine_args import EngineArgs
from batch_infer.machine import Machine
from batch_infer.model import Model
from batch_infer.prompts import Record
from batch_infer.report import roofline_s
from workbench import UserError
from workbench.machine import GIB

HEADS = {"num_attention_heads": 28, "num_key_value_heads": 4}
LAYERS = {"num_hidden_layers": 28, "hidden_size": 3584}
QWEN_7B = Model(
    *("qwen", HEADS | LAYERS | {"vocab_size": 152_064}, 32768, 15_230_000_000, 14_140_000_000),
    kv_bytes_per_token=57_344,
)
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
        ("a.txt", "one\r\n\r\ntwo"),
        ("a.csv", 'instruction,input,regex\none,,\n"two",,\n'),
        ("a.json", '{"version": 1,\n "rows": [{"instruction": "one", "input": ""}, {"prompt": "two"}]}'),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "one"}]}\n{"conversations": [{"from": "human", "value": "two"}]}'),
    ],
)  # fmt: skip
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
        ("a.json", "[]", "no rows in it"),
        ("a.txt", "\n\n", "no prompts in it"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, expected):
    with pytest.raises(UserError, match=expected):
        prompts.read(write(tmp_path, name, text))


def test_only_line_feeds_end_a_prompt_in_text(tmp_path):
    lines = ["a\u2028b", "a \x0c b", "a \x85 b", "a \x1c b", "a\rb", " a "]
    found = prompts.read(write(tmp_path, "a.txt", "\n".join(lines)))
    assert [record.instruction for record in found] == lines


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"not UTF-8 text .*; UTF-16: save it as UTF-8"):
        prompts.read(tmp_path / "a.txt")


DEEP_SCHEMA = '{"items":' * 2000 + "{}" + "}" * 2000


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ('{"instruction": "x", "json_schema": ' + DEEP_SCHEMA + "}", "nested too deeply"),
        ('{"instruction": "half an emoji \\ud83d"}', r"'instruction' holds U\+D83D"),
        ('{"instruction": "x", "regex": "a\\u0000b"}', r"'regex' holds U\+0000"),
        ('{"instruction": "x", "lora": 3}', "'lora' must be text, found int"),
        ('{"instruction": "x", "input": 3}', "'input' must be text, found int"),
        ('{"question": "x"}', r"no text under 'instruction'; a row has instruction, or prompt, .*\(found: 'question'\)"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last turn must be the user's"),
        ("3", "expected an object, found int"),
    ],
)  # fmt: skip
def test_a_bad_row_fails_alone(tmp_path, row, error):
    bad, good = prompts.read(write(tmp_path, "a.jsonl", row + '\n{"instruction": "hello"}'))
    assert re.match(error, bad.error)
    assert (good.index, good.instruction, good.error) == (1, "hello", None)


def test_preflight_warns_of_bad_rows_and_fails_if_all_are(tmp_path):
    path = write(tmp_path, "a.jsonl", '"x"\n3\n4')
    _, text = preflight.look_at_prompts(Arguments(prompts=str(path)))
    assert re.match("WARN: .*; 2 of them bad, the first is row 2: expected an object, found int", text)
    write(tmp_path, "a.jsonl", "3\n4")
    with pytest.raises(UserError, match=r"a.jsonl: none of the 2 rows can be used; row 1: expected an object"):
        preflight.look_at_prompts(Arguments(prompts=str(path)))


def test_alpacas_input_is_used_and_a_chat_keeps_its_turns(tmp_path):
    turns = [{"role": who, "content": who} for who in ("system", "user", "assistant", "user")]
    text = json.dumps([{"instruction": "Sort.", "input": "9 3", "output": "3 9"}, {"messages": turns}])
    alpaca, chat = prompts.read(write(tmp_path, "a.json", text))
    assert (alpaca.instruction, alpaca.messages) == ("Sort.\n\n9 3", [])
    assert (chat.instruction, chat.messages) == ("user", turns)
    seen = []

    class Template(Words):
        def apply_chat_template(self, messages, **options):
            seen.append(messages)
            return [1, 2]

    args = Arguments()
    assert not any(r.error for r in prompts.tokenise([alpaca, chat], args, Template(), 64, 10**6, {None: "w"}))
    assert seen == [[{"role": "user", "content": "Sort.\n\n9 3"}], turns]
    *_, raw = prompts.tokenise([alpaca, chat], replace(args, raw=True), Words(), 64, 10**6, {None: "w"})
    assert raw.error == "a chat of several turns needs a template; leave out --raw"


def test_both_grammars_are_refused(tmp_path):
    [record] = prompts.read(
        write(tmp_path, "a.json", '[{"instruction": "x", "regex": "a", "json_schema": {}}]')
    )
    assert record.error == "both 'regex' and 'json_schema' are given; use one"


class Words:
    """A tokenizer with a template, as far as tokenise() needs one."""

    name_or_path, chat_template = "words", "yes"

    def apply_chat_template(self, messages, **_):
        return [1, *(len(word) for word in messages[0]["content"].split()), 2]

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def tokenised(
    args: Arguments, texts: list[str], weights: str = "w", tokenizer: Words | None = None
) -> list[Record]:
    found = [Record(index, text) for index, text in enumerate(texts)]
    return prompts.tokenise(found, args, tokenizer or Words(), 64, 10**6, {None: weights})


def test_a_token_that_the_embedding_lacks_costs_its_record_alone():
    found = prompts.tokenise(
        [Record(0, "a bb"), Record(1, "a ccccc")], Arguments(), Words(), 64, 5, {None: "w"}
    )
    assert [bool(record.error) for record in found] == [False, True]
    assert "no row for" in found[1].error


def test_keys_and_seeds_depend_on_everything_that_matters():
    args = Arguments()
    first, second = tokenised(args, ["a bb", "a bb"])
    assert first.sampling_params["sampling_seed"] != second.sampling_params["sampling_seed"]
    assert first.key != second.key
    assert tokenised(args, ["a bb"])[0] == first
    for changed in (replace(args, seed=1), replace(args, temperature=0.1), replace(args, max_new_tokens=9)):
        assert tokenised(changed, ["a bb"])[0].key != first.key
    assert tokenised(args, ["a bb"], weights="other")[0].key != first.key
    assert tokenised(replace(args, raw=True), ["a bb"])[0].input_ids == [1, 2]
    assert 0 <= first.sampling_params["sampling_seed"] < 2**31


def test_room_for_the_answer_ends_with_the_context():
    short, long, too_long = tokenised(Arguments(max_new_tokens=50), ["a", "a " * 30, "a " * 62])
    assert [record.sampling_params["max_new_tokens"] for record in (short, long)] == [50, 64 - 32 - 1]
    assert too_long.error == "64 prompt tokens; the context holds 64"


def test_fast_profile_sends_no_seed():
    [record] = tokenised(Arguments(fast=True), ["a"])
    assert record.sampling_params == {"temperature": 0.7, "top_p": 0.95, "top_k": -1, "max_new_tokens": 60}


def test_a_text_that_cannot_be_tokenised_is_one_records_failure():
    class Picky(Words):
        def apply_chat_template(self, messages, **options):
            if "bad" in messages[0]["content"]:
                raise TypeError("no such text")
            return super().apply_chat_template(messages, **options)

    good, bad = tokenised(Arguments(), ["good", "bad"], tokenizer=Picky())
    assert good.error is None
    assert bad.error == "cannot be tokenised: TypeError('no such text')"


# --- the durable file ---------------------------------------------------------------------------------


HEADER = [{"identity": {"seed": 1}, "job": None}, {"machine": {"gpu_name": "A"}}]


@given(st.integers(0, 500))
def test_partial_file_survives_any_cut(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("partial")
    file = store.PartialFile(folder, {"seed": 1}, {"gpu_name": "A"})
    rows = [{"index": i, "key": f"k{i}", "output": "ü" * i} for i in range(8)]
    for row in rows:
        file.append([row])
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == HEADER + rows
    data = file.path.read_bytes()
    file.path.write_bytes(data[:cut])
    kept = rows[: max(0, data[:cut].count(b"\n") - 2)]
    assert store.count_answers(folder) == len(kept)
    again = store.PartialFile(folder, {"seed": 1}, {"gpu_name": "A"})
    assert list(again.rows.values()) == kept
    again.append(rows[-1:])
    assert file.path.read_bytes() == data[:cut]  # nobody writes in another start's file
    assert [json.loads(line) for line in again.path.read_text().splitlines()] == HEADER + rows[-1:]


def test_a_command_without_an_answer_claims_nothing(tmp_path):
    file = store.PartialFile(tmp_path, {"engine_args": "typo"}, {})
    file.append([{"index": 0, "key": "", "error": "empty"}])
    assert not file.path.exists()
    file.close()  # a finished run of failures only
    assert store.stored_identity(tmp_path) == {"engine_args": "typo"}
    assert store.count_answers(tmp_path) == 0


def test_another_machine_is_remembered(tmp_path):
    for name in ("A", "A", "B"):
        file = store.PartialFile(tmp_path, {}, {"gpu_name": name})
        file.append([{"index": 0, "key": "", "output": "x"}])
    assert [machine["gpu_name"] for machine in file.machines] == ["A", "B"]


def test_only_answers_with_the_same_key_count(tmp_path):
    file = store.PartialFile(tmp_path, {}, {})
    file.append([{"index": 0, "key": "a", "output": "x"}, {"index": 1, "key": "b", "error": "no"}])
    assert file.done(Record(0, "", key="a"))
    assert not file.done(Record(0, "", key="z"))
    assert not file.done(Record(1, "", key="b"))
    assert not file.done(Record(2, "", key="c"))


# --- engine arguments ---------------------------------------------------------------------------------


def chosen(
    args: Arguments,
    machine: Machine = H200,
    model: Model = QWEN_7B,
    lengths: tuple[int, ...] = (50,) * 805,
    lora: str | None = None,
) -> EngineArgs:
    found = [Record(index, "x", lora=lora, input_ids=[1] * n) for index, n in enumerate(lengths)]
    return engine_args.decide(args, machine, model, found, order.decide(args, found))


def values(*given, **options) -> dict:
    return chosen(*given, **options).values


def test_an_adapter_runs_on_the_faster_kernels():
    assert "lora_backend" not in values(Arguments())
    with_adapter = values(Arguments(), lora="/adapter")
    assert with_adapter["lora_backend"] == "triton"
    assert with_adapter["lora_paths"] == {"/adapter": "/adapter"}


def test_h200_gets_the_assignments_engine():
    found = values(Arguments())
    assert found["attention_backend"] == "flashinfer"
    assert found["enable_deterministic_inference"] is True
    assert "disable_radix_cache" not in found
    assert found["cuda_graph_max_bs_decode"] >= 805
    assert "max_running_requests" not in found
    fast = values(Arguments(fast=True))
    assert fast["cuda_graph_max_bs_decode"] >= 805
    assert "enable_deterministic_inference" not in fast
    assert values(Arguments(), replace(H200, gpus=4))["dp_size"] == 4
    assert values(Arguments(tp_size=2), replace(H200, gpus=4))["dp_size"] == 2


@pytest.mark.parametrize(
    ("cores", "memory_gib", "parameters", "records", "flags", "copies", "running"),
    [
        (2, 16, 135e6, 60, {}, 2, 16),  # the rehearsal: half of a copy's records at once
        (64, 200, 135e6, 805, {}, 4, 64),  # a login node is others', too
        (8, 16, 135e6, 20, {}, 2, 16),  # 10 records each
        (8, 4, 135e6, 805, {}, 1, 64),  # no memory for a second copy
        (8, 70, 7.6e9, 805, {}, 2, 64),
        (8, 16, 135e6, 805, {"dp_size": 1, "max_running_requests": 8}, 1, 8),
        (8, 16, 2e6, 60, {}, 1, 32),  # the tiny model: a second start takes longer than it saves
    ],
)
def test_a_copy_for_each_core(cores, memory_gib, parameters, records, flags, copies, running):
    machine = Machine("cpu", cores=cores, memory_gib=memory_gib)
    model = replace(QWEN_7B, weight_bytes=int(2 * parameters))
    found = values(Arguments(device="cpu", **flags), machine, model, lengths=(50,) * records)
    assert (found["dp_size"], found["max_running_requests"]) == (copies, running)


def test_fast_runs_share_a_copy_where_the_link_pays():
    def ways(gpus: int = 2, gb_per_s: float = 390, lengths=(70,) * 805, lora=None, **flags) -> tuple[int, int]:
        pair = replace(H200, gpus=gpus, link=gb_per_s * 1e9, bandwidth=3.35e12)
        found = values(Arguments(**{"fast": True} | flags), pair, lengths=lengths, lora=lora)
        return found["tp_size"], found["dp_size"]

    assert ways() == (2, 1)  # AlpacaEval on two H100 with NVLink
    assert ways(gb_per_s=25) == ways(gb_per_s=0) == (1, 2)  # PCIe; no way from GPU to GPU
    assert ways(max_new_tokens=16) == ways(max_new_tokens=600) == (1, 2)  # prompts alone; no longest answer
    assert ways(lengths=(70,) * 20_000) == (1, 2)  # more than run at once: the longest answer is not the end
    assert ways(lora="/adapter") == ways(jump_forward=True) == ways(fast=False) == (1, 2)
    assert ways(4) == (2, 2)
    assert ways(4, tp_size=4) == (4, 1)
    assert ways(dp_size=1) == (1, 1)
    assert ways(3) == (1, 3)  # 28 heads on three GPUs
    told = chosen(Arguments(fast=True), replace(H200, gpus=2, link=3.9e11)).reasons["tp_size"]
    assert re.search(r"copy: 1: \d+\.\d s, 2: \d+\.\d s \(390 GB/s from GPU to GPU\)", told)


def test_uuids_in_cuda_visible_devices_switch_off_what_cannot_read_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6a1e0c,GPU-0b1c")
    assert values(Arguments(tp_size=2), replace(H200, gpus=2))["disable_custom_all_reduce"] is True
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert "disable_custom_all_reduce" not in values(Arguments(tp_size=2), replace(H200, gpus=2))


@pytest.mark.parametrize("flags", [{"top_k": 50}, {"top_p": 1.0}])
def test_draws_that_sort_all_logits_run_fewer_at_once(flags):
    """Those that lean_sampler leaves to SGLang; greedy ones need no draw, and without seeds nothing is sorted."""
    found = values(Arguments(**flags))
    assert found["max_running_requests"] == found["cuda_graph_max_bs_decode"] == 256
    assert values(Arguments(**flags, max_running_requests=64))["max_running_requests"] == 64
    for other in (Arguments(**flags, temperature=0.0), Arguments(**flags, fast=True)):
        assert "max_running_requests" not in values(other)
    small = values(Arguments(**flags), replace(H200, memory_gib=24.0))
    sorting_gib = small["cuda_graph_max_bs_decode"] * 32 * 152_064 / GIB
    assert (1 - small["mem_fraction_static"]) * 24 > 3.5 + 0.9 * sorting_gib


@pytest.mark.parametrize("memory_gib", [24.0, 40.0, 80.0])
def test_small_cards_get_graphs_that_their_pool_can_fill(memory_gib):
    found = values(Arguments(fast=True), replace(H200, memory_gib=memory_gib))
    pool_gib = found["mem_fraction_static"] * memory_gib - QWEN_7B.weight_bytes / GIB
    assert pool_gib > 0
    tokens = pool_gib * GIB / QWEN_7B.kv_bytes_per_token
    assert found["cuda_graph_max_bs_decode"] <= max(8, tokens / 600 + 8)


def test_the_engine_is_chosen_for_what_the_records_ask_for():
    def of(*own: dict) -> dict:
        found = [Record(i, "x", own=given, input_ids=[1] * 50) for i, given in enumerate(own)]
        return engine_args.decide(Arguments(), H200, QWEN_7B, found, order.Order("fcfs", "")).values

    plain = of({})
    assert plain["schedule_conservativeness"] == engine_args.conservativeness(8192)
    assert "disable_overlap_schedule" not in plain
    assert of({"max_new_tokens": 64})["schedule_conservativeness"] == engine_args.conservativeness(64)
    assert of({"top_p": 1}, {"top_p": 1.0})["max_running_requests"] == 256
    assert "max_running_requests" not in of({"top_p": 1}, {"temperature": 0})  # all are drawn by top-p
    assert of({}, {"presence_penalty": 1})["disable_overlap_schedule"] is True


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match=r"15.8 GiB, but the weights take 14.2 .*use a larger GPU, or --tp_size 2"
    ):
        values(Arguments(), replace(H200, memory_gib=15.8))


def test_conservativeness_keeps_room_for_expected_answers():
    """At its start SGLang reserves 0.7 * conservativeness * min(max_new_tokens, 4096) per running request."""
    assert 0.7 * engine_args.conservativeness(8192) * 4096 == pytest.approx(600, rel=0.03)
    assert engine_args.conservativeness(128) == 1.0


def test_million_token_models_are_capped():
    config = QWEN_7B.config | {"dual_chunk_attention_config": {"chunk_size": 262_144}}
    found = values(Arguments(), model=replace(QWEN_7B, context_tokens=1_010_000, config=config))
    assert found["context_length"] == 32768
    assert json.loads(found["json_model_override_args"]) == {"dual_chunk_attention_config": None}


def test_engine_args_override_what_is_chosen():
    args = parse(["--engine_args", '{"schedule_policy": "lpm", "chunked_prefill_size": 40}'])
    found = chosen(args)
    assert (found.values["schedule_policy"], found.values["chunked_prefill_size"]) == ("lpm", 40)
    assert found.reasons["chunked_prefill_size"] == "--engine_args"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (
            {"schedule_polcy": "lpm"},
            "sglang.Engine has no argument schedule_polcy; did you mean schedule_policy?",
        ),
        ({"mem_fraction": 0.5}, "no argument mem_fraction; did you mean mem_fraction_static?"),
        ({"schedule_policy": "best"}, "schedule_policy 'best'; choose lpm, "),
    ],
)
def test_engine_args_that_sglang_does_not_know_are_refused(runtime, own, expected):
    with pytest.raises(UserError, match=f"--engine_args: .*{expected}"):
        engine_args.check_own(own)


def test_serve_line_quotes_what_a_shell_would_split():
    values = {
        "model_path": "/a folder/model",
        "enable_deterministic_inference": True,
        "json_model_override_args": '{"a": null}',
        "lora_paths": {"/b/c d": "/b/c d"},
    }

    def words(**flags) -> list[str]:
        return shlex.split(
            engine_args.serve_line(values, engine_args.environment(Arguments(**flags)) | H200.compiler)
        )

    line = words()
    assert line[line.index("--model-path") + 1] == "/a folder/model"
    assert line[line.index("--json-model-override-args") + 1] == '{"a": null}'
    assert line[line.index("--lora-paths") + 1] == "c d=/b/c d"
    assert "RUNTIME_PLUGINS=deterministic_radix,fused_norm,lean_sampler" in line
    assert {"FLASHINFER_USE_CUDA_NORM=1", "FLASHINFER_EXTRA_CUDAFLAGS=-fmad=false"} < set(line)
    drafting = words(engine_args='{"speculative_algorithm": "NGRAM"}')
    assert "RUNTIME_PLUGINS=deterministic_radix,fused_norm" in drafting
    assert line[-2:] == ["--host", "127.0.0.1"]


def test_other_models_are_left_out(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    start.skip_other_models(["NoSuchModel"])
    assert not os.environ
    start.skip_other_models(["Qwen2ForCausalLM"])
    names = os.environ["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert "qwen2" not in names
    assert {"llama", "deepseek_v2"} <= set(names)


def test_roofline_is_the_sum_over_steps():
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
        (["--gpu", "v100", "--download_only"], "--gpu v100: choose a100, a10, "),
        (["--gpu", "h100"], "--gpu goes with --download_only; "),
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


def test_without_a_network_nothing_is_tried_again(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(**where):
        asked.append(where)
        raise LocalEntryNotFoundError("not in the cache")

    def no_network(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", no_network)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(ConnectionError\)"):
        prompts.find("no-such/prompts")
    assert len(asked) == 1
