"""The grader on whole, forged and broken submissions. The GPU runs graded here are made up; their files have the
shape that the programs write (the contradictions are sought with the programs' own `summarise`)."""

import copy
import csv
import json
import math
import os
import struct
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import grade
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from batch_infer.arguments import Arguments as Inference
from harness import ROOT
from lora_sft import report
from submissions import Refused, Submission, parse, submissions_in
from workbench import UserError

REFERENCE = ROOT / "handout" / "reference"
ALPACA_EVAL = [f"instruction {i}" for i in range(805)]
ADAPTER = {"adapter_keys", "adapter_shapes", "adapter_trained"}


def adapter_of(rank: int = 1) -> dict[str, np.ndarray]:
    """Llama-2-7B's, for q_proj and down_proj."""
    draw, tensors = np.random.default_rng(0), {}
    sizes = {"self_attn.q_proj": (4096, 4096), "mlp.down_proj": (11008, 4096)}
    for layer in range(32):
        for module, (inner, outer) in sizes.items():
            at = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{at}.lora_A.weight"] = draw.normal(size=(rank, inner)).astype(np.float16)
            tensors[f"{at}.lora_B.weight"] = draw.normal(size=(outer, rank)).astype(np.float16)
    return tensors


def training_files() -> dict[str, object]:
    gpu = {"dtype": "fp16", "gpu_name": "Tesla V100-SXM2-16GB", "world_size": 2}
    config = json.loads((REFERENCE / "finetune" / "run_config.json").read_text())
    config["arguments"] |= {"device": "cuda", "rehearse": False, "lora_r": 1}
    config["plan"] |= gpu | {"capability": [7, 0], "base_parameters": 6738415616}
    config["plan"]["lora_parameters"] = 32 * (2 * 4096 + 11008 + 4096)
    rows = [json.loads(line) for line in (REFERENCE / "finetune" / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"peak_reserved_gib": 13.5, "loss_scale": 16384.0} for row in rows]
    summary = json.loads((REFERENCE / "finetune" / "summary.json").read_text())
    matmul = config["plan"]["matmul_parameters"]
    summary |= report.summarise(rows, **gpu, matmul_parameters=matmul, recomputed_share=1.0)
    summary |= gpu | {"peak_reserved_gib": 13.9}
    adapter_config = {"r": 1, "target_modules": ["down_proj", "self_attn.q_proj"]}
    return {
        "adapter_config.json": adapter_config,
        "run_config.json": config,
        "metrics.jsonl": rows,
        "summary.json": summary,
    }


def inference_files() -> dict[str, object]:
    rows = [{"instruction": text, "output": f"answer to {text}", "generator": "g"} for text in ALPACA_EVAL]
    tokens, prompt, cached = 4000, 20000, 900
    summary = {
        "records": 805, "failed_records": 0, "failures": [], "truncated": [7], "cap_hit_share": 1 / 805,
        "prompt_tokens": prompt, "cached_prompt_tokens": cached, "computed_prompt_tokens": prompt - cached,
        "prefix_hit_rate": cached / prompt, "output_tokens": tokens, "tokens_per_s": tokens / 40.0,
        "load_s": 30.0, "compile_s": 0.0, "generate_s": 40.0, "wall_s": 80.0, "answered_in_this_start": 805,
        "settings": {"arguments": asdict(Inference(fast=True)), "engine_args": {}, "gpu_name": "Tesla V100"},
    }  # fmt: skip
    lines = [{"output": row["output"], "instruction": row["instruction"]} for row in rows[::10]]
    return {"outputs.jsonl": lines, "outputs_all.json": rows, "summary.json": summary}


def encode(name: str, value: object) -> bytes:
    if name.endswith(".safetensors"):
        return save(value)
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    return json.dumps(value).encode()


