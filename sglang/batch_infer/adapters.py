"""LoRA adapters: is each one that SGLang serves as PEFT would?"""

import json
import re
from dataclasses import replace
from pathlib import Path

from workbench import UserError
from workbench.models import ADAPTER_FILES, check_tokens, fingerprint, read_adapter, read_object

from .model import projection_shapes
from .prompts import Record

# SGLang 0.5.17 loads q, k, v and gate, up as one matrix each (normalize_qkv_proj, normalize_gate_up_proj): without
# these partners its scheduler dies of a KeyError or ValueError. A missing k or up is zero.
STACKED_WITH = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.lora_([AB])(?:\.default)?\.weight"
)
# What adapter_config.json may say: what is checked here, of training, and where the adapter came from. Whatever else
# is set makes PEFT compute something that SGLang does not.
UNDERSTOOD = {
    *("r", "lora_alpha", "target_modules", "peft_type", "bias", "init_lora_weights"),
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying"),
    *("megatron_core", "runtime_config"),
}
REASONS = {
    "use_dora": "DoRA is not served by SGLang",
    "use_rslora": "rsLoRA would be served with the wrong scale (alpha/r)",
}
# The other initialisations of PEFT change the base's weights, too.
VALUES = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def check_all(records: list[Record], lora_path: str, config: dict) -> tuple[list[Record], dict[str, str]]:
    """The records, each with its adapter (its own, else `lora_path`, else None) or with what is wrong with it, and
    the adapters' hashes by folder. `config` is the base model's. Raises UserError for a bad `lora_path`."""
    if lora_path:
        check(Path(lora_path), config)
    hashes, problems, checked = {}, {}, []
    for record in records:
        folder = record.lora or lora_path or None
        if folder and not record.error:
            folder = str(Path(folder).absolute())
            if folder not in hashes and folder not in problems:
                try:
                    check(Path(folder), config)
                    hashes[folder] = adapter_fingerprint(Path(folder))
                except UserError as error:
                    problems[folder] = str(error)
        checked.append(replace(record, lora=folder, error=record.error or problems.get(folder)))
    return checked, hashes


def adapter_fingerprint(folder: Path) -> str:
    return fingerprint([folder / name for name in ADAPTER_FILES])


def base_name(folder: Path) -> str | None:
    """The model that the adapter was trained on, as it says itself."""
    return read_object(folder / "adapter_config.json").get("base_model_name_or_path")


def check(folder: Path, config: dict) -> None:
    """Raises UserError for an adapter that SGLang would refuse late or serve wrongly, or that cannot be read. `config`
    is the base model's."""
    settings, tensors = read_adapter(folder)
    check_tokens(folder, config["vocab_size"])
    _check_settings(folder, settings)
    modules = _check_tensors(folder, settings, tensors, config)
    targets = settings.get("target_modules")
    named = {str(name).split(".")[-1] for name in targets} if isinstance(targets, list) else set()
    if targets != "all-linear" and not modules <= named <= projection_shapes(config).keys():
        raise UserError(
            f"adapter {folder}: target_modules {targets!r} is no list of this model's projections, which SGLang wants; "
            f"its tensors are those of {json.dumps(sorted(modules))}: write this into adapter_config.json"
        )


def _check_settings(folder: Path, settings: dict) -> None:
    for name, value in settings.items():
        if name in VALUES and value not in VALUES[name]:
            raise UserError(
                f"adapter {folder}: {name} {value!r} is not served by SGLang; merge it into its base"
            )
        if value and name not in UNDERSTOOD:
            reason = REASONS.get(name, f"{name} is not served by SGLang")
            raise UserError(f"adapter {folder}: {reason}; merge it into its base")
    if "peft_type" not in settings:
        raise UserError(f"adapter {folder}: adapter_config.json names no peft_type; save it with PEFT")
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise UserError(f"adapter {folder}: lora_alpha is {alpha!r}; a number is expected")


def _check_tensors(folder: Path, settings: dict, tensors: dict[str, list[int]], config: dict) -> set[str]:
    """The names of the projections that it adapts."""
    shapes, layers, rank = projection_shapes(config), config["num_hidden_layers"], settings.get("r")
    adapted: dict[str, set[str]] = {}  # of each layer, the projections' names with A or B
    for name, shape in tensors.items():
        match = TENSOR.fullmatch(name)
        if not match or match[2] not in shapes:
            raise UserError(
                f"adapter {folder}: {name} is not a projection of a decoder layer; merge it into its base"
            )
        layer, module, side = match.groups()
        inner, outer = shapes[module]
        wanted = [rank, inner] if side == "A" else [outer, rank]
        if int(layer) >= layers or shape != wanted:
            raise UserError(
                f"adapter {folder} was trained on another base ({base_name(folder)}), or with another r: {name} has shape "
                f"{shape}; r {rank!r} and this model's {layers} layers want {wanted}"
            )
        adapted.setdefault(layer, set()).add(f"{module}.{side}")
    for layer, names in adapted.items():
        for name in sorted(names):
            module, side = name.split(".")
            partner = STACKED_WITH.get(module, module)
            for needed in (f"{module}.{'AB'[side == 'A']}", f"{partner}.{side}"):
                if needed not in names:
                    raise UserError(
                        f"adapter {folder}: layer {layer} adapts {name} but not {needed}, which SGLang computes with it; "
                        "merge it into its base, or train both"
                    )
    return {name.split(".")[0] for names in adapted.values() for name in names}
