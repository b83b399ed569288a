"""Rows of prompt and answer -> token documents -> packed rows of `max_seq_len` tokens.

A document is  BOS + prompt + chosen + EOS  in rm-static's own format ("\\n\\nHuman: ...\\n\\nAssistant:"),
not Llama-2-chat's. The loss covers the answer and EOS only. The text is tokenised as one string that
already carries the BOS and EOS strings, because that is what a server does with a rendered chat template;
`CHAT_TEMPLATE` renders exactly this string, so the adapter is served in the format it was trained on.
(Llama-2's tokenizer puts its leading "▁" only at the start of a string: adding the BOS id by hand would
give other ids than the served ones.)

Several documents share a row (best-fit packing). They cannot see each other: `position_ids` restart at 0
per document and no `attention_mask` is passed, from which transformers builds a block-diagonal mask, but
only with `use_cache=False`. `watch.packing_self_test` checks that at start-up. Two documents in a row of 8, with <s> = 1,
</s> = 2 and padding 0:

    input_ids     1  306 4966   2 |  1  910   2 |  0
    labels     -100 -100 4966   2 | -100 910   2 | -100     (answers_only shifts them by one)
    position_ids  0    1    2   3 |  0    1   2 |  0
"""

import bisect
import hashlib
import json
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from workbench import UserError
from workbench.rows import TRAINING_FORMS, read_rows, turns

IGNORE = -100  # label of a position without loss
# What stands before each turn, as in CHAT_TEMPLATE.
BEFORE = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] }}"
    "{% else %}{{ raise_exception('a chat has the roles system (first only), user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}"
    "{% elif messages and messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Document:
    """Token ids of one conversation; the loss starts at position `answer_start`."""

    input_ids: list[int]
    answer_start: int


@dataclass
class TextCounts:
    """What happened to the rows; printed and stored, so that no row disappears silently."""

    rows: int = 0
    documents: int = 0
    space_inserted: int = 0  # neither side had white space at the boundary
    prompt_cut: int = 0  # over-long: tokens removed from the left of the prompt
    skipped_answer_too_long: int = 0
    skipped_no_answer_token: int = 0
    skipped_special_token_text: int = 0  # the text contains "<s>", "</s>" or "<unk>" literally


@dataclass(frozen=True)
class Packed:
    """Rows of equal length for the model. All arrays are int32 of shape [rows, max_seq_len].

    `labels` is IGNORE on prompts and padding. Padding is masked by position, not by id, and restarts its
    own `position_ids`. `real_tokens` [rows] counts the positions that are not padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    real_tokens: np.ndarray
    counts: TextCounts = field(default_factory=TextCounts)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """One row as int64 arrays (torch's index type), for the default collator."""
        names = ("input_ids", "labels", "position_ids", "real_tokens")
        return {name: getattr(self, name)[row].astype(np.int64) for name in names}

    @property
    def answer_tokens(self) -> np.ndarray:
        """[rows]: positions that have a label."""
        return (self.labels != IGNORE).sum(axis=1)

    @property
    def trained_tokens(self) -> int:
        return int(self.answer_tokens.sum())

    def report(self) -> dict:
        """Shares and counts for summary.json. Shares are of all positions, filler rows included."""
        positions = self.input_ids.size
        return {
            "packed_rows": len(self),
            "real_tokens": int(self.real_tokens.sum()),
            "trained_tokens": self.trained_tokens,
            "padding_share": 1 - float(self.real_tokens.sum()) / positions,
            "trained_share": self.trained_tokens / positions,
            **asdict(self.counts),
        }

    def save(self, path: Path) -> None:
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        np.savez(path, counts=json.dumps(asdict(self.counts)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Packed":
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files if name != "counts"}
            return cls(**arrays, counts=TextCounts(**json.loads(str(stored["counts"]))))


# --- rows ---------------------------------------------------------------------------------------------


def check_row(row: object, number: int, where: str) -> dict:
    """{prompt, chosen, row: its number} of a row in one of TRAINING_FORMS. Raises UserError naming `where` it stands."""
    try:
        found = turns(row, TRAINING_FORMS)
        *before, chosen = (turn["content"] for turn in found)
        prompt = "".join(before)
        if row.get("prompt") is None or row.get("chosen") is None:  # not rm-static's text already
            prompt, chosen = as_text(found)
        if not prompt.strip():
            raise UserError("'prompt' is empty; remove the row or fill it in")
    except UserError as error:
        raise UserError(f"{where}, row {number}: {error}") from error
    return {"prompt": prompt, "chosen": chosen, "row": number}


def as_text(found: list[dict[str, str]]) -> tuple[str, str]:
    """(prompt, chosen) as CHAT_TEMPLATE renders them: the last answer is trained, what comes before it is its prompt."""
    last = max((i for i, turn in enumerate(found) if turn["role"] == "assistant"), default=0)
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in found[:last]):
        raise UserError("no answer of the assistant to a text of the user")
    prompt = "".join(BEFORE[turn["role"]] + turn["content"] for turn in found[:last])
    answer = found[last]["content"]
    return prompt + "\n\nAssistant:", " " + answer if answer else ""


def read_file(path: Path) -> list[dict]:
    """Rows of a file. Raises UserError with the file and the row, counted from 1 (JSONL: the line)."""
    return [check_row(row, number, f"--data_path {path}") for number, row in read_rows(path, "--data_path")]


def read_hub(name: str, local_files_only: bool) -> tuple[list[dict], list[dict], str]:
    """Train and test rows of a hub data set, and its commit. Fetches parquet files once, into HF_HOME."""
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            name,
            repo_type="dataset",
            allow_patterns=["*.parquet", "*.json", "*.jsonl"],
            local_files_only=local_files_only,
        )
    )
    from datasets import load_dataset

    splits = load_dataset(str(folder))
    if "train" not in splits:
        raise UserError(f"{name}: no split 'train'; found {list(splits)}")

    def checked(split: str) -> list[dict]:
        return [check_row(row, i, f"{name}, split {split}") for i, row in enumerate(splits[split], 1)]

    return checked("train"), checked("test") if "test" in splits else [], folder.name


