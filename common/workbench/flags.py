"""Command lines: every mistake is one line that names the flag."""

import argparse
import difflib

from . import UserError


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
