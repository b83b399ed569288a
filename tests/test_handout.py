"""What students get: nothing of a solution, TODOs that stop the programs, an assignment text that is true."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import fields

import grade
import make_handout
import pytest
import reference

from batch_infer.arguments import Arguments as Inference
from harness import ROOT
from lora_sft.arguments import Arguments
from workbench import UserError

ASSIGNMENT = (ROOT / "handout" / "ASSIGNMENT.md").read_text()
REGION = re.compile(r"# Problem (\d[a-z]): .*\n((?: *#.*\n)*)((?s:.*?)) *# End of problem \1\n")
SOURCES = ("deepspeed/lora_sft/arguments.py", "deepspeed/lora_sft/model.py")
SOURCES += ("sglang/batch_infer/generate.py", "sglang/batch_infer/engine_args.py")
HIDDEN = ("203632640", "620000000", "410000000", "5000000", "LlamaDecoderLayer")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The handout as a student unpacks it."""
    folder = tmp_path_factory.mktemp("handout")
    assert make_handout.main(["--output_dir", str(folder)]) == 0
    with zipfile.ZipFile(folder / "handout.zip") as archive:
        archive.extractall(folder / "student")
    return folder


def program(folder, *words) -> tuple[int, str]:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def solved(text: str, path: str, problems: list[str]) -> str:
    """A student's file with the solution of `problems`, as far as they are in this file."""
    for match in REGION.finditer((ROOT / path).read_text()):
        if match[1] in problems:
            todo = rf'# TODO problem {match[1]}: .*?raise todo\("{match[1]}"\)\n'
            text, count = re.subn(todo, lambda _: match[0], text, flags=re.S)  # noqa: B023 (called at once)
            assert count == 1, match[1]
    return text


def paste(folder, problem: str) -> None:
    """Puts the solution of `problem` into a handout."""
    if problem == "1b":
        (folder / "deepspeed/zero3.json").write_text((ROOT / "deepspeed/zero3.json").read_text())
    for path in SOURCES:
        (folder / path).write_text(solved((folder / path).read_text(), path, [problem]))


# --- nothing of a solution ----------------------------------------------------------------------------


def test_no_line_of_a_solution_is_left(built):
    regions = {match[1]: match[3] for path in SOURCES for match in REGION.finditer((ROOT / path).read_text())}
    assert sorted(regions) == ["1a", "1c", "2a", "2b", "2c", "2d"]
    lines = {line.strip() for region in regions.values() for line in region.splitlines()}
    lines = {line for line in lines if len(line) >= 14 and not line.endswith("flag(")}
    assert len(lines) > 25
    for path in (built / "student").rglob("*"):
        text = path.read_text(errors="replace") if path.is_file() else ""
        digits = text.replace(",", "").replace("_", "")
        found = [line for line in lines if line in text]
        found += [value for value in HIDDEN if re.search(rf"(?<!\w){value}(?!\w)", digits)]
        assert not found, path


def test_hidden_values_are_those_of_the_solution():
    starter = (ROOT / "handout/starter/deepspeed/zero3.json").read_bytes()
    found = make_handout.hidden_values((ROOT / "deepspeed/zero3.json").read_bytes(), starter)
    assert set(found) == set(HIDDEN)


def test_the_zip_has_no_history_and_nothing_of_staff(built):
    with zipfile.ZipFile(built / "handout.zip") as archive:
        names = archive.namelist()
    assert all(name.startswith("handout/") for name in names)
    unwanted = (
        ".git/",
        "grade.py",
        "make_handout.py",
        "test_training",
        "bench/results/run",
        "finetune/",
        "docs/",
    )
    for text in (*unwanted, "_lab.py"):
        assert not any(text in name for name in names), text
    makefile = (built / "student/handout/Makefile").read_text()
    assert "Staff" not in makefile
    assert "\ngrade:" not in makefile
    assert "\nrehearse:" in makefile
    for name in (
        "README.md",
        ".devcontainer/devcontainer.json",
        "tests/test_problem1.py",
        "handout/reference/inference/outputs.jsonl",
        "LICENSE",
    ):
        assert f"handout/{name}" in names
    assert (built / "student/handout/README.md").read_text() == ASSIGNMENT.replace("](../", "](")


