"""Does what a model computes for a prompt depend on what else is in the batch, or on what came from the radix
cache? And if so: in which module first? The answer of same_bytes.py in a minute, and where to look.

    python bench/batch_invariance.py                        # on a GPU: Qwen2.5-7B's shape, 8 of its layers
    python bench/batch_invariance.py --model_path FOLDER    # another model's shape
    python bench/batch_invariance.py --device cpu           # the rehearsal's tiny model

The Runtime's own ModelRunner, as run_sglang.py's reproducible profile has it, computes prompts all together, in
smaller batches, and behind a prefix whose keys and values an earlier pass has left in the pool; then some decode
steps in batches of several sizes (without CUDA graphs). Every module's output for a prompt's last tokens, its
logits and its drawn token must have the same bytes. Weights are random (normal, standard deviation 0.02): with
smaller ones attention is flat and hides differences. Exit code 1 if bytes differ.
"""

import argparse
import json
import os
import random
import sys
from array import array
from collections import Counter
from pathlib import Path

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "sglang", "common", "rehearsal")
)
import shapes

from batch_infer import report
from batch_infer.arguments import REHEARSAL, Arguments
from batch_infer.engine_args import environment
from batch_infer.machine import look_at_kernel_tools
from batch_infer.preflight import PACKAGES
from workbench import UserError
from workbench.files import commit, write_json
from workbench.machine import driver_version, versions

FOLDER = REHEARSAL / "runs" / "batch_invariance"
RESULT = REHEARSAL.parent / "bench" / "results" / "batch_invariance.json"
MODULES = ("embed_tokens", "input_layernorm", "qkv_proj", "attn", "o_proj", "post_attention_layernorm")
MODULES += ("gate_up_proj", "act_fn", "down_proj", "norm")
LAYERS, PROMPTS, HEADER_TOKENS, POOL_TOKENS, DECODE_STEPS = 8, 64, 24, 60_000, 4
CACHED_TOKENS = (24, 33, 60, 10**6)  # of each prompt; the last: as much as the radix cache may give
BATCHES = (1, 2, 3, 5, 7, 10, 16, 32, 64)

Outputs = list[tuple[str, object]]  # of a prompt: each module's name and rows, in the order of computation


