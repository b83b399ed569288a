"""Fine-tunes Llama-2-7B with LoRA under DeepSpeed ZeRO-3. Start it with run_llama2_7b_lora.sh.

    read -> check -> decide -> start -> train -> write

This process reads the flags, claims the output folder and forks: a first child checks everything and tokenises, then
one child per GPU trains (lora_sft/launch.py says why). On several nodes it runs on each, and the first child of the
others asks node 0 (lora_sft/cluster.py). Exit codes: 0 done, 1 a bug, 2 the input or the machine, 75 stopped and
resumable.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from lora_sft import cluster, launch, run_folder
from lora_sft.arguments import REHEARSAL, TINY_MODEL, Arguments, parse, read_zero_config
from workbench import UserError
from workbench.files import claim, disk_full
from workbench.flags import print_given
from workbench.processes import STOPPED, free_port, importing, use_short_tmpdir


def main(argv: list[str]) -> int:
    try:
        nodes = cluster.Nodes.find()
    except UserError as error:
        if os.environ.get("SLURM_PROCID", "0") == "0":  # all tasks say the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    return lead(argv, nodes) if nodes.index == 0 else follow(argv, nodes)


def lead(argv: list[str], nodes: cluster.Nodes) -> int:
    """On the first node, or the only one."""
    try:
        args = parse(argv)
        print_given(argv)
        zero_config = read_zero_config(args.deepspeed)
        set_up_environment(args)
        folder = Path(args.output_dir)
        with claim(folder, "--output_dir"), tempfile.TemporaryDirectory(prefix="lora_sft_") as work_dir:
            return run(args, zero_config, folder, nodes, Path(work_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        cluster.dismiss(nodes, 2)
        return 2


def run(args: Arguments, zero_config: dict, folder: Path, nodes: cluster.Nodes, work_dir: Path) -> int:
    stop = launch.StopRequest(Path(os.environ.get("STOP_FILE") or work_dir / "stop"))
    stop.install()
    only_looking = args.preflight_only or args.download_only
    if not only_looking and run_folder.nothing_to_do(folder, args, zero_config):
        print(f"{folder} holds this run, finished; nothing to do (--overwrite starts anew)")
        cluster.dismiss(nodes, 0)
        return 0

    launch.import_shared_libraries()
    if code := launch.run_in_child(lambda: check(args, zero_config, nodes, work_dir), work_dir, stop):
        return code
    if only_looking:
        print("preflight passed" if args.preflight_only else "model and data are in the cache")
        return 0
    return train_here(args, nodes, work_dir, stop)


def follow(argv: list[str], nodes: cluster.Nodes) -> int:
    """On the other nodes: what node 0 says."""
    problem = args = None
    try:
        args = parse(argv)
        set_up_environment(args)
    except UserError as error:
        problem = error

    def facts() -> dict:
        from lora_sft.machine import look_at_node

        if problem:
            raise problem
        return look_at_node(args)

    with tempfile.TemporaryDirectory(prefix="lora_sft_") as name:
        work_dir = Path(name)
        stop = launch.StopRequest(Path(os.environ.get("STOP_FILE") or work_dir / "stop"))
        stop.install()
        launch.import_shared_libraries()
        code = launch.run_in_child(lambda: cluster.ask(nodes, work_dir, facts), work_dir, stop)
        if code == 1 and launch.cause(work_dir):
            launch.run_in_child(lambda: cluster.give_up(nodes), work_dir, stop)
        if code or not (work_dir / cluster.START).exists():
            return code
        folder = Path(cluster.Start.load(work_dir).shared).parent  # a rehearsal's is named after the time
        return train_here(replace(args, output_dir=str(folder)), nodes, work_dir, stop)


def train_here(args: Arguments, nodes: cluster.Nodes, work_dir: Path, stop: launch.StopRequest) -> int:
    """This node's ranks."""
    from lora_sft.preflight import Plan

    start = cluster.Start.load(work_dir)
    shared = Path(start.shared)
    plan = Plan.load(shared)

    def train(rank: int) -> int:
        if args.device == "cuda":
            import torch

            # Before an import below initialises CUDA on GPU 0.
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Preflight has fetched everything; PEFT would ask the hub about the base model at every save.
        os.environ["HF_HUB_OFFLINE"] = "1"
        with importing():
            from lora_sft.train import train_rank

        resume_from = start.resume_from and Path(start.resume_from)
        return train_rank(args, plan, shared, resume_from, stop, rank)  # writes what it trained

    first = sum(start.ranks[: nodes.index])
    name = nodes.here() if nodes.count > 1 else ""
    ranks = launch.Ranks(start.ranks[nodes.index], first, plan.world_size, nodes.address, start.port, name)
    others = cluster.Others(nodes, shared, args.ddp_timeout_s)
    code = launch.run_ranks(train, ranks, work_dir, others.lost)
    if code in (0, STOPPED):
        others.leave()
    if code in (0, STOPPED) and nodes.count > 1 and nodes.index == 0:
        shutil.rmtree(shared, ignore_errors=True)
    return end_of(args, nodes, start, code, launch.cause(work_dir))


def end_of(args: Arguments, nodes: cluster.Nodes, start: cluster.Start, code: int, cause: str = "") -> int:
    complete = run_folder.complete_checkpoints(Path(args.output_dir))
    return cluster.explain_end(nodes, start, code, cause, complete[-1] if complete else None)


def set_up_environment(args: Arguments) -> None:
    """What the libraries read at import."""
    use_short_tmpdir()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU was asked for: no library may find a GPU
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // (args.num_gpus or 2))))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of addresses that have no names
    os.environ["DS_ACCELERATOR"] = args.device
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counts GPUs without initialising CUDA before the fork
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")


def check(args: Arguments, zero_config: dict, nodes: cluster.Nodes, work_dir: Path) -> int:
    """The first child: in a rehearsal it builds the tiny model, then preflight, tokens and the plan for all nodes."""
    folder = Path(args.output_dir)
    try:
        if nodes.count == 1:
            prepare(args, zero_config, nodes, work_dir, work_dir, None)
            return 0
        shared = cluster.new_shared_folder(folder)
        with cluster.leading(nodes, shared) as store:
            start = prepare(args, zero_config, nodes, work_dir, shared, lambda: cluster.gather(store, nodes))
            if start and not cluster.tell(store, nodes, asdict(start), cluster.SILENCE_S):
                return end_of(args, nodes, start, cluster.LOST)
        return 0
    except UserError:
        raise
    except Exception as error:
        for path in (folder, work_dir):
            if disk_full(error, path):
                raise UserError(f"the disk or quota of {path} is full; free some space") from error
        raise


def prepare(
    args: Arguments,
    zero_config: dict,
    nodes: cluster.Nodes,
    work_dir: Path,
    shared: Path,
    others: Callable | None,
) -> cluster.Start | None:
    """Leaves the plan and the tokens in `shared`, and how to start in `work_dir`; None if it was only to look."""
    from lora_sft import preflight

    if args.rehearse and args.model_name_or_path == str(Path(args.output_dir) / TINY_MODEL):
        sys.path.append(str(REHEARSAL))
        from tiny_model import build_llama

        build_llama(Path(args.model_name_or_path))
    places = preflight.run(args, zero_config, shared, others)
    if args.preflight_only or args.download_only:
        return None
    plan = preflight.Plan.load(shared)
    resume_from = run_folder.open_run(Path(args.output_dir), args, zero_config, plan)
    names, ranks = [place.name for place in places], [place.ranks for place in places]
    return cluster.Start(str(shared), resume_from and str(resume_from), names, ranks, free_port()).save(
        work_dir
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
