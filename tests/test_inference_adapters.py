"""Adapters, other models and the printed server, on the real Runtime on the CPU."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from batch_infer import parity
from batch_infer.arguments import Arguments
from harness import answers, fork, greedy_ids, keep_the_ids, partial_rows, summary_of
from workbench import UserError


@pytest.fixture(scope="module")
def base(adapter) -> Path:
    """The adapter's base model with the adapter's tokenizer and chat template."""
    folder = adapter.parent / "base"
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(config["base_model_name_or_path"], folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (adapter / name).exists():
            shutil.copy(adapter / name, folder / name)
    return folder


def test_adapter_gives_pefts_own_greedy_ids(run_inference, adapter, base, few, tmp_path):
    """fp32, greedy: token for token what PEFT's generate gives; per record, beside the base model."""
    rows = json.loads(few.read_text())[:6]
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps([*rows, *({**row, "lora": str(adapter)} for row in rows)]))
    flags = ["--prompts", mixed, "--model_path", base, "--temperature", 0, "--max_new_tokens", 12]

    out = tmp_path / "out"
    code, text = run_inference(*flags, "--output_file", out / "outputs.jsonl", patch=keep_the_ids).wait()
    assert code == 0, text
    served = {row["index"]: row["output_ids"] for row in partial_rows(out)}
    texts = [row["instruction"] for row in rows]

    def with_peft() -> int:
        greedy_ids(base, adapter, texts, 12, tmp_path / "expected.json")
        return 0

    code, text = fork(with_peft, tmp_path / "peft.txt").wait()
    assert code == 0, text
    assert [served[i] for i in range(12)] == json.loads((tmp_path / "expected.json").read_text())
    assert sum(served[i] != served[i + 6] for i in range(6)) >= 3


def test_lora_path_takes_base_tokenizer_and_template_from_the_adapter(run_inference, adapter, few, tmp_path):
    """Without it the base has no template. Other neighbours, the same bytes: the adapter's products are exact."""
    flags = ["--prompts", few, "--max_new_tokens", 16]
    for name, running in (("wide", 16), ("narrow", 3)):
        more = ["--lora_path", adapter, "--max_running_requests", running]
        code, text = run_inference(*flags, *more, "--output_file", tmp_path / name / "outputs.jsonl").wait()
        assert code == 0, text
    assert answers(tmp_path / "narrow") == answers(tmp_path / "wide")
    found = summary_of(tmp_path / "wide")
    assert found["parity"]["worst_answer"] < 1e-5
    assert found["parity"]["tokens"] > 20
    assert [row["index"] for row in found["without_adapter"]] == [0, 1, 2]
    assert all(row["output"] != row["with_adapter"] for row in found["without_adapter"])
    bare = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    out = ["--output_file", tmp_path / "b" / "outputs.jsonl"]
    code, text = run_inference(*flags, "--model_path", bare, *out).wait()
    assert code == 2
    assert "its tokenizer has no chat template; use --raw, or an instruct model" in text


class Serving:
    """An engine that gives each of two answer tokens the log-probability -1."""

    def generate(self, input_ids, logprob_start_len, **_):
        assert logprob_start_len == [1]
        return [{"meta_info": {"input_token_logprobs": [(None, 6), (-1.0, 7), (-1.0, 8)]}} for _ in input_ids]

    def flush_cache(self) -> None:
        pass


@pytest.mark.parametrize(
    ("dtype", "difference", "fits"), [("float32", 3e-4, 0), (None, 3e-4, 1), (None, 0.2, 0)]
)
def test_an_engine_that_computes_something_else_is_stopped(tmp_path, dtype, difference, fits):
    answer = {"input_ids": [5, 6, 7, 8], "answer_start": 2, "logprobs": [-1.0, -1.0 - difference]}
    (tmp_path / "parity.json").write_text(json.dumps({"dtype": "torch.float32", "answers": [answer]}))
    args = Arguments(lora_path=str(tmp_path))
    if fits:
        assert parity.check(Serving(), args, dtype).worst_answer == pytest.approx(difference / 2)
        return
    with pytest.raises(UserError, match="gives an answer of the training run other probabilities"):
        parity.check(Serving(), args, dtype)
    assert parity.check(Serving(), Arguments(model_path=str(tmp_path / "another")), dtype) is None


# --- other models and the server ----------------------------------------------------------------------


def test_dual_chunk_model_keeps_the_radix_cache(run_inference, tiny_qwen2, few, tmp_path):
    """As Qwen2.5-7B-Instruct-1M: its config would switch RadixAttention off."""
    model = tmp_path / "tiny-1M"
    shutil.copytree(tiny_qwen2, model)
    config = json.loads((model / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": 256,
        "local_size": 64,
        "original_max_position_embeddings": 512,
    }
    (model / "config.json").write_text(json.dumps(config))
    flags = ["--model_path", model, "--prompts", few, "--max_new_tokens", 4, "--batch_size", 2]
    code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    assert "dual-chunk attention would switch RadixAttention off" in text
    assert summary_of(tmp_path)["cached_prompt_tokens"] > 0


def test_the_serve_line_says_the_same_to_sglang(uninterrupted_inference, runtime, tmp_path):
    """SGLang's own command line reads every argument of the engine from it."""
    text = (uninterrupted_inference / "terminal.txt").read_text()
    line = shlex.split(re.search(r"^serve +(.*)$", text, re.M)[1])
    variables = [word for word in line[: line.index("sglang")] if "=" in word]
    assert {"SGLANG_PLATFORM=plain_cpu", "RUNTIME_PLUGINS=cpu"} <= set(variables)
    words = line[line.index("serve") + 1 :]
    del words[words.index("--model-type") : words.index("--model-type") + 2]

    def read() -> int:
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()  # as `sglang serve` does
        print(json.dumps(vars(prepare_server_args(words)), default=str))
        return 0

    code, text = fork(read, tmp_path / "terminal.txt").wait()
    assert code == 0, text
    served = json.loads(text.strip().splitlines()[-1])
    assert served["host"] == "127.0.0.1"
    for name, value in summary_of(uninterrupted_inference)["settings"]["engine_args"].items():
        assert served[name] == value, name


@pytest.mark.long
def test_the_serve_line_is_the_same_engine(uninterrupted_inference, tmp_path):
    """Starts the printed line as a shell would and asks it with the openai client."""
    import openai

    text = (uninterrupted_inference / "terminal.txt").read_text()
    line = re.search(r"^serve +(.*)$", text, re.M)[1]
    assert "--host 127.0.0.1" in line
    port = 21000 + os.getpid() % 9000
    env = {key: os.environ[key] for key in ("PATH", "HOME", "HF_HUB_OFFLINE")}
    with (tmp_path / "server.txt").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {line} --port {port}"],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, (tmp_path / "server.txt").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "server.txt").read_text()[-3000:]
            try:
                model = client.models.list().data[0].id
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/get_server_info") as response:
            served = json.load(response)
        for name, value in summary_of(uninterrupted_inference)["settings"]["engine_args"].items():
            assert served[name] == value, name
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Say something."}], max_tokens=8, temperature=0
        )
        assert answer.usage.completion_tokens <= 8
        assert isinstance(answer.choices[0].message.content, str)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
