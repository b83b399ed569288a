"""run_sglang.py on the real Runtime on the CPU: files, what people see, the same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT, answers, summary_of

CONTRACT = {
    *("records", "failed_records", "prompt_tokens", "cached_prompt_tokens", "prefix_hit_rate", "output_tokens"),
    *("cap_hit_share", "load_s", "generate_s", "wall_s", "tokens_per_s", "compile_s", "roofline_share"),
    *("failures", "settings"),
}


# --- files and what people see ------------------------------------------------------------------------


def test_files_keep_the_contract(uninterrupted_inference, few):
    instructions = [row["instruction"] for row in json.loads(few.read_text())]
    rows = [json.loads(line) for line in (uninterrupted_inference / "outputs.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["output", "instruction"]] * 2
    assert [row["instruction"] for row in rows] == instructions[::10]
    everything = json.loads((uninterrupted_inference / "outputs_all.json").read_text())
    assert [list(row) for row in everything] == [["instruction", "output", "generator"]] * 12
    assert [row["output"] for row in everything[::10]] == [row["output"] for row in rows]
    summary = summary_of(uninterrupted_inference)
    assert summary.keys() >= CONTRACT
    assert summary["records"] == 12
    assert summary["failed_records"] == 0
    assert summary["roofline_share"] is None
    assert summary["settings"]["profile"] == "reproducible"
    assert summary["settings"]["versions"]["sglang"] == "0.5.17"
    assert not list(uninterrupted_inference.glob("outputs.partial*"))
    assert (uninterrupted_inference / "lengths.png").stat().st_size > 5000


def test_the_radix_cache_was_hit(uninterrupted_inference):
    """Every prompt shares the template's header, and the last equals the first."""
    summary = summary_of(uninterrupted_inference)
    assert summary["cached_prompt_tokens"] > 0
    assert summary["prefix_hit_rate"] == summary["cached_prompt_tokens"] / summary["prompt_tokens"]


def test_equal_prompts_have_seeds_of_their_own(uninterrupted_inference):
    everything = json.loads((uninterrupted_inference / "outputs_all.json").read_text())
    assert everything[0]["instruction"] == everything[-1]["instruction"]
    assert everything[0]["output"] != everything[-1]["output"]


def test_terminal_is_calm(uninterrupted_inference):
    text = (uninterrupted_inference / "terminal.txt").read_text()
    for unwanted in ("Warning", "warning", "Traceback", "server_args=", "ServerArgs("):
        assert unwanted not in text, text
    for line in ("time ", "throughput ", "tokens ", "prefix ", "cap ", "profile ", "answers ", "serve "):
        assert re.search(rf"^{line}", text, re.M), line


