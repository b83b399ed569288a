"""Makes the autograder for Gradescope and GitHub Classroom: build/autograder.zip.

    python handout/make_autograder.py [--output_dir build] [--prompts tatsu-lab/alpaca_eval]

In the zip: handout/autograder/'s setup.sh and run_autograder, the grader, the assignment with its table of points,
AlpacaEval's instructions, and of the programs what the grader reads, in the students' version: nothing of a solution.
Exit codes: 0 done, 2 the instructions are not to be had, or something of a solution would be left.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import grade
from make_handout import ASSIGNMENT, ROOT, leaks, make, write_zip

from batch_infer.arguments import DEFAULT_PROMPTS
from workbench import UserError
from workbench.flags import flag, read_flags

STAFF = ("handout/grade.py", "handout/submissions.py", "handout/autograder.py", ASSIGNMENT)
READ = ("common/", "deepspeed/lora_sft/", "sglang/batch_infer/", "sglang/check_outputs.py")
READ += ("rehearsal/instructions.json", "requirements.txt")


@dataclass(frozen=True)
class Flags:
    output_dir: str = flag(str(ROOT / "build"), "autograder.zip goes here")
    prompts: str = flag(DEFAULT_PROMPTS, "the 805 instructions: hub data set or file")


def contents(prompts: str) -> dict[str, bytes]:
    """The zip's files by path. Raises UserError."""
    grade.check_points()
    alpaca_eval = grade.read_alpaca_eval(prompts)
    if isinstance(alpaca_eval, UserError):
        raise UserError(f"{prompts} is not here to be packed; fetch it: {grade.FETCH.format(prompts)}")
    handout = make()
    files = {path: content for path, content in handout.files.items() if path.startswith(READ)}
    files |= {path: (ROOT / path).read_bytes() for path in STAFF}
    for path in (ROOT / "handout/autograder").iterdir():
        files[path.name] = path.read_bytes()
    if found := leaks(files, handout.solution):
        raise UserError("something of a solution would be left: " + "; ".join(found[:5]))
    return files | {"handout/alpaca_eval.json": json.dumps(alpaca_eval).encode()}


def main(argv: list[str]) -> int:
    try:
        description = "Makes the autograder for Gradescope and GitHub Classroom."
        flags = Flags(**read_flags(argv, Flags, prog="make_autograder.py", description=description))
        out = Path(flags.output_dir).absolute() / "autograder.zip"
        files = contents(flags.prompts)
        write_zip(out, files)
    except (OSError, UserError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"error: {text}", file=sys.stderr)
        return 2
    points = ", ".join(f"{n}: {sum(c.points for c in grade.CRITERIA if c.problem == n)}" for n in (1, 2))
    print(f"points       problem {points} ({ASSIGNMENT})")
    print(f"zip          {out}: {len(files)} files, {out.stat().st_size / 1024:,.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
