"""Makes the students' version of this repository: build/handout/ and build/handout.zip.

    python handout/make_handout.py [--output_dir build]

Solution and handout are one source. `# Problem 1c: what to do` opens a region, with comment lines that go on, and
`# End of problem 1c` closes it: the comment stays, as a TODO, the lines below it go, and a line comes in that stops the
program there. A region of flags (name: type = flag(value, help)) keeps their names and help. What lies between
`# Staff only` and `# End of staff only` goes. Files in handout/starter/ replace the solution's of the same path, or join
them.

Reads the files that git tracks, as they are in the working tree. Exit codes: 0 done, 2 a marker is wrong or something
of a solution would be left.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from workbench import UserError
from workbench.flags import flag, read_flags

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENT = "handout/ASSIGNMENT.md"
STARTER = "handout/starter/"
# What goes to students: a file or folder that is not named here does not, so that nothing slips through.
SHIPPED = (
    *(".gitignore", "LICENSE", "Makefile", "env.sh", "pyproject.toml", "requirements.in", "requirements.txt"),
    *(".devcontainer/", "common/", "deepspeed/", "rehearsal/", "sglang/"),
    *("tests/conftest.py", "tests/harness.py", "tests/test_problem1.py", "tests/test_problem2.py"),
    *("handout/reference.py", "handout/reference/inference/"),
)
# The labs hold code like the one to be written; the assignment shows their figures, and tests need their engines.
LEFT_OUT = re.compile(r"sglang/labs/(?!engines\.py)")
MARKER = re.compile(r"( *)# (Problem (\d[a-z]): .+|End of problem (\d[a-z])|Staff only|End of staff only)")
ZERO = {"int": "0", "float": "0.0", "str": '""', "bool": "False"}
TELLING = 14  # characters: shorter lines ("return result") are anybody's
YEAR_0 = (1980, 1, 1, 0, 0, 0)  # of a zip: equal sources make equal bytes


@dataclass(frozen=True)
class Flags:
    output_dir: str = flag(str(ROOT / "build"), "handout/ in it is made anew, handout.zip beside it")


@dataclass
class Handout:
    """The files by path, and what was taken out of them."""

    files: dict[str, bytes] = field(default_factory=dict)
    solution: list[str] = field(default_factory=list)  # lines and values that must not appear anywhere
    problems: list[str] = field(default_factory=list)


def make() -> Handout:
    """Raises UserError for markers that do not pair, links without a file, and leaks."""
    handout = Handout()
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached"]
    try:
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{ROOT}: git does not list its files ({error}); clone the repository") from error
    starter = {path.removeprefix(STARTER): path for path in tracked if path.startswith(STARTER)}
    for path in tracked:
        if path.startswith(SHIPPED) and not LEFT_OUT.match(path):
            content = (ROOT / path).read_bytes()
            if path in starter:
                handout.solution += hidden_values(content, (ROOT / starter[path]).read_bytes())
            else:
                handout.files[path] = cut(path, content, handout)
    handout.files |= {path: (ROOT / source).read_bytes() for path, source in starter.items()}
    text = (ROOT / ASSIGNMENT).read_text()
    for figure in re.findall(r"\]\(\.\./([^)]+)\)", text):
        if not (ROOT / figure).is_file():
            raise UserError(f"{ASSIGNMENT}: links to {figure}, which is not there")
        handout.files.setdefault(figure, (ROOT / figure).read_bytes())
    handout.files["README.md"] = text.replace("](../", "](").encode()
    if found := leaks(handout.files, handout.solution):
        raise UserError("something of a solution would be left: " + "; ".join(found[:5]))
    return handout


def cut(path: str, content: bytes, handout: Handout) -> bytes:
    """The students' version of a file; what is taken out goes to `handout`. Raises UserError."""
    if not re.search(rb"# (Problem \d|End of problem|Staff only|End of staff)", content):
        return content
    kept, region, inside = [], [], None
    for number, line in enumerate(content.decode().splitlines(), start=1):
        match = MARKER.fullmatch(line)
        if match is None and re.match(r"\s*# (Problem \d|End of problem|Staff only|End of staff)", line):
            raise UserError(f"{path}, line {number}: a marker that is none: {line.strip()}")
        if match is None:
            hint = inside not in (None, "staff") and not region and line.lstrip().startswith("#")
            (kept if inside is None or hint else region).append(line)
            continue
        indent, text, opens, closes = match.groups()
        if opens or text == "Staff only":
            if inside:
                raise UserError(f"{path}, line {number}: opens a region inside of {inside}")
            inside, region = opens or "staff", []
            kept += [f"{indent}# TODO {text[0].lower()}{text[1:]}"] if opens else []
            continue
        if inside != (closes or "staff"):
            raise UserError(f"{path}, line {number}: closes what was not opened")
        if closes:
            lines, solution = stub(indent, closes, region)
            kept += lines
            handout.solution += solution
            handout.problems.append(closes)
        inside = None
    if inside:
        raise UserError(f"{path}: the region of {inside} does not end")
    return ("\n".join(kept) + "\n").encode()


