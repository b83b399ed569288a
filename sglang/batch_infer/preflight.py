"""Everything that can be known before the engine starts: a PASS/FAIL table, each FAIL with its cure.

Imports neither torch nor sglang before a GPU is found (but for building a rehearsal's model): a missing GPU or
model is told within a second or two.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from workbench import UserError
from workbench.files import check_room
from workbench.machine import Table, versions
from workbench.models import find_model, load_tokenizer, weights_fingerprint
from workbench.processes import run_in_child

from . import adapters, engine_args, grammars, kernels, model, prompts
from . import machine as machines
from .arguments import FOLDER, GPUS, PROGRAM, REHEARSAL, TINY_MODEL, Arguments
from .machine import Machine
from .model import Model
from .prompts import Record

PACKAGES = ("torch", "sglang", "flashinfer-python", "transformers", "tokenizers", "xgrammar", "numpy")
PLUGINS = FOLDER / "runtime_plugins"
INSTALL_PLUGINS = "pip install --no-deps ./sglang/runtime_plugins"


@dataclass(frozen=True)
class Inputs:
    """What a run works with."""

    machine: Machine
    made_on: dict  # what bytes depend on beside the command
    model: Model
    records: list[Record]
    prompts_sha256: str
    prompts_revision: str | None  # on the hub
    adapters: dict[str, str]  # hash by folder


def run(args: Arguments, found_machine: Callable[[Machine], None] = lambda machine: None) -> Inputs | None:
    """Prints the table; None with --download_only. Raises UserError with the first failure. `found_machine` is called as soon
    as it is looked at, while nothing has failed."""
    table = Table()
    print("preflight")
    packages = table.check("packages", look_at_packages)
    # Login nodes, where one downloads, have no GPU.
    machine = None if args.download_only else table.find("GPUs", lambda: machines.look(args))
    if machine:
        compiler = table.find("kernel tools", lambda: machines.look_at_kernel_tools(args))
        machine = replace(machine, compiler=compiler or {})
        if not table.first_failure:
            found_machine(machine)
    if packages and args.own_engine_args:
        table.check("engine args", lambda: look_at_engine_args(args.own_engine_args))
    found_model = table.find("model", lambda: look_at_model(args))
    found_prompts = table.find("prompts", lambda: look_at_prompts(args))
    served = None
    if found_prompts and not args.download_only:
        records = found_prompts[0]
        if found_model:
            served = table.find("adapter", lambda: look_at_adapters(args, found_model, records))
            if constrained := next((r for r in records if r.regex or r.json_schema), None):
                table.check("grammars", lambda: look_at_grammars(args, found_model, constrained))
        table.check("disk", lambda: look_at_disk(args, records))
    if found_model and args.gpu:
        table.check("kernels", lambda: build_kernels(args, found_model))
    if table.first_failure:
        raise UserError(table.first_failure)
    if args.download_only:
        return None
    records, hashes = served
    return Inputs(machine, machines.identity(machine), found_model, records, *found_prompts[1:], hashes)


def look_at_packages() -> str:
    """Raises UserError if a package is missing or the installed runtime_plugins are not those of this checkout."""
    try:
        installed = importlib.metadata.distribution("assignment-runtime-plugins")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"sglang/runtime_plugins is not installed; run `make install` (or {INSTALL_PLUGINS})"
        ) from error
    folder = Path(installed.locate_file("runtime_plugins"))
    declared = tomllib.loads((PLUGINS / "pyproject.toml").read_text())["project"]["entry-points"]
    entry_points = {(group, name, value) for group, names in declared.items() for name, value in names.items()}
    same = _sources(folder) == _sources(PLUGINS)
    if not same or {(e.group, e.name, e.value) for e in installed.entry_points} != entry_points:
        raise UserError(
            f"the installed sglang/runtime_plugins is another version; run `make install` (or {INSTALL_PLUGINS})"
        )
    found = versions(PACKAGES)
    return ", ".join(f"{name} {version}" for name, version in found.items() if name != "numpy")


def _sources(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def look_at_engine_args(own: dict) -> str:
    """In a child: importing SGLang initialises CUDA, and a process that has done so cannot fork engines or ask for
    GPUs."""

    def check() -> str:
        engine_args.check_own(own)
        return f"--engine_args sets {', '.join(own)}"

    return run_in_child(check)


def look_at_model(args: Arguments) -> tuple[Model, str]:
    """Finds, fetches or (for a rehearsal) builds it."""
    folder = Path(args.model_path)
    if args.rehearse and folder == args.folder / TINY_MODEL and not (folder / "config.json").exists():
        build_tiny_model(folder)
    dummy = args.own_engine_args.get("load_format") == "dummy"
    try:
        folder, revision, text = find_model(args.model_path, "--model_path", PROGRAM, weights=not dummy)
    except UserError as error:
        if args.lora_path and args.model_path == adapters.base_name(Path(args.lora_path)):
            raise UserError(f"{error}; the adapter names this base: name it with --model_path") from error
        raise
    found = model.read(folder, revision, revision or weights_fingerprint(folder), args.device)
    if window := model.sliding_window(found.config):
        text = (
            f"WARN: {text}; SGLang has no sliding-window attention for it, which changes nothing up to {window} tokens: "
            f"prompt and answer are limited to {found.context_tokens}"
        )
    return found, text


def build_tiny_model(folder: Path) -> None:
    sys.path.append(str(REHEARSAL))
    from tiny_model import build_qwen2

    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        built = build_qwen2(Path(temporary) / folder.name)
        with contextlib.suppress(OSError):  # another shard was first; it builds the same
            built.replace(folder)


def build_kernels(args: Arguments, found: Model) -> str:
    """For a GPU that this machine lacks, where there is a compiler; without one the run's node compiles."""
    try:
        compiler, _ = machines.look_at_kernel_tools(args)
    except UserError as error:
        return f"SKIP: {error}"
    os.environ |= compiler
    modules = kernels.needed(args, found, args.tp_size or 1, GPUS[args.gpu])
    process = kernels.begin(modules, machines.kernel_cache())
    if process and process.wait():
        return f"WARN: some could not be built for {args.gpu}, see {process.args[-1]}.log; the first run tries again"
    return f"built for {args.gpu}"


