"""What more GPUs would give, on paper: memory, gathers and links of fine-tuning, hours of inference. Nothing runs.

    python bench/scale.py

Memory is the preflight's prediction (lora_sft/memory.py). A micro-batch gathers the weights twice, for its forward and
its backward pass; in a ring every GPU, and so every node's link, receives all but its own share each time. What a step
computes meanwhile is measured with weights that no one gathers (results/train_fp16_h200.json, 2 x H200), and grows with
the weights. Links are taken at 80 % of their nominal rate. With zero_hpz_partition_size 8 each node of 8 GPUs keeps a
copy of its own, which the backward pass gathers from: half the bytes between nodes.

Inference has a prompt's share of what 805 take (results/offline_throughput.json, H100, the reproducible profile), and
never less than its longest answer, which is what two copies do not halve (results/offline_throughput_two_gpus.json, H200).
"""

import json
import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "deepspeed", "common"))
import shapes

from lora_sft import memory
from lora_sft.arguments import Arguments, read_zero_config

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {
    "Llama-2-7B": shapes.SHAPES["llama2-7b"],
    "Llama-2-70B": shapes.SHAPES["llama2-7b"]  # config.json of meta-llama/Llama-2-70b-hf
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
}
GPUS, GPUS_A_NODE = (8, 64, 512), 8
# Nominal bytes/s in one direction: H100's NVLink 4, PCIe 4.0 x16, and what a node has.
LINKS = {"NVLink": 450e9, "PCIe": 32e9, "200 Gbit/s": 25e9, "25 Gbit/s": 25e9 / 8}
REACHED = 0.8
PER_LAYER = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
ANSWER_SHARE = 0.28  # of the positions, in the data set; decides the logits' memory
PROMPTS, ENGINES = (805, 10**5, 10**7), (1, 8, 64, 512)


def rows_of(name: str) -> dict[str, dict]:
    return {row["row"]: row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}


def sizes(config: dict, rank: int) -> tuple[dict[str, int], list[int]]:
    """Elements of the base's tensors and of the adapter's, from the architecture without its weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    base = {name: tensor.numel() for name, tensor in model.named_parameters()}
    return base, [rank * side for module in linear for side in (module.in_features, module.out_features)]


def training() -> list[str]:
    args = Arguments()
    zero = read_zero_config(str(Path(memory.__file__).parents[1] / "zero3.json"))["zero_optimization"]
    measured_s = rows_of("train_fp16_h200")["replicated"]["step_s"]
    lines, small = [], {}
    for name, config in MODELS.items():
        base, lora = sizes(config, args.lora_r)
        small = small or base
        larger = layer(base) / layer(small)  # zero3.json has its sizes for a layer of the 7B
        zero |= {key: zero[key] * larger for key in PER_LAYER}
        weights, compute_s = sum(base.values()) * 2, measured_s * sum(base.values()) / sum(small.values())
        for gpus in GPUS:
            how = {"dtype": "fp16", "world_size": gpus, "answer_share": ANSWER_SHARE, "kernels": ("lora",)}
            gib = sum(memory.predict(config, base, lora, args, zero, **how).values())
            gathered = 2 * weights * (gpus - 1) / gpus
            hidden = [share(compute_s, gathered / rate) for rate in LINKS.values()]
            if gpus == GPUS_A_NODE:  # the links between nodes are not used
                hidden[2:], hpz = ["", ""], ("", "", "")
            else:
                hidden[:2] = ["", ""]
                copies = (share(compute_s, gathered / 2 / LINKS[link]) for link in ("200 Gbit/s", "25 Gbit/s"))
                hpz = (f"{gib + weights / GPUS_A_NODE / 2**30:.1f}", *copies)
            cells = [name, gpus, f"{gib:.1f}", f"{gathered / 1e9:.0f}", f"{compute_s:.1f}", *hidden, *hpz]
            lines.append(row(cells))
    head = ["model", "GPUs", "GiB a GPU", "GB gathered a step", "s to compute", *LINKS]
    return [row([*head, "GiB with hpz", *list(LINKS)[2:]]), row(["---"] * 12), *lines]


def layer(base: dict[str, int]) -> int:
    return sum(size for name, size in base.items() if ".layers.0." in name)


def share(compute_s: float, nominal_s: float) -> str:
    """Of the gathers, what hides behind the computation; where not all does, how many times as long a step takes."""
    gather_s = nominal_s / REACHED
    return (
        "100 %"
        if gather_s <= compute_s
        else f"{100 * compute_s / gather_s:.0f} % ({gather_s / compute_s:.1f} x)"
    )


def inference() -> list[str]:
    one = rows_of("offline_throughput")["default"]
    pair = rows_of("offline_throughput_two_gpus")
    longest_s = 2 * pair["fast_dp2"]["seconds"] - pair["fast"]["seconds"]
    lines = []
    for prompts in PROMPTS:
        seconds = [max(longest_s, one["seconds"] * prompts / PROMPTS[0] / engines) for engines in ENGINES]
        lines.append(row([f"{prompts:,}", *(f"{(one['load_s'] + s) / 3600:.2f}" for s in seconds)]))
    return [row(["prompts", *(f"{n} GPU" + "s" * (n > 1) for n in ENGINES)]), row(["---"] * 5), *lines]


def row(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print(*training(), "", *inference(), sep="\n")
