"""Constrained decoding, drawn and measured: the compressed FSM, and what jump-forward saves.

    python sglang/constrained_lab.py                     # figure and measurements, on any CPU, within 5 minutes
    python sglang/constrained_lab.py --draw_only --regex 'colour: (red|green)'

Writes into --output_dir: fsm.png and fsm.svg (the automaton of a regex before and after compression),
constrained_lab.json and constrained_lab.png (forward passes and seconds of free text with retries, masks only
and masks with jump-forward, on the same requests) and break_even.png (seconds by length of the forced run).
"""

import asyncio
import json
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from batch_infer import engine as runtime
from batch_infer import preflight, report
from batch_infer.arguments import REHEARSAL, Arguments, parse
from batch_infer.fsm_figure import draw_both
from workbench import UserError
from workbench.files import claim, commit, write_json
from workbench.flags import read_flags
from workbench.machine import versions

TRIES = 2  # of an unconstrained request
CONCURRENCY = (1, 8, 64)
STAGGER_S = 0.2  # requests arrive within this time
RUN_LENGTHS = (0, 1, 2, 4, 8, 16)  # forced characters between two free pieces (break_even.png)
MODES = (("none", False), ("xgrammar", False), ("llguidance", False), ("xgrammar", True), ("llguidance", True))


def object_of(properties: dict) -> str:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return json.dumps(schema | {"additionalProperties": False})


def text(tokens: int) -> dict:
    return {"type": "string", "pattern": f"^[a-z ]{{{tokens}}}$"}


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


@dataclass
class Flags:
    regex: str = r'\{"on": (true|false), "colour": "(red|green)"\}'
    output_dir: str = str(REHEARSAL / "runs" / "constrained_lab")
    model_path: str = ""
    device: str = "cpu"
    engine_args: str = "{}"
    draw_only: bool = False
    seed: int = 0


HELP = {
    "regex": "its automaton is drawn",
    "output_dir": "folder for figures and numbers",
    "model_path": "hub id or folder; empty: the tiny model",
    "device": "cpu or cuda",
    "engine_args": "JSON object of further sglang.Engine arguments",
    "draw_only": "only the figure",
    "seed": "of arrival times and sampling",
}


def main(argv: list[str]) -> int:
    try:
        about = {
            "prog": "constrained_lab.py",
            "description": "Draws the compressed FSM, measures jump-forward.",
        }
        flags = Flags(**read_flags(argv, Flags, HELP, {}, **about))
        folder = Path(flags.output_dir)
        for mode in () if flags.draw_only else MODES:
            arguments(flags, *mode)  # raises for bad flags before anything is measured
        with claim(folder, "--output_dir"):
            drawn = draw_both(flags.regex, folder)
            print(
                f"fsm          {drawn['states_before']} states become {drawn['states_after']}: {folder / 'fsm.png'}"
            )
            if not flags.draw_only:
                measure_all(flags, folder, drawn)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# --- measuring ----------------------------------------------------------------------------------------


def arguments(flags: Flags, backend: str, jumps: bool) -> Arguments:
    """Those of run_sglang.py: without jump-forward the overlap scheduler is on, SGLang's default."""
    grammar = {"grammar_backend": "xgrammar" if backend == "none" else backend}
    words = {
        **{"device": flags.device, "seed": flags.seed, "jump_forward": jumps, "fast": True, "dp_size": 1},
        **{"max_running_requests": max(CONCURRENCY), "output_file": Path(flags.output_dir) / "outputs.jsonl"},
        **({"model_path": flags.model_path} if flags.model_path else {"rehearse": True}),
    }
    args = parse([f"--{name}={value}" for name, value in words.items()] + ["--engine_args", flags.engine_args])
    args.engine_args = json.dumps(args.own_engine_args | grammar)
    return args


