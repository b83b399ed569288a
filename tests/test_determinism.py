"""The same bits whatever runs beside a record: logits compared bitwise, on the real Runtime on the CPU."""

import hashlib
import json
from pathlib import Path

import pytest

from batch_infer import start
from harness import ROOT, fork

INSTRUCTIONS = [
    row["instruction"] for row in json.loads((ROOT / "rehearsal" / "instructions.json").read_text())
]
STEPS = 18
VARIANTS = {
    "4 running, in chunks, no prefix cache": {
        **{"max_running_requests": 4, "chunked_prefill_size": 24, "disable_radix_cache": True},
    },
    "a pool too small for all of them": {"max_running_requests": 16, "max_total_tokens": 1100},
}

Logits = dict[tuple[int, int], set[str]]  # (record's seed, position) -> hashes of its logits, over all rounds


def record_logits(out: Path) -> None:
    """From now on a line for each row of logits that is sampled from: seed, position, hash."""
    from sglang.srt.layers.sampler import Sampler

    stock = Sampler.forward

    def forward(self, logits_output, sampling_info, *args, **kwargs):
        positions = kwargs["positions"] if "positions" in kwargs else args[-1]
        seeds = sampling_info.sampling_seed.tolist()
        with out.open("a") as file:
            for seed, position, row in zip(
                seeds, positions.tolist(), logits_output.next_token_logits, strict=True
            ):
                digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()
                file.write(json.dumps([seed, position, digest]) + "\n")
        return stock(self, logits_output, sampling_info, *args, **kwargs)

    Sampler.forward = forward


def logits_of(folder: Path, out: Path, together: list[int], prompts: int = 16, **options) -> Logits:
    """Over all sampling steps of as many answers; in each round so many of them are asked for `together`."""

    def run() -> int:
        from sglang.srt.entrypoints.engine import Engine
        from transformers import AutoTokenizer

        start.skip_other_models(["Qwen2ForCausalLM"])
        record_logits(out)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        messages = [[{"role": "user", "content": text}] for text in INSTRUCTIONS[:prompts]]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        engine = Engine(
            **{"model_path": str(folder), "device": "cpu", "dtype": "float32", "mem_fraction_static": 0.3},
            **{"attention_backend": "torch_native", "disable_cuda_graph": True},
            **{"enable_deterministic_inference": True} | {"max_total_tokens": 8192} | options,
        )
        sampling = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": STEPS, "ignore_eos": True}
        params = [sampling | {"sampling_seed": 1000 + i} for i in range(prompts)]
        for size in together:
            for i in range(0, prompts, size):
                engine.generate(input_ids=ids[i : i + size], sampling_params=params[i : i + size])
        engine.shutdown()
        return 0

    code, text = fork(run, out.with_suffix(".txt")).wait()
    assert code == 0, text
    found: Logits = {}
    for line in out.read_text().splitlines():
        seed, position, digest = json.loads(line)
        found.setdefault((seed, position), set()).add(digest)
    assert len(found) >= prompts * STEPS
    return found


@pytest.fixture(scope="module")
def reference(runtime, tiny_qwen2, tmp_path_factory) -> Logits:
    """All together, again with every prompt in the prefix cache, and one at a time."""
    out = tmp_path_factory.mktemp("logits") / "reference.jsonl"
    return logits_of(tiny_qwen2, out, [16, 16, 1], max_running_requests=16)


def test_logits_are_bitwise_the_same_whatever_runs_beside(reference):
    assert {len(digests) for digests in reference.values()} == {1}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_bitwise_the_same(name, reference, tiny_qwen2, tmp_path):
    found = logits_of(tiny_qwen2, tmp_path / "logits.jsonl", [16], **VARIANTS[name])
    # The overlap scheduler may run one step more than needed: only common keys count.
    common = found.keys() & reference.keys()
    assert len(common) >= 16 * STEPS
    assert {key: found[key] for key in common} == {key: reference[key] for key in common}


def test_without_the_row_blocks_they_are_not(runtime, tiny_qwen2, tmp_path, monkeypatch):
    """The tests above can fail: with stock shapes, products of fewer than 4 rows have other bits."""
    monkeypatch.setenv("RUNTIME_PLUGINS_ROW_BLOCKS", "0")
    options = {"max_running_requests": 6, "disable_radix_cache": True}
    found = logits_of(tiny_qwen2, tmp_path / "logits.jsonl", [6, 1], prompts=6, **options)
    assert any(len(digests) > 1 for digests in found.values())
