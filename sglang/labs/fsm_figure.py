"""The automaton of a regex, before and after compression, as a figure."""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from workbench import UserError

MAX_STATES = 60  # of a figure that can be read
NAMED_SETS = {"0-9": string.digits, "a-z": string.ascii_lowercase, "A-Z": string.ascii_uppercase}

Place = tuple[float, float]


class Edge(NamedTuple):
    source: int
    label: str
    target: int
    literal: bool  # the label is the text itself, not the name of a set of characters


@dataclass(frozen=True)
class Automaton:
    """State 0 is where it starts."""

    states: list[int]
    finals: set[int]
    edges: list[Edge]


# --- the automaton ------------------------------------------------------------------------------------


def character_class(symbols: set[str]) -> str:
    """A short name of a set of characters: 'a', '[a-z]', '[+-]'."""
    if len(symbols) == 1:
        return next(iter(symbols))
    for name, members in NAMED_SETS.items():
        if symbols >= set(members):
            rest = symbols - set(members)
            return f"[{name}{character_class(rest).strip('[]') if rest else ''}]"
    ordered = "".join(sorted(symbols))
    return f"[{ordered}]" if len(ordered) <= 8 else f"[{ordered[:3]}…{ordered[-1]}]"


def automaton(regex: str) -> Automaton:
    """The minimal deterministic automaton of a regex over characters, from interegular, as in
    sglang/srt/constrained/outlines_jump_forward.py. Raises UserError."""
    import interegular

    try:
        fsm = interegular.parse_pattern(regex).to_fsm().reduce()
    except Exception as error:  # its parser raises many kinds
        raise UserError(f"--regex {regex!r}: cannot be parsed ({error!r:.100})") from error
    live = [state for state in fsm.states if fsm.islive(state)]
    if len(live) > MAX_STATES:
        raise UserError(
            f"--regex {regex!r}: {len(live)} states; at most {MAX_STATES} can be drawn, use a shorter one"
        )
    order, edges = [fsm.initial], []
    for state in order:
        targets: dict[int, set] = {}
        for key, target in fsm.map.get(state, {}).items():
            if target in live:
                targets.setdefault(target, set()).update(fsm.alphabet.by_transition[key])
        for target, symbols in sorted(targets.items(), key=lambda item: min(map(str, item[1]))):
            order += [target] * (target not in order)
            other = any(not isinstance(symbol, str) for symbol in symbols)  # all that the regex does not name
            label = "other" if other else character_class(symbols)
            edges.append(Edge(order.index(state), label, order.index(target), len(symbols) == 1 and not other))
    finals = {order.index(state) for state in fsm.finals if state in order}
    return Automaton(list(range(len(order))), finals, edges)


def compress(found: Automaton) -> Automaton:
    """Runs of edges that are the only way on, merged into one edge with the forced text (arXiv 2312.07104,
    figure 4). A state goes if it is not final, one edge leads to it and one away, both a single character and
    the first the only one out of its state; an edge that leads away from a final state forces nothing."""
    edges, finals = list(found.edges), found.finals

    def only(edge: Edge) -> bool:
        ways = [other for other in edges if other.source == edge.source]
        return edge.literal and edge.source not in finals and len(ways) == 1

    kept = [0]
    for state in found.states[1:]:
        into = [edge for edge in edges if edge.target == state]
        out = [edge for edge in edges if edge.source == state]
        if state not in finals and len(into) == len(out) == 1 and only(into[0]) and only(out[0]):
            edges = [edge for edge in edges if edge not in (into[0], out[0])]
            edges.append(Edge(into[0].source, into[0].label + out[0].label, out[0].target, True))
        else:
            kept.append(state)
    return Automaton(kept, finals, edges)


# --- the figure ---------------------------------------------------------------------------------------


def layout(found: Automaton) -> dict[int, Place]:
    """A place for each state: columns by distance from the start, as far apart as the labels between them
    need, and the states of a column below each other."""
    column = {0: 0}
    for state in (queue := [0]):
        for edge in found.edges:
            if edge.source == state and edge.target not in column:
                column[edge.target] = column[state] + 1
                queue.append(edge.target)
    x, places = 0.0, {}
    for index in range(max(column.values()) + 1):
        widths = [len(e.label) for e in found.edges if column[e.target] == index > column[e.source]]
        x += 0.55 + 0.095 * max(widths, default=0)
        members = [state for state in found.states if column.get(state) == index]
        for row, state in enumerate(members):
            places[state] = (x, ((len(members) - 1) / 2 - row) * 1.1)
    return places


