"""Nothing is lost: killed anywhere, the same command goes on and gives the same numbers bit for bit (CPU)."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import ROOT, children_of, fork
from lora_sft import report, run_folder
from lora_sft.arguments import Arguments, parse
from workbench import UserError


def rows_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def course(out: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows_of(out)]


@pytest.fixture(scope="session")
def uninterrupted(adapter) -> Path:
    """6 steps with dropout 0.05 and a checkpoint every 2, left alone."""
    return adapter


@pytest.fixture
def command(quick) -> list[str]:
    """The flags of `uninterrupted`."""
    return [*quick, "--learning_rate", "0.02"]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def assert_finished_like(out: Path, uninterrupted: Path) -> None:
    from safetensors.numpy import load_file

    assert course(out) == course(uninterrupted)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (uninterrupted, out))
    assert set(theirs) == set(ours)
    assert all((theirs[name] == ours[name]).all() for name in theirs)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (out, uninterrupted)]
    for name in ("eval_loss_before", "eval_loss_after", "train_tokens", "steps"):
        assert summaries[0][name] == summaries[1][name], name


# --- kills and signals --------------------------------------------------------------------------------


@pytest.mark.v100
def test_kill_9_of_everything_while_saving(start, command, uninterrupted, out):
    """The checkpoint's files exist, its marker does not: it never counts. Each start warms up again, and says so."""

    def die_before_the_marker():
        mark = run_folder.mark_complete

        def dying(checkpoint, keep):
            if checkpoint.name == "checkpoint-4":
                os.killpg(0, signal.SIGKILL)
            mark(checkpoint, keep)

        run_folder.mark_complete = dying

    code, _ = start(*command, "--output_dir", out, patch=die_before_the_marker).wait()
    assert code == -signal.SIGKILL
    assert (out / "checkpoint-4" / "trainer_state.json").exists()
    assert not (out / "checkpoint-4" / "complete.json").exists()
    code, text = start(*command, "--output_dir", out).wait()
    assert code == 0, text
    assert f"resuming from {out / 'checkpoint-2'}" in text
    assert_finished_like(out, uninterrupted)
    assert [row["step_of_start"] for row in rows_of(out)] == [1, 2, 1, 2, 3, 4]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_random_moments(start, command, uninterrupted, out, seed):
    """Up to 5 kills, anywhere from the preflight to the final evaluation; then the run is let through."""
    draw = random.Random(seed)
    for _ in range(5):
        run = start(*command, "--output_dir", out)
        time.sleep(draw.uniform(0.2, 9.0))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    code, text = start(*command, "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)


def test_kill_9_of_one_rank_ends_the_run_with_1(start, command, out):
    run = start(*command, "--output_dir", out)
    run.wait_for(lambda: len(rows_of(out)) >= 1)
    ranks = children_of(run.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, text = run.wait()
    assert code == 1
    assert "error: rank 1 was killed by SIGKILL" in text
    assert "Traceback" not in text  # what the other rank saw of it explains nothing
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.long
@pytest.mark.v100
def test_signal_to_every_process(start, command, uninterrupted, out):
    """As from Ctrl-C or Slurm: all ranks finish the step, save once and exit 75; then the rest is trained."""
    run = start(*command, "--save_steps", "100", "--output_dir", out)
    run.wait_for(lambda: len(rows_of(out)) >= 2)
    os.killpg(run.pid, signal.SIGUSR1)
    code, text = run.wait()
    assert code == 75, text
    stopped_at = len(rows_of(out))
    assert [path.parent.name for path in out.glob("checkpoint-*/complete.json")] == [f"checkpoint-{stopped_at}"]
    code, text = start(*command, "--save_steps", "100", "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)


@pytest.mark.long
def test_killed_after_the_last_step(start, command, uninterrupted, out):
    """Only the end is left: no step more (6 steps end in the middle of an epoch), the same adapter."""
    shutil.copytree(uninterrupted, out)
    for name in ("summary.json", "adapter_model.safetensors"):
        (out / name).unlink()
    code, text = start(*command, "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)
    assert not (out / "checkpoint-7").exists()


@pytest.mark.long
def test_killed_before_the_first_checkpoint_starts_from_nothing(start, command, uninterrupted, out):
    """Neither an evaluation nor rows of the killed run may survive into the new one."""
    shutil.copytree(uninterrupted, out, ignore=shutil.ignore_patterns("checkpoint-*", "summary.json"))
    (out / "eval_before.json").write_text('{"eval_loss_before": 1.0}')
    code, text = start(*command, "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)


# --- whose folder it is -------------------------------------------------------------------------------


def test_finished_run_is_left_alone_and_other_commands_are_refused(start, command, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir() if path.name != ".lock"}
    code, text = start(*command, "--output_dir", uninterrupted).wait()
    assert code == 0
    assert "finished; nothing to do" in text
    code, text = start(*command, "--lora_r", "8", "--output_dir", uninterrupted).wait()
    assert code == 2
    assert "--lora_r 16 there, 8 here" in text
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("changed", ["rows of --data_path", "weights of --model_name_or_path"])
def test_a_finished_run_whose_local_files_changed_is_refused(tiny_model, out, tmp_path, changed):
    from lora_sft import data
    from workbench.models import weights_fingerprint

    shutil.copytree(tiny_model, tmp_path / "model")
    rows = str(shutil.copy(ROOT / "rehearsal" / "preferences.jsonl", tmp_path / "rows.jsonl"))
    args = parse(
        ["--model_name_or_path", str(tmp_path / "model"), "--data_path", rows, "--output_dir", str(out)]
    )
    split = data.split_rows(data.read_file(Path(rows)), [], args.max_train_rows, args.max_eval_rows, args.seed)
    plan = {"data_sha256": data.rows_sha256(*split), "weights_id": weights_fingerprint(tmp_path / "model")}
    out.mkdir()
    (out / "run_config.json").write_text(json.dumps({"identity": args.identity({}), "plan": plan}))
    (out / "summary.json").write_text("{}")
    assert run_folder.nothing_to_do(out, args, {})
    path = tmp_path / "rows.jsonl" if "rows" in changed else tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"Human: ", b"Human: So ", 1) if "rows" in changed else content[:-1] + b"~"
    )
    with pytest.raises(UserError, match=f"the {changed} changed since the run began"):
        run_folder.nothing_to_do(out, args, {})


@pytest.mark.parametrize("key", ["data_sha256", "model_revision", "weights_id", "dtype", "world_size"])
def test_changed_inputs_are_refused(uninterrupted, key):
    plan = SimpleNamespace(**json.loads((uninterrupted / "run_config.json").read_text())["plan"])
    run_folder.check_same_inputs(uninterrupted, plan)
    setattr(plan, key, 3)
    message = "was started on 2 GPUs, 3 here" if key == "world_size" else "changed since the run began"
    with pytest.raises(UserError, match=message):
        run_folder.check_same_inputs(uninterrupted, plan)


def test_a_local_model_is_known_by_its_weights(tiny_model, tmp_path):
    from lora_sft.preflight import look_at_model

    shutil.copytree(tiny_model, tmp_path / "model")
    args = replace(Arguments(), model_name_or_path=str(tmp_path / "model"))
    before, _ = look_at_model(args)
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"~")
    after, _ = look_at_model(args)
    assert asdict(before) | {"weights_id": ""} == asdict(after) | {"weights_id": ""}
    assert before.weights_id != after.weights_id


def test_overwrite_starts_anew_once_preflight_has_passed(start, command, uninterrupted, out):
    shutil.copytree(uninterrupted, out)
    (out / "notes.txt").write_text("mine")
    code, _ = start(*command, "--lora_target_modules", "nothing", "--overwrite", "--output_dir", out).wait()
    assert code == 2
    assert (out / "summary.json").exists()
    assert (out / "checkpoint-6" / "complete.json").exists()
    code, text = start(*command, "--max_steps", "1", "--overwrite", "--output_dir", out).wait()
    assert code == 0, text
    assert [row["step"] for row in rows_of(out)] == [1]
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]


def test_what_a_kill_may_leave_is_nobody_elses(tmp_path):
    (tmp_path / "checkpoint-50").mkdir()
    for name in (".disk_probe", "run_config.json.tmp", "training.log"):
        (tmp_path / name).write_text("")
    run_folder.check_owner(tmp_path, {})


def test_second_run_in_the_same_folder_is_refused(tmp_path):
    from workbench import files

    with files.claim(tmp_path / "out", "--output_dir"):

        def second() -> int:
            try:
                with files.claim(tmp_path / "out", "--output_dir"):
                    return 0
            except UserError as error:
                return 2 if "another run is writing there" in str(error) else 1

        assert fork(second, tmp_path / "second.txt").wait()[0] == 2
    with files.claim(tmp_path / "out", "--output_dir"):
        pass


# --- checkpoints and rates ----------------------------------------------------------------------------


def test_old_checkpoints_go_only_after_the_new_marker(uninterrupted):
    assert sorted(path.name for path in uninterrupted.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_that_lost_bytes_does_not_count(uninterrupted, out):
    """The one before does, and the run says so."""
    shutil.copytree(uninterrupted, out)
    for name in run_folder.complete_checkpoints(out):
        assert run_folder.damage(name) is None
    path = next((out / "checkpoint-6").glob("global_step*/*rank_1*optim_states.pt"))
    os.truncate(path, 100)
    assert run_folder.damage(out / "checkpoint-6").startswith(f"global_step6/{path.name}: 100 of ")
    path.unlink()
    assert ": 0 of " in run_folder.damage(out / "checkpoint-6")


def test_checkpoints_do_not_hold_the_frozen_base(uninterrupted, tiny_model):
    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoint-6").rglob("*"))
    adapter = (uninterrupted / "adapter_model.safetensors").stat().st_size
    # adapter + master weights and two Adam moments in fp32, per rank split; the base would add 4 MB
    assert size < 6.5 * adapter
    assert adapter < (tiny_model / "model.safetensors").stat().st_size / 5


@pytest.mark.parametrize(("starts", "rate"), [((6, 6), 1000), ((6, 2), 1000), ((2, 2), 100)])
def test_rates_leave_out_the_warm_up_of_every_start(starts, rate):
    """The first three steps of a start take ten times as long; they count only if there are no others."""
    rows = [
        {"step_of_start": n, "step_time_s": 10.0 if n <= 3 else 1.0, "real_tokens": 2000, "trained_tokens": 500,
         "skipped_update": False}
        for steps in starts for n in range(1, steps + 1)
    ]  # fmt: skip
    model = {"matmul_parameters": 1, "gpu_name": None, "dtype": "fp16", "recomputed_share": 1.0}
    summary = report.summarise(rows, world_size=2, **model)
    assert summary["tokens_per_s_per_gpu"] == rate
    assert summary["steps"] == len(rows)
