"""Grades one submission, or every submission in a folder.

    python handout/grade.py --submission PATH [--output_dir build/grades] [--prompts tatsu-lab/alpaca_eval]

A submission is a zip or a folder with finetune/ and inference/ (handout/submissions.py); PATH may be a folder of them. Points
come in two columns. *Checked*: what the files themselves show. *Self-reported*: what the student's run says of itself;
provisional, listed for staff, and withdrawn when the run's own files contradict each other. How many each criterion
gives is read from the assignment's table of points, the one that staff edit. A rehearsal on the CPU is graded by the same table, with the rehearsal's model's shapes, the shipped instructions, fp32 and host memory in place of the
GPU's; its points are shown apart and do not count.

Writes submissions/NAME/grade.json for each submission (NAME in plain ASCII) and, for a folder, grades.csv into
--output_dir; both list the arguments of the runs that are not the programs' defaults. Every submission is graded in a
process of its own with bounded memory and time. Exit codes: 0 graded; 2 there is nothing to grade, or AlpacaEval's
instructions are missing where they were needed (that criterion is then not judged; everything else is).
"""

import csv
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "deepspeed"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "sglang"))
import check_outputs

from batch_infer import prompts
from batch_infer.arguments import DEFAULT_PROMPTS
from batch_infer.arguments import Arguments as Inference
from batch_infer.arguments import parse as inference_arguments
from lora_sft import report
from lora_sft.arguments import Arguments as Training
from submissions import Refused, Submission, printable, submissions_in
from workbench import UserError
from workbench.files import write_json
from workbench.flags import flag, read_flags

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENT = ROOT / "handout/ASSIGNMENT.md"
CHECKED, REPORTED = "checked", "self-reported"
PEAK_GIB = 16e9 / 2**30  # 16 GB: what is left of a card of 16 GiB is CUDA's own
MOST_S = 15 * 60
ALL_RECORDS, EVERY = 805, check_outputs.EVERY
DEGENERATE_SHARE = 0.1
MEMORY_BYTES, GRADING_S = 6 * 2**30, 300
# (hidden, inner, keys) of the models whose adapters are known, by their number of layers.
LLAMA_2_7B = 32
SIZES = {
    LLAMA_2_7B: (4096, 11008, 4096),
    30: (576, 1536, 192),
    4: (128, 384, 128),
}  # a rehearsal's: SmolLM2-135M, tiny
LLAMA_2_7B_PARAMETERS = 6_738_415_616
FETCH = f"hf download {{}} {prompts.ALPACA_EVAL} --repo-type dataset"
PLACES = ("output_dir", "output_file", "deepspeed")  # arguments that say where, not what
# What a student's file can raise where it is not as the programs write it.
NOT_AS_WRITTEN = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RecursionError)
KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\."
    r"((?:self_attn\.(?:q|k|v|o)|mlp\.(?:gate|up|down))_proj)\.lora_([AB])\.weight",
    re.ASCII,
)


@dataclass(frozen=True)
class Flags:
    submission: str = flag("", "a zip, a folder, or a folder of them")
    output_dir: str = flag(str(ROOT / "build/grades"), "submissions/NAME/grade.json and grades.csv go here")
    prompts: str = flag(DEFAULT_PROMPTS, "the 805 instructions: hub data set or file")


Verdict = tuple[bool | None, str]  # is it met (None: that cannot be judged here), and why


@dataclass(frozen=True)
class Criterion:
    problem: int
    name: str
    column: str
    text: str
    judge: Callable[["Files"], Verdict]

    @property
    def points(self) -> int:
        return POINTS[self.name]


CRITERIA: list[Criterion] = []
POINTS = {name: int(points) for name, points in
          re.findall(r"^\| \d \| `(\w+)` \| (\d+) \|", ASSIGNMENT.read_text(), re.M)}  # fmt: skip


