"""run_sglang.py on the real Runtime on the CPU: files, resuming, isolation, adapters, servers."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from harness import ROOT, children_of, fork

CONTRACT = {
    *("records", "failed_records", "prompt_tokens", "cached_prompt_tokens", "prefix_hit_rate", "output_tokens"),
    *("cap_hit_share", "load_s", "generate_s", "wall_s", "tokens_per_s", "compile_s", "roofline_share"),
    *("failures", "settings"),
}


def results(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "outputs.jsonl").read_bytes(), (folder / "outputs_all.json").read_bytes()


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def partial_rows(folder: Path) -> list[dict]:
    path = folder / "outputs.partial.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [row for row in rows if "index" in row]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """12 of the shipped instructions, two of them the same."""
    rows = json.loads((ROOT / "rehearsal" / "instructions.json").read_text())[:11]
    path = tmp_path_factory.mktemp("prompts") / "few.json"
    path.write_text(json.dumps([*rows, rows[0]]))
    return path


@pytest.fixture(scope="module")
def flags(few) -> list:
    return ["--prompts", few, "--max_new_tokens", 32, "--max_running_requests", 4]


@pytest.fixture(scope="module")
def uninterrupted(run_inference, flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    code, text = run_inference(*flags, "--output_file", out / "outputs.jsonl").wait()
    assert code == 0, text
    (out / "terminal.txt").write_text(text)
    return out


# --- files and what people see ------------------------------------------------------------------------


def test_the_gpus_sampler_draws_the_tokens(run_inference, few, tmp_path):
    """lean_sampler in the Runtime, its kernel run by Triton's interpreter: every token of a reproducible run is its
    own, from logits in 16 bits, and the files are the same with 1 and 8 running."""
    drawn = tmp_path / "drawn"

    def with_lean_sampler():
        from batch_infer import engine
        from runtime_plugins import seeded_top_p

        environment, draw = engine.environment, seeded_top_p.seeded_top_p

        def counting(*given):
            tokens = draw(*given)
            with drawn.open("a") as out:
                out.write(f"{given[0].dtype}\n" * len(tokens))
            return tokens

        seeded_top_p.seeded_top_p = counting
        engine.environment = lambda args: environment(args) | {"RUNTIME_PLUGINS": "cpu,lean_sampler"}

    found = []
    for running in (1, 8):
        out = tmp_path / f"{running}"
        flags = ["--prompts", few, "--max_new_tokens", 8, "--max_running_requests", running]
        flags += ["--engine_args", '{"dtype": "bfloat16"}']
        code, text = run_inference(
            *flags, "--output_file", out / "outputs.jsonl", patch=with_lean_sampler
        ).wait()
        assert code == 0, text
        found.append(results(out))
        dtypes = drawn.read_text().splitlines()
        assert len(dtypes) >= summary_of(out)["output_tokens"] * len(found)
        assert set(dtypes) == {"torch.bfloat16"}, "as the model computes them, in prefill and decode alike"
    assert found[0] == found[1]


def test_files_keep_the_contract(uninterrupted, few):
    instructions = [row["instruction"] for row in json.loads(few.read_text())]
    rows = [json.loads(line) for line in (uninterrupted / "outputs.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["output", "instruction"]] * 2
    assert [row["instruction"] for row in rows] == instructions[::10]
    everything = json.loads((uninterrupted / "outputs_all.json").read_text())
    assert [list(row) for row in everything] == [["instruction", "output", "generator"]] * 12
    assert [row["output"] for row in everything[::10]] == [row["output"] for row in rows]
    summary = summary_of(uninterrupted)
    assert summary.keys() >= CONTRACT
    assert summary["records"] == 12
    assert summary["failed_records"] == 0
    assert summary["roofline_share"] is None
    assert summary["settings"]["profile"] == "reproducible"
    assert summary["settings"]["versions"]["sglang"] == "0.5.17"
    assert not (uninterrupted / "outputs.partial.jsonl").exists()
    assert (uninterrupted / "lengths.png").stat().st_size > 5000


def test_the_radix_cache_was_hit(uninterrupted):
    """Every prompt shares the template's header, and the last equals the first."""
    summary = summary_of(uninterrupted)
    assert summary["cached_prompt_tokens"] > 0
    assert summary["prefix_hit_rate"] == summary["cached_prompt_tokens"] / summary["prompt_tokens"]


