"""The plugins: on only when asked for, loud when SGLang changes, and exact."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batch_infer.arguments import Arguments
from batch_infer.engine import environment
from harness import ROOT, fork
from runtime_plugins import check_target, cpu, deterministic_radix, fused_norm, lean_sampler
from workbench.machine import driver_version


def in_child(function, tmp_path) -> str:
    """torch computes and SGLang is patched in children only (harness.py)."""

    def run() -> int:
        function()
        return 0

    code, text = fork(run, tmp_path / "child.txt").wait()
    assert code == 0, text
    return text


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("asked", ["", "deterministic_radix"])
def test_nothing_happens_unless_the_cpu_was_asked_for(runtime, monkeypatch, tmp_path, cuda, asked):
    """Whatever torch says about CUDA: no platform, no hook, no list changed, torch untouched."""
    monkeypatch.setenv("RUNTIME_PLUGINS", asked)

    def check() -> None:
        import torch
        from sglang.srt import server_args
        from sglang.srt.plugins.hook_registry import HookRegistry

        torch.cuda.is_available = lambda: cuda
        lists = (
            server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        )
        before, pin = [list(names) for names in lists], torch.Tensor.pin_memory
        assert cpu.activate() is None
        cpu.register()
        deterministic_radix.register()
        lean_sampler.register()
        fused_norm.register()
        tail = ["sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len"]
        assert list(HookRegistry._hooks) == (tail if asked else [])
        assert torch.Tensor.pin_memory is pin
        expected = [before[0], before[1] + (["flashinfer"] if asked else [])]
        assert [list(names) for names in lists] == expected

    in_child(check, tmp_path)


def test_asked_for_it_is_used_even_where_cuda_is_present(runtime, tmp_path):
    def check() -> None:
        import torch
        from sglang.srt import platforms
        from sglang.srt.plugins import load_plugins
        from sglang.srt.plugins.hook_registry import HookRegistry

        torch.cuda.is_available = lambda: True
        assert cpu.activate() == "runtime_plugins.cpu_platform:PlainCpuPlatform"
        assert type(platforms._resolve_platform()).__name__ == "PlainCpuPlatform"
        load_plugins()
        assert len(HookRegistry._hooks) >= 12
        assert set(HookRegistry._hooks) == HookRegistry._patched

    in_child(check, tmp_path)


def test_a_hook_without_its_target_is_loud(runtime):
    with pytest.raises(SystemExit, match=r"no sglang.srt.server_args.no_such_name in sglang 0.5.17"):
        check_target("sglang.srt.server_args.no_such_name")


def test_every_hook_names_the_line_it_answers():
    sglang = Path(importlib.util.find_spec("sglang").origin).parent
    for name, function in vars(cpu).items():
        if name.startswith(("allow_", "unpin_", "mask_", "hash_", "keep_", "compute_")):
            for path in re.findall(r"[\w/]+\.py", function.__doc__):
                assert any((root / path).exists() for root in (sglang / "srt", sglang.parent)), path
            assert ".py" in function.__doc__, name


def test_the_versions_agree():
    lock = (ROOT / "requirements.txt").read_text()
    import runtime_plugins

    assert f"sglang=={runtime_plugins.SGLANG_VERSION}\n" in lock


def test_only_the_asked_for_platform_starts(runtime, monkeypatch, tmp_path):
    """Without our variable SGLang's own choice stays; with SGLANG_PLATFORM alone it refuses."""
    monkeypatch.delenv("RUNTIME_PLUGINS")

    def check() -> None:
        from sglang.srt import platforms

        with pytest.raises(RuntimeError, match=r"activate\(\) returned None"):
            platforms._resolve_platform()
        del os.environ["SGLANG_PLATFORM"]
        assert type(platforms._resolve_platform()).__module__.startswith("sglang.")

    in_child(check, tmp_path)


