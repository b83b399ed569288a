"""Checks an outputs.jsonl, alone or against a reference. Standard library only: graders need nothing else.

    python sglang/check_outputs.py outputs.jsonl [--against reference.jsonl] [--strict] [--json]

Alone: rows, keys and their order, the order of the instructions (outputs_all.json beside it), failed records
(summary.json beside it), and as remarks empty, cut and looping answers. Against a reference: rows that are
identical, and for the others where they first differ. If both summaries are there and GPU, lock, profile,
revision or seed differ, bytes cannot match: similarity is reported instead, and only --strict fails.

Exit codes: 0 in order, 1 not, 2 a file cannot be read.
"""

import argparse
import difflib
import json
import statistics
import sys
from pathlib import Path

KEYS = ["output", "instruction"]
EVERY = 10
MUST_MATCH = (
    "gpu_name",
    "cpu_capability",
    "lock_sha256",
    "kernels_sha256",  # on GPUs
    "profile",
    "model_revision",
    "weights_id",
    "seed",
)
LOOP_CHARS, LOOP_TIMES = 20, 8  # an answer that ends in this many repetitions of a piece loops


class Unreadable(Exception):
    pass


def read_rows(path: Path, problems: list[str]) -> list[dict]:
    """The rows of a JSONL file; what is wrong with them goes to `problems`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: cannot be read ({error})") from error
    if lines and lines[-1] == "":
        lines.pop()
    else:
        problems.append("the last line does not end: was the file cut?")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not valid JSON ({getattr(error, 'msg', error)})")
            row = {}
        if not isinstance(row, dict):
            problems.append(f"line {number}: not an object")
            row = {}
        elif list(row) != KEYS and row:
            problems.append(f"line {number}: keys are {list(row)}, expected {KEYS}")
        if any(not isinstance(row.get(key, ""), str) for key in KEYS):
            problems.append(f"line {number}: {KEYS[0]} and {KEYS[1]} must be text")
            row = {}
        rows.append({key: row.get(key, "") for key in KEYS})
    return rows


def beside(path: Path, name: str) -> object:
    """A JSON file in the folder of `path`, or None."""
    try:
        return json.loads((path.parent / name).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def loops(text: str) -> bool:
    """Whether the text ends in LOOP_TIMES repetitions of a piece of at most 200 characters, LOOP_CHARS in all."""
    for size in range(1, min(200, len(text) // LOOP_TIMES) + 1):
        piece = text[-size:]
        if piece.strip() and size * LOOP_TIMES >= LOOP_CHARS and text.endswith(piece * LOOP_TIMES):
            return True
    return False


def check(path: Path, expected: int) -> dict:
    """{rows, problems, remarks, lengths}: what can be said about one file. `expected` rows without a summary."""
    problems, remarks = [], []
    rows = read_rows(path, problems)
    summary, everything = beside(path, "summary.json"), beside(path, "outputs_all.json")
    if isinstance(summary, dict) and "records" in summary:
        expected = (summary["records"] + EVERY - 1) // EVERY
        if len(rows) != expected:
            problems.append(f"{len(rows)} rows, expected {expected} (every {EVERY}th of {summary['records']})")
        failed = {failure["index"]: failure["reason"] for failure in summary.get("failures", [])}
        truncated = set(summary.get("truncated", []))
    else:
        failed, truncated = {}, set()
        if len(rows) != expected:
            problems.append(
                f"{len(rows)} rows, expected {expected} (no summary.json beside it; --rows says otherwise)"
            )
    if isinstance(everything, list):
        instructions = [row.get("instruction") for row in everything[::EVERY]]
        wrong = [i for i, (row, want) in enumerate(zip(rows, instructions)) if row["instruction"] != want]  # noqa: B905
        if wrong:
            problems.append(f"line {wrong[0] + 1}: not the instruction of record {wrong[0] * EVERY}")
    repeated = len(rows) - len({row["instruction"] for row in rows})
    if repeated and not isinstance(everything, list):
        remarks.append(f"{repeated} instructions appear more than once")
    for number, row in enumerate(rows, start=1):
        index = (number - 1) * EVERY
        if index in failed:
            problems.append(f"line {number}: record {index} failed: {failed[index]}")
        elif not row["output"].strip():
            remarks.append(f"line {number}: the answer is empty")
        elif loops(row["output"]):
            remarks.append(f"line {number}: the answer ends in a loop")
        if index in truncated:
            remarks.append(f"line {number}: the answer was cut by the token limit")
    others = [index for index in failed if index % EVERY]
    if others:
        remarks.append(f"{len(others)} records outside this file failed, e.g. {others[0]}: {failed[others[0]]}")
    return {"rows": rows, "problems": problems, "remarks": remarks, "lengths": lengths(rows)}


def lengths(rows: list[dict]) -> dict:
    """Characters per answer."""
    sizes = [len(row["output"]) for row in rows] or [0]
    return {"mean": statistics.fmean(sizes), "median": statistics.median(sizes), "max": max(sizes)}


def similarity(left: str, right: str) -> float:
    """Share of common words in order, 0 to 1 (difflib's ratio over the first 1,000 words)."""
    words = left.split()[:1000], right.split()[:1000]
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio() if any(words) else 1.0


def compare(path: Path, reference: Path, rows: list[dict], wanted: list[dict]) -> dict:
    """{identical, differing, reasons, similarity}: row by row."""
    differing = []
    for number, (row, want) in enumerate(zip(rows, wanted), start=1):  # noqa: B905
        for key in KEYS:
            if row[key] != want[key]:
                pairs = zip(row[key], want[key])  # noqa: B905
                length = min(len(row[key]), len(want[key]))
                at = next((i for i, (a, b) in enumerate(pairs) if a != b), length)
                differing.append({"line": number, "key": key, "position": at})
                break
    settings = [(beside(file, "summary.json") or {}).get("settings", {}) for file in (path, reference)]
    reasons = []
    if all(settings):
        reasons = [
            f"{key}: {settings[0].get(key)} here, {settings[1].get(key)} in the reference"
            for key in MUST_MATCH
            if settings[0].get(key) != settings[1].get(key)
        ]
    close = [similarity(row["output"], want["output"]) for row, want in zip(rows, wanted)]  # noqa: B905
    return {
        "identical": min(len(rows), len(wanted)) - len(differing),
        "differing": differing,
        "extra_rows": len(rows) - len(wanted),
        "bytes_cannot_match": reasons,
        "similarity": statistics.fmean(close) if close else None,
        "reference_lengths": lengths(wanted),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path, help="reference outputs.jsonl")
    parser.add_argument("--rows", type=int, default=81, help="expected without a summary.json (default: 81)")
    parser.add_argument("--strict", action="store_true", help="remarks and explained differences fail too")
    parser.add_argument("--json", action="store_true", help="one JSON object for an autograder")
    args = parser.parse_args(argv)
    try:
        report = check(args.file, args.rows)
        rows = report.pop("rows")
        report["row_count"] = len(rows)
        bad = bool(report["problems"]) or (args.strict and bool(report["remarks"]))
        if args.against:
            found = []
            against = compare(args.file, args.against, rows, read_rows(args.against, found))
            report["against"] = against | {"reference_problems": found}
            # Another machine explains other answers, nothing else.
            explained = against["bytes_cannot_match"] and not args.strict
            unexplained = [row for row in against["differing"] if row["key"] != "output" or not explained]
            bad = bad or bool(unexplained or against["extra_rows"] or found)
    except Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["ok"] = not bad
    if args.json:
        print(json.dumps(report, indent=2, sort_keys=True))
    else:
        show(report)
    return 1 if bad else 0


def show(report: dict) -> None:
    def lengths_text(sizes: dict) -> str:
        return f"{sizes['mean']:,.0f} characters on average, median {sizes['median']:,.0f}, longest {sizes['max']:,}"

    print(f"{report['row_count']} rows, {lengths_text(report['lengths'])}")
    for text in report["problems"]:
        print(f"PROBLEM  {text}")
    for text in report["remarks"][:10]:
        print(f"remark   {text}")
    if len(report["remarks"]) > 10:
        print(f"remark   ... and {len(report['remarks']) - 10} more")
    if against := report.get("against"):
        print(f"reference: {lengths_text(against['reference_lengths'])}")
        print(f"{against['identical']} rows identical, {len(against['differing'])} differ")
        if against["extra_rows"]:
            print(f"PROBLEM  {against['extra_rows']:+d} rows against the reference")
        for text in against["reference_problems"]:
            print(f"PROBLEM  reference, {text}")
        if against["bytes_cannot_match"] and against["differing"]:
            print("bytes cannot match:")
            for text in against["bytes_cannot_match"]:
                print(f"  {text}")
            print(f"similarity {against['similarity']:.2f} (1: the same words in the same order)")
        for row in against["differing"][:10]:
            print(f"  line {row['line']}: {row['key']} differs from character {row['position']}")
    print("in order" if report["ok"] else "NOT in order")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
