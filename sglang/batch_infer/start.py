"""Starting the engine: fewer imports, a word while kernels compile, and a warm-up on a GPU."""

import asyncio
import contextlib
import functools
import importlib.util
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from workbench import UserError
from workbench.processes import STOP_SIGNALS, importing

from . import generate, kernels, machine
from .ahead import Ahead, take_own_ports
from .arguments import Arguments
from .engine_args import EngineArgs
from .machine import Machine
from .model import Model
from .prompts import Record


@dataclass(frozen=True)
class Started:
    engine: object  # sglang.Engine
    load_s: float
    compile_s: float


def start(
    args: Arguments, chosen: EngineArgs, model: Model, records: list[Record], ahead: Ahead | None = None
) -> Started:
    """On a GPU the engine is warmed up with the first of the `records`. Raises UserError for --engine_args that
    SGLang refuses."""
    skip_other_models(model.config.get("architectures") or [])
    began, watch = time.monotonic(), CompileWatch()
    if args.device == "cuda":
        watch.start()
    with importing():
        import sglang.srt.entrypoints.engine  # noqa: F401
    take_own_ports()
    if args.device == "cpu":
        fork_engine_processes(str(chosen.values["tokenizer_path"]))
    try:
        with ahead or Ahead():
            engine = generate.start_engine(chosen.values)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        if not args.own_engine_args:
            raise
        last_line = (str(error).strip() or repr(error)).splitlines()[-1]
        raise UserError(f"--engine_args: SGLang refuses them: {last_line}") from error
    if args.device == "cuda":
        warm_up(engine, records, chosen.values["dp_size"])
    engine.freeze_gc()  # a full garbage collection of SGLang's million objects stops decoding for 0.4 s
    compile_s = watch.stop()
    return Started(engine, time.monotonic() - began - compile_s, compile_s)


def serve_first_node(chosen: EngineArgs, ahead: Ahead) -> int:
    """On the other nodes of an engine: its processes work for the first node, which asks and writes, and end with it."""
    os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
    with ahead:
        engine = generate.start_engine(chosen.values)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # what they send when the first node has left
    engine._scheduler_init_result.block_until_scheduler_exits()
    engine.shutdown()
    print("the first node has left; what became of the run stands there")
    return 0


def build_kernels(args: Arguments, chosen: EngineArgs, model: Model, on: Machine) -> None:
    """Begins to: the engine, which starts meanwhile, waits for what it needs."""
    architecture = ".".join(map(str, on.capability))
    modules = kernels.needed(args, model, chosen.values["tp_size"], architecture)
    kernels.begin(modules, machine.kernel_cache())


def skip_other_models(architectures: list[str]) -> None:
    """SGLang's scheduler imports every model it knows, 6 s of CPU time; its own switch for leaving some out
    takes module names. A model that no module of its own defines leaves the switch alone."""
    folder = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "models"
    modules = {path.stem: path.read_text() for path in folder.glob("*.py")}
    pattern = re.compile("|".join(rf"^class {re.escape(name)}\b" for name in architectures), re.M)
    needed = {name for name, text in modules.items() if architectures and pattern.search(text)}
    if needed:
        os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(modules.keys() - needed)))


def fork_engine_processes(tokenizer_folder: str) -> None:
    """SGLang spawns its processes, each with 15 s of imports and 3 s for the tokenizer; from now on they are forked and
    share ours. Only for the CPU: a forked process cannot use CUDA."""
    from sglang.srt.entrypoints import engine
    from sglang.srt.managers import detokenizer_manager, scheduler, tokenizer_manager

    get_tokenizer = functools.cache(tokenizer_manager.get_tokenizer)
    get_tokenizer(  # as they ask for it
        tokenizer_folder,
        tokenizer_mode="auto",
        trust_remote_code=False,
        revision=None,
        tokenizer_backend="huggingface",
    )
    for module in (detokenizer_manager, scheduler, tokenizer_manager):
        module.get_tokenizer = get_tokenizer
    set_start_method = engine.mp.set_start_method
    engine.mp.set_start_method = lambda method, force: set_start_method("fork", force=True)


def warm_up(engine, records: list[Record], copies: int) -> None:
    """Compiles what is still missing: prefill, decode and sampling as this run uses them, then (the second time)
    prefill behind a cached prefix. Nothing of it stays in the cache."""
    sample = [record for record in records if not (record.regex or record.json_schema)][:2]
    sample *= copies  # round robin reaches every copy
    # SGLang refuses a list of no adapters where it serves none.
    adapters = [record.lora for record in sample] if any(record.lora for record in sample) else None
    params = [
        record.sampling_params | {"max_new_tokens": min(4, record.sampling_params["max_new_tokens"])}
        for record in sample
    ]
    for _ in range(2 if sample else 0):
        with contextlib.suppress(ValueError):  # a record that SGLang refuses fails later, alone
            engine.generate(
                input_ids=[record.input_ids for record in sample], sampling_params=params, lora_path=adapters
            )
    engine.flush_cache()


class CompileWatch(threading.Thread):
    """Adds up the seconds in which a compiler runs below this process: FlashInfer and SGLang compile kernels
    when they first need them, on a new machine for 1 to 4 minutes, without a word."""

    COMPILERS = ("nvcc", "cicc", "ptxas", "cc1plus", "ninja")

    def __init__(self, interval_s: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.interval_s, self.compile_s = interval_s, 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        import psutil

        me, last = psutil.Process(), time.monotonic()
        while not self._stopped.wait(self.interval_s):
            now, names = time.monotonic(), set()
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    names.add(child.name())
            if names & set(self.COMPILERS):
                if not self.compile_s:
                    print("compiling GPU kernels (first run on this machine: 1 to 4 minutes)", flush=True)
                self.compile_s += now - last
            last = now

    def stop(self) -> float:
        self._stopped.set()
        return self.compile_s


def stop_on_signals(engine, stopped: asyncio.Event) -> None:
    """Signals set `stopped`. SGLang installs its own handlers with its first request; ours must come later."""

    async def let_sglang_install_its_own() -> None:
        engine.tokenizer_manager.auto_create_handle_loop()

    engine.loop.run_until_complete(let_sglang_install_its_own())
    for number in STOP_SIGNALS:
        engine.loop.add_signal_handler(number, stopped.set)
    engine.loop.add_signal_handler(signal.SIGQUIT, end_at_once)


def end_at_once() -> None:
    """For SIGQUIT, which SGLang sends when one of its processes has died. Its own handler first dumps the
    stacks of the living ones for up to a minute; finished answers are on disk, so nothing needs saving."""
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid())
