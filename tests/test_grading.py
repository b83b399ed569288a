"""The grader on whole, forged and broken submissions. The GPU runs graded here are made up; their files have the
shape that the programs write (the contradictions are sought with the programs' own `summarise`)."""

import copy
import csv
import json
import math
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import check_outputs
import grade
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from batch_infer.arguments import Arguments as Inference
from harness import ROOT
from lora_sft import report
from submissions import Refused, Submission, parse
from workbench import UserError

REFERENCE = ROOT / "handout" / "reference"
ALPACA_EVAL = [f"instruction {i}" for i in range(805)]
CHECKED = {c.name for c in grade.CRITERIA if c.column == grade.CHECKED}


def adapter_of(rank: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Llama-2-7B's, for q_proj and down_proj; every layer has learnt as much more as it is deep."""
    draw, tensors = np.random.default_rng(seed), {}
    for layer in range(32):
        for module, (inner, outer) in {
            "self_attn.q_proj": (4096, 4096),
            "mlp.down_proj": (11008, 4096),
        }.items():
            at = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{at}.lora_A.weight"] = draw.normal(size=(rank, inner)).astype(np.float16)
            tensors[f"{at}.lora_B.weight"] = (draw.normal(size=(outer, rank)) * (1 + layer)).astype(np.float16)
    return tensors


def training_files() -> dict[str, object]:
    config = json.loads((REFERENCE / "finetune" / "run_config.json").read_text())
    config["arguments"] |= {"device": "cuda", "rehearse": False, "lora_r": 1}
    config["arguments"] |= {"lora_target_modules": "self_attn.q_proj, down_proj"}
    config["plan"] |= {"dtype": "fp16", "gpu_name": "Tesla V100-SXM2-16GB", "capability": [7, 0]}
    config["plan"] |= {"base_parameters": 6738415616, "lora_parameters": 32 * (2 * 4096 + 11008 + 4096)}
    rows = [json.loads(line) for line in (REFERENCE / "finetune" / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"peak_reserved_gib": 13.5, "loss_scale": 16384.0} for row in rows]
    summary = json.loads((REFERENCE / "finetune" / "summary.json").read_text())
    summary |= report.summarise(rows, config["plan"], True)
    summary |= {"dtype": "fp16", "gpu_name": "Tesla V100-SXM2-16GB", "peak_reserved_gib": 13.9}
    return {
        "adapter_config.json": {"r": 1, "target_modules": ["down_proj", "self_attn.q_proj"]},
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


def statuses(result: dict) -> dict[str, str]:
    return {line["name"]: line["status"] for line in result["criteria"]}


@pytest.fixture
def graded(whole, tmp_path):
    """graded({path: change}) -> grade.json's content; a change takes the parsed file and edits or returns it."""

    def run(changes=None):
        files = dict(whole)
        for path, change in (changes or {}).items():
            name = path.split("/")[1]
            if name.endswith(".safetensors"):
                value = adapter_of()
            elif name.endswith(".jsonl"):
                value = [json.loads(line) for line in files[path].splitlines()]
            else:
                value = json.loads(files[path])
            changed = change(value)
            files[path] = encode(name, value if changed is None else changed)
        return grade.grade(put(tmp_path / "someone", files), ALPACA_EVAL)

    return run


# --- whole and forged ---------------------------------------------------------------------------------


def test_a_whole_submission_gets_ten_points_four_of_them_provisional(graded):
    result = graded()
    assert result["points"] == 10, result
    assert (result["problem_1"], result["problem_2"]) == (5, 5)
    assert (result["checked"], result["provisional"], result["rehearsal_points"]) == (6, 4, 0)


def test_a_zip_with_a_folder_around_it_gets_the_same(whole, tmp_path):
    with zipfile.ZipFile(tmp_path / "someone.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in whole.items():
            archive.writestr(f"someone/{path}", content)
        archive.writestr("__MACOSX/._x", b"")
    assert grade.grade(tmp_path / "someone.zip", ALPACA_EVAL)["points"] == 10


@pytest.mark.parametrize(
    "rename",
    [lambda path: path.replace("/", "\\"), lambda path: f"./{path}", lambda path: f"a/b/c/{path}",
     lambda path: path.replace("finetune/", "x/deepspeed/output_llama2_7b_lora/").replace("inference/", "x/sglang/")],
    ids=["PowerShell", "dot", "three around", "the repository"],
)  # fmt: skip
def test_honest_zips(whole, tmp_path, rename):
    """Each beside what does not count: a Mac's copies, the handout's answers, a run further in."""
    with zipfile.ZipFile(tmp_path / "someone.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in whole.items():
            archive.writestr(rename(path), content)
            archive.writestr(f"__MACOSX/{path}", b"")
            archive.writestr(f"reference/{path}", b"")
            archive.writestr(f"a/b/c/d/{path}", b"")
    result = grade.grade(tmp_path / "someone.zip", ALPACA_EVAL)
    assert result["points"] == 10, result


@pytest.mark.parametrize("packed", [True, False])
def test_two_runs_are_not_mixed(whole, tmp_path, packed):
    """b/ has what a/ lacks."""
    files = {f"{'b' if 'summary' in path else 'a'}/{path}": whole[path] for path in whole if "finetune" in path}
    if packed:
        with zipfile.ZipFile(tmp_path / "someone", "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    else:
        put(tmp_path / "someone", files)
    result = grade.grade(tmp_path / "someone", ALPACA_EVAL)
    assert result["points"] == 0
    assert result["criteria"][0]["reason"] == "finetune/ is there 2 times: a/finetune and b/finetune"


def forge_perplexity(summary):
    summary["perplexity_after"] /= 2


def forge_loss(summary):
    summary["eval_loss_after"] = 0.5
    summary["perplexity_after"] = math.exp(0.5)


def forge_rate(summary):
    summary["tokens_per_s_per_gpu"] *= 3


def drop_steps(rows):
    return [*rows[:10], *rows[-5:]]


def smooth_losses(rows):
    for row in rows:
        row["real_tokens"] += 1


@pytest.mark.parametrize(
    ("name", "change"),
    [("summary.json", forge_perplexity), ("summary.json", forge_loss), ("summary.json", forge_rate),
     ("metrics.jsonl", drop_steps), ("metrics.jsonl", smooth_losses)],
)  # fmt: skip
def test_a_forged_run_loses_what_it_said_of_itself_and_nothing_else(graded, name, change):
    result = graded({f"finetune/{name}": change})
    lost = {name for name, status in statuses(result).items() if status == "withdrawn"}
    assert lost == {"memory", "learning"}
    assert result["points"] == 8


def half_the_steps(config):
    config["plan"]["train"]["packed_rows"] *= 2


def test_more_rows_than_the_steps_could_see(graded):
    result = graded({"finetune/run_config.json": half_the_steps})
    assert result["contradictions"] == {1: ["steps x batch: 34 told, 68 computed"], 2: []}


def rising(rows):
    for row, loss in zip(rows, sorted(row["loss"] for row in rows), strict=True):
        row["loss"] = loss


def worse(summary):
    summary["eval_loss_after"] = summary["eval_loss_before"] + 1
    summary["perplexity_after"] = math.exp(summary["eval_loss_after"])


@pytest.mark.parametrize(("name", "change"), [("metrics.jsonl", rising), ("summary.json", worse)])
def test_a_run_that_did_not_learn(graded, name, change):
    result = graded({f"finetune/{name}": change})
    assert result["contradictions"][1] == []
    assert statuses(result)["learning"] == "not earned"
    assert result["points"] == 9


def deep(levels: int = 800) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("path", "change", "reason"),
    [
        ("finetune/metrics.jsonl", lambda rows: rows[4].update(step_time_s=0), "ZeroDivisionError"),
        ("finetune/summary.json", lambda summary: summary.update(eval_loss_after=1e6), "OverflowError"),
        (
            "inference/summary.json",
            lambda summary: summary["settings"].update(engine_args=[]),
            "AttributeError",
        ),
        ("finetune/run_config.json", lambda config: config.pop("plan"), "KeyError"),
    ],
)
def test_values_that_no_program_writes_are_one_line(graded, path, change, reason):
    result = graded({path: lambda value: change(value) and None})
    reasons = [line["reason"] for line in result["criteria"] if line["status"] in ("not earned", "withdrawn")]
    assert any(f"not as the program writes it: {reason}" in text for text in reasons), result


def test_a_file_beside_the_answers_costs_only_its_own_points(graded):
    result = graded(
        {"inference/outputs_all.json": lambda rows: rows[3].update(output=deep(), instruction=deep())}
    )
    assert {name for name, status in statuses(result).items() if status == "withdrawn"} == {
        "time",
        "radix_cache",
    }
    assert result["points"] == 8


def test_limits(whole, tmp_path, monkeypatch):
    path = put(tmp_path / "someone", whole)
    monkeypatch.setattr("submissions.OTHER_LIMIT", 1000)
    reasons = {line["name"]: line["reason"] for line in grade.grade(path, ALPACA_EVAL)["criteria"]}
    assert reasons["learning"].endswith("bytes, at most 1,000 are read")
    monkeypatch.setattr("submissions.MOST_LINES", 80)
    reasons = {line["name"]: line["reason"] for line in grade.grade(path, ALPACA_EVAL)["criteria"]}
    assert reasons["rows"] == "inference/outputs.jsonl: more than 80 lines"
    packed = tmp_path / "many.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for i in range(30):
            archive.writestr(f"finetune/{i}", b"")
    monkeypatch.setattr("submissions.MOST_ENTRIES", 29)
    assert "more than 29 entries" in grade.grade(packed, ALPACA_EVAL)["criteria"][0]["reason"]


def test_a_forged_inference_summary(graded):
    def faster(summary):
        summary["generate_s"] /= 10

    found = statuses(graded({"inference/summary.json": faster}))
    assert {name for name, status in found.items() if status != "earned" and status != "provisional"} == {
        "time",
        "radix_cache",
    }
    assert found["time"] == "withdrawn"


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda t: {k: np.random.default_rng(1).normal(size=v.shape).astype(np.float16) for k, v in t.items()},
         {"adapter_trained"}),
        (lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v * (".7." not in k) if "lora_B" in k else v for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v for k, v in t.items() if not (".7." in k and "lora_A" in k)},
         {"adapter_keys", "adapter_shapes", "adapter_trained"}),
        (lambda t: {k: v * np.float16("nan") for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v.T for k, v in t.items()}, {"adapter_shapes"}),
        (lambda t: {k: np.full_like(v, 1 + int(k.split(".")[4])) if "lora_B" in k else v for k, v in t.items()},
         {"adapter_trained"}),
        (lambda t: {k: v * ("lora_B" in k) for k, v in t.items()}, {"adapter_trained"}),
        (lambda t: {k: v for k, v in t.items() if ".31." not in k},
         {"adapter_keys", "adapter_shapes", "adapter_trained"}),
        (lambda t: t | {"lm_head.weight": np.zeros((2, 2), np.float16)},
         {"adapter_keys", "adapter_shapes", "adapter_trained"}),
    ],
    ids=["random", "zero", "one zero", "half a layer", "nan", "transposed", "constant", "zero A", "a layer missing", "a foreign tensor"],
)  # fmt: skip
def test_adapters_that_did_not_come_from_training(graded, change, lost):
    """The self-reported points stay provisional: only staff can tell."""
    result = graded({"finetune/adapter_model.safetensors": change})
    assert {name for name, status in statuses(result).items() if status == "not earned"} == lost
    assert result["provisional"] == 4


