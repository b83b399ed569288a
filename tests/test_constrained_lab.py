"""constrained_lab.py: the automaton is right before and after compression, and its figure can be read."""

import itertools
import json
import re

import constrained_lab
import pytest
from fsm_figure import Automaton, automaton, compress, draw, draw_both

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
    ("flags", "message"),
    [
        (["--regex", "("], "--regex '(': cannot be parsed"),
        (["--regex", "[ab]{70}"], "at most 60 can be drawn"),
        (["--device", "tpu"], "--device tpu: choose cuda or cpu"),
        (["--engine_args", '{"grammar_backend": "outlines"}'], "--jump_forward works with grammar_backend"),
        (["--draw"], "did you mean --draw_only?"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, message):
    assert constrained_lab.main(["--draw_only", *flags, "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# --- the Runtime --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(runtime, tiny_qwen2, tmp_path_factory) -> dict:
    """The lab with two engines, one schema and two lengths of forced runs."""
    folder = tmp_path_factory.mktemp("lab")

    def run() -> int:
        constrained_lab.MODES = (("llguidance", False), ("llguidance", True))
        constrained_lab.SCHEMAS = {"three_long_keys": constrained_lab.SCHEMAS["three_long_keys"]}
        constrained_lab.CONCURRENCY, constrained_lab.RUN_LENGTHS = (1, 4), (0, 8)
        return constrained_lab.main(["--output_dir", str(folder), "--model_path", str(tiny_qwen2)])

    code, text = fork(run, folder / "terminal.txt").wait()
    assert code == 0, text
    result = json.loads((folder / "constrained_lab.json").read_text())
    return {"folder": folder, "text": text} | result


def test_jump_forward_saves_passes_and_every_answer_stays_valid(lab):
    rows = {(row["backend"], row["jump_forward"], row["concurrency"]): row for row in lab["rows"]}
    assert len(rows) == 3 * 2
    for count in (1, 4):
        plain, jumping = (rows["llguidance", jumps, count] for jumps in (False, True))
        assert 3 * jumping["forward_passes"] <= plain["forward_passes"]
        assert plain["valid_share"] == jumping["valid_share"] == 1
        assert jumping["forced_share"] > 0.8
        assert rows["none", False, count]["valid_share"] == 0


def test_longer_forced_runs_save_more_passes(lab):
    passes = {
        (row["forced_characters"], row["jump_forward"]): row["forward_passes"] for row in lab["break_even"]
    }
    saved = {length: passes[length, False] / passes[length, True] for length in (0, 8)}
    assert saved[8] > 1.5 * saved[0]


def test_files_and_names_of_the_results(lab):
    names = {"fsm", "rows", "break_even", "settings", "versions", "commit", "hardware", "wall_s"}
    assert names <= lab.keys()
    for name in ("fsm.png", "fsm.svg", "constrained_lab.png", "break_even.png"):
        assert (lab["folder"] / name).stat().st_size > 5000, name
    assert "llguidance + jump-forward" in lab["text"]
