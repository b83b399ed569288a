"""Constrained decoding, drawn and measured: the compressed FSM, and what jump-forward saves.

    python sglang/labs/constrained_lab.py                     # all of it, on a CPU: 2.5 minutes on 2 cores
    python sglang/labs/constrained_lab.py --draw_only --regex 'colour: (red|green)'

Writes into --output_dir: fsm.png and fsm.svg (the automaton of a regex before and after compression),
constrained_lab.json and constrained_lab.png (forward passes and seconds of free text with retries, masks only
and masks with jump-forward, on the same requests) and break_even.png (seconds by length of the forced run).
"""

import asyncio
import itertools
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "common")]
import engines
from fsm_figure import draw_both

from batch_infer.arguments import REHEARSAL, Arguments
from workbench import UserError
from workbench.files import claim, commit, write_json
from workbench.flags import flag, read_flags
from workbench.machine import versions

TRIES = 2  # of an unconstrained request
CONCURRENCY, FULL_CONCURRENCY = (1, 8), (1, 8, 64)
STAGGER_S = 0.2  # requests arrive within this time
RUN_LENGTHS = (0, 1, 2, 4, 8, 16)  # forced characters between two free pieces (break_even.png)
MODES = (("xgrammar", False), ("llguidance", False), ("xgrammar", True), ("llguidance", True))  # an engine each
SAMPLED = {"temperature": 0.7, "top_p": 0.95}

Request = tuple[str, dict]  # prompt, sampling parameters


def object_of(properties: dict) -> str:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return json.dumps(schema | {"additionalProperties": False})


def text(characters: int) -> dict:
    return {"type": "string", "pattern": f"^[a-z ]{{{characters}}}$"}


SCHEMAS = {  # from all free text to nine tenths fixed
    "free_text": object_of({"a": text(60)}),
    "half_fixed": object_of({"name_of_the_person": text(20), "preferred_colour": text(20)}),
    "three_long_keys": object_of(
        {
            "name_of_the_person_who_is_asked": {"type": "boolean"},
            "preferred_colour_of_the_person": {"enum": ["red", "green"]},
            "number_of_visits_in_the_last_year": {"type": "integer", "minimum": 0, "maximum": 9},
        }
    ),
}


@dataclass(frozen=True)
class Flags:
    regex: str = flag(r'\{"on": (true|false), "colour": "(red|green)"\}', "its automaton is drawn")
    output_dir: str = flag(str(REHEARSAL / "runs" / "constrained_lab"), "folder for figures and numbers")
    model_path: str = flag("", "hub id or folder; empty: the tiny model")
    device: str = flag("cpu", "cpu or cuda")
    engine_args: str = flag("{}", "JSON object of further sglang.Engine arguments")
    draw_only: bool = flag(False, "only the figure")
    full: bool = flag(False, f"up to {FULL_CONCURRENCY[-1]} requests at once, not {CONCURRENCY[-1]}")
    seed: int = flag(0, "of arrival times and sampling")


def main(argv: list[str]) -> int:
    try:
        about = "Draws the compressed FSM, measures jump-forward."
        flags = Flags(**read_flags(argv, Flags, prog="constrained_lab.py", description=about))
        arguments(flags, *MODES[-1])  # raises for bad flags before anything is written
        folder = Path(flags.output_dir)
        with claim(folder, "--output_dir"):
            drawn = draw_both(flags.regex, folder)
            before, after = drawn["states_before"], drawn["states_after"]
            print(f"fsm          {before} states become {after}: {folder / 'fsm.png'}")
            if not flags.draw_only:
                measure_all(flags, folder, drawn)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# --- measuring ----------------------------------------------------------------------------------------


def arguments(flags: Flags, backend: str, jumps: bool) -> Arguments:
    """Without jump-forward the overlap scheduler is on, SGLang's default."""
    running = FULL_CONCURRENCY[-1]
    args = engines.arguments(flags, seed=flags.seed, jump_forward=jumps, max_running_requests=running)
    return replace(args, engine_args=json.dumps(args.own_engine_args | {"grammar_backend": backend}))


