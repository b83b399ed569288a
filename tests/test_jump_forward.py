"""Jump-forward in the real Runtime on the CPU: same answers, valid answers, no leaks, fewer passes."""

import asyncio
import functools
import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from batch_infer import grammars
from batch_infer.arguments import parse
from batch_infer.start import skip_other_models
from harness import fork, summary_of
from runtime_plugins import jump_forward
from workbench import UserError

TEXTS = (
    *(" the answer is ", '{"key": "', "abc", "-> ", "2024-", "http://www.example.org/", "(", "é", "日本語"),
    *("霍格", "霍比", "x", " ", "Wednesday", "100%", "dark red", "dark green", 'say "no"'),
)
KEYS = ("name_of_the_person_who_is_asked", "preferred_colour_of_the_person", "visits_in_the_last_year")


def object_of(properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


VALUES = ({"type": "boolean"}, {"enum": ["red", "green"]}, {"type": "integer", "maximum": 9, "minimum": 0})
THREE_LONG_KEYS = json.dumps(object_of(dict(zip(KEYS, VALUES, strict=True))))
MIXED, EXAMPLES = 32, 3  # requests of mixed_requests; examples of random grammars, 16 requests each


# --- requests -----------------------------------------------------------------------------------------


def random_regex(rng: random.Random, depth: int = 0) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.45:
            parts.append(escape("".join(rng.choices(TEXTS, k=rng.randint(1, 2)))))
        elif kind < 0.6:
            parts.append("(" + "|".join(map(escape, rng.sample(TEXTS, rng.randint(2, 3)))) + ")")
        elif kind < 0.8:
            parts.append(
                rng.choice(["[a-z]", "[0-9]", "[ab]"]) + f"{{{rng.randint(0, 2)},{rng.randint(2, 6)}}}"
            )
        elif depth < 2:
            parts.append(f"({random_regex(rng, depth + 1)})" + rng.choice(["", "?", "{1,2}"]))
        else:
            parts.append("[xyz]")
    return "".join(parts)


def escape(text: str) -> str:
    return re.sub(r"([^\w\s/:<>\"%-])", r"\\\1", text).replace("-", r"\-")


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    kinds = ["boolean", "enum", "integer", "string", "const"] + ["object", "object", "array"] * (depth < 2)
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(TEXTS, rng.randint(1, 3))}
        case "integer":
            low = rng.randint(-5, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 30)}
        case "string":
            return {"type": "string", "pattern": f"^[a-z ]{{0,{rng.randint(0, 12)}}}$"}
        case "const":
            return {"const": rng.choice(TEXTS)}
        case "array":
            return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": 1, "maxItems": 3}
        case "object":
            names = rng.sample([*KEYS, "x", "id", "ключ"], rng.randint(1, 4))
            return object_of({name: random_schema(rng, depth + 1) for name in names})
        case kind:
            return {"type": kind}


def mixed_requests() -> list[tuple[str, dict, float]]:
    """(prompt, sampling parameters, seconds until it is sent): free and constrained, greedy and sampled,
    short caps, stop strings and stop tokens."""
    rng, requests = random.Random(5), []
    for index in range(MIXED):
        # With top_p for all, SGLang's seeded sampler draws the same token whatever runs beside it.
        params = {"temperature": rng.choice([0, 0, 0.8]), "top_p": 0.95, "sampling_seed": rng.randrange(10**6)}
        params["max_new_tokens"] = rng.choice([1, 2, 5, 17, 40, 200, 200, 200])
        kind = rng.random()
        if kind < 0.4:
            params["json_schema"] = json.dumps(random_schema(rng))
        elif kind < 0.8:
            params["regex"] = random_regex(rng)
        else:
            params["max_new_tokens"] = min(params["max_new_tokens"], 30)
        if rng.random() < 0.25:
            params["stop"] = rng.sample(["er", '":', "ex", "a", "-> "], rng.randint(1, 2))
        if rng.random() < 0.1:
            params["stop_token_ids"] = rng.sample(range(260, 400), 40)
        question = rng.choice(["Question", "A much longer introduction to the question"])
        requests.append((f"{question} {index % 7}:", params, rng.random() * 0.4))
    return requests


