"""Text, tokens and packing."""

import csv
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import ROOT
from lora_sft import data, preflight
from lora_sft.data import IGNORE, Document
from workbench import UserError

ROWS = data.read_file(ROOT / "rehearsal" / "preferences.jsonl")


def row(prompt: str, chosen: str, number: int = 1) -> dict:
    return {"prompt": prompt, "chosen": chosen, "row": number}


# --- text ---------------------------------------------------------------------------------------------


def test_pinned_ids(tokenizer):
    """Three documents of the rehearsal's tokenizer: BOS 1, EOS 2, loss on the answer and EOS only."""
    documents, _ = data.tokenise(
        [
            row("\n\nHuman: Hi\n\nAssistant:", " Yes."),
            row("\n\nHuman: Hi\n\nAssistant: ", "Yes."),  # the space before the answer stands in the prompt
            row("\n\nHuman: Hi\n\nAssistant:", " \u00e9"),  # two byte tokens
        ],
        tokenizer,
        64,
    )
    pieces = [tokenizer.convert_ids_to_tokens(document.input_ids) for document in documents]
    head = ["<s>", "\n\n", "Human:", "\u2581H", "i", "\n\n", "Assistant:"]
    assert pieces == [
        [*head, "\u2581Y", "es.", "</s>"],
        [*head, "\u2581Y", "es.", "</s>"],  # the same ids, but the crossing token is the prompt's
        [*head, "\u2581", "<0xC3>", "<0xA9>", "</s>"],
    ]
    assert [document.input_ids for document in documents] == [
        [1, 337, 372, 408, 313, 337, 371, 651, 726, 2],
        [1, 337, 372, 408, 313, 337, 371, 651, 726, 2],
        [1, 337, 372, 408, 313, 337, 371, 331, 198, 172, 2],
    ]
    assert [document.answer_start for document in documents] == [7, 8, 7]