def decode(name: str, content: bytes) -> object:
    if name.endswith(".safetensors"):
        return adapter_of()
    return [json.loads(line) for line in content.splitlines()] if name.endswith("l") else json.loads(content)


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """The files of a submission that earns everything, by path."""
    finetune = training_files() | {"adapter_model.safetensors": adapter_of()}
    files = {f"finetune/{name}": encode(name, value) for name, value in finetune.items()}
    return files | {f"inference/{name}": encode(name, value) for name, value in inference_files().items()}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def pack(path: Path, files: dict[str, bytes], mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def statuses(result: dict) -> dict[str, str]:
    return {line["name"]: line["status"] for line in result["criteria"]}


def with_status(result: dict, status: str) -> set[str]:
    return {name for name, told in statuses(result).items() if told == status}


def reasons(result: dict) -> dict[str, str]:
    return {line["name"]: line["reason"] for line in result["criteria"]}


@pytest.fixture
def graded(whole, tmp_path):
    """graded({path: change}) -> grade.json's content; a change edits the parsed file, or returns another."""

    def run(changes: dict) -> dict:
        files = dict(whole)
        for path, change in changes.items():
            value = decode(path, files[path])
            changed = change(value)
            files[path] = encode(path, value if changed is None else changed)
        return grade.grade(put(tmp_path / "someone", files), ALPACA_EVAL)

    return run


# --- whole --------------------------------------------------------------------------------------------


def test_a_whole_submission_gets_ten_points_four_of_them_provisional(graded):
    result = graded({})
    assert result["points"] == 10, result
    assert (result["problem_1"], result["problem_2"]) == (5, 5)
    assert (result["checked"], result["provisional"], result["rehearsal_points"]) == (6, 4, 0)


@pytest.mark.parametrize(
    "rename",
    [lambda path: path.replace("/", "\\"), lambda path: f"./a/b/c/{path}",
     lambda path: path.replace("finetune/", "x/deepspeed/output_llama2_7b_lora/").replace("inference/", "x/sglang/")],
    ids=["PowerShell", "three around", "the repository"],
)  # fmt: skip
def test_a_zip_as_people_make_them_gets_the_same(whole, tmp_path, rename):
    """Beside what does not count: a Mac's copies, the handout's answers, a run further in."""
    files = {rename(path): content for path, content in whole.items()} | {
        "__MACOSX/finetune/._summary.json": b""
    }
    files |= {f"{around}/{path}": b"" for path in whole for around in ("reference", "a/b/c/d")}
    result = grade.grade(pack(tmp_path / "someone.zip", files), ALPACA_EVAL)
    assert result["points"] == 10, result


def test_two_runs_are_not_mixed(whole, tmp_path):
    """b/ has what a/ lacks."""
    files = {f"{'b' if 'summary' in path else 'a'}/{path}": whole[path] for path in whole if "finetune" in path}
    for path in (put(tmp_path / "folder", files), pack(tmp_path / "zip", files)):
        result = grade.grade(path, ALPACA_EVAL)
        assert result["points"] == 0
        assert reasons(result)["memory"] == "finetune/ is there 2 times: a/finetune and b/finetune"


def test_the_reference_is_a_rehearsal_without_an_adapter():
    result = grade.grade(REFERENCE, ALPACA_EVAL)
    assert result["points"] == 0
    assert with_status(result, "provisional") == {"learning", "memory", "time", "radix_cache"}
    assert with_status(result, "not earned") >= ADAPTER
    assert statuses(result)["instructions"] == "earned"


def test_staff_see_what_ran(graded):
    changed = {"model_name_or_path": "/\u4e2d" * 100, "output_dir": "/there"}
    result = graded({"finetune/run_config.json": lambda config: config["arguments"].update(changed)})
    (model,) = (text for text in result["arguments"][1] if text.startswith("model_name_or_path="))
    assert model.isascii()
    assert len(model) < 120
    assert "lora_r=1" in result["arguments"][1]
    assert not [text for text in result["arguments"][1] if text.startswith(("output_dir", "lora_alpha"))]
    assert result["arguments"][2] == ["fast=True"]


# --- forged -------------------------------------------------------------------------------------------


def falling_tokens(rows):
    for row in rows:
        row["real_tokens"] += 1


@pytest.mark.parametrize(
    ("path", "change", "text"),
    [
        ("finetune/summary.json", lambda s: s.update(perplexity_after=2.0), "summary.json perplexity_after: 2.0 told"),
        ("finetune/summary.json", lambda s: s.update(tokens_per_s_per_gpu=9e4), "tokens_per_s_per_gpu: 90000.0 told"),
        ("finetune/metrics.jsonl", lambda rows: [*rows[:10], *rows[-5:]], "summary.json steps: 40 told, 15 computed"),
        ("finetune/metrics.jsonl", falling_tokens, "summary.json train_tokens: "),
        ("finetune/run_config.json", lambda c: c["plan"].update(base_parameters=1115264), "told, 6738415616 computed"),
        ("finetune/run_config.json", lambda c: c["plan"].update(lora_parameters=163840), "lora_parameters: 163840 told"),
        ("finetune/run_config.json", lambda c: c["plan"].update(gpu_name=None), "on the CPU, by arguments and gpu_name"),
        ("finetune/run_config.json", lambda c: c["arguments"].update(device="cpu"), "on the CPU, by arguments and "),
        ("finetune/run_config.json", lambda c: c["arguments"].update(lora_r=2), "lora_r: 2 told, 1 computed"),
    ],
)  # fmt: skip
def test_a_forged_training_run_loses_what_it_said_of_itself_and_nothing_else(graded, path, change, text):
    result = graded({path: change})
    assert any(text in found for found in result["contradictions"][1]), result["contradictions"]
    assert statuses(result)["learning"] == "withdrawn"
    assert with_status(result, "provisional") == {"time", "radix_cache"}
    assert all(line["points"] for line in result["criteria"] if line["column"] == grade.CHECKED)


@pytest.mark.parametrize(
    ("path", "change"),
    [("inference/summary.json", lambda s: s.update(generate_s=4.0)),
     ("inference/summary.json", lambda s: s.update(prefix_hit_rate=0.9)),
     ("inference/summary.json", lambda s: s.update(wall_s=60.0)),
     ("inference/summary.json", lambda s: s["settings"].update(gpu_name=None)),
     ("inference/outputs_all.json", lambda rows: rows[10].update(output="another")),
     ("inference/outputs_all.json", lambda rows: rows[3].update(output=[[[]]]))],
)  # fmt: skip
def test_a_forged_inference_run_loses_what_it_said_of_itself_and_nothing_else(graded, path, change):
    result = graded({path: change})
    assert with_status(result, "withdrawn") == {"time", "radix_cache"}
    assert result["points"] == 8


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v * (".7." not in k) if "lora_B" in k else v for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v * np.float16("nan") for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: np.full_like(v, 1 + int(k.split(".")[4])) for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v * ("lora_B" in k) for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v.T for k, v in t.items()}, {"adapter_shapes"}),
        (lambda t: {k: v for k, v in t.items() if not (".7." in k and "lora_A" in k)}, ADAPTER),
        (lambda t: {k: v for k, v in t.items() if ".31." not in k}, ADAPTER),
        (lambda t: t | {"lm_head.weight": np.zeros((2, 2), np.float16)}, ADAPTER),
    ],
    ids=["zero", "one zero", "nan", "constant", "zero A", "transposed", "half a layer", "a layer missing", "foreign"],
)  # fmt: skip
def test_an_adapter_that_no_training_made_loses_its_points(graded, change, lost):
    """The self-reported points stay provisional: only staff can tell."""
    result = graded({"finetune/adapter_model.safetensors": change})
    assert with_status(result, "not earned") == lost
    assert result["provisional"] == 4