def test_ends_of_prompts_are_computed_and_answers_end_at_their_lengths(runtime, tiny_qwen2, tmp_path):
    """A prompt that the tree holds as a whole is computed from its last tile on (4 query heads, 2 for KV:
    33 tokens), shorter ones as a whole; an answer ends at its length whatever the model samples."""

    def check() -> None:
        os.environ["RUNTIME_PLUGINS"] = "cpu,deterministic_radix,answer_lengths"
        from batch_infer.engine import fork_engine_processes

        fork_engine_processes()
        from sglang.srt.entrypoints.engine import Engine

        engine = Engine(
            **{"model_path": str(tiny_qwen2), "device": "cpu", "dtype": "float32", "mem_fraction_static": 0.3},
            **{"attention_backend": "torch_native", "disable_cuda_graph": True, "log_level": "error"},
            **{"max_total_tokens": 1000, "max_running_requests": 4, "random_seed": 0},
        )
        for length in (20, 34, 60):
            prompts = [[3 + length, *range(10, 9 + length)]]
            for cached in (0, max(0, length - 33)):
                params = {"max_new_tokens": 90, "custom_params": {"answer_tokens": length}}
                (answer,) = engine.generate(input_ids=prompts, sampling_params=[params])
                assert answer["meta_info"]["cached_tokens"] == cached, length
                assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] == length
                assert answer["meta_info"]["finish_reason"]["type"] == "stop"
        (answer,) = engine.generate(input_ids=[[5, 6]], sampling_params=[{"max_new_tokens": 90}])
        assert answer["meta_info"]["completion_tokens"] != 60

    in_child(check, tmp_path)


# --- exactness ----------------------------------------------------------------------------------------


def test_murmur_hash_equals_an_independent_one(tmp_path):
    """MurmurHash3_x86_32 of 16 bytes, written here from its definition with Python's integers."""
    vectors = [(0, 0, 0), (1, 2, 3), (2**31 - 1, 8191, 152063), (2**62 + 12345, 77, 1)]

    def murmur3(data: bytes) -> int:
        state = 0
        for start in range(0, len(data), 4):
            block = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 % 2**32
            block = (block << 15 | block >> 17) % 2**32 * 0x1B873593 % 2**32
            state ^= block
            state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
        state ^= len(data)
        state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
        state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
        return state ^ state >> 16

    # Published test vector (smhasher): four zero bytes, seed 0.
    assert murmur3(bytes(4)) == 0x2362F9DE

    def check() -> None:
        import torch

        seeds, positions, columns = (torch.tensor(values) for values in zip(*vectors, strict=True))
        found = cpu.murmur_hash32(seeds, positions, columns)
        for row, (seed, position, _) in enumerate(vectors):
            for column, (_, _, index) in enumerate(vectors):
                data = seed.to_bytes(8, "little") + position.to_bytes(4, "little") + index.to_bytes(4, "little")
                assert int(found[row, column]) == murmur3(data)

    in_child(check, tmp_path)


def test_linear_is_exact_at_every_number_of_rows(tmp_path):
    def check() -> None:
        import torch

        torch.manual_seed(0)
        x, weight, bias = torch.randn(50, 128), torch.randn(384, 128), torch.randn(384)
        wide = cpu.linear(x, weight, bias)
        torch.testing.assert_close(wide, torch.nn.functional.linear(x, weight, bias))
        for rows in range(1, 50):
            assert torch.equal(cpu.linear(x[:rows], weight, bias), wide[:rows]), rows
            assert torch.equal(cpu.linear(x[rows : rows + 1], weight, bias), wide[rows : rows + 1]), rows
        assert torch.equal(cpu.linear(x.view(2, 25, 128), weight), cpu.linear(x, weight).view(2, 25, 384))

    in_child(check, tmp_path)


