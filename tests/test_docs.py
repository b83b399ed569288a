"""README, docs/ and the assignment cannot drift: what they name exists, what they count and quote is true."""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from batch_infer.arguments import Arguments as Inference
from lora_sft.arguments import CHANGED_FLAGS
from lora_sft.arguments import Arguments as Training

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "handout" / "ASSIGNMENT.md"]
README = PAGES[0].read_text()
# Slurm's, pip's --no-deps, sglang serve's --host
OTHERS = {"gres", "mem", "time", "signal", "array", "ntasks", "wait", "no", "host"}
FOREIGN = ("module 'deepspeed' has no attribute", "Connection reset by peer")  # Python's and gloo's
LINK = re.compile(r"\]\(([^)\s]+)\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def words(text: str) -> list[str]:
    """As a reader sees them: no link targets, no table rules, no HTML."""
    return re.findall(r"\S*\w\S*", re.sub(r"\]\([^)]*\)|<[^>]*>|\|", " ", text))


def source(*patterns: str) -> str:
    text = "\n".join(path.read_text() for pattern in patterns for path in sorted(ROOT.glob(pattern)))
    return re.sub(r'"\s*\n\s*f?"', "", text)  # texts that are written in pieces


def anchors(page: Path) -> set[str]:
    """GitHub's ids of a page's headings, and the page's own."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    ids = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return ids | set(re.findall(r'<a id="([^"]+)">', text))


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table below a heading of docs/`page`, without its first row."""
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# --- README --------------------------------------------------------------------------------------------


def test_readme_is_one_page():
    assert len(words(README)) < 1000
    assert len(README.splitlines()) <= 125


def test_first_command_comes_within_80_words():
    assert len(words(README.split("make rehearse")[0])) < 80


def test_line_counts_of_the_reading_list_are_true():
    listed = re.findall(r"^\d\. \[`[^`]+`\]\(([^)]+)\) \((\d+) lines\)", README, re.M)
    assert len(listed) == 12
    true = {path: len((ROOT / path).read_text().splitlines()) for path, _ in listed}
    wrong = [f"{path} ({true[path]} lines), not {said}" for path, said in listed if int(said) != true[path]]
    assert not wrong, "README's reading list must say: " + "; ".join(wrong)


def test_readme_has_three_figures_and_each_is_its_rows():
    results = (ROOT / "docs" / "results.md").read_text()
    table = re.findall(r"^\| .*?\]\(docs/results\.md#([\w-]+)\).*\| ([^|]+) \|$", README, re.M)
    assert len(table) == 3
    for anchor, figure in table:
        row = next(line for line in results.splitlines() if f'<a id="{anchor}">' in line)
        assert f"| {figure} |" in row, anchor


# --- every page ----------------------------------------------------------------------------------------


@every_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z0-9-]+)", page.read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@every_page
def test_flags_exist(page):
    ours = {entry.name for program in (Training, Inference) for entry in fields(program)}
    tools = source("sglang/labs/*.py", "sglang/*.py", "deepspeed/*.py", "bench/*.py", "handout/*.py")
    ours |= set(re.findall(r"^    (\w+): [\w |]+ = ", tools, re.M)) | set(re.findall(r'"--(\w+)"', tools))
    for name in re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text()):
        assert name in ours | OTHERS | set(CHANGED_FLAGS), name


@every_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert "://" in link or target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_of_the_repository_exist(page):
    folders = "deepspeed|sglang|common|bench|rehearsal|tests|handout|docs"
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]+\.(?:sh|py|jsonl?|txt|md))", page.read_text()):
        assert (ROOT / name).exists() or "/outputs" in name, name


@every_page
def test_arguments_of_the_benches_are_their_rows(page):
    for script, given in re.findall(r"python (bench/\w+\.py)((?: [a-z]\w+)*)", page.read_text()):
        text = (ROOT / script).read_text()
        for name in given.split():
            kind = re.sub(r"\d+$", "", name)  # fresh_2, batches_64
            assert re.search(rf"\b{kind}", text), f"{script} {name}"


# --- single pages --------------------------------------------------------------------------------------


def test_the_knob_table_is_zero3_json():
    config = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    zero, fp16 = config["zero_optimization"], config["fp16"]
    table = {
        re.sub("`", "", row[0]): row[1] for row in rows("fine-tuning.md", "What each knob of `zero3.json` does")
    }
    for name, text in table.items():
        if number := re.match(r"([\d,]+)(?: (M))? elements", text):
            assert zero[name] == int(number[1].replace(",", "")) * (10**6 if number[2] else 1), name
        elif text in ("true", "false"):
            assert zero[name] is json.loads(text), name
    assert {name for name in table if name.startswith("stage3")} == {n for n in zero if n.startswith("stage3")}
    assert table["leaf_module.classes"] == f"`{zero['leaf_module']['classes'][0]}`"
    assert (
        table["fp16.initial_scale_power, hysteresis"] == f"{fp16['initial_scale_power']}, {fp16['hysteresis']}"
    )


