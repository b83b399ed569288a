"""Grades the submission of a platform: the program in the zip that make_autograder.py writes.

    python handout/autograder.py [--root /autograder]

Reads ROOT/submission. Writes ROOT/results/results.json as Gradescope takes it
(gradescope-autograders.readthedocs.io/en/latest/specs) and, in a GitHub workflow, the output `result` as GitHub
Classroom's reporter takes it (github.com/classroom-resources/autograding-grading-reporter): a test a criterion, its
name saying which points are provisional. Exit codes: 0 graded, whatever for; 2 the zip or ROOT is not as it should be.
"""

import base64
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import grade

from workbench import UserError
from workbench.files import write_json
from workbench.flags import flag, read_flags

ALPACA_EVAL = Path(__file__).resolve().parent / "alpaca_eval.json"  # only in the zip


@dataclass(frozen=True)
class Flags:
    root: str = flag("/autograder", "folder of submission/ and results/")


def gradescope(result: dict) -> dict:
    """results.json of what grade.grade returns. Students do not see the hidden test."""
    return {
        "output": "\n".join(grade.summary_lines(result)),
        "stdout_visibility": "hidden",
        "tests": [test_of(line) for line in result["criteria"]] + [for_staff(result)],
    }


def test_of(line: dict) -> dict:
    provisional = line["column"] == grade.REPORTED
    remark = f" ({grade.REPORTED}, provisional)" if provisional else ""
    earned = line["status"] in ("earned", "provisional") and not line["rehearsal"]
    apart = f" ({line['points']} of {line['of']}, which do not count: a rehearsal)" if line["rehearsal"] else ""
    return {
        "name": f"{line['name']}: {line['text']}{remark}",
        "number": str(line["problem"]),
        "score": line["points"] if earned else 0,
        "max_score": line["of"],
        "status": "passed" if earned else "failed",
        "output": f"{line['status']}{apart}: {line['reason']}",
        "tags": ["provisional"] * provisional,
        "visibility": "visible",
    }


def for_staff(result: dict) -> dict:
    lines = grade.ran_with(result)
    for n, texts in result["contradictions"].items():
        lines += [f"problem {n} contradicts itself: {text}" for text in texts]
    return {"name": "for staff", "score": 0, "max_score": 0, "status": "passed", "visibility": "hidden",
            "output": "\n".join(lines)}  # fmt: skip


def classroom(results: dict) -> dict:
    """Of results.json, what GitHub Classroom's reporter reads."""
    tests = [test for test in results["tests"] if test["visibility"] == "visible"]
    return {
        "version": 1,
        "status": "pass" if all(test["status"] == "passed" for test in tests) else "fail",
        "max_score": sum(test["max_score"] for test in tests),
        "tests": [
            {
                "name": test["name"],
                "status": "pass" if test["status"] == "passed" else "fail",
                "score": test["score"],
                "message": test["output"],
            }
            for test in tests
        ],
    }


def main(argv: list[str]) -> int:
    try:
        description = "Grades ROOT/submission into ROOT/results/results.json."
        flags = Flags(**read_flags(argv, Flags, prog="autograder.py", description=description))
        grade.check_points()
        root = Path(flags.root).absolute()
        if not (root / "submission").is_dir():
            raise UserError(f"--root {root}: no folder submission/ in it")
        alpaca_eval = grade.read_alpaca_eval(str(ALPACA_EVAL))
        result = grade.grade_apart(root / "submission", alpaca_eval, root / "results")
        results = gradescope(result)
        write_json(root / "results/results.json", results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    grade.show(result)
    if "GITHUB_OUTPUT" in os.environ:
        encoded = base64.b64encode(json.dumps(classroom(results)).encode()).decode()
        with open(os.environ["GITHUB_OUTPUT"], "a") as out:
            out.write(f"result={encoded}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