def test_an_adapter_of_another_rank_is_of_another_run(graded):
    result = graded({"finetune/adapter_model.safetensors": lambda _: adapter_of(rank=2)})
    assert with_status(result, "not earned") == {"adapter_shapes"}
    assert with_status(result, "withdrawn") == {"learning", "memory"}
    assert result["contradictions"][1] == ["plan lora_parameters: 745472 told, 1490944 computed"]


def rising(rows):
    for row, loss in zip(rows, sorted(row["loss"] for row in rows), strict=True):
        row["loss"] = loss


def worse(summary):
    summary["eval_loss_after"] = summary["eval_loss_before"] + 1
    summary["perplexity_after"] = math.exp(summary["eval_loss_after"])


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"inference/outputs.jsonl": lambda rows: [rows[1], rows[0], *rows[2:]]}, {"rows", "instructions"}),
        ({"inference/summary.json": lambda s: s["settings"]["engine_args"].update(disable_radix_cache=True)},
         {"radix_cache"}),
        ({"inference/summary.json": lambda s: s.update(wall_s=901.0)}, {"time"}),
        ({"inference/summary.json": lambda s: s.update(answered_in_this_start=5)}, {"time"}),
        ({"finetune/summary.json": lambda s: s.update(peak_reserved_gib=20.0)}, {"memory"}),
        ({"finetune/metrics.jsonl": lambda rows: rows[3].update(peak_reserved_gib=20.0)}, {"memory"}),
        ({"finetune/metrics.jsonl": lambda rows: rows[3].update(peak_reserved_gib=None)}, {"memory"}),
        ({"finetune/metrics.jsonl": rising}, {"learning"}),
        ({"finetune/summary.json": worse}, {"learning"}),
        # The programs write null for what is not a number.
        ({"finetune/summary.json": lambda s: s.update(eval_loss_after=None, perplexity_after=None)}, {"learning"}),
    ],
)  # fmt: skip
def test_what_costs_which_point(graded, changes, lost):
    assert with_status(graded(changes), "not earned") == lost