def problem(params: dict, answer: dict) -> str | None:
    """Why an answer that ended by itself does not satisfy its grammar."""
    reason = answer["finish_reason"]
    if reason["type"] == "abort":
        return f"aborted: {reason}"
    if reason["type"] != "stop" or isinstance(reason.get("matched"), str) or "stop_token_ids" in params:
        return None
    error = grammars.failed(params, {"text": answer["text"], "meta_info": {"finish_reason": reason}})
    return error and f"{params}: {answer['text']!r}: {error}"


# --- engines ------------------------------------------------------------------------------------------


class Serving:
    """An engine, with SGLang's own pool check after every pass; for a forked child."""

    def __init__(self, model: Path, backend: str, jumps: bool, **options) -> None:
        os.environ["RUNTIME_PLUGINS"] = "cpu,count_passes" + ",jump_forward" * jumps
        os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import ServerArgs

        skip_other_models(["Qwen2ForCausalLM"])
        load_plugins()
        fixed = {
            **{"model_path": str(model), "device": "cpu", "dtype": "float32", "log_level": "error"},
            **{"attention_backend": "torch_native", "grammar_backend": backend},
            **{"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"},
            **{"enable_deterministic_inference": True, "constrained_json_disable_any_whitespace": True},
            **{"max_running_requests": 64, "max_total_tokens": 20000, "mem_fraction_static": 0.3},
            **{"disable_overlap_schedule": jumps},
        }
        self.engine = Engine(server_args=ServerArgs(**fixed | options))

    def counters(self, name: str) -> list[int]:
        return [state[name] for state in self.engine.get_server_info()["internal_states"]]

    def flushed(self) -> bool:
        """Empties the radix tree; refused while anything runs, and for a moment after the last answer."""
        tries = (self.engine.flush_cache().success or time.sleep(0.1) for _ in range(30))
        return any(tries)

    def answer(self, requests: list, adapters: list | None = None) -> list[dict]:
        async def one(index: int, prompt: str, params: dict, delay_s: float) -> dict:
            await asyncio.sleep(delay_s)
            lora = adapters[index % len(adapters)] if adapters else None
            got = await self.engine.async_generate(prompt=prompt, sampling_params=dict(params), lora_path=lora)
            meta = got["meta_info"]
            return {
                "text": got["text"],
                "ids": got["output_ids"],
                "finish_reason": meta["finish_reason"],
                "forced_runs": [tokens or 0 for tokens in meta.get("forced_runs") or []],
                "retractions": meta["num_retractions"],
                "cached_tokens_too_many": max(0, meta["cached_tokens"] - meta["prompt_tokens"]),
            }

        async def everything() -> list[dict]:
            return await asyncio.gather(*(one(index, *request) for index, request in enumerate(requests)))

        return self.engine.loop.run_until_complete(everything())


def in_engine(function, folder: Path, *args, patch=None, timeout_s: float = 240, **options):
    """What `function(serving)` returns, in a fresh engine; the pool must be as free afterwards as before."""
    result = folder / "result.json"

    def run() -> int:
        if patch:
            patch()
        serving = Serving(*args, **options)
        before = serving.counters("free_tokens")
        value = function(serving)
        assert serving.flushed()
        assert serving.counters("free_tokens") == before
        result.write_text(json.dumps(value))
        serving.engine.shutdown()
        return 0

    code, text = fork(run, folder / "engine.txt").wait(timeout_s)
    assert code == 0, text
    return json.loads(result.read_text())


def mixed_run(serving: Serving) -> dict:
    """The mixed requests, and the forward passes of 8 requests for THREE_LONG_KEYS, a moment apart."""
    found = {"answers": serving.answer(mixed_requests())}
    before = serving.counters("forward_passes")
    params = {"temperature": 0, "max_new_tokens": 300, "json_schema": THREE_LONG_KEYS}
    answers = serving.answer([(f"Person {n}:", params, 0.002 * n) for n in range(8)])
    assert not [reason for answer in answers if (reason := problem(params, answer))]
    return found | {"passes": serving.counters("forward_passes")[0] - before[0]}


@pytest.fixture(scope="module")
def served(runtime, tiny_qwen2, tmp_path_factory):
    """served(backend, jumps): what mixed_run finds and, with jumps, random_grammars. Without: what SGLang answers by
    itself, its overlap scheduler on."""
    import llguidance  # noqa: F401

    @functools.cache
    def of(backend: str, jumps: bool) -> dict:
        def run(serving: Serving) -> dict:
            return mixed_run(serving) | ({"grammars": random_grammars(serving, EXAMPLES)} if jumps else {})

        return in_engine(run, tmp_path_factory.mktemp(backend), tiny_qwen2, backend, jumps)

    return of


