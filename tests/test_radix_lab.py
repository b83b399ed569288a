"""radix_lab.py on the real Runtime: the planned order reaches the optimum, and the figures show the live tree."""

import itertools
import json
import random
import re
import subprocess
import sys

import pytest
import radix_figure
import radix_lab
import radix_results
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import ROOT, fork

SEEDS = 2


def ids(*parts: tuple[int, int]) -> list[int]:
    """Token ids: each part is (a seed, how many)."""
    return [t for seed, n in parts for t in (random.Random(seed).randrange(300, 900) for _ in range(n))]


FEW_SHOT = [[ids((h, 50), (100 + h * 9 + q, 20))] for h in range(3) for q in range(3)]
PLANS = [ids((h, 30), (10 + h * 9 + p, 20)) for h in range(2) for p in range(2)]
TREE = [[plan + ids((100 + n * 9 + k, 20) if k else (0, 0))] for n, plan in enumerate(PLANS) for k in range(3)]
# Two equal prompts, and one that is a prefix of another: 12 different orders.
FOUR = [[ids((1, 40))], [ids((1, 40), (2, 30))], [ids((3, 60))], [ids((3, 60))]]
WORKLOADS = [
    radix_lab.Workload("few_shot", FEW_SHOT, 3),
    radix_lab.Workload("tree_of_thoughts", TREE, 2),
    radix_lab.Workload("four", FOUR, 4),
]


class EveryOrder(radix_lab.Workload):
    """Arrives in every order, the sorted one first, under the names of random ones."""

    def arrival_orders(self, seeds: int) -> dict[str, radix_lab.Workload]:
        orders = dict.fromkeys(json.dumps(o) for o in itertools.permutations(sorted(self.conversations)))
        names = ("interleaved", *(f"seed {n}" for n in range(len(orders))))
        return {
            name: radix_lab.replace(self, conversations=json.loads(order))
            for name, order in zip(names, orders, strict=False)
        }


@pytest.fixture(scope="module")
def lab(runtime, tiny_qwen2, tmp_path_factory) -> dict:
    """The lab with small workloads and one engine, whose pool holds the longest request only."""
    folder = tmp_path_factory.mktemp("lab")

    def run() -> int:
        *small, four = WORKLOADS
        four = EveryOrder(four.name, four.conversations, four.groups)
        radix_lab.build_workloads = lambda *_: [*small, four]
        radix_lab.SETTINGS, radix_lab.SEEDS = [radix_lab.Setting(pool="longest")], SEEDS
        steps = radix_figure.steps

        def remember(events: list[dict]):
            (folder / "events.json").write_text(json.dumps(events))
            return steps(events)

        radix_figure.steps = remember
        return radix_lab.main(["--output_dir", str(folder), "--model_path", str(tiny_qwen2)])

    code, text = fork(run, folder / "terminal.txt").wait()
    assert code == 0, text
    rows = json.loads((folder / "radix_lab.json").read_text())["rows"]
    return {
        "folder": folder,
        "text": text,
        "rows": {(row["workload"], row["arrival_order"], row["policy"]): row for row in rows},
        "events": json.loads((folder / "events.json").read_text()),
    }


# --- numbers ------------------------------------------------------------------------------------------


def test_the_best_of_all_orders_on_the_runtime_is_the_optimum(lab):
    rows = [row for (name, _, policy), row in lab["rows"].items() if (name, policy) == ("four", "fcfs")]
    rates = [row["hit_rate"] for row in rows]
    assert len(rates) == 12
    assert max(rates) == rows[0]["optimum_hit_rate"]
    assert min(rates) < max(rates) / 2
    assert rates[0] == max(rates)  # the sorted one


@pytest.mark.parametrize("workload", ["few_shot", "tree_of_thoughts", "four"])
def test_the_planned_order_reaches_the_optimum_from_every_arrival_order(lab, workload):
    planned, fcfs = (
        {
            order: row
            for (name, order, policy), row in lab["rows"].items()
            if (name, policy) == (workload, wanted)
        }
        for wanted in ("planned", "fcfs")
    )
    assert len(planned) == (12 if workload == "four" else 1 + SEEDS)
    assert all(row["hit_rate"] == row["optimum_hit_rate"] > 0.4 for row in planned.values())
    if workload != "four":
        assert fcfs["interleaved"]["hit_rate"] < 0.05
        mean = sum(row["hit_rate"] for order, row in fcfs.items() if order != "interleaved") / SEEDS
        assert mean < 0.7 * planned["interleaved"]["hit_rate"]


def test_files_and_the_names_of_a_row(lab):
    names = {
        *(
            "workload",
            "radix_cache",
            "policy",
            "eviction",
            "pool",
            "pool_tokens",
            "hit_rate",
            "optimum_hit_rate",
        ),
        *("requests", "prompt_tokens", "prefill_tokens", "seconds", "arrival_order", "ttft_p50_s"),
        "output_tokens_per_s",
    }
    assert all(row.keys() == names for row in lab["rows"].values())
    for name in ("radix_lab.png", "radix_tree.svg", "radix_steps.svg"):
        assert (lab["folder"] / name).stat().st_size > 10_000
        assert name in lab["text"]