def test_bf16_needs_a_gpu_that_has_it(graded):
    changes = {"finetune/summary.json": lambda s: s.update(dtype="bf16"),
               "finetune/run_config.json": lambda c: c["plan"].update(dtype="bf16")}  # fmt: skip
    cure = "--dtype auto takes what it has: bf16 from compute capability 8.0"
    assert reasons(graded(changes))["memory"] == f"bf16 on Tesla V100-SXM2-16GB; {cure}"


def test_the_checkers_warnings_are_told_to_the_student(graded, capsys):
    result = graded({"inference/summary.json": lambda s: s["settings"]["arguments"].update(batch_size=32)})
    (line,) = result["warnings"]
    assert line.startswith("--batch_size 32: no more records")
    assert result["points"] == 10
    grade.show(result)
    assert f"  WARNING: {line}" in capsys.readouterr().out


def test_answers_of_one_loop_lose_their_point_and_contradict_the_rest(graded):
    result = graded({"inference/outputs.jsonl": lambda rows: [row | {"output": "so " * 50} for row in rows]})
    assert reasons(result)["answers"] == "0 empty, 81 looping, 80 repeated of 81"
    assert with_status(result, "withdrawn") == {"time", "radix_cache"}


# --- broken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "reason"),
    [("finetune/metrics.jsonl", lambda rows: [row.update(step_time_s=0) for row in rows] and rows, "ZeroDivisionError"),
     ("finetune/summary.json", lambda summary: summary.update(eval_loss_after=1e6), "OverflowError"),
     ("inference/summary.json", lambda summary: summary["settings"].update(engine_args=[]), "AttributeError"),
     ("finetune/run_config.json", lambda config: {"arguments": config["arguments"]}, "KeyError")],
)  # fmt: skip
def test_values_that_no_program_writes_are_one_line(graded, path, change, reason):
    result = graded({path: change})
    assert any(f"not as the program writes it: {reason}" in text for text in reasons(result).values()), result


def test_texts_are_short_whatever_a_file_holds(graded):
    result = graded({"finetune/metrics.jsonl": lambda rows: rows[4].update(step="\x7f\n" * 5000),
                     "inference/summary.json": lambda summary: summary.update(failed_records=-(10**3000))})  # fmt: skip
    texts = [*reasons(result).values(), *result["contradictions"][1]]
    assert all(len(text) <= 500 and text.isprintable() for text in texts)
    assert any("steps of metrics.jsonl" in text for text in texts)


def test_files_above_a_limit_are_refused(whole, tmp_path, monkeypatch):
    path = put(tmp_path / "someone", whole)
    monkeypatch.setitem(grade.Submission.read.__globals__["LIMITS"], ".json", 1000)
    assert reasons(grade.grade(path, ALPACA_EVAL))["time"].endswith("bytes, at most 1,000 are read")
    monkeypatch.setattr("submissions.MOST_LINES", 80)
    assert reasons(grade.grade(path, ALPACA_EVAL))["rows"] == "inference/outputs.jsonl: more than 80 lines"
    many = pack(tmp_path / "many.zip", {f"finetune/{i}": b"" for i in range(30)})
    monkeypatch.setattr("submissions.MOST_ENTRIES", 29)
    assert "more than 29 entries" in reasons(grade.grade(many, ALPACA_EVAL))["rows"]