def first_difference(one: list, two: list) -> int:
    same = [a == b for a, b in zip(one, two, strict=False)]
    return [*same, False].index(False)


def check(requests: list, plain: list[dict], jumping: list[dict], exact: bool) -> int:
    """Asserts that answers are equal, or equal up to a forced run that was tokenised otherwise (not where
    `exact`), and valid. Returns how many differ."""
    different = 0
    assert sum(bool(answer["forced_runs"]) for answer in jumping) > len(requests) / 3
    for (_, params, _), one, two in zip(requests, plain, jumping, strict=True):
        assert problem(params, two) is None
        assert two["cached_tokens_too_many"] == 0
        if (one["ids"], one["text"], one["finish_reason"]) == (two["ids"], two["text"], two["finish_reason"]):
            continue
        assert not exact, (params, one, two)
        different += 1
        place = first_difference(one["ids"], two["ids"])
        runs = enumerate(two["forced_runs"])
        assert any(start <= place < start + tokens for start, tokens in runs), (params, one, two)
    return different


# --- the same answers ---------------------------------------------------------------------------------


VARIANTS = {
    "retracted": {"chunked_prefill_size": 48, "max_total_tokens": 1200, "disable_radix_cache": True},
    "chunked": {"chunked_prefill_size": 16},
    "mixed_chunk": {"chunked_prefill_size": 24, "enable_mixed_chunk": True},
    "dp": {"dp_size": 2},
    "tp": {"tp_size": 2},
}


def test_ids_from_llguidance_give_the_same_answers(served):
    """Greedy and sampled, id for id, against masks only: nothing depends on what runs beside."""
    plain, jumping = served("llguidance", False), served("llguidance", True)
    check(mixed_requests(), plain["answers"], jumping["answers"], exact=True)


@pytest.mark.parametrize(
    "variant", [n if n == "retracted" else pytest.param(n, marks=pytest.mark.long) for n in VARIANTS]
)
def test_ids_from_llguidance_give_the_same_answers_at_other_settings(served, tiny_qwen2, tmp_path, variant):
    def patch() -> None:
        if variant == "retracted":
            from sglang.srt.managers import scheduler

            scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, 3
        if variant == "tp":
            os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"

    plain, requests = served("llguidance", False), mixed_requests()
    options = VARIANTS[variant] | {"patch": patch}
    found = in_engine(
        lambda serving: serving.answer(requests), tmp_path, tiny_qwen2, "llguidance", True, **options
    )
    if variant == "retracted":
        assert sum(answer["retractions"] for answer in found) > 3
    if variant == "tp":  # sums over two processes have other bits
        assert not [
            reason
            for (_, params, _), answer in zip(requests, found, strict=True)
            if (reason := problem(params, answer))
        ]
    else:
        check(requests, plain["answers"], found, exact=True)


def test_text_from_xgrammar_keeps_every_id_before_the_first_forced_one(served):
    plain, jumping = served("xgrammar", False), served("xgrammar", True)
    different = check(mixed_requests(), plain["answers"], jumping["answers"], exact=False)
    print(f"{different} of {MIXED} answers differ behind a forced run that was tokenised otherwise")


@pytest.mark.parametrize("backend", ["llguidance", "xgrammar"])
def test_forced_text_takes_a_third_of_the_passes(served, backend):
    assert 3 * served(backend, True)["passes"] <= served(backend, False)["passes"]


@pytest.mark.long
def test_adapters_beside_the_base_model(runtime, tiny_qwen2, tmp_path):
    adapter = tmp_path / "adapter"

    def build() -> int:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_qwen2), config).save_pretrained(adapter)
        return 0

    code, text = fork(build, tmp_path / "build.txt").wait()
    assert code == 0, text

    def run(serving: Serving) -> list[dict]:
        return serving.answer(mixed_requests(), adapters=["x", None])

    options = {"lora_paths": {"x": str(adapter)}, "max_loras_per_batch": 2, "lora_backend": "torch_native"}
    plain, jumping = (
        in_engine(run, tmp_path, tiny_qwen2, "llguidance", jumps, **options) for jumps in (False, True)
    )
    check(mixed_requests(), plain, jumping, exact=True)