def test_the_starters_flags_are_those_that_the_program_refuses():
    names = re.findall(r"--(\w+)", " ".join(row[0] for row in rows("fine-tuning.md", "From the starter")))
    assert names
    assert set(names) <= set(CHANGED_FLAGS)


@pytest.mark.parametrize("page", ["fine-tuning.md", "inference.md"])
def test_quoted_errors_are_the_programs(page):
    programs = source("common/**/*.py", "deepspeed/**/*.py", "sglang/**/*.py")
    quoted = [row[0].split("`")[1] for row in rows(page, "Troubleshooting")]
    assert len(quoted) > 10
    for text in set(quoted) - set(FOREIGN):
        for part in re.split(r"\.\.\.|\b\d+(?:\.\d+)*\b", text):
            assert part.strip(" ()") in programs, text


def numbers(entry: object) -> list[float]:
    """All numbers of a JSON document."""
    if isinstance(entry, dict | list):
        return [n for value in (entry.values() if isinstance(entry, dict) else entry) for n in numbers(value)]
    return [entry] if isinstance(entry, int | float) else []


@pytest.mark.parametrize("heading", ["Fine-tuning", "Inference", "The same bytes", "The labs"])
def test_every_figure_is_in_the_json_of_its_commit(heading):
    for claim, figure, commit, *_ in rows("results.md", heading):
        name, path = re.fullmatch(r"\[([0-9a-f]{7})\]\(\.\./(bench/results/[\w/.]+\.json)\)", commit).groups()
        text = (ROOT / path).read_text()
        assert re.search(rf'"commit": "{name}', text), claim
        said = re.match(r"[\d,.]+", figure)[0].replace(",", "")
        decimals = len(said.partition(".")[2])
        assert any(round(n, decimals) == float(said) for n in numbers(json.loads(text))), claim


def lab(name: str) -> list[dict]:
    return json.loads((ROOT / "bench" / "results" / "labs" / f"{name}.json").read_text())["rows"]


def test_hit_rates_of_the_radix_page_are_measured():
    found = lab("radix_lab")
    for workload, fcfs, interleaved, lpm, planned, optimum in rows("radix-attention.md", "Order decides"):
        mine = [row for row in found if row["workload"] == workload.split(":")[0] and row["pool"] == "longest"]
        orders = {"fcfs": [], "interleaved": [], "lpm": [], "planned": []}
        for row in mine:
            worst = row["policy"] == "fcfs" and row["arrival_order"] == "interleaved"
            if worst or (row["policy"] in orders and row["arrival_order"] != "interleaved"):
                orders["interleaved" if worst else row["policy"]].append(100 * row["hit_rate"])
        for said, measured in zip((fcfs, interleaved, lpm, planned), orders.values(), strict=True):
            assert f"{statistics.mean(measured):.1f} %" == re.match(r"[\d.]+ %", said.strip("*"))[0], workload
        assert optimum == f"{100 * mine[0]['optimum_hit_rate']:.1f} %", workload


@pytest.mark.parametrize(("name", "columns"), [("constrained_lab", (4, 7)), ("constrained_lab_h200", (5, 8))])
def test_the_table_of_jump_forward_is_measured(name, columns):
    found = {(row["schema"], row["concurrency"], row["backend"], row["jump_forward"]): row for row in lab(name)}
    for cells in rows("jump-forward.md", "What it saves"):
        for backend, column in zip(("xgrammar", "llguidance"), columns, strict=True):
            without, jumping = (found[cells[0], int(cells[2]), backend, jump] for jump in (False, True))
            decimals = len(cells[column].partition(".")[2])
            assert round(without["seconds"] / jumping["seconds"], decimals) == float(cells[column]), cells
            if name == "constrained_lab":  # passes are those of the CPU
                passes = f"{without['forward_passes']} → {jumping['forward_passes']}"
                assert passes == cells[column - 1], cells


def test_every_hook_of_the_plugins_is_listed_with_a_test_that_exists():
    page = (ROOT / "docs" / "internals.md").read_text()
    plugins = source("sglang/runtime_plugins/*.py")
    targets = re.findall(r'hook\(\s*f?"[\w.{}]*?([\w]+)"', plugins)
    assert len(targets) > 10
    for target in targets:
        assert target in page, target
    for test in re.findall(r"`(test_\w+)`", page):
        assert f"def {test}(" in source("tests/*.py"), test


def test_the_tables_of_scale_are_what_the_script_prints():
    printed = subprocess.run(
        [sys.executable, ROOT / "bench" / "scale.py"], capture_output=True, text=True, check=True
    )
    pages = (ROOT / "docs" / "fine-tuning.md").read_text() + (ROOT / "docs" / "inference.md").read_text()
    tables = printed.stdout.strip().split("\n\n")
    assert len(tables) == 2
    assert all(f"\n{table}\n" in pages for table in tables)
