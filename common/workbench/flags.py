"""Command lines from frozen dataclasses: a flag for each field, every mistake one line that names the flag."""

import argparse
import dataclasses
import difflib
import shlex
from pathlib import Path

from . import UserError


def flag(default: object, text: str):
    """A field of a dataclass of flags: its default and its help."""
    return dataclasses.field(default=default, metadata={"help": text})


def read_flags(argv: list[str], flags: type, changed: dict[str, str] | None = None, **parser_options) -> dict:
    """The flags that were given, by name; there is one for each field of the dataclass `flags`. `changed` maps
    the starter's flags to what to use now. Raises UserError with one line; -h exits 0."""
    parser = Parser(allow_abbrev=False, **parser_options)
    for entry in dataclasses.fields(flags):
        text = f"{entry.metadata.get('help', '')} (default: {entry.default})"
        options = {"help": text.replace("%", "%%"), "default": None}
        if entry.type is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            options |= {"type": entry.type, "metavar": entry.type.__name__}
        parser.add_argument(f"--{entry.name}", **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [entry.name for entry in dataclasses.fields(flags)]
        raise UserError(unknown_flag(unknown[0], names, changed or {}))
    return {name: value for name, value in vars(known).items() if value is not None}


def print_given(argv: list[str]) -> None:
    """A backslash that is missing at the end of a shell line drops all flags below it, and nothing else would tell."""
    print(
        f"arguments    {shlex.join(argv) or 'none'} (as given; the defaults stand for all others)", flush=True
    )


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def unknown_flag(word: str, names: list[str], changed: dict[str, str]) -> str:
    """The message for a flag that does not exist."""
    name = word.lstrip("-").split("=")[0]
    if name in changed:
        return f"--{name} was the starter's; use {changed[name]}"
    near = []
    if word.startswith("-"):
        near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.5)
    return f"unknown argument {word}" + (f"; did you mean --{near[0]}?" if near else "; -h lists all flags")


def path_or_hub_id(name: str, value: str, suffixes: tuple[str, ...] = ()) -> str:
    """`value` of the flag `name`: an absolute path if it exists, else a hub id ("name" or "owner/name"). Raises
    UserError for what looks like a path, or ends in one of `suffixes`, and is not there."""
    if Path(value).exists():
        return str(Path(value).absolute())
    if value.startswith(("/", ".", "~")) or value.count("/") > 1 or value.endswith(suffixes):
        raise UserError(f"--{name} {value}: no such file or folder")
    return value