def test_special_ids_are_llamas(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == 1024  # nothing added: embeddings are never resized


def test_a_token_across_the_boundary_belongs_to_the_prompt(tokenizer):
    """Without a gap "...Ass" + "istant: x" would share a token; the space of an answer starts its own."""
    (document,), counts = data.tokenise([row("\n\nHuman: Hi\n\nAssis", "tant: x y")], tokenizer, 64)
    pieces = tokenizer.convert_ids_to_tokens(document.input_ids)
    assert counts.space_inserted == 1
    assert pieces[document.answer_start].startswith("\u2581")
    (document,), counts = data.tokenise([row("\n\nHuman: Hi\n\nAssistant: t", " x")], tokenizer, 64)
    assert counts.space_inserted == 0
    crossing = data.tokenise([row("\n\nHuman: Hi\n", "\nAssistant: x")], tokenizer, 64)[0][0]
    pieces = tokenizer.convert_ids_to_tokens(crossing.input_ids)
    assert pieces[crossing.answer_start - 1] == "\n\n"  # begins in the prompt, so it is not trained


def test_space_is_inserted_only_where_none_is(tokenizer):
    rows = [row("a:", "b"), row("a: ", "b"), row("a:", " b"), row("a:\n", "b")]
    assert data.tokenise(rows, tokenizer, 64)[1].space_inserted == 1


def test_over_long_prompts_are_cut_from_the_left_and_answers_never(tokenizer):
    (full,), _ = data.tokenise([ROWS[0]], tokenizer, 512)
    limit = len(full.input_ids) - 10
    (cut,), counts = data.tokenise([ROWS[0]], tokenizer, limit)
    assert counts.prompt_cut == 1
    assert len(cut.input_ids) == limit
    assert cut.input_ids[0] == 1
    assert cut.input_ids[1:] == full.input_ids[11:]
    assert cut.input_ids[cut.answer_start :] == full.input_ids[full.answer_start :]
    answer = len(full.input_ids) - full.answer_start
    (tight,), _ = data.tokenise([ROWS[0]], tokenizer, answer + 1)
    assert tight.answer_start == 1
    none, counts = data.tokenise([ROWS[0]], tokenizer, answer)
    assert none == []
    assert counts.skipped_answer_too_long == 1


def test_rows_without_answer_or_with_special_tokens_are_skipped_and_counted(tokenizer):
    rows = [row("\n\nHuman: Hi\n\nAssistant:", ""), row("\n\nHuman: </s>\n\nAssistant:", " x"), ROWS[0]]
    documents, counts = data.tokenise(rows, tokenizer, 256)
    assert len(documents) == counts.documents == 1
    assert (counts.skipped_no_answer_token, counts.skipped_special_token_text) == (1, 1)


def test_what_is_skipped_is_said_with_its_cure(tokenizer, tmp_path):
    """All rows: an error; from a tenth on: a warning."""
    marked = [row(f"<s>[INST] {i}? [/INST]", f" {i}.</s>", i) for i in range(20, 10, -1)]
    cause = (
        r"10 hold special tokens as text \(<s> in 10, </s> in 10; the first is row 11\): remove your template's"
    )
    with pytest.raises(
        UserError, match=f"none of the 11 train rows can be used: {cause}.*; 1 have an empty answer"
    ):
        data.prepare([*marked, row("a", "")], tokenizer, 64, 1, "train")
    args = SimpleNamespace(max_seq_len=256, rows_per_micro_batch=1, gradient_accumulation_steps=1)
    model, gpus = SimpleNamespace(model_folder=tokenizer.name_or_path), SimpleNamespace(world_size=1)

    def said(rows):
        return preflight.pack_rows(args, model, gpus, rows, ROWS[:1], tmp_path)[1]

    assert re.match(f"WARN: 90 documents .* 10 skipped.*; {cause}", said([*ROWS[:90], *marked]))
    assert said([*ROWS[:91], *marked]).startswith("91 documents")


def test_chat_template_renders_the_trained_document(tokenizer):
    """For every rehearsal row, several turns included: the served ids are the trained ids."""
    documents, _ = data.tokenise(ROWS, tokenizer, 1024)
    for source, document in zip(ROWS, documents, strict=True):
        turns = (source["prompt"] + source["chosen"]).split("\n\nHuman: ")[1:]
        messages = []
        for turn in turns:
            question, answer = turn.split("\n\nAssistant: ")
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(messages)["input_ids"] == document.input_ids
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        assert asked == "<s>" + source["prompt"]


# --- files --------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [row('\n\nHuman: \u2028, "line"\r\n\n\nAssistant:', " a", 1), row("p", "c", 2)]
    given = [{key: r[key] for key in ("prompt", "chosen")} for r in rows]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(given))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in given) + "\n\n")
    (tmp_path / "wrapped.json").write_text(
        json.dumps({"version": "1.0", "tags": ["x"], "data": given}, indent=2)
    )
    for name, delimiter in (("c.csv", ","), ("d.TSV", "\t")):
        with (tmp_path / name).open("w", newline="") as out:
            writer = csv.DictWriter(out, ["prompt", "chosen"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(given)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "e.parquet")
    for path in tmp_path.iterdir():
        assert data.read_file(path) == rows, path


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "Bye"}]
ANSWERED = [*SHAREGPT, {"from": "gpt", "value": "So long."}]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
]


@pytest.mark.parametrize(
    ("given", "prompt", "chosen"),
    [
        ({"prompt": "p", "chosen": "c", "instruction": "i", "output": "o"}, "p", "c"),
        ({"instruction": "Sort.", "output": "1 2"}, "\n\nHuman: Sort.\n\nAssistant:", " 1 2"),
        (
            {"instruction": "Sort.", "input": "2 1", "output": "", "system": "S"},
            "S\n\nHuman: Sort.\n\n2 1\n\nAssistant:",
            "",
        ),
        ({"messages": CHAT}, "Be kind.\n\nHuman: Hi\n\nAssistant:", " Yo"),
        (
            {"conversations": ANSWERED},
            "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Bye\n\nAssistant:",
            " So long.",
        ),
        (
            {"conversations": SHAREGPT, "id": 3},
            "\n\nHuman: Hi\n\nAssistant:",
            " Yo",
        ),  # no answer to the last turn
    ],
)
def test_forms_that_people_have_become_rm_statics(tmp_path, given, prompt, chosen):
    (tmp_path / "one.json").write_text(json.dumps(given, indent=1))  # one object over several lines
    assert data.read_file(tmp_path / "one.json") == [row(prompt, chosen)]


