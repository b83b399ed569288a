"""OpenAI's batch files: lines to records, a record's own parameters, the two files, and kills at any point."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from batch_infer import batch_file, prompts
from batch_infer.arguments import Arguments
from batch_infer.prompts import GREEDY_DRAW, Record
from harness import killed_at, partial_rows, stand_in

CHAT, COMPLETIONS = batch_file.FORMS
USER = [{"role": "user", "content": "Say something."}]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def line(custom_id: str, url: str = CHAT, **body) -> dict:
    body = {"model": "gpt-4o-mini", "max_tokens": 8} | ({"messages": USER} if url == CHAT else {}) | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().split("\n")[:-1]]


# --- reading ------------------------------------------------------------------------------------------


def test_a_line_becomes_a_record(tmp_path):
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    own = {
        "temperature": 0,
        "top_p": 0.5,
        "seed": -1,
        "stop": ["."],
        "max_completion_tokens": 9,
        "n": 1,
        "tools": [],
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    lines = [line("a", messages=parts, **own), line("b", COMPLETIONS, prompt="Once", presence_penalty=1)]
    lines += [line("c", response_format=wanted, user="me"), line("d", response_format={"type": "json_object"})]
    a, b, c, d = prompts.read(write(tmp_path / "a.jsonl", lines))
    assert [r.error for r in (a, b, c, d)] == [None] * 4
    assert (a.custom_id, a.raw, a.messages[0]) == ("a", False, {"role": "system", "content": "Be brief."})
    assert a.messages[1]["content"] == a.instruction == "Hi"
    assert a.own == {"max_new_tokens": 9, "temperature": 0, "top_p": 0.5, "seed": -1, "stop": ["."]}
    assert (b.raw, b.instruction, b.own) == (True, "Once", {"max_new_tokens": 8, "presence_penalty": 1})
    assert (json.loads(c.json_schema), json.loads(d.json_schema)) == (SCHEMA, {"type": "object"})


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"method": "POST", "url": CHAT, "body": {}}, "no 'custom_id'"),
        (line("x") | {"custom_id": 3}, "'custom_id' must be text, found int"),
        (line("x") | {"method": "GET"}, "'method' must be POST, found \"GET\""),
        (line("x") | {"url": "/v1/embeddings"}, "'url' must be /v1/chat/completions or /v1/completions, found"),
        (line("x") | {"body": "hi"}, "'body' must be an object, found str"),
        (line("good"), "custom_id 'good' is that of row 1, too"),
        (line("x", n=2), "body.n is not supported"),
        (line("x", tools=[{"type": "function"}]), "body.tools is not supported"),
        (line("x", logprobs=True), "body.logprobs is not supported"),
        (line("x", logit_bias={"5": 1}), "body.logit_bias is not supported"),
        (line("x", COMPLETIONS, messages=USER), "body.messages is not supported"),
        (line("x", COMPLETIONS), "no 'prompt' in 'body'"),
        (line("x", COMPLETIONS, prompt=["a", "b"]), "'prompt' must be text, found list"),
        (line("x", messages=[]), "no turns under 'messages'"),
        (line("x", messages=[{**USER[0], "name": "Bob"}]), "turn 1 of 'messages': 'name' is not supported"),
        (line("x", messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "turn 1 .*: only parts of type text"),
        (line("x", response_format={"type": "json_schema"}), "body.response_format must be of type"),
        (line("x", temperature="hot"), "'temperature' must be a number, found str"),
        (line("x", temperature=float("nan")), "'temperature' must be between"),
        (line("x", max_tokens=0), "max_new_tokens 0: must be at least 1"),
        (line("x", max_tokens=True), "'max_new_tokens' must be a whole number, found bool"),
        (line("x", top_p=1.5), "top_p 1.5: must be in"),
        (line("x", frequency_penalty=3), "'frequency_penalty' must be between -2 and 2"),
        (line("x", stop=["a", ""]), "'stop' is empty"),
        (line("x", stop=[1]), "'stop' must be text, found int"),
        ({"prompt": "a row of our own"}, "no 'custom_id'; each line of a batch file needs its own"),
        ("a text", "expected an object with custom_id, method, url and body, found str"),
    ],
)  # fmt: skip
def test_a_bad_line_fails_alone(tmp_path, bad, error):
    lines = [line("good"), bad, line("last")]
    good, found, last = prompts.read(write(tmp_path / "a.jsonl", lines))
    assert re.match(error, found.error)
    assert not good.error
    assert not last.error


def test_a_row_of_our_own_has_the_same_parameters(tmp_path):
    rows = [{"prompt": "x", "sampling_params": {"seed": 1, "stop": "."}, "body": "b", "url": "u"}, "text"]
    rows += [{"prompt": "x", "sampling_params": {"top_k": 1}}, {"prompt": "x", "sampling_params": "hot"}]
    found = prompts.read(write(tmp_path / "a.jsonl", rows))
    assert [(r.custom_id, r.own) for r in found[:2]] == [(None, {"seed": 1, "stop": "."}), (None, {})]
    assert found[2].error.startswith("'sampling_params' has no 'top_k' for one record; it has temperature, ")
    assert found[3].error == "'sampling_params' must be an object, found str"


class Words:
    """A tokenizer without a template, as far as tokenise() needs one."""

    name_or_path = "words"

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def params_of(*own: dict, args: Arguments | None = None) -> tuple[list[dict], list[str]]:
    records = [Record(i, "a bb", own=given, raw=True) for i, given in enumerate(own)]
    found = prompts.tokenise(records, args or Arguments(), Words(), 64, 10**6, {None: "w"})
    return [record.sampling_params for record in found], [record.key for record in found]


def test_values_of_its_own_go_before_the_flags_and_into_the_key():
    changes = [{}, {"temperature": 0.1}, {"top_p": 0.3}, {"max_new_tokens": 3}, {"seed": 4}, {"stop": "a"}]
    found = [params_of(change) for change in [*changes, {"frequency_penalty": 1.0}, {"presence_penalty": 1.0}]]
    assert len({key for _, (key,) in found}) == len(found)
    for [params], change in zip([params for params, _ in found], changes, strict=False):
        assert {name: params[name] for name in change if name != "seed"} == {
            n: change[n] for n in change if n != "seed"
        }
    assert found[4][0][0]["sampling_seed"] != found[0][0][0]["sampling_seed"]


def test_equal_requests_with_a_seed_get_the_same_answer_wherever_they_stand():
    _, keys = params_of({"seed": 7}, {}, {"seed": 7}, {"seed": 8}, {})
    assert keys[0] == keys[2]
    assert len(set(keys)) == 4


def test_records_that_draw_in_several_ways_are_drawn_in_one():
    """SGLang draws for a whole batch as one of its requests needs: bytes would depend on what runs beside a record."""
    alike, _ = params_of({"temperature": 0}, {"temperature": 0, "top_p": 1.0})
    assert [params["temperature"] for params in alike] == [0, 0]
    mixed, _ = params_of({"temperature": 0}, {"top_p": 1.0}, {"top_p": 0.9})
    assert mixed[0] | GREEDY_DRAW == mixed[0]
    assert 0.99999 < mixed[1]["top_p"] < 1
    assert [params["top_p"] for params in mixed[2:]] == [0.9]


def test_only_a_file_of_chats_needs_a_template():
    args, weights = Arguments(), {None: "w"}
    chat, completion = Record(0, "a", raw=False), Record(1, "a", raw=True)
    with pytest.raises(prompts.UserError, match="no chat template"):
        prompts.tokenise([chat], args, Words(), 64, 10**6, weights)
    failed, fine = prompts.tokenise([chat, completion], args, Words(), 64, 10**6, weights)
    assert failed.error.startswith("cannot be tokenised")
    assert not fine.error
    [raw] = prompts.tokenise(
        [replace(completion, raw=None)], replace(args, raw=True), Words(), 64, 10**6, weights
    )
    assert raw.input_ids == fine.input_ids


# --- a whole run --------------------------------------------------------------------------------------


def mixed_lines() -> list[dict]:
    """All ways to draw, both urls, a grammar, a stop and a penalty; the last three fail."""
    schema = {"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}}
    lines = [
        line("greedy", temperature=0, max_tokens=24),
        line("all", top_p=1, temperature=1.5, max_tokens=24),
        line("nucleus", max_tokens=24),
        line("seed", max_tokens=24, seed=3),
        line("completion", COMPLETIONS, prompt="Say something.", max_tokens=12, seed=3),
        line("schema", response_format=schema, max_tokens=64),
        line("penalty", presence_penalty=-2, temperature=0, max_tokens=24),
        line("stop", stop=["zz", "as"], temperature=0, max_tokens=24),
        line("again", max_tokens=24, seed=3),
    ]
    lines += [line("json", response_format={"type": "json_object"}, max_tokens=1)]  # which is always cut
    return [*lines, line("tools", tools=[{"type": "function"}]), line("tools")]


@pytest.fixture(scope="module")
def answered(run_inference, tmp_path_factory) -> Path:
    """The folder of a run of `mixed_lines`."""
    folder = tmp_path_factory.mktemp("batch")
    write(folder / "in.jsonl", mixed_lines())
    code, text = run_inference(
        "--prompts", folder / "in.jsonl", "--output_file", folder / "outputs.jsonl"
    ).wait()
    print(text)
    assert code == 3, text
    return folder


def bodies(folder: Path) -> dict[str, dict]:
    """The answers by custom_id."""
    output = rows_of(batch_file.files(folder / "outputs.jsonl")[0])
    return {row["custom_id"]: row["response"]["body"] for row in output}


def text_of(body: dict) -> str:
    [choice] = body["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_the_files_are_those_of_the_format(answered):
    """As OpenAI's own client reads them; the answers are those of outputs_all.json."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    output, errors = map(rows_of, batch_file.files(answered / "outputs.jsonl"))
    lines = mixed_lines()
    assert [row["custom_id"] for row in (*output, *errors)] == [row["custom_id"] for row in lines]
    everything = json.loads((answered / "outputs_all.json").read_text())
    for row, expected, given in zip(output, everything, lines, strict=False):
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        body, kind = row["response"]["body"], ChatCompletion if given["url"] == CHAT else Completion
        read = kind.model_validate(body, strict=True)
        assert text_of(body) == expected["output"]
        assert read.usage.total_tokens == read.usage.prompt_tokens + read.usage.completion_tokens
    for row in errors:
        assert (row["response"], row["error"].keys()) == (None, {"code", "message"})
    messages = [row["error"]["message"] for row in errors]
    for message, part in zip(
        messages, ("cut at 1 new tokens", "body.tools is", "is that of row 11, too"), strict=True
    ):
        assert part in message


