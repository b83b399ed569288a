"""The graders' checker."""

import json
import random
import subprocess
import sys

import check_outputs
import pytest

from harness import ROOT


@pytest.fixture
def folder(tmp_path):
    """make(name, outputs, **settings) -> outputs.jsonl of a run of that many answers, its other files beside it."""

    def make(name, outputs, failures=(), truncated=(), told=None, **settings):
        out = tmp_path / name
        out.mkdir()
        rows = [{"output": text, "instruction": f"prompt {i}"} for i, text in enumerate(outputs)]
        (out / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::10]))
        (out / "outputs_all.json").write_text(json.dumps(rows))
        summary = {
            "records": len(rows),
            "failures": [{"index": i, "reason": "broken"} for i in failures],
            "truncated": list(truncated),
            "settings": {"seed": 1, "gpu_name": "A"} | settings,
        } | (told or {})
        (out / "summary.json").write_text(json.dumps(summary))
        return out / "outputs.jsonl"

    return make


@pytest.fixture
def run(capsys):
    """run(*words) -> (exit code, what the checker prints)."""

    def call(*words) -> tuple[int, str]:
        code = check_outputs.main([str(word) for word in words])
        terminal = capsys.readouterr()
        return code, terminal.out + terminal.err

    return call


GOOD = [f"answer number {i} is long enough" for i in range(31)]


def test_the_standard_library_is_enough(folder):
    """-S: no site-packages at all."""
    command = [sys.executable, "-I", "-S", ROOT / "sglang" / "check_outputs.py", folder("a", GOOD)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 rows" in done.stdout
    assert done.stdout.endswith("in order\n")


def test_problems_are_named(folder, run):
    path = folder("a", GOOD, failures=[20, 3])
    code, text = run(path)
    assert code == 1
    assert "line 3: record 20 failed: broken" in text
    assert "1 records outside this file failed, e.g. 3: broken" in text
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], lines[2]]) + "\n")
    code, text = run(path)
    assert code == 1
    assert "3 rows, expected 4" in text
    assert "line 1: not the instruction of record 0" in text


@pytest.mark.parametrize(
    ("line", "problem"),
    [('{"instruction": "a", "output": "b"}\n', "line 1: keys are ['instruction', 'output'], expected"),
     ("nonsense\n", "line 1: not valid JSON"), ("[" * 10**5 + "\n", "line 1: not valid JSON"),
     ("1" * 5000 + "\n", "line 1: not valid JSON"), ("[1]\n", "line 1: not an object"),
     ('{"output": 1, "instruction": "x"}\n', "line 1: output is int, not text: of an engine's result write result['text']"),
     ('{"output": {"text": "b"}, "instruction": "a"}\n', "line 1: output is dict, not text"),
     ('{"output": "a", "instruction": "b"}', "the last line does not end: was the file cut?")],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named(tmp_path, run, line, problem):
    path = tmp_path / "outputs.jsonl"
    path.write_text(line)
    (tmp_path / "summary.json").write_text("[" * 10**5)
    code, text = run(path, "--rows", 1)
    assert code == 1
    assert f"PROBLEM  {problem}" in text


def test_remarks_fail_only_when_strict(folder, run):
    outputs = [*GOOD]
    outputs[0], outputs[10] = "  ", "I say " + "the same thing again, " * 12
    path = folder("a", outputs, truncated=[20])
    code, text = run(path)
    assert code == 0
    assert "line 1: the answer is empty" in text
    assert "line 2: the answer is looping" in text
    assert "line 3: the answer is cut" in text
    assert run(path, "--strict")[0] == 1


def test_ordinary_text_is_no_loop():
    for text in ("-" * 10, "1. one\n2. two\n3. three\n" * 2, "ha ha ha", "yes"):
        assert not check_outputs.loops(text)


# --- cut answers --------------------------------------------------------------------------------------

SENTENCES = (
    "The mill stands where the river bends, and its wheel has turned since the monks built it in 1702.",
    'She asked, "Is there a second key?"',
    "Divide both sides by three (it is not zero), then take the square root!",
    "It costs 4.50 euros; children under six travel free of charge on every line but the night bus.",
)
ENDINGS = (
    "\n\n1. **Weigh** the flour\n2. Knead it for ten minutes\n3. Let it rest",
    "\n\n```python\ndef area(r):\n    return 3.14159 * r ** 2\n```",
    "\n\n| year | tons |\n|---|---|\n| 1901 | 12 |",
    "\n\nBest regards,\n[Your Name]",
    "\n\nHave a good trip \U0001f600",
    "\n\nx = 12",
)


def answers(count: int = 805) -> list[str]:
    """Whole answers of 1 to 60 sentences (as many characters as AlpacaEval's have), a few of one word, and one in
    eight without a mark at its end."""
    draw, texts = random.Random(1), []
    for i in range(count):
        sentences = draw.choices(SENTENCES, k=1 + min(59, int(draw.lognormvariate(2.3, 0.8))))
        text = " ".join(sentences) + (draw.choice(ENDINGS) if i % 3 == 0 else "")
        texts.append("Paris" if i % 40 == 7 else text)
    return texts


def lone_file(path, texts) -> object:
    """outputs.jsonl of 805 answers without the run's other files."""
    rows = [{"output": text, "instruction": f"prompt {i}"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::10]))
    return path


