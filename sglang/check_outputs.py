"""Checks an outputs.jsonl, alone or against a reference. Standard library only: graders need nothing else.

    python sglang/check_outputs.py outputs.jsonl [--against reference.jsonl] [--strict] [--json]

Alone: rows, keys and their order, the order of the instructions (outputs_all.json beside it), failed records
(summary.json beside it), and as remarks empty, looping and cut answers, with a warning above a tenth of the rows.
Mistakes that the run's own files show are warned of, too, each with its cure.
Against a reference: rows that are identical, and for the others where they first differ. If both summaries are there
and GPU, lock, profile, revision or seed differ, bytes cannot match: similarity is reported instead, and only --strict
fails.

Exit codes: 0 in order, 1 not, 2 a file cannot be read.
"""

import argparse
import difflib
import json
import math
import statistics
import sys
from pathlib import Path

KEYS = ["output", "instruction"]
EVERY = 10
MUST_MATCH = (
    *("gpu_name", "cpu_capability", "lock_sha256", "kernels_sha256", "profile"),
    *("model_revision", "weights_id", "seed"),
)
LOOP_CHARS, LOOP_TIMES = 20, 8  # an answer that ends in this many repetitions of a piece loops
FAULTS = {
    "empty": "empty",
    "looping": "looping at the end",
    "cut": "cut in mid-sentence, as by the token limit",
}
CAUSES = {  # of a file without summary.json
    "empty": "",
    "looping": "; prompts without the model's chat template do that",
    "cut": "; a request without sampling_params ends at 128 tokens, the assignment's at 8,192",
}
PROSE_CHARS = 40  # shorter last lines (names, numbers, titles, items of a list) need no full stop
MOST_SHARE = 0.1  # of the rows that may be empty, looping or cut without a warning
MAX_NEW_TOKENS, REHEARSED_TOKENS = 8192, 128  # run_sglang.py's defaults
LEAST_ROOFLINE_SHARE = 0.2  # an H100 reaches 0.6 with all records in flight, 0.12 in batches of 64


class Unreadable(Exception):
    pass


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: cannot be read ({error})") from error


