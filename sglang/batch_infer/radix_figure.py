"""The radix tree as a figure, from what runtime_plugins/radix_trace.py wrote."""

import itertools
from collections.abc import Callable
from pathlib import Path

LABEL_CHARACTERS = 44
POINTS = 7.0
CHARACTER_INCHES = 0.66 * POINTS / 72  # 0.6 for most monospaced fonts, and room for hinting
ROW_INCHES, GAP_INCHES = 0.27, 0.45
COLOURS = {"in use": "#1a7f37", "cached": "#1f5fa8", "evicted": "#9a9a9a"}

Tokens = tuple[int, ...]


def edge_label(text: str, tokens: int, evicted: int | None) -> str:
    """The text of an edge, shortened in its middle, and its number of tokens."""
    shown = text.replace("\n", "↵").replace("$", r"\$")
    shown = "".join(c if (c.isprintable() and ord(c) < 0x250) or c == "↵" else "·" for c in shown)
    if len(shown) > LABEL_CHARACTERS:
        half = LABEL_CHARACTERS // 2 - 1
        shown = f"{shown[:half]} … {shown[-half:]}"
    order = f", evicted {evicted}." if evicted else ""
    return f"{shown} ({tokens}{order})"


def collect(events: list[dict]) -> dict[Tokens, dict]:
    """Nodes by their token ids from the root: the tree of the last event, and what was evicted on the way
    there and has not come back, numbered in the order of eviction."""
    live = {
        tuple(node["token_ids"]): {"in_use": node["in_use"], "evicted": None} for node in events[-1]["nodes"]
    }
    gone: dict[Tokens, int] = {}
    numbers = itertools.count(1)
    for event in events:
        for tokens in event.get("evicted", ()):
            gone.pop(tuple(tokens), None)
            gone[tuple(tokens)] = next(numbers)
    back = {tokens for tokens in gone if any(node[: len(tokens)] == tokens for node in live)}
    renumbered = enumerate((tokens for tokens in gone if tokens not in back), start=1)
    return live | {tokens: {"in_use": False, "evicted": number} for number, tokens in renumbered}


def edges(nodes: list[dict]) -> list[Tokens]:
    """The token ids on each node's own edge."""
    paths = sorted(tuple(node["token_ids"]) for node in nodes)
    above = [()]
    found = []
    for tokens in paths:
        while tokens[: len(above[-1])] != above[-1]:
            above.pop()
        found.append(tokens[len(above[-1]) :])
        above.append(tokens)
    return found


def draw(axis, nodes: dict[Tokens, dict], decode: Callable[[list[int]], str]) -> tuple[float, float]:
    """Draws the tree from left to right, a leaf per row, and returns the (width, height) in inches that `axis`
    needs so that no two labels meet. Green: a running request holds it; blue: cached; grey: evicted."""
    children: dict[Tokens, list[Tokens]] = {(): []}
    for tokens in sorted(nodes):
        parent = max((t for t in children if tokens[: len(t)] == t), key=len)
        children[parent].append(tokens)
        children[tokens] = []
    labels, level, row = {}, {(): 0}, {}
    for tokens in children:  # parents come first
        for child in children[tokens]:
            level[child] = level[tokens] + 1
            new = list(child[len(tokens) :])
            labels[child] = edge_label(decode(new), len(new), nodes[child]["evicted"])
    rows = itertools.count()
    for tokens in sorted(children, reverse=True):  # children come first
        below = [row[child] for child in children[tokens]]
        row[tokens] = (min(below) + max(below)) / 2 if below else -next(rows)
    widths = [0.0] * (max(level.values()) + 1)
    for tokens, label in labels.items():
        widths[level[tokens]] = max(widths[level[tokens]], len(label) * CHARACTER_INCHES)
    right = [sum(w + GAP_INCHES for w in widths[1 : n + 1]) for n in range(len(widths))]
    place = {tokens: (right[level[tokens]], row[tokens] * ROW_INCHES) for tokens in children}
    for parent in children:
        for child in children[parent]:
            state = "evicted" if nodes[child]["evicted"] else "in use" if nodes[child]["in_use"] else "cached"
            (x0, y0), (x1, y1) = place[parent], place[child]
            style = {"color": COLOURS[state], "linestyle": "--" if state == "evicted" else "-"}
            axis.plot(
                [x0, x0 + GAP_INCHES * 0.8, x1], [y0, y1, y1], linewidth=2 if state == "in use" else 1, **style
            )
            axis.plot(x1, y1, "o", markersize=4, color=COLOURS[state])
            axis.text(
                *(x0 + GAP_INCHES * 0.85, y1 + 0.02, labels[child]),
                **{"fontsize": POINTS, "family": "monospace", "va": "bottom", "color": COLOURS[state]},
            )
    axis.plot(*place[()], "ks", markersize=5)
    axis.axis("off")
    bottom = min(y for _, y in place.values())
    axis.set_xlim(-0.1, right[-1] + 0.2)
    axis.set_ylim(bottom - 0.1, 0.25)
    return right[-1] + 0.3, 0.35 - bottom


def figure_of(panels: list[tuple[str, list[dict]]], decode: Callable[[list[int]], str]):
    """A figure with a titled tree for each (title, events so far)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scratch = plt.figure()
    sizes = [draw(scratch.add_subplot(), collect(events), decode) for _, events in panels]
    plt.close(scratch)
    title_inches, legend_inches = 0.3, 0.3
    width = max(6.5, max(w for w, _ in sizes))
    height = sum(h + title_inches for _, h in sizes) + legend_inches
    figure = plt.figure(figsize=(width, height))
    top = height
    for (title, events), (w, h) in zip(panels, sizes, strict=True):
        top -= h + title_inches
        axis = figure.add_axes((0, top / height, w / width, h / height))
        draw(axis, collect(events), decode)
        figure.text(0.1 / width, (top + h + 0.08) / height, title, fontsize=9, fontweight="bold")
    shown = {"in use": "a running request holds it", "cached": "cached", "evicted": "evicted, in this order"}
    lines = [plt.Line2D([], [], color=COLOURS[state], marker="o", markersize=4) for state in shown]
    figure.legend(lines, [*shown.values()], loc="lower left", ncols=3, fontsize=8, frameon=False)
    return figure


def save(figure, path: Path) -> None:
    """As SVG with real text, and as PNG."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "radix"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