def test_checker_accepts_it(uninterrupted_inference):
    command = [
        sys.executable,
        "-I",
        str(ROOT / "sglang" / "check_outputs.py"),
        str(uninterrupted_inference / "outputs.jsonl"),
    ]
    done = subprocess.run([*command, "--against", command[-1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows identical, 0 differ" in done.stdout


def test_finished_run_is_left_alone(run_inference, flags, uninterrupted_inference):
    before = answers(uninterrupted_inference)
    code, text = run_inference(*flags, "--output_file", uninterrupted_inference / "outputs.jsonl").wait()
    assert code == 0
    assert "finished; nothing to do (--overwrite starts anew)" in text
    assert answers(uninterrupted_inference) == before


def test_another_command_in_the_folder_is_refused(run_inference, flags, uninterrupted_inference):
    code, text = run_inference(
        *flags, "--temperature", 0, "--output_file", uninterrupted_inference / "outputs.jsonl"
    ).wait()
    assert code == 2
    assert "holds another run (--temperature 0.7 there, 0.0 here)" in text


def test_a_raw_prompt_needs_no_template_and_its_change_is_noticed(run_inference, tiny_model, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("Once upon a time\n")
    flags = ["--model_path", tiny_model, "--prompts", prompts, "--max_new_tokens", 4, "--raw"]
    flags += ["--output_file", out / "outputs.jsonl"]
    code, text = run_inference(*flags).wait()
    assert code == 0, text
    assert summary_of(out)["settings"]["identity"]["raw"] is True
    prompts.write_text("Once upon another time\n")
    code, text = run_inference(*flags).wait()
    assert code == 2
    assert "finished, but prompts_sha256 changed since" in text
    code, text = run_inference(*flags, "--overwrite").wait()
    assert code == 0, text
    assert "another" in (out / "outputs.jsonl").read_text()


def test_stopped_while_it_loads(run_inference, flags, tmp_path):
    """SIGTERM before the first answer: 75, no traceback, no process left."""

    def patch() -> None:
        import run_sglang

        run_sglang.start.start = lambda *_: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(30))

    code, text = run_inference(*flags, "--output_file", tmp_path / "outputs.jsonl", patch=patch).wait()
    assert code == 75, text
    assert "stopped: 0 answers are kept; the same command goes on from there" in text
    assert "Traceback" not in text


# --- the same bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--max_running_requests", 16, "--batch_size", 7),
        ("--dp_size", 2),
        (
            "--engine_args",
            '{"schedule_policy": "lpm", "disable_radix_cache": true, "chunked_prefill_size": 40}',
        ),
        pytest.param(("--max_running_requests", 1), marks=pytest.mark.long),
    ],
    ids=lambda options: str(options[0])[2:] + str(options[1])[:2],
)
def test_bytes_do_not_depend_on_what_runs_beside(
    run_inference, flags, uninterrupted_inference, tmp_path, options
):
    code, text = run_inference(*flags, *options, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    assert answers(tmp_path) == answers(uninterrupted_inference)


def test_records_that_a_full_pool_puts_back_are_counted(
    run_inference, flags, uninterrupted_inference, tmp_path
):
    """On the CPU they are the same; on a GPU another kernel computes them the second time, and the end says so."""
    pool = '{"max_total_tokens": 300, "schedule_conservativeness": 0.01}'
    options = ["--max_running_requests", 16, "--engine_args", pool]
    code, text = run_inference(*flags, *options, "--output_file", tmp_path / "outputs.jsonl").wait()
    assert code == 0, text
    retracted = summary_of(tmp_path)["retracted_records"]
    assert retracted > 0
    assert f"{retracted} records were computed again because the KV pool was full" in text
    assert answers(tmp_path) == answers(uninterrupted_inference)
    assert summary_of(uninterrupted_inference)["retracted_records"] == 0


def test_the_program_as_it_is(uninterrupted_inference, flags, tiny_qwen2, tmp_path):
    """With stock spawned processes and nothing set in the environment but a home that is not there and a TMPDIR too long
    for a socket: the same bytes, in a folder with a space in its name."""
    long = tmp_path / ("scratch_of_a_project_" * 5)
    long.mkdir()
    env = {key: value for key, value in os.environ.items() if key in ("PATH", "VIRTUAL_ENV")}
    env |= {"HOME": "/dev/null/home", "TMPDIR": str(long)}
    command = [
        sys.executable,
        ROOT / "sglang" / "run_sglang.py",
        "--rehearse",
        "--model_path",
        tiny_qwen2,
        *flags,
    ]
    done = subprocess.run(
        [str(word) for word in (*command, "--output_file", tmp_path / "my out" / "outputs.jsonl")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert answers(tmp_path / "my out") == answers(uninterrupted_inference)
    for unwanted in ("Warning", "Traceback", "No CUDA runtime"):
        assert unwanted not in done.stdout + done.stderr


def test_an_engines_ports_are_not_those_that_linux_gives_away(run_inference, few, tmp_path):
    """Until it listens there anybody else could be given them."""

    def tell_ports():
        from sglang.srt.server_args import PortArgs

        new = PortArgs.init_new

        def told(*args, **kwargs):
            print(f"PORT {(ports := new(*args, **kwargs)).nccl_port}", flush=True)
            return ports

        PortArgs.init_new = told

    flags = ["--prompts", few, "--max_new_tokens", 2, "--dp_size", 2]
    flags += ["--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags, patch=tell_ports).wait()
    assert code == 0, text
    ports = [int(port) for port in re.findall(r"PORT (\d+)", text)]
    assert len(ports) >= 2
    given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < given_away


def test_the_gpus_sampler_draws_the_tokens(run_inference, few, tmp_path):
    """lean_sampler in the Runtime, its kernel run by Triton's interpreter: every token of a reproducible run is its
    own, and the files are the same with 1 and 8 running."""
    drawn = tmp_path / "drawn"

    def with_lean_sampler():
        from batch_infer import engine_args
        from runtime_plugins import seeded_top_p

        environment, draw = engine_args.environment, seeded_top_p.seeded_top_p

        def counting(*given):
            tokens = draw(*given)
            with drawn.open("a") as out:
                out.write("token\n" * len(tokens))
            return tokens

        seeded_top_p.seeded_top_p = counting
        engine_args.environment = lambda args: environment(args) | {"RUNTIME_PLUGINS": "cpu,lean_sampler"}

    found = []
    for running in (1, 8):
        out = tmp_path / f"{running}"
        flags = ["--prompts", few, "--max_new_tokens", 8, "--max_running_requests", running]
        flags += ["--output_file", out / "outputs.jsonl"]
        code, text = run_inference(*flags, patch=with_lean_sampler).wait()
        assert code == 0, text
        found.append(answers(out))
        assert len(drawn.read_text().splitlines()) >= summary_of(out)["output_tokens"] * len(found)
    assert found[0] == found[1]
