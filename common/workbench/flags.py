"""Command lines: every mistake is one line that names the flag."""

import argparse
import difflib
from dataclasses import fields

from . import UserError


def read_flags(
    argv: list[str], arguments: type, texts: dict[str, str], changed: dict[str, str], **parser_options
) -> dict:
    """The flags that were given, by name. There is one for each field of the dataclass `arguments`, with its
    help from `texts`; `changed` maps the starter's flags to what to use now. Raises UserError with one line;
    -h exits 0."""
    parser = Parser(allow_abbrev=False, **parser_options)
    for entry in fields(arguments):
        options = {"help": f"{texts[entry.name]} (default: {entry.default})", "default": None}
        if entry.type is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            options |= {"type": entry.type, "metavar": entry.type.__name__}
        parser.add_argument(f"--{entry.name}", **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(unknown_flag(unknown[0], [entry.name for entry in fields(arguments)], changed))
    return {key: value for key, value in vars(known).items() if value is not None}


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
    """The message for a flag that does not exist; `changed` maps the starter's flags to what to use now."""
    name = word.lstrip("-").split("=")[0]
    if name in changed:
        return f"--{name} was the starter's; use {changed[name]}"
    near = []
    if word.startswith("-"):
        near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.5)
    return f"unknown argument {word}" + (f"; did you mean --{near[0]}?" if near else "; -h lists all flags")