def measure_all(flags: Flags, folder: Path, drawn: dict) -> None:
    from tqdm import tqdm

    began = time.monotonic()
    first = arguments(flags, "xgrammar", False)
    os.environ.update(runtime.environment(first))
    report.quiet_libraries(first)
    machine, found = runtime.Machine(flags.device), {}
    preflight.look_at_packages()
    preflight.look_at_gpus(first, machine)
    preflight.look_at_kernel_tools(first, machine)
    preflight.look_at_model(first, found)
    if flags.device == "cpu":  # once, for all engines
        runtime.skip_other_models(found["model"].config["architectures"])
        import sglang.srt.managers.scheduler  # noqa: F401

    def with_engine(backend: str, jumps: bool, pipe) -> None:
        engine = start(arguments(flags, backend, jumps), machine, found["model"])
        modes = ("none", backend) if (backend, jumps) == ("xgrammar", False) else (backend,)
        for mode in modes:
            for schema in SCHEMAS:
                for count in CONCURRENCY:
                    pipe.send(("rows", row(flags, engine, schema, mode, jumps, count)))
        if backend == "llguidance":
            for length in RUN_LENGTHS:
                pipe.send(("break_even", run_length(flags, engine, jumps, length)))
        engine.shutdown()

    results: dict[str, list[dict]] = {"rows": [], "break_even": []}
    total = len(MODES) * len(SCHEMAS) * len(CONCURRENCY) + 2 * len(RUN_LENGTHS)
    with tqdm(total=total, unit=" cells", mininterval=0.2 if sys.stderr.isatty() else 10) as bar:
        for backend, jumps in MODES[1:]:
            for kind, result in runtime.in_a_process(folder / "engine.log", with_engine, backend, jumps):
                results[kind].append(result)
                bar.update()
    settings = asdict(flags) | {"output_dir": folder.name, "tries": TRIES, "stagger_s": STAGGER_S}
    wall_s = time.monotonic() - began
    write_json(
        folder / "constrained_lab.json",
        results
        | {
            **{"fsm": drawn, "settings": settings | {"schemas": SCHEMAS}, "commit": commit(), "wall_s": wall_s},
            "versions": versions(("sglang", "torch", "xgrammar", "llguidance", "interegular")),
            "hardware": hardware(machine),
        },
    )
    print_table(results["rows"])
    plot_rows(results["rows"], folder)
    plot_break_even(results["break_even"], folder)
    print(f"numbers      {folder / 'constrained_lab.json'}; figures beside it; {wall_s:.0f} s")


def hardware(machine: runtime.Machine) -> dict:
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    cores = len(os.sched_getaffinity(0))
    return {"gpu": machine.gpu_name, "cpu": name[1] if name else None, "cores": cores}


def start(args: Arguments, machine: runtime.Machine, model: runtime.Model):
    """An engine whose state says how many forward passes it has run."""
    os.environ.update(runtime.environment(args))
    os.environ["RUNTIME_PLUGINS"] += ",count_passes"
    chosen = runtime.choose(args, machine, model, [])
    if args.device == "cpu":
        runtime.fork_engine_processes()
    return runtime.start(args, chosen, model.config["architectures"], [])[0]


def passes(engine) -> int:
    return engine.get_server_info()["internal_states"][0]["forward_passes"]


def serve(engine, requests: list[tuple[str, dict]], seed: int, valid=None) -> dict:
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

    before, began = passes(engine), time.monotonic()
    answers = engine.loop.run_until_complete(everything())
    seconds = time.monotonic() - began
    texts, tokens, forced = zip(*answers, strict=True)
    return {
        "texts": texts,
        "seconds": seconds,
        "forward_passes": passes(engine) - before,
        "output_tokens": sum(tokens),
        "forced_share": sum(forced) / sum(tokens),
    }