def test_an_adapter_of_another_rank(graded):
    result = graded({"finetune/adapter_model.safetensors": lambda _: adapter_of(rank=2)})
    found = statuses(result)
    assert found["adapter_shapes"] == "not earned"
    assert found["learning"] == found["memory"] == "withdrawn"
    assert result["contradictions"][1] == ["plan lora_parameters: 745472 told, the adapter has 1490944"]


def on_a_gpu(config):
    """A rehearsal's run_config.json, edited."""
    config["arguments"]["device"] = "cuda"
    config["plan"] |= {"dtype": "bf16", "capability": [8, 0], "base_parameters": 1115264}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (on_a_gpu, "plan base_parameters: 1115264 told, 6738415616 computed"),
        (lambda config: config["plan"].update(lora_parameters=163840), "plan lora_parameters: 163840 told"),
        (lambda config: config["plan"].update(gpu_name=None), "gpu_name is null"),
        (lambda config: config["arguments"].update(rehearse=True), "rehearse on a GPU: True told"),
        (lambda config: config["arguments"].update(lora_r=2), "different ranks"),
        (
            lambda config: config["arguments"].update(lora_target_modules="all-linear"),
            "lora_target_modules all-",
        ),
        (lambda config: config["arguments"].update(lora_target_modules="q_proj"), "lora_target_modules q_proj"),
    ],
)
def test_a_run_that_was_not_the_adapters(graded, change, text):
    result = graded({"finetune/run_config.json": lambda config: change(config) and None})
    assert any(text in found for found in result["contradictions"][1]), result["contradictions"]
    assert statuses(result)["learning"] == "withdrawn"
    assert result["checked"] == 6