def test_each_record_is_answered_as_it_asks(answered):
    found = bodies(answered)
    texts = {name: text_of(body) for name, body in found.items()}
    assert json.loads(texts["schema"])["ok"] in (True, False)
    assert texts["again"] == texts["seed"] != texts["nucleus"]
    assert texts["greedy"].startswith(texts["stop"])
    assert found["stop"]["choices"][0]["finish_reason"] == "stop"
    assert found["greedy"]["choices"][0]["finish_reason"] == "length"
    assert found["greedy"]["usage"]["completion_tokens"] == 24
    assert texts["penalty"] != texts["greedy"]


def test_bytes_do_not_depend_on_what_runs_beside(run_inference, answered, tmp_path):
    """Neither does the greedy draw on the others: alone it is SGLang's argmax."""
    out = ["--output_file", tmp_path / "outputs.jsonl", "--batch_size", 1]
    code, text = run_inference("--prompts", answered / "in.jsonl", *out).wait()
    assert code == 3, text
    for name in ("outputs.jsonl", "outputs.batch_output.jsonl", "outputs.batch_errors.jsonl"):
        assert (tmp_path / name).read_bytes() == (answered / name).read_bytes()
    (greedy,) = (row for row in mixed_lines() if row["custom_id"] == "greedy")
    alone = tmp_path / "alone"
    write(tmp_path / "greedy.jsonl", [greedy])
    flags = ["--prompts", tmp_path / "greedy.jsonl", "--output_file", alone / "outputs.jsonl"]
    code, text = run_inference(*flags).wait()
    assert code == 0, text
    assert bodies(alone)["greedy"] == bodies(answered)["greedy"]
    assert not batch_file.files(alone / "outputs.jsonl")[1].read_text()


