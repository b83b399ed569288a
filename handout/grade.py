"""Grades one submission, or every submission in a folder.

    python handout/grade.py --submission PATH [--output_dir build/grades] [--prompts tatsu-lab/alpaca_eval]

A submission is a zip or a folder with finetune/ and inference/ (handout/submissions.py); PATH may be a folder of them. Points
come in two columns. *Checked*: what the files themselves show. *Self-reported*: what the student's run says of itself;
provisional, listed for staff, and withdrawn when the run's own files contradict each other. A rehearsal on the CPU is
graded by the same table, with the tiny model's shapes, the shipped instructions, fp32 and host memory in place of the
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
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
from submissions import FILES, FOLDERS, Refused, Submission, printable
from workbench import UserError
from workbench.files import write_json
from workbench.flags import read_flags

ROOT = Path(__file__).resolve().parent.parent
CHECKED, REPORTED = "checked", "self-reported"
PEAK_GIB = 16e9 / 2**30  # 16 GB: what is left of a card of 16 GiB is CUDA's own
MOST_S = 15 * 60
ALL_RECORDS = 805
DEGENERATE_SHARE = 0.1
# How much the norms of a module's lora_B differ between the layers, in units of what equally many normal random numbers
# of one scale do, 1 / sqrt(2 n). Random adapters of the tiny model have 0.6 to 0.9; trained ones 1.5 after 6 steps, 3.5
# after 34. Llama-2-7B's tensors are 32 times as large and the layers 8 times as many: nothing is near the limit there.
LEAST_SPREAD = 1.3
MEMORY_BYTES, GRADING_S = 6 * 2**30, 300
TOO_MUCH = f"more than {MEMORY_BYTES / 2**30:.0f} GiB would be needed to read it"
# (layers, hidden, inner) of the models whose adapters are known.
LLAMA_2_7B, TINY_LLAMA = (32, 4096, 11008), (4, 128, 384)
LLAMA_2_7B_PARAMETERS = 6_738_415_616
PLACES = ("output_dir", "output_file", "deepspeed")  # arguments that say where, not what
# What a student's file can raise where it is not as the programs write it.
NOT_AS_WRITTEN = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RecursionError)
KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\."
    r"((?:self_attn\.(?:q|k|v|o)|mlp\.(?:gate|up|down))_proj)\.lora_([AB])\.weight",
    re.ASCII,
)
ALL_LINEAR = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@dataclass(frozen=True)
class Criterion:
    problem: int
    name: str
    column: str
    text: str
    points: int = 1


CRITERIA = (
    Criterion(
        1, "adapter_keys", CHECKED, "the adapter has lora_A and lora_B for the same modules of every layer"
    ),
    Criterion(
        1, "adapter_shapes", CHECKED, "their shapes are those of Llama-2-7B at the rank of adapter_config.json"
    ),
    Criterion(1, "adapter_trained", CHECKED, "no lora_B is zero, and their norms are not all alike"),
    Criterion(1, "memory", REPORTED, "fp16, or bf16 where the GPU has it, and a peak of at most 16 GB"),
    Criterion(1, "learning", REPORTED, "the training loss fell and the perplexity improved"),
    Criterion(
        2, "rows", CHECKED, "`outputs.jsonl` holds every 10th record: 81 rows that `check_outputs.py` accepts"
    ),
    Criterion(2, "instructions", CHECKED, "text and order of the instructions are AlpacaEval's"),
    Criterion(2, "answers", CHECKED, "at most a tenth of the answers is empty, loops or repeats another one"),
    Criterion(2, "time", REPORTED, "all 805 records are answered, in less than 15 minutes from start to end"),
    Criterion(2, "radix_cache", REPORTED, "RadixAttention is on and was hit"),
)


@dataclass
class Flags:
    submission: str = ""
    output_dir: str = str(ROOT / "build" / "grades")
    prompts: str = DEFAULT_PROMPTS


HELP = {
    "submission": "a zip, a folder, or a folder of them",
    "output_dir": "submissions/NAME/grade.json and grades.csv go here",
    "prompts": "the 805 instructions: hub data set or file, as run_sglang.py takes them",
}


Verdict = tuple[bool | None, str]  # is it met (None: that cannot be judged here), and why


@dataclass
class Problem:
    """What was found out about one problem."""

    rehearsal: bool = False
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # by criterion
    contradictions: list[str] = field(default_factory=list)  # between the self-reported files
    arguments: list[str] = field(default_factory=list)  # of the run, that differ from the programs' defaults

    def judge(self, *names: str, by: Callable[[], Verdict]) -> None:
        """Each of the criteria `names` gets what `by` returns; none is met if it finds a file that cannot be read
        or whose values are not what the programs write."""
        verdict, reason = attempt(by)
        self.verdicts |= dict.fromkeys(names, verdict or (False, reason))

    def compare(self, by: Callable[[], list[str]]) -> None:
        """Adds the contradictions that `by` returns; what ends it is one."""
        found, reason = attempt(by)
        self.contradictions += [reason] if found is None else found


def attempt(by: Callable) -> tuple:
    """(what `by` returns, ""), or (None, why it cannot): what a student's files must not end."""
    try:
        return by(), ""
    except Refused as refused:
        reason = str(refused)
    except MemoryError:
        reason = TOO_MUCH
    except NOT_AS_WRITTEN as error:
        reason = f"not as the program writes it: {printable(repr(error))}"
    return None, reason  # here, where what `by` had read is free again