def test_steps_without_a_gpus_peak(graded):
    result = graded({"finetune/metrics.jsonl": lambda rows: rows[3].update(peak_reserved_gib=None)})
    assert result["contradictions"][1] == ["steps with a GPU's peak: 33 told, 34 computed"]


def test_a_run_that_diverged_loses_learning_alone(graded):
    """The programs write null for what is not a number."""
    nothing = {"eval_loss_after": None, "perplexity_after": None}
    result = graded({"finetune/summary.json": lambda summary: summary.update(nothing)})
    lines = {line["name"]: line for line in result["criteria"]}
    assert lines["learning"]["reason"] == "the loss was not a number"
    assert result["contradictions"][1] == []
    assert result["points"] == 9


def test_memory_keeps_its_own_reason(graded):
    result = graded({"finetune/summary.json": lambda summary: summary.update(eval_loss_after="low")})
    (line,) = (line for line in result["criteria"] if line["name"] == "memory")
    assert line["reason"].startswith("fp16, 13.90 GiB of GPU memory")
    assert line["reason"].endswith(
        "but not as the program writes it: TypeError('must be real number, not str')"
    )


def test_texts_are_short_whatever_a_file_holds(graded):
    result = graded({"finetune/metrics.jsonl": lambda rows: rows[4].update(step="\x7f\n" * 5000, step_time_s=9.0),
                     "inference/summary.json": lambda summary: summary.update(failed_records=-(10**3000))})  # fmt: skip
    texts = [line["reason"] for line in result["criteria"]] + result["contradictions"][1]
    assert all(len(text) <= 500 and text.isprintable() for text in texts)
    assert any("tokens/s of step" in text for text in texts)


