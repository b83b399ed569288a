"""LoRA adapters: is each one that SGLang serves as PEFT would?"""

import json
import re
from dataclasses import replace
from pathlib import Path

from workbench import UserError
from workbench.models import fingerprint

from .model import projection_shapes
from .prompts import Record

# SGLang 0.5.17 loads q, k, v and gate, up as one matrix each (normalize_qkv_proj, normalize_gate_up_proj): without
# these partners its scheduler dies of a KeyError or ValueError. A missing k or up is zero.
STACKED_WITH = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
# Settings of PEFT that SGLang does not read: it would serve another adapter.
PEFT_ALONE = (
    *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "lora_bias"),
    *("use_qalora", "alora_invocation_tokens", "layer_replication"),
)


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
    return fingerprint([folder / "adapter_config.json", folder / "adapter_model.safetensors"])


def base_name(folder: Path) -> str | None:
    """The model that the adapter was trained on, as it says itself."""
    return json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")


def check(folder: Path, config: dict) -> None:
    """Raises UserError for an adapter that SGLang would refuse late or serve wrongly (DoRA, rsLoRA, other
    kinds, another base), or that cannot be read. `config` is the base model's."""
    try:
        _check_settings(folder)
        _check_tensors(folder, config)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"adapter {folder}: cannot be read ({error!r})") from error


def _check_settings(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / name).exists():
            raise UserError(f"adapter {folder}: no {name}; give the folder of a finished fine-tuning run")
    settings = json.loads((folder / "adapter_config.json").read_text())
    if settings.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: {settings.get('peft_type')} adapters are not served, only LoRA")
    reasons = {
        "use_dora": "DoRA is not served by SGLang; merge it into its base, or train LoRA",
        "use_rslora": "rsLoRA would be served with the wrong scale (alpha/r); merge it into its base",
    } | {name: f"{name} is not served by SGLang; merge it into its base" for name in PEFT_ALONE}
    for name, reason in reasons.items():
        if settings.get(name):
            raise UserError(f"adapter {folder}: {reason}")


def _check_tensors(folder: Path, config: dict) -> None:
    with (folder / "adapter_model.safetensors").open("rb") as file:
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
                f"adapter {folder} was trained on another base ({base_name(folder)}): {name} has size {size}, this "
                f"model {expected} in {layers} layers"
            )
        adapted.setdefault(match[1], set()).add(match[2])
    for layer, names in adapted.items():
        for name, partner in STACKED_WITH.items():
            if name in names and partner not in names:
                raise UserError(
                    f"adapter {folder}: layer {layer} adapts {name} but not {partner}, which SGLang stacks with it; "
                    "merge it into its base, or train both"
                )
