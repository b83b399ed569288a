"""What the preflight asks about the GPUs, their links and the host's memory."""

import itertools
import math
import os
import re
import subprocess
from dataclasses import asdict, dataclass

from workbench import UserError
from workbench.machine import GIB, driver_version, has_kernels, memory_limit_gib, visible_gpus

from .arguments import Arguments
from .cluster import Nodes
from .memory import CONTEXT_GIB

ASSUMED_GPU_GIB = 15.8  # a V100 16 GB, when there is no GPU to ask
V100_LOCK = "make install-v100, then the same command"
OLDER_DRIVER = f"use the CUDA 12.6 environment: {V100_LOCK}"


@dataclass(frozen=True)
class Gpus:
    """The ranks' GPUs; without any (CPU, or a preflight elsewhere) the first three are None."""

    gpu_name: str | None
    gpu_free_gib: float | None
    capability: list[int] | None  # the lowest
    gpu_limit_gib: float  # what PyTorch may take on one
    world_size: int
    dtype: str
    dtype_reason: str


def choose_dtype(asked: str, device: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    """(dtype, reason). bf16 from compute capability 8.0; `torch.cuda.is_bf16_supported()` also answers True
    on Volta, where bf16 is emulated."""
    if asked != "auto":
        if asked == "bf16" and capability and capability < (8, 0):
            raise UserError(
                f"--dtype bf16: compute capability {capability[0]}.{capability[1]} has no bf16 units; use --dtype fp16"
            )
        return asked, "asked for by --dtype"
    if device == "cpu":
        return "fp32", "on CPU exact comparison is worth more than speed"
    if capability is None:
        return "fp16", "no GPU here; a V100 is assumed"
    text = f"compute capability {capability[0]}.{capability[1]}"
    return ("bf16", f"{text} has bf16 units") if capability >= (8, 0) else ("fp16", f"{text} has no bf16 units")


def look_at_gpus(args: Arguments) -> tuple[Gpus, str]:
    """What the ranks will run on, and its row. Raises UserError."""
    cap_gib = memory_cap_gib()
    if args.device == "cpu":
        cores, why = len(os.sched_getaffinity(0)), "--rehearse" if args.rehearse else "--device cpu"
        found = without_gpus(args, cap_gib)
        return found, f"not used ({why}): {found.world_size} ranks on {cores} CPU cores"
    if args.preflight_only and driver_version() is None:
        found = without_gpus(args, cap_gib)
        return found, f"SKIP: no GPU here; {found.world_size} x {ASSUMED_GPU_GIB} GiB assumed"
    visible = visible_gpus(OLDER_DRIVER, args.num_gpus or 2)
    if args.num_gpus > len(visible):
        raise UserError(
            f"--num_gpus {args.num_gpus}, but {len(visible)} visible (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); ask Slurm for more: --gres=gpu:{args.num_gpus}"
        )
    gpus = visible[: args.num_gpus or len(visible)]
    check_kernels(gpus)
    capability = min(gpu.capability for gpu in gpus)
    dtype, reason = choose_dtype(args.dtype, args.device, capability)
    total_gib = min(gpu.memory_gib for gpu in gpus)
    found = Gpus(
        gpu_name=gpus[0].name,
        gpu_free_gib=min(gpu.free_gib for gpu in gpus),
        capability=list(capability),
        gpu_limit_gib=min(total_gib - CONTEXT_GIB, cap_gib),
        world_size=len(gpus),
        dtype=dtype,
        dtype_reason=reason,
    )
    cap = f", capped to {cap_gib:g} GiB by GPU_MEMORY_CAP_GIB" if math.isfinite(cap_gib) else ""
    return found, f"{len(gpus)} x {gpus[0].name}, {total_gib:.1f} GiB{cap}, driver {driver_version()}"


def memory_cap_gib() -> float:
    value = os.environ.get("GPU_MEMORY_CAP_GIB") or "inf"
    try:
        return float(value)
    except ValueError:
        raise UserError(f"GPU_MEMORY_CAP_GIB={value}: give a number of GiB") from None


def without_gpus(args: Arguments, cap_gib: float) -> Gpus:
    """The CPU's ranks, or the GPUs that are assumed where there are none to ask."""
    dtype, reason = choose_dtype(args.dtype, args.device, None)
    limit_gib = min(ASSUMED_GPU_GIB - CONTEXT_GIB, cap_gib)
    return Gpus(None, None, None, limit_gib, args.num_gpus or 2, dtype, reason)


def check_kernels(gpus: tuple) -> None:
    import torch

    kernels = torch.cuda.get_arch_list()
    for index, gpu in enumerate(gpus):
        if not has_kernels(gpu.capability, kernels):
            raise UserError(
                f"GPU {index}, {gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]}), has no kernels "
                f"in torch {torch.__version__} ({' '.join(kernels)}); {V100_LOCK}"
            )


def look_at_links(gpus: Gpus) -> str | None:
    """NVLink or PCIe between the GPUs: on PCIe the all-gathers of ZeRO-3 set the pace."""
    if gpus.gpu_name is None or gpus.world_size < 2:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus.world_size)))
    try:
        indices = [int(index) for index in visible.split(",")][: gpus.world_size]
        command = ["nvidia-smi", "topo", "-m"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        links = {pair: link_between(output, *pair) for pair in itertools.combinations(indices, 2)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return "SKIP: nvidia-smi does not tell how the GPUs are linked"
    for (first, second), link in links.items():
        if not link.startswith("NV"):
            return (
                f"WARN: PCIe ({link}) between GPU {first} and GPU {second}: gathers are slow, keep "
                "--tokens_per_micro_batch high"
            )
    return f"NVLink between all pairs ({', '.join(sorted(set(links.values())))})"


def link_between(matrix: str, first: int, second: int) -> str:
    """The entry of `nvidia-smi topo -m` for two GPUs (NV18, PIX, SYS, ...). Raises ValueError without one."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines()]
    mine = [row for row in rows if row and row[0] == f"GPU{first}" and len(row) > second + 1]
    if len(mine) < 2:  # the header line starts with GPU0 too
        mine = [row for row in mine if "X" in row]
    if not mine:
        raise ValueError(f"no row for GPU {first}")
    return mine[-1][1 + second]


@dataclass(frozen=True)
class Place:
    """A node: its name ("" if there are no others), its ranks, the host memory they may use and what limits it."""

    name: str
    ranks: int
    left_gib: float
    what: str


def look_at_host_memory(base_parameters: int, dtype: str, places: list[Place]) -> str:
    """Of the node that has least for its ranks. Every rank reads all weights, one after the other; the pages are shared
    and can be dropped."""
    place = min(places, key=lambda place: place.left_gib - 2.5 * place.ranks)
    left, what = place.left_gib, place.what + (f" of {place.name}" if place.name else "")
    weights = base_parameters * (4 if dtype == "fp32" else 2) / GIB
    needed = weights + 2.5 * place.ranks
    if left < needed:
        raise UserError(
            f"{left:.1f} GiB {what}, about {needed:.1f} needed to load the weights; ask for --mem={needed * 1.2:.0f}G"
        )
    if left < weights * place.ranks:
        return f"WARN: {left:.1f} GiB {what}; below {weights * place.ranks:.1f} loading may be slow"
    return f"{left:.1f} GiB {what}, about {needed:.1f} needed"


def look_at_node(args: Arguments) -> dict:
    """What a node says of itself to the first one. Raises UserError."""
    gpus, text = look_at_gpus(args)
    return {"gpus": asdict(gpus), "text": text, "link": look_at_links(gpus), "memory": memory_limit_gib()}


def look_at_nodes(args: Arguments, mine: Gpus, others: list[dict]) -> tuple[tuple[Gpus, list[Place]], str]:
    """All nodes' GPUs as one, of which the weakest decides, and where their ranks are. Raises UserError."""
    if problems := [f"{node['name']}: {node['problem']}" for node in others if node["problem"]]:
        raise UserError("; ".join(problems))
    every = [mine, *(Gpus(**node["gpus"]) for node in others)]
    capability = mine.capability and min(gpus.capability for gpus in every)
    dtype, reason = choose_dtype(args.dtype, args.device, capability and tuple(capability))
    found = Gpus(
        gpu_name=mine.gpu_name,
        gpu_free_gib=mine.capability and min(gpus.gpu_free_gib for gpus in every),
        capability=capability,
        gpu_limit_gib=min(gpus.gpu_limit_gib for gpus in every),
        world_size=sum(gpus.world_size for gpus in every),
        dtype=dtype,
        dtype_reason=reason,
    )
    here = Place(Nodes.here(), mine.world_size, *memory_limit_gib())
    places = [here, *(Place(node["name"], node["gpus"]["world_size"], *node["memory"]) for node in others)]
    texts = dict.fromkeys(node["text"].removeprefix("SKIP: ") for node in others)
    same = {text: ", ".join(node["name"] for node in others if text in node["text"]) for text in texts}
    row = f"{len(every)}, {found.world_size} ranks; " + "; ".join(
        f"{names}: {text}" for text, names in same.items()
    )
    slow = [f"{node['name']}: {node['link'][6:]}" for node in others if (node["link"] or "").startswith("WARN")]
    return (found, places), (f"WARN: {row}; {'; '.join(slow)}" if slow else row)