def test_staff_see_what_ran(graded):
    def change(config):
        config["arguments"] |= {"model_name_or_path": "/\u4e2d" * 100, "lora_r": 1, "output_dir": "/there"}

    result = graded({"finetune/run_config.json": change})
    (model,) = (text for text in result["arguments"][1] if text.startswith("model_name_or_path="))
    assert model.isascii()
    assert len(model) < 120
    assert "lora_r=1" in result["arguments"][1]
    assert not [text for text in result["arguments"][1] if text.startswith(("output_dir", "lora_alpha"))]
    assert result["arguments"][2] == ["fast=True"]


def test_a_resumed_run_has_no_time_from_start_to_end(graded):
    result = graded({"inference/summary.json": lambda summary: summary.update(answered_in_this_start=5)})
    (line,) = (line for line in result["criteria"] if line["name"] == "time")
    assert line["status"] == "not earned"
    assert "resumed" in line["reason"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"inference/outputs.jsonl": lambda rows: rows[1:]}, {"rows": "not earned", "instructions": "not earned"}),
        ({"inference/outputs.jsonl": lambda rows: [rows[1], rows[0], *rows[2:]]}, {"instructions": "not earned"}),
        ({"inference/outputs.jsonl": lambda rows: [row | {"output": "so " * 50} for row in rows]},
         {"answers": "not earned", "time": "withdrawn", "instructions": "earned"}),
        ({"inference/summary.json": lambda s: s["settings"]["engine_args"].update(disable_radix_cache=True)},
         {"radix_cache": "not earned", "time": "provisional"}),
        ({"inference/summary.json": lambda s: s.update(wall_s=901.0)}, {"time": "not earned"}),
        ({"finetune/summary.json": lambda s: s.update(peak_reserved_gib=20.0)}, {"memory": "not earned"}),
        ({"finetune/summary.json": lambda s: s.update(dtype="bf16"),
          "finetune/run_config.json": lambda c: c["plan"].update(dtype="bf16")}, {"memory": "not earned"}),
        ({"finetune/run_config.json": lambda c: c["arguments"].update(device="cpu")}, {"learning": "withdrawn"}),
    ],
)  # fmt: skip
def test_what_costs_which_point(graded, changes, status):
    found = statuses(graded(changes))
    assert {name: found[name] for name in status} == status


