"""Everything that can be known before the engine starts: a PASS/FAIL table, each FAIL with its cure.

Imports neither torch nor sglang (but for building a rehearsal's model): a missing GPU or model is told
within a second or two.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from workbench import UserError
from workbench.machine import GIB, Table, driver_version, explain_no_cuda, find_model, versions

from . import prompts
from .arguments import FOLDER, PROGRAM, REHEARSAL, TINY_MODEL, Arguments
from .engine import Machine, Model
from .prompts import Record

PACKAGES = ("torch", "sglang", "flashinfer-python", "transformers", "tokenizers", "xgrammar", "numpy")
PLUGINS = FOLDER / "runtime_plugins"
INSTALL_PLUGINS = "pip install --no-deps ./sglang/runtime_plugins"
# Dense fp16 FLOPs per SM and clock, and CUDA cores per SM, by compute capability (NVIDIA's white papers).
TENSOR_CORES = {
    (8, 0): (2048, 64),
    (8, 6): (1024, 128),
    (8, 9): (1024, 128),
    (9, 0): (4096, 128),
    (10, 0): (8192, 128),
}
NEEDED_CAPABILITY = (8, 0)  # images in sglang-kernel 0.4.5 start at sm_80
# SGLang 0.5.17 loads q, k, v and gate, up as one matrix each (normalize_qkv_proj, normalize_gate_up_proj): without
# these partners its scheduler dies of a KeyError or ValueError. A missing k or up is zero.
STACKED_WITH = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
# Settings of PEFT that SGLang does not read: it would serve another adapter.
PEFT_ALONE = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
)
OTHER_GPUS = "ask Slurm for an A100, A10, L40S, H100 or newer (such as --gres=gpu:a100:1)"
OLDER_DRIVER = 'ask for a node with a newer driver, or see "Older drivers" in the README'


# --- packages and GPUs --------------------------------------------------------------------------------


def look_at_packages() -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items() if name != "numpy")
    try:
        plugin = importlib.metadata.distribution("assignment-runtime-plugins")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"sglang/runtime_plugins is not installed; run `make install` (or {INSTALL_PLUGINS})"
        ) from error
    for path in PLUGINS.glob("*.py"):
        installed = Path(plugin.locate_file(f"runtime_plugins/{path.name}"))
        if not installed.exists() or installed.read_bytes() != path.read_bytes():
            raise UserError(
                f"the installed sglang/runtime_plugins is another version; run `make install` (or {INSTALL_PLUGINS})"
            )
    return found


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, without importing it."""
    text = Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text()
    match = re.search(r"^cuda[^=]*= '([\d.]+)'", text, re.M)
    return match.group(1) if match else None