# --- properties ---------------------------------------------------------------------------------------


CHOICES = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3, unique=True)
PATTERNS = st.sampled_from(["^[a-z]{0,9}$", "^(red|green) [0-9]{2}$", "^[0-9]{4}-[0-9]{2}$"])
SCHEMAS = st.recursive(
    st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
        st.sampled_from(TEXTS).map(lambda text: {"const": text}),
        CHOICES.map(lambda texts: {"enum": texts}),
        PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern}),
        st.tuples(st.integers(-50, 9), st.integers(10, 300)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
        ),
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from([*KEYS, "x", "ключ"]), inner, min_size=1, max_size=4).map(object_of),
        inner.map(lambda item: {"type": "array", "items": item, "minItems": 1, "maxItems": 3}),
    ),
    max_leaves=8,
)
PIECES = st.one_of(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(lambda texts: escape("".join(texts))),
    st.lists(st.sampled_from(TEXTS), min_size=2, max_size=4).map(
        lambda texts: f"({'|'.join(map(escape, texts))})"
    ),
    st.sampled_from(["[a-z]{1,5}", "[0-9]{2}", "(ab|ac){1,3}", "[^a-z\\n]", "\\.?", "(é|è)"]),
)
REGEXES = st.lists(PIECES, min_size=1, max_size=5).map("".join)
CONSTRAINTS = st.one_of(
    SCHEMAS.map(lambda schema: {"json_schema": json.dumps(schema)}), REGEXES.map(lambda text: {"regex": text})
)


def random_grammars(serving: Serving, examples: int) -> dict[str, int]:
    """16 requests an example, together: every answer that ends by itself satisfies its schema or regex."""
    totals = {"requests": 0, "ended": 0, "forced_tokens": 0}

    @settings(
        max_examples=examples,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking would run thousands of requests more
    )
    @given(st.lists(CONSTRAINTS, min_size=16, max_size=16), st.integers(0, 2**20))
    def holds(constraints: list[dict], seed: int) -> None:
        rng, requests = random.Random(seed), []
        for index, constraint in enumerate(constraints):
            params = {
                "temperature": rng.choice([0, 1]),
                "top_p": 0.95,
                "max_new_tokens": 160,
                "sampling_seed": seed,
            }
            requests.append((f"{seed % 3} {index}:", params | constraint, rng.random() * 0.05))
        answers = serving.answer(requests)
        for (_, params, _), answer in zip(requests, answers, strict=True):
            assert problem(params, answer) is None
        totals["requests"] += len(answers)
        totals["ended"] += sum(answer["finish_reason"]["type"] == "stop" for answer in answers)
        totals["forced_tokens"] += sum(sum(answer["forced_runs"]) for answer in answers)

    holds()
    return totals


BACKENDS = ("llguidance", "xgrammar")


@pytest.mark.parametrize(
    ("backend", "examples"),
    [(name, EXAMPLES) for name in BACKENDS]
    + [pytest.param(name, 330, marks=pytest.mark.long) for name in BACKENDS],
)
def test_random_grammars_are_satisfied_and_nothing_leaks(served, tiny_qwen2, tmp_path, backend, examples):
    """Each engine looks at its pool after every pass and at its end (in_engine)."""
    if examples == EXAMPLES:
        totals = served(backend, True)["grammars"]
    else:
        options = {"timeout_s": 1200, "max_running_requests": 16}
        run = functools.partial(random_grammars, examples=examples)
        totals = in_engine(run, tmp_path, tiny_qwen2, backend, True, **options)
    print(totals)
    assert totals["requests"] >= 16 * examples
    assert totals["ended"] > 0.8 * totals["requests"]
    assert totals["forced_tokens"] > totals["requests"]


@pytest.mark.parametrize("model", ["tiny_model", "tiny_qwen2"])
def test_stable_tokens_spell_the_text_and_survive_what_follows(request, runtime, tmp_path, model):
    folder = request.getfixturevalue(model)

    def run() -> int:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        kept = []

        @settings(derandomize=True)
        @given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5).map("".join), st.sampled_from(TEXTS))
        def holds(text: str, behind: str) -> None:
            ids = list(jump_forward.stable_tokens(tokenizer, text))
            start = tokenizer.encode("\n", add_special_tokens=False)
            spelled = tokenizer.decode(start + ids).removeprefix("\n")
            assert text.startswith(spelled.rstrip("\ufffd"))
            whole = tokenizer.encode("\n" + text + behind, add_special_tokens=False)
            kept.append((len(ids), whole[: len(start + ids)] == start + ids))

        holds()
        assert sum(tokens for tokens, _ in kept) > 3 * len(kept)
        assert sum(survived for _, survived in kept) > 0.95 * len(kept)
        assert jump_forward.stable_tokens(tokenizer, "") == ()
        return 0

    code, text = fork(run, tmp_path / "child.txt").wait()
    assert code == 0, text