def test_a_file_of_answers_that_stop_in_mid_sentence_is_said_to_be_cut(tmp_path, run):
    """128 tokens are about 560 characters."""
    path = lone_file(tmp_path / "outputs.jsonl", [text[:560] for text in answers()])
    code, text = run(path)
    assert code == 0
    assert "answers are cut in mid-sentence" in text
    assert text.endswith("in order, but read the WARNING\n")
    assert run(path, "--strict")[0] == 1
    long = [text for text in answers() if len(text) > 700]
    assert sum(check_outputs.looks_cut(text[:560]) for text in long) > 0.8 * len(long)


def test_a_file_of_whole_answers_has_no_cut_one(tmp_path, run):
    code, text = run(lone_file(tmp_path / "outputs.jsonl", answers()), "--strict")
    assert code == 0, text
    assert "0 cut" in text
    assert not any(map(check_outputs.looks_cut, answers()))


@pytest.mark.parametrize(
    ("text", "cut"),
    [("Paris", False), ("- two cups of finely chopped basil", False), ("", False), ("A:\n```\nx = 1", True),
     ("There are several reasons why this did not work: the", True), ("他" * 60, True), ("他" * 60 + "。", False),
     ("It is best to begin with whatever is at hand, then,", True)],
)  # fmt: skip
def test_text_shows_whether_it_was_cut(text, cut):
    assert check_outputs.looks_cut(text) == cut


def test_the_summary_knows_better_than_the_text_which_answers_were_cut(folder, run):
    assert "0 cut" in run(folder("a", ["There are several reasons why this did not work: the"] * 31))[1]
    _, text = run(folder("b", GOOD, truncated=[0, 5, 20]))
    assert "WARNING  2 of 4 answers are cut" in text


# --- known mistakes ----------------------------------------------------------------------------------------

INSTRUCT = "Qwen/Qwen2.5-7B-Instruct"
LOOPS = [text + " and so on" * 20 if i % 50 == 0 else text for i, text in enumerate(["An answer."] * 101)]