def criterion(problem: int, column: str, text: str) -> Callable:
    """Makes a criterion of a function, under its name."""

    def register(judge: Callable[["Files"], Verdict]) -> Callable:
        CRITERIA.append(Criterion(problem, judge.__name__, column, text, judge))
        return judge

    return register


def attempt(by: Callable) -> tuple:
    """(what `by` returns, ""), or (None, why it cannot): what a student's files must not end."""
    try:
        return by(), ""
    except Refused as refused:
        reason = str(refused)
    except MemoryError:
        reason = f"more than {MEMORY_BYTES / 2**30:.0f} GiB would be needed to read it"
    except NOT_AS_WRITTEN as error:
        reason = f"not as the program writes it: {printable(repr(error))}"
    return None, reason  # here, where what `by` had read is free again


def once(read: Callable) -> property:
    """A property that is computed once; it remembers too why it could not be, and raises Refused."""

    def value(files: "Files") -> object:
        if read not in files.found:
            files.found[read] = attempt(lambda: read(files))
        found, reason = files.found[read]
        if found is None:
            raise Refused(reason)
        return found

    return property(value)


class Files(Submission):
    """A submission's files, each read when it is asked for. `alpaca_eval`: the instructions, or why there are none."""

    def __init__(self, path: Path, alpaca_eval: list[str] | UserError) -> None:
        super().__init__(path)
        self.alpaca_eval, self.found = alpaca_eval, {}
        self.shipped = [record.instruction for record in prompts.read(ROOT / "rehearsal/instructions.json")]

    adapter_config = once(lambda files: files.json("finetune", "adapter_config.json"))
    adapter = once(lambda files: files.tensors("finetune", "adapter_model.safetensors"))
    run_config = once(lambda files: files.json("finetune", "run_config.json"))
    trained = once(lambda files: files.json("finetune", "summary.json"))
    steps = once(lambda files: files.jsonl("finetune", "metrics.jsonl"))
    answers = once(lambda files: files.text("inference", "outputs.jsonl"))
    rows = once(lambda files: check_outputs.parse_rows(files.answers, []))

    @once
    def answered(self) -> dict:
        """summary.json of inference; what check_outputs.py reads of it is as the program writes it."""
        summary = self.json("inference", "summary.json")
        failures = [(failure["index"], failure["reason"]) for failure in summary["failures"]]
        numbers = {type(n) for n in (summary["records"], *summary["truncated"], *(i for i, _ in failures))}
        if numbers != {int} or {type(reason) for _, reason in failures} - {str}:
            raise Refused("inference/summary.json: records, failures or truncated are not as they are written")
        return summary

    @once
    def everything(self) -> list[dict]:
        """outputs_all.json."""
        rows = self.json("inference", "outputs_all.json", list)
        if not all(isinstance(row[key], str) for row in rows for key in check_outputs.KEYS):
            raise Refused("inference/outputs_all.json: instruction and output must be text")
        return rows

    @once
    def rehearsal(self) -> dict[int, bool]:
        """Whether each problem's files are of a run on the CPU."""
        device, _ = attempt(lambda: self.run_config["arguments"]["device"])
        layers, _ = attempt(lambda: layers_of(self.adapter))
        rows, _ = attempt(lambda: self.rows)
        shipped = any(row["instruction"] in self.shipped for row in rows or ())
        return {1: device == "cpu" or layers not in (None, LLAMA_2_7B), 2: shipped}

    @once
    def checked(self) -> dict:
        """What check_outputs.py says, with what can be read of the files beside outputs.jsonl."""
        summary, everything = attempt(lambda: self.answered)[0], attempt(lambda: self.everything)[0]
        return check_outputs.check(self.answers, 0, (summary or {}) | {"records": self.records}, everything)

    @property
    def records(self) -> int:
        return len(self.shipped) if self.rehearsal[2] else ALL_RECORDS


