"""What both programs ask about the machine and the installation, each failure with its cure."""

import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import UserError

GIB = 2**30
DRIVER_NEEDED = {13: 580, 12: 525}  # CUDA major version of the wheel -> NVIDIA driver branch


class Table:
    """Prints one row per check as it is done and remembers the first failure."""

    def __init__(self) -> None:
        self.first_failure: str | None = None

    def row(self, verdict: str, name: str, text: str) -> None:
        print(f"  {verdict:4}  {name:14}  {text}", flush=True)

    def check(self, name: str, function: Callable[[], str | None]) -> bool:
        """Runs one check. It returns what to print (None: nothing to say, no row) or raises UserError."""
        return self.find(name, lambda: (True, function())) or False

    def find(self, name: str, function: Callable[[], tuple[object, str | None]]):
        """What one check found, the first of what `function` returns; the second is printed as by `check`. None
        if it raised UserError."""
        try:
            found, text = function()
        except UserError as error:
            self.row("FAIL", name, str(error))
            self.first_failure = self.first_failure or str(error)
            return None
        if text is not None:
            verdict, _, rest = (
                text.partition(":") if text.startswith(("WARN:", "SKIP:")) else ("PASS", "", text)
            )
            self.row(verdict, name, rest.strip())
        return found


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package metadata: importing `deepspeed` could find this repository's folder."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"{name} is not installed; run `make install` (or pip install -r requirements.txt)"
            ) from error
    return found


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None if this machine has no NVIDIA device."""
    text = Path("/proc/driver/nvidia/version")
    if text.exists():
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)", text.read_text())
        return match.group(1) if match else "unknown"
    return "unknown" if Path("/dev/nvidiactl").exists() else None


def explain_no_cuda(
    driver: str | None, wheel_cuda: str | None, torch_version: str, older_driver: str, gpus: int
) -> str:
    """One line for `torch.cuda.is_available() == False`: what was found, what is needed, the cure. The program
    wants so many `gpus`; `older_driver` is its way out for a driver that this wheel cannot use."""
    if driver is None:
        return f"no NVIDIA GPU here; ask for one (srun --gres=gpu:{gpus} ...), or try the CPU rehearsal: --rehearse"
    if wheel_cuda is None:
        return (
            f"an NVIDIA driver {driver} is here, but torch {torch_version} is a CPU build; run `make install`"
        )
    needed = DRIVER_NEEDED.get(int(wheel_cuda.split(".")[0]), 0)
    if driver != "unknown" and int(driver.split(".")[0]) < needed:
        return (
            f"NVIDIA driver {driver} is too old for torch {torch_version} (CUDA {wheel_cuda} needs driver {needed} "
            f"or newer); {older_driver}"
        )
    return (
        f"an NVIDIA driver ({driver}) is here, but torch {torch_version} sees no GPU; "
        f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}: is a GPU allocated to this job?"
    )


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a wheel built for `arch_list` (sm_75, ..., compute_90) runs on a GPU: binary code of the same
    major and a lower or equal minor capability, or PTX of a lower or equal one."""
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = re.sub(r"\D", "", number)
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


# Dense fp16 FLOPs per multiprocessor and clock, by compute capability (NVIDIA's white papers).
TENSOR_FLOPS = {
    (7, 0): 1024,
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 1024,
    (8, 9): 1024,
    (9, 0): 4096,
    (10, 0): 8192,
}


@dataclass(frozen=True)
class Gpu:
    """A visible GPU, with its peak rates from clocks and widths (0 where they are unknown)."""

    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]
    bandwidth: float  # bytes/s
    flops: float  # dense fp16 tensor FLOP/s
    link: float = 0.0  # bytes/s from the first GPU, by a copy; 0: none of the two reads the other's memory


def visible_gpus(older_driver: str, gpus: int) -> tuple[Gpu, ...]:
    """The GPUs that torch sees. Initialises CUDA: call it in a child process. `older_driver` and `gpus` are those of
    `explain_no_cuda`. Raises UserError."""
    import torch

    def explain() -> str:
        return explain_no_cuda(driver_version(), torch.version.cuda, torch.__version__, older_driver, gpus)

    if not torch.cuda.is_available():
        raise UserError(explain())
    try:
        torch.cuda.init()  # what is counted above is what the driver lists, not what this wheel can use
    except (RuntimeError, AssertionError) as error:
        raise UserError(explain()) from error
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rate = {name: getattr(gpu, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")}
        capability = (gpu.major, gpu.minor)
        per_clock = gpu.multi_processor_count * TENSOR_FLOPS.get(capability, 0)
        found.append(
            Gpu(
                name=gpu.name,
                memory_gib=gpu.total_memory / GIB,
                free_gib=torch.cuda.mem_get_info(index)[0] / GIB,
                capability=capability,
                bandwidth=2 * rate["memory_clock_rate"] * 1e3 * rate["memory_bus_width"] / 8,  # two a clock
                flops=rate["clock_rate"] * 1e3 * per_clock,
                link=link(index),
            )
        )
    return tuple(found)


def link(index: int, size: int = 2**27) -> float:
    """Bytes/s of a copy of `size` bytes from the first GPU to another; 0 where memory of the host is between them."""
    import torch

    if (
        not index
        or os.environ.get("NCCL_P2P_DISABLE") == "1"
        or not torch.cuda.can_device_access_peer(0, index)
    ):
        return 0.0
    source = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    target = source.to(f"cuda:{index}")  # the first copy opens the way
    torch.cuda.synchronize(0)
    began = time.perf_counter()
    for _ in range(8):
        target.copy_(source)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(index)
    return 8 * size / (time.perf_counter() - began)


def memory_limit_gib() -> tuple[float, str]:
    """Host memory this job may still use, and what sets it: the machine or a cgroup (Slurm's --mem)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    best = (int(fields["MemAvailable"].split()[0]) / 2**20, "available on this machine")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            root, limit_name, usage_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A limit may stand at any level above the process.
        folder = root / group.lstrip("/")
        for level in (folder, *folder.parents):
            if root not in (level, *level.parents):
                break
            try:
                limit = int((level / limit_name).read_text())
                used = int((level / usage_name).read_text())
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", (level / "memory.stat").read_text(), re.M
                )
            except (OSError, ValueError):  # "max", or a controller that is not mounted
                continue
            left = (limit - used + (int(cached.group(1)) if cached else 0)) / GIB
            best = min(best, (left, "left of the job's memory limit (Slurm --mem)"))
    return best
