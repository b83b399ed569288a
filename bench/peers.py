"""The work of a throughput benchmark in vLLM or in TRL, by a Python that has it; rows vllm and trl start it.

    python -P bench/peers.py vllm SPEC.json RESULT.json
    python -P bench/peers.py trl SPEC.json RESULT.json      # as `accelerate launch` with the ZeRO-3 file that TRL ships

For vLLM 0.26.0 (torch 2.11) and TRL 1.16.0. All that SPEC does not name is the library's own default.
"""

import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

OUT_OF_MEMORY = 3


# --- vLLM ---------------------------------------------------------------------------------------------


def vllm(spec: dict, result: Path) -> dict:
    """One call with all prompts as token ids, each answered at its length. vLLM admits a request by its prompt and
    orders by arrival, so that to know max_tokens tells its scheduler nothing but the step in which it ends."""
    from vllm import LLM, SamplingParams

    began = time.monotonic()
    llm = LLM(**spec["engine_args"])
    load_s = time.monotonic() - began

    def generate(work: list[tuple[list[int], int]]) -> list:
        prompts = [{"prompt_token_ids": ids} for ids, _ in work]
        params = [SamplingParams(**spec["sampling"], ignore_eos=True, max_tokens=tokens) for _, tokens in work]
        return llm.generate(prompts, params, use_tqdm=False)

    generate([(list(range(3, 35)), 16)] * 16)
    llm.reset_prefix_cache()
    result.with_suffix(".ready").touch()
    while not all(Path(other).exists() for other in spec["wait_for"]):
        time.sleep(0.01)
    began = time.monotonic()
    answers = generate(spec["work"])
    seconds = time.monotonic() - began
    found = [len(answer.outputs[0].token_ids) for answer in answers]
    if found != [tokens for _, tokens in spec["work"]]:
        sys.exit("error: an answer did not end at its length")
    config = llm.llm_engine.vllm_config
    return {
        "seconds": seconds,
        "load_s": load_s,
        "cached_prompt_tokens": sum(answer.num_cached_tokens or 0 for answer in answers),
        "most_running": config.scheduler_config.max_num_seqs,
        "largest_cuda_graph": config.compilation_config.max_cudagraph_capture_size,
        "versions": versions("vllm", "torch", "transformers"),
    }


# --- TRL ----------------------------------------------------------------------------------------------


def trl(spec: dict, result: Path) -> dict:
    """Starts a process for each GPU, whose first writes the result."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    [package] = importlib.util.find_spec("trl").submodule_search_locations
    words = ["--config_file", f"{package}/accelerate_configs/zero3.yaml", "--mixed_precision", spec["dtype"]]
    words += ["--num_processes", str(spec["gpus"]), "--main_process_port", str(spec["port"])]
    launch_command(launch_command_parser().parse_args([*words, __file__, "trl_rank", sys.argv[2], str(result)]))
    return json.loads(result.read_text())


def trl_rank(spec: dict, result: Path) -> dict:
    """SFTTrainer on pairs of prompt and completion, its loss on completions; an optimizer step each micro-batch."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if spec["cap_gib"]:  # a Volta's memory, and its attention kernels
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(spec["cap_gib"] * 2**30 / total)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    rows = [json.loads(line) for line in Path(spec["documents"]).read_text().splitlines()][: spec["rows"]]
    settings = {
        "max_steps": spec["warm_up"] + spec["steps"],
        "packing": spec["packing"],
        spec["dtype"]: True,
        "model_init_kwargs": {"dtype": "auto"},  # float32 is TRL's default
        **{"output_dir": tempfile.mkdtemp(), "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    } | spec["settings"]
    config = SFTConfig(**settings)
    try:
        trainer = SFTTrainer(
            model=spec["model"],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]),
            peft_config=LoraConfig(**spec["lora"], target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
    except RuntimeError as error:
        if "out of memory" not in str(error) and "ALLOC_FAILED" not in str(error):
            raise
        print(f"error: out of memory in step {len(ends) + 1}", flush=True)
        os._exit(OUT_OF_MEMORY)  # the other ranks wait in a collective
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    step_s = statistics.median(
        b - a for a, b in zip(ends[spec["warm_up"] - 1 :], ends[spec["warm_up"] :], strict=False)
    )
    real_tokens = config.per_device_train_batch_size * sum(lengths) / len(lengths)
    peaks = [0.0] * spec["gpus"]
    torch.distributed.all_gather_object(peaks, torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0)
    return {
        "real_tokens_per_s_per_gpu": real_tokens / step_s,
        "real_tokens_per_micro_batch": real_tokens,
        "step_s": step_s,
        "peak_reserved_gib": max(peaks),
        "versions": versions("trl", "transformers", "accelerate", "peft", "deepspeed", "torch"),
    }


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    kind, spec, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    found = {"vllm": vllm, "trl": trl, "trl_rank": trl_rank}[kind](spec, out)
    if kind != "trl" and os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))
