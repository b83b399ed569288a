"""The README cannot drift: its commands, flags, files and numbers exist."""

import json
import re
from dataclasses import fields

import constrained_lab
import radix_lab

from batch_infer.arguments import Arguments as Inference
from harness import ROOT
from lora_sft.arguments import CHANGED_FLAGS, Arguments

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_make_targets_exist():
    targets = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, re.M))
    assert {"rehearse", "test", "install", "install-v100", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_flags_exist():
    programs = (Arguments, Inference, radix_lab.Flags, constrained_lab.Flags)
    ours = {entry.name for program in programs for entry in fields(program)} | {"adapter"}
    slurm = {"gres", "mem", "time", "signal", "no", "host"}  # pip's --no-deps, sglang serve's --host
    for name in re.findall(r"--([a-z0-9_]+)", README):
        assert name in ours | slurm | set(CHANGED_FLAGS), name


def test_files_exist():
    for name in re.findall(
        r"\b((?:deepspeed|sglang|common|bench|rehearsal|tests|handout)/[\w./-]+\.(?:sh|py|json|jsonl|txt))",
        README,
    ):
        assert (ROOT / name).exists() or "/outputs" in name, name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_starters_flags_are_those_of_the_program():
    table = README.split("## From the starter")[1].split("##")[0]
    for line in table.splitlines():
        cells = line.split("|")
        if len(cells) > 2:
            for name in re.findall(r"--([a-z_]+)", cells[1]):
                assert name in CHANGED_FLAGS, name


def test_knob_table_has_the_values_of_the_file():
    config = json.loads((ROOT / "deepspeed" / "zero3.json").read_text())
    zero = config["zero_optimization"]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README, re.M))
    for name, text in rows.items():
        number = re.match(r"([\d,]+)(?: (M))? elements", text)
        if number:
            assert zero[name] == int(number[1].replace(",", "")) * (10**6 if number[2] else 1), name
    assert {name for name in rows if name.startswith("stage3")} == {
        name for name in zero if name.startswith("stage3")
    }
    assert (
        f"| `fp16.initial_scale_power`, `hysteresis` | {config['fp16']['initial_scale_power']}, 2 |" in README
    )


def test_error_texts_of_the_troubleshooting_table_are_the_programs():
    source = "".join(path.read_text() for path in ROOT.glob("[cds]*/**/*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = README.split("## Troubleshooting")[1].split("##")[0]
    foreign = ("module 'deepspeed' has no attribute", "Connection reset by peer")  # Python's and gloo's
    for text in re.findall(r"^\| `([^`]+)`", table, re.M):
        if text in foreign:
            continue
        for part in re.split(r"\.\.\.|\b\d+(?:\.\d+)*\b", text):
            part = part.strip(" ()")
            assert part in source, part