def unusual(told: dict, program: type[Training] | type[Inference]) -> list[str]:
    """The arguments of a run that are not the program's defaults (the autograder's zip holds none of problem 1a)."""
    ours = {entry.name: entry.default for entry in fields(program)}
    names = sorted((told.keys() | ours.keys()).difference(PLACES))
    different = [name for name in names if told.get(name) != ours.get(name)]
    return [f"{printable(name, 40)}={printable(told.get(name), 80)}" for name in different[:40]]


def differing(pairs: dict[str, tuple[object, object]]) -> list[str]:
    """A line for each (told, computed) that are not the same; numbers are compared to 6 digits."""
    found = []
    for name, (told, computed) in pairs.items():
        numbers = {type(told), type(computed)} <= {int, float}
        if not (math.isclose(told, computed, rel_tol=1e-6) if numbers else told == computed):
            found.append(f"{name}: {printable(told, 40)} told, {printable(computed, 40)} computed")
    return found


# --- problem 1 ----------------------------------------------------------------------------------------


def layers_of(tensors: dict[str, np.ndarray]) -> int:
    """How many layers an adapter has. Raises Refused for keys that are not those of an adapter of a Llama."""
    found: dict[int, set] = {}
    for key in tensors:
        match = KEY.fullmatch(key)
        if match is None:
            raise Refused(f"{printable(key)} is not a LoRA tensor of a Llama layer")
        found.setdefault(int(match[1]), set()).add(match.groups()[1:])
    pairs = {(module, side) for module, _ in found.get(0, ()) for side in "AB"}
    if not pairs or found != dict.fromkeys(range(len(found)), pairs):
        raise Refused("lora_A and lora_B are not there for the same modules of every layer")
    if len(found) not in SIZES:
        raise Refused(f"{len(found)} layers; Llama-2-7B has {LLAMA_2_7B}")
    return len(found)


@criterion(1, CHECKED, "the adapter has lora_A and lora_B for the same modules of every layer")
def adapter_keys(files: Files) -> Verdict:
    tensors, layers = files.adapter, layers_of(files.adapter)
    return True, f"{len(tensors)} tensors, {len(tensors) // layers // 2} modules in each of {layers} layers"


@criterion(1, CHECKED, "their shapes are those of Llama-2-7B at the rank of adapter_config.json")
def adapter_shapes(files: Files) -> Verdict:
    rank, layers = files.adapter_config.get("r"), layers_of(files.adapter)
    hidden, inner, keys = SIZES[layers]
    sizes = {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    sizes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (hidden, keys))
    for key, tensor in files.adapter.items():
        module, side = KEY.fullmatch(key).groups()[1:]
        inputs, outputs = sizes.get(module, (hidden, hidden))
        expected = (rank, inputs) if side == "A" else (outputs, rank)
        if tensor.shape != expected:
            return False, f"{key} is {tensor.shape}, expected {printable(expected)}"
    return True, f"rank {rank} in all of them"


@criterion(1, CHECKED, "no lora_B is zero, no tensor is constant, all values are finite")
def adapter_trained(files: Files) -> Verdict:
    layers_of(files.adapter)
    for key, tensor in files.adapter.items():
        if not (tensor.size and np.isfinite(tensor).all()):
            return False, f"{key} is empty or has values that are not finite"
        if ".lora_B." in key and not tensor.any():
            return False, f"{key} is zero: it has learnt nothing"
        if tensor.min() == tensor.max():
            return False, f"{key} holds one value only: it was not trained"
    return True, f"{len(files.adapter)} tensors that are neither zero nor constant"


@criterion(1, REPORTED, "fp16, or bf16 where the GPU has it, and a peak of at most 16 GB")
def memory(files: Files) -> Verdict:
    plan, summary, rows = files.run_config["plan"], files.trained, files.steps
    on_cpu = files.run_config["arguments"]["device"] == "cpu"
    dtype, gpu = summary["dtype"], printable(summary["gpu_name"])
    has_bf16 = dtype == "bf16" and list(plan["capability"]) >= [8, 0]  # the programs' own rule
    if not (dtype == "fp32" if on_cpu else dtype == "fp16" or has_bf16):
        return (
            False,
            f"{printable(dtype)} on {gpu}; --dtype auto takes what it has: bf16 from compute capability 8.0",
        )
    name = "peak_host_rss_gib" if on_cpu else "peak_reserved_gib"
    peak_gib = max(summary[name], *(row[name] for row in rows))
    where = "host memory, the GPU's is not known here" if on_cpu else f"GPU memory ({gpu})"
    return 0 < peak_gib <= PEAK_GIB, f"{dtype}, {peak_gib:.2f} GiB of {where}, at most {PEAK_GIB:.2f}"


