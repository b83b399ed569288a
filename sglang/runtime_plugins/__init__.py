"""Plugins of this repository for the pinned SGLang Runtime (entry points in pyproject.toml).

Nothing here is active unless the environment variable RUNTIME_PLUGINS names it, comma separated:

    cpu                  the Runtime on any CPU (needs SGLANG_PLATFORM=plain_cpu too)
    deterministic_radix  FlashInfer keeps the radix cache in SGLang's deterministic mode
    fused_norm           RMSNorm stays one kernel in SGLang's deterministic mode (GPU)
    radix_trace          the radix tree is written to the file that RADIX_TRACE names, event by event
    jump_forward         text that a grammar forces is computed in one pass (run_sglang.py --jump_forward)
    count_passes         the engine's state says how many forward passes it ran (for measurements)
    lean_sampler         top-p sampling with fewer passes over logits in 16 bits (GPU)
    answer_lengths       a request ends at its own custom_params["answer_tokens"] (for measurements)

`run_sglang.py` sets these variables for its own engine and prints them with its `sglang serve` line.
"""

import importlib.metadata
import inspect
import os
import pkgutil
from collections.abc import Callable

SGLANG_VERSION = "0.5.17"


def asked_for(name: str) -> bool:
    """Whether this run asked for the plugin `name`."""
    return name in os.environ.get("RUNTIME_PLUGINS", "").split(",")


def check_target(target: str, needs: str = "") -> None:
    """Raises SystemExit if `target`, a dotted path, is not in the installed SGLang or its source does not
    contain `needs`: a hook that finds nothing to hook would otherwise only be a line in a log (SGLang logs
    Exceptions of plugins and goes on)."""
    try:
        found = pkgutil.resolve_name(target)
        if needs and needs not in inspect.getsource(found):
            raise AttributeError(f"nothing about {needs!r} in its source")
    except (ImportError, AttributeError) as error:
        found = importlib.metadata.version("sglang")
        raise SystemExit(
            f"runtime_plugins: no {target} in sglang {found} (written for {SGLANG_VERSION}): {error}"
        ) from error


def hook(target: str, function: Callable, kind: str) -> None:
    """Registers `function` with SGLang's HookRegistry; `kind` is REPLACE or AROUND."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    check_target(target)
    HookRegistry.register(target, function, HookType[kind])
