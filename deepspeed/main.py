"""Fine-tunes Llama-2-7B with LoRA under DeepSpeed ZeRO-3. Start it with run_llama2_7b_lora.sh.

    read -> check -> decide -> start -> train -> write

This process reads the flags, claims the output folder and forks: a first child checks everything and tokenises, then
one child per GPU trains (lora_sft/launch.py says why). Exit codes: 0 done, 1 a bug, 2 the input or the machine, 75
stopped and resumable.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from lora_sft import launch, run_folder
from lora_sft.arguments import REHEARSAL, TINY_MODEL, Arguments, parse, read_zero_config
from workbench import UserError
from workbench.files import claim, disk_full
from workbench.flags import print_given
from workbench.processes import use_short_tmpdir


def main(argv: list[str]) -> int:
    try:
        args = parse(argv)
        print_given(argv)
        zero_config = read_zero_config(args.deepspeed)
        set_up_environment(args)
        folder = Path(args.output_dir)
        with claim(folder, "--output_dir"), tempfile.TemporaryDirectory(prefix="lora_sft_") as work_dir:
            return run(args, zero_config, folder, Path(work_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: Arguments, zero_config: dict, folder: Path, work_dir: Path) -> int:
    stop = launch.StopRequest(Path(os.environ.get("STOP_FILE") or work_dir / "stop"))
    stop.install()
    only_looking = args.preflight_only or args.download_only
    if not only_looking and run_folder.nothing_to_do(folder, args, zero_config):
        print(f"{folder} holds this run, finished; nothing to do (--overwrite starts anew)")
        return 0

    launch.import_shared_libraries()
    if code := launch.run_in_child(lambda: check(args, zero_config, work_dir), work_dir, stop):
        return code
    if only_looking:
        print("preflight passed" if args.preflight_only else "model and data are in the cache")
        return 0

    from lora_sft.preflight import Plan

    plan = Plan.load(work_dir)
    resume_from = run_folder.open_run(folder, args, zero_config, plan)

    def train(rank: int) -> int:
        if args.device == "cuda":
            import torch

            torch.cuda.set_device(rank)  # before an import below initialises CUDA on GPU 0
        # Preflight has fetched everything; PEFT would ask the hub about the base model at every save.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from lora_sft.train import train_rank

        return train_rank(args, plan, work_dir, resume_from, stop, rank)  # writes what it trained

    return launch.run_ranks(train, plan.world_size, work_dir)


def set_up_environment(args: Arguments) -> None:
    """What the libraries read at import."""
    use_short_tmpdir()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU was asked for: no library may find a GPU
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // (args.num_gpus or 2))))
    os.environ["DS_ACCELERATOR"] = args.device
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counts GPUs without initialising CUDA before the fork
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")


def check(args: Arguments, zero_config: dict, work_dir: Path) -> int:
    """The first child: in a rehearsal it builds the tiny model, then preflight, tokens and the plan."""
    from lora_sft import preflight

    try:
        if args.rehearse and args.model_name_or_path == str(Path(args.output_dir) / TINY_MODEL):
            sys.path.append(str(REHEARSAL))
            from tiny_model import build_llama

            build_llama(Path(args.model_name_or_path))
        return preflight.run(args, zero_config, work_dir)
    except UserError:
        raise
    except Exception as error:
        for folder in (Path(args.output_dir), work_dir):
            if disk_full(error, folder):
                raise UserError(f"the disk or quota of {folder} is full; free some space") from error
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