def test_the_reference_is_a_rehearsal_without_an_adapter():
    result = grade.grade(REFERENCE, ALPACA_EVAL)
    found = statuses(result)
    assert result["points"] == 0
    assert found["learning"] == found["memory"] == found["time"] == found["radix_cache"] == "provisional"
    assert found["rows"] == found["instructions"] == "earned"
    assert found["adapter_keys"] == "not earned"


# --- broken -------------------------------------------------------------------------------------------


def broken_submissions(folder: Path, whole: dict[str, bytes]) -> dict[str, str]:
    """Fills `folder`; returns {name: what its grade must say}."""

    def pack(name: str, files: dict[str, bytes], **options) -> None:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files.items():
                entry = zipfile.ZipInfo(path)
                entry.external_attr = options.get("mode", 0o100644) << 16
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED)

    def replaced(path: str, content: bytes) -> dict[str, bytes]:
        return whole | {path: content}

    (folder / "text.docx").write_bytes(b"see my mail")
    (folder / "cut.zip").write_bytes(
        (b"PK\x03\x04" + bytes(60)) * 3 + b"PK\x05\x06" + bytes(8) + b"\x40" + bytes(9)
    )
    pack("empty.zip", {})
    pack("outside.zip", {f"../{path}": content for path, content in whole.items()} | {"/etc/passwd": b"x"})
    pack("links.zip", whole, mode=0o120777)
    pack("bomb.zip", replaced("finetune/metrics.jsonl", b" " * 50_000_000))
    pack("deep.zip", replaced("finetune/summary.json", b"[" * 200_000 + b"]" * 200_000))
    pack("nan.zip", replaced("inference/summary.json", b'{"records": NaN}'))
    pack("utf16.zip", replaced("inference/outputs.jsonl", '{"output": "a"}\n'.encode("utf-16")))
    pack("pickle.zip", replaced("finetune/adapter_model.safetensors", b"\x80\x04cos\nsystem\n(S'false'\ntR."))
    pack("twice.zip", whole)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(folder / "twice.zip", "a") as archive:
        archive.writestr("finetune/summary.json", b"{}")
    put(folder / "linked", whole)
    (folder / "linked/finetune/summary.json").unlink()
    (folder / "linked/finetune/summary.json").symlink_to(
        put(folder.parent / "elsewhere", whole) / "finetune/summary.json"
    )
    put(folder / "pipe", whole)
    (folder / "pipe/inference/outputs.jsonl").unlink()
    os.mkfifo(folder / "pipe/inference/outputs.jsonl")
    os.mkfifo(folder / "pipe.zip")
    (folder / "=cmd()").mkdir()
    return {
        "text.docx": "is neither a folder nor a zip",
        "cut.zip": "cannot be opened as a zip: ",
        "empty.zip": "finetune/adapter_config.json is missing",
        "outside.zip": "finetune/adapter_config.json is missing",
        "links.zip": "a symbolic link",
        "bomb.zip": "would unpack to 50,000,000",
        "deep.zip": "nested too deeply",
        "nan.zip": "NaN is not a JSON number",
        "utf16.zip": "not UTF-8 text",
        "pickle.zip": "not a safetensors file",
        "twice.zip": "2 times in the zip",
        "linked": "a symbolic link",
        "pipe": "not a plain file",
        "pipe.zip": "is neither a folder nor a zip",
        "=cmd()": "is missing",
    }


