"""The zip for Gradescope and GitHub Classroom, run as the platforms run it: $AUTOGRADER_ROOT with source/ and
submission/. Its setup.sh needs a package index; in its place stands the environment of these tests."""

import base64
import json
import os
import re
import subprocess
import sys
import zipfile

import grade
import make_autograder
import make_handout
import pytest
import yaml
from test_grading import ALPACA_EVAL, adapter_of, encode, inference_files, pack, put, training_files

from harness import ROOT
from workbench import UserError


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    files = {f"finetune/{name}": encode(name, value) for name, value in training_files().items()}
    files |= {f"inference/{name}": encode(name, value) for name, value in inference_files().items()}
    return files | {"finetune/adapter_model.safetensors": encode(".safetensors", adapter_of())}


@pytest.fixture(scope="module")
def autograder(tmp_path_factory):
    """build/ with autograder.zip."""
    folder = tmp_path_factory.mktemp("autograder")
    (folder / "prompts.json").write_text(json.dumps(ALPACA_EVAL))
    flags = ["--output_dir", str(folder), "--prompts", str(folder / "prompts.json")]
    assert make_autograder.main(flags) == 0
    return folder / "autograder.zip"


@pytest.fixture
def root(autograder, tmp_path):
    """As a platform lays it out."""
    subprocess.run([sys.executable, "-m", "zipfile", "-e", autograder, tmp_path / "source"], check=True)
    (tmp_path / "source/.venv").symlink_to(sys.prefix)
    (tmp_path / "submission").mkdir()
    return tmp_path


def graded(root) -> dict:
    """results.json."""
    command = ["bash", root / "source/run_autograder"]
    subprocess.run(command, cwd=root, env=os.environ | {"AUTOGRADER_ROOT": str(root)}, check=True)
    return json.loads((root / "results/results.json").read_text())


def scores(results: dict) -> dict[str, float]:
    return {test["name"].split(":")[0]: test["score"] for test in results["tests"] if test["max_score"]}


def test_a_test_a_criterion_and_provisional_points_say_so(root, whole):
    put(root / "submission", whole)
    results = graded(root)
    assert scores(results) == {criterion.name: 1 for criterion in grade.CRITERIA}
    assert results["output"] == "10 of 10 points, 4 of them provisional"
    for test, criterion in zip(results["tests"], grade.CRITERIA, strict=False):
        provisional = criterion.column == grade.REPORTED
        assert (
            ("(self-reported, provisional)" in test["name"]) == ("provisional" in test["tags"]) == provisional
        )
        assert (test["status"], test["visibility"], test["max_score"]) == ("passed", "visible", 1)
    staff = results["tests"][-1]
    assert (staff["name"], staff["visibility"]) == ("for staff", "hidden")
    assert "problem 2 ran with fast=True" in staff["output"]


@pytest.mark.parametrize(
    ("change", "points", "text"),
    [
        (lambda files: {}, 0, "not earned: inference/outputs.jsonl is missing"),
        (
            lambda files: {path: files[path] for path in files if "finetune" in path},
            5,
            "outputs.jsonl is missing",
        ),
        (lambda files: {f"a/b/{path}": files[path] for path in files}, 10, "earned: 81 rows in order"),
        (lambda files: files | {"inference/summary.json": b"[1"}, 8, "inference/summary.json: not valid JSON"),
        (lambda files: {"essay.docx": b"PK"}, 0, "inference/outputs.jsonl is missing"),
    ],
    ids=["empty", "half", "a folder in a folder", "broken JSON", "another file"],
)
def test_whatever_is_handed_in_gets_results(root, whole, change, points, text):
    put(root / "submission", change(whole))
    results = graded(root)
    assert sum(scores(results).values()) == points
    assert any(text in test["output"] for test in results["tests"])


def test_a_zip_in_the_zip_is_named(root, whole):
    pack(root / "submission/mine.zip", whole)
    results = graded(root)
    assert sum(scores(results).values()) == 0
    assert all(
        "missing; mine.zip is not opened: no archive" in test["output"] for test in results["tests"][:-1]
    )