def test_a_chat_is_trained_as_the_template_renders_it(tokenizer):
    documents, _ = data.tokenise([data.check_row({"messages": CHAT}, 1, "")], tokenizer, 512)
    assert tokenizer.apply_chat_template(CHAT)["input_ids"] == documents[0].input_ids


DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b"}\n{"prompt": "a"}',
            r"rows.jsonl, row 2: no text under 'chosen'; a row has prompt and chosen, or .*\(found: 'prompt'\)",
        ),
        ('{"chosen": "b"}', r"rows.jsonl, row 1: no text under 'prompt'"),
        ('{"instruction": "b", "a\\nb": 1}', r"row 1: no text under 'output'; .* \(found: 'instruction', 'a\\nb'\)"),
        ('{"prompt": 3, "chosen": "b"}', r"rows.jsonl, row 1: 'prompt' must be text, found int"),
        ('{"prompt": " ", "chosen": "b"}', r"rows.jsonl, row 1: 'prompt' is empty"),
        (
            '{"prompt": "a", "chosen": "b"}\n{oops',
            r"--data_path .*rows.jsonl, line 2, column 2: not valid JSON",
        ),
        ('[{"prompt": "a", "chosen": "b"},\n 3]', r"rows.jsonl, row 2: expected an object, found int"),
        ('[{"prompt": "a"},\n oops]', r"rows.jsonl, line 2, column 2: not valid JSON"),
        ("prompt,chosen\na,b", r"line 1, column 1: not valid JSON .*; read are a JSON array, JSONL, .csv, .tsv and"),
        ("", "no rows in it"),
        ("[]", "no rows in it"),
        ('{"train": [{"prompt": "a"}], "test": [{}], "tags": ["a"]}', "expected a list of rows, found 'train', 'test'; keep one"),
        ('{"prompt": "a", "chosen": "b", "meta": ' + DEEP + "}", "row 1: nested too deeply"),
        ('[{"prompt": "a", "chosen": "b"},\n{"meta": ' + DEEP + "}]", "row 2: nested too deeply"),
        ('{"data":\n[' + DEEP + "]}", "row 1: nested too deeply"),
        ('{"prompt": "a", "chosen": "b"}\n{"id": ' + "1" * 5000 + "}", "row 2: a number of more than 4300 digits"),
        ('{"prompt": "\\ud83d", "chosen": "b"}', r"row 1: 'prompt' holds U\+D83D"),
        ('{"prompt": "a", "chosen": "\\u0000"}', r"row 1: 'chosen' holds U\+0000"),
        ('{"instruction": "a", "output": "b", "history": [["q", "a"]]}', "row 1: 'history' is not read"),
        ('{"messages": "hi"}', "row 1: turn 1 of 'messages' must be an object with 'role' and 'content', found str"),
        ('{"messages": []}', "row 1: no turns under 'messages'"),
        ('{"messages": [{"role": "user", "content": null}]}', "turn 1 of 'messages': 'content' must be text"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "turn 1 of 'messages': no role 'tool' here"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "row 1: no answer of the assistant"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        data.read_file(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("", b"", "cannot be read"),
        ("a.json", "[]".encode("utf-16"), "line 1: not UTF-8 text .*; UTF-16: save it as UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "; a gzip file: unpack it"),
        ("a.json", b'[\n"\xe9"]', r"line 2: not UTF-8 text \(byte 3 of the file\); save it as UTF-8"),
        ("a.parquet", b"PAR1PAR1", "a.parquet: not readable as parquet"),
        (
            "a.csv",
            b"prompt,chosen\na,b\na,b,c",
            r"a.csv, row 2 \(line 3\): not 2 cells, each with a name .*; quote",
        ),
        ("a.csv", b'prompt,chosen\n"a,b\nc,d\n', r"a.csv, row 1 \(line 3\): unexpected end of data; quote"),
        ("a.csv", b"prompt,chosen\na,b\na,", "row 2: no text under 'chosen'"),
        (
            "a.csv",
            b"prompt,prompt,chosen\na,b,c",
            r"row 1 \(line 2\): not 3 cells, each with a name of its own",
        ),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, problem):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        data.read_file(tmp_path / name)


def test_split_is_seeded_disjoint_and_bounded():
    rows = [row(str(i), "x") for i in range(100)]
    train, test = data.split_rows(rows, [], 50, 500, 42)
    assert (len(train), len(test)) == (50, 10)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert data.split_rows(rows, [], 50, 500, 42) == (train, test)
    assert data.split_rows(rows, [], 50, 500, 43) != (train, test)
    assert [len(part) for part in data.split_rows(rows, rows[:30], -1, -1, 0)] == [100, 30]
    assert [row["prompt"] for row in train] != [row["prompt"] for row in rows[:50]]  # not the first ones
    for arguments in ((rows[:1], [], -1, -1), (rows, [], 0, 5), (rows, [], 5, 0)):
        with pytest.raises(UserError, match="are left"):
            data.split_rows(*arguments, 0)


def test_hash_depends_on_text_and_order():
    assert data.rows_sha256(ROWS[:2]) != data.rows_sha256(ROWS[1::-1])
    assert data.rows_sha256(ROWS[:2]) == data.rows_sha256(ROWS[:2])


# --- packing ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 128))
def test_best_fit_keeps_every_index_once_and_within_capacity(lengths, capacity):
    rows = data.best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    # No two rows could be one: best fit decreasing never leaves two rows half empty.
    fills = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@given(st.lists(st.tuples(st.integers(2, 32), st.integers(1, 31)), min_size=1, max_size=60), st.integers(1, 8))
def test_packing_loses_nothing(shapes, multiple):
    documents = [
        Document([100 * number + i for i in range(1, length + 1)], min(start, length - 1))
        for number, (length, start) in enumerate(shapes, 1)
    ]
    packed = data.pack(documents, 32, pad_id=0, row_multiple=multiple)
    assert len(packed) % multiple == 0
    found = []
    for ids, labels, positions, real in zip(
        packed.input_ids, packed.labels, packed.position_ids, packed.real_tokens, strict=True
    ):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        for start, end in itertools.pairwise(starts):
            assert (positions[start:end] == np.arange(end - start)).all()
            if start < real:
                trained = labels[start:end] != IGNORE
                assert (labels[start:end][trained] == ids[start:end][trained]).all()
                found.append((ids[start:end].tolist(), int(np.argmax(trained))))
            else:
                assert (labels[start:end] == IGNORE).all()
                assert (ids[start:end] == 0).all()
    assert sorted(found) == sorted((d.input_ids, d.answer_start) for d in documents)
    assert packed.trained_tokens == sum(len(d.input_ids) - d.answer_start for d in documents)


def test_packed_rows_survive_the_disk(tokenizer, tmp_path):
    packed = data.prepare(ROWS[:20], tokenizer, 256, 4, "train")
    packed.save(tmp_path / "rows.npz")
    loaded = data.Packed.load(tmp_path / "rows.npz")
    assert loaded.counts == packed.counts
    assert (loaded.input_ids == packed.input_ids).all()
    assert loaded.report() == packed.report()


def test_report_adds_up(tokenizer):
    packed = data.prepare(ROWS, tokenizer, 256, 8, "train")
    report = packed.report()
    assert report["documents"] == 200
    assert report["packed_rows"] % 8 == 0
    filled = report["real_tokens"] / (report["packed_rows"] * 256)
    assert report["padding_share"] == pytest.approx(1 - filled)
    assert report["real_tokens"] == sum(len(d.input_ids) for d in data.tokenise(ROWS, tokenizer, 256)[0])