def cuda_driver_version() -> tuple[int, int] | None:
    """The CUDA version that libcuda offers (a compatibility package counts), or None without one."""
    try:
        version, library = ctypes.c_int(0), ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def nvml_gpus() -> list[dict]:
    """Name, memory, capability, bandwidth and FLOP/s of each visible GPU; CUDA is not initialised."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library or no driver
        return []

    def value(function: Callable, *arguments) -> float:
        try:
            return function(*arguments)
        except pynvml.NVMLError:  # a MIG slice does not tell
            return 0.0

    every = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    handles = every
    if visible is not None:
        by_name = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in every}
        by_name |= {str(index): handle for index, handle in enumerate(every)}
        names = [name.strip() for name in visible.split(",") if name.strip()]
        # CUDA ignores everything after the first name that does not exist.
        handles = []
        for name in names:
            match = [
                handle
                for key, handle in by_name.items()
                if key == name or (len(name) > 4 and key.startswith(name))
            ]
            if name.startswith("MIG-"):
                match = [pynvml.nvmlDeviceGetHandleByUUID(name)]
            if not match:
                break
            handles.append(match[0])
    gpus = []
    for handle in handles:
        capability = None
        with contextlib.suppress(pynvml.NVMLError):  # only a MIG slice has a parent
            parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(parent))
        if capability is None:
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        bus_bytes = value(pynvml.nvmlDeviceGetMemoryBusWidth, handle) / 8
        memory_hz = value(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM) * 1e6
        core_hz = value(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM) * 1e6
        per_clock, cores = TENSOR_CORES.get(capability, (0, 1))
        gpus.append(
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "memory_gib": pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB,
                "free_gib": pynvml.nvmlDeviceGetMemoryInfo(handle).free / GIB,
                "capability": capability,
                "bandwidth": 2 * bus_bytes * memory_hz,  # two transfers a clock
                "flops": value(pynvml.nvmlDeviceGetNumGpuCores, handle) / cores * core_hz * per_clock,
            }
        )
    return gpus


def look_at_gpus(args: Arguments, machine: Machine) -> str:
    """Fills `machine`. Raises UserError unless every visible GPU can run SGLang's kernels."""
    if args.device == "cpu":
        why = "--rehearse" if args.rehearse else "--device cpu"
        return f"not used ({why}); {len(os.sched_getaffinity(0))} CPU cores"
    gpus, wheel, torch_version = nvml_gpus(), torch_cuda(), importlib.metadata.version("torch")
    found = cuda_driver_version()
    if not gpus:
        raise UserError(explain_no_cuda(driver_version(), wheel, torch_version, OLDER_DRIVER))
    if wheel is None or found is None or found[0] < int(wheel.split(".")[0]):
        raise UserError(
            f"{gpus[0]['name']}: "
            + explain_no_cuda(driver_version() or "unknown", wheel, torch_version, OLDER_DRIVER)
        )
    for index, gpu in enumerate(gpus):
        if gpu["capability"] < NEEDED_CAPABILITY:
            major, minor = gpu["capability"]
            raise UserError(
                f"GPU {index}, {gpu['name']}, has compute capability {major}.{minor} and SGLang needs 8.0; {OTHER_GPUS}"
            )
    wanted = args.tp_size * (args.dp_size or 1)
    if wanted > len(gpus):
        raise UserError(
            f"--tp_size {args.tp_size} --dp_size {args.dp_size or 1}: {wanted} GPUs needed, {len(gpus)} visible "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )
    used = args.tp_size * (args.dp_size or len(gpus) // args.tp_size)
    shared = ""
    for index, gpu in enumerate(gpus[:used]):
        if gpu["free_gib"] < 0.9 * gpu["memory_gib"]:
            shared = (
                f"GPU {index}: {gpu['free_gib']:.1f} of {gpu['memory_gib']:.1f} GiB free, another process holds it "
                "(nvidia-smi)"
            )
            if "max_total_tokens" not in args.own_engine_args:  # which bounds the pool
                raise UserError(f"{shared}; --engine_args '{{\"max_total_tokens\": 100000}}' shares a GPU")
    smallest = min(gpus[:used], key=lambda gpu: gpu["memory_gib"])
    machine.gpu_name, machine.gpus = gpus[0]["name"], len(gpus)
    machine.memory_gib = smallest["memory_gib"]
    machine.bandwidth, machine.flops = smallest["bandwidth"], smallest["flops"]
    found = f"{len(gpus)} x {machine.gpu_name}, {machine.memory_gib:.1f} GiB, driver {driver_version()}"
    return f"WARN: {found}; {shared}" if shared else found


def look_at_kernel_tools(args: Arguments, machine: Machine) -> str | None:
    """FlashInfer compiles kernels at first use: nvcc of torch's CUDA major version, g++, ninja, a cache. Fills
    machine.compiler where the nvcc is the wheel's own."""
    if args.device == "cpu":
        return None
    attention = args.own_engine_args.get("attention_backend", "flashinfer")
    if args.reproducible and attention == "flashinfer" and importlib.util.find_spec("flashinfer_jit_cache"):
        raise UserError(
            "flashinfer-jit-cache is installed: with its kernels, compiled with fused multiply-adds, an answer depends on "
            "what the radix cache held; uninstall it (pip uninstall flashinfer-jit-cache), or take --fast"
        )
    major = int((torch_cuda() or "0").split(".")[0])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    own, note = None, ""
    if nvcc_major(home) != major:
        wheel = importlib.util.find_spec("nvidia")
        folders = [Path(path) / f"cu{major}" for path in wheel.submodule_search_locations] if wheel else []
        own = next((str(folder) for folder in folders if nvcc_major(str(folder)) == major), None)
        if own is None:
            raise UserError(
                f"no nvcc of CUDA {major} (CUDA_HOME={home or 'not set'}) and the wheel's own is missing; run `make "
                "install`, or load the cluster's CUDA module"
            )
        note = f"the wheel's own (CUDA_HOME was {home or 'not set'})"
    for tool, cure in (("g++", "load a compiler module (module load gcc)"), ("ninja", "run `make install`")):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on the PATH and FlashInfer compiles kernels with it; {cure}")
    driver = driver_library() if own else None
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    cache = base / ".cache" / "flashinfer"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as probe:  # other runs share this folder
            probe.write(b"x" * 2**20)
        if own:
            machine.compiler = compiler_of_wheels(Path(own), driver, base / ".cache" / "cuda-libraries")
            os.environ.update(machine.compiler)
    except OSError as error:
        raise UserError(
            f"{cache}: kernels cannot be stored there ({error.strerror}); set LLM_STORAGE"
        ) from error
    return f"nvcc of CUDA {major} {note or 'in ' + str(home)}, g++, ninja, kernel cache {cache}"


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


def driver_library() -> Path:
    """The file that "libcuda.so.1" loads."""
    ctypes.CDLL("libcuda.so.1")
    return Path(re.search(r"/\S*/libcuda\.so\S*", Path("/proc/self/maps").read_text())[0])


def nvcc_major(home: str | None) -> int | None:
    try:
        output = subprocess.run(
            [f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.", output)
    return int(match.group(1)) if match else None


# --- model, adapter, prompts --------------------------------------------------------------------------


def look_at_model(args: Arguments, found: dict) -> str:
    """Finds or fetches the model. Fills found: model (sizes), revision, weights_id."""
    folder = Path(args.model_path)
    if args.rehearse and folder == args.folder / TINY_MODEL and not (folder / "config.json").exists():
        sys.path.append(str(REHEARSAL))
        from tiny_model import build_qwen2

        temporary = folder.with_name(folder.name + ".tmp")
        for leftover in (temporary, folder):  # a kill leaves no half-written model behind
            shutil.rmtree(leftover, ignore_errors=True)
        build_qwen2(temporary).replace(folder)
    dummy = args.own_engine_args.get("load_format") == "dummy"
    folder, revision, text = find_model(args.model_path, "--model_path", PROGRAM, weights=not dummy)
    try:
        found["model"] = _model(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}/config.json: not that of a Llama- or Qwen2-like language model ({error!r})"
        ) from error
    found["revision"] = revision
    found["weights_id"] = revision or weights_fingerprint(folder)
    return text


def _model(folder: Path) -> Model:
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads", heads)
    linear = config["num_hidden_layers"] * sum(a * b for a, b in projection_shapes(config).values())
    table = config["vocab_size"] * config["hidden_size"]  # input embedding and output projection: one each
    return Model(
        folder=str(folder),
        context_tokens=config["max_position_embeddings"],
        weight_bytes=2 * (linear + table * (1 if config.get("tie_word_embeddings") else 2)),
        streamed_bytes=2 * (linear + table),
        kv_bytes_per_token=2 * config["num_hidden_layers"] * kv_heads * head_size * 2,
        vocab_size=config["vocab_size"],
        dual_chunk=bool(config.get("dual_chunk_attention_config")),
        config=config,
    )


def fingerprint(paths: list[Path]) -> str:
    """Hash of files: of their content up to 1 GiB in all, else of 64 KiB in every 16 MiB."""
    digest = hashlib.sha256()
    small = sum(path.stat().st_size for path in paths) < GIB
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, 2**24):
                file.seek(start)
                digest.update(file.read(2**24 if small else 2**16))
    return digest.hexdigest()[:32]


def weights_fingerprint(folder: Path) -> str:
    return fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def local_inputs(args: Arguments) -> dict:
    """Hashes of what this command reads from local files, named as in summary.json's settings."""
    found = {}
    if Path(args.prompts).is_file():
        found["prompts_sha256"] = hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest()
    if (Path(args.model_path) / "config.json").exists():
        found["weights_id"] = weights_fingerprint(Path(args.model_path))
    if args.lora_path:
        found["adapter_id"] = adapter_fingerprint(Path(args.lora_path))
    return found


def adapter_fingerprint(folder: Path) -> str:
    return fingerprint([folder / "adapter_config.json", folder / "adapter_model.safetensors"])


def projection_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """(in, out) of a decoder layer's linear layers, Llama's and Qwen2's names."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads", heads) * size
    return {
        **{"q_proj": (hidden, heads * size), "k_proj": (hidden, kv), "v_proj": (hidden, kv)},
        **{"o_proj": (heads * size, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner)},
        "down_proj": (inner, hidden),
    }


def check_adapter(folder: Path, config: dict) -> None:
    """Raises UserError for an adapter that SGLang would refuse late or serve wrongly (DoRA, rsLoRA, other
    kinds, another base), or that cannot be read."""
    try:
        _check_adapter(folder, config)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"adapter {folder}: cannot be read ({error!r})") from error


def _check_adapter(folder: Path, config: dict) -> None:
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for path in (weights, settings):
        if not path.exists():
            raise UserError(f"adapter {folder}: no {path.name}; give the folder of a finished fine-tuning run")
    adapter = json.loads(settings.read_text())
    if adapter.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: {adapter.get('peft_type')} adapters are not served, only LoRA")
    if adapter.get("use_dora"):
        raise UserError(
            f"adapter {folder}: DoRA is not served by SGLang; merge it into its base, or train LoRA"
        )
    if adapter.get("use_rslora"):
        raise UserError(
            f"adapter {folder}: rsLoRA would be served with the wrong scale (alpha/r); merge it into its base"
        )
    for name in PEFT_ALONE:
        if adapter.get(name):
            raise UserError(f"adapter {folder}: {name} is not served by SGLang; merge it into its base")
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes, layers = projection_shapes(config), config["num_hidden_layers"]
    adapted: dict[str, set[str]] = {}
    for name, tensor in header.items():
        match = re.search(r"layers\.(\d+)\..*?(\w+_proj)\.lora_([AB])", name)
        if name == "__metadata__":
            continue
        if not match or match[2] not in shapes:
            raise UserError(f"adapter {folder}: {name} is not a projection of a decoder layer")
        expected = shapes[match[2]][0] if match[3] == "A" else shapes[match[2]][1]
        size = tensor["shape"][1 if match[3] == "A" else 0]
        if size != expected or int(match[1]) >= layers:
            raise UserError(
                f"adapter {folder} was trained on another base ({adapter.get('base_model_name_or_path')}): {name} has "
                f"size {size}, this model {expected} in {layers} layers"
            )
        adapted.setdefault(match[1], set()).add(match[2])
    for layer, names in adapted.items():
        for name, partner in STACKED_WITH.items():
            if name in names and partner not in names:
                raise UserError(
                    f"adapter {folder}: layer {layer} adapts {name} but not {partner}, which SGLang stacks with it; "
                    "merge it into its base, or train both"
                )


def look_at_adapters(args: Arguments, found: dict) -> str | None:
    """Checks --lora_path (raises) and each record's adapter (its record fails). Fills found: adapters."""
    records: list[Record] = found["records"]
    config, hashes = found["model"].config, {}
    text = None
    if args.lora_path:
        folder = Path(args.lora_path)
        check_adapter(folder, config)
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        text = str(folder)
        if base and Path(base).name != Path(args.model_path).name:
            text = f"WARN: {folder} was trained on {base}, the base here is {args.model_path}"
    for record in records:
        record.lora = record.lora or args.lora_path or None
        if record.lora is None or record.error:
            continue
        record.lora = str(Path(record.lora).absolute())
        try:
            if record.lora not in hashes:
                check_adapter(Path(record.lora), config)
                hashes[record.lora] = adapter_fingerprint(Path(record.lora))
        except UserError as error:
            record.error = str(error)
    if hashes and args.own_engine_args.get("load_format") == "dummy":
        raise UserError(
            "--engine_args: SGLang reads adapters as load_format says, and dummy reads none; use a base with weights"
        )
    found["adapters"] = hashes
    if text is None and hashes:
        text = f"{len(hashes)} in the records"
    return text


def look_at_prompts(args: Arguments, found: dict) -> str:
    """Reads the prompts. Fills found: records, prompts_sha256, prompts_revision."""
    path, found["prompts_revision"] = prompts.find(args)
    found["records"] = prompts.read(path)
    found["prompts_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    bad = sum(record.error is not None for record in found["records"])
    text = f"{args.prompts}: {len(found['records'])} records, SHA-256 {found['prompts_sha256'][:12]}"
    return f"WARN: {text}; {bad} of them bad" if bad else text


def look_at_disk(args: Arguments, found: dict) -> str:
    """Room for the answers; an allocation is tried because a quota does not show as free space."""
    needed = len(found["records"]) * min(args.max_new_tokens, 2048) * 12 + 2**20
    probe = args.folder / ".disk_probe"
    try:
        with probe.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, needed)
    except OSError as error:
        raise UserError(
            f"{args.folder}: {needed / 2**20:.0f} MiB are needed for the answers ({error.strerror}); free some, or "
            "name another --output_file"
        ) from error
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(args.folder).free / GIB
    return f"{free:.1f} GiB free in {args.folder}, {needed / 2**20:.0f} MiB needed"


def run(args: Arguments, machine: Machine) -> dict:
    """Prints the table; returns what it found. Raises UserError with the first failure."""
    table, found = Table(), {}
    print("preflight")
    table.check("packages", look_at_packages)
    # Login nodes, where one downloads, have no GPU.
    if not args.download_only and table.check("GPUs", lambda: look_at_gpus(args, machine)):
        table.check("kernel tools", lambda: look_at_kernel_tools(args, machine))
    model = table.check("model", lambda: look_at_model(args, found))
    if table.check("prompts", lambda: look_at_prompts(args, found)) and not args.download_only:
        if model:
            table.check("adapter", lambda: look_at_adapters(args, found))
        table.check("disk", lambda: look_at_disk(args, found))
    if table.first_failure:
        raise UserError(table.first_failure)
    return found