def test_a_rehearsal_earns_nothing_and_says_what_it_would(root):
    reference = ROOT / "handout/reference/inference"
    put(root / "submission", {f"inference/{path.name}": path.read_bytes() for path in reference.iterdir()})
    results = graded(root)
    assert sum(scores(results).values()) == 0
    (rows,) = (test["output"] for test in results["tests"] if test["name"].startswith("rows"))
    assert rows == "earned (1 of 1, which do not count: a rehearsal): 4 rows in order"


def test_a_grader_that_fails_still_leaves_results(root):
    (root / "source/.venv").unlink()
    assert graded(root) == {"score": 0, "output": "The grader failed: tell the staff, who see why."}


def test_the_assignments_table_gives_the_points(root, whole, monkeypatch, capsys):
    table = root / "source/handout/ASSIGNMENT.md"
    table.write_text(re.sub(r"^(\| \d \| `\w+` \|) 1 \|", r"\1 10 |", table.read_text(), flags=re.M))
    put(root / "submission", whole)
    assert graded(root)["output"] == "100 of 100 points, 40 of them provisional"
    monkeypatch.delitem(grade.POINTS, "rows")
    for program, flags in ((grade, ["--submission", str(root / "submission")]), (make_autograder, [])):
        assert program.main(flags) == 2
        assert "table of points has no row of `rows` with a whole number" in capsys.readouterr().err


def test_the_zip_has_nothing_of_a_solution_and_asks_for_two_packages(autograder, root, monkeypatch, capsys):
    with zipfile.ZipFile(autograder) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    assert (modes["setup.sh"], modes["run_autograder"]) == (0o755, 0o755)
    assert 'raise todo("1a")' in (root / "source/deepspeed/lora_sft/arguments.py").read_text()
    check = "import sys; sys.path.insert(0, 'handout'); import autograder; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=root / "source", capture_output=True, text=True)
    libraries = {"torch", "transformers", "huggingface_hub", "datasets", "numpy", "safetensors"}
    assert libraries & set(done.stdout.split()) == {"numpy", "safetensors"}
    monkeypatch.setattr(make_autograder, "STAFF", (*make_autograder.STAFF, "sglang/batch_infer/generate.py"))
    assert make_autograder.main(["--prompts", str(ROOT / "rehearsal/instructions.json")]) == 2
    assert "of a solution would be left: sglang/batch_infer/generate.py" in capsys.readouterr().err


def test_without_alpaca_eval_no_zip_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade, "read_alpaca_eval", lambda where: UserError("offline"))
    assert make_autograder.main(["--output_dir", str(tmp_path)]) == 2
    fetch = "fetch it: hf download tatsu-lab/alpaca_eval alpaca_eval.json --repo-type dataset\n"
    assert capsys.readouterr().err.endswith(fetch)
    assert not list(tmp_path.iterdir())


def test_the_workflow_grades_a_checkout_and_reports_it(autograder, whole, tmp_path):
    """The step as GitHub runs it: bash -e in the workspace, the checkout in submission/."""
    checkout = tmp_path / "submission"
    put(checkout, make_handout.make().files)
    (checkout / ".github/autograder.zip").write_bytes(autograder.read_bytes())
    places = {"finetune/": "deepspeed/output_llama2_7b_lora/", "inference/": "sglang/"}
    for around, place in places.items():
        put(checkout, {path.replace(around, place): whole[path] for path in whole if path.startswith(around)})
    workflow = yaml.safe_load((checkout / ".github/workflows/classroom.yml").read_text())
    steps = workflow["jobs"]["run-autograding-tests"]["steps"]
    (grader,) = (step for step in steps if step.get("id") == "grader")
    (report,) = (step for step in steps if "reporter" in step.get("uses", ""))
    assert report["env"] == {"GRADER_RESULTS": "${{ steps.grader.outputs.result }}"}
    command = grader["run"].replace("bash source/setup.sh", f"ln -s {sys.prefix} source/.venv")
    assert "ln -s" in command
    env = os.environ | {"GITHUB_OUTPUT": str(tmp_path / "output")}
    subprocess.run(["bash", "-eo", "pipefail", "-c", command], cwd=tmp_path, env=env, check=True)
    result = json.loads(base64.b64decode((tmp_path / "output").read_text().removeprefix("result=")))
    assert (result["status"], result["max_score"], len(result["tests"])) == ("pass", 10, 10)
    assert {test["status"] for test in result["tests"]} == {"pass"}
    assert sum(test["score"] for test in result["tests"]) == 10