def test_broken_submissions_are_graded_one_after_the_other(whole, tmp_path, capfd):
    folder, out = tmp_path / "class", tmp_path / "grades"
    folder.mkdir()
    expected = broken_submissions(folder, whole)
    put(folder / "whole", whole)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(ALPACA_EVAL))
    flags = ["--submission", str(folder), "--output_dir", str(out), "--prompts", str(prompts)]
    assert grade.main(flags) == 0
    terminal = capfd.readouterr()
    assert "Traceback" not in terminal.out + terminal.err
    assert terminal.out.splitlines()[-1].startswith(f"{len(expected) + 1} submissions: ")
    grades = {}
    for path in out.glob("submissions/*/grade.json"):
        result = json.loads(path.read_text())
        grades[result["submission"]] = result
    for name, text in expected.items():
        result = grades[name]
        assert any(text in line["reason"] for line in result["criteria"]), (name, result)
        assert result["points"] < 10, name
    with (out / "grades.csv").open() as table:
        rows = {row["submission"]: row for row in csv.DictReader(table)}
    assert len(rows) == len(expected) + 1
    assert rows["whole"]["points"] == "10"
    assert rows["bomb.zip"]["points"] == "8"
    assert rows["utf16.zip"]["problem_1"] == "5"
    assert rows["'=cmd()"]["points"] == "0"
    assert "lora_r=1" in rows["whole"]["for_staff"]
    written = [*out.rglob("*"), *tmp_path.glob("*")]
    assert not [path for path in written if path.name in ("passwd", "finetune", "inference")]


def class_of(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name / "finetune").mkdir(parents=True)
    return folder


def grade_class(folder: Path, *words: str) -> int:
    return grade.main(["--submission", str(folder), "--output_dir", str(folder.parent / "out"), *words])


def test_names_of_submissions_are_only_shown(tmp_path, capsys):
    """Long in bytes, of the table's name, of a part's name, and alike in ASCII."""
    names = ["\u4e2d" * 50, "\u4e2d" * 49, "grades.csv", "finetune", "sglang", "\U0001f600"]
    class_of(tmp_path / "class", names)
    assert grade_class(tmp_path / "class", "--prompts", str(ROOT / "rehearsal/instructions.json")) == 0
    assert "6 submissions: " in capsys.readouterr().out
    with (tmp_path / "out/grades.csv").open() as table:
        told = [row["submission"] for row in csv.DictReader(table)]
    folders = list((tmp_path / "out/submissions").glob("*/grade.json"))
    assert len(told) == len(set(told)) == len(folders) == 6
    assert all(str(path.relative_to(tmp_path)).isascii() for path in folders)
    assert grade.folder_name("..", set()) == "submission"
    assert grade.folder_name("x" * 255, {"x" * 60}) == "x" * 60 + "_2"


def test_one_that_cannot_be_written_does_not_end_the_others(tmp_path, capsys):
    class_of(tmp_path / "class", ["a", "b", "c"])
    put(tmp_path / "out", {"submissions/b": b"a file"})
    assert grade_class(tmp_path / "class", "--prompts", str(ROOT / "rehearsal/instructions.json")) == 2
    assert "1 of 3 could not be graded" in capsys.readouterr().err
    with (tmp_path / "out/grades.csv").open() as table:
        assert [row["submission"] for row in csv.DictReader(table)] == ["a", "b", "c"]


def test_what_is_one_submission(tmp_path, whole):
    assert grade.submissions_in(put(tmp_path / "one", whole | {"README.md": b""})) is None
    assert grade.submissions_in(class_of(tmp_path / "only", ["finetune", "inference"])) is None
    students = class_of(tmp_path / "class", ["finetune", "sglang", "someone"])
    assert len(grade.submissions_in(students)) == 3
    mixed = put(tmp_path / "mixed", whole | {"other.zip": b""})
    assert len(grade.submissions_in(mixed)) == 3
    (tmp_path / "link").symlink_to(students)
    assert len(grade.submissions_in(tmp_path / "link")) == 3


