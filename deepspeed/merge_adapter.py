"""Adds a LoRA adapter to its base model and writes a plain Hugging Face model.

    python deepspeed/merge_adapter.py --adapter deepspeed/output_llama2_7b_lora --output_dir merged_model

Works shard by shard on the CPU: host memory stays near one shard (about 10 GiB for Llama-2-7B as published).
Each weight W becomes W + alpha / r * B A (Hu et al. 2021, arXiv 2106.09685), computed in fp32 and stored in
the base's dtype. Every written tensor is read back and checked.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from lora_sft import run_folder
from workbench import UserError
from workbench.files import disk_full
from workbench.machine import cached_model, check_model_folder

PREFIX = "base_model.model."


def read_adapter(folder: Path) -> tuple[dict, dict[str, tuple]]:
    """Returns adapter_config.json and {base weight name: (A [r, in], B [out, r])}. Raises UserError."""
    from safetensors.torch import load_file

    for name in ("adapter_config.json", run_folder.ADAPTER):
        if not (folder / name).exists():
            raise UserError(f"--adapter {folder}: no {name}; give the --output_dir of a finished run")
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("use_dora") or config.get("use_rslora") or config.get("modules_to_save"):
        raise UserError(f"--adapter {folder}: only plain LoRA is merged here; use peft's merge_and_unload")
    tensors = load_file(folder / run_folder.ADAPTER)
    pairs = {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            base = name.removeprefix(PREFIX).removesuffix("lora_A.weight") + "weight"
            pairs[base] = (tensors[name], tensors[name.replace("lora_A", "lora_B")])
    return config, pairs


def merge(adapter: Path, base: Path, out: Path) -> int:
    """Writes the merged model into `out`; returns the number of changed weights. Raises UserError."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm import tqdm

    config, pairs = read_adapter(adapter)
    scale = config["lora_alpha"] / config["r"]
    remaining = set(pairs)
    shards = sorted(base.glob("*.safetensors"))
    with tqdm(total=sum(s.stat().st_size for s in shards), unit="B", unit_scale=True, desc="merging") as bar:
        for shard in shards:
            merged = {}
            with safe_open(shard, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 (not a dict)
                    weight = source.get_tensor(name)
                    if name in pairs:
                        a, b = (tensor.float() for tensor in pairs[name])
                        if weight.shape != (b.shape[0], a.shape[1]):
                            raise UserError(
                                f"{name}: the adapter's shape does not fit {base}; is it another base model?"
                            )
                        weight = (weight.float() + scale * (b @ a)).to(weight.dtype)
                        remaining.discard(name)
                    if not torch.isfinite(weight).all():
                        raise UserError(f"{name}: not finite after merging; the adapter diverged")
                    merged[name] = weight
                save_file(merged, out / shard.name, metadata={"format": "pt"})
            check_shard(out / shard.name, merged)
            bar.update(shard.stat().st_size)
    if remaining:
        raise UserError(f"--adapter {adapter}: {min(remaining)} is not in {base}; is it another base model?")
    for source, pattern in ((base, "*.json"), (adapter, "tokenizer*"), (adapter, "chat_template.jinja")):
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)
    check_model_folder(out)
    return len(pairs)


def check_shard(path: Path, expected: dict) -> None:
    """Reads a written shard back and compares it bit for bit."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        if set(stored.keys()) != set(expected):
            raise RuntimeError(f"{path}: other tensors on disk than written")
        for name, tensor in expected.items():
            if not torch.equal(stored.get_tensor(name), tensor):
                raise RuntimeError(f"{path}: {name} differs on disk from what was written")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter_model.safetensors")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the merged model")
    parser.add_argument("--base", help="base model folder or hub id (default: what the adapter names)")
    args = parser.parse_args(argv)
    try:
        config, _ = read_adapter(args.adapter)
        name = args.base or config["base_model_name_or_path"]
        base = Path(name) if Path(name).is_dir() else cached_model(name, config.get("revision"))
        if base is None:
            raise UserError(
                f"base model {name}: no folder here and not complete in the cache; name it with --base"
            )
        check_model_folder(base)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
