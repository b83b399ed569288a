"""Flags and the ZeRO file: every mistake is one line that names the cure."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from harness import ROOT
from lora_sft.arguments import CHANGED_FLAGS, Arguments, parse, read_zero_config
from workbench import UserError


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_dim", "8"], r"--lora_dim was the starter's; use --lora_r"),
        (["--lora_module_name=layers."], r"use --lora_target_modules"),
        (["--per_device_train_batch_size", "1"], r"use --tokens_per_micro_batch"),
        (["--zero_stage", "3"], r"zero3.json"),
        (["--learning_rat", "1"], r"unknown argument --learning_rat; did you mean --learning_rate\?"),
        (["--max-train-rows", "1"], r"did you mean --max_train_rows\?"),
        (["surplus"], r"unknown argument surplus; -h lists all flags"),
        (["--lora_r", "many"], r"argument --lora_r: invalid int value: 'many'"),
        (["--lora_r"], r"expected one argument"),
        (["--lora_r", "0"], r"--lora_r 0: must be at least 1"),
        (["--tokens_per_micro_batch", "1000"], r"must be a multiple of --max_seq_len 1024"),
        (["--dtype", "half"], r"choose auto, fp16, bf16 or fp32"),
        (["--device", "gpu"], r"choose cuda or cpu"),
        (["--gradient_checkpointing", "perhaps"], r"expected true or false"),
        (["--learning_rate", "nan"], r"--learning_rate nan: must not be negative"),
        (["--num_gpus", "-3"], r"--num_gpus -3: must not be negative"),
        (["--seed", "-1"], r"--seed -1: must not be negative"),
        (["--num_train_epochs", "0"], r"must be above 0"),
        (["--data_path", "./missing.jsonl"], r"--data_path ./missing.jsonl: no such file or folder"),
        (["--model_name_or_path", "/no/model"], r"--model_name_or_path /no/model: no such file or folder"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv)


@pytest.mark.parametrize(
    ("script", "first"),
    [
        ("deepspeed/main.py", "--deepspeed ./none.json"),
        ("sglang/run_sglang.py", "--output_file /proc/x/outputs.jsonl"),
    ],
)
def test_flags_that_a_lost_backslash_drops_are_not_among_the_arguments_that_are_shown(script, first):
    """Both commands end where the file cannot be had, after they have said what they were given."""
    lines = f"{sys.executable} {script} {first} --seed 7\n  --max_new_tokens 64"
    done = subprocess.run(["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"arguments    {first} --seed 7 (as given; the defaults stand for all others)\n"
    assert "--max_new_tokens: command not found" in done.stderr


def test_every_changed_starter_flag_is_refused_by_name():
    for name in CHANGED_FLAGS:
        with pytest.raises(UserError, match=f"--{name} was the starter's; use "):
            parse([f"--{name}", "x"])


def test_every_flag_has_help_and_no_changed_flag_exists():
    assert all(entry.metadata["help"] for entry in fields(Arguments))
    assert not {entry.name for entry in fields(Arguments)} & set(CHANGED_FLAGS)


def test_paths_are_relative_to_the_caller(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    args = parse(["--data_path", "rows.jsonl", "--output_dir", "out"])
    assert args.data_path == str(tmp_path / "rows.jsonl")
    assert args.output_dir == str(tmp_path / "out")


def test_arguments_do_not_change_on_the_way():
    with pytest.raises(FrozenInstanceError):
        parse([]).lora_r = 8


def test_hub_ids_stay_as_they_are():
    args = parse([])
    assert args.model_name_or_path == "meta-llama/Llama-2-7b-hf"
    assert args.data_path == "Dahoas/rm-static"
    assert args.output_dir == str(ROOT / "deepspeed" / "output_llama2_7b_lora")


def test_rehearsals_never_write_to_the_real_jobs_folder():
    args = parse(["--rehearse"])
    assert args.device == "cpu"
    assert args.output_dir.startswith(str(ROOT / "rehearsal" / "runs"))
    assert parse(["--rehearse", "--learning_rate", "0"]).learning_rate == 0


def test_memory_and_log_flags_do_not_make_another_run():
    first = parse([]).identity({})
    assert parse(["--save_steps", "7", "--report_to", "tensorboard"]).identity({}) == first
    assert parse(["--seed", "7"]).identity({}) != first
    assert parse([]).identity({"fp16": {"hysteresis": 4}}) != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 3,}}', r"zero.json, line 1, column \d+: not valid JSON"),
        ('{"train_batch_size": 8}', r"remove 'train_batch_size'; it is set by --tokens_per_micro_batch"),
        ('{"optimizer": {}}', r"remove 'optimizer'; it is set by --learning_rate"),
        ('{"zero_optimization": {"stage": 2}}', r"stage must be 3"),
        (
            '{"zero_optimization": {"stage": 3,\n"reduce_bucket_size": "50 MB"}}',
            r"line 2: reduce_bucket_size must not be text",
        ),
        (
            '{"zero_optimization": {"stage": 3, "overlap_comm": null}}',
            "line 1: overlap_comm must be true or false, but is null",
        ),
        (
            '{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": [1]}}',
            r"line 1: stage3_max_live_parameters must be a number of elements, but is \[1\]",
        ),
        (
            '{"zero_optimization": {"stage": 3, "leaf_module": ["LlamaDecoderLayer"]}}',
            r'line 1: leaf_module must be ."classes": .names of classes',
        ),
        ('{"fp16": true}', r"fp16 must be a JSON object"),
        ("[]", r"expected a JSON object"),
    ],
)
def test_bad_zero_files_are_named(tmp_path, text, message):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_zero_config(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_zero_config(str(tmp_path / "missing.json"))


def test_shipped_zero_file_is_sorted_out_by_the_program():
    raw = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    assert not any("batch" in key for key in raw)
    assert read_zero_config(str(ROOT / "deepspeed" / "zero3.json"))["train_micro_batch_size_per_gpu"] == "auto"