# --- on only when asked for, loud when SGLang changes -------------------------------------------------


TARGETS = (
    ("schedule_batch", "ScheduleBatch", "mix_with_running"),
    ("schedule_batch", "Req", "update_finish_state"),
    ("scheduler", "Scheduler", "get_new_batch_prefill"),
    ("scheduler", "Scheduler", "_add_request_to_queue"),
)


def test_hooks_only_when_asked_for_and_loud_without_their_targets(runtime, tmp_path):
    def run() -> int:
        import importlib

        from sglang.srt.plugins.hook_registry import HookRegistry

        jump_forward.register()  # RUNTIME_PLUGINS is "cpu"
        assert not HookRegistry._hooks
        os.environ["RUNTIME_PLUGINS"] = "cpu,jump_forward"
        for module, owner, name in TARGETS:
            found = getattr(importlib.import_module(f"sglang.srt.managers.{module}"), owner)
            kept = getattr(found, name)
            delattr(found, name)
            with pytest.raises(SystemExit, match=rf"no sglang.srt.managers.{module}.{owner}.{name} in sglang"):
                jump_forward.register()
            setattr(found, name, kept)
            HookRegistry._hooks.clear()
        jump_forward.register()
        HookRegistry.apply_hooks()
        assert len(HookRegistry._hooks) == 3
        assert set(HookRegistry._hooks) == HookRegistry._patched
        return 0

    code, text = fork(run, tmp_path / "child.txt").wait()
    assert code == 0, text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"disable_overlap_schedule": false}', "works with disable_overlap_schedule True, not False"),
        (
            '{"grammar_backend": "outlines"}',
            "works with grammar_backend 'xgrammar' or 'llguidance', not 'outlines'",
        ),
        ('{"page_size": 16}', "works with page_size 1, not 16"),
        ('{"speculative_algorithm": "NGRAM"}', "works with speculative_algorithm None, not 'NGRAM'"),
    ],
)
def test_what_it_does_not_work_with_is_refused(options, message):
    parse(["--engine_args", options])
    with pytest.raises(
        UserError, match=f"^--jump_forward {message}: change --engine_args or leave the flag out$"
    ):
        parse(["--jump_forward", "--engine_args", options])


def test_an_engine_with_the_overlap_scheduler_does_not_start(runtime, tiny_qwen2, tmp_path):
    def run() -> int:
        Serving(tiny_qwen2, "llguidance", True, disable_overlap_schedule=False)
        return 0

    code, text = fork(run, tmp_path / "child.txt").wait()
    assert code != 0
    assert "jump_forward does not work with the overlap scheduler" in text


def test_the_program_counts_its_jumps(run_inference, uninterrupted_inference, tmp_path):
    rows = [{"instruction": f"Person {n}.", "json_schema": THREE_LONG_KEYS} for n in range(6)]
    rows += [{"instruction": "Say something."}]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(rows))
    flags = ["--jump_forward", "--engine_args", '{"grammar_backend": "llguidance"}', "--prompts", prompts]
    flags += ["--max_new_tokens", 300, "--output_file", tmp_path / "outputs.jsonl"]
    code, text = run_inference(*flags).wait()
    assert code == 0, text
    assert "disable_overlap_schedule = True: --jump_forward must know" in text
    summary, without = summary_of(tmp_path), summary_of(uninterrupted_inference)
    assert re.search(
        rf"^jumps +{summary['jumps']} with {summary['forced_tokens']:,} forced tokens$", text, re.M
    )
    assert summary["jumps"] >= 18
    assert summary["forced_tokens"] > 0.5 * summary["output_tokens"]
    assert (without["jumps"], without["forced_tokens"]) == (0, 0)
    assert summary["settings"]["identity"]["jump_forward"] is True
    assert summary["settings"]["profile"] == "fast"