@criterion(1, REPORTED, "the training loss fell and the perplexity improved")
def learning(files: Files) -> Verdict:
    summary, losses = files.trained, [row["loss"] for row in files.steps if row["loss"] is not None]
    if not losses or None in (summary["eval_loss_before"], summary["eval_loss_after"]):
        return False, "the loss was not a number"
    quarter = max(1, len(losses) // 4)
    first, last = statistics.fmean(losses[:quarter]), statistics.fmean(losses[-quarter:])
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    text = f"loss {first:.3f} -> {last:.3f} (first and last quarter), perplexity {before:.2f} -> {after:.2f}"
    return last < first and 0 < after < before, text


def training_contradictions(files: Files) -> list[str]:
    """Where summary.json is not what metrics.jsonl and run_config.json make of it, or the adapter is another run's."""
    rows, summary = files.steps, files.trained
    arguments, plan = files.run_config["arguments"], files.run_config["plan"]
    on_cpu = arguments["device"] == "cpu"
    expected = report.summarise(
        rows,
        **{
            name: plan[name]
            for name in ("world_size", "matmul_parameters", "gpu_name", "dtype", "recomputed_share")
        },
    )
    for when in ("before", "after"):
        loss = summary[f"eval_loss_{when}"]  # null where it was not a number
        expected[f"perplexity_{when}"] = None if loss is None else math.exp(loss)
    expected |= {name: plan[name] for name in ("dtype", "gpu_name", "world_size", "predicted_peak_gib")}
    pairs = {f"summary.json {name}": (summary[name], value) for name, value in expected.items()}
    pairs["steps of metrics.jsonl"] = [row["step"] for row in rows], list(range(1, len(rows) + 1))
    pairs["on the CPU, by arguments and gpu_name"] = on_cpu, plan["gpu_name"] is None
    if not on_cpu:
        pairs["plan base_parameters"] = plan["base_parameters"], LLAMA_2_7B_PARAMETERS
    layers, _ = attempt(lambda: layers_of(files.adapter))
    if layers:
        size = sum(tensor.size for tensor in files.adapter.values())
        pairs["plan lora_parameters"] = plan["lora_parameters"], size
        pairs["lora_r"] = arguments["lora_r"], files.adapter_config.get("r")
        pairs["on the CPU, by arguments and adapter"] = on_cpu, layers != LLAMA_2_7B
    return differing(pairs)


# --- problem 2 ----------------------------------------------------------------------------------------


@criterion(2, CHECKED, "`outputs.jsonl` holds every 10th record: 81 rows that `check_outputs.py` accepts")
def rows(files: Files) -> Verdict:
    problems = files.checked["problems"]
    return not problems, "; ".join(problems[:3]) or f"{len(files.rows)} rows in order"


@criterion(2, CHECKED, "text and order of the instructions are AlpacaEval's")
def instructions(files: Files) -> Verdict:
    told = [row["instruction"] for row in files.rows]
    wanted = files.shipped if files.rehearsal[2] else files.alpaca_eval
    if isinstance(wanted, UserError):
        return None, f"cannot be judged here: {wanted}"
    wanted = wanted[::EVERY]
    if told == wanted:
        return True, f"{len(wanted)} instructions, text and order"
    alike = [a == b for a, b in zip(told, wanted)]  # noqa: B905
    first = alike.index(False) if False in alike else len(alike)
    return False, f"line {first + 1} is not the instruction of record {first * EVERY}"


@criterion(2, CHECKED, "at most a tenth of the answers is empty, loops or repeats another one")
def answers(files: Files) -> Verdict:
    texts = [row["output"].strip() for row in files.rows]
    empty, looping = sum(not text for text in texts), sum(map(check_outputs.loops, texts))
    costly = 0 if files.rehearsal[2] else looping  # a small model loops whoever asks it
    repeated = len(texts) - len(set(texts)) - max(0, empty - 1)
    cut = files.checked["counts"]["cut"]
    told = f"{empty} empty, {looping} looping, {repeated} repeated of {len(texts)}"
    told += f"; {cut} cut, which costs nothing" if cut else ""
    return empty + costly + repeated <= DEGENERATE_SHARE * len(texts), told


@criterion(2, REPORTED, "all 805 records are answered, in less than 15 minutes from start to end")
def time(files: Files) -> Verdict:
    summary, records = files.answered, files.records
    answered, wall_s = summary["records"] - summary["failed_records"], summary["wall_s"]
    text = f"{wall_s:.0f} s for {answered} of {records} records"
    if summary["answered_in_this_start"] != summary["records"]:
        return False, f"{text}, in the last start alone: the run was resumed, and no start tells the whole time"
    return answered == summary["records"] == records and 0 < wall_s < MOST_S, text


@criterion(2, REPORTED, "RadixAttention is on and was hit")
def radix_cache(files: Files) -> Verdict:
    if files.answered["settings"]["engine_args"].get("disable_radix_cache"):
        return False, "disable_radix_cache is set"
    text = f"{files.answered['prefix_hit_rate']:.1%} of the prompt tokens came from the radix tree"
    return files.answered["cached_prompt_tokens"] > 0, text


def inference_contradictions(files: Files) -> list[str]:
    """Where summary.json contradicts itself, the answers or outputs_all.json."""
    summary, everything = files.answered, files.everything
    settings, cached, prompt = summary["settings"], summary["cached_prompt_tokens"], summary["prompt_tokens"]
    on_cpu = settings["arguments"]["device"] == "cpu"
    expected = {
        "prefix_hit_rate": cached / prompt,
        "computed_prompt_tokens": prompt - cached,
        "cap_hit_share": len(summary["truncated"]) / (summary["records"] - summary["failed_records"]),
        "failed_records": len(summary["failures"]),
        "records": len(everything),
    }
    if summary["answered_in_this_start"] == summary["records"]:
        expected["tokens_per_s"] = summary["output_tokens"] / summary["generate_s"]
    pairs = {f"summary.json {name}": (summary[name], value) for name, value in expected.items()}
    pairs["on the CPU, by arguments and gpu_name"] = on_cpu, settings["gpu_name"] is None
    pairs["on the CPU, by arguments and instructions"] = on_cpu, files.rehearsal[2]
    found = differing(pairs)
    if summary["load_s"] + summary["compile_s"] + summary["generate_s"] > summary["wall_s"]:
        found.append("loading and generating took longer than the whole run")
    if [row["output"] for row in everything[::EVERY]] != [row["output"] for row in files.rows]:
        found.append("outputs.jsonl and outputs_all.json hold different answers")
    return found


# --- points -------------------------------------------------------------------------------------------


def grade(path: Path, alpaca_eval: list[str] | UserError) -> dict:
    """The content of grade.json. `alpaca_eval`: the instructions, or why they are not to be had."""
    files, reason = attempt(lambda: Files(path, alpaca_eval))
    if files is None:
        return nothing(path, reason)
    verdicts = {}
    for one in CRITERIA:
        verdict, reason = attempt(lambda one=one: one.judge(files))
        verdicts[one.name] = verdict or (False, reason)
    found, arguments = {1: [], 2: []}, {}
    warnings = attempt(lambda: files.checked["warnings"])[0] or []
    told = {1: lambda: unusual(files.run_config["arguments"], Training),
            2: lambda: unusual(files.answered["settings"]["arguments"], Inference)}  # fmt: skip
    for n, contradictions in ((1, training_contradictions), (2, inference_contradictions)):
        if any(verdicts[one.name][0] for one in CRITERIA if (one.problem, one.column) == (n, REPORTED)):
            contradicting, reason = attempt(lambda by=contradictions: by(files))
            found[n] = [reason] if contradicting is None else contradicting[:20]
        arguments[n] = attempt(told[n])[0] or []
    lines = []
    for one in CRITERIA:
        met, reason = verdicts[one.name]
        status = {True: "earned", False: "not earned", None: "not judged"}[met]
        if met and one.column == REPORTED:
            status = "withdrawn" if found[one.problem] else "provisional"
            reason += f"; but {found[one.problem][0]}" if found[one.problem] else ""
        lines.append(line_of(one, status, reason, files.rehearsal[one.problem]))
    return total(path, lines, found, arguments, warnings)


def check_points() -> None:
    if missing := [one.name for one in CRITERIA if one.name not in POINTS]:
        raise UserError(f"{ASSIGNMENT}: its table of points has no row of `{missing[0]}` with a whole number")


def line_of(one: Criterion, status: str, reason: str, rehearsal: bool) -> dict:
    points = one.points if status in ("earned", "provisional") else 0
    return {"problem": one.problem, "name": one.name, "column": one.column, "text": one.text, "points": points,
            "of": one.points, "status": status, "reason": printable(reason, 500), "rehearsal": rehearsal}  # fmt: skip


def total(path: Path, lines: list[dict], contradictions: dict, arguments: dict, warnings: list[str]) -> dict:
    """`lines`: one a criterion; `warnings`: check_outputs.py's. Points of a rehearsal are summed apart."""

    def points(rehearsal: bool = False, **where: object) -> int:
        where["rehearsal"] = rehearsal
        return sum(line["points"] for line in lines if where.items() <= line.items())

    return {
        "submission": printable(path.name, 2000),
        "points": points(),
        **{f"problem_{n}": points(problem=n) for n in (1, 2)},
        "checked": points(column=CHECKED),
        "provisional": points(column=REPORTED),
        "rehearsal_points": points(rehearsal=True),
        "criteria": lines,
        "contradictions": {n: [printable(text, 300) for text in texts] for n, texts in contradictions.items()},
        "arguments": arguments,
        "warnings": [printable(text, 300) for text in warnings],
    }


def nothing(path: Path, reason: str) -> dict:
    return total(path, [line_of(one, "not earned", reason, False) for one in CRITERIA], {}, {}, [])


def grade_apart(path: Path, alpaca_eval: list[str] | UserError, out: Path) -> dict:
    """`grade` in a process with bounded memory and time, so that no submission can end the grading of the next."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "grade.json").unlink(missing_ok=True)

    def run() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        signal.alarm(GRADING_S)  # ends this process
        result, reason = attempt(lambda: grade(path, alpaca_eval))
        write_json(out / "grade.json", result or nothing(path, reason))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    if not (out / "grade.json").exists():
        late = f"could not be graded within {GRADING_S} s, or the grader failed"
        write_json(out / "grade.json", nothing(path, late))
    return json.loads((out / "grade.json").read_text())


def summary_lines(result: dict) -> list[str]:
    most = sum(line["of"] for line in result["criteria"])
    rehearsed = sum(line["of"] for line in result["criteria"] if line["rehearsal"])
    lines = [f"{result['points']} of {most} points, {result['provisional']} of them provisional"]
    if rehearsed:
        lines.append(
            f"rehearsal on the CPU: {result['rehearsal_points']} of {rehearsed} points, which do not count"
        )
    return lines + [f"WARNING: {text}" for text in result["warnings"]]


def show(result: dict) -> None:
    first, *others = summary_lines(result)
    print(f"{result['submission']}: {first}")
    for text in others + ran_with(result):
        print(f"  {text}")
    for line in result["criteria"]:
        print("  {points} of {of}  {problem} {name:16} {status:12} {reason}".format(**line))


def ran_with(result: dict) -> list[str]:
    return [f"problem {n} ran with {', '.join(texts)}" for n, texts in result["arguments"].items() if texts]


def write_csv(path: Path, results: list[dict]) -> None:
    """A row a submission: totals, then every criterion's points, then what staff should look at."""
    totals = ("submission", "points", "problem_1", "problem_2", "checked", "provisional", "rehearsal_points")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow([*totals, *(one.name for one in CRITERIA), "for_staff"])
        for result in results:
            remarks = [f"{line['name']} {line['status']}: {line['reason']}" for line in result["criteria"]
                       if line["status"] in ("provisional", "withdrawn", "not judged")]  # fmt: skip
            row = [*(result[name] for name in totals), *(line["points"] for line in result["criteria"])]
            row.append(" | ".join(remarks + ran_with(result)))
            # A spreadsheet would run what begins like a formula.
            table.writerow([re.sub(r"^(?=[=+@-])", "'", str(cell)) for cell in row])
    temporary.replace(path)


def folder_name(name: str, taken: set[str]) -> str:
    """A name for a submission's grades, in short ASCII; joins `taken`."""
    plain = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:60].strip("._") or "submission"
    names = (plain, *(f"{plain}_{i}" for i in range(2, len(taken) + 3)))
    found = next(name for name in names if name.lower() not in taken)
    taken.add(found.lower())
    return found