def test_equal_prompts_have_seeds_of_their_own(uninterrupted):
    everything = json.loads((uninterrupted / "outputs_all.json").read_text())
    assert everything[0]["instruction"] == everything[-1]["instruction"]
    assert everything[0]["output"] != everything[-1]["output"]


def test_terminal_is_calm(uninterrupted):
    text = (uninterrupted / "terminal.txt").read_text()
    for unwanted in ("Warning", "warning", "Traceback", "server_args=", "ServerArgs("):
        assert unwanted not in text, text
    for line in ("time ", "throughput ", "tokens ", "prefix ", "cap ", "profile ", "answers ", "serve "):
        assert re.search(rf"^{line}", text, re.M), line


def test_checker_accepts_it(uninterrupted):
    command = [
        sys.executable,
        "-I",
        str(ROOT / "sglang" / "check_outputs.py"),
        str(uninterrupted / "outputs.jsonl"),
    ]
    done = subprocess.run([*command, "--against", command[-1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows identical, 0 differ" in done.stdout


def test_finished_run_is_left_alone(run_inference, flags, uninterrupted):
    before = results(uninterrupted)
    code, text = run_inference(*flags, "--output_file", uninterrupted / "outputs.jsonl").wait()
    assert code == 0
    assert "finished; nothing to do (--overwrite starts anew)" in text
    assert results(uninterrupted) == before


def test_another_command_in_the_folder_is_refused(run_inference, flags, uninterrupted):
    code, text = run_inference(
        *flags, "--temperature", 0, "--output_file", uninterrupted / "outputs.jsonl"
    ).wait()
    assert code == 2
    assert "holds another run (--temperature 0.7 there, 0.0 here)" in text


def test_changed_prompts_are_noticed(run_inference, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say something.\n")
    flags = ["--prompts", prompts, "--max_new_tokens", 4, "--output_file", tmp_path / "out" / "outputs.jsonl"]
    assert run_inference(*flags).wait()[0] == 0
    prompts.write_text("Say something else.\n")
    code, text = run_inference(*flags).wait()
    assert code == 2
    assert "finished, but prompts_sha256 changed since" in text
    code, text = run_inference(*flags, "--overwrite").wait()
    assert code == 0, text
    assert "else" in (tmp_path / "out" / "outputs.jsonl").read_text()


def test_stopped_while_it_loads(run_inference, flags, tmp_path):
    """SIGTERM before the first answer: 75, no traceback, no process left."""

    def patch() -> None:
        import run_sglang

        run_sglang.runtime.start = lambda *_: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(30))

    code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl", patch=patch).wait()
    assert code == 75, text
    assert "stopped: 0 answers are kept; the same command goes on from there" in text
    assert "Traceback" not in text


def test_raw_prompts_need_no_template(run_inference, tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n")
    flags = ["--model_path", tiny_model, "--prompts", prompts, "--max_new_tokens", 4, "--raw"]
    code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    assert summary_of(tmp_path)["settings"]["identity"]["raw"] is True


# --- the same bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--max_running_requests", 16, "--batch_size", 7),
        ("--dp_size", 2),
        (
            "--engine_args",
            '{"schedule_policy": "lpm", "disable_radix_cache": true, "chunked_prefill_size": 40}',
        ),
        pytest.param(("--max_running_requests", 1), marks=pytest.mark.long),
    ],
    ids=lambda options: str(options[0])[2:] + str(options[1])[:2],
)
def test_bytes_do_not_depend_on_what_runs_beside(run_inference, flags, uninterrupted, tmp_path, options):
    code, text = run_inference(*flags, *options, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    assert results(tmp_path) == results(uninterrupted)


def test_records_that_a_full_pool_puts_back_are_counted(run_inference, flags, uninterrupted, tmp_path):
    """On the CPU they are the same; on a GPU another kernel computes them the second time, and the end says so."""
    pool = '{"max_total_tokens": 500, "schedule_conservativeness": 0.01}'
    options = ["--max_running_requests", 16, "--engine_args", pool]
    code, text = run_inference(*flags, *options, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    retracted = summary_of(tmp_path)["retracted_records"]
    assert retracted > 0
    assert f"{retracted} records were computed again because the KV pool was full" in text
    assert results(tmp_path) == results(uninterrupted)
    assert summary_of(uninterrupted)["retracted_records"] == 0


@pytest.mark.long
@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("options", [("--max_running_requests", n) for n in (1, 4, 16)] + [("--dp_size", 2)])
def test_bytes_three_times_each(run_inference, flags, uninterrupted, tmp_path, options, repetition):
    code, text = run_inference(*flags, *options, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    assert results(tmp_path) == results(uninterrupted)


def test_the_program_as_it_is(uninterrupted, flags, tiny_qwen2, tmp_path):
    """With stock spawned processes and nothing set in the environment: the same bytes."""
    env = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "VIRTUAL_ENV")}
    command = [
        sys.executable,
        ROOT / "sglang" / "run_sglang.py",
        "--rehearse",
        "--model_path",
        tiny_qwen2,
        *flags,
    ]
    done = subprocess.run(
        [str(word) for word in (*command, "--output_file", tmp_path / "outputs.jsonl")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path) == results(uninterrupted)
    for unwanted in ("Warning", "Traceback", "No CUDA runtime"):
        assert unwanted not in done.stdout + done.stderr


# --- nothing is lost ----------------------------------------------------------------------------------


def kill_after(rows: int, number: int, pids) -> callable:
    """A patch for the job's process: sends a signal to pids() once that many answers are on disk."""

    def patch() -> None:
        from batch_infer.records import PartialFile

        append = PartialFile.append

        def counting(self, new):
            append(self, new)
            if len(self.rows) >= rows:
                for pid in pids():
                    os.kill(pid, number)
                if number == signal.SIGKILL:
                    time.sleep(30)  # death comes meanwhile

        PartialFile.append = counting

    return patch


@pytest.mark.parametrize(
    ("rows", "number", "pids", "code"),
    [
        (2, signal.SIGKILL, lambda: [os.getpid()], 75),
        (8, signal.SIGKILL, lambda: [os.getppid()], -signal.SIGKILL),
        (4, signal.SIGTERM, lambda: [os.getppid()], 75),
        (6, signal.SIGKILL, lambda: children_of(os.getpid())[-1:], 75),
    ],
    ids=["kill -9 of the job", "kill -9 of its parent", "SIGTERM", "an engine process dies"],
)
def test_resume_gives_the_uninterrupted_files(
    run_inference, flags, uninterrupted, tmp_path, rows, number, pids, code
):
    out = ["--output_file", tmp_path / "outputs.jsonl"]
    first, text = run_inference(*flags, *out, patch=kill_after(rows, number, pids)).wait()
    assert first == code, text
    kept = partial_rows(tmp_path)
    assert len(kept) >= rows
    assert not (tmp_path / "summary.json").exists()
    again, text = run_inference(*flags, *out).wait()
    assert again == 0, text
    assert f"{len(kept)} already answered" in text
    assert results(tmp_path) == results(uninterrupted)
    assert summary_of(tmp_path)["output_tokens"] == summary_of(uninterrupted)["output_tokens"]


def test_full_disk_keeps_what_is_written(run_inference, flags, uninterrupted, tmp_path):
    import errno

    def patch() -> None:
        from batch_infer.records import PartialFile

        write = PartialFile._write

        def failing(self, rows):
            if len(self.rows) >= 3:
                self._out.write(b'{"index": 3, "cut')
                self._out.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, rows)

        PartialFile._write = failing

    out = ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, *out, patch=patch).wait()
    assert code == 2, text
    assert "is full; free some and run it again" in text
    assert "Traceback" not in text
    code, text = run_inference(*flags, *out).wait()
    assert code == 0, text
    assert results(tmp_path) == results(uninterrupted)


@pytest.fixture(scope="module")
def isolated(run_inference, tmp_path_factory) -> tuple[Path, list, str]:
    """A run with bad records among good ones: its folder, its flags and its terminal."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    rows = [
        "Say something.",
        {"instruction": ""},
        {"instruction": "word " * 3000},
        {"instruction": "A number please.", "regex": "[0-9]{3}-[a-f]{2}"},
        {"instruction": "A broken regex.", "regex": "(["},
        {"instruction": "Some JSON.", "json_schema": schema},
        {"instruction": "A broken schema.", "json_schema": {"type": "nonsense"}},
        {"instruction": "An adapter.", "lora": "/no/such/adapter"},
        {"no instruction": 1},
        {"prompt": "The last one."},
    ]
    folder = tmp_path_factory.mktemp("isolated")
    (folder / "rows.json").write_text(json.dumps(rows))
    flags = [
        "--prompts",
        folder / "rows.json",
        "--max_new_tokens",
        24,
        "--output_file",
        folder / "out" / "outputs.jsonl",
    ]
    code, text = run_inference(*flags).wait()
    assert code == 3, text
    return folder / "out", flags, text


def test_bad_records_cost_no_other_record(isolated):
    out, _, text = isolated
    summary = summary_of(out)
    reasons = {failure["index"]: failure["reason"] for failure in summary["failures"]}
    assert set(reasons) == {1, 2, 4, 6, 7, 8}
    assert reasons[1] == "the instruction is empty"
    assert "prompt tokens; the context holds 1024" in reasons[2]
    assert reasons[4].startswith("invalid regex")
    assert reasons[6].startswith("invalid json_schema")
    assert "no adapter_model.safetensors" in reasons[7]
    assert "no text under 'instruction'" in reasons[8]
    outputs = [row["output"] for row in json.loads((out / "outputs_all.json").read_text())]
    assert all(outputs[index] for index in (0, 9))
    assert all(not outputs[index] for index in reasons)
    assert "6 cannot be answered" in text


def test_structured_records_obey_their_grammar(isolated):
    outputs = [row["output"] for row in json.loads((isolated[0] / "outputs_all.json").read_text())]
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", outputs[3])
    assert isinstance(json.loads(outputs[5])["ok"], bool)


def test_failures_are_tried_again_and_counted(isolated, run_inference):
    out, flags, _ = isolated
    before = results(out)
    code, text = run_inference(*flags).wait()
    assert code == 3
    assert "0 to answer" in text
    assert results(out) == before


def test_an_answer_that_failed_once_succeeds_later(run_inference, flags, uninterrupted, tmp_path):
    def patch() -> None:
        from sglang.srt.entrypoints.engine import Engine

        stock = Engine.async_generate

        async def sometimes(self, **request):
            if request["sampling_params"]["sampling_seed"] % 3 == 0:
                raise RuntimeError("injected")
            return await stock(self, **request)

        Engine.async_generate = sometimes

    out = ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, *out, patch=patch).wait()
    assert code == 3, text
    failed = summary_of(tmp_path)["failed_records"]
    assert 0 < failed < 12
    code, text = run_inference(*flags, *out).wait()
    assert code == 0, text
    assert f"{12 - failed} already answered" in text
    assert results(tmp_path) == results(uninterrupted)


# --- adapters -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(libraries, quick, tmp_path_factory) -> Path:
    """Trained by the fine-tuning program of this repository."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    flags = [*quick, "--learning_rate", "0.02", "--output_dir", str(out)]
    code, text = fork(lambda: libraries.main(flags), out.parent / "terminal.txt").wait()
    assert code == 0, text
    return out


def test_adapter_gives_pefts_own_greedy_ids(run_inference, adapter, few, tmp_path):
    """fp32, greedy: token for token what PEFT's generate gives; per record, beside the base model."""
    rows = json.loads(few.read_text())[:6]
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps([*rows, *({**row, "lora": str(adapter)} for row in rows)]))
    out = tmp_path / "out"
    flags = [
        "--prompts",
        mixed,
        "--model_path",
        adapter.parent / "base",
        "--temperature",
        0,
        "--max_new_tokens",
        12,
    ]

    def base_with_the_adapters_template() -> None:
        import shutil

        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        shutil.copytree(base, adapter.parent / "base")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (adapter / name).exists():
                shutil.copy(adapter / name, adapter.parent / "base" / name)

    base_with_the_adapters_template()

    def keep_the_ids() -> None:
        from batch_infer.records import PartialFile

        PartialFile.remove = lambda self: None

    code, text = run_inference(*flags, "--output_file", out / "outputs.jsonl", patch=keep_the_ids).wait()
    assert code == 0, text
    served = {row["index"]: row["output_ids"] for row in partial_rows(out)}

    def with_peft() -> int:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        expected = {}
        for offset, model in ((0, base), (6, None)):
            model = model or PeftModel.from_pretrained(base, adapter)
            for index, row in enumerate(rows):
                ids = tokenizer.apply_chat_template(
                    [{"role": "user", "content": row["instruction"]}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=False,
                )
                new = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
                )
                expected[index + offset] = new[0, ids.shape[1] :].tolist()
        (tmp_path / "expected.json").write_text(json.dumps(expected))
        return 0

    code, text = fork(with_peft, tmp_path / "peft.txt").wait()
    assert code == 0, text
    expected = {int(key): ids for key, ids in json.loads((tmp_path / "expected.json").read_text()).items()}
    assert served == expected
    assert sum(served[i] != served[i + 6] for i in range(6)) >= 3


def test_adapter_changes_at_least_half_of_the_answers(run_inference, adapter, few, tmp_path):
    """--lora_path takes base, tokenizer and template from the adapter; without it the base has no template."""
    flags = ["--prompts", few, "--max_new_tokens", 16]
    code, text = run_inference(
        *flags, "--lora_path", adapter, "--output_file", tmp_path / "a" / "outputs.jsonl"
    ).wait()
    assert code == 0, text
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    code, text = run_inference(
        *flags, "--model_path", base, "--output_file", tmp_path / "b" / "outputs.jsonl"
    ).wait()
    assert code == 2
    assert "its tokenizer has no chat template; use --raw, or an instruct model" in text
    code, text = run_inference(
        *flags, "--model_path", adapter.parent / "base", "--output_file", tmp_path / "c" / "outputs.jsonl"
    ).wait()
    assert code == 0, text
    # The adapter's products are exact too: other neighbours, the same bytes.
    narrow = ["--max_running_requests", 3, "--output_file", tmp_path / "n" / "outputs.jsonl"]
    code, text = run_inference(*flags, "--lora_path", adapter, *narrow).wait()
    assert code == 0, text
    assert results(tmp_path / "n") == results(tmp_path / "a")
    tuned, plain = (
        [row["output"] for row in json.loads((tmp_path / name / "outputs_all.json").read_text())]
        for name in "ac"
    )
    assert sum(a != b for a, b in zip(tuned, plain, strict=True)) >= 6


# --- other models and the server ----------------------------------------------------------------------


def test_dual_chunk_model_keeps_the_radix_cache(run_inference, tiny_qwen2, few, tmp_path):
    """As Qwen2.5-7B-Instruct-1M: its config would switch RadixAttention off."""
    import shutil

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


def test_the_serve_line_is_the_same_engine(uninterrupted, tmp_path):
    """Starts the printed line as a shell would and asks it with the openai client."""
    import openai

    text = (uninterrupted / "terminal.txt").read_text()
    line = re.search(r"^serve +(.*)$", text, re.M)[1]
    assert "--host 127.0.0.1" in line
    assert line.startswith("SGLANG_PLATFORM=plain_cpu RUNTIME_PLUGINS=cpu ")
    assert shlex.split(line)
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
        for name, value in summary_of(uninterrupted)["settings"]["engine_args"].items():
            assert served[name] == value, name
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Say something."}], max_tokens=8, temperature=0
        )
        assert answer.usage.completion_tokens <= 8
        assert isinstance(answer.choices[0].message.content, str)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