def measure_all(flags: Flags, folder: Path, drawn: dict) -> None:
    began = time.monotonic()
    inputs = engines.prepare(arguments(flags, *MODES[0]))
    counts = FULL_CONCURRENCY if flags.full else CONCURRENCY
    results: dict[str, list[dict]] = {"rows": [], "break_even": []}
    for backend, jumps in MODES:
        answered = ("none", backend) if (backend, jumps) == MODES[0] else (backend,)
        cells = list(itertools.product(answered, SCHEMAS, counts))
        lengths = RUN_LENGTHS if backend == "llguidance" else ()

        def work(engine, cells=cells, lengths=lengths, jumps=jumps) -> Iterator[tuple[str, dict]]:
            for mode, schema, count in cells:
                yield "rows", row(engine, schema, mode, jumps, count, flags.seed)
            for length in lengths:
                yield "break_even", run_length(engine, jumps, length, flags.seed)

        args, title = arguments(flags, backend, jumps), mode_name(backend, jumps)
        total = len(cells) + len(lengths)
        for kind, result in engines.measure(args, inputs, "count_passes", work, total, title):
            results[kind].append(result)
    settings = {"output_dir": folder.name, "tries": TRIES, "stagger_s": STAGGER_S, "schemas": SCHEMAS}
    packages = ("sglang", "torch", "xgrammar", "llguidance", "interegular")
    facts = {"commit": commit(), "versions": versions(packages), "hardware": hardware(inputs.machine.gpu_name)}
    facts |= {"fsm": drawn, "settings": asdict(flags) | settings, "wall_s": time.monotonic() - began}
    write_json(folder / "constrained_lab.json", results | facts)
    show(results["rows"], folder)
    plot_break_even(results["break_even"], folder)
    print(f"numbers      {folder / 'constrained_lab.json'}; figures beside it; {facts['wall_s']:.0f} s")


def hardware(gpu_name: str | None) -> dict:
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"gpu": gpu_name, "cpu": name[1] if name else None, "cores": len(os.sched_getaffinity(0))}


def serve(engine, requests: list[Request], seed: int, valid: Callable[[str], bool] | None = None) -> dict:
    """Answers the requests, which arrive within STAGGER_S; with `valid`, a function of the text, a request is
    sent again until it holds, TRIES times at most. Counts and seconds of all of them together."""
    rng = random.Random(seed)

    async def one(prompt: str, params: dict, delay_s: float) -> tuple[str, int, int]:
        await asyncio.sleep(delay_s)
        tokens = forced = 0
        for attempt in range(TRIES if valid else 1):
            again = params | {"sampling_seed": params["sampling_seed"] + 1000 * attempt}
            got = await engine.async_generate(prompt=prompt, sampling_params=again)
            tokens += got["meta_info"]["completion_tokens"]
            forced += sum(run or 0 for run in got["meta_info"].get("forced_runs", ()))
            if valid and valid(got["text"]):
                break
        return got["text"], tokens, forced

    async def everything() -> list[tuple[str, int, int]]:
        delays_s = [rng.random() * STAGGER_S * (len(requests) > 1) for _ in requests]
        return await asyncio.gather(*(one(*r, d) for r, d in zip(requests, delays_s, strict=True)))

    before, began = engines.forward_passes(engine), time.monotonic()
    answers = engine.loop.run_until_complete(everything())
    seconds = time.monotonic() - began
    texts, tokens, forced = zip(*answers, strict=True)
    return {
        "texts": texts,
        "seconds": seconds,
        "forward_passes": engines.forward_passes(engine) - before,
        "output_tokens": sum(tokens),
        "forced_share": sum(forced) / sum(tokens),
    }


def quickest(
    engine, rounds: list[list[Request]], seed: int, valid: Callable[[str], bool] | None = None
) -> dict:
    """What `serve` says of the quickest round. A request is served before, so that compiling its grammar is not
    measured."""
    serve(engine, rounds[0][:1], seed)
    return min((serve(engine, requests, seed, valid) for requests in rounds), key=lambda run: run["seconds"])


