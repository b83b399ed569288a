"""Runs programs as forked children: the parent has imported the libraries, so a run starts at once.

The parent (pytest) must not start threads or compute with torch: children are forked from it.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Process:
    """A forked program: its pid and the file that its terminal output goes to."""

    pid: int
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def ended(self) -> bool:
        """Whether `wait` would return at once."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, timeout_s: float = 240) -> tuple[int, str]:
        """(exit code, output); a signal's number is negative, as in subprocess."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), self.text()
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"no end after {timeout_s} s:\n{self.text()[-3000:]}")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Returns once `condition()` holds; fails the test if the program ends or takes too long first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            assert not ended, f"ended early ({status}):\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.text()[-3000:]}"
            time.sleep(0.005)


def fork(function: Callable[[], int], output: Path, env: dict[str, str] | None = None) -> Process:
    """Runs `function` in a forked child in a session of its own; it exits with the returned code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output)
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update(env or {})
        code = function()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(function: Callable[[], object], folder: Path) -> str:
    """What `function` prints in a forked child, where torch may compute and libraries may be patched; what it raises
    fails the test."""

    def run() -> int:
        function()
        return 0

    code, text = fork(run, folder / "child.txt").wait()
    print(text)
    assert code == 0, text
    return text


def children_of(pid: int) -> list[int]:
    """Child processes of `pid`, oldest first."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


# --- an inference run's folder ------------------------------------------------------------------------


def answers(folder: Path) -> tuple[bytes, bytes]:
    """outputs.jsonl and outputs_all.json, as they are."""
    return (folder / "outputs.jsonl").read_bytes(), (folder / "outputs_all.json").read_bytes()


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def partial_rows(folder: Path) -> list[dict]:
    """What the partial files hold of records."""
    from batch_infer import store

    rows = [row for path in store.partial_files(folder) for row in store.read_rows(path)]
    return [row for row in rows if "index" in row]


def keep_the_ids() -> None:
    """In a run of the inference program: its durable rows, which hold token ids, stay when it has finished."""
    from batch_infer.store import PartialFile

    PartialFile.remove = lambda self: None


class StandIn:
    """An engine that answers at once, for what this program does around it."""

    def __init__(self, answer_tokens: int, answer_s: float) -> None:
        self.loop, self.tokenizer_manager = asyncio.new_event_loop(), self
        self.running, self.answer_s = asyncio.Semaphore(256), answer_s
        self.ids = [300 + i for i in range(answer_tokens)]

    def auto_create_handle_loop(self) -> None: ...

    def shutdown(self) -> None: ...

    def get_server_info(self) -> dict:
        return {"max_total_num_tokens": 10**6}

    async def async_generate(self, input_ids, sampling_params, stream=False, **_):
        async with self.running:
            await asyncio.sleep(self.answer_s)
        usage = {"prompt_tokens": len(input_ids), "cached_tokens": 0, "completion_tokens": len(self.ids)}
        ids = [token + 0 for token in self.ids]  # each answer's own
        found = {"text": f"{input_ids[-9:]} " + "word " * len(ids), "output_ids": ids}
        found["meta_info"] = {"finish_reason": {"type": "stop"}, **usage}

        async def chunks():
            yield found

        return chunks() if stream else found


def stand_in(answer_tokens: int = 4, answer_s: float = 0.002) -> None:
    import run_sglang

    started = run_sglang.start.Started(StandIn(answer_tokens, answer_s), 0.0, 0.0)
    run_sglang.start.start = lambda *_: started


def killed_at(name: str, number: int, behind: bool):
    """A patch: kill -9 at (or just behind) the n-th time that a file of that name is synced to disk."""

    def patch() -> None:
        stand_in()
        sync, left = os.fsync, [number]

        def counting(file: int) -> None:
            left[0] -= name in os.readlink(f"/proc/self/fd/{file}")
            if behind or left[0]:
                sync(file)
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = counting

    return patch


def greedy_ids(base: Path, adapter: Path, texts: list[str], tokens: int, out: Path) -> None:
    """Writes what PEFT's generate gives, without and with the adapter, as a list of ids each."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    found = []
    for adapted in (False, True):
        model = PeftModel.from_pretrained(model, adapter) if adapted else model
        for text in texts:
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            mask = torch.ones_like(ids)
            new = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
            found.append(new[0, ids.shape[1] :].tolist())
    out.write_text(json.dumps(found))