def test_ratios_compare_the_planned_order_with_no_radix_cache():
    import pandas

    rows = [
        {"workload": "chats", "arrival_order": order, "pool": "all", "policy": policy, "radix_cache": cache}
        | {"output_tokens_per_s": rate, "ttft_p50_s": 1 / rate}
        for order, factor in (("interleaved", 7), ("seed 0", 1), ("seed 1", 1))
        for policy, cache, rate in (
            ("fcfs", False, 10),
            ("fcfs", True, 20 * factor),
            ("planned", True, 40 * factor),
        )
    ]
    ratios = radix_results.on_against_off(pandas.DataFrame(rows))
    assert ratios == {"chats": {"throughput_ratio": 4, "ttft_ratio": 0.25}}


# --- the live tree ------------------------------------------------------------------------------------


def test_the_trace_shows_insertion_hit_and_eviction(lab):
    prefills = [event for event in lab["events"] if event["event"] == "prefill"]
    first, second, *others = prefills
    assert [event["cached_tokens"] for event in (first, *others)] == [0, 0, 0]
    [node] = first["nodes"]
    assert node["in_use"]
    assert len(node["token_ids"]) == first["prompt_tokens"]
    shared = node["token_ids"][: second["cached_tokens"]]
    split = {tuple(node["token_ids"]): node["in_use"] for node in second["nodes"]}
    assert len(shared) > 50
    assert split[tuple(shared)] is True  # the node was split where the prompts part
    assert split[tuple(node["token_ids"])] is False
    evicted = [path for event in lab["events"] for path in event.get("evicted", ())]
    assert evicted[0][: first["prompt_tokens"]] == node["token_ids"]  # the least recently used leaf goes first
    for event in lab["events"]:
        live = [tuple(node["token_ids"]) for node in event["nodes"]]
        assert len(live) == len(set(live))
        assert radix_figure.kv_tokens(event["nodes"]) <= radix_lab.PICTURE_POOL_TOKENS


def test_the_steps_of_the_live_run_are_drawn(lab):
    panels = radix_figure.steps(lab["events"])
    assert [re.sub(r"\d+", "#", title.split(":")[0]) for title, _ in panels] == [
        *("#. Insert", "#. Hit", "#. Another prefix", "#. The pool is full")
    ]
    assert overlaps(radix_figure.figure_of(panels, lambda tokens: "word " * len(tokens))) == []
    drawn = (lab["folder"] / "radix_steps.svg").read_text()
    assert all(title in drawn for title, _ in panels)
    assert "evicted 1." in drawn


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes meet, as matplotlib draws them."""
    renderer = figure.canvas.get_renderer()
    texts = [text for axis in figure.axes for text in axis.texts] + list(figure.texts)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.x1 <= figure.bbox.x1, label
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_labels_of_20_requests_do_not_overlap(seed):
    import matplotlib.pyplot as plt

    draw = random.Random(seed)
    headers = [[1000 + h] * draw.randint(1, 80) for h in range(draw.randint(1, 5))]
    leaves = [draw.choice(headers) + [n] * draw.randint(1, 60) for n in range(20)]
    nodes = [{"token_ids": path, "in_use": draw.random() < 0.3} for path in (*headers, *leaves)]
    last = {"nodes": nodes, "evicted": [leaves[0] + [7, 7], [9, 9, 9]]}
    figure = radix_figure.figure_of([("A title", [last])], lambda tokens: "Ŵord$_{x}\n" * len(tokens))
    assert overlaps(figure) == []
    plt.close(figure)


# --- the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device tpu: choose cuda or cpu"),
        (["--scale", "0"], "--scale 0: must be at least 1"),
        (["--device", "cuda"], "--device cuda needs a --model_path"),
        (["--prompts", "/nowhere.json"], "/nowhere.json"),
        (["--ful"], "did you mean --full?"),
        (["--engine_args", "{bad"], "--engine_args, column 2: not valid JSON"),
        (["--engine_args", '{"schedule_policy": "lpm"}'], "the grid sets schedule_policy"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    assert radix_lab.main([*flags, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.long
def test_the_default_run_shows_what_the_radix_cache_saves(tmp_path):
    command = [sys.executable, str(ROOT / "sglang" / "labs" / "radix_lab.py"), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "radix_lab.json").read_text())
    assert result["wall_s"] < 240
    for row in result["rows"]:
        if row["policy"] == "planned" and row["workload"] != "chats":
            assert row["hit_rate"] == row["optimum_hit_rate"], row
    few_shot = result["on_against_off"]["few_shot"]
    assert few_shot["throughput_ratio"] >= 3
    assert few_shot["ttft_ratio"] <= 0.5