def unusual(told: dict, defaults: Training | Inference) -> list[str]:
    """The arguments of a run that are not the program's defaults."""
    ours = asdict(defaults)
    different = sorted(name for name in told.keys() | ours.keys() if told.get(name) != ours.get(name))
    texts = [
        f"{printable(name, 40)}={printable(told.get(name), 80)}" for name in different if name not in PLACES
    ]
    return texts[:40]


# --- problem 1 ----------------------------------------------------------------------------------------


def grade_finetune(submission: Submission) -> Problem:
    problem = Problem()
    tensors: dict[str, np.ndarray] = {}
    ranks: list[object] = []  # as adapter_config.json tells
    files: list = []  # of the run: config, summary, steps

    def keys() -> Verdict:
        config = submission.object("finetune", "adapter_config.json")
        tensors.update(submission.tensors("finetune", "adapter_model.safetensors"))
        ranks.append(config.get("r"))
        return check_keys(tensors, config.get("target_modules"))

    problem.judge("adapter_keys", "adapter_shapes", "adapter_trained", by=keys)
    if problem.verdicts["adapter_keys"][0]:
        problem.rehearsal = len({KEY.fullmatch(key)[1] for key in tensors}) == TINY_LLAMA[0]
        model = TINY_LLAMA if problem.rehearsal else LLAMA_2_7B
        problem.judge("adapter_shapes", by=lambda: check_shapes(tensors, ranks[0], model))
        problem.judge("adapter_trained", by=lambda: check_trained(tensors))

    def read() -> Verdict:
        files.append(submission.object("finetune", "run_config.json"))
        problem.arguments = unusual(files[0]["arguments"], Training())
        files.append(submission.object("finetune", "summary.json"))
        files.append(submission.rows("finetune", "metrics.jsonl"))
        return True, ""

    problem.judge("memory", "learning", by=read)
    if problem.verdicts["learning"][0]:
        config, summary, rows = files
        on_cpu = config["arguments"].get("device") == "cpu"
        if problem.verdicts["adapter_keys"][0]:
            problem.compare(
                lambda: adapter_contradictions(config, ranks[0], tensors, on_cpu != problem.rehearsal)
            )
        problem.rehearsal = problem.rehearsal or on_cpu
        problem.judge("memory", by=lambda: check_memory(summary, config["plan"], on_cpu))
        problem.judge("learning", by=lambda: check_learning(rows, summary))
        problem.compare(lambda: training_contradictions(rows, config, summary))
    return problem


def last_names(modules: list[str]) -> set[str]:
    """As PEFT compares them: self_attn.q_proj names the same modules as q_proj."""
    return {str(name).strip().split(".")[-1] for name in modules}


