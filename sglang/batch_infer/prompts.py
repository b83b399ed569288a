"""Prompts in, token ids out: reading, checking, the chat template, and a seed per record.

A bad record keeps its place and its reason (`Record.error`) and costs no other record.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from workbench import UserError
from workbench.machine import explain_hub_error

from .arguments import PROGRAM, Arguments

ALPACA_EVAL = "alpaca_eval.json"  # plain JSON; the data set's loading script no longer works (datasets >= 4)
OPTIONAL_KEYS = ("regex", "json_schema", "lora")


@dataclass
class Record:
    """One prompt on its way through the engine."""

    index: int
    instruction: str
    regex: str | None = None
    json_schema: str | None = None  # as JSON text
    lora: str | None = None  # adapter folder; None: the base model
    input_ids: list[int] = field(default_factory=list)
    max_new_tokens: int = 0
    seed: int = 0
    key: str = ""  # hash of everything its answer depends on
    error: str | None = None

    def sampling_params(self, args: Arguments) -> dict:
        """As sglang.Engine takes them."""
        params = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "max_new_tokens": self.max_new_tokens,
        }
        if args.reproducible:
            params["sampling_seed"] = self.seed
        for name in ("regex", "json_schema"):
            if getattr(self, name) is not None:
                params[name] = getattr(self, name)
        return params


# --- reading ------------------------------------------------------------------------------------------


def find(args: Arguments) -> tuple[Path, str | None]:
    """(file, revision on the hub or None); fetches the hub's file if it is not in the cache."""
    path = Path(args.prompts)
    if path.exists():
        return path, None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = {"repo_id": args.prompts, "filename": ALPACA_EVAL, "repo_type": "dataset"}
    try:
        try:
            found = Path(hf_hub_download(**where, local_files_only=True))
        except LocalEntryNotFoundError:
            found = Path(hf_hub_download(**where))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"--prompts {args.prompts}: this data set has no {ALPACA_EVAL}") from error
        raise UserError(explain_hub_error(args.prompts, "dataset", error, "--prompts", PROGRAM)) from error
    return found, found.parent.name


def read(path: Path) -> list[Record]:
    """Reads a JSON array, JSONL, or text with a prompt a line. A row is a string or an object with
    `instruction` (or `prompt`) and optionally `regex`, `json_schema`, `lora`; other keys are ignored.

    Raises UserError with file and row for a file that cannot be read; a row whose content is bad becomes a
    record with an `error`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"--prompts {path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".txt":
        rows = [line for line in text.splitlines() if line.strip()]
    elif path.suffix == ".jsonl" or not text.lstrip().startswith("["):
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"--prompts {path}, line {number}, column {error.colno}: not valid JSON ({error.msg})"
                    ) from error
    else:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--prompts {path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
            ) from error
    if not rows:
        raise UserError(f"--prompts {path}: no prompts in it")
    return [_record(index, row) for index, row in enumerate(rows)]


def _record(index: int, row: object) -> Record:
    if isinstance(row, str):
        row = {"instruction": row}
    if not isinstance(row, dict):
        return Record(index, "", error=f"row {index + 1} is neither a string nor an object")
    instruction = row.get("instruction", row.get("prompt"))
    if not isinstance(instruction, str):
        return Record(index, "", error=f"row {index + 1} has no text under 'instruction'")
    record = Record(index, instruction)
    for name in OPTIONAL_KEYS:
        value = row.get(name)
        if name == "json_schema" and isinstance(value, (dict, bool)):
            value = json.dumps(value, sort_keys=True)
        if value is not None and not isinstance(value, str):
            record.error = f"row {index + 1}: '{name}' must be text"
        setattr(record, name, value if isinstance(value, str) else None)
    if not instruction.strip():
        record.error = "the instruction is empty"
    elif record.regex is not None and record.json_schema is not None:
        record.error = "both 'regex' and 'json_schema' are given; use one"
    return record


# --- checking and tokenising --------------------------------------------------------------------------


def check_grammar(record: Record) -> str | None:
    """Why its regex or schema cannot be used, as the engine's grammar library (xgrammar) sees it."""
    if record.regex is None and record.json_schema is None:
        return None
    import xgrammar

    try:
        if record.regex is not None:
            xgrammar.Grammar.from_regex(record.regex)
        else:
            json.loads(record.json_schema)
            xgrammar.Grammar.from_json_schema(record.json_schema)
    except (RuntimeError, ValueError) as error:
        what = "regex" if record.regex is not None else "json_schema"
        return f"invalid {what}: {str(error).strip().splitlines()[-1][:200]}"
    return None


def _tokenise(instruction: str, tokenizer, raw: bool) -> list[int]:
    if raw:
        return tokenizer(instruction)["input_ids"]
    messages = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def prepare(
    records: list[Record], args: Arguments, tokenizer, context_tokens: int, weights: dict[str | None, str]
) -> None:
    """Fills input_ids, max_new_tokens, seed and key of each record, or its error.

    `tokenizer` applies its own chat template (`--raw` tokenises the text as it is); ids, not text, go to the
    engine, which would add BOS a second time. `weights` maps None to the base's hash or revision and each
    adapter to its hash. Raises UserError if a template is needed and there is none.
    """
    if not args.raw and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; use --raw, or an instruct model"
        )
    for record in records:
        record.error = record.error or check_grammar(record)
        if record.error:
            continue
        try:
            record.input_ids = _tokenise(record.instruction, tokenizer, args.raw)
        except Exception as error:  # whatever it is, it is this record's
            record.error = f"cannot be tokenised: {error!r}"[:300]
            continue
        # SGLang wants prompt + answer below the context length.
        room = context_tokens - len(record.input_ids) - 1
        if room < 1:
            record.error = f"{len(record.input_ids)} prompt tokens; the context holds {context_tokens}"
            continue
        record.max_new_tokens = min(args.max_new_tokens, room)
        content = json.dumps([args.seed, record.index, record.input_ids])
        record.seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4]) >> 1
        served = [weights[None], weights[record.lora] if record.lora else None, args.reproducible]
        everything = [*served, record.input_ids, record.sampling_params(args)]
        record.key = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]
