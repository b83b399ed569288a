"""Adds a LoRA adapter to its base model and writes a plain Hugging Face model.

    python deepspeed/merge_adapter.py --adapter deepspeed/output_llama2_7b_lora --output_dir merged_model

PEFT merges (W + alpha / r * B A, Hu et al. 2021, arXiv 2106.09685) in the base's dtype, on the CPU: host memory for the
model is needed. What is written is loaded again, and must give the logits of the base with the adapter.
"""

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Set
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from workbench import UserError
from workbench.files import disk_full
from workbench.models import (
    cached_model,
    check_config,
    check_model_folder,
    check_tokens,
    in_one_line,
    load_tokenizer,
    read_adapter,
)

# What a model was trained on: behind random tokens its logits are chaotic in 16 bits.
TEXT = (
    "\n\nHuman: Why does ice float on water?\n\nAssistant: Frozen water takes up more room, so it is lighter."
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter_model.safetensors")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the merged model")
    parser.add_argument("--base", help="base model folder or hub id (default: what the adapter names)")
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask the hub about the base
    try:
        settings, tensors = read_adapter(args.adapter)
        base = find_base(args.adapter, settings, args.base)
        if args.output_dir.exists() and any(args.output_dir.iterdir()):
            raise UserError(f"--output_dir {args.output_dir}: is not empty")
        # Written beside and renamed at the end: a folder with that name is a complete model.
        part = args.output_dir.absolute().with_name(args.output_dir.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            changed = merge(args.adapter, settings, tensors.keys(), base, part)
            if args.output_dir.exists():
                args.output_dir.rmdir()
            os.replace(part, args.output_dir)
        except Exception as error:
            if disk_full(error, args.output_dir.absolute().parent):
                raise UserError(f"--output_dir {args.output_dir}: the disk or quota is full") from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {changed} weights changed; load it with AutoModelForCausalLM.from_pretrained")
    return 0


def find_base(adapter: Path, settings: dict, named: str | None) -> Path:
    """The folder of the base model. Raises UserError."""
    name, revision = named or settings.get("base_model_name_or_path"), settings.get("revision")
    base = None
    if isinstance(name, str):
        base = Path(name) if os.path.isdir(name) else cached_model(name, str(revision) if revision else None)
    if base is None:
        raise UserError(f"base model {name}: no folder here and not complete in the cache; name it with --base")
    check_model_folder(base)
    check_tokens(adapter, check_config(base)["vocab_size"])
    return base


def merge(adapter: Path, settings: dict, tensors: Set[str], base: Path, out: Path) -> int:
    """Writes the merged model into `out`; returns the number of changed weights. Raises UserError."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    model = load(adapter, settings, tensors, base)
    own = (adapter / "tokenizer.json").exists()
    ids = load_tokenizer(adapter if own else base)(TEXT, return_tensors="pt")["input_ids"]  # [1, S]
    with torch.no_grad():
        expected = model(ids).logits.float()
        with model.disable_adapter():
            effect = (model(ids).logits.float() - expected).norm()
    if effect == 0:
        raise UserError(f"--adapter {adapter}: changes nothing in {base}; was anything learnt?")
    changed = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    dtype, tied = next(model.parameters()).dtype, model.config.tie_word_embeddings
    try:
        model = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:  # an overflow, or a kind of layer that cannot be merged
        raise UserError(f"--adapter {adapter}: PEFT cannot merge it ({in_one_line(error)})") from error
    model.save_pretrained(out)
    for source, pattern in (
        (base, "*token*"),
        (adapter, "*token*"),
        (adapter, "chat_template.jinja"),
        (adapter, "parity.json"),
    ):
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)
    check_model_folder(out)
    del model
    gc.collect()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")(ids).logits.float()
    error = ((found - expected).norm() / expected.norm()).item()
    limit = 1e-4 if dtype == torch.float32 else 5e-2  # a merged weight is rounded once more
    if not error < limit:
        if tied and any("embed_tokens" in name or "lm_head" in name for name in tensors):
            raise UserError(
                f"--adapter {adapter}: changes one of two tied embeddings; untie those of {base} first"
            )
        raise RuntimeError(f"{out}: logits differ from those of base and adapter by {error:.2g}, above {limit}")
    return changed


def load(adapter: Path, settings: dict, tensors: Set[str], base: Path):
    """The base with the adapter. Raises UserError if they do not fit: PEFT says nothing about settings that it does not
    know, tensors that are missing in the file, or those that the base has no place for."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    other = f"--adapter {adapter}: does not fit {base}; is it another base model?"
    try:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    except Exception as error:  # another shape, none of the layers, or settings that no version of PEFT writes
        raise UserError(f"{other} ({in_one_line(error)})") from error
    unknown = {
        name for name, value in settings.items() if value and not hasattr(model.peft_config["default"], name)
    }
    for name in unknown | {"layer_replication"}:  # more layers than config.json says
        if settings.get(name):
            raise UserError(
                f"--adapter {adapter}: {name} cannot be merged here; merge with the library that wrote it"
            )
    # Beside the adapter PEFT saves an embedding that LoRA targets, as it was.
    whole = any(name.endswith(".base_layer.weight") for name in tensors)
    different = tensors ^ get_peft_model_state_dict(model, save_embedding_layers=whole).keys()
    if any(".default." in name for name in different):
        raise UserError(
            f"--adapter {adapter}: its tensors are named as in PEFT's memory; remove .default from them"
        )
    if different:
        raise UserError(f"{other} ({len(different)} tensors are in one of them only, e.g. {min(different)})")
    return model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