def check_keys(tensors: dict[str, np.ndarray], targets: object) -> Verdict:
    found: dict[int, set] = {}
    for key in tensors:
        match = KEY.fullmatch(key)
        if match is None:
            return False, f"{printable(key)} is not a LoRA tensor of a Llama layer"
        found.setdefault(int(match[1]), set()).add((match[2], match[3]))
    modules = {module for module, _ in found.get(0, ())}
    pairs = {(module, side) for module in modules for side in "AB"}
    if not pairs or found != dict.fromkeys(range(len(found)), pairs):
        return False, "lora_A and lora_B are not there for the same modules of every layer"
    if isinstance(targets, list) and last_names(targets) != last_names(modules):
        return False, f"adapter_config.json has other target_modules: {printable(targets)}"
    if len(found) not in (LLAMA_2_7B[0], TINY_LLAMA[0]):
        return False, f"{len(found)} layers; Llama-2-7B has {LLAMA_2_7B[0]}"
    return True, f"{len(tensors)} tensors, {len(modules)} modules in each of {len(found)} layers"


def check_shapes(tensors: dict[str, np.ndarray], rank: object, model: tuple[int, int, int]) -> Verdict:
    _, hidden, inner = model
    up = (hidden, inner)
    shapes = {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": (inner, hidden)}
    for key, tensor in tensors.items():
        module, side = KEY.fullmatch(key).groups()[1:]
        inputs, outputs = shapes.get(module, (hidden, hidden))
        expected = (rank, inputs) if side == "A" else (outputs, rank)
        if tensor.shape != expected:
            return False, f"{key} is {tensor.shape}, expected {printable(expected)}"
    return True, f"rank {rank} in all of them"


def check_trained(tensors: dict[str, np.ndarray]) -> Verdict:
    norms: dict[str, list[float]] = {}  # of lora_B, by module
    by_chance: dict[str, float] = {}
    for key, tensor in tensors.items():
        if not (tensor.size and np.isfinite(tensor).all()):
            return False, f"{key} is empty or has values that are not finite"
        module, side = KEY.fullmatch(key).groups()[1:]
        if side == "B":
            norms.setdefault(module, []).append(float(np.linalg.norm(tensor.astype(np.float64))))
            by_chance[module] = 1 / math.sqrt(2 * tensor.size)
            if norms[module][-1] == 0:
                return False, f"{key} is zero: it has learnt nothing"
        if tensor.min() == tensor.max():
            return False, f"{key} holds one value only: it was not trained"
    spread = {module: statistics.pstdev(values) / statistics.fmean(values) for module, values in norms.items()}
    times = statistics.fmean(spread[module] / by_chance[module] for module in norms)
    text = f"norms of lora_B differ by {statistics.fmean(spread.values()):.1%} between the layers"
    return times >= LEAST_SPREAD, text + f", {times:.1f} times what random numbers do"


def adapter_contradictions(
    config: dict, rank: object, tensors: dict[str, np.ndarray], other_model: bool
) -> list[str]:
    """Where run_config.json and the adapter cannot be of one run."""
    arguments, told = config["arguments"], config["plan"]["lora_parameters"]
    found = ["run_config.json and the adapter are of different models"] if other_model else []
    if rank != arguments["lora_r"]:
        found.append("run_config.json and adapter_config.json name different ranks")
    if told != (values := sum(tensor.size for tensor in tensors.values())):
        found.append(f"plan lora_parameters: {printable(told, 40)} told, the adapter has {values}")
    targets = arguments["lora_target_modules"]
    asked = ALL_LINEAR if targets == "all-linear" else last_names(targets.split(","))
    if asked != {KEY.fullmatch(key)[2].split(".")[1] for key in tensors}:
        found.append(f"the adapter is not of lora_target_modules {printable(targets, 80)}")
    return found


def training_contradictions(rows: list[dict], config: dict, summary: dict) -> list[str]:
    """Where metrics.jsonl, run_config.json and summary.json cannot be of one run."""
    plan, arguments = config["plan"], config["arguments"]
    found = []

    def expect(what: str, told: object, computed: object) -> None:
        numbers = all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in (told, computed)
        )
        same = math.isclose(told, computed, rel_tol=1e-6) if numbers else told == computed
        if not same:
            found.append(f"{what}: {printable(told, 40)} told, {printable(computed, 40)} computed")

    peaks = [row["peak_reserved_gib"] for row in rows if row["peak_reserved_gib"] is not None]
    if arguments["device"] != "cpu":
        expect("plan base_parameters", plan["base_parameters"], LLAMA_2_7B_PARAMETERS)
        expect("rehearse on a GPU", arguments["rehearse"], False)
        expect("steps with a GPU's peak", len(peaks), len(rows))
        if plan["gpu_name"] is None:
            found.append("the run was on a GPU, but plan gpu_name is null")
    recomputed = report.summarise(rows, plan, bool(arguments["gradient_checkpointing"]))
    for name, value in recomputed.items():
        expect(f"summary.json {name}", summary[name], value)
    expect("steps of metrics.jsonl", [row["step"] for row in rows], list(range(1, len(rows) + 1)))
    for row in rows:
        rate = row["real_tokens"] / plan["world_size"] / row["step_time_s"]
        expect(f"tokens/s of step {printable(row['step'], 20)}", row["tokens_per_s_per_gpu"], rate)
    for when in ("before", "after"):
        loss = summary[f"eval_loss_{when}"]  # null where it was not a number
        expect(f"perplexity_{when}", summary[f"perplexity_{when}"], None if loss is None else math.exp(loss))
    for name in ("dtype", "gpu_name", "world_size", "predicted_peak_gib"):
        expect(f"summary.json {name}", summary[name], plan[name])
    expect("train_rows", summary["train_rows"], plan["train"]["documents"])
    if (summary["peak_reserved_gib"] or 0) < max(peaks, default=0):
        found.append("summary.json peak_reserved_gib is below a step's")
    if arguments["max_steps"] < 0:
        rows_per_step = plan["world_size"] * arguments["gradient_accumulation_steps"]
        rows_per_step *= arguments["tokens_per_micro_batch"] // arguments["max_seq_len"]
        epochs = arguments["num_train_epochs"]
        expect("steps x batch", len(rows), math.ceil(epochs * plan["train"]["packed_rows"] / rows_per_step))
        if epochs == int(epochs):
            expect("train_tokens", summary["train_tokens"], epochs * plan["train"]["real_tokens"])
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    if summary["eval_loss_after"] is not None and summary["eval_loss_after"] < 0.8 * min(losses, default=0):
        found.append("eval_loss_after is far below every training loss")
    return found[:20]