def broken_submissions(folder: Path, whole: dict[str, bytes]) -> dict[str, str]:
    """Fills `folder`; returns {name: what its grade must say}."""
    (folder / "text.docx").write_bytes(b"see my mail")
    damaged = (b"PK\x03\x04" + bytes(60)) * 3 + b"PK\x05\x06" + bytes(8) + b"\x40" + bytes(9)
    (folder / "cut.zip").write_bytes(damaged)
    pack(
        folder / "outside.zip",
        {f"../{path}": content for path, content in whole.items()} | {"/etc/passwd": b"x"},
    )
    pack(folder / "links.zip", whole, mode=0o120777)
    for name, path, content in (
        ("bomb", "finetune/metrics.jsonl", b" " * 50_000_000),
        ("deep", "finetune/summary.json", b"[" * 200_000 + b"]" * 200_000),
        ("nan", "inference/summary.json", b'{"records": NaN}'),
        ("utf16", "inference/outputs.jsonl", '{"output": "a"}\n'.encode("utf-16")),
        ("pickle", "finetune/adapter_model.safetensors", b"\x80\x04cos\nsystem\n(S'false'\ntR."),
    ):
        pack(folder / f"{name}.zip", whole | {path: content})
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(pack(folder / "twice.zip", whole), "a") as file,
    ):
        file.writestr("finetune/summary.json", b"{}")
    for name in ("linked", "pipe"):
        put(folder / name, whole)
        (folder / name / "finetune/summary.json").unlink()
    put(folder.parent / "elsewhere", whole)
    (folder / "linked/finetune/summary.json").symlink_to(folder.parent / "elsewhere/finetune/summary.json")
    os.mkfifo(folder / "pipe/finetune/summary.json")
    os.mkfifo(folder / "pipe.zip")
    (folder / "=cmd()").mkdir()
    return {
        "text.docx": "is neither a folder nor a zip", "cut.zip": "cannot be opened as a zip: ",
        "outside.zip": "finetune/adapter_model.safetensors is missing", "links.zip": "a symbolic link",
        "bomb.zip": "would unpack to 50,000,000", "deep.zip": "nested too deeply",
        "nan.zip": "NaN is not a finite number", "utf16.zip": "not UTF-8 text", "pickle.zip": "not a safetensors file",
        "twice.zip": "2 times in the zip", "linked": "a symbolic link", "pipe": "not a plain file",
        "pipe.zip": "is neither a folder nor a zip", "=cmd()": "is missing",
    }  # fmt: skip


def test_broken_submissions_are_graded_one_after_the_other(whole, tmp_path, capfd):
    folder, out, prompts = tmp_path / "class", tmp_path / "grades", tmp_path / "prompts.json"
    folder.mkdir()
    expected = broken_submissions(folder, whole)
    put(folder / "whole", whole)
    prompts.write_text(json.dumps(ALPACA_EVAL))
    flags = ["--submission", str(folder), "--output_dir", str(out), "--prompts", str(prompts)]
    assert grade.main(flags) == 0
    terminal = capfd.readouterr()
    assert "Traceback" not in terminal.out + terminal.err
    assert terminal.out.splitlines()[-1].startswith(f"{len(expected) + 1} submissions: ")
    grades = [json.loads(path.read_text()) for path in out.glob("submissions/*/grade.json")]
    by_name = {result["submission"]: result for result in grades}
    for name, text in expected.items():
        assert any(text in reason for reason in reasons(by_name[name]).values()), (name, by_name[name])
        assert by_name[name]["points"] < 10, name
    with (out / "grades.csv").open() as table:
        rows = {row["submission"]: row for row in csv.DictReader(table)}
    assert len(rows) == len(expected) + 1
    assert (rows["whole"]["points"], rows["bomb.zip"]["points"], rows["utf16.zip"]["problem_1"]) == (
        "10",
        "8",
        "5",
    )
    assert rows["'=cmd()"]["points"] == "0"
    assert "lora_r=1" in rows["whole"]["for_staff"]
    written = [*out.rglob("*"), *tmp_path.glob("*")]
    assert not [path for path in written if path.name in ("passwd", "finetune", "inference")]


