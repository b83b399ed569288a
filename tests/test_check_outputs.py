"""The graders' checker."""

import json
import subprocess
import sys

import pytest

from harness import ROOT

CHECKER = ROOT / "sglang" / "check_outputs.py"


@pytest.fixture
def folder(tmp_path):
    """make(name, outputs, **settings) -> outputs.jsonl of a run of that many answers, its other files beside it."""

    def make(name, outputs, failures=(), truncated=(), **settings):
        out = tmp_path / name
        out.mkdir()
        rows = [{"output": text, "instruction": f"prompt {i}"} for i, text in enumerate(outputs)]
        (out / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::10]))
        everything = [
            {"instruction": row["instruction"], "output": row["output"], "generator": "g"} for row in rows
        ]
        (out / "outputs_all.json").write_text(json.dumps(everything))
        summary = {
            "records": len(rows),
            "failures": [{"index": i, "reason": "broken"} for i in failures],
            "truncated": list(truncated),
            "settings": {"seed": 1, "gpu_name": "A"} | settings,
        }
        (out / "summary.json").write_text(json.dumps(summary))
        return out / "outputs.jsonl"

    return make


def run(*words) -> tuple[int, str]:
    command = [sys.executable, "-I", str(CHECKER), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    return done.returncode, done.stdout + done.stderr


GOOD = [f"answer number {i} is long enough" for i in range(31)]


def test_standard_library_only(folder):
    """-S: no site-packages at all."""
    command = [sys.executable, "-I", "-S", str(CHECKER), str(folder("a", GOOD))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 rows" in done.stdout
    assert done.stdout.rstrip().endswith("in order")


def test_problems_are_named(folder):
    path = folder("a", GOOD, failures=[20, 3])
    code, text = run(path)
    assert code == 1
    assert "line 3: record 20 failed: broken" in text
    assert "1 records outside this file failed, e.g. 3: broken" in text
    path = folder("b", GOOD)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], lines[2]]) + "\n")
    code, text = run(path)
    assert code == 1
    assert "3 rows, expected 4" in text
    assert "line 1: not the instruction of record 0" in text
    path.write_text('{"instruction": "a", "output": "b"}\nnonsense\n[1]\n{"output": 1, "instruction": "x"}')
    code, text = run(path)
    assert code == 1
    for expected in (
        "keys are",
        "line 2: not valid JSON",
        "line 3: not an object",
        "must be text",
        "was the file cut?",
    ):
        assert expected in text


def test_remarks_fail_only_when_strict(folder):
    outputs = [*GOOD]
    outputs[0], outputs[10] = "  ", "I say " + "the same thing again, " * 12
    path = folder("a", outputs, truncated=[20])
    code, text = run(path)
    assert code == 0
    assert "line 1: the answer is empty" in text
    assert "line 2: the answer ends in a loop" in text
    assert "line 3: the answer was cut" in text
    assert run(path, "--strict")[0] == 1


def test_ordinary_text_is_no_loop(folder):
    texts = ["-" * 10, "1. one\n2. two\n3. three\n" * 2, "ha ha ha", "yes"]
    assert "loop" not in run(folder("a", [text for text in texts for _ in range(10)]))[1]


def test_against_a_reference(folder):
    ours, same = folder("a", GOOD), folder("b", GOOD)
    code, text = run(ours, "--against", same)
    assert code == 0
    assert "4 rows identical, 0 differ" in text
    other = [*GOOD]
    other[10] = other[10].replace("long", "short")
    code, text = run(ours, "--against", folder("c", other))
    assert code == 1
    assert "3 rows identical, 1 differ" in text
    assert f"line 2: output differs from character {GOOD[10].index('long')}" in text
    assert run(ours, "--against", folder("d", GOOD[:15]))[0] == 1


def test_bytes_that_cannot_match_are_explained(folder):
    ours, theirs = folder("a", GOOD), folder("b", ["something else altogether" for _ in GOOD], gpu_name="B")
    code, text = run(ours, "--against", theirs)
    assert code == 0
    assert "gpu_name: A here, B in the reference" in text
    assert "similarity 0.00" in text
    assert run(ours, "--against", theirs, "--strict")[0] == 1


def test_another_machine_explains_answers_and_nothing_else(folder):
    ours = folder("a", GOOD[:11], gpu_name="A")
    assert run(ours, "--against", folder("b", GOOD, gpu_name="B"))[0] == 1
    other = folder("c", GOOD, gpu_name="B")
    other.write_text(other.read_text().replace("prompt 10", "prompt eleven"))
    assert run(folder("d", GOOD), "--against", other)[0] == 1


def test_a_lone_file_must_have_the_assignments_rows(folder, tmp_path):
    path = tmp_path / "outputs.jsonl"
    path.write_text("")
    code, text = run(path)
    assert code == 1
    assert "0 rows, expected 81" in text
    path.write_text(folder("a", GOOD).read_text())
    assert run(path)[0] == 1
    assert run(path, "--rows", 4)[0] == 0


def test_json_for_an_autograder(folder):
    code, text = run(folder("a", GOOD, failures=[0]), "--json")
    report = json.loads(text)
    assert code == 1
    assert report["ok"] is False
    assert report["row_count"] == 4
    assert report["problems"] == ["line 1: record 0 failed: broken"]


def test_unreadable_file(tmp_path):
    code, text = run(tmp_path / "none.jsonl")
    assert code == 2
    assert text.startswith("error: ")
