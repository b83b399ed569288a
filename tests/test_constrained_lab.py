"""constrained_lab.py: the automaton is right before and after compression, and its figure can be read."""

import itertools
import json
import re

import pytest

from batch_infer.fsm_figure import Automaton, automaton, compress, draw, draw_both
from harness import fork

REGEXES = (
    r'\{"on": (true|false), "colour": "(red|green)"\}',
    "abc(def)?",
    "a|bcd",
    "(ab)*c",
    "x[0-9]{2}-(19|20)[0-9]",
    r"The answer is (yes|no|maybe)\.",
    "a+b",
)


def accepts(found: Automaton, text: str) -> bool:
    """Follows literal labels as texts and [..] labels as regular expressions."""
    states = {(0, "")}
    seen = set()
    while states:
        state, read = states.pop()
        seen.add((state, read))
        if read == text and state in found.finals:
            return True
        for edge in found.edges:
            rest = text[len(read) :]
            size = len(edge.label) if edge.literal else 1
            fits = rest.startswith(edge.label) if edge.literal else re.fullmatch(edge.label, rest[:1])
            if edge.source == state and fits and (step := (edge.target, text[: len(read) + size])) not in seen:
                states.add(step)
    return False


@pytest.mark.parametrize("regex", REGEXES)
def test_both_automata_accept_what_the_regex_accepts(regex):
    before = automaton(regex)
    after = compress(before)
    assert len(after.states) <= len(before.states)
    alphabet = sorted({c for edge in before.edges if edge.literal for c in edge.label} | {"7"})
    words = {"".join(word) for size in range(4) for word in itertools.product(alphabet[:8], repeat=size)}
    words |= {"abcdef", "abc", "abcd", "bcd", "ababc", "abab", "x12-203", "x12-183", "The answer is maybe."}
    words |= {
        '{"on": true, "colour": "red"}',
        '{"on": false, "colour": "green"}',
        '{"on": yes, "colour": "red"}',
    }
    for word in words:
        wanted = re.fullmatch(regex, word) is not None
        assert accepts(before, word) == accepts(after, word) == wanted, word


def test_compression_merges_the_only_ways_on():
    after = compress(automaton("abc(def)?"))
    assert sorted(edge.label for edge in after.edges) == ["abc", "d", "ef"]  # "abc" may be all
    assert len(after.states) == 4
    labels = [edge.label for edge in compress(automaton("x[0-9]{2}-(19|20)[0-9]")).edges]
    assert "x" in labels  # a set of characters forces nothing, and ends a run
    assert labels.count("[0-9]") == 3


@pytest.mark.parametrize("regex", REGEXES)
def test_no_label_covers_another_or_a_state(regex):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Circle

    for found in (automaton(regex), compress(automaton(regex))):
        figure, axis = plt.subplots(figsize=(20, 4))
        labels = draw(found, axis)
        assert len(labels) == len(found.edges)
        boxes = [label.get_window_extent() for label in labels]
        for one, two in itertools.combinations(boxes, 2):
            assert not one.overlaps(two)
        circles = [patch.get_window_extent() for patch in axis.patches if isinstance(patch, Circle)]
        assert not any(box.overlaps(circle) for box in boxes for circle in circles)
        plt.close(figure)


def test_figures_and_counts(tmp_path):
    found = draw_both(REGEXES[0], tmp_path)
    assert found["states_before"] > 3 * found["states_after"]
    assert '{"on": ' in found["forced_texts"]
    assert (tmp_path / "fsm.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "fsm.svg").read_text()


@pytest.mark.parametrize(
    ("regex", "message"), [("(", "cannot be parsed"), ("[ab]{70}", "at most 60 can be drawn")]
)
def test_bad_regexes_are_one_line(tmp_path, capsys, regex, message):
    import constrained_lab

    assert constrained_lab.main(["--draw_only", "--regex", regex, "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.long
def test_the_lab_measures_and_plots(runtime, tiny_qwen2, tmp_path):
    import constrained_lab as lab

    from batch_infer.engine import fork_engine_processes

    def run() -> int:
        fork_engine_processes()
        lab.CONCURRENCY, lab.RUN_LENGTHS = (1, 4), (0, 8)
        lab.SCHEMAS = {name: lab.SCHEMAS[name] for name in ("free_text", "three_long_keys")}
        return lab.main(["--output_dir", str(tmp_path / "lab"), "--model_path", str(tiny_qwen2)])

    code, text = fork(run, tmp_path / "terminal.txt").wait()
    assert code == 0, text
    result = json.loads((tmp_path / "lab" / "constrained_lab.json").read_text())
    assert {
        "fsm",
        "rows",
        "break_even",
        "settings",
        "versions",
        "commit",
        "hardware",
        "wall_s",
    } <= result.keys()
    rows = {(r["schema"], r["backend"], r["jump_forward"], r["concurrency"]): r for r in result["rows"]}
    assert len(rows) == 2 * 5 * 2
    for backend, count in itertools.product(("xgrammar", "llguidance"), (1, 4)):
        plain, jumping = (rows["three_long_keys", backend, jumps, count] for jumps in (False, True))
        assert 3 * jumping["forward_passes"] <= plain["forward_passes"]
        assert plain["valid_share"] == jumping["valid_share"] == 1
        assert jumping["forced_share"] > 0.8
    for name in ("fsm.png", "fsm.svg", "constrained_lab.png", "break_even.png"):
        assert (tmp_path / "lab" / name).stat().st_size > 5000, name