def check_memory(summary: dict, plan: dict, on_cpu: bool) -> Verdict:
    dtype, capability = summary["dtype"], plan["capability"]
    fits = (
        dtype == "fp32" if on_cpu else dtype == "fp16" or (dtype == "bf16" and list(capability) >= [8, 0])
    )  # the programs' own rule
    if not fits:
        return False, f"{printable(dtype)} on {printable(summary['gpu_name'])}"
    peak_gib = summary["peak_host_rss_gib" if on_cpu else "peak_reserved_gib"]
    where = (
        "host memory, the GPU's is not known here"
        if on_cpu
        else f"GPU memory ({printable(summary['gpu_name'])})"
    )
    return 0 < peak_gib <= PEAK_GIB, f"{dtype}, {peak_gib:.2f} GiB of {where}, at most {PEAK_GIB:.2f}"


def check_learning(rows: list[dict], summary: dict) -> Verdict:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    if not losses or None in (summary["eval_loss_before"], summary["eval_loss_after"]):
        return False, "the loss was not a number"
    quarter = max(1, len(losses) // 4)
    first, last = (statistics.fmean(part) for part in (losses[:quarter], losses[-quarter:]))
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    text = f"loss {first:.3f} -> {last:.3f} (first and last quarter), perplexity {before:.2f} -> {after:.2f}"
    return last < first and 0 < after < before, text


# --- problem 2 ----------------------------------------------------------------------------------------


def grade_inference(submission: Submission, alpaca_eval: list[str] | UserError) -> Problem:
    """`alpaca_eval`: the instructions, or why they are not to be had."""
    problem = Problem()
    shipped = [record.instruction for record in prompts.read(ROOT / "rehearsal" / "instructions.json")]
    rows: list[dict] = []
    files: dict[str, object] = {}  # the optional ones beside outputs.jsonl, as far as they can be read

    def read() -> Verdict:
        text = submission.text("inference", "outputs.jsonl")
        for name, check in (("outputs_all.json", check_array), ("summary.json", check_counts)):
            problem.judge(
                name, by=lambda name=name, check=check: check(submission.json("inference", name), files, name)
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "outputs.jsonl"
            path.write_text(text, encoding="utf-8")
            for name, value in files.items():
                write_json(path.with_name(name), seen_by_checker(value))
            found = check_outputs.check(path, len(range(0, ALL_RECORDS, check_outputs.EVERY)))
        rows.extend(found["rows"])
        problem.rehearsal = bool({row["instruction"] for row in rows} & set(shipped))
        wanted = len(range(0, len(shipped) if problem.rehearsal else ALL_RECORDS, check_outputs.EVERY))
        if len(rows) != wanted:
            return False, f"{len(rows)} rows, expected {wanted}"
        told = [text for text in found["problems"] if not text.startswith(f"{len(rows)} rows, expected")]
        return not told, printable("; ".join(told[:3])) if told else f"{len(rows)} rows in order"

    problem.judge("rows", "instructions", "answers", by=read)
    if rows:
        wanted = shipped if problem.rehearsal else alpaca_eval
        problem.judge("instructions", by=lambda: check_instructions(rows, wanted))
        problem.judge("answers", by=lambda: check_answers(rows))

    summary = files.get("summary.json")
    if summary is None:
        lost = problem.verdicts.get("summary.json", problem.verdicts["rows"])
        problem.judge("time", "radix_cache", by=lambda: lost)
        return problem
    records = len(shipped) if problem.rehearsal else ALL_RECORDS
    problem.judge("time", by=lambda: check_time(summary, records))
    problem.judge("radix_cache", by=lambda: check_radix(summary))

    def contradictions() -> list[str]:
        everything = files.get("outputs_all.json", problem.verdicts["outputs_all.json"][1])
        problem.arguments = unusual(summary["settings"]["arguments"], Inference())
        found = inference_contradictions(summary, everything, rows)
        on_cpu = summary["settings"]["arguments"]["device"] == "cpu"
        if on_cpu != problem.rehearsal:
            found.append("summary.json and the instructions are of different runs")
        if summary["settings"]["gpu_name"] is None and not on_cpu:
            found.append("the run was on a GPU, but settings gpu_name is null")
        return found

    problem.compare(contradictions)
    return problem


def check_array(value: object, files: dict, name: str) -> Verdict:
    rows = value if isinstance(value, list) else [None]
    if not all(isinstance(row, dict) and isinstance(row["output"], str) for row in rows):
        raise Refused(f"inference/{name}: not an array of objects with an output")
    files[name] = value
    return True, ""


def check_counts(value: object, files: dict, name: str) -> Verdict:
    indices = [value["records"], *value["truncated"], *(failure["index"] for failure in value["failures"])]
    if not all(isinstance(index, int) for index in indices):
        raise Refused(f"inference/{name}: records, failures or truncated are not as the program writes them")
    files[name] = value
    return True, ""


def seen_by_checker(value: dict | list) -> dict | list:
    """What check_outputs.py reads of outputs_all.json and summary.json: the rest could be anything."""
    if isinstance(value, list):
        return [
            {"instruction": text if isinstance(text := row.get("instruction"), str) else ""} for row in value
        ]
    failures = [
        {"index": failure["index"], "reason": printable(failure["reason"])} for failure in value["failures"]
    ]
    return {"records": value["records"], "truncated": value["truncated"], "failures": failures}


def check_instructions(rows: list[dict], wanted: list[str] | UserError) -> Verdict:
    if isinstance(wanted, UserError):
        return None, f"cannot be judged here: {wanted}"
    wanted = wanted[:: check_outputs.EVERY]
    told = [row["instruction"] for row in rows]
    if told == wanted:
        return True, f"{len(wanted)} instructions, text and order"
    first = next(
        (i for i, (a, b) in enumerate(zip(told, wanted, strict=False)) if a != b), min(len(told), len(wanted))
    )
    return False, f"line {first + 1} is not the instruction of record {first * check_outputs.EVERY}"


def check_answers(rows: list[dict]) -> Verdict:
    texts = [row["output"].strip() for row in rows]
    empty, looping = sum(not text for text in texts), sum(map(check_outputs.loops, texts))
    repeated = len(texts) - len(set(texts)) - max(0, empty - 1)
    bad = empty + looping + repeated
    return bad <= DEGENERATE_SHARE * len(
        rows
    ), f"{empty} empty, {looping} looping, {repeated} repeated of {len(rows)}"


def inference_contradictions(summary: dict, everything: list[dict] | str, rows: list[dict]) -> list[str]:
    """Where summary.json contradicts itself or the answers. `everything`: outputs_all.json, or why it is not read."""
    answered = summary["records"] - summary["failed_records"]
    told = {
        "prefix_hit_rate": summary["cached_prompt_tokens"] / summary["prompt_tokens"],
        "computed_prompt_tokens": summary["prompt_tokens"] - summary["cached_prompt_tokens"],
        "cap_hit_share": len(summary["truncated"]) / answered,
        "failed_records": len(summary["failures"]),
    }
    if summary["answered_in_this_start"] == summary["records"]:
        told["tokens_per_s"] = summary["output_tokens"] / summary["generate_s"]
    found = [
        name
        for name, value in told.items()
        if not math.isclose(summary[name], value, rel_tol=1e-6, abs_tol=1e-9)
    ]
    found = [
        f"summary.json {name}: {printable(summary[name], 40)} told, {told[name]:g} computed" for name in found
    ]
    if summary["load_s"] + summary["compile_s"] + summary["generate_s"] > summary["wall_s"]:
        found.append("loading and generating took longer than the whole run")
    if isinstance(everything, str):
        return [*found, f"outputs_all.json: {everything}"]
    if len(everything) != summary["records"]:
        found.append(f"{len(everything)} records in outputs_all.json, {printable(summary['records'], 40)} told")
    if [row.get("output") for row in everything[:: check_outputs.EVERY]] != [row["output"] for row in rows]:
        found.append("outputs.jsonl and outputs_all.json hold different answers")
    if not 0.2 < sum(len(row["output"]) for row in everything) / summary["output_tokens"] < 20:
        found.append("output_tokens do not fit the length of the answers")
    return found


def check_time(summary: dict, records: int) -> Verdict:
    resumed = summary["answered_in_this_start"] != summary["records"]
    text = (
        f"{summary['wall_s']:.0f} s for {summary['records'] - summary['failed_records']} of {records} records"
    )
    text += (
        ", in the last start alone: the run was resumed, and no start tells the whole time" if resumed else ""
    )
    complete = summary["records"] == records and not summary["failed_records"]
    return complete and not resumed and 0 < summary["wall_s"] < MOST_S, text


def check_radix(summary: dict) -> Verdict:
    if summary["settings"]["engine_args"].get("disable_radix_cache"):
        return False, "disable_radix_cache is set"
    share = summary["prefix_hit_rate"]
    return summary["cached_prompt_tokens"] > 0, f"{share:.1%} of the prompt tokens came from the radix tree"


# --- points -------------------------------------------------------------------------------------------


def grade(path: Path, alpaca_eval: list[str] | UserError) -> dict:
    """The content of grade.json."""
    try:
        submission = Submission(path)
        problems = {1: grade_finetune(submission), 2: grade_inference(submission, alpaca_eval)}
    except Refused as refused:
        return nothing(path, str(refused))
    lines = []
    for criterion in CRITERIA:
        problem = problems[criterion.problem]
        met, reason = problem.verdicts[criterion.name]
        status = {True: "earned", False: "not earned", None: "not judged"}[met]
        if met and criterion.column == REPORTED:
            status = "withdrawn" if problem.contradictions else "provisional"
        if status == "withdrawn":
            reason = f"{reason}; but {problem.contradictions[0]}"
        reason = printable(reason, 500)
        points = criterion.points if status in ("earned", "provisional") else 0
        lines.append(asdict(criterion) | {"points": points, "of": criterion.points, "status": status, "reason": reason,
                                          "rehearsal": problem.rehearsal})  # fmt: skip
    return total(path, lines, problems)


def total(path: Path, lines: list[dict], problems: dict[int, Problem]) -> dict:
    """`lines`: one a criterion. Points of a rehearsal are summed apart."""

    def points(rehearsal: bool = False, **where: object) -> int:
        chosen = [line for line in lines if line["rehearsal"] == rehearsal]
        return sum(line["points"] for line in chosen if where.items() <= line.items())

    return {
        "submission": printable(path.name, 2000),
        "points": points(),
        "problem_1": points(problem=1),
        "problem_2": points(problem=2),
        "checked": points(column=CHECKED),
        "provisional": points(column=REPORTED),
        "rehearsal_points": points(rehearsal=True),
        "criteria": lines,
        "contradictions": {
            number: [printable(text, 300) for text in problem.contradictions]
            for number, problem in problems.items()
        },
        "arguments": {number: problem.arguments for number, problem in problems.items()},
    }


def nothing(path: Path, reason: str) -> dict:
    lines = [asdict(criterion) | {"points": 0, "of": criterion.points, "status": "not earned", "reason": reason,
                                  "rehearsal": False} for criterion in CRITERIA]  # fmt: skip
    return total(path, lines, {})


def grade_apart(path: Path, alpaca_eval: list[str] | UserError, out: Path) -> dict:
    """`grade` in a process with bounded memory and time, so that no submission can end the grading of the next."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "grade.json").unlink(missing_ok=True)

    def run() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        try:
            result, reason = grade(path, alpaca_eval), ""
        except MemoryError:
            result, reason = None, TOO_MUCH
        except Exception as error:
            result, reason = None, f"the grader failed: {printable(repr(error))}"
        write_json(out / "grade.json", result or nothing(path, reason))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(GRADING_S)
    if process.is_alive():
        process.kill()
        process.join()
    if not (out / "grade.json").exists():
        write_json(
            out / "grade.json", nothing(path, f"could not be graded within {GRADING_S} s, or the grader failed")
        )
    return json.loads((out / "grade.json").read_text())


def show(result: dict) -> None:
    most = sum(criterion.points for criterion in CRITERIA)
    print(
        f"{result['submission']}: {result['points']} of {most} points, {result['provisional']} of them provisional"
    )
    if any(line["rehearsal"] for line in result["criteria"]):
        count = sum(line["of"] for line in result["criteria"] if line["rehearsal"])
        print(f"  rehearsal on the CPU: {result['rehearsal_points']} of {count} points, which do not count")
    for problem, arguments in result["arguments"].items():
        if arguments:
            print(f"  problem {problem} ran with {', '.join(arguments)}")
    for line in result["criteria"]:
        print(
            f"  {line['points']} of {line['of']}  {line['problem']} {line['name']:16} {line['status']:12} {line['reason']}"
        )


def write_csv(path: Path, results: list[dict]) -> None:
    """A row a submission: totals, then every criterion's points, then what staff should look at."""
    totals = ("submission", "points", "problem_1", "problem_2", "checked", "provisional", "rehearsal_points")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow([*totals, *(criterion.name for criterion in CRITERIA), "for_staff"])
        for result in results:
            remarks = [f"{line['name']} {line['status']}: {line['reason']}" for line in result["criteria"]
                       if line["status"] in ("provisional", "withdrawn", "not judged")]  # fmt: skip
            remarks += [f"problem {problem} ran with {', '.join(arguments)}"
                        for problem, arguments in result["arguments"].items() if arguments]  # fmt: skip
            row = [*(result[name] for name in totals), *(line["points"] for line in result["criteria"])]
            # A spreadsheet would run what begins like a formula.
            table.writerow([re.sub(r"^(?=[=+@-])", "'", str(cell)) for cell in (*row, " | ".join(remarks))])
    temporary.replace(path)


def folder_name(name: str, taken: set[str]) -> str:
    """A name for a submission's grades, in short ASCII; joins `taken`."""
    plain = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:60].strip("._") or "submission"
    names = (plain, *(f"{plain}_{i}" for i in range(2, len(taken) + 3)))
    found = next(name for name in names if name.lower() not in taken)
    taken.add(found.lower())
    return found


def submissions_in(path: Path) -> list[Path] | None:
    """The submissions of a folder of them; None if `path` is one itself."""
    if not path.is_dir():
        return None
    entries = sorted(entry for entry in path.iterdir() if entry.name[0] != "." and entry.name != "__MACOSX")
    names, parts = {entry.name for entry in entries}, [base for bases in FOLDERS.values() for base in bases]
    known = bool(names) and names <= {base.split("/")[0] for base in parts}
    held = any(
        (path / base / name).exists() for part in FOLDERS for base in FOLDERS[part] for name in FILES[part]
    )
    zips = any(entry.suffix.lower() == ".zip" for entry in entries)
    return None if known or (held and not zips) else entries


def main(argv: list[str]) -> int:
    try:
        description = "Grades one submission (a zip or a folder), or every submission in a folder."
        flags = Flags(**read_flags(argv, Flags, HELP, {}, prog="grade.py", description=description))
        if not flags.submission:
            raise UserError(
                "name what is to be graded: make grade SUBMISSION=path (a zip, a folder, a folder of them)"
            )
        path, out = Path(flags.submission).absolute(), Path(flags.output_dir).absolute()
        if not path.exists():
            raise UserError(f"--submission {path}: no such file or folder")
        several = submissions_in(path)
        if several == []:
            raise UserError(f"--submission {path}: an empty folder")
        if out == path.parent or path in (out, *out.parents):
            raise UserError(
                f"--output_dir {out}: grades must not lie among the submissions; name another folder"
            )
        alpaca_eval = instructions(flags.prompts)
        grades = out / "submissions"
        if grades in (path, *path.parents):
            raise UserError(f"--output_dir {out}: grades would lie among the submissions; name another folder")
        grades.mkdir(parents=True, exist_ok=True)
        results, failed, taken = [], 0, set()
        for submission in [path] if several is None else several:
            where = grades / folder_name(submission.name, taken)
            try:
                results.append(grade_apart(submission, alpaca_eval, where))
            except OSError as error:
                failed += 1
                results.append(nothing(submission, f"could not be graded: {printable(error)}"))
            show(results[-1])
        if several is not None:
            where = out / "grades.csv"
            write_csv(where, results)
        unjudged = sum(line["status"] == "not judged" for result in results for line in result["criteria"])
        tail = f"; `instructions` not judged in {unjudged}" if unjudged else ""
        print(f"{len(results)} submission{'s' if several else ''}: {where}{tail}")
        if failed:
            raise UserError(f"{failed} of {len(results)} could not be graded: their reasons are above")
        if unjudged:
            fetch = f"hf download {flags.prompts} {prompts.ALPACA_EVAL} --repo-type dataset"
            raise UserError(
                f"{flags.prompts} is not here to judge `instructions`; fetch it and grade again: {fetch}"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"error: --output_dir {flags.output_dir}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def instructions(where: str) -> list[str] | UserError:
    """AlpacaEval's; the error if they cannot be had, which rehearsals do not need."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # 60 submissions must not wait for a network that is not there
    try:
        return [
            record.instruction
            for record in prompts.read(prompts.find(inference_arguments(["--prompts", where]))[0])
        ]
    except UserError as error:
        if where != DEFAULT_PROMPTS:
            raise
        return error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