def split_rows(train: list, test: list, max_train: int, max_eval: int, seed: int) -> tuple[list, list]:
    """Seeded shuffle, then at most `max_train` / `max_eval` rows (-1: all). Without a test split a tenth of
    the rows, at most `max_eval`, is held out. Raises UserError if nothing is left to train or evaluate on."""
    shuffled = random.Random(seed)
    train, test = list(train), list(test)
    shuffled.shuffle(train)
    shuffled.shuffle(test)
    if not test:
        held_out = max(1, len(train) // 10)
        if max_eval >= 0:
            held_out = min(held_out, max_eval)
        test, train = train[:held_out], train[held_out:]
    train = train if max_train < 0 else train[:max_train]
    test = test if max_eval < 0 else test[:max_eval]
    if not train or not test:
        raise UserError(
            f"--data_path: {len(train)} training and {len(test)} evaluation rows are left; give at least 2 rows, "
            "and --max_train_rows and --max_eval_rows above 0"
        )
    return train, test


def rows_sha256(*parts: list[dict]) -> str:
    """Hash of the rows in training order, so that two runs can be known to have seen the same text."""
    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            digest.update(json.dumps([row["prompt"], row["chosen"]], ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# --- tokens -------------------------------------------------------------------------------------------


def set_up_tokenizer(tokenizer) -> None:
    """Pad with <unk> (Llama-2 has no pad token; resizing embeddings under ZeRO-3 breaks), own template."""
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise UserError("the model's tokenizer has no BOS or EOS token; use a Llama-style base model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.chat_template = CHAT_TEMPLATE


def tokenise(rows: list[dict[str, str]], tokenizer, max_seq_len: int) -> tuple[list[Document], TextCounts]:
    """Rows -> documents of at most `max_seq_len` tokens.

    A token belongs to the answer if it starts where the prompt ends or later; one that crosses the boundary belongs
    to the prompt. An over-long document loses tokens from the left of its prompt,
    never from its answer; a row whose answer alone does not fit is skipped and counted.
    """
    counts = TextCounts(rows=len(rows))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    texts, boundaries = [], []
    for row in rows:
        prompt, chosen = row["prompt"], row["chosen"]
        if any(token in prompt + chosen for token in tokenizer.all_special_tokens):
            counts.skipped_special_token_text += 1
            continue
        gap = ""
        if chosen and not prompt[-1].isspace() and not chosen[0].isspace():
            gap = " "
            counts.space_inserted += 1
        texts.append(bos + prompt + gap + chosen + eos)
        boundaries.append(len(bos) + len(prompt))
    documents = []
    if not texts:
        return documents, counts
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets, boundary in zip(encoded["input_ids"], encoded["offset_mapping"], boundaries, strict=True):
        answer_start = next(i for i, (start, _) in enumerate(offsets) if start >= boundary)
        if answer_start == len(ids) - 1:  # only EOS is left: nothing to learn from
            counts.skipped_no_answer_token += 1
            continue
        answer_length = len(ids) - answer_start
        if 1 + answer_length > max_seq_len:
            counts.skipped_answer_too_long += 1
            continue
        if len(ids) > max_seq_len:
            counts.prompt_cut += 1
            kept_prompt = max_seq_len - 1 - answer_length
            ids = ids[:1] + ids[answer_start - kept_prompt :]
            answer_start = 1 + kept_prompt
        documents.append(Document(ids, answer_start))
    counts.documents = len(documents)
    return documents, counts


# --- packing ------------------------------------------------------------------------------------------


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices of `lengths` per row, each row's sum at most `capacity`.

    The longest document goes first, each into the fullest row it fits in: O(n log n), at most 11/9 of the
    optimal number of rows plus a constant (Johnson 1974).
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(free, (lengths[index], -1))
        if slot == len(free):
            rows.append([index])
            remaining, row = capacity - lengths[index], len(rows) - 1
        else:
            remaining, row = free.pop(slot)
            rows[row].append(index)
            remaining -= lengths[index]
        if remaining > 0:
            bisect.insort(free, (remaining, row))
    return rows


def pack(documents: list[Document], max_seq_len: int, pad_id: int, row_multiple: int = 1) -> Packed:
    """Packs documents into rows of `max_seq_len`, filled up with pad-only rows to a multiple of
    `row_multiple` (ranks x rows per micro-batch x accumulation): every rank then runs the same number of
    forward passes, as collectives require, and no document is trained twice."""
    bins = best_fit([len(document.input_ids) for document in documents], max_seq_len)
    total = -(-len(bins) // row_multiple) * row_multiple
    shape = (total, max_seq_len)
    input_ids = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    position_ids = np.tile(np.arange(max_seq_len, dtype=np.int32), (total, 1))
    real_tokens = np.zeros(total, np.int32)
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            ids, answer_start = documents[index].input_ids, documents[index].answer_start
            end = start + len(ids)
            input_ids[row, start:end] = ids
            labels[row, start + answer_start : end] = ids[answer_start:]
            position_ids[row, start:end] = np.arange(len(ids))
            start = end
        position_ids[row, start:] = np.arange(max_seq_len - start)
        real_tokens[row] = start
    return Packed(input_ids, labels, position_ids, real_tokens)


def prepare(rows: list[dict], tokenizer, max_seq_len: int, row_multiple: int, what: str) -> Packed:
    """Rows -> packed rows. Raises UserError if no row gives a document."""
    documents, counts = tokenise(rows, tokenizer, max_seq_len)
    if not documents:
        why = why_skipped(rows, counts, tokenizer, max_seq_len)
        raise UserError(f"none of the {len(rows)} {what} rows can be used: {why}")
    packed = pack(documents, max_seq_len, tokenizer.pad_token_id, row_multiple)
    return replace(packed, counts=counts)


def why_skipped(rows: list[dict], counts: TextCounts, tokenizer, max_seq_len: int) -> str:
    """The reasons in words, each with its cure."""
    reasons = []
    if counts.skipped_special_token_text:
        holding = {
            token: [row["row"] for row in rows if token in row["prompt"] + row["chosen"]]
            for token in tokenizer.all_special_tokens
        }
        found = ", ".join(f"{token} in {len(held)}" for token, held in holding.items() if held)
        reasons.append(
            f"{counts.skipped_special_token_text} hold special tokens as text ({found}; the first is row "
            f"{min(min(held) for held in holding.values() if held)}): remove your template's markers, this program adds its own"
        )
    if counts.skipped_answer_too_long:
        reasons.append(
            f"{counts.skipped_answer_too_long} have an answer that does not fit: raise --max_seq_len {max_seq_len}"
        )
    if counts.skipped_no_answer_token:
        reasons.append(f"{counts.skipped_no_answer_token} have an empty answer: fill it in")
    return "; ".join(reasons)
