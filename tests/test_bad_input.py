"""Bad input through the readers and the whole program: exit code 2, one clear line, no traceback, nothing written is lost."""

import importlib.util
import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_infer import prompts
from harness import ROOT
from lora_sft import data
from workbench import UserError
from workbench.rows import PROMPT_FORMS, ROLES, ROW_KEYS, TRAINING_FORMS, turns

DATA = ROOT / "rehearsal" / "preferences.jsonl"


WORDS = st.sampled_from(
    [*sorted(ROW_KEYS), *ROLES, "role", "content", "from", "value", "input", "lora", "json_schema"]
)
TEXTS = WORDS | st.text(st.characters(codec=None), max_size=20)  # lone surrogates, too
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
ROWS_AS_JSON = st.lists(st.dictionaries(WORDS, VALUES, max_size=4) | VALUES, max_size=4).flatmap(
    lambda rows: st.sampled_from(
        [json.dumps(rows), "\n".join(map(json.dumps, rows)), json.dumps({"data": rows}, indent=1)]
    )
)
KINDS = st.sampled_from([".json", ".csv", ".tsv", ".parquet", ".txt"])
MAGIC = st.sampled_from([b"", b"[", b'{"prompt": ', b"PAR1", b"\xff\xfe", b"prompt,chosen\r\n", b'"'])


def check_readers(folder, kind: str, content: bytes) -> None:
    """Both read it, or refuse it in one line; a record's error is one line, too."""
    path = folder / f"file{kind}"
    path.write_bytes(content)
    for read in (data.read_file, prompts.read):
        try:
            rows = read(path)
        except UserError as error:
            rows, lines = [], str(error)
        else:
            lines = "".join(record.error or "" for record in rows) if read == prompts.read else ""
        assert rows or lines
        assert len(lines.splitlines()) <= 1


@given(KINDS, MAGIC, st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(scratch, kind, start, content):
    check_readers(scratch, kind, start + content)


@given(KINDS, ROWS_AS_JSON)
def test_any_json_is_read_or_refused_in_one_line(scratch, kind, text):
    check_readers(scratch, kind, text.encode())


@given(VALUES, st.sampled_from([TRAINING_FORMS, PROMPT_FORMS]))
def test_any_value_is_a_chat_or_refused(row, forms):
    try:
        found = turns(row, forms)
    except UserError:
        return
    assert found
    assert all(turn["role"] in ROLES.values() and turn["content"].encode() is not None for turn in found)


@pytest.fixture
def refused(start, quick, tmp_path):
    """refused(*flags) -> the error line of a run that must exit with 2."""

    def run(*flags, patch=None) -> str:
        code, text = start(*quick, "--output_dir", tmp_path / "out", *flags, patch=patch).wait()
        assert code == 2, text
        assert "Traceback" not in text
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, text
        return lines[0]

    return run


def test_data_row_without_prompt(refused, tmp_path):
    lines = DATA.read_text().splitlines()[:10]
    lines[6] = json.dumps({"question": "?", "chosen": "!"})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert f"{tmp_path / 'rows.jsonl'}, row 7: no text under 'prompt'" in refused(
        "--data_path", tmp_path / "rows.jsonl"
    )


def test_empty_data(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    assert "no rows in it" in refused("--data_path", tmp_path / "rows.jsonl")


def test_rows_that_are_all_too_long(refused, tmp_path):
    rows = [{"prompt": "p", "chosen": " word" * 300}] * 5
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    message = refused("--data_path", tmp_path / "rows.json")
    assert (
        "none of the 4 train rows can be used: 4 have an answer that does not fit: raise --max_seq_len 192"
        in message
    )


def test_model_folder_without_weights(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no weights (*.safetensors) in it" in refused("--model_name_or_path", tmp_path / "model")


def test_model_folder_with_a_missing_shard(refused, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 weight files missing, e.g. model-2" in refused("--model_name_or_path", tmp_path / "model")


def test_folder_that_is_no_model(refused, tmp_path):
    assert "no config.json" in refused("--model_name_or_path", tmp_path)


def test_lora_targets_that_match_nothing(refused):
    message = refused("--lora_target_modules", "decoder.layers.")
    assert "--lora_target_modules decoder.layers.: matches no module of the model; it has" in message
    assert "q_proj" in message


def test_one_of_several_lora_targets_is_mistyped(refused):
    assert "--lora_target_modules v_porj: matches no module" in refused(
        "--lora_target_modules", "q_proj, v_porj"
    )


def test_names_that_only_a_library_knows(refused):
    assert "--lr_scheduler_type cosin: choose linear, cosine" in refused("--lr_scheduler_type", "cosin")
    assert "--report_to paper: choose none" in refused("--report_to", "paper")
    if importlib.util.find_spec("wandb") is None:
        assert "--report_to wandb: it is not installed here" in refused("--report_to", "wandb")


def test_leaf_class_that_matches_nothing(refused, tmp_path):
    config = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    config["zero_optimization"]["leaf_module"]["classes"] = ["OPTDecoderLayer"]
    (tmp_path / "zero.json").write_text(json.dumps(config))
    message = refused("--deepspeed", tmp_path / "zero.json")
    assert "leaf_module class OPTDecoderLayer matches no module (the model's is LlamaDecoderLayer)" in message


def test_longer_than_the_model(refused):
    message = refused("--max_seq_len", "2048", "--tokens_per_micro_batch", "2048")
    assert "the model was trained for 1024 positions" in message


def test_folder_of_somebody_else(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "holds thesis.tex but no run_config.json" in refused()
    assert "holds thesis.tex but no run_config.json" in refused("--overwrite")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(refused, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot be written" in refused()


def test_output_path_that_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("x")
    assert "cannot be written" in refused()


def test_full_disk_while_training(refused):
    """/dev/full answers every write with "no space left on device"."""

    def fill():
        from lora_sft import watch

        def on_train_begin(self, *args, **kwargs):
            if os.environ["RANK"] == "0":
                self.path.symlink_to("/dev/full")

        watch.Metrics.on_train_begin = on_train_begin

    message = refused(patch=fill)
    assert "the disk or quota of" in message
    assert "it resumes from the last complete checkpoint" in message


def test_zero_file_with_a_batch_size(refused, tmp_path):
    (tmp_path / "zero.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 3}}')
    assert "remove 'train_batch_size'" in refused("--deepspeed", tmp_path / "zero.json")


def test_unknown_flag(refused):
    assert "did you mean --lora_alpha?" in refused("--lora_alfa", "1")