def row(flags: Flags, engine, schema: str, backend: str, jumps: bool, count: int) -> dict:
    """One row of the table. The first request of a grammar is served before, so that compiling it is not
    measured; the quicker of two rounds counts where a round is short."""
    import jsonschema

    def valid(answer: str) -> bool:
        try:
            jsonschema.validate(json.loads(answer), json.loads(SCHEMAS[schema]))
        except (ValueError, jsonschema.ValidationError):
            return False
        return True

    constraint = {} if backend == "none" else {"json_schema": SCHEMAS[schema]}
    params = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 300 if constraint else 100} | constraint

    def requests(number: int, count: int) -> list[tuple[str, dict]]:
        return [
            (f"Round {number}, person {n}:", params | {"sampling_seed": flags.seed + n}) for n in range(count)
        ]

    serve(engine, requests(0, 1), flags.seed)
    rounds = 2 if constraint and count < max(CONCURRENCY) else 1
    runs = [
        serve(engine, requests(number, count), flags.seed, None if constraint else valid)
        for number in range(1, rounds + 1)
    ]
    best = min(runs, key=lambda run: run["seconds"])
    return {
        "schema": schema,
        "backend": backend,
        "jump_forward": jumps,
        "concurrency": count,
        "forward_passes": best["forward_passes"],
        "seconds": best["seconds"],
        "output_tokens": best["output_tokens"],
        "tokens_per_pass": best["output_tokens"] / best["forward_passes"],
        "forced_share": best["forced_share"] if jumps else None,
        "valid_share": sum(map(valid, best["texts"])) / count,
    }


def run_length(flags: Flags, engine, jumps: bool, length: int) -> dict:
    """8 requests, each 6 times 4 free characters and then `length` forced ones."""
    regex = f"([a-z ]{{4}}{'QZXJQVKWQZXJQVKW'[:length]}){{6}}"
    params = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 300, "regex": regex}
    requests = [(f"Line {n}:", params | {"sampling_seed": n}) for n in range(8)]
    serve(engine, requests[:1], flags.seed)
    best = min((serve(engine, requests, flags.seed) for _ in range(2)), key=lambda run: run["seconds"])
    kept = {name: best[name] for name in ("seconds", "forward_passes", "output_tokens")}
    return {"forced_characters": length, "jump_forward": jumps} | kept


# --- showing ------------------------------------------------------------------------------------------


def mode_name(row: dict) -> str:
    if row["backend"] == "none":
        return f"free text, {TRIES} tries"
    return row["backend"] + (" + jump-forward" if row["jump_forward"] else " masks")


def print_table(rows: list[dict]) -> None:
    print(f"{'schema':16}{'mode':26}{'requests':>9}{'passes':>8}{'tokens/pass':>13}{'seconds':>9}{'valid':>7}")
    for r in rows:
        print(
            f"{r['schema']:16}{mode_name(r):26}{r['concurrency']:9}{r['forward_passes']:8}"
            f"{r['tokens_per_pass']:13.1f}{r['seconds']:9.2f}{r['valid_share']:7.0%}"
        )


def plot_rows(rows: list[dict], folder: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(CONCURRENCY), figsize=(12, 6.5), layout="constrained", sharex=True)
    names = list(dict.fromkeys(map(mode_name, rows)))
    for column, count in enumerate(CONCURRENCY):
        for line, measure in enumerate(("forward_passes", "seconds")):
            axis = axes[line, column]
            for number, name in enumerate(names):
                mine = [r for r in rows if mode_name(r) == name and r["concurrency"] == count]
                places = [index + 0.16 * (number - 2) for index in range(len(mine))]
                axis.bar(places, [r[measure] for r in mine], 0.15, label=name, color=f"C{number}")
            axis.set_yscale("log")
            axis.set_xticks(range(len(SCHEMAS)), [name.replace("_", " ") for name in SCHEMAS])
            axis.set_ylabel(measure.replace("_", " "))
            if line == 0:
                axis.set_title(f"{count} request{'s' * (count > 1)}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(folder / "constrained_lab.png", dpi=120)
    plt.close(figure)


def plot_break_even(rows: list[dict], folder: Path) -> None:
    import matplotlib.pyplot as plt

    seconds = {(r["forced_characters"], r["jump_forward"]): r["seconds"] for r in rows}
    ratios = [seconds[length, False] / seconds[length, True] for length in RUN_LENGTHS]
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(RUN_LENGTHS, ratios, marker="o")
    axis.axhline(1, color="0.5", linestyle="--", label="break-even")
    axis.set(xlabel="forced characters between free ones", ylabel="seconds of masks only / with jump-forward")
    axis.set_title("llguidance, 8 requests")
    axis.legend()
    figure.savefig(folder / "break_even.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