def test_equal_sources_make_equal_bytes(built, tmp_path):
    assert make_handout.main(["--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "handout.zip").read_bytes() == (built / "handout.zip").read_bytes()


def test_a_folder_that_is_no_handout_is_left_alone(capsys):
    assert make_handout.main(["--output_dir", str(ROOT)]) == 2
    assert "its handout/ holds is no handout" in capsys.readouterr().err
    assert (ROOT / "handout" / "ASSIGNMENT.md").exists()


def test_a_leak_is_found(monkeypatch):
    solution = ["result = await anext(stream)", "203632640"]
    assert make_handout.leaks({"a.py": b"    result = await anext(stream)\n"}, solution)
    assert make_handout.leaks({"a.md": b"about 203,632,640 elements"}, solution)
    assert not make_handout.leaks({"a.md": b"2036326400 and anext(stream)"}, solution)
    monkeypatch.setattr(make_handout, "SHIPPED", (*make_handout.SHIPPED, "tests/test_training.py"))
    with pytest.raises(UserError, match=r"would be left: tests/test_training.py has 'LlamaDecoderLayer'"):
        make_handout.make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Problem 1a: do\nx = 1\n", r"x.py: the region of 1a does not end"),
        ("x = 1\n# End of problem 1a\n", r"x.py, line 2: closes what was not opened"),
        ("# Problem 1a: do\n# Problem 1b: do\n", r"x.py, line 2: opens a region inside of 1a"),
        ("# Problem 1a: do\nx = 1\n# End of problem 1b\n", r"x.py, line 3: closes what was not opened"),
        ("# Problem 1a do\n", r"x.py, line 1: a marker that is none"),
        ("# Staff only\nx = 1\n", r"x.py: the region of staff does not end"),
    ],
)
def test_markers_that_do_not_pair_are_named(text, message):
    with pytest.raises(UserError, match=message):
        make_handout.cut("x.py", text.encode(), make_handout.Handout())


# --- the handout at work ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES)
def test_a_todo_stands_in_for_each_solution_and_nothing_else_changes(built, path):
    student, ours = (built / "handout" / path).read_text(), (ROOT / path).read_text()
    problems = [match[1] for match in REGION.finditer(ours)]
    assert [f'raise todo("{problem}")' in student for problem in problems] == [True] * len(problems)
    assert ast.dump(ast.parse(student)) != ast.dump(ast.parse(ours))
    assert ast.dump(ast.parse(solved(student, path, problems))) == ast.dump(ast.parse(ours))


def test_help_works_and_the_first_todos_are_named(built):
    student = built / "student/handout"
    for script in ("deepspeed/main.py", "sglang/run_sglang.py"):
        code, text = program(student, script, "-h")
        assert code == 0, text
    assert "rank of the adapters (default: 0)" in program(student, "deepspeed/main.py", "-h")[1]
    code, text = program(student, "deepspeed/main.py", "--rehearse")
    line = 1 + (student / SOURCES[0]).read_text().split('raise todo("1a")')[0].count("\n")
    told = f"error: TODO problem 1a ({SOURCES[0]}, line {line}): the comment there says what to do\n"
    assert (code, text) == (2, told)
    paste(student, "1a")
    code, text = program(student, "deepspeed/main.py", "--rehearse")
    assert code == 2
    assert re.search(r"error: TODO problem 1b \(--deepspeed .*zero3.json, line 4\): leaf_module: ", text)


@pytest.mark.long
def test_public_tests_fail_before_and_pass_after_and_the_rehearsal_earns_ten_points(built, tmp_path):
    """And a rehearsal stops at each TODO in turn."""
    with zipfile.ZipFile(built / "handout.zip") as archive:
        archive.extractall(tmp_path)
    student, pytest_run = tmp_path / "handout", ["-P", "-m", "pytest", "-rA"]
    code, text = program(student, *pytest_run)
    assert code == 1
    assert not re.findall(r"^PASSED", text, re.M), text[-3000:]
    train = ["deepspeed/main.py", "--rehearse", "--output_dir", str(tmp_path / "run/finetune")]
    infer = ["sglang/run_sglang.py", "--rehearse", "--lora_path", str(tmp_path / "run/finetune")]
    infer += ["--output_file", str(tmp_path / "run/inference/outputs.jsonl")]
    for problem in ("1a", "1b", "1c", "2a", "2c", "2b"):
        command = train if problem < "2" else infer
        code, text = program(student, *command)
        assert code == 2, text
        assert f"TODO problem {problem}" in text.splitlines()[-1]
        paste(student, problem)
        if problem in ("1c", "2b"):
            code, text = program(student, *command)
            assert code == 0, text
    paste(student, "2d")
    code, text = program(student, *pytest_run)
    assert code == 0, text[-3000:]
    result = grade.grade(tmp_path / "run", [])
    assert (result["rehearsal_points"], result["points"]) == (10, 0), result


def test_an_untouched_handout_gets_nothing(built):
    result = grade.grade(built / "student" / "handout", [])
    assert result["points"] == result["rehearsal_points"] == 0
    assert {line["reason"] for line in result["criteria"]} >= {"inference/outputs.jsonl is missing"}


