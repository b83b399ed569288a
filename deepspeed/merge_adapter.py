"""Adds a LoRA adapter to its base model and writes a plain Hugging Face model.

    python deepspeed/merge_adapter.py --adapter deepspeed/output_llama2_7b_lora --output_dir merged_model

PEFT merges (W + alpha / r * B A, Hu et al. 2021, arXiv 2106.09685) in the base's dtype, on the CPU: host memory for the
model is needed. What is written is loaded again, and must give the logits of the base with the adapter.
"""

import argparse
import gc
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from lora_sft.run_folder import ADAPTER
from workbench import UserError
from workbench.files import disk_full
from workbench.models import cached_model, check_model_folder

CONFIG = "adapter_config.json"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter_model.safetensors")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the merged model")
    parser.add_argument("--base", help="base model folder or hub id (default: what the adapter names)")
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask the hub about the base
    try:
        base = find_base(args.adapter, args.base)
        if args.output_dir.exists() and any(args.output_dir.iterdir()):
            raise UserError(f"--output_dir {args.output_dir}: is not empty")
        # Written beside and renamed at the end: a folder with that name is a complete model.
        part = args.output_dir.absolute().with_name(args.output_dir.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            changed = merge(args.adapter, base, part)
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


def find_base(adapter: Path, named: str | None) -> Path:
    """The folder of the base model. Raises UserError."""
    for name in (CONFIG, ADAPTER):
        if not (adapter / name).exists():
            raise UserError(f"--adapter {adapter}: no {name}; give the --output_dir of a finished run")
    config = json.loads((adapter / CONFIG).read_text())
    name = named or config["base_model_name_or_path"]
    base = Path(name) if Path(name).is_dir() else cached_model(name, config.get("revision"))
    if base is None:
        raise UserError(f"base model {name}: no folder here and not complete in the cache; name it with --base")
    check_model_folder(base)
    return base


def merge(adapter: Path, base: Path, out: Path) -> int:
    """Writes the merged model into `out`; returns the number of changed weights. Raises UserError."""
    import torch
    from transformers import AutoModelForCausalLM

    model = load(adapter, base)
    ids = torch.arange(3, 19)[None]  # [1, 16]: any tokens
    with torch.no_grad():
        expected = model(ids).logits.float()
        with model.disable_adapter():
            effect = (model(ids).logits.float() - expected).norm()
    if effect == 0:
        raise UserError(f"--adapter {adapter}: changes nothing in {base}; was anything learnt?")
    changed = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    dtype = next(model.parameters()).dtype
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT looks for NaN and infinities
        raise UserError(f"--adapter {adapter}: not finite after merging; it diverged ({error})") from error
    model.save_pretrained(out)
    for source, pattern in ((base, "*token*"), (adapter, "*token*"), (adapter, "chat_template.jinja")):
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
        raise RuntimeError(f"{out}: logits differ from those of base and adapter by {error:.2g}, above {limit}")
    return changed


def load(adapter: Path, base: Path):
    """The base with the adapter. Raises UserError if they do not fit: PEFT says nothing about tensors that are missing
    in the file, or that the base has no place for."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    other = f"--adapter {adapter}: does not fit {base}; is it another base model?"
    try:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError) as error:  # another shape, or none of the layers
        raise UserError(f"{other} ({str(error).strip().splitlines()[-1].strip()})") from error
    with safe_open(adapter / ADAPTER, framework="pt") as stored:
        different = set(stored.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if different:
        raise UserError(f"{other} ({len(different)} tensors are in one of them only, e.g. {min(different)})")
    return model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
