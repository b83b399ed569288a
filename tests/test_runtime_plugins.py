"""The plugins: on only when asked for, loud when SGLang changes, and exact."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from batch_infer import start
from batch_infer.arguments import Arguments
from batch_infer.engine_args import environment
from harness import ROOT, in_child
from runtime_plugins import check_target, cpu, deterministic_radix, fused_norm, lean_sampler
from workbench.machine import driver_version


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("asked", ["", "deterministic_radix"])
def test_nothing_happens_unless_the_cpu_was_asked_for(runtime, monkeypatch, tmp_path, cuda, asked):
    """Whatever torch says about CUDA: no platform, no hook, no list changed, torch untouched."""
    monkeypatch.setenv("RUNTIME_PLUGINS", asked)

    def check() -> None:
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
        tiles = ["schedule_batch.Req._compute_max_prefix_len", "schedule_policy.PrefillAdder.add_one_req"]
        assert list(HookRegistry._hooks) == [f"sglang.srt.managers.{name}" for name in tiles if asked]
        assert torch.Tensor.pin_memory is pin
        expected = [before[0], before[1] + (["flashinfer"] if asked else [])]
        assert [list(names) for names in lists] == expected

    in_child(check, tmp_path)


def test_asked_for_it_is_used_even_where_cuda_is_present(runtime, tmp_path):
    def check() -> None:
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
    """Of a prompt that the tree holds as a whole so much is computed that it takes the tile of its length (4 query
    heads, 2 for KV: from 9 and 33 tokens on another); an answer ends at its length whatever the model samples."""

    def check() -> None:
        os.environ["RUNTIME_PLUGINS"] = "cpu,deterministic_radix,answer_lengths"
        start.skip_other_models(["Qwen2ForCausalLM"])
        from sglang.srt.entrypoints.engine import Engine

        engine = Engine(
            **{"model_path": str(tiny_qwen2), "device": "cpu", "dtype": "float32", "mem_fraction_static": 0.3},
            **{"attention_backend": "torch_native", "disable_cuda_graph": True, "log_level": "error"},
            **{"max_total_tokens": 1000, "max_running_requests": 4, "random_seed": 0},
        )
        for length, least, answer_tokens in ((8, 1, 2), (20, 9, 3), (34, 33, 5), (60, 33, 7)):
            prompts = [[3 + length, *range(10, 9 + length)]]
            for cached in (0, length - least):
                params = {"max_new_tokens": 12, "custom_params": {"answer_tokens": answer_tokens}}
                (answer,) = engine.generate(input_ids=prompts, sampling_params=[params])
                assert answer["meta_info"]["cached_tokens"] == cached, length
                assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] == answer_tokens
                assert answer["meta_info"]["finish_reason"]["type"] == "stop"
        (answer,) = engine.generate(input_ids=[[5, 6]], sampling_params=[{"max_new_tokens": 12}])
        assert answer["meta_info"]["completion_tokens"] > 7

    in_child(check, tmp_path)


def test_only_prompts_of_one_tile_are_prefilled_together(monkeypatch):
    """With 3 query heads for each of KV: at most 5, at most 21, and more tokens. What is cached does not count."""
    monkeypatch.setattr(deterministic_radix, "_heads_per_kv_head", lambda: 3)

    def batch(*waiting: tuple[int, int]) -> list[int]:
        adder = SimpleNamespace(can_run_list=[])
        for tokens, cached in waiting:
            req = SimpleNamespace(full_untruncated_fill_ids=range(tokens), prefix_indices=range(cached))
            add = lambda self, req, chunked, truncation_align_size: self.can_run_list.append(req)  # noqa: E731
            deterministic_radix.one_tile_a_batch(add, adder, req, False, truncation_align_size=None)
        return [len(req.full_untruncated_fill_ids) for req in adder.can_run_list]

    assert batch((22, 0), (21, 0), (500, 0), (5, 0), (500, 479), (500, 478)) == [22, 500, 500]
    assert batch((6, 0), (21, 0), (22, 0), (5, 0), (30, 10)) == [6, 21, 30]
    assert batch((5, 4), (1, 0), (6, 0), (40, 35)) == [5, 1, 40]


# --- exactness ----------------------------------------------------------------------------------------


def test_a_draw_on_the_cpu_is_the_rows_own_and_comes_from_its_nucleus(tmp_path):
    """Any rows in any order give the same tokens; tokens come as often as their probabilities within top_p, top_k
    and min_p say."""

    def check() -> None:
        torch.manual_seed(0)
        probs = (torch.randn(37, 49152) * 4).softmax(-1)
        numbers = torch.arange(37)
        limits = torch.full((37,), 1 << 30), torch.linspace(0.1, 1, 37), torch.linspace(0, 0.2, 37)

        def drawn(rows):
            given = [limit[rows] for limit in limits]
            return cpu.draw(probs[rows], *given, True, numbers[rows] + 2**40, numbers[rows])

        together = drawn(numbers)
        for rows in (numbers.flip(0), numbers[3:4], numbers[5:30:3]):
            assert torch.equal(drawn(rows), together[rows])

        few, draws = torch.tensor([0.4, 0.05, 0.3, 0.25]), 4000
        for top_k, top_p, min_p, kept in (
            *((9, 1.0, 0.0, [0, 1, 2, 3]), (9, 0.75, 0.0, [0, 2, 3]), (2, 1.0, 0.0, [0, 2])),
            *((1, 1.0, 0.0, [0]), (9, 1e-6, 0.0, [0]), (9, 1.0, 0.7, [0, 2])),
        ):
            given = [torch.full((draws,), limit) for limit in (top_k, top_p, min_p)]
            tokens = cpu.draw(few.repeat(draws, 1), *given, True, torch.arange(draws), torch.zeros(draws))
            found = torch.bincount(tokens, minlength=4) / draws
            expected = torch.zeros(4)
            expected[kept] = few[kept] / few[kept].sum()
            assert (found - expected).abs().max() < 0.03, (top_k, top_p, min_p, found)
        free = cpu.draw(few.repeat(draws, 1), *given, False, None, torch.zeros(draws))
        assert 0.35 < (free == 0).float().mean() < 0.45

    in_child(check, tmp_path)


def test_linear_is_exact_at_every_number_of_rows(tmp_path):
    """The shapes of SmolLM2's and the rehearsal's layers, and of an adapter."""

    def check() -> None:
        torch.manual_seed(0)
        for k, n in ((128, 384), (576, 960), (576, 3072), (1536, 576), (576, 16), (16, 576)):
            x, weight, bias = torch.randn(600, k), torch.randn(n, k), torch.randn(n)
            wide = cpu.linear(x, weight, bias)
            torch.testing.assert_close(wide, torch.nn.functional.linear(x, weight, bias))
            for rows in (*range(1, 50), *range(63, 300, 16), 599):
                assert torch.equal(cpu.linear(x[:rows], weight, bias), wide[:rows]), rows
                assert torch.equal(cpu.linear(x[rows : rows + 1], weight, bias), wide[rows : rows + 1]), rows
        x = torch.randn(50, 16)
        assert torch.equal(cpu.linear(x.view(2, 25, 16), weight), cpu.linear(x, weight).view(2, 25, 576))

    in_child(check, tmp_path)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (4, 2, 32), (9, 3, 64), (28, 4, 128)])
def test_attention_is_right_and_exact_however_it_is_cut(tmp_path, heads, kv_heads, size):
    """Over a scattered KV pool against torch's own in fp64; then prefill in one piece, in two, token by token, and
    beside other records: equal bits. The heads of the rehearsal's models, SmolLM2 and Qwen2.5-7B."""

    def check() -> None:
        from torch.nn import functional

        torch.manual_seed(0)
        total = 150
        query = torch.randn(total, heads, size)
        k_cache, v_cache = torch.randn(500, kv_heads, size), torch.randn(500, kv_heads, size)
        table = torch.stack([torch.randperm(500)[:total] for _ in range(3)]).to(torch.int32)

        def attend(*records):
            """(row of the table, first position, count) each: their queries' results."""
            slots, firsts, counts = zip(*records, strict=True)
            parts = cpu.cut(table, slots, firsts, counts, heads // kv_heads)
            queries = torch.cat([query[first : first + count] for _, first, count in records])
            queries = queries.split([len(tiles.places) for tiles in parts])
            pairs = zip(queries, parts, strict=True)
            return torch.cat([cpu.attend(part, k_cache, v_cache, tiles, size**-0.5) for part, tiles in pairs])

        whole = attend((1, 0, total))
        slots = table[1].long()
        q, k, v = (t.double().transpose(0, 1)[None] for t in (query, k_cache[slots], v_cache[slots]))
        exact = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(whole.double(), exact[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
        for at in (1, 15, 16, 17, 63, 64, 65, 149):
            assert torch.equal(torch.cat([attend((1, 0, at)), attend((1, at, total - at))]), whole), at
        alone = torch.cat([attend((1, position, 1)) for position in range(total)])
        assert torch.equal(alone, whole)
        beside = attend((0, 140, 1), (1, 120, 1), (2, 3, 1)), attend((0, 70, 9), (1, 120, 1), (2, 0, 100))
        assert torch.equal(torch.stack([beside[0][1], beside[1][9]]), whole[[120, 120]])

    in_child(check, tmp_path)


def test_lean_sampler_takes_the_place_of_both_backends(runtime, monkeypatch, tmp_path):
    """What it has no faster way for is its parent's."""
    monkeypatch.setenv("RUNTIME_PLUGINS", "lean_sampler")

    def check() -> None:
        from sglang.srt.layers import sampler
        from sglang.srt.plugins.hook_registry import HookRegistry

        from runtime_plugins import seeded_top_p

        seeded_top_p.seeded_top_p = lambda *given: "drawn"
        lean_sampler.register()
        assert not HookRegistry._hooks
        made, lean = sampler._CUSTOM_SAMPLER_FACTORIES, lean_sampler.sampler_class()
        lean.__init__ = lambda self: None
        lean._preprocess_logits = lambda self, logits, info: logits
        lean._sync_token_ids_across_tp = lambda *given: None
        sampler.Sampler.forward = lambda *given: "its parent's"
        plain = {"is_all_greedy": False, "need_top_p_sampling": True, "need_top_k_sampling": False}
        plain |= {"need_min_p_sampling": False, "has_custom_logit_processor": False, "sampling_seed": [1]}
        plain |= {"return_sampling_masks": None, "temperatures": torch.ones(1), "top_ps": None}

        def drawn_by(logprobs: bool = False, **change) -> str:
            output, info = SimpleNamespace(next_token_logits="logits"), SimpleNamespace(**plain | change)
            return made["pytorch"]().forward(output, info, logprobs, [], [], None)

        assert [type(made[backend]()) for backend in ("flashinfer", "pytorch")] == [lean] * 2
        assert drawn_by() == "drawn"
        assert drawn_by(logprobs=True) == "its parent's"
        for change in (
            *({"is_all_greedy": True}, {"need_top_p_sampling": False}, {"need_top_k_sampling": True}),
            *({"need_min_p_sampling": True}, {"has_custom_logit_processor": True}),
            {"return_sampling_masks": [False, True]},
        ):
            assert drawn_by(**change) == "its parent's", change

    in_child(check, tmp_path)


def test_the_fused_norm_is_for_plain_layers_with_a_residual(runtime, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNTIME_PLUGINS", "fused_norm")

    def check() -> None:
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


# --- kernels, where the tests cannot be (a GPU, Triton's compiler): in a process of its own ------------


GPUS = os.environ["GPUS_FOR_TESTS"] if driver_version() else ""  # conftest.py hides them from this process
on_a_gpu = pytest.mark.skipif(not GPUS, reason="needs a GPU")


def in_a_process(name: str, *words: object, **env: str) -> None:
    """Calls the function `name` of this module."""
    env |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": GPUS, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", __file__, name, *map(str, words)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def compile_for_a_gpu() -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from runtime_plugins import seeded_top_p

    sizes = {"BLOCK": seeded_top_p.BLOCK, "BLOCKS": 32}
    types = {
        "row_stride": "i64",
        "temperatures": "*fp32",
        "top_ps": "*fp32",
        "seeds": "*i64",
        "positions": "*i64",
    }
    types |= {"tokens": "*i32", "vocabulary": "i32"} | dict.fromkeys(sizes, "constexpr")
    for logits in ("*bf16", "*fp16", "*fp32"):
        source = ASTSource(fn=seeded_top_p.draw, signature={"logits": logits} | types, constexprs=sizes)
        compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": seeded_top_p.WARPS})


def test_the_seeded_kernel_compiles_without_a_gpu(tmp_path):
    """Triton's compiler refuses what its interpreter takes."""
    in_a_process("compile_for_a_gpu", TRITON_HOME=str(tmp_path))


def draw_in_parts(device: str, vocabulary: int, rows: int, draws: int, scale: float) -> None:
    """Any rows in any order give the same tokens, and these come from the nucleus as often as their probabilities
    say, in `draws` draws from logits of standard deviation `scale`."""
    from runtime_plugins import seeded_top_p

    torch.manual_seed(0)
    for spread, dtype in ((0.02, torch.float32), (1.0, torch.bfloat16), (scale, torch.float32)):
        logits = torch.randn(rows, vocabulary, device=device, dtype=dtype) * spread
        seeds = torch.arange(rows, device=device)
        given = (
            logits,
            torch.full_like(seeds, 0.7, dtype=torch.float32),
            torch.full_like(seeds, 0.9, dtype=torch.float32),
        )
        given += (seeds * 7919, seeds % 977)
        whole = seeded_top_p.seeded_top_p(*given)
        for n in (1, rows // 3, rows - 1):
            part = torch.randperm(rows, device=device)[:n]
            again = seeded_top_p.seeded_top_p(*(values[part] for values in given))
            assert torch.equal(again, whole[part]), (spread, n)
    counts = torch.zeros(vocabulary, device=device)
    for first in range(0, draws, rows):
        others = seeds + first
        found = seeded_top_p.seeded_top_p(logits[:1].expand(rows, -1), *given[1:3], others, others % 5)
        counts += torch.bincount(found.long(), minlength=vocabulary)
    check_frequencies(counts, torch.softmax(logits[0] / 0.7, dim=-1))
    masked = torch.full((2, vocabulary), -float("inf"), device=device)  # as a grammar does
    masked[0, vocabulary - 1] = masked[1, 0] = -3.0
    assert seeded_top_p.seeded_top_p(masked, *(v[:2] for v in given[1:])).tolist() == [vocabulary - 1, 0]
    broken = torch.full((1, vocabulary), float("nan"), device=device)
    assert seeded_top_p.seeded_top_p(broken, *(v[:1] for v in given[1:])).shape == (1,)


def check_frequencies(counts, probabilities) -> None:
    """`counts` of each token, drawn with top_p 0.9."""
    ordered, tokens = probabilities.sort(descending=True)
    nucleus = tokens[(ordered.cumsum(0) - ordered) <= 0.9]
    total = counts.sum()
    assert counts[nucleus].sum() == total, "a token that top-p does not keep"
    expected = probabilities[nucleus] / probabilities[nucleus].sum() * total
    often = expected > 5
    deviation = ((counts[nucleus] - expected)[often].square() / expected[often]).mean()
    assert often.sum() > 4
    assert 0.02 < deviation < 2.5


def test_a_seeded_token_does_not_depend_on_its_batch(runtime, tmp_path):
    """Triton's interpreter runs the kernel, several blocks a row."""

    def check() -> None:
        from runtime_plugins import seeded_top_p

        seeded_top_p.BLOCK = 128
        draw_in_parts("cpu", vocabulary=130, rows=10, draws=130, scale=1.5)

    in_child(check, tmp_path)


def test_a_greedy_record_among_others_gets_the_likeliest_token(runtime, tmp_path):
    def check() -> None:
        from batch_infer.prompts import GREEDY_DRAW
        from runtime_plugins import seeded_top_p

        seeded_top_p.BLOCK = 128
        torch.manual_seed(0)
        for spread in (0.001, 1.0, 30.0):
            logits, rows = torch.randn(40, 300) * spread, torch.arange(40)
            given = [torch.full((40,), GREEDY_DRAW[name]) for name in ("temperature", "top_p")]
            assert torch.equal(
                seeded_top_p.seeded_top_p(logits, *given, rows, rows).long(), logits.argmax(-1)
            ), spread

    in_child(check, tmp_path)


@on_a_gpu
def test_a_seeded_token_does_not_depend_on_its_batch_on_a_gpu():
    in_a_process("draw_in_parts_on_a_gpu")


def draw_in_parts_on_a_gpu() -> None:
    draw_in_parts("cuda", vocabulary=152064, rows=805, draws=80500, scale=2.0)


def norm_in_parts() -> None:
    from flashinfer.norm import fused_add_rmsnorm

    torch.manual_seed(0)
    for width in (3584, 4096):  # Qwen2.5-7B's and Llama-2-7B's
        x, residual = torch.randn(2, 805, width, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
        whole = x.clone(), residual.clone()
        fused_add_rmsnorm(*whole, weight, 1e-6)
        for rows in (1, 7, 64, 400):
            part = torch.randperm(805, device="cuda")[:rows]
            found = x[part].clone(), residual[part].clone()
            fused_add_rmsnorm(*found, weight, 1e-6)
            assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True)), (width, rows)


@on_a_gpu
def test_a_row_of_the_fused_norm_does_not_depend_on_its_batch():
    """Any rows in any order give the same bytes."""
    in_a_process("norm_in_parts", FLASHINFER_USE_CUDA_NORM="1")


def attend_behind_cached_prefixes() -> None:
    for heads, kv_heads, size in (
        (28, 4, 128),
        (32, 32, 128),
        (9, 3, 64),
    ):  # Qwen2.5-7B, Llama-2-7B, SmolLM2-135M
        packed = heads // kv_heads
        for shortest, longest in (
            (1, 16 // packed),
            (16 // packed + 1, 64 // packed),
            (64 // packed + 30, 700),
        ):
            attend_behind_a_cached_prefix(
                heads, kv_heads, size, torch.randint(shortest, longest + 1, (64,)).tolist()
            )


def attend_behind_a_cached_prefix(heads: int, kv_heads: int, size: int, lengths: list[int]) -> None:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    torch.manual_seed(0)
    least = [deterministic_radix.least_tokens(n, heads // kv_heads) for n in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    q, k, v = (1.5 * torch.randn(sum(lengths), n, size, device="cuda") for n in (heads, kv_heads, kv_heads))
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    space = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    wrapper = BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa2")
    options = {"causal": True, "fixed_split_size": 4096} | dict.fromkeys(
        ("q_data_type", "kv_data_type"), q.dtype
    )

    def attention(cached: list[int], prompts: list[int]):
        """(rows of q, their result) of these prompts, of each of which so many tokens are cached."""
        rows = [torch.arange(starts[i] + cached[i], starts[i + 1], device="cuda") for i in prompts]
        queries = torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32).cuda()
        keys = torch.tensor([0, *(lengths[i] for i in prompts)]).cumsum(0).to(torch.int32).cuda()
        places = torch.cat([torch.arange(starts[i], starts[i + 1], device="cuda") for i in prompts])
        last = torch.ones(len(prompts), dtype=torch.int32, device="cuda")
        wrapper.plan(queries, keys, places.to(torch.int32), last, heads, kv_heads, size, 1, **options)
        rows = torch.cat(rows)
        return rows, wrapper.run(q[rows].contiguous(), (k.unsqueeze(1), v.unsqueeze(1)))

    everyone = list(range(len(lengths)))
    _, whole = attention([0] * len(lengths), everyone)
    for cached in (0, 1, 24, 100, 10**6):  # the last: as much as a tile of queries allows
        for prompts in (everyone, everyone[3:10], [5]):
            rows, found = attention(
                [min(cached, n - own) for n, own in zip(lengths, least, strict=True)], prompts
            )
            assert torch.equal(found, whole[rows]), (heads, cached, len(prompts))


@on_a_gpu
def test_a_query_does_not_depend_on_what_came_from_the_radix_tree():
    """Attention of a prompt's tokens, computed as a whole or behind a prefix whose keys are there, among others and
    alone: FlashInfer's kernel as run_sglang.py lets it be compiled."""
    in_a_process("attend_behind_cached_prefixes", **environment(Arguments()))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