# --- nothing is lost, and little is held --------------------------------------------------------------


FILES = ("outputs.jsonl", "outputs_all.json", "batch_output", "batch_errors", "summary.json")
POINTS = [("partial", number, behind) for number in range(1, 6) for behind in (False, True)]
POINTS += [(name, 1, behind) for name in FILES for behind in (False, True)]


@pytest.mark.parametrize("points", [POINTS[5:13:7], pytest.param(POINTS, marks=pytest.mark.long)], ids=len)
def test_kill_9_loses_nothing(run_inference, tmp_path, points):
    lines = [line(f"request {i}", messages=[{"role": "user", "content": f"Say {i}."}]) for i in range(40)]
    flags = ["--prompts", write(tmp_path / "in.jsonl", [*lines, line("bad", n=2)]), "--batch_size", 1]

    def run(folder: Path, patch=stand_in) -> tuple[int, str]:
        return run_inference(*flags, "--output_file", folder / "outputs.jsonl", patch=patch).wait()

    def files_of(folder: Path) -> list[bytes]:
        return [
            path.read_bytes() for path in sorted(folder.glob("outputs*.json*")) if "partial" not in path.name
        ]

    assert run(tmp_path / "whole")[0] == 3
    assert len(files_of(tmp_path / "whole")) == 4
    for number, (name, synced, behind) in enumerate(points):
        folder = tmp_path / str(number)
        code, text = run(folder, killed_at(name, synced, behind))
        kept = len({row["index"] for row in partial_rows(folder) if "output" in row})
        assert code == (75 if kept else 1), text
        assert kept == 40 if name != "partial" else kept >= synced - 1 + behind
        assert not (folder / "summary.json").exists()
        code, text = run(folder)
        assert code == 3, text
        assert not kept or f"{kept} already answered" in text
        assert files_of(folder) == files_of(tmp_path / "whole")


def memory_mib(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.long
def test_fifty_thousand_records_take_less_than_a_gibibyte(run_inference, tmp_path):
    """Of this program's process: prompts of 80 tokens and answers of 300."""

    def patch() -> None:
        import run_sglang

        stand_in(answer_tokens=300, answer_s=0.1)
        job = run_sglang.job

        def measured(args) -> int:
            before = memory_mib("VmRSS")
            code = job(args)
            print(f"grew by {memory_mib('VmHWM') - before:.0f} MiB")
            return code

        run_sglang.job = measured

    texts = (f"{i} " + "Tell me more of this. " * 8 for i in range(50_000))
    lines = (line(f"request {i}", messages=[{"role": "user", "content": text}]) for i, text in enumerate(texts))
    flags = ["--prompts", write(tmp_path / "in.jsonl", lines), "--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, patch=patch).wait(600)
    print(text)
    assert code == 0, text
    assert len(rows_of(batch_file.files(tmp_path / "outputs.jsonl")[0])) == 50_000
    assert int(re.search(r"grew by (\d+) MiB", text)[1]) < 1024