@pytest.mark.parametrize(
    ("arguments", "told", "line"),
    [
        ({"model_path": f"{INSTRUCT}-1M"}, {}, f"{INSTRUCT}-1M: its dual-chunk attention switches RadixAttention off; "),
        ({"batch_size": 8}, {}, "--batch_size 8: no more records than that were in flight; leave it out"),
        ({"batch_size": 64}, {}, "--batch_size 64: no more records"),
        ({}, {"roofline_share": 0.12}, "12% of the roofline, as batches one after another reach: send all requests"),
        ({"max_new_tokens": 128}, {"output_tokens": 6000}, "40 answers were cut at --max_new_tokens 128; leave it at"),
        ({"max_new_tokens": 1024}, {"output_tokens": 45000}, "40 answers were cut at --max_new_tokens 1024; leave it"),
        ({"max_new_tokens": 8192}, {"output_tokens": 6000},
         "40 answers were cut long before --max_new_tokens 8192: pass each request its sampling_params"),
        ({"raw": True}, {}, f"--raw: {INSTRUCT} was asked without its chat template, which makes answers loop; "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_cure(folder, run, arguments, told, line):
    told = {"prompt_tokens": 3000, "truncated": [*range(40)] if "output_tokens" in told else []} | told
    code, text = run(
        folder("a", LOOPS, told=told, arguments={"model_path": INSTRUCT} | arguments, engine_args={})
    )
    assert code == 0
    found = [line for line in text.splitlines() if line.startswith("WARNING") and " answers are " not in line]
    assert len(found) == 1, text
    assert found[0].startswith(f"WARNING  {line}")


def test_what_is_no_mistake_gets_no_line(folder, run):
    """-1M as our program starts it; a few answers that were cut by the assignment's own limit; a rehearsal."""
    model = {
        "arguments": {"model_path": f"{INSTRUCT}-1M", "max_new_tokens": 8192, "batch_size": 0, "raw": False}
    }
    model |= {"engine_args": {"json_model_override_args": '{"dual_chunk_attention_config": null}'}}
    told = {"prompt_tokens": 3000, "output_tokens": 60000, "roofline_share": 0.6}
    assert "WARNING" not in run(folder("a", LOOPS[1:50], truncated=[1, 2], told=told, **model))[1]
    rehearsal = {"arguments": {"max_new_tokens": 128, "rehearse": True}}
    told = {"prompt_tokens": 3000, "output_tokens": 6000}
    assert "WARNING" not in run(folder("b", LOOPS[1:50], truncated=range(1, 10), told=told, **rehearsal))[1]


def test_a_file_alone_names_likely_causes(tmp_path, run):
    """Without a summary, but with AlpacaEval's array, which names the model."""
    looping = [text + " and so on" * 20 if i % 50 == 0 else text for i, text in enumerate(answers())]
    path = lone_file(tmp_path / "outputs.jsonl", looping)
    everything = [
        {"instruction": f"prompt {i}", "output": text, "generator": f"{INSTRUCT}-1M"}
        for i, text in enumerate(looping)
    ]
    (tmp_path / "outputs_all.json").write_text(json.dumps(everything))
    text = run(path)[1]
    assert (
        "WARNING  17 of 81 answers are looping at the end; prompts without the model's chat template do that"
        in text
    )
    assert f"WARNING  {INSTRUCT}-1M: its dual-chunk attention" in text
    text = run(lone_file(tmp_path / "cut.jsonl", [text[:560] for text in answers()]))[1]
    assert "as by the token limit; a request without sampling_params ends at 128 tokens" in text


# --- against a reference ------------------------------------------------------------------------------


def test_rows_that_differ_from_a_reference_are_shown(folder, run):
    ours = folder("a", GOOD)
    code, text = run(ours, "--against", folder("b", GOOD))
    assert code == 0
    assert "4 rows identical, 0 differ" in text
    other = [*GOOD]
    other[10] = other[10].replace("long", "short")
    code, text = run(ours, "--against", folder("c", other))
    assert code == 1
    assert "3 rows identical, 1 differ" in text
    assert f"line 2: output differs from character {GOOD[10].index('long')}" in text
    assert run(ours, "--against", folder("d", GOOD[:15]))[0] == 1


def test_bytes_that_cannot_match_are_explained(folder, run):
    ours, theirs = folder("a", GOOD), folder("b", ["something else altogether" for _ in GOOD], gpu_name="B")
    code, text = run(ours, "--against", theirs)
    assert code == 0
    assert "gpu_name: A here, B in the reference" in text
    assert "similarity 0.00" in text
    assert run(ours, "--against", theirs, "--strict")[0] == 1


def test_another_machine_explains_answers_and_nothing_else(folder, run):
    ours = folder("a", GOOD[:11], gpu_name="A")
    assert run(ours, "--against", folder("b", GOOD, gpu_name="B"))[0] == 1
    other = folder("c", GOOD, gpu_name="B")
    other.write_text(other.read_text().replace("prompt 10", "prompt eleven"))
    assert run(folder("d", GOOD), "--against", other)[0] == 1


def test_a_lone_file_must_have_the_assignments_rows(tmp_path, run):
    path = lone_file(tmp_path / "outputs.jsonl", GOOD)
    code, text = run(path)
    assert code == 1
    assert "4 rows, expected 81" in text
    assert run(path, "--rows", 4)[0] == 0


def test_an_autograder_gets_one_json_object(folder, run):
    code, text = run(folder("a", GOOD, failures=[0]), "--json")
    report = json.loads(text)
    assert (code, report["ok"], report["row_count"]) == (1, False, 4)
    assert report["problems"] == ["line 1: record 0 failed: broken"]
    assert report["counts"] == {"empty": 0, "looping": 0, "cut": 0}


def test_an_unreadable_file_is_one_line(tmp_path, run):
    code, text = run(tmp_path / "none.jsonl")
    assert code == 2
    assert text.startswith("error: ")