def test_too_much_memory_in_one_part_leaves_the_other(whole, tmp_path, monkeypatch, capfd):
    many = {"inference/outputs_all.json": b"[" + b"[],[]," * 3_000_000 + b"[]]"}
    monkeypatch.setattr(grade, "MEMORY_BYTES", 2**28)
    result = grade.grade_apart(put(tmp_path / "someone", whole | many), ALPACA_EVAL, tmp_path / "out")
    assert result["problem_1"] == 5
    assert result["contradictions"]["2"] == ["more than 0 GiB would be needed to read it"]
    assert capfd.readouterr() == ("", "")


def test_a_submission_that_takes_too_long_ends_alone(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "GRADING_S", 1)
    monkeypatch.setattr(grade, "layers_of", lambda _: time.sleep(60))
    result = grade.grade_apart(put(tmp_path / "someone", whole), ALPACA_EVAL, tmp_path / "out")
    assert result["points"] == 0
    assert "could not be graded within 1 s" in reasons(result)["memory"]


# --- a class ------------------------------------------------------------------------------------------


def grade_class(folder: Path, *words: str) -> tuple[int, list[dict]]:
    """Grades into out/ beside `folder`; (exit code, rows of grades.csv)."""
    code = grade.main(["--submission", str(folder), "--output_dir", str(folder.parent / "out"), *words])
    with (folder.parent / "out/grades.csv").open() as table:
        return code, list(csv.DictReader(table))


def test_names_of_submissions_are_only_shown(tmp_path):
    """Long in bytes, of the table's name, and alike in ASCII."""
    names = ["\u4e2d" * 50, "\u4e2d" * 49, "grades.csv", "\U0001f600", ". "]
    for name in names:
        (tmp_path / "class" / name.replace(".", "x") / "finetune").mkdir(parents=True)
    code, rows = grade_class(tmp_path / "class", "--prompts", str(ROOT / "rehearsal/instructions.json"))
    folders = [path.relative_to(tmp_path) for path in (tmp_path / "out/submissions").glob("*/grade.json")]
    assert code == 0
    assert len({row["submission"] for row in rows}) == len(folders) == len(names)
    assert all(str(path).isascii() for path in folders)
    assert grade.folder_name("..", set()) == "submission"
    assert grade.folder_name("x" * 255, {"x" * 60}) == "x" * 60 + "_2"


def test_a_folder_with_finetune_or_inference_is_one_submission(tmp_path, whole):
    one = put(tmp_path / "one", whole | {"README.md": b""})
    assert submissions_in(one) == [one]
    students = put(tmp_path / "class", {"a/finetune/x": b"", "b.zip": b"", ".hidden/x": b"", "__MACOSX/x": b""})
    assert [path.name for path in submissions_in(students)] == ["a", "b.zip"]


def test_without_alpaca_eval_its_criterion_is_not_judged(whole, tmp_path, monkeypatch, capsys):
    put(tmp_path / "class/whole", whole)
    for path in (REFERENCE / "inference").iterdir():
        put(tmp_path / "class/rehearsed", {f"inference/{path.name}": path.read_bytes()})
    monkeypatch.setattr(grade, "read_alpaca_eval", lambda where: UserError(f"{where} is not in the cache"))
    code, rows = grade_class(tmp_path / "class")
    terminal = capsys.readouterr()
    assert code == 2
    assert terminal.out.splitlines()[-1].endswith("grades.csv; `instructions` not judged in 1")
    assert terminal.err.endswith("hf download tatsu-lab/alpaca_eval alpaca_eval.json --repo-type dataset\n")
    rehearsed, graded = sorted(rows, key=lambda row: row["submission"])
    assert (graded["points"], graded["instructions"], rehearsed["instructions"]) == ("9", "0", "1")
    assert "instructions not judged" in graded["for_staff"]
    (tmp_path / "class/whole").rename(tmp_path / "whole")
    assert grade_class(tmp_path / "class")[0] == 0


