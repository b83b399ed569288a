"""OpenAI's batch format: its lines become rows as prompts.py reads them, answers and failures become its two files.

A line is {custom_id, method, url, body} (platform.openai.com/docs/api-reference/batch). No other file knows the format.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from workbench import UserError
from workbench.files import write_lines
from workbench.rows import text

LINE_KEYS = {"custom_id", "method", "url", "body"}
FORMS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
SAME_NAME = ("temperature", "top_p", "seed", "stop", "frequency_penalty", "presence_penalty")
PARAMS = dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_new_tokens") | {n: n for n in SAME_NAME}
# These change no answer, but for `model`: --model_path says which one answers.
IDLE = {"model", "user", "metadata", "store", "service_tier", "safety_identifier"}
IDLE |= {"prompt_cache_key", "prompt_cache_retention"}
# And what is not supported changes none with these values.
OFF_FOR_ALL = (False, "", [], {})
OFF = {"n": 1, "best_of": 1, "modalities": ["text"], "tool_choice": "none"}

Request = tuple[
    str | None, bool | None, object
]  # custom_id, without chat template, row (or UserError: why not)


# --- in -----------------------------------------------------------------------------------------------


def holds(rows: list) -> bool:
    """Whether they are a batch file's: a line may have lost one of its keys."""
    return any(isinstance(row, dict) and len(row.keys() & LINE_KEYS) >= 3 for row in rows)


def requests(lines: list) -> list[Request]:
    """All of a file's, in its order. What is no line of a batch file is a bad one here."""
    first_row: dict[str | None, int] = {}
    found = []
    for number, line in enumerate(lines, 1):
        given = line.get("custom_id") if isinstance(line, dict) else None
        custom_id = given if isinstance(given, str) else None
        first = first_row.setdefault(custom_id, number)
        try:
            row = _row(line)
            if first != number:
                raise UserError(
                    f"custom_id {custom_id[:64]!r} is that of row {first}, too; give each line its own"
                )
        except UserError as error:
            row = error
        raw = "prompt" in row if isinstance(row, dict) else None
        found.append((custom_id, raw, row))
    return found


def _row(line: object) -> dict:
    if isinstance(line, UserError):  # read_rows gives it for a line that cannot be held
        raise line
    if not isinstance(line, dict):
        raise UserError(f"expected an object with custom_id, method, url and body, found {type(line).__name__}")
    if not line.get("custom_id"):
        raise UserError("no 'custom_id'; each line of a batch file needs its own")
    text(line, "custom_id")
    if line.get("method") != "POST":
        raise UserError(f"'method' must be POST, found {json.dumps(line.get('method'))[:40]}")
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str) or url not in FORMS:
        raise UserError(f"'url' must be {' or '.join(FORMS)}, found {json.dumps(url)[:60]}")
    if not isinstance(body, dict):
        raise UserError(f"'body' must be an object, found {type(body).__name__}")
    form, body = FORMS[url], {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        known = name in (form, "response_format") or name in PARAMS or name in IDLE
        if not known and value not in OFF_FOR_ALL and value != OFF.get(name):
            raise UserError(f"body.{name} is not supported and would change the answer; remove it")
    if form not in body:
        raise UserError(f"no '{form}' in 'body'")
    prompt = body[form]
    if form == "messages" and isinstance(prompt, list):
        prompt = [_turn(turn, f"turn {i} of 'messages'") for i, turn in enumerate(prompt, 1)]
    own = {PARAMS[name]: body[name] for name in PARAMS if name in body}
    return {form: prompt, "sampling_params": own, **_grammar(body.get("response_format"))}


def _turn(turn: object, where: str) -> object:
    """With its text as one and `developer`, the newer name, as `system`."""
    if not isinstance(turn, dict):
        return turn
    if more := [name for name, value in turn.items() if name not in ("role", "content") and value]:
        raise UserError(f"{where}: '{more[0]}' is not supported; remove it")
    content, role = turn.get("content"), turn.get("role")
    if isinstance(content, list):
        texts = [isinstance(part, dict) and part.get("type") == "text" and part.get("text") for part in content]
        if not all(isinstance(part, str) for part in texts):
            raise UserError(f"{where}: only parts of type text are supported")
        content = " ".join(texts)  # as SGLang's server does
    return {"role": "system" if role == "developer" else role, "content": content}


def _grammar(wanted: object) -> dict:
    wanted = wanted if isinstance(wanted, dict) else {"type": wanted}
    kind = wanted.get("type")
    if kind in (None, "text"):
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    described = wanted.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, dict) or described.get("schema") is None:
        raise UserError(
            "body.response_format must be of type text, json_object, or json_schema with json_schema.schema"
        )
    return {"json_schema": described["schema"]}


# --- out ----------------------------------------------------------------------------------------------


def files(output_file: Path) -> tuple[Path, Path]:
    """Those of the answers and of the failures."""
    output, errors = (f"{output_file.stem}.batch_{kind}.jsonl" for kind in ("output", "errors"))
    return output_file.with_name(output), output_file.with_name(errors)


def write(
    output_file: Path, answered: list[tuple[str | None, bool | None, dict]], model: str, writer: str
) -> None:
    """`answered`: custom_id, without chat template, row of the partial file. In the input's order, without times or
    random ids: the same answers are the same bytes."""
    output, errors = files(output_file)
    write_lines(output, _lines(answered, model, failed=False), writer)
    write_lines(errors, _lines(answered, model, failed=True), writer)


def _lines(answered: list, model: str, failed: bool) -> Iterator[str]:
    for i, (custom_id, raw, row) in enumerate(answered):
        line = {"id": f"batch_req_{i}", "custom_id": custom_id, "response": None, "error": None}
        if failed is ("output" in row):
            continue
        if failed:
            line["error"] = {"code": "failed", "message": row.get("error", "not answered")}
        else:
            line["response"] = {"status_code": 200, "request_id": f"req_{i}", "body": _body(i, raw, row, model)}
        yield json.dumps(line) + "\n"


def _body(i: int, raw: bool | None, row: dict, model: str) -> dict:
    """A chat.completion or a text_completion. How many tokens were cached depends on what ran before: the summary says."""
    said = {"text": row["output"]} if raw else {"message": {"role": "assistant", "content": row["output"]}}
    usage = {
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["output_tokens"],
        "total_tokens": row["prompt_tokens"] + row["output_tokens"],
    }
    return {
        "id": f"{'cmpl' if raw else 'chatcmpl'}-{i}",
        "object": "text_completion" if raw else "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": row["finish_reason"]}],
        "usage": usage,
    }
