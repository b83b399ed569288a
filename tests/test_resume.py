"""Nothing is lost: killed anywhere, the same command goes on and gives the same numbers bit for bit (CPU)."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from harness import children_of, fork


def rows_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def course(out: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows_of(out)]


@pytest.fixture(scope="module")
def uninterrupted(libraries, quick, tmp_path_factory) -> Path:
    """6 steps with dropout 0.05 and a checkpoint every 2, left alone."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    code, text = fork(
        lambda: libraries.main([*quick, "--output_dir", str(out)]), out.parent / "terminal.txt"
    ).wait()
    assert code == 0, text
    return out


def assert_finished_like(out: Path, uninterrupted: Path) -> None:
    from safetensors.numpy import load_file

    assert course(out) == course(uninterrupted)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (uninterrupted, out))
    assert set(theirs) == set(ours)
    assert all((theirs[name] == ours[name]).all() for name in theirs)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (out, uninterrupted)]
    for name in ("eval_loss_before", "eval_loss_after", "train_tokens", "steps"):
        assert summaries[0][name] == summaries[1][name], name


@pytest.mark.v100
def test_kill_9_of_everything(start, quick, uninterrupted, tmp_path):
    out = tmp_path / "out"
    run = start(*quick, "--output_dir", out)
    run.wait_for(lambda: len(rows_of(out)) >= 3)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "summary.json").exists()
    code, text = start(*quick, "--output_dir", out).wait()
    assert code == 0, text
    assert f"resuming from {out / 'checkpoint-'}" in text
    assert_finished_like(out, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_random_moments(start, quick, uninterrupted, tmp_path, seed):
    """Up to 5 kills, anywhere from the preflight to the final evaluation; then the run is let through."""
    out, draw = tmp_path / "out", random.Random(seed)
    for _ in range(5):
        run = start(*quick, "--output_dir", out)
        time.sleep(draw.uniform(0.2, 9.0))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    code, text = start(*quick, "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)


def test_kill_9_of_one_rank_ends_the_run_with_1(start, quick, uninterrupted, tmp_path):
    out = tmp_path / "out"
    run = start(*quick, "--output_dir", out)
    run.wait_for(lambda: len(rows_of(out)) >= 2)
    ranks = children_of(run.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, text = run.wait()
    assert code == 1
    assert "error: rank 1 was killed by SIGKILL" in text
    assert "Traceback" not in text  # what the other rank saw of it explains nothing
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_kill_9_while_saving(start, quick, uninterrupted, tmp_path):
    """The checkpoint's files exist, its marker does not: it never counts."""
    out = tmp_path / "out"

    def die_before_the_marker():
        from lora_sft import run_folder

        mark = run_folder.mark_complete

        def dying(checkpoint, keep):
            if checkpoint.name == "checkpoint-4":
                os.killpg(0, signal.SIGKILL)
            mark(checkpoint, keep)

        run_folder.mark_complete = dying

    code, _ = start(*quick, "--output_dir", out, patch=die_before_the_marker).wait()
    assert code == -signal.SIGKILL
    assert (out / "checkpoint-4" / "trainer_state.json").exists()
    assert not (out / "checkpoint-4" / "complete.json").exists()
    code, text = start(*quick, "--output_dir", out).wait()
    assert code == 0, text
    assert f"resuming from {out / 'checkpoint-2'}" in text
    assert_finished_like(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_every_process(start, quick, uninterrupted, tmp_path, number):
    """As from Ctrl-C or Slurm: all ranks finish the step, save once and exit 75; then the rest is trained."""
    out = tmp_path / "out"
    run = start(*quick, "--save_steps", "100", "--output_dir", out)
    run.wait_for(lambda: len(rows_of(out)) >= 2)
    os.killpg(run.pid, number)
    code, text = run.wait()
    assert code == 75, text
    stopped_at = len(rows_of(out))
    assert [path.parent.name for path in out.glob("checkpoint-*/complete.json")] == [f"checkpoint-{stopped_at}"]
    if number == signal.SIGTERM:  # the second half is the same
        code, text = start(*quick, "--save_steps", "100", "--output_dir", out).wait()
        assert code == 0, text
        assert_finished_like(out, uninterrupted)


def test_killed_after_the_last_step(start, quick, uninterrupted, tmp_path):
    """Only the end is left: no step more (6 steps end in the middle of an epoch), the same adapter."""
    import shutil

    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    for name in ("summary.json", "adapter_model.safetensors"):
        (out / name).unlink()
    code, text = start(*quick, "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)
    assert not (out / "checkpoint-7").exists()


def test_killed_before_the_first_checkpoint_starts_from_nothing(start, quick, uninterrupted, tmp_path):
    """Neither an evaluation nor rows of the killed run may survive into the new one."""
    import shutil

    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out, ignore=shutil.ignore_patterns("checkpoint-*", "summary.json"))
    (out / "eval_before.json").write_text('{"eval_loss_before": 1.0}')
    code, text = start(*quick, "--output_dir", out).wait()
    assert code == 0, text
    assert_finished_like(out, uninterrupted)


def test_finished_run_is_left_alone_and_other_commands_are_refused(start, quick, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir() if path.name != ".lock"}
    code, text = start(*quick, "--output_dir", uninterrupted).wait()
    assert code == 0
    assert "finished; nothing to do" in text
    code, text = start(*quick, "--lora_r", "8", "--output_dir", uninterrupted).wait()
    assert code == 2
    assert "--lora_r 16 there, 8 here" in text
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir() if path.name != ".lock"}


def test_old_checkpoints_go_only_after_the_new_marker(uninterrupted):
    assert sorted(path.name for path in uninterrupted.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_checkpoints_do_not_hold_the_frozen_base(uninterrupted, tiny_model):
    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoint-6").rglob("*"))
    adapter = (uninterrupted / "adapter_model.safetensors").stat().st_size
    # adapter + master weights and two Adam moments in fp32, per rank split; the base would add 4 MB
    assert size < 6.5 * adapter
    assert adapter < (tiny_model / "model.safetensors").stat().st_size / 5


def test_second_run_in_the_same_folder_is_refused(libraries, tmp_path):
    from lora_sft import UserError
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


def test_another_number_of_ranks_is_refused(start, quick, uninterrupted, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    (out / "summary.json").unlink()
    code, text = start(*quick, "--num_gpus", "1", "--output_dir", out).wait()
    assert code == 2
    assert "was started on 2 GPUs, 1 here" in text


def test_overwrite_deletes_nothing_before_preflight_has_passed(start, quick, uninterrupted, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    code, _ = start(*quick, "--lora_target_modules", "nothing", "--overwrite", "--output_dir", out).wait()
    assert code == 2
    assert (out / "summary.json").exists()
    assert (out / "checkpoint-6" / "complete.json").exists()


def test_what_a_kill_may_leave_is_nobody_elses(tmp_path):
    from lora_sft import run_folder

    (tmp_path / "checkpoint-50").mkdir()
    for name in (".disk_probe", "run_config.json.tmp", "training.log"):
        (tmp_path / name).write_text("")
    run_folder.check_owner(tmp_path, {})


@pytest.mark.parametrize("key", ["data_sha256", "model_revision", "dtype"])
def test_changed_inputs_are_refused(uninterrupted, key):
    from lora_sft import UserError, run_folder

    plan = json.loads((uninterrupted / "run_config.json").read_text())["plan"]
    run_folder.check_same_inputs(uninterrupted, plan)
    with pytest.raises(UserError, match="changed since the run began"):
        run_folder.check_same_inputs(uninterrupted, plan | {key: "other"})


def test_overwrite_starts_anew(start, quick, uninterrupted, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    (out / "notes.txt").write_text("mine")
    code, text = start(*quick, "--max_steps", "2", "--overwrite", "--output_dir", out).wait()
    assert code == 0, text
    assert [row["step"] for row in rows_of(out)] == [1, 2]
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
