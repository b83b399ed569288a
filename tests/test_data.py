"""Text, tokens and packing."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import ROOT
from lora_sft import data
from lora_sft.data import IGNORE, Document
from workbench import UserError

ROWS = data.read_file(ROOT / "rehearsal" / "preferences.jsonl")


def row(prompt: str, chosen: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen}


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
    head = ["<s>", "\n\nHuman:", "\u2581H", "i", "\n\nAssistant:"]
    assert pieces == [
        [*head, "\u2581Y", "es.", "</s>"],
        [*head, "\u2581Y", "es.", "</s>"],  # the same ids, but the crossing token is the prompt's
        [*head, "\u2581", "<0xC3>", "<0xA9>", "</s>"],
    ]
    assert [document.input_ids for document in documents] == [
        [1, 369, 406, 313, 370, 618, 468, 2],
        [1, 369, 406, 313, 370, 618, 468, 2],
        [1, 369, 406, 313, 370, 331, 198, 172, 2],
    ]
    assert [document.answer_start for document in documents] == [5, 6, 5]


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
    assert pieces[crossing.answer_start - 1] == "\n\nAssistant:"  # begins in the prompt, so it is not trained


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


def test_json_and_jsonl_give_the_same_rows(tmp_path):
    rows = [row("\n\nHuman: \u2028 line\n\nAssistant:", " a"), row("p", "c")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    assert data.read_file(tmp_path / "a.json") == data.read_file(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b"}\n{"prompt": "a"}',
            r"rows.jsonl, row 2: no 'chosen'.*\(found: prompt\)",
        ),
        ('{"chosen": "b"}', r"rows.jsonl, row 1: no 'prompt'"),
        ('{"prompt": 3, "chosen": "b"}', r"rows.jsonl, row 1: 'prompt' must be text, found int"),
        ('{"prompt": " ", "chosen": "b"}', r"rows.jsonl, row 1: 'prompt' is empty"),
        (
            '{"prompt": "a", "chosen": "b"}\n{oops',
            r"--data_path .*rows.jsonl, line 2, column 2: not valid JSON",
        ),
        ('[{"prompt": "a", "chosen": "b"},\n 3]', r"rows.jsonl, row 2: expected an object .* found int"),
        ('[{"prompt": "a"},\n oops]', r"rows.jsonl, line 2, column 2: not valid JSON"),
        ("", "no rows in it"),
        ("[]", "no rows in it"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        data.read_file(path)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00{")
    for name, problem in ((".", "cannot be read"), ("missing", "cannot be read"), ("binary", "not UTF-8 text")):
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