def row(engine, schema: str, backend: str, jumps: bool, count: int, seed: int) -> dict:
    """One row of the table; two rounds where a round is short."""
    import jsonschema

    def valid(answer: str) -> bool:
        try:
            jsonschema.validate(json.loads(answer), json.loads(SCHEMAS[schema]))
        except (ValueError, jsonschema.ValidationError):
            return False
        return True

    constraint = {} if backend == "none" else {"json_schema": SCHEMAS[schema]}
    params = SAMPLED | {"max_new_tokens": 300 if constraint else 100} | constraint
    rounds = [
        [(f"Round {number}, person {n}:", params | {"sampling_seed": seed + n}) for n in range(count)]
        for number in ((1, 2) if constraint and count < FULL_CONCURRENCY[-1] else (1,))
    ]
    best = quickest(engine, rounds, seed, None if constraint else valid)
    return {
        **{"schema": schema, "backend": backend, "jump_forward": jumps, "concurrency": count},
        **{name: best[name] for name in ("forward_passes", "seconds", "output_tokens")},
        "tokens_per_pass": best["output_tokens"] / best["forward_passes"],
        "forced_share": best["forced_share"] if jumps else None,
        "valid_share": sum(map(valid, best["texts"])) / count,
    }


def run_length(engine, jumps: bool, length: int, seed: int) -> dict:
    """8 requests, each 6 times 4 free characters and then `length` forced ones."""
    params = SAMPLED | {"max_new_tokens": 300, "regex": f"([a-z ]{{4}}{'QZXJQVKWQZXJQVKW'[:length]}){{6}}"}
    best = quickest(engine, [[(f"Line {n}:", params | {"sampling_seed": n}) for n in range(8)]] * 2, seed)
    kept = {name: best[name] for name in ("seconds", "forward_passes", "output_tokens")}
    return {"forced_characters": length, "jump_forward": jumps} | kept


# --- showing ------------------------------------------------------------------------------------------


def mode_name(backend: str, jumps: bool) -> str:
    if backend == "none":
        return f"free text, {TRIES} tries"
    return backend + (" + jump-forward" if jumps else " masks")


def show(rows: list[dict], folder: Path) -> None:
    """Prints a table and draws constrained_lab.png: passes above, seconds below, a column for each number of
    requests."""
    import matplotlib.pyplot as plt
    import pandas

    frame = pandas.DataFrame(rows)
    frame["mode"] = [mode_name(r["backend"], r["jump_forward"]) for r in rows]
    columns = ["schema", "mode", "concurrency", "forward_passes", "tokens_per_pass", "seconds", "valid_share"]
    print(frame[columns].to_string(index=False, float_format="{:.2f}".format))
    counts, modes, schemas = (frame[name].unique() for name in ("concurrency", "mode", "schema"))
    look = {"layout": "constrained", "sharex": True, "sharey": "row", "squeeze": False}
    figure, axes = plt.subplots(2, len(counts), figsize=(4 + 3 * len(counts), 6.5), **look)
    for line, measure in enumerate(("forward_passes", "seconds")):
        for axis, count in zip(axes[line], counts, strict=True):
            cells = frame[frame.concurrency == count].pivot(index="schema", columns="mode", values=measure)
            how = {"logy": True, "rot": 0, "width": 0.8, "legend": False, "xlabel": ""}
            cells.loc[schemas, modes].plot.bar(ax=axis, ylabel=measure.replace("_", " "), **how)
            axis.tick_params(axis="x", which="minor", bottom=False)
            axis.set_title("" if line else "1 request" if count == 1 else f"{count} requests")
    columns = 2 * len(counts) - 1
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    figure.savefig(folder / "constrained_lab.png", dpi=120)
    plt.close(figure)


def plot_break_even(rows: list[dict], folder: Path) -> None:
    import matplotlib.pyplot as plt

    seconds = {(r["forced_characters"], r["jump_forward"]): r["seconds"] for r in rows}
    lengths = sorted({length for length, _ in seconds})
    ratios = [seconds[length, False] / seconds[length, True] for length in lengths]
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(lengths, ratios, marker="o")
    axis.axhline(1, color="0.5", linestyle="--", label="break-even")
    axis.set(xlabel="forced characters between free ones", ylabel="seconds of masks only / with jump-forward")
    axis.set_title("llguidance, 8 requests")
    axis.legend()
    figure.savefig(folder / "break_even.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