def test_attention_is_right_and_exact_however_it_is_cut(tmp_path):
    """Grouped-query attention over a scattered KV pool against torch's own in fp64; then prefill in one piece,
    in two, and token by token: equal bits."""

    def check() -> None:
        import torch
        from torch.nn import functional

        torch.manual_seed(0)
        total, heads, kv_heads, size = 45, 4, 2, 16
        query = torch.randn(total, heads, size)
        k_cache, v_cache = torch.randn(100, kv_heads, size), torch.randn(100, kv_heads, size)
        slots = torch.randperm(100)[:total]
        whole = cpu.attend(query, k_cache, v_cache, slots, None)
        q, k, v = (t.double().transpose(0, 1)[None] for t in (query, k_cache[slots], v_cache[slots]))
        exact = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(whole.double(), exact[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
        for cut in (1, 15, 16, 17, 31, 44):
            first = cpu.attend(query[:cut], k_cache, v_cache, slots[:cut], None)
            second = cpu.attend(query[cut:], k_cache, v_cache, slots, None)
            assert torch.equal(torch.cat([first, second]), whole), cut
        for position in range(total):
            row = query[position : position + 1]
            alone = cpu.attend(row, k_cache, v_cache, slots[: position + 1], None)
            assert torch.equal(alone, whole[position : position + 1]), position

    in_child(check, tmp_path)


def test_lean_sampler_takes_the_place_of_both_backends(runtime, monkeypatch, tmp_path):
    """What it has no faster way for is its parent's."""
    monkeypatch.setenv("RUNTIME_PLUGINS", "lean_sampler")

    def check() -> None:
        from types import SimpleNamespace

        import torch
        from sglang.srt.layers import sampler
        from sglang.srt.plugins.hook_registry import HookRegistry

        lean_sampler.register()
        assert list(HookRegistry._hooks) == [
            "sglang.srt.layers.logits_processor.LogitsProcessor._copy_logits_to_buffer",
            "sglang.srt.model_executor.model_runner.ModelRunner._preprocess_logits",
        ]
        made, lean = sampler._CUSTOM_SAMPLER_FACTORIES, lean_sampler.sampler_class()
        lean.__init__ = lambda self: None
        assert [type(made[backend]()) for backend in ("flashinfer", "pytorch")] == [lean] * 2
        asked = []
        sampler.Sampler.forward = lambda self, *given: asked.append(given[0].next_token_logits.dtype)
        logits = torch.zeros(1, 4, dtype=torch.bfloat16)
        plain = {"is_all_greedy": False, "need_top_p_sampling": True, "need_top_k_sampling": False}
        plain |= {"need_min_p_sampling": False, "has_custom_logit_processor": False}
        plain |= {"sampling_seed": [1], "return_sampling_masks": None}
        for change in (
            {"is_all_greedy": True},
            {"need_top_p_sampling": False},
            {"need_top_k_sampling": True},
            {"need_min_p_sampling": True},
            {"has_custom_logit_processor": True},
            {"return_sampling_masks": [False, True]},
        ):
            output, info = SimpleNamespace(next_token_logits=logits), SimpleNamespace(**plain | change)
            lean.forward(made["pytorch"](), output, info, False, [], [], None)
        output = SimpleNamespace(next_token_logits=logits)
        lean.forward(made["pytorch"](), output, SimpleNamespace(**plain), True, [], [], None)
        assert asked == [torch.float32] * 7
        sampler.Sampler.compute_logprobs_only = lambda self, output, *given: asked.append(given)
        output = SimpleNamespace(next_token_logits=logits)
        lean.compute_logprobs_only(made["pytorch"](), output, "info", [], [])
        assert output.next_token_logits.dtype == torch.float32
        assert asked[-1] == ("info", [], [])

    in_child(check, tmp_path)


def test_logits_stay_in_16_bits_until_something_changes_them():
    from types import SimpleNamespace

    import torch

    shared = torch.zeros(4, 6)  # SGLang's buffer, of which a graph of two requests gets two rows
    plain = {"next_token_logits_buffer": shared[:2], "extend_return_logprob": False}
    processor = SimpleNamespace(final_logit_softcapping=None, vocab_size=6)
    logits = torch.randn(2, 6).bfloat16()

    def asked(logits=logits, own=processor, mode="DECODE", **changes):
        step = SimpleNamespace(forward_mode=SimpleNamespace(name=mode), **plain | changes)
        return lean_sampler.keep_16_bits(lambda self, logits, step, use: logits.float(), own, logits, step)

    kept = asked()
    assert torch.equal(kept, logits)
    assert kept.dtype == torch.bfloat16
    assert kept.data_ptr() == shared.data_ptr()
    assert asked(mode="EXTEND", next_token_logits_buffer=None) is logits
    assert asked(next_token_logits_buffer=shared) is logits
    for changed in (
        asked(logits.float()),
        asked(own=SimpleNamespace(final_logit_softcapping=30.0, vocab_size=6)),
        asked(own=SimpleNamespace(final_logit_softcapping=None, vocab_size=5)),
        asked(mode="TARGET_VERIFY"),
        asked(mode="EXTEND", extend_return_logprob=True),
    ):
        assert changed.dtype == torch.float32

    nothing = {
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "logit_bias": None,
    }
    nothing |= {"penalizer_orchestrator": SimpleNamespace(is_required=False)}
    for change, expected in (
        ({}, torch.bfloat16),
        ({"logit_bias": torch.zeros(2, 6)}, torch.float32),
        ({"acc_additive_penalties": torch.zeros(2, 6)}, torch.float32),
        ({"acc_scaling_penalties": torch.ones(2, 6)}, torch.float32),
        ({"penalizer_orchestrator": SimpleNamespace(is_required=True)}, torch.float32),
    ):
        output, seen = SimpleNamespace(next_token_logits=logits), []
        lean_sampler.widen_what_changes(
            lambda self, output, info, seen=seen: seen.append(output.next_token_logits.dtype),
            None,
            output,
            SimpleNamespace(**nothing | change),
        )
        assert seen == [expected], change


def test_the_fused_norm_is_for_plain_layers_with_a_residual(runtime, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNTIME_PLUGINS", "fused_norm")

    def check() -> None:
        from types import SimpleNamespace

        import torch
        from sglang.srt.layers import layernorm
        from sglang.srt.plugins.hook_registry import HookRegistry

        asked = []
        layernorm.fused_add_rmsnorm = lambda *given: asked.append(given)
        fused_norm.register()
        assert list(HookRegistry._hooks) == ["sglang.srt.layers.layernorm.RMSNorm.forward_cuda"]
        layer = {"variance_size_override": None, "cast_x_before_out_mul": False, "variance_epsilon": 1e-6}
        layer |= {"weight": torch.ones(4)}
        x, residual = torch.ones(2, 4), torch.ones(2, 4)
        fused = fused_norm.in_one_kernel(None, SimpleNamespace(**layer), x, residual)
        assert fused[0] is x
        assert fused[1] is residual
        assert len(asked) == 1
        fused_norm.in_one_kernel(None, SimpleNamespace(**layer), x[:0], residual[:0])
        for given, change in (
            ((x,), {}),
            ((x, residual, residual), {}),
            ((x, residual), {"variance_size_override": 2}),
            ((x, residual), {"cast_x_before_out_mul": True}),
            ((x.half(), residual), {}),
        ):
            own = SimpleNamespace(**layer | change)
            assert fused_norm.in_one_kernel(lambda self, *given: "its own", own, *given) == "its own"
        assert len(asked) == 1

    in_child(check, tmp_path)


GPUS = os.environ["GPUS_FOR_TESTS"] if driver_version() else ""  # conftest.py hides them from this process
SEEDED_TOP_P = """
import sys

import torch

sys.path.append(sys.argv[1])
from runtime_plugins import seeded_top_p

device, vocabulary, rows, draws = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
if device == "cpu":
    seeded_top_p.BLOCK = 64  # several blocks a row
torch.manual_seed(0)
for scale, dtype in ((0.02, torch.float32), (1.0, torch.bfloat16), (float(sys.argv[6]), torch.float32)):
    given = (
        torch.randn(rows, vocabulary, device=device, dtype=dtype) * scale,
        torch.full((rows,), 0.7, device=device),
        torch.full((rows,), 0.9, device=device),
        torch.arange(rows, device=device) * 7919,
        torch.arange(rows, device=device) % 977,
    )
    whole = seeded_top_p.seeded_top_p(*given)
    for n in (1, 2, rows // 3, rows - 1):
        part = torch.randperm(rows, device=device)[:n]
        again = seeded_top_p.seeded_top_p(*(values[part] for values in given))
        assert torch.equal(again, whole[part]), (scale, n)

probs = torch.softmax(given[0][0] / 0.7, dim=-1)
ordered, tokens = probs.sort(descending=True)
nucleus = tokens[(ordered.cumsum(0) - ordered) <= 0.9]
counts = torch.zeros(vocabulary, device=device)
for first in range(0, draws, rows):
    seeds = torch.arange(first, first + rows, device=device)
    found = seeded_top_p.seeded_top_p(given[0][:1].expand(rows, -1), *given[1:3], seeds, seeds % 5)
    counts += torch.bincount(found.long(), minlength=vocabulary)
total = counts.sum()
assert counts[nucleus].sum() == total, "a token that top-p does not keep"
expected = probs[nucleus] / probs[nucleus].sum() * total
often = expected > 5
deviation = ((counts[nucleus] - expected)[often].square() / expected[often]).mean()
assert often.sum() > 4 and 0.02 < deviation < 2.5, deviation

masked = torch.full((2, vocabulary), -float("inf"), device=device)  # as a grammar does
masked[0, vocabulary - 1] = masked[1, 0] = -3.0
assert seeded_top_p.seeded_top_p(masked, *(v[:2] for v in given[1:])).tolist() == [vocabulary - 1, 0]
broken = torch.full((1, vocabulary), float("nan"), device=device)
assert seeded_top_p.seeded_top_p(broken, *(v[:1] for v in given[1:])).shape == (1,)
"""


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_a_row_of_the_fused_norm_does_not_depend_on_its_batch():
    """FlashInfer's kernel for Qwen2.5-7B's and Llama-2-7B's widths: any rows in any order give the same bytes."""
    program = """
import torch
from flashinfer.norm import fused_add_rmsnorm

torch.manual_seed(0)
for width in (3584, 4096):
    x, residual = torch.randn(2, 805, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    whole = x.clone(), residual.clone()
    fused_add_rmsnorm(*whole, weight, 1e-6)
    for rows in (1, 7, 64, 400):
        part = torch.randperm(805, device="cuda")[:rows]
        found = x[part].clone(), residual[part].clone()
        fused_add_rmsnorm(*found, weight, 1e-6)
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole)), (width, rows)
"""
    variables = {"FLASHINFER_USE_CUDA_NORM": "1", "CUDA_VISIBLE_DEVICES": GPUS}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, env=os.environ | variables)


ATTENTION = """
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper

different = 0
for heads, kv_heads in ((28, 4), (32, 32)):  # Qwen2.5-7B's and Llama-2-7B's
    tile = 64 // (heads // kv_heads) + 1
    torch.manual_seed(0)
    lengths = torch.randint(tile + 30, 700, (64,)).tolist()
    tokens = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    q, k, v = (1.5 * torch.randn(tokens, n, 128, device="cuda") for n in (heads, kv_heads, kv_heads))
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(2**29, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2")

    def attention(cached, prompts):
        rows = [torch.arange(starts[i] + cached[i], starts[i + 1], device="cuda") for i in prompts]
        queries = torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32).cuda()
        keys = torch.tensor([0, *(lengths[i] for i in prompts)]).cumsum(0).to(torch.int32).cuda()
        places = torch.cat([torch.arange(starts[i], starts[i + 1], device="cuda") for i in prompts]).to(torch.int32)
        last = torch.ones(len(prompts), dtype=torch.int32, device="cuda")
        wrapper.plan(queries, keys, places, last, heads, kv_heads, 128, 1, causal=True, q_data_type=torch.bfloat16,
                     kv_data_type=torch.bfloat16, fixed_split_size=4096)
        rows = torch.cat(rows)
        return rows, wrapper.run(q[rows].contiguous(), (k.unsqueeze(1), v.unsqueeze(1)))

    everyone = list(range(len(lengths)))
    _, whole = attention([0] * len(lengths), everyone)
    for cached in (0, 1, 24, 100, 10**6):  # the last: as much as a tile of queries allows
        for prompts in (everyone, everyone[3:10], [5]):
            rows, found = attention([min(cached, n - tile) for n in lengths], prompts)
            different += int((found != whole[rows]).any(-1).any(-1).sum())
print(different)
"""


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
def test_a_query_does_not_depend_on_what_came_from_the_radix_tree():
    """Attention of a prompt's tokens, computed as a whole or behind a prefix whose keys are there, among others and
    alone: FlashInfer's kernel as run_sglang.py lets it be compiled."""
    variables = environment(Arguments()) | {"CUDA_VISIBLE_DEVICES": GPUS}
    command = [sys.executable, "-P", "-c", ATTENTION]
    found = subprocess.run(command, check=True, env=os.environ | variables, capture_output=True, text=True)
    assert found.stdout.split()[-1] == "0"


COMPILE = """
import sys

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(sys.argv[1])
from runtime_plugins import seeded_top_p

sizes = {"BLOCK": seeded_top_p.BLOCK, "BLOCKS": 32}
types = {"row_stride": "i64", "temperatures": "*fp32", "top_ps": "*fp32", "seeds": "*i64", "positions": "*i64"}
types |= {"tokens": "*i32", "vocabulary": "i32"} | dict.fromkeys(sizes, "constexpr")
for logits in ("*bf16", "*fp16", "*fp32"):
    source = ASTSource(fn=seeded_top_p.draw, signature={"logits": logits} | types, constexprs=sizes)
    compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": seeded_top_p.WARPS})
"""


def test_the_seeded_kernel_compiles_without_a_gpu(tmp_path):
    """Triton's compiler refuses what its interpreter takes."""
    variables = {"TRITON_INTERPRET": "0", "TRITON_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE, ROOT / "sglang"], check=True, env=os.environ | variables)


@pytest.mark.parametrize(
    "sizes",
    [
        ("cpu", "150", "12", "240", "2"),
        pytest.param(
            ("cuda", "152064", "805", "80500", "4"),
            marks=pytest.mark.skipif(not GPUS, reason="needs a GPU"),
        ),
    ],
)
def test_a_seeded_token_does_not_depend_on_its_batch(sizes):
    """Any rows in any order give the same tokens, all are of top-p's nucleus, and as often as their probabilities
    say. On the CPU Triton's interpreter runs the kernel."""
    compiled = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": GPUS} if sizes[0] == "cuda" else {}
    command = [sys.executable, "-c", SEEDED_TOP_P, ROOT / "sglang", *sizes]
    subprocess.run(command, check=True, env=os.environ | compiled)
