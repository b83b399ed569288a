"""Signals and child processes, as both programs use them."""

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator

from . import UserError

STOPPED = 75  # exit code EX_TEMPFAIL: stopped on request, the same command resumes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MAX_TMPDIR = 60  # characters; the libraries add up to 40
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on a parent that is killed takes this process along: it must not go on writing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def use_short_tmpdir() -> None:
    """Processes talk over sockets in TMPDIR, whose paths take 107 characters at most (unix(7)): a longer one, or one that
    is gone, becomes /tmp. Call it before anything asks tempfile."""
    folder = os.environ.get("TMPDIR", "/tmp")
    if len(folder) > MAX_TMPDIR or not os.access(folder, os.W_OK):
        os.environ["TMPDIR"] = "/tmp"


def free_port() -> int:
    """A TCP port that is free now, and below those that Linux gives to whoever names none (32768 and more): nobody is given
    it before it is listened on."""
    draw = random.SystemRandom()  # forked processes would draw alike
    while True:
        port = draw.randrange(16384, 32768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of thousands of modules: to look for garbage among all that stays takes a fifth of their time, and 740
    modules more come if transformers finds scikit-learn, for a way to decode that nothing here takes."""
    sys.modules.setdefault("sklearn", None)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_in_child(function: Callable[[], str]) -> str:
    """What `function` returns in a forked child, which may initialise what this process must not. Raises its
    UserError here; a child that ends otherwise is a RuntimeError."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, text = 1, ""
        try:
            die_with_parent()
            code, text = 0, function()
        except UserError as error:
            code, text = 2, str(error)
        except BaseException:
            traceback.print_exc()
        finally:
            with os.fdopen(writing, "w") as out:
                out.write(text)
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 2:
        raise UserError(text)
    if code:
        raise RuntimeError(f"a child process ended with exit code {code}")
    return text