def test_without_alpaca_eval_its_criterion_is_not_judged(whole, tmp_path, monkeypatch, capsys):
    put(tmp_path / "class/whole", whole)
    (tmp_path / "class/rehearsed").symlink_to(REFERENCE)
    put(tmp_path / "class/rehearsed2", {f"inference/{path.name}": path.read_bytes()
                                        for path in (REFERENCE / "inference").iterdir()})  # fmt: skip
    monkeypatch.setattr(grade, "instructions", lambda where: UserError(f"{where} is not in the cache"))
    assert grade_class(tmp_path / "class") == 2
    terminal = capsys.readouterr()
    assert terminal.out.splitlines()[-1].endswith("grades.csv; `instructions` not judged in 1")
    assert terminal.err.endswith("hf download tatsu-lab/alpaca_eval alpaca_eval.json --repo-type dataset\n")
    with (tmp_path / "out/grades.csv").open() as table:
        rows = {row["submission"]: row for row in csv.DictReader(table)}
    assert (rows["whole"]["points"], rows["whole"]["instructions"]) == ("9", "0")
    assert "instructions not judged" in rows["whole"]["for_staff"]
    assert rows["rehearsed2"]["instructions"] == "1"
    for path in ("whole", "rehearsed"):
        (tmp_path / "class" / path).rename(tmp_path / path)
    assert grade_class(tmp_path / "class") == 0


def test_too_much_memory_in_one_part_leaves_the_other(whole, tmp_path, monkeypatch, capfd):
    many = {"inference/outputs_all.json": b"[" + b"[],[]," * 3_000_000 + b"[]]"}
    monkeypatch.setattr(grade, "MEMORY_BYTES", 2**28)
    result = grade.grade_apart(put(tmp_path / "someone", whole | many), ALPACA_EVAL, tmp_path / "out")
    assert result["problem_1"] == 5
    assert result["contradictions"]["2"] == [f"outputs_all.json: {grade.TOO_MUCH}"]
    assert capfd.readouterr() == ("", "")


def test_a_submission_that_needs_too_much_ends_alone(whole, tmp_path, monkeypatch):
    path = put(tmp_path / "someone", whole)
    monkeypatch.setattr(grade, "GRADING_S", 1)
    monkeypatch.setattr(grade, "grade_finetune", lambda _: __import__("time").sleep(60))
    result = grade.grade_apart(path, ALPACA_EVAL, tmp_path / "out")
    assert result["points"] == 0
    assert "could not be graded within 1 s" in result["criteria"][0]["reason"]
    monkeypatch.setattr(grade, "MEMORY_BYTES", 2**28)
    monkeypatch.setattr(grade, "GRADING_S", 60)
    monkeypatch.setattr(grade, "grade_finetune", lambda _: bytearray(2**30))
    result = grade.grade_apart(path, ALPACA_EVAL, tmp_path / "out")
    assert "would be needed to read it" in result["criteria"][0]["reason"]


def test_mistakes_of_staff_are_one_line(tmp_path, capsys):
    inside = put(tmp_path / "submissions", {"someone/finetune/x": b""}) / "someone"
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, message in (([], "name what is to be graded"), (["--submission", "/no"], "no such file or folder"),
                           (["--submission", str(empty)], "an empty folder"),
                           (["--submission", str(REFERENCE), "--prompts", "./no.json"], "--prompts ./no.json: "),
                           (["--submission", str(REFERENCE), "--output_dir", str(REFERENCE / "x")], "must not lie"),
                           (["--submission", str(REFERENCE), "--output_dir", str(ROOT / "handout")], "must not lie"),
                           (["--submission", str(inside), "--output_dir", str(tmp_path)], "would lie among")):  # fmt: skip
        assert grade.main(words) == 2
        assert message in capsys.readouterr().err


