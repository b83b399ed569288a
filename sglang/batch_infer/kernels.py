"""Builds a run's kernels ahead: all at once, and on a machine without a GPU, too.

    python -P kernels.py '{"dtype": "bfloat16", ...}'     # the fields of Modules; `begin` starts it

FlashInfer and SGLang compile a module when it is first used, one after the other, for minutes. Here a process of its own
builds those of a Llama or Qwen2 by the libraries' own functions and below their own locks: an engine that starts
meanwhile waits for a module that is being built, finds what is, and builds what this list lacks. No GPU is touched.
"""

import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "common"))
from workbench.machine import memory_limit_gib
from workbench.processes import die_with_parent

COMPILER_GIB = 1  # of nvcc; FlashInfer's largest files take half of it


@dataclass(frozen=True)
class Modules:
    """What the modules of a run depend on."""

    architecture: str  # as FLASHINFER_CUDA_ARCH_LIST has it: 9.0
    dtype: str  # of weights, activations and KV pool
    head_size: int
    heads: int  # on one GPU, as all that follows
    kv_heads: int
    gpus: int  # that share a copy
    deterministic: bool  # SGLang then decodes with prefill's kernels
    attention: bool  # by FlashInfer


def needed(args, model, tp_size: int, architecture: str) -> Modules:
    """For `args` (Arguments) on `tp_size` GPUs a copy. `dtype` is SGLang's auto (configs/model_config.py)."""
    own, config = args.own_engine_args, model.config
    kind = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    heads = config["num_attention_heads"]
    return Modules(
        architecture=os.environ.get("FLASHINFER_CUDA_ARCH_LIST", architecture),
        dtype=own.get("dtype", "auto").replace("auto", "float16" if kind == "float32" else kind),
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        heads=heads // tp_size,
        kv_heads=max(1, (config.get("num_key_value_heads") or heads) // tp_size),
        gpus=tp_size,
        deterministic=args.reproducible,
        attention=own.get("attention_backend", "flashinfer") == "flashinfer",
    )


def begin(modules: Modules, folder: Path) -> subprocess.Popen | None:
    """The process that builds, or None where one has: it leaves a file in `folder`, FlashInfer's cache, and beside it a
    log. What it cannot build the engine tries again."""
    variables = {
        name: os.environ.get(name) for name in ("CUDA_HOME", "FLASHINFER_EXTRA_CUDAFLAGS", "TVM_FFI_CACHE_DIR")
    }
    versions = [importlib.metadata.version(name) for name in ("flashinfer-python", "sglang")]
    found = json.dumps([asdict(modules), variables, versions], sort_keys=True)
    mark = folder / f"built-{hashlib.sha256(found.encode()).hexdigest()[:16]}"
    if mark.exists():
        return None
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "FLASHINFER_CUDA_ARCH_LIST": modules.architecture,
    }
    command = [sys.executable, "-P", __file__, json.dumps(asdict(modules)), str(mark)]
    with mark.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


# --- in the process of its own ------------------------------------------------------------------------


def of_flashinfer(modules: Modules) -> dict[str, Callable[[], object]]:
    """As layers/attention/flashinfer_backend.py and layers/layernorm.py of SGLang use them."""
    import torch
    from flashinfer.jit import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.norm import gen_norm_module

    dtype, size = getattr(torch, modules.dtype), modules.head_size
    kind = (dtype, dtype, dtype, torch.int32, size, size, 0, False, False)
    specs = [gen_norm_module()]
    if modules.attention:
        specs.append(gen_batch_prefill_module("fa2", *kind, False))  # and decoding on tensor cores
        if not modules.deterministic and modules.heads // modules.kv_heads < 4:
            specs.append(gen_batch_decode_module(*kind))
    return {spec.name: functools.partial(spec.build, verbose=False) for spec in specs if not spec.is_aot}


def of_sglang(modules: Modules) -> dict[str, Callable[[], object]]:
    """Its own just-in-time kernels for layers, KV pool and positions, and for sums over GPUs."""
    import torch
    from sglang.kernels.ops.activation.activation import activation_module
    from sglang.kernels.ops.attention.clamp_position import _jit_clamp_position_module
    from sglang.kernels.ops.attention.rope import _jit_fused_rope_module
    from sglang.kernels.ops.communication.all_reduce import get_all_reduce_module
    from sglang.kernels.ops.kvcache.kvcache import _jit_kvcache_module

    dtype, row_bytes = getattr(torch, modules.dtype), modules.kv_heads * modules.head_size * 2
    found = {
        "activation": functools.partial(activation_module, dtype),
        "rope": functools.partial(_jit_fused_rope_module, True, modules.head_size, dtype, dtype),
        "kvcache": functools.partial(_jit_kvcache_module, row_bytes, row_bytes),
        "clamp_position": functools.partial(_jit_clamp_position_module, torch.int64),
    }
    if modules.gpus > 1:
        found["all_reduce"] = functools.partial(get_all_reduce_module, dtype, modules.gpus)
    return found


def build(modules: Modules) -> list[str]:
    """Returns what could not be built, each with the reason."""
    compilers = int(max(1, min(2 * len(os.sched_getaffinity(0)), memory_limit_gib()[0] // COMPILER_GIB)))
    # Of each module, but only that of attention has many files.
    os.environ.setdefault("MAX_JOBS", str(compilers))
    with ThreadPoolExecutor(8) as pool:
        running: dict[str, Future] = {n: pool.submit(f) for n, f in of_flashinfer(modules).items()}
        from sglang.kernels.jit.utils.arch import get_jit_cuda_arch, override_jit_cuda_arch

        capability = map(int, re.match(r"(\d+)\.(\d+)", modules.architecture).groups())
        with override_jit_cuda_arch(*capability):
            os.environ["TVM_FFI_CUDA_ARCH_LIST"] = get_jit_cuda_arch().target_name  # of all threads
            running |= {n: pool.submit(f) for n, f in of_sglang(modules).items()}
            errors = {name: future.exception() for name, future in running.items()}
    return [f"{name}: {(str(e).strip() or repr(e)).splitlines()[-1][:200]}" for name, e in errors.items() if e]


def main(argv: list[str]) -> int:
    die_with_parent()
    gc.disable()  # as it imports (workbench.processes.importing), and it ends soon
    failed = build(Modules(**json.loads(argv[0])))
    for line in failed:
        print("could not be built", line)
    Path(argv[1]).touch()  # what failed would fail again, below the locks that the engine waits for
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
