"""The GPUs that the engine will run on, and the compiler that builds FlashInfer's kernels there."""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from workbench import UserError
from workbench.machine import GIB, Gpu, driver_version, explain_no_cuda, visible_gpus
from workbench.processes import run_in_child

from .arguments import Arguments

NEEDED_CAPABILITY = (8, 0)  # images in sglang-kernel 0.4.5 start at sm_80
OTHER_GPUS = "ask Slurm for an A100, A10, L40S, H100 or newer (such as --gres=gpu:a100:1)"
OLDER_DRIVER = 'ask for a node with a newer driver, or see "Older drivers" in the documentation'


@dataclass(frozen=True)
class Machine:
    """Where the engine runs. On the CPU only `device`, `cores` and `memory_gib` are set."""

    device: str
    gpu_name: str | None = None
    gpus: int = 0  # visible ones
    memory_gib: float = 0.0  # of the smallest GPU that is used; of the host, what is free
    bandwidth: float = 0.0  # bytes/s, from the memory's clock and bus width
    flops: float = 0.0  # dense fp16/bf16 tensor FLOP/s, from multiprocessors and clock
    compiler: dict[str, str] = field(default_factory=dict)  # environment of the wheel's nvcc, where it is used
    capability: tuple[int, int] = (0, 0)
    cores: int = 1
    link: float = 0.0  # bytes/s from the first GPU to the slowest to reach; 0: none reads another's memory


