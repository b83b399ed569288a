"""Prompts in, token ids out: reading, checking, the chat template, and a seed per record.

A bad record keeps its place and its reason (`Record.error`) and costs no other record.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench import UserError
from workbench.models import explain_hub_error
from workbench.rows import PROMPT_FORMS, read_rows, read_text, text, turns

from . import batch_file, grammars
from .arguments import OWN_PARAMS, PROGRAM, Arguments, own_params

ALPACA_EVAL = "alpaca_eval.json"  # plain JSON; the data set's loading script no longer works (datasets >= 4)
OPTIONAL_KEYS = ("regex", "json_schema", "lora")
GREEDY_BELOW = 1e-6  # SGLang's own limit of the temperature
# Greedy, as a draw: only the likeliest token is in the nucleus, whatever the logits are.
GREEDY_DRAW = {"temperature": 0.01, "top_p": 1e-6}
WHOLE_NUCLEUS = math.nextafter(1, 0)  # in fp32 it is 1


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt. `read` fills the fields up to `custom_id` and `tokenise` the next three; each may add an `error`, as
    adapters.check_all does."""

    index: int
    instruction: str  # of a chat, its last turn
    messages: list[dict[str, str]] = field(default_factory=list)  # all turns, if there are several
    regex: str | None = None
    json_schema: str | None = None  # as JSON text
    lora: str | None = None  # adapter folder; None: the base model
    own: dict = field(default_factory=dict)  # from `own_params`
    raw: bool | None = None  # no chat template; None: as --raw says
    custom_id: str | None = None  # of a batch file's line
    input_ids: list[int] = field(default_factory=list)
    sampling_params: dict = field(default_factory=dict)  # as sglang.Engine takes them
    key: str = ""  # hash of everything its answer depends on
    error: str | None = None

    def flag(self, args: Arguments, name: str):
        """Its own value, or the command line's."""
        return self.own.get(name, getattr(args, name))


# --- reading ------------------------------------------------------------------------------------------


def find(name: str) -> tuple[Path, str | None]:
    """(file, revision on the hub or None) of --prompts; fetches the hub's file if it is not in the cache."""
    if Path(name).exists():
        return Path(name), None
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = {"repo_id": name, "filename": ALPACA_EVAL, "repo_type": "dataset"}
    try:
        try:
            found = Path(hf_hub_download(**where, local_files_only=True))
        except LocalEntryNotFoundError:
            HfApi().auth_check(name, repo_type="dataset")  # without a network the download tries again for 23 s
            found = Path(hf_hub_download(**where))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"--prompts {name}: this data set has no {ALPACA_EVAL}") from error
        raise UserError(explain_hub_error(name, "dataset", error, "--prompts", PROGRAM)) from error
    return found, found.parent.name


def read(path: Path) -> list[Record]:
    """Reads .txt with a prompt a line, or what `read_rows` reads. A row is a string or an object in one of PROMPT_FORMS
    and optionally `regex`, `json_schema`, `lora`, `sampling_params`; other keys are ignored. A file with one line of
    OpenAI's batch format is a batch file.

    Raises UserError with file and line for a file that cannot be read; a row whose content is bad becomes a
    record with an `error`.
    """
    if path.suffix.lower() == ".txt":  # not splitlines(): U+2028, form feed and the like belong to a prompt
        lines = read_text(path, "--prompts").split("\n")
        rows = [line.removesuffix("\r") for line in lines if line.strip()]
    else:
        rows = [row for _, row in read_rows(path, "--prompts")]
    if not rows:
        raise UserError(f"--prompts {path}: no prompts in it")
    if batch_file.holds(rows):
        return [
            replace(_record(index, row), custom_id=custom_id, raw=raw)
            for index, (custom_id, raw, row) in enumerate(batch_file.requests(rows))
        ]
    return [_record(index, row) for index, row in enumerate(rows)]


def _record(index: int, row: object) -> Record:
    instruction = ""
    try:
        row = {"instruction": row} if isinstance(row, str) else row
        messages = turns(row, PROMPT_FORMS)
        if messages[-1]["role"] != "user":
            raise UserError("the last turn must be the user's; remove the answer")
        instruction = messages[-1]["content"]
        if not instruction.strip():
            raise UserError("the instruction is empty")
        given = own_params(row.get("sampling_params"))
        row = {name: row[name] for name in OPTIONAL_KEYS if row.get(name) is not None}
        if isinstance(row.get("json_schema"), (dict, bool)):
            row["json_schema"] = json.dumps(row["json_schema"], sort_keys=True)
        own = {name: text(row, name) for name in row}
        if "regex" in own and "json_schema" in own:
            raise UserError("both 'regex' and 'json_schema' are given; use one")
    except UserError as error:
        return Record(index, instruction, error=str(error))
    except (RecursionError, TypeError) as error:  # parquet can hold more than JSON
        return Record(index, instruction, error=f"'json_schema' cannot be written as JSON: {error}")
    return Record(index, instruction, messages if len(messages) > 1 else [], **own, own=given)