class Runner:
    """A ModelRunner with the shape in `folder`, but at most LAYERS layers, whose modules' outputs are recorded."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from sglang.benchmark import one_batch
        from sglang.srt.entrypoints.engine import _set_envs_and_config
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, ServerArgs

        from runtime_plugins.deterministic_radix import least_tokens

        load_plugins()
        layers = min(LAYERS, json.loads((folder / "config.json").read_text())["num_hidden_layers"])
        own = {"attention_backend": "flashinfer"}
        if device == "cpu":
            own = {"attention_backend": "torch_native", "dtype": "float32", "device": "cpu"}
        server_args = ServerArgs(
            model_path=str(folder),
            load_format="dummy",
            enable_deterministic_inference=True,
            random_seed=42,
            max_total_tokens=POOL_TOKENS,
            max_running_requests=512,
            mem_fraction_static=0.5,
            cuda_graph_backend_prefill="disabled",
            cuda_graph_backend_decode="disabled",
            disable_radix_cache=True,  # this program says itself what is cached
            json_model_override_args=json.dumps({"num_hidden_layers": layers}),
            **own,
        )
        _set_envs_and_config(server_args)
        runner, _ = one_batch.load_model(server_args, PortArgs.init_new(server_args), 0, 0)
        self.torch, self.one_batch, self.runner = torch, one_batch, runner.torch_runner
        config = self.runner.model_config
        self.context_tokens = config.context_len
        # What the radix cache always leaves to compute; on the CPU any number would do.
        self.tail = least_tokens(10**6, config.get_num_attention_heads(1) // config.get_num_kv_heads(1))
        self.recorded: Outputs | None = None
        torch.manual_seed(0)
        with torch.no_grad():
            for name, weights in self.runner.model.named_parameters():
                weights.fill_(1.0) if "norm" in name else weights.normal_(0, 0.02)
        for name, module in self.runner.model.named_modules():
            if name.rpartition(".")[2] in MODULES:
                module.register_forward_hook(self._record(name))

    def _record(self, name: str):
        def hook(module, inputs, output) -> None:
            for part, value in zip(
                ("", " residual"), output if isinstance(output, tuple) else (output,), strict=False
            ):
                if self.recorded is not None and value is not None:
                    rows = value.reshape(len(value), -1)[self.rows]
                    self.recorded.append((name + part, rows.view(self.prompts, -1, rows.shape[1])))

        return hook

    def _computed(self, ends: list[int], tail: int, compute) -> tuple[list[Outputs], tuple]:
        """What `compute` returns, and each prompt's outputs: rows that end before `ends`, `tail` of each."""
        device = self.runner.device
        self.rows = self.torch.tensor([end - tail + i for end in ends for i in range(tail)], device=device)
        self.prompts, self.recorded = len(ends), []
        returned = compute()
        recorded, self.recorded = self.recorded, None
        recorded += [("logits", returned[1].clone()), ("token", returned[0].clone())]
        return [[(name, rows[i]) for name, rows in recorded] for i in range(len(ends))], returned

    def _request(self, number: int, ids: list[int], prefix=None):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        sampling = SamplingParams(
            temperature=0.7, top_p=0.9, max_new_tokens=2 * DECODE_STEPS, sampling_seed=number
        )
        request = Req(
            rid=str(number),
            origin_input_text="",
            origin_input_ids=array("q", ids),
            sampling_params=sampling,
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        if prefix is not None:
            request.prefix_indices = prefix.to(request.prefix_indices.dtype)
        request.set_extend_range(len(request.prefix_indices), len(ids))
        return request

    def run(self, prompts: dict[int, list[int]], cached: int = 0, steps: int = 0) -> dict[int, Outputs]:
        """Outputs of each prompt: of its prefill, behind up to `cached` tokens of its own, and of `steps` decode steps."""
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()
        prefixes = [None] * len(prompts)
        if cached:
            earlier = [self._request(number, ids) for number, ids in prompts.items()]
            self.one_batch.extend(earlier, self.runner)
            slots = self.runner.req_to_token_pool.req_to_token
            prefixes = [
                slots[request.req_pool_idx, : min(cached, len(ids) - self.tail)].clone()
                for request, ids in zip(earlier, prompts.values(), strict=True)
            ]
        requests = [
            self._request(number, ids, prefix)
            for (number, ids), prefix in zip(prompts.items(), prefixes, strict=True)
        ]
        ends, end = [], 0
        for request in requests:
            end += len(request.origin_input_ids) - len(request.prefix_indices)
            ends.append(end)
        outputs, (tokens, _, batch) = self._computed(
            ends, self.tail, lambda: self.one_batch.extend(requests, self.runner)
        )
        for step in range(steps):
            rows, (tokens, _) = self._computed(
                [i + 1 for i in range(len(requests))],
                1,
                lambda given=tokens: self.one_batch.decode(given, batch, self.runner),
            )
            for own, new in zip(outputs, rows, strict=True):
                own += [(f"step {step + 1} {name}", value) for name, value in new]
        return dict(zip(prompts, outputs, strict=True))


def first_difference(expected: Outputs, found: Outputs) -> str | None:
    """The module where they part, if they do."""
    for (name, one), (other_name, other) in zip(expected, found, strict=True):
        if name != other_name or not bool((one == other).all()):
            return name
    return None


def all_cases() -> list[tuple[str, int, int, int]]:
    """(name, prompts at once, cached tokens, decode steps)"""
    cases = [(f"prefill, {n} at once", n, 0, 0) for n in BATCHES]
    for tokens in CACHED_TOKENS:
        cached = "all they may" if tokens == max(CACHED_TOKENS) else tokens
        cases += [(f"prefill, {cached} cached, {n} at once", n, tokens, 0) for n in (1, 5, 16)]
    return cases + [(f"{DECODE_STEPS} decode steps, {n} at once", n, 0, DECODE_STEPS) for n in BATCHES]


def measure(runner: Runner, count: int, cases: list[tuple[str, int, int, int]]) -> list[dict]:
    """A row per case, each compared with all prompts in one batch and nothing cached."""
    draw = random.Random(0)
    # All prompts share a header, as a chat template's; every eighth is long. Ids that every vocabulary here has.
    header = [draw.randrange(3, 256) for _ in range(HEADER_TOKENS)]
    lengths = [draw.randrange(200, 700) if i % 8 == 0 else draw.randrange(60) for i in range(count)]
    most = runner.context_tokens - HEADER_TOKENS - DECODE_STEPS
    lengths = [min(runner.tail + n, most) for n in lengths]
    prompts = {i: header + [draw.randrange(3, 256) for _ in range(n)] for i, n in enumerate(lengths)}
    rows, expected = [], runner.run(prompts, steps=DECODE_STEPS)
    for case, at_once, cached, steps in cases:
        where: Counter = Counter()
        for start in range(0, count, at_once):
            part = {i: prompts[i] for i in range(start, min(count, start + at_once))}
            for i, found in runner.run(part, cached, steps).items():
                name = first_difference(expected[i][: len(found)], found)
                where.update([name] if name else [])
        different = dict(where.most_common())
        rows.append({"case": case, "different_prompts": where.total(), "first_difference": different})
    return rows


def find_shape(given: argparse.Namespace) -> Path:
    """A folder with config.json and tokenizer. Raises UserError."""
    if given.model_path:
        if not (given.model_path / "config.json").is_file():
            raise UserError(f"--model_path {given.model_path}: no config.json there")
        return given.model_path
    if given.device == "cpu":
        import tiny_model

        return tiny_model.build_qwen2(FOLDER / "tiny_qwen2")
    return shapes.build("qwen2.5-7b", FOLDER / "qwen2.5-7b-shape", weights=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--model_path", type=Path, help="folder with config.json and tokenizer; weights are not read"
    )
    parser.add_argument(
        "--output", type=Path, help=f"default: bench/results/{RESULT.name}; on the CPU in {FOLDER}"
    )
    given = parser.parse_args()
    args = Arguments(device=given.device)
    os.environ |= environment(args)
    report.quiet_libraries(args)
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        if given.device == "cuda" and driver_version() is None:
            raise UserError("no GPU here; --device cpu takes the rehearsal's tiny model")
        os.environ |= look_at_kernel_tools(args)[0]
        folder = find_shape(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runner = Runner(folder, given.device)
    rows = measure(runner, PROMPTS, all_cases())
    for row in rows:
        where = ", ".join(f"{name} ({count})" for name, count in row["first_difference"].items())
        print(f"{row['case']:44} {row['different_prompts']:3} of {PROMPTS} prompts differ  {where}".rstrip())
    about = {"model_path": given.model_path and str(given.model_path), "layers": LAYERS, "prompts": PROMPTS}
    about["compiler_flags"] = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS")
    about["hardware"] = "CPU" if given.device == "cpu" else runner.torch.cuda.get_device_name()
    write_json(
        given.output or (FOLDER / RESULT.name if given.device == "cpu" else RESULT),
        about | {"rows": rows, "commit": commit(), "versions": versions(PACKAGES)},
    )
    different = sum(row["different_prompts"] for row in rows)
    print("bytes differ" if different else "the same bytes in every case")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