def grade_all(submissions: list[Path], flags: Flags, table: Path | None) -> None:
    """Grades one after the other; `table`: grades.csv, None for a single submission. Raises UserError at the end if
    AlpacaEval's instructions were needed and not there."""
    alpaca_eval, results, taken = read_alpaca_eval(flags.prompts), [], set()
    for submission in submissions:
        where = Path(flags.output_dir).absolute() / "submissions" / folder_name(submission.name, taken)
        results.append(grade_apart(submission, alpaca_eval, where))
        show(results[-1])
    if table:
        write_csv(table, results)
    unjudged = sum(line["status"] == "not judged" for result in results for line in result["criteria"])
    tail = f"; `instructions` not judged in {unjudged}" if unjudged else ""
    print(f"{len(results)} submission{'s' if table else ''}: {table or where}{tail}")
    if unjudged:
        missing = f"{flags.prompts} is not here to judge `instructions`"
        raise UserError(f"{missing}; fetch it and grade again: {FETCH.format(flags.prompts)}")


def read_alpaca_eval(where: str) -> list[str] | UserError:
    """The instructions; the error if they cannot be had, which rehearsals do not need."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # 60 submissions must not wait for a network that is not there
    try:
        path, _ = prompts.find(inference_arguments(["--prompts", where]).prompts)
        return [record.instruction for record in prompts.read(path)]
    except UserError as error:
        if where != DEFAULT_PROMPTS:
            raise
        return error


def main(argv: list[str]) -> int:
    try:
        description = "Grades one submission (a zip or a folder), or every submission in a folder."
        flags = Flags(**read_flags(argv, Flags, prog="grade.py", description=description))
        if not flags.submission:
            raise UserError(
                "name what is to be graded: make grade SUBMISSION=path (a zip, a folder, a folder of them)"
            )
        check_points()
        path, out = Path(flags.submission).absolute(), Path(flags.output_dir).absolute()
        if not path.exists():
            raise UserError(f"--submission {path}: no such file or folder")
        if out == path.parent or path in (out, *out.parents) or out / "submissions" in (path, *path.parents):
            raise UserError(
                f"--output_dir {out}: grades must not lie among the submissions; name another folder"
            )
        submissions = submissions_in(path)
        if not submissions:
            raise UserError(f"--submission {path}: an empty folder")
        grade_all(submissions, flags, None if submissions == [path] else out / "grades.csv")
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = f"--output_dir {flags.output_dir}: cannot be written ({getattr(error, 'strerror', None)})"
        print(f"error: {where if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