def look(args: Arguments) -> tuple[Machine, str]:
    """The machine, and what was found. Raises UserError unless every visible GPU can run SGLang's kernels."""
    if args.device == "cpu":
        why = "--rehearse" if args.rehearse else "--device cpu"
        cores, free_gib = len(os.sched_getaffinity(0)), psutil.virtual_memory().available / GIB
        found = f"not used ({why}); {cores} CPU cores, {free_gib:.1f} GiB free"
        return Machine("cpu", memory_gib=free_gib, cores=cores), found
    gpus = ask_for_gpus()
    for index, gpu in enumerate(gpus):
        if gpu.capability < NEEDED_CAPABILITY:
            major, minor = gpu.capability
            raise UserError(
                f"GPU {index}, {gpu.name}, has compute capability {major}.{minor} and SGLang needs 8.0; {OTHER_GPUS}"
            )
    shared = -(-(args.tp_size or 1) // args.nodes[1])  # a copy may be spread over nodes
    wanted = shared * (args.dp_size or 1)
    if wanted > len(gpus):
        raise UserError(
            f"--tp_size {args.tp_size or 1} --dp_size {args.dp_size or 1}: {wanted} GPUs needed, {len(gpus)} visible "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )
    used = gpus[: shared * (args.dp_size or len(gpus) // shared)]
    busy = _shared_gpu(used)
    if busy and "max_total_tokens" not in args.own_engine_args:  # which bounds the pool
        raise UserError(f"{busy}; --engine_args '{{\"max_total_tokens\": 100000}}' shares a GPU")
    smallest = min(used, key=lambda gpu: gpu.memory_gib)
    machine = Machine("cuda", gpus[0].name, len(gpus), smallest.memory_gib, smallest.bandwidth, smallest.flops)
    link = min((gpu.link for gpu in gpus[1:]), default=0.0)
    machine = replace(machine, capability=gpus[0].capability, link=link)
    found = f"{len(gpus)} x {machine.gpu_name}, {machine.memory_gib:.1f} GiB, driver {driver_version()}"
    return machine, f"WARN: {found}; {busy}" if busy else found


def ask_for_gpus() -> tuple[Gpu, ...]:
    """Asks torch in a process of its own: this one must not initialise CUDA. Without a driver nothing is imported."""
    if driver_version() is None:
        raise UserError(explain_no_cuda(None, None, "", OLDER_DRIVER, 1))
    import torch  # noqa: F401 (the child shares it)

    def ask() -> str:
        return json.dumps([asdict(gpu) for gpu in visible_gpus(OLDER_DRIVER, 1)])

    found = json.loads(run_in_child(ask))
    return tuple(Gpu(**gpu | {"capability": tuple(gpu["capability"])}) for gpu in found)


def _shared_gpu(gpus: tuple[Gpu, ...]) -> str | None:
    for index, gpu in enumerate(gpus):
        if gpu.free_gib < 0.9 * gpu.memory_gib:
            return (
                f"GPU {index}: {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free, another process holds it "
                "(nvidia-smi)"
            )
    return None


def identity(machine: Machine) -> dict:
    """What bytes depend on beside the command: GPU or instruction set, the lock, and on GPUs our own kernels."""
    import torch

    lock = Path(__file__).resolve().parents[2] / "requirements.txt"
    found = {
        "gpu_name": machine.gpu_name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if machine.device == "cpu" else None,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
    }
    if machine.device == "cuda":
        import runtime_plugins

        sources = sorted(Path(runtime_plugins.__file__).parent.glob("*.py"))
        content = b"".join(path.read_bytes() for path in sources)
        found["kernels_sha256"] = hashlib.sha256(content).hexdigest()
    return found


# --- the compiler -------------------------------------------------------------------------------------


def look_at_kernel_tools(args: Arguments) -> tuple[dict[str, str], str | None]:
    """FlashInfer compiles kernels at first use: nvcc of torch's CUDA major version, g++, ninja, a cache. Returns
    the environment for it where the nvcc is the wheel's own, and what was found. Raises UserError."""
    if args.device == "cpu":
        return {}, None
    attention = args.own_engine_args.get("attention_backend", "flashinfer")
    if args.reproducible and attention == "flashinfer" and importlib.util.find_spec("flashinfer_jit_cache"):
        raise UserError(
            "flashinfer-jit-cache is installed: with its kernels, compiled with fused multiply-adds, an answer depends on "
            "what the radix cache held; uninstall it (pip uninstall flashinfer-jit-cache), or take --fast"
        )
    import torch

    major = int((torch.version.cuda or "0").split(".")[0])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    own, note = None, f"in {home}"
    if nvcc_major(home) != major:
        own = wheels_nvcc(major)
        if own is None:
            raise UserError(
                f"no nvcc of CUDA {major} (CUDA_HOME={home or 'not set'}) and the wheel's own is missing; run `make "
                "install`, or load the cluster's CUDA module"
            )
        note = f"the wheel's own (CUDA_HOME was {home or 'not set'})"
    for tool, cure in (("g++", "load a compiler module (module load gcc)"), ("ninja", "run `make install`")):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on the PATH and FlashInfer compiles kernels with it; {cure}")
    cache = kernel_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as probe:  # other runs share this folder
            probe.write(b"x" * 2**20)
        libraries = cache.with_name("cuda-libraries")
        compiler = compiler_of_wheels(own, driver_library(libraries), libraries) if own else {}
    except OSError as error:
        raise UserError(
            f"{cache}: kernels cannot be stored there ({error.strerror}); set LLM_STORAGE"
        ) from error
    return compiler, f"nvcc of CUDA {major} {note}, g++, ninja, kernel cache {cache}"


def kernel_cache() -> Path:
    """FlashInfer's (its jit/env.py)."""
    return Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home()) / ".cache" / "flashinfer"


def wheels_nvcc(major: int) -> Path | None:
    """The folder of the nvcc that came as a wheel."""
    wheel = importlib.util.find_spec("nvidia")
    folders = [Path(path) / f"cu{major}" for path in wheel.submodule_search_locations] if wheel else []
    return next((folder for folder in folders if nvcc_major(str(folder)) == major), None)


def nvcc_major(home: str | None) -> int | None:
    """The CUDA major version of the nvcc in `home`."""
    try:
        output = subprocess.run(
            [f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.", output)
    return int(match.group(1)) if match else None


def compiler_of_wheels(cuda: Path, driver: Path, folder: Path) -> dict[str, str]:
    """The environment in which the wheel's nvcc builds FlashInfer's kernels. They are linked with -lcudart and -lcuda,
    but wheels have libcudart.so.13 and drivers may have libcuda.so.1 only: a folder below `folder`, which machines with
    other drivers may share, gets links without the number."""
    runtime = next((cuda / "lib").glob("libcudart.so.*"), None)
    if runtime is None:
        raise UserError(
            f"no libcudart.so in {cuda / 'lib'}; run `make install`, or load the cluster's CUDA module"
        )
    links = folder / hashlib.sha256(f"{runtime} {driver}".encode()).hexdigest()[:12]
    links.mkdir(parents=True, exist_ok=True)
    for library in (runtime, driver):
        with contextlib.suppress(FileExistsError):
            (links / f"{library.name.partition('.')[0]}.so").symlink_to(library)
    paths = dict.fromkeys([str(links), *filter(None, os.environ.get("LIBRARY_PATH", "").split(":"))])
    return {"CUDA_HOME": str(cuda), "LIBRARY_PATH": ":".join(paths)}


def driver_library(folder: Path) -> Path:
    """The file that "libcuda.so.1" loads; on a machine without a driver an empty one in `folder`: it is linked only."""
    if driver_version() is None:
        empty = folder / "no-driver" / "libcuda.so.1"
        empty.parent.mkdir(parents=True, exist_ok=True)
        name = f"-Wl,-soname,{empty.name}"
        subprocess.run(["g++", "-shared", name, "-x", "c++", os.devnull, "-o", str(empty)], check=True)
        return empty
    ctypes.CDLL("libcuda.so.1")
    return Path(re.search(r"/\S*/libcuda\.so\S*", Path("/proc/self/maps").read_text())[0])