# --- fuzzed -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SMALL = [path for path in ("finetune/adapter_config.json", "finetune/run_config.json", "finetune/summary.json",
                           "finetune/metrics.jsonl", "inference/summary.json", "inference/outputs.jsonl",
                           "inference/outputs_all.json")]  # fmt: skip


@pytest.fixture(scope="module")
def small(whole, tmp_path_factory):
    """A submission without an adapter's weight (grading it takes a hundredth of a second)."""
    tensors = {key: value for key, value in adapter_of().items() if ".0." in key or ".1." in key}
    files = whole | {"finetune/adapter_model.safetensors": save(tensors)}
    folder = put(tmp_path_factory.mktemp("small"), files)
    return folder, files, grade.grade(folder, ALPACA_EVAL)["points"]


def leaves(value: object, at: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in leaves(item, (*at, key)))]


@settings(max_examples=120)
@given(data=st.data())
def test_no_value_in_a_file_makes_the_grader_fail(small, data):
    """One value anywhere, replaced by any other; points are never more than before."""
    folder, files, before = small
    path = data.draw(st.sampled_from(SMALL))
    text = files[path].decode()
    value = [json.loads(line) for line in text.splitlines()] if path.endswith("l") else json.loads(text)
    value = copy.deepcopy(value[:20] if isinstance(value, list) else value)
    places = [place for place in leaves(value) if place]
    *outer, last = data.draw(st.sampled_from(places))
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
    for line in result["criteria"]:
        assert line["reason"].isprintable()


@settings(max_examples=120)
@given(content=st.binary(max_size=200), path=st.sampled_from([*SMALL, "finetune/adapter_model.safetensors"]),
       at=st.floats(0, 1))  # fmt: skip
def test_no_bytes_make_the_grader_fail(small, content, path, at):
    """A file overwritten from somewhere on."""
    folder, files, _ = small
    start = int(at * len(files[path]))
    (folder / path).write_bytes(files[path][:start] + content)
    try:
        grade.grade(folder, ALPACA_EVAL)
    finally:
        (folder / path).write_bytes(files[path])


def test_no_depth_makes_the_grader_fail(small):
    """Around the depth where reading still works and showing no longer does."""
    folder, files, _ = small
    path = folder / "finetune/summary.json"
    summary = json.loads(files["finetune/summary.json"])
    try:
        for levels in range(800, 1000):
            text = json.dumps(summary | {"gpu_name": "DEEP"}).replace('"DEEP"', "[" * levels + "]" * levels)
            path.write_text(text)
            grade.grade(folder, ALPACA_EVAL)
    finally:
        path.write_bytes(files["finetune/summary.json"])


@settings(max_examples=80)
@given(at=st.floats(0, 1), content=st.binary(min_size=1, max_size=40))
def test_no_damaged_zip_makes_the_grader_fail(small, tmp_path_factory, at, content):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzzed.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in small[1].items():
            archive.writestr(name, file[:2000])
    whole = path.read_bytes()
    start = int(at * len(whole))
    path.write_bytes(whole[:start] + content + whole[start + len(content) :])
    grade.grade(path, ALPACA_EVAL)


@pytest.mark.parametrize("text", ["[" * 10**5, "1e999", "-Infinity", "1" * 5000, '{"a": 1', "\ufeff{}", ""])
def test_json_that_is_not_json_is_refused(text):
    with pytest.raises(Refused, match="x"):
        parse(text, "x")


def test_bf16_adapters_are_read(tmp_path):
    import struct

    values = np.array([1.5, -2.0], np.float32)
    data = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + data
    )
    assert Submission(tmp_path).tensors("finetune", "adapter_model.safetensors")["x"].tolist() == [1.5, -2.0]


def test_the_checker_survives_what_a_student_may_write(tmp_path):
    path = tmp_path / "outputs.jsonl"
    path.write_text("[" * 10**5 + "\n" + "1" * 5000 + "\n")
    (tmp_path / "summary.json").write_text("[" * 10**5)
    found = check_outputs.check(path, 2)
    assert sum("not valid JSON" in problem for problem in found["problems"]) == 2