def bend_of(edge: Edge, places: dict[int, Place]) -> float:
    """How much its arrow is bent: back to an earlier column or past a state that lies between."""
    (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
    others = [place for state, place in places.items() if state not in (edge.source, edge.target)]
    crosses = any(min(x0, x1) < x < max(x0, x1) and abs(y - (y0 + y1) / 2) < 0.5 for x, y in others)
    return (0.25 if x1 < x0 else -0.25) if crosses or x1 <= x0 else 0.0


def draw(found: Automaton, axis) -> list:
    """Draws the automaton; returns its label artists, none of which covers another or a state. Raises
    UserError if they find no room."""
    from matplotlib.patches import Circle, FancyArrowPatch

    places = layout(found)
    xs, ys = zip(*places.values(), strict=True)
    axis.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 1.1, max(ys) + 1.1))
    axis.set_aspect("equal", anchor="W")
    axis.axis("off")
    taken, labels = [], []
    for state, (x, y) in places.items():
        ring = axis.add_patch(Circle((x, y), 0.16, fc="white", ec="black"))
        if state in found.finals:
            axis.add_patch(Circle((x, y), 0.12, fill=False, ec="black"))
        axis.text(x, y, str(state), ha="center", va="center", fontsize=6)
        taken.append(ring.get_window_extent())
    for edge in found.edges:
        start, end, bend, shrink = places[edge.source], places[edge.target], bend_of(edge, places), 7
        if start == end:  # a loop above the state
            (x, y), bend, shrink = start, -2.2, 2
            start, end = (x - 0.1, y + 0.12), (x + 0.1, y + 0.12)
        colour = "C0" if edge.literal and len(edge.label) > 1 else "0.3"
        style = {"arrowstyle": "-|>", "mutation_scale": 7, "shrinkA": shrink, "shrinkB": shrink, "lw": 0.8}
        axis.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", color=colour, **style))
        text = edge.label.replace(" ", "␣").replace("\n", "↵")
        labels.append(place_label(axis, text, start, end, bend, taken, colour))
    return labels


def place_label(axis, text: str, start: Place, end: Place, bend: float, taken: list, colour: str):
    """Writes the text beside an arc, farther and farther away until it covers nothing that is `taken`."""
    font = {"fontsize": 7, "family": "DejaVu Sans Mono", "parse_math": False, "color": colour}
    (x0, y0), (x1, y1) = start, end
    dx, dy = bend * (y1 - y0), -bend * (x1 - x0)  # from the chord's middle to arc3's control point
    length = (dx**2 + dy**2) ** 0.5
    away = (dx / length, dy / length) if bend else (0.0, 1.0)
    for tries in range(60):
        share = (0.5, 0.35, 0.65, 0.25, 0.75)[tries % 5]
        arc, distance = 2 * share * (1 - share), 0.13 + 0.12 * (tries // 5)
        x = x0 + share * (x1 - x0) + arc * dx + distance * away[0]
        y = y0 + share * (y1 - y0) + arc * dy + distance * away[1]
        artist = axis.text(x, y, text, ha="center", va="center", **font)
        box = artist.get_window_extent()
        if not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return artist
        artist.remove()
    raise UserError("--regex: no room for all labels in the figure; use a shorter one")


def draw_both(regex: str, folder: Path) -> dict:
    """fsm.png and fsm.svg; returns the counts of both automata and the forced texts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    before = automaton(regex)
    after = compress(before)
    width = max(x for found in (before, after) for x, _ in layout(found).values()) + 1.4
    figure, axes = plt.subplots(2, 1, figsize=(min(max(width * 0.62, 7), 30), 5), dpi=150)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.93)
    forced = [edge.label for edge in after.edges if edge.literal and len(edge.label) > 1]
    facts: dict[str, object] = {"regex": regex, "forced_texts": forced}
    for axis, found, name in zip(axes, (before, after), ("before", "after"), strict=True):
        states, edges = len(found.states), len(found.edges)
        facts |= {f"states_{name}": states, f"edges_{name}": edges}
        axis.set_title(f"{name} compression: {states} states, {edges} edges", fontsize=9, loc="left")
        draw(found, axis)
    figure.savefig(folder / "fsm.png")
    figure.savefig(folder / "fsm.svg")
    plt.close(figure)
    return facts