# --- the assignment text ------------------------------------------------------------------------------


def test_the_points_are_the_graders():
    rows = re.findall(r"^\| (\d) \| `(\w+)` \| (\d) \| ([\w-]+) \| (.+) \|$", ASSIGNMENT, re.M)
    ours = [(str(c.problem), c.name, str(c.points), c.column, c.text) for c in grade.CRITERIA]
    assert rows == ours
    for problem in (1, 2):
        assert sum(c.points for c in grade.CRITERIA if c.problem == problem) == 5


def test_files_functions_flags_and_targets_of_the_assignment_exist(built):
    student = built / "student/handout"
    files = re.findall(
        r"`((?:deepspeed|sglang|tests|handout|rehearsal)/[\w./-]+\.\w+)`(?:, `(\w+)`)?", ASSIGNMENT
    )
    for name, function in files:
        assert (f"def {function}" if function else "") in (student / name).read_text(), name
    assert sum(bool(function) for _, function in files) == 5
    for link in re.findall(r"\]\(\.\./([^)]+)\)", ASSIGNMENT):
        assert (student / link).exists(), link
    container = json.loads((student / ".devcontainer/devcontainer.json").read_text())
    assert container["onCreateCommand"].endswith(" && make install")
    targets = set(re.findall(r"^([a-z0-9-]+):", (student / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", ASSIGNMENT, re.M)) <= targets
    ours = {entry.name for program in (Arguments, Inference) for entry in fields(program)}
    assert set(re.findall(r"--([a-z0-9_]+)", ASSIGNMENT)) <= ours | {"gres", "mem", "time"}
    knobs = json.loads((ROOT / "deepspeed/zero3.json").read_text())["zero_optimization"]
    assert set(re.findall(r"`(stage3\w+|reduce\w+)`", ASSIGNMENT)) <= knobs.keys()


def test_what_ai_tutors_are_pointed_at_exists(built):
    student = built / "student/handout"
    rules = (student / "AGENTS.md").read_text()
    names = re.findall(r"`((?:tests|handout)/[\w.]*)`|\]\((\w+\.md)\)|(tests/\w+\.py)", rules)
    assert len(names) == 5
    assert all((student / "".join(name)).exists() for name in names)
    for file, part in re.findall(r"(tests/test_problem\d\.py) -k (\d\w)", rules):
        assert re.search(rf"^(async )?def test_(\d\w_)*{part}_", (student / file).read_text(), re.M), part
    targets = set(re.findall(r"^([a-z0-9-]+):", (student / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", rules)) <= targets


# --- the reference ------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_reference_comes_out_again(tmp_path):
    """Two fresh folders equal each other byte for byte, and the committed files as far as this machine allows."""
    for name in ("first", "second"):
        code, text = program(ROOT, "handout/reference.py", "--output_dir", tmp_path / name)
        assert code == 0, text
        assert text.count("the same; compared: ") == 2
    for path in ("inference/outputs.jsonl", "inference/outputs_all.json", "inference/fingerprint.json",
                 "finetune/fingerprint.json", "finetune/adapter_model.safetensors"):  # fmt: skip
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path


def test_what_must_be_the_same_on_which_machine():
    theirs = json.loads((reference.REFERENCE / "inference" / "fingerprint.json").read_text())
    assert len(theirs["first_tokens"]) == len(theirs["cached_tokens"]) == len(theirs["prompt_ids_sha256"]) == 32
    ours = theirs | {"answers_sha256": ["x", "y"]}
    assert reference.differences(ours, theirs) == ["answers_sha256"]
    elsewhere = {"machine": theirs["machine"] | {"cpu_capability": "another"}}
    assert reference.differences(ours | elsewhere, theirs) == []
    other = ours | elsewhere | {"first_tokens": [0] * 32}
    assert reference.differences(other, theirs) == ["first_tokens"]


def test_losses_may_differ_as_processors_round():
    theirs = json.loads((reference.REFERENCE / "finetune" / "fingerprint.json").read_text())
    for factor, found in ((1 + 1e-6, []), (1 + 1e-4, ["losses"])):
        ours = theirs | {"losses": [loss * factor for loss in theirs["losses"]]}
        assert reference.differences(ours, theirs) == found
    assert reference.differences(theirs | {"losses": theirs["losses"][1:]}, theirs) == ["losses"]


def test_the_reference_names_no_machine():
    for path in reference.REFERENCE.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert str(ROOT) not in text
            assert not re.search(r'"/(?!s>)\w', text), path
            assert os.uname().nodename not in text