# --- checking and tokenising --------------------------------------------------------------------------


def tokenise(
    records: list[Record],
    args: Arguments,
    tokenizer,
    context_tokens: int,
    vocab_size: int,
    weights: dict[str | None, str],
) -> list[Record]:
    """The records with token ids, sampling parameters and key, or with their error.

    `tokenizer` applies its own chat template (`--raw` tokenises the text as it is); ids, not text, go to the
    engine, which would add BOS a second time and dies of an id that the embedding's `vocab_size` rows lack. `weights` maps None to the base's hash or revision and each
    adapter to its hash. Raises UserError if all need a template and there is none.
    """
    if not any(_raw(r, args) for r in records) and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; use --raw, or an instruct model"
        )
    mixed = len(draws(records, args)) > 1
    found = [_tokenised(record, args, tokenizer, context_tokens, weights, mixed) for record in records]
    beyond = (
        "the prompt holds a token that the model's embedding has no row for, as a <pad> added to its tokenizer"
    )
    return [replace(r, error=beyond) if max(r.input_ids, default=0) >= vocab_size else r for r in found]


def draws(records: list[Record], args: Arguments) -> set[str]:
    """The ways in which tokens are drawn: SGLang takes another for a whole batch if one of its records needs it."""
    pairs = {(record.flag(args, "temperature"), record.flag(args, "top_p")) for record in records}
    return {"greedy" if t < GREEDY_BELOW else "all" if top_p == 1 else "nucleus" for t, top_p in pairs}


def _raw(record: Record, args: Arguments) -> bool:
    return args.raw if record.raw is None else record.raw


def _tokenised(
    record: Record, args: Arguments, tokenizer, context_tokens: int, weights: dict, mixed: bool
) -> Record:
    backend = args.own_engine_args.get("grammar_backend", "xgrammar")
    if error := record.error or grammars.refused(record.regex, record.json_schema, backend):
        return replace(record, error=error)
    raw = _raw(record, args)
    if raw and record.messages:
        return replace(record, error="a chat of several turns needs a template; leave out --raw")
    try:
        ids = _ids(record, tokenizer, raw)
    except Exception as error:  # whatever it is, it is this record's
        return replace(record, error=f"cannot be tokenised: {error!r}"[:300])
    room = context_tokens - len(ids) - 1  # SGLang wants prompt + answer below the context length
    if room < 1:
        return replace(record, error=f"{len(ids)} prompt tokens; the context holds {context_tokens}")
    params = {name: record.flag(args, name) for name in ("temperature", "top_p")} | {"top_k": args.top_k}
    if mixed:  # all by one way, or a record's tokens would depend on which others run beside it
        nucleus = {"top_p": min(params["top_p"], WHOLE_NUCLEUS)}
        params |= GREEDY_DRAW if params["temperature"] < GREEDY_BELOW else nucleus
    params["max_new_tokens"] = min(record.flag(args, "max_new_tokens"), room)
    if args.reproducible:
        # The same seed of their own gives equal requests the same answer, wherever they stand.
        place = None if "seed" in record.own else record.index
        digest = hashlib.sha256(json.dumps([record.flag(args, "seed"), place, ids]).encode()).digest()
        params["sampling_seed"] = int.from_bytes(digest[:4]) >> 1
    params |= {name: value for name, value in record.own.items() if name in OWN_PARAMS}
    params |= {name: value for name in ("regex", "json_schema") if (value := getattr(record, name)) is not None}
    served = [weights[None], weights[record.lora] if record.lora else None, args.reproducible]
    everything = json.dumps([*served, ids, params], sort_keys=True)
    key = hashlib.sha256(everything.encode()).hexdigest()[:32]
    return replace(record, input_ids=ids, sampling_params=params, key=key)


def _ids(record: Record, tokenizer, raw: bool) -> list[int]:
    if raw:
        return tokenizer(record.instruction)["input_ids"]
    messages = record.messages or [{"role": "user", "content": record.instruction}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