def read_beside(path: Path, name: str, kind: type) -> object:
    """A JSON file in the folder of `path`; None where there is none, or not one of this `kind`."""
    try:
        value = json.loads((path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def parse_rows(text: str, problems: list[str]) -> list[dict]:
    """The rows of a JSONL file; what is wrong with them goes to `problems`."""
    *lines, rest = text.split("\n")
    if rest:
        problems.append("the last line does not end: was the file cut?")
        lines.append(rest)
    rows = []
    for number, line in enumerate(lines, start=1):
        row, wrong = {}, ""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            wrong = f"not valid JSON ({getattr(error, 'msg', error)})"
        if not isinstance(row, dict):
            row, wrong = {}, "not an object"
        elif not wrong and list(row) != KEYS:
            wrong = f"keys are {list(row)}, expected {KEYS}"
        other = next((key for key in KEYS if not isinstance(row.get(key, ""), str)), None)
        if other:
            kind = type(row[other]).__name__
            row, wrong = {}, f"{other} is {kind}, not text: of an engine's result write result['text']"
        if wrong:
            problems.append(f"line {number}: {wrong}")
        rows.append({key: row.get(key, "") for key in KEYS})
    return rows


def loops(text: str) -> bool:
    """Whether the text ends in LOOP_TIMES repetitions of a piece of at most 200 characters, LOOP_CHARS in all."""
    for size in range(1, min(200, len(text) // LOOP_TIMES) + 1):
        piece = text[-size:]
        if piece.strip() and size * LOOP_TIMES >= LOOP_CHARS and text.endswith(piece * LOOP_TIMES):
            return True
    return False


def looks_cut(text: str) -> bool:
    """Whether a code fence is open, or a last line of PROSE_CHARS ends in a letter, a digit or one of , ; : - ( [."""
    last = text.rstrip().rpartition("\n")[2].strip()
    in_mid_sentence = len(last) >= PROSE_CHARS and (last[-1].isalnum() or last[-1] in ",;:-([")
    return in_mid_sentence or text.count("```") % 2 == 1


def faults(text: str, cut: bool | None) -> list[str]:
    """Keys of FAULTS. `cut`: by the token limit, as summary.json says; None: to be judged by the text."""
    if not text.strip():
        return ["empty"]
    looping = loops(text)
    if cut is None:
        cut = not looping and looks_cut(text)
    return ["looping"] * looping + ["cut"] * cut


def check(text: str, expected: int, summary: dict | None = None, everything: list | None = None) -> dict:
    """What can be said about one file: {rows, problems, remarks, warnings, counts, lengths}. `summary` and
    `everything`: summary.json and outputs_all.json of the run; `expected` rows without a summary."""
    problems, remarks = [], []
    rows, summary = parse_rows(text, problems), summary or {}
    of = "no summary.json beside it; --rows says otherwise"
    if "records" in summary:
        expected, of = -(-summary["records"] // EVERY), f"every {EVERY}th of {summary['records']}"
    if len(rows) != expected:
        problems.append(f"{len(rows)} rows, expected {expected} ({of})")
    repeated = len(rows) - len({row["instruction"] for row in rows})
    if everything is not None:
        wanted = [row.get("instruction") for row in everything[::EVERY]]
        wrong = [i for i, (row, want) in enumerate(zip(rows, wanted)) if row["instruction"] != want]  # noqa: B905
        if wrong:
            problems.append(f"line {wrong[0] + 1}: not the instruction of record {wrong[0] * EVERY}")
    elif repeated:
        remarks.append(f"{repeated} instructions appear more than once")
    failed = {failure["index"]: failure["reason"] for failure in summary.get("failures", [])}
    truncated, counts = summary.get("truncated"), dict.fromkeys(FAULTS, 0)
    for number, row in enumerate(rows, start=1):
        index = (number - 1) * EVERY
        if index in failed:
            problems.append(f"line {number}: record {index} failed: {failed[index]}")
            continue
        for fault in faults(row["output"], None if truncated is None else index in truncated):
            counts[fault] += 1
            remarks.append(f"line {number}: the answer is {FAULTS[fault]}")
    others = [index for index in failed if index % EVERY]
    if others:
        remarks.append(f"{len(others)} records outside this file failed, e.g. {others[0]}: {failed[others[0]]}")
    warnings = [f"{count} of {len(rows)} answers are {FAULTS[fault]}{'' if summary else CAUSES[fault]}"
                for fault, count in counts.items() if count > MOST_SHARE * len(rows)]  # fmt: skip
    warnings += mistakes(summary, everything)
    return {"rows": rows, "problems": problems, "remarks": remarks, "warnings": warnings, "counts": counts,
            "lengths": lengths(rows)}  # fmt: skip


def told(value: object, *names: str) -> object:
    """What a JSON object says under a name, in it under the next, ...; None where it does not."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def mistakes(summary: dict, everything: list | None) -> list[str]:
    """What summary.json and outputs_all.json show of how the run was started: a line for each mistake, with its cure."""
    arguments, engine_args = told(summary, "settings", "arguments"), told(summary, "settings", "engine_args")
    model = str(told(arguments, "model_path") or told((everything or [None])[0], "generator"))[-100:]
    found = []
    if model.lower().endswith("-1m") and "dual_chunk" not in str(told(engine_args, "json_model_override_args")):
        found.append(
            f"{model}: its dual-chunk attention switches RadixAttention off; use Qwen/Qwen2.5-7B-Instruct"
        )
    if told(arguments, "raw") is True and "instruct" in model.lower():
        found.append(
            f"--raw: {model} was asked without its chat template, which makes answers loop; leave --raw out"
        )
    numbers = {name: value for source in (summary, arguments) if isinstance(source, dict)
               for name, value in source.items() if type(value) in (int, float)}  # fmt: skip
    usual = REHEARSED_TOKENS if told(arguments, "rehearse") is True else MAX_NEW_TOKENS
    return found + in_flight(numbers) + cut_by_mistake(numbers, len(told(summary, "truncated") or ()), usual)


def in_flight(numbers: dict[str, float]) -> list[str]:
    """A line if few records were in flight together."""
    size, share = numbers.get("batch_size", 0), numbers.get("roofline_share")
    if 0 < size < numbers.get("records", 0):
        return [f"--batch_size {size}: no more records than that were in flight; leave it out (all of them)"]
    if share is not None and 0 <= share < LEAST_ROOFLINE_SHARE:
        return [
            f"{share:.0%} of the roofline, as batches one after another reach: send all requests, then await them"
        ]
    return []


def cut_by_mistake(numbers: dict[str, float], cut: int, usual: int) -> list[str]:
    """A line if the limit that cut `cut` answers was not the `usual` one. A cut answer has max_new_tokens, or ends where
    the context does: fewer tokens than that in all answers together show that another limit was at work."""
    limit, tokens = numbers.get("max_new_tokens", usual), numbers.get("output_tokens", math.inf)
    if tokens < cut * limit - numbers.get("prompt_tokens", math.inf):
        return [
            f"{cut} answers were cut long before --max_new_tokens {limit}: pass each request its sampling_params"
        ]
    if limit < usual and cut > MOST_SHARE * numbers.get("records", math.inf):
        return [f"{cut} answers were cut at --max_new_tokens {limit}; leave it at its default, {usual}"]
    return []


def lengths(rows: list[dict]) -> dict:
    """Characters per answer."""
    sizes = [len(row["output"]) for row in rows] or [0]
    return {"mean": statistics.fmean(sizes), "median": statistics.median(sizes), "max": max(sizes)}


def similarity(left: str, right: str) -> float:
    """Share of common words in order, 0 to 1 (difflib's ratio over the first 1,000 words)."""
    words = left.split()[:1000], right.split()[:1000]
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio() if any(words) else 1.0


def compare(rows: list[dict], wanted: list[dict], settings: list[dict]) -> dict:
    """Row by row against the reference's; `settings` of both summaries, {} where there is none."""
    pairs = list(zip(rows, wanted))  # noqa: B905
    differing = []
    for number, (row, want) in enumerate(pairs, start=1):
        key = next((key for key in KEYS if row[key] != want[key]), None)
        if key:
            length = min(len(row[key]), len(want[key]))
            at = next((i for i in range(length) if row[key][i] != want[key][i]), length)
            differing.append({"line": number, "key": key, "position": at})
    ours, theirs = settings
    reasons = [f"{key}: {ours.get(key)} here, {theirs.get(key)} in the reference" for key in MUST_MATCH
               if ours and theirs and ours.get(key) != theirs.get(key)]  # fmt: skip
    close = [similarity(row["output"], want["output"]) for row, want in pairs]
    return {
        "identical": len(pairs) - len(differing),
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
    summary = read_beside(args.file, "summary.json", dict)
    try:
        report = check(read(args.file), args.rows, summary, read_beside(args.file, "outputs_all.json", list))
        rows = report.pop("rows")
        report["row_count"] = len(rows)
        bad = bool(report["problems"]) or (args.strict and bool(report["remarks"]))
        if args.against:
            problems: list[str] = []
            wanted = parse_rows(read(args.against), problems)
            summaries = summary, read_beside(args.against, "summary.json", dict)
            against = compare(rows, wanted, [(one or {}).get("settings", {}) for one in summaries])
            report["against"] = against | {"reference_problems": problems}
            # Another machine explains other answers, nothing else.
            explained = against["bytes_cannot_match"] and not args.strict
            unexplained = [row for row in against["differing"] if row["key"] != "output" or not explained]
            bad = bad or bool(unexplained or against["extra_rows"] or problems)
    except Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["ok"] = not bad
    if args.json:
        print(json.dumps(report, indent=2, sort_keys=True))
    else:
        show(report)
    return int(bad)


def show(report: dict) -> None:
    def lengths_text(sizes: dict) -> str:
        return f"{sizes['mean']:,.0f} characters on average, median {sizes['median']:,.0f}, longest {sizes['max']:,}"

    counts = ", ".join(f"{count} {kind}" for kind, count in report["counts"].items())
    print(f"{report['row_count']} rows, {lengths_text(report['lengths'])}; {counts}")
    for text in report["problems"]:
        print(f"PROBLEM  {text}")
    for text in report["warnings"]:
        print(f"WARNING  {text}")
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
    warned = ", but read the WARNING" if report["warnings"] else ""
    print(f"in order{warned}" if report["ok"] else "NOT in order")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
