"""What the throughput benchmarks share: rows with levers, each in a process of its own, and the result of a command."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
from workbench import UserError
from workbench.files import write_json
from workbench.processes import run_in_child


def split(name: str) -> tuple[str, dict[str, str]]:
    """(row, its levers) of ROW,NAME=VALUE,... Raises UserError."""
    kind, *levers = name.split(",")
    if not all("=" in lever for lever in levers):
        raise UserError(f"no row {name}: levers are NAME=VALUE")
    return kind, dict(lever.split("=", 1) for lever in levers)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(16)))).split(",")


def in_child(function: Callable[[], dict], log: Path) -> dict:
    """What `function` returns in a process of its own, whose output goes to `log`. Raises UserError, of a process
    that ends without a result with its own error, else with the last line of its output."""

    def logged() -> str:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            return json.dumps(function())
        finally:
            sys.stdout.flush()

    sys.stdout.flush()
    try:
        return json.loads(run_in_child(logged))
    except RuntimeError as error:
        raise UserError(reason(log, str(error))) from error


def reason(log: Path, otherwise: str) -> str:
    """Why a program failed, in one line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if re.search(r"\w", line)]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{[*told[:1], *lines[-1:], otherwise][0][:400]} ({otherwise}; see {log})"


def by_kind(spans: list[tuple[float, float, str]], kinds: dict[str, str]) -> tuple[dict[str, float], float]:
    """Seconds of kernels by the first of `kinds` that matches their names, else elementwise, and in which any ran.
    `spans`: (begin, end, name) in microseconds, sorted."""
    busy, last, found = 0.0, 0.0, {}
    for begin, end, name in spans:
        busy, last = busy + max(0.0, end - max(begin, last)), max(last, end)
        kind = next((kind for kind, names in kinds.items() if re.search(names, name)), "elementwise")
        found[kind] = found.get(kind, 0.0) + (end - begin) / 1e6
    return found, busy / 1e6


def to_first(result: dict) -> dict[str, float]:
    """Each row's seconds to those of the command's first; {} if that failed."""
    seconds = {row["row"]: row["seconds"] for row in result["rows"] if "seconds" in row}
    first = seconds.get(result["rows"][0]["row"])
    return {row: took / first for row, took in seconds.items()} if first else {}


def measure(
    names: list[str],
    measure_row: Callable[[str, int], dict],
    ratios: Callable[[dict], dict],
    about: dict,
    output: Path,
) -> dict:
    """Measures the rows one after the other and prints them. The result, which `about` begins and `ratios` completes, is
    written after every row."""
    result = about | {"rows": []}
    for number, name in enumerate(names):
        try:
            found = measure_row(name, number)
        except UserError as error:
            found = {"error": str(error)}
        result["rows"].append({"row": name} | found)
        result |= ratios(result)
        write_json(output, result)
        shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
        print(f"{name}: {found.get('error') or json.dumps(shown)}", flush=True)
    return result


def run(measure: Callable[[argparse.Namespace, Path], dict], parser: argparse.ArgumentParser, result: Path,
        cpu_folder: Path) -> int:  # fmt: skip
    """The exit code of a command. On the CPU its result goes to `cpu_folder`, else to `result`."""
    where = f"default: bench/results/{result.name}; on the CPU in {cpu_folder}"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help=where)
    given = parser.parse_args()
    output = given.output or (result if given.device == "cuda" else cpu_folder / result.name)
    try:
        if given.output and not output.absolute().parent.is_dir():
            raise UserError(f"--output {output}: its folder does not exist")
        found = measure(given, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: round(ratio, 3) for name, ratio in found["ratios"].items()}))
    return 3 if any("error" in row for row in found["rows"]) else 0