def stub(indent: str, problem: str, region: list[str]) -> tuple[list[str], list[str]]:
    """(what stands in for a region, what must not be left of it). The stub stops the program and says where. Flags
    keep their names and help, with the zero of their type, so that -h works."""
    text = textwrap.dedent("\n".join(region))
    stops = ["from workbench.todo import todo", "", f'raise todo("{problem}")']
    if not re.match(r"\w+: (int|float|str|bool) = flag\(", text):
        solution = [line.strip() for line in region if len(line.strip()) >= TELLING]
        return [f"{indent}{line}".rstrip() for line in stops], solution
    kept, solution = [], []
    for entry in ast.parse(text).body:
        default, told = (ast.get_source_segment(text, node) for node in entry.value.args)
        name, kind = entry.target.id, entry.annotation.id
        kept.append(f"{indent}{name}: {kind} = flag({ZERO[kind]}, {told})")
        solution.append(f"{name}: {kind} = flag({default},")
    kept += ["", f"{indent}def __post_init__(self) -> None:"]
    return kept + [f"{indent}    {line}".rstrip() for line in stops] + [""], solution


def hidden_values(solution: bytes, starter: bytes) -> list[str]:
    """The solution's values of a JSON file where the students' file has a TODO."""

    def leaves(value: object, at: tuple = ()) -> Iterator[tuple[tuple, object]]:
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        yield from (leaf for key, item in inner for leaf in leaves(item, (*at, key)))
        if not isinstance(value, dict | list):
            yield at, value

    theirs = dict(leaves(json.loads(starter)))
    values = [str(value) for at, value in leaves(json.loads(solution)) if theirs.get(at) != value]
    return [value for value in values if len(value) > 5]  # true, false and short numbers are anybody's


def leaks(files: dict[str, bytes], solution: list[str]) -> list[str]:
    """Which lines and values of the solution stand in which file; digits may be grouped (1_000, 1,000)."""
    patterns = {
        line: re.compile(rf"(?<!\w){line}(?!\w)" if line.isalnum() else re.escape(line)) for line in solution
    }
    found = []
    for path, content in files.items():
        text = re.sub(r"(?<=\d)[_,](?=\d)", "", content.decode(errors="replace"))
        found += [f"{path} has {line!r}" for line, pattern in patterns.items() if pattern.search(text)]
    return found


def write(handout: Handout, folder: Path) -> None:
    """folder/handout/ and folder/handout.zip, each in place of an older one. Raises UserError for a folder that is no
    handout."""
    if (folder / "handout").exists() and not (folder / "handout/common/workbench/todo.py").exists():
        raise UserError(f"--output_dir {folder}: what its handout/ holds is no handout; name another folder")
    shutil.rmtree(folder / "handout", ignore_errors=True)
    for path, content in handout.files.items():
        out = folder / "handout" / path
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
        out.chmod(mode_of(content))
    write_zip(folder / "handout.zip", {f"handout/{path}": content for path, content in handout.files.items()})


def mode_of(content: bytes) -> int:
    return 0o755 if content.startswith(b"#!") else 0o644


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """A zip in place of an older one; equal files make equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, YEAR_0)
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
            entry.external_attr = mode_of(content) << 16
            archive.writestr(entry, content)
    temporary.replace(path)


def main(argv: list[str]) -> int:
    try:
        description = "Makes the students' version of this repository."
        flags = Flags(**read_flags(argv, Flags, prog="make_handout.py", description=description))
        folder = Path(flags.output_dir).absolute()
        handout = make()
        write(handout, folder)
    except (OSError, UserError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"error: {text}", file=sys.stderr)
        return 2
    size_kib = (folder / "handout.zip").stat().st_size / 1024
    print(f"problems     {', '.join(sorted(handout.problems))} in the sources, {STARTER} beside them")
    print(f"handout      {folder / 'handout'}: {len(handout.files)} files")
    print(f"zip          {folder / 'handout.zip'}: {size_kib:,.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
