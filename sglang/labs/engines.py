"""SGLang engines for the labs, each in a forked process of its own: one that dies takes its process along."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from batch_infer import order, preflight, report
from batch_infer.arguments import REHEARSAL, Arguments, parse
from batch_infer.engine_args import decide, environment
from batch_infer.start import skip_other_models, start
from workbench import UserError
from workbench.processes import importing, run_in_child

Work = Callable[[object], Iterable]  # takes an engine, gives results


def arguments(flags, **more: object) -> Arguments:
    """Those of run_sglang.py for a lab's flags. Raises UserError."""
    model = {"model_path": flags.model_path} if flags.model_path else {"rehearse": True}
    words = {
        **{"device": flags.device, "engine_args": flags.engine_args, "fast": True, "dp_size": 1},
        **{"prompts": REHEARSAL / "instructions.json", "output_file": Path(flags.output_dir) / "outputs.jsonl"},
    }
    return parse([f"--{name}={value}" for name, value in (words | model | more).items()])


def prepare(args: Arguments) -> preflight.Inputs:
    """What every engine of a lab shares. Raises UserError."""
    os.environ.update(environment(args))
    report.quiet_libraries(args)
    inputs = preflight.run(args)
    os.environ["HF_HUB_OFFLINE"] = "1"  # preflight has fetched everything
    if args.device == "cpu":  # imported once, for all engines; on a GPU each engine's processes do it
        skip_other_models(inputs.model.config["architectures"])
        with importing():
            import sglang.srt.managers.scheduler  # noqa: F401
    return inputs


def measure(args: Arguments, inputs: preflight.Inputs, plugin: str, work: Work, total: int, title: str) -> list:
    """Starts an engine with one more of runtime_plugins; returns the `total` results of work(engine), as JSON keeps
    them, and shows how many are there. What the engine prints goes to engine.log. Raises UserError."""
    from tqdm import tqdm

    log = args.folder / "engine.log"

    def engine_process() -> str:
        terminal = os.fdopen(os.dup(2), "w")
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(environment(args) | inputs.machine.compiler)
        os.environ["RUNTIME_PLUGINS"] += f",{plugin}"
        how = order.decide(args, inputs.records)
        chosen = decide(args, inputs.machine, inputs.model, inputs.records, how)
        engine = start(args, chosen, inputs.model, []).engine
        often = 0.2 if terminal.isatty() else 10
        results = list(tqdm(work(engine), title, total, file=terminal, mininterval=often))
        engine.shutdown()
        return json.dumps(results)

    sys.stdout.flush()
    try:
        return json.loads(run_in_child(engine_process))
    except RuntimeError as error:
        raise UserError(f"an engine has died; see {log}") from error


def forward_passes(engine) -> int:
    """Passes of the model so far; needs the plugin count_passes."""
    return engine.get_server_info()["internal_states"][0]["forward_passes"]