def look_at_prompts(args: Arguments) -> tuple[tuple[list[Record], str, str | None], str]:
    """(records, SHA-256 of the file, revision on the hub)"""
    path, revision = prompts.find(args.prompts)
    records = prompts.read(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    bad = [record for record in records if record.error]
    text = f"{args.prompts}: {len(records)} records, SHA-256 {sha256[:12]}"
    if bad:
        text = f"WARN: {text}; {len(bad)} of them bad, the first is row {bad[0].index + 1}: {bad[0].error}"
    if len(bad) == len(records):
        raise UserError(
            f"--prompts {args.prompts}: none of the {len(records)} rows can be used; row 1: {bad[0].error}"
        )
    return (records, sha256, revision), text


def look_at_adapters(
    args: Arguments, base: Model, records: list[Record]
) -> tuple[tuple[list[Record], dict[str, str]], str | None]:
    """Checks --lora_path (raises) and each record's adapter (its record fails)."""
    records, hashes = adapters.check_all(records, args.lora_path, base.config)
    if hashes and args.own_engine_args.get("load_format") == "dummy":
        raise UserError(
            "--engine_args: SGLang reads adapters as load_format says, and dummy reads none; use a base with weights"
        )
    text = f"{len(hashes)} in the records" if hashes else None
    if args.lora_path:
        text, trained_on = args.lora_path, adapters.base_name(Path(args.lora_path))
        if trained_on and Path(trained_on).name != Path(args.model_path).name:
            text = f"WARN: {args.lora_path} was trained on {trained_on}, the base here is {args.model_path}"
    return (records, hashes), text


def look_at_grammars(args: Arguments, base: Model, record: Record) -> str:
    backend = args.own_engine_args.get("grammar_backend", "xgrammar")
    folder = engine_args.tokenizer_folder(args, base)
    if text := grammars.misread(load_tokenizer(Path(folder)), base.config["vocab_size"], backend):
        raise UserError(
            f"{folder}: {backend} reads its tokens of {grammars.ROUND_TRIP!r} as {text!r} and would abort row "
            f"{record.index + 1}, which has a grammar; mend the decoder in tokenizer.json (byte-level BPE: ByteLevel "
            "alone), or take out the regex and json_schema"
        )
    return f"{backend} reads the tokenizer's vocabulary as it is written"


def look_at_disk(args: Arguments, records: list[Record]) -> str:
    needed = 12 * sum(min(record.flag(args, "max_new_tokens"), 2048) for record in records) + 2**20
    return check_room(
        args.folder, "--output_file in", needed, needed, "free some, or name another --output_file"
    )


def local_inputs(args: Arguments) -> dict[str, str]:
    """Hashes of what this command reads from local files, named as in summary.json's settings."""
    found = {}
    if Path(args.prompts).is_file():
        found["prompts_sha256"] = hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest()
    if (Path(args.model_path) / "config.json").exists():
        found["weights_id"] = weights_fingerprint(Path(args.model_path))
    if args.lora_path:
        found["adapter_id"] = adapters.adapter_fingerprint(Path(args.lora_path))
    return found
