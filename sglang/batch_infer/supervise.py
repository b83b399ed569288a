"""A light parent process: a dying engine kills its process without an exception, so the work is done in a child."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from workbench import UserError
from workbench.files import disk_full
from workbench.processes import STOP_SIGNALS, STOPPED, die_with_parent

from . import store


def supervise(function: Callable[[], int], folder: Path, overwrite: bool, shard: int = 1) -> int:
    """Runs `function` in a child and returns its exit code. If the child was killed, says what is kept:
    75 if this start has gained answers, else 1 (the same command would die again)."""
    before = 0 if overwrite else store.count_answers(folder, shard)
    parent, stops = os.getpid(), []
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run_child(function, folder, parent)

    def pass_on(number: int, _) -> None:
        stops.append(number)
        os.kill(pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a killed job may have left
    if code >= 0:
        return code
    kept = store.count_answers(folder, shard)
    where = f"{kept} answers are kept; {same_command(overwrite)} goes on from there"
    if stops:
        print(f"stopped: {where}")
        return STOPPED
    name = signal.Signals(-code).name
    print(f"error: the engine's process was ended by {name}, see the lines above; {where}", file=sys.stderr)
    return STOPPED if kept > before else 1


def same_command(overwrite: bool) -> str:
    return "the same command without --overwrite" if overwrite else "the same command"


def _run_child(function: Callable[[], int], folder: Path, parent: int) -> None:
    code = 1
    try:
        die_with_parent()
        os.setpgid(0, 0)  # Ctrl-C reaches the parent only, which passes it on: the engine must not see it
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        code = function() if os.getppid() == parent else STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException as error:
        if isinstance(error, Exception) and disk_full(error, folder):
            print(f"error: the disk or quota of {folder} is full; free some and run it again", file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