def test_mistakes_of_staff_are_one_line(tmp_path, capsys):
    inside = put(tmp_path / "submissions", {"someone/finetune/x": b""}) / "someone"
    (tmp_path / "empty").mkdir()
    for words, message in (([], "name what is to be graded"), (["--submission", "/no"], "no such file or folder"),
                           (["--submission", str(tmp_path / "empty")], "an empty folder"),
                           (["--submission", str(REFERENCE), "--prompts", "./no.json"], "--prompts ./no.json: "),
                           (["--submission", str(REFERENCE), "--output_dir", str(REFERENCE / "x")], "must not lie"),
                           (["--submission", str(REFERENCE), "--output_dir", str(ROOT / "handout")], "must not lie"),
                           (["--submission", str(REFERENCE), "--output_dir", "/proc/x"], "cannot be written"),
                           (["--submission", str(inside), "--output_dir", str(tmp_path)], "must not lie")):  # fmt: skip
        assert grade.main(words) == 2
        assert message in capsys.readouterr().err


# --- fuzzed -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def small(whole, tmp_path_factory):
    """A submission without an adapter's weight (grading it takes a hundredth of a second)."""
    tensors = {key: value for key, value in adapter_of().items() if ".0." in key or ".1." in key}
    files = whole | {"finetune/adapter_model.safetensors": save(tensors)}
    folder = put(tmp_path_factory.mktemp("small"), files)
    return folder, files, grade.grade(folder, ALPACA_EVAL)["points"]


def places_in(value: object, at: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in places_in(item, (*at, key)))]


@settings(max_examples=60)
@given(data=st.data())
def test_no_value_in_a_file_makes_the_grader_fail(small, data):
    """One value anywhere, replaced by any other; points are never more than before."""
    folder, files, before = small
    path = data.draw(st.sampled_from([path for path in files if "safetensors" not in path]))
    value = decode(path, files[path])
    value = copy.deepcopy(value[:20] if isinstance(value, list) else value)
    *outer, last = data.draw(st.sampled_from([place for place in places_in(value) if place]))
    inside = value
    for key in outer:
        inside = inside[key]
    inside[last] = data.draw(JSON)
    (folder / path).write_bytes(encode(path, value))
    try:
        result = grade.grade(folder, ALPACA_EVAL)
    finally:
        (folder / path).write_bytes(files[path])
    assert 0 <= result["points"] <= before
    json.dumps(result, allow_nan=False)
    assert all(reason.isprintable() for reason in reasons(result).values())


@settings(max_examples=60)
@given(content=st.binary(max_size=200), data=st.data(), at=st.floats(0, 1))
def test_no_bytes_make_the_grader_fail(small, content, data, at):
    """A file overwritten from somewhere on, and a zip in its middle."""
    folder, files, _ = small
    path = data.draw(st.sampled_from(list(files)))
    (folder / path).write_bytes(files[path][: int(at * len(files[path]))] + content)
    try:
        grade.grade(folder, ALPACA_EVAL)
    finally:
        (folder / path).write_bytes(files[path])
    packed = pack(folder.parent / "fuzzed.zip", {name: file[:2000] for name, file in files.items()})
    good = packed.read_bytes()
    start = int(at * len(good))
    packed.write_bytes(good[:start] + content + good[start + len(content) :])
    grade.grade(packed, ALPACA_EVAL)


def test_no_depth_makes_the_grader_fail(small):
    """Around the depth where reading still works and showing no longer does."""
    folder, files, _ = small
    path, summary = folder / "finetune/summary.json", json.loads(files["finetune/summary.json"])
    try:
        for levels in range(800, 1000, 5):
            text = json.dumps(summary | {"gpu_name": "DEEP"}).replace('"DEEP"', "[" * levels + "]" * levels)
            path.write_text(text)
            grade.grade(folder, ALPACA_EVAL)
    finally:
        path.write_bytes(files["finetune/summary.json"])


@pytest.mark.parametrize("text", ["[" * 10**5, "1e999", "-Infinity", "1" * 5000, '{"a": 1', "\ufeff{}", ""])
def test_json_that_is_not_json_is_refused(text):
    with pytest.raises(Refused, match="x"):
        parse(text, "x")


def test_bf16_adapters_are_read(tmp_path):
    data = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    name = "adapter_model.safetensors"
    put(tmp_path, {f"finetune/{name}": struct.pack("<Q", len(header)) + header + data})
    assert Submission(tmp_path).tensors("finetune", name)["x"].tolist() == [1.5, -2.0]
