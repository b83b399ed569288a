"""The radix tree as a figure, from what runtime_plugins/radix_trace.py wrote."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LABEL_CHARACTERS = 44
POINTS = 7.0
CHARACTER_INCHES = 0.66 * POINTS / 72  # 0.6 for most monospaced fonts, and room for hinting
ROW_INCHES, GAP_INCHES, TITLE_INCHES = 0.27, 0.45, 0.3
STATES = {  # colour, line, what it means
    "in use": ("#1a7f37", "-", "a running request holds it"),
    "cached": ("#1f5fa8", "-", "cached"),
    "evicted": ("#9a9a9a", "--", "evicted, in this order"),
}

Tokens = tuple[int, ...]
Panel = tuple[str, list[dict]]  # a title, and the events until the moment that is shown
Decode = Callable[[list[int]], str]


class Edge(NamedTuple):
    start: tuple[float, float]  # inches; the root is at x = 0
    end: tuple[float, float]
    state: str
    label: str


# --- which moments ------------------------------------------------------------------------------------


def live_tree(events: list[dict]) -> list[Panel]:
    """The moment of the last prefill: requests run, and what was evicted so far is known."""
    prefills = [n for n, event in enumerate(events) if event["event"] == "prefill"]
    nodes = events[prefills[-1]]["nodes"]
    title = f"after {len(prefills)} requests: {len(nodes)} nodes, {kv_tokens(nodes)} tokens of KV"
    return [(f"The scheduler's radix tree {title}", events[: prefills[-1] + 1])]


def steps(events: list[dict]) -> list[Panel]:
    """Insertion, hit, a branch of its own, and the eviction that makes room for the fourth request."""
    prefills = [n for n, event in enumerate(events) if event["event"] == "prefill"]
    titles = []
    for name, n in zip(("Insert", "Hit", "Another prefix"), prefills, strict=False):
        cached = events[n]["cached_tokens"]
        titles.append(f"{name}: {cached} tokens from the tree, {events[n]['prompt_tokens'] - cached} computed")
    leaves = sum(len(event.get("evicted", ())) for event in events[: prefills[3]])
    found = f"the {leaves} least recently used leaves are evicted for a request without a match"
    titles.append(f"The pool is full: {found}")
    return [(f"{i + 1}. {title}", events[: prefills[i] + 1]) for i, title in enumerate(titles)]


def kv_tokens(nodes: list[dict]) -> int:
    """Tokens that the tree holds."""
    paths = [tuple(node["token_ids"]) for node in nodes]
    return len({path[: n + 1] for path in paths for n in range(len(path))})


# --- the figure ---------------------------------------------------------------------------------------


def collect(events: list[dict]) -> dict[Tokens, tuple[str, int]]:
    """(state, number) of each node by its token ids from the root: the tree of the last event, and what was
    evicted on the way there and has not come back, numbered in the order of eviction."""
    live = {tuple(n["token_ids"]): ("in use" if n["in_use"] else "cached", 0) for n in events[-1]["nodes"]}
    gone: dict[Tokens, None] = {}
    for tokens in (tuple(tokens) for event in events for tokens in event.get("evicted", ())):
        gone.pop(tokens, None)  # it had come back
        gone[tokens] = None
    still = [tokens for tokens in gone if not any(node[: len(tokens)] == tokens for node in live)]
    return live | {tokens: ("evicted", number) for number, tokens in enumerate(still, 1)}


def edge_label(text: str, tokens: int, evicted: int) -> str:
    """The text of an edge, shortened in its middle, and its number of tokens."""
    shown = text.replace("\n", "↵").replace("$", r"\$")
    shown = "".join(c if (c.isprintable() and ord(c) < 0x250) or c == "↵" else "·" for c in shown)
    if len(shown) > LABEL_CHARACTERS:
        half = LABEL_CHARACTERS // 2 - 1
        shown = f"{shown[:half]} … {shown[-half:]}"
    return f"{shown} ({tokens}{f', evicted {evicted}.' if evicted else ''})"


def place(nodes: dict[Tokens, tuple[str, int]], decode: Decode) -> list[Edge]:
    """The tree from left to right, a leaf per row, so far apart that no two labels meet."""
    parent: dict[Tokens, Tokens] = {}
    level, label, widths = {(): 0}, {}, [0.0]
    for tokens in sorted(nodes):  # parents come first
        above = parent[tokens] = max((t for t in level if tokens[: len(t)] == t), key=len)
        new = list(tokens[len(above) :])
        label[tokens] = edge_label(decode(new), len(new), nodes[tokens][1])
        level[tokens] = level[above] + 1
        widths += [0.0] * (level[tokens] == len(widths))
        widths[level[tokens]] = max(widths[level[tokens]], GAP_INCHES + len(label[tokens]) * CHARACTER_INCHES)
    x = list(itertools.accumulate(widths))
    y: dict[Tokens, float] = {}
    rows = itertools.count()
    for tokens in sorted(level, reverse=True):  # children come first
        below = [y[child] for child in y if parent[child] == tokens]
        y[tokens] = (min(below) + max(below)) / 2 if below else -next(rows) * ROW_INCHES
    at = {tokens: (x[level[tokens]], y[tokens]) for tokens in level}
    return [Edge(at[above], at[t], nodes[t][0], label[t]) for t, above in parent.items()]


def draw(axis, tree: list[Edge]) -> None:
    for (x0, y0), (x1, y1), state, label in tree:
        colour, line, _ = STATES[state]
        width = 2 if state == "in use" else 1
        axis.plot([x0, x0 + GAP_INCHES * 0.8, x1], [y0, y1, y1], line, linewidth=width, color=colour)
        axis.plot(x1, y1, "o", markersize=4, color=colour)
        font = {"fontsize": POINTS, "family": "monospace", "va": "bottom", "color": colour}
        axis.text(x0 + GAP_INCHES * 0.85, y1 + 0.02, label, **font)
    axis.plot(*min(edge.start for edge in tree), "ks", markersize=5)
    axis.axis("off")


def figure_of(panels: list[Panel], decode: Decode):
    """A figure with a titled tree for each panel, as large as its labels need."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trees = [place(collect(events), decode) for _, events in panels]
    sizes = [(max(e.end[0] for e in tree) + 0.3, 0.35 - min(e.end[1] for e in tree)) for tree in trees]
    width = max(6.5, *(w for w, _ in sizes))
    top = height = sum(h + TITLE_INCHES for _, h in sizes) + 0.3
    figure = plt.figure(figsize=(width, height))
    for (title, _), tree, (w, h) in zip(panels, trees, sizes, strict=True):
        top -= h + TITLE_INCHES
        axis = figure.add_axes((0, top / height, w / width, h / height))
        axis.set(xlim=(-0.1, w - 0.1), ylim=(0.25 - h, 0.25))
        draw(axis, tree)
        figure.text(0.1 / width, (top + h + 0.08) / height, title, fontsize=9, fontweight="bold")
    lines = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour, _, _ in STATES.values()]
    meanings = [meaning for _, _, meaning in STATES.values()]
    figure.legend(lines, meanings, loc="lower left", ncols=3, fontsize=8, frameon=False)
    return figure


def save(figure, path: Path) -> None:
    """As SVG with real text, and as PNG."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "radix"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
