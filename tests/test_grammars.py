"""Regexes and schemas: refused where xgrammar would drop them, enforced where not; every answer is checked."""

import asyncio
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_infer import generate, grammars
from batch_infer.prompts import Record
from batch_infer.store import PartialFile
from harness import in_child

INTEGER, NAMES = {"type": "integer"}, ["a", "b", "x1"]


def refused(schema: object, backend: str = "xgrammar") -> str | None:
    return grammars.refused(None, json.dumps(schema), backend)


def nested(levels: int) -> dict:
    schema = INTEGER
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


# --- before the run -----------------------------------------------------------------------------------

AN_OBJECT, AN_ARRAY = {"type": "object", "properties": {"a": INTEGER}}, {"type": "array", "items": INTEGER}
DROPPED = {
    "'uniqueItems' at #;": AN_ARRAY | {"uniqueItems": True},
    "'contains' at #;": AN_ARRAY | {"contains": {"const": 5}},
    "'multipleOf' at #/properties/a;": AN_OBJECT | {"properties": {"a": INTEGER | {"multipleOf": 7}}},
    "'required' of 'city', which": {"type": "object", "required": ["city"]},
    "'required' without 'type' at #;": {"required": ["city"]},
    "'allOf' of several schemas": {"allOf": [AN_OBJECT, AN_OBJECT]},
    "'dependentRequired'": AN_OBJECT | {"dependentRequired": {"a": ["b"]}},
    "'if'": AN_OBJECT | {"if": AN_OBJECT, "then": {"required": ["b"]}},
    "'not'": AN_OBJECT | {"not": {"required": ["a"]}},
    "'properties' beside 'anyOf' at #;": AN_OBJECT | {"anyOf": [{"required": ["a"]}]},
    "'maximum' beside '$ref' at #;": {"$ref": "#/$defs/i", "$defs": {"i": INTEGER}, "maximum": 3},
    "'patternProperties' beside 'properties'": AN_OBJECT | {"patternProperties": {"^x": INTEGER}},
    "'propertyNames'": {"type": "object", "propertyNames": {"pattern": "^a$"}},
    "'pattern' beside 'maxLength'": {"type": "string", "pattern": "^a+$", "maxLength": 3},
    "'format' 'password'": {"type": "string", "format": "password"},
    "put its alternatives in brackets": {"type": "string", "pattern": "^a$|^b$"},
    "'enum' or 'const' and forbids some": {"enum": ["a", 5], "type": "string"},
    "'minimum' of this integer (it would let 1 through)": INTEGER | {"minimum": 2},
    "of this number (it would let 1.1 through)": {"type": "number", "minimum": 0, "maximum": 1},
    "at #/items/anyOf/1;": {"type": "array", "items": {"anyOf": [INTEGER, {"minimum": 1}]}},
}
NO_SCHEMA = {
    "'https://example.org/a' at # is not of this schema": {"$ref": "https://example.org/a"},
    "'#' refers to itself": {"$ref": "#"},
    "refers to itself, with nothing between": {
        "anyOf": [INTEGER, {"$ref": "#/$defs/b"}],
        "$defs": {"b": {"$ref": "#"}},
    },
    "nested deeper than 64 levels of JSON": nested(200),
    "'nonsense' is not valid": {"type": "nonsense"},
    "a schema is a JSON object": 5,
}


@pytest.mark.parametrize(("reason", "schema"), [*DROPPED.items(), *NO_SCHEMA.items()])
def test_what_would_not_be_enforced_is_refused_by_name_and_place(reason, schema):
    error = refused(schema)
    assert reason in error
    assert len(error.splitlines()) == 1
    assert ("xgrammar does not enforce" in error) == (reason in DROPPED)


def test_llguidance_is_named_where_it_would_enforce_the_schema():
    assert refused(DROPPED["'multipleOf' at #/properties/a;"]).endswith(grammars.LLGUIDANCE)
    assert refused(DROPPED["'uniqueItems' at #;"]).endswith("leave it out")
    assert refused(INTEGER | {"multipleOf": 7}, "llguidance") is None
    assert "uniqueItems" in refused(DROPPED["'uniqueItems' at #;"], "llguidance")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"items":' * 2000 + "{}" + "}" * 2000, "{", '{"a": "\ud83d"}'])
def test_a_text_that_is_no_schema_is_refused(text):
    assert grammars.refused(None, text, "xgrammar").startswith("invalid json_schema: ")


@pytest.mark.parametrize(
    ("regex", "reason"),
    [
        ("", "regex: is empty"),
        ("a\0b", "regex: holds a NUL character"),
        ("a(?=b)", "Lookahead is not supported"),
        (r"(a)\1", "Backreference is not supported"),
        (r"\bcat", "Word boundary is not supported"),
        (r"\Aab", r"xgrammar does not know \A there"),
        ("a^b", "xgrammar does not know ^ there"),
        (r"\h", r"bad escape \h"),
        ("[", "invalid regex: unterminated character set"),
        ("\ud83d", "surrogates not allowed"),
    ],
)
def test_a_regex_that_would_not_be_enforced_is_refused(regex, reason):
    assert reason in grammars.refused(regex, None, "xgrammar")


@pytest.mark.parametrize("regex", ["^(a|b)$", "^a$|^b$", r"[\^$A]\\A", "(?:^a|b)[^]^]{2}", r"\$\d+\.\d\d"])
def test_other_regexes_pass(regex):
    assert grammars.refused(regex, None, "xgrammar") is None


# --- what passes is enforced --------------------------------------------------------------------------

LEAVES = [
    {"type": "boolean"},
    INTEGER,
    {"type": ["integer", "null"]},
    {"enum": ["a", 1]},
    {"const": [1]},
    {"minimum": 1},
]
LEAVES += [{"type": "string", "pattern": "^[a-z]{2}$"}, {"type": "string", "format": "uuid"}]
RANGES = st.tuples(st.integers(-150, 150), st.integers(0, 99)).map(
    lambda ends: INTEGER | {"minimum": ends[0], "maximum": sum(ends)}
)
LIMITS = st.tuples(st.sampled_from([*sorted(grammars.BOUNDS), "multipleOf"]), st.integers(1, 150)).map(
    lambda limit: INTEGER | dict([limit])
)
SCHEMAS = st.recursive(
    st.one_of(st.sampled_from(LEAVES), RANGES, LIMITS),
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
            },
            optional={
                "required": st.lists(st.sampled_from(NAMES), max_size=2, unique=True),
                "minProperties": st.integers(0, 2),
                "maxProperties": st.integers(1, 3),
                "patternProperties": st.builds(lambda schema: {"^x[0-9]$": schema}, inner),
                "additionalProperties": st.just(False),
                "anyOf": st.lists(inner, min_size=1, max_size=1),
            },
        ),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={
                "minItems": st.integers(0, 2),
                "maxItems": st.integers(2, 3),
                "uniqueItems": st.booleans(),
                "prefixItems": st.lists(inner, min_size=1, max_size=2),
            },
        ),
        st.dictionaries(
            st.sampled_from(["anyOf", "allOf"]), st.lists(inner, min_size=1, max_size=2), min_size=1, max_size=1
        ),
    ),
    max_leaves=5,
)


def walk(compiled, rng: random.Random, longest: int = 300) -> str | None:
    """A text of the grammar, byte by byte; None if it has not ended by then."""
    import xgrammar

    matcher = xgrammar.GrammarMatcher(compiled)
    mask, text = xgrammar.allocate_token_bitmask(1, 257), bytearray()
    while len(text) < longest:
        matcher.fill_next_token_bitmask(mask)
        words = mask[0].tolist()
        allowed = [token for token in range(257) if words[token >> 5] >> (token & 31) & 1]
        token = 256 if 256 in allowed and rng.random() < 0.5 else rng.choice(allowed)
        if token == 256:
            return text.decode()
        assert matcher.accept_token(token)
        text.append(token)
    return None


def test_answers_of_every_schema_that_passes_obey_it(transformers, tmp_path):
    """Random walks through xgrammar's grammars. Where this fails, it drops what grammars.py lets through."""

    def look() -> None:
        import xgrammar

        info = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
        compiler, walked = xgrammar.GrammarCompiler(info, max_threads=1), []

        @settings(derandomize=True, suppress_health_check=list(HealthCheck))
        @given(SCHEMAS)
        def holds(schema: dict) -> None:
            text = json.dumps(schema)
            if grammars.refused(None, text, "xgrammar") is None:
                compiled = compiler.compile_json_schema(text, any_whitespace=False)
                for seed in range(6):
                    answer = walk(compiled, random.Random(seed))
                    walked.append(answer)
                    assert answer is None or grammars.failed({"json_schema": text}, result(answer)) is None

        holds()
        assert len(walked) - walked.count(None) > 60

    in_child(look, tmp_path)


KEYWORDS = [
    *sorted(grammars.ENFORCED),
    *grammars.ALONE,
    "enum",
    "const",
    "$defs",
    "$schema",
    "not",
    "if",
    "$id",
]
ATOMS = [st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)]
ANY = st.recursive(
    st.one_of(*ATOMS, st.sampled_from(["#", "string", "#/$defs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=3),
)


@given(ANY, st.text(max_size=12))
def test_any_json_and_any_text_gets_an_answer_or_one_line(schema, regex):
    for backend in ("xgrammar", "llguidance"):
        for error in (refused(schema, backend), grammars.refused(regex, None, backend)):
            assert error is None or len(error.splitlines()) == 1


# --- after the run ------------------------------------------------------------------------------------


def result(text: str, reason: str = "stop") -> dict:
    usage = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 9}
    return {"text": text, "output_ids": [1], "meta_info": usage | {"finish_reason": {"type": reason}}}


def row(text: str, reason: str = "stop", **grammar) -> dict:
    """What the partial file gets of an engine that answers this."""

    class Engine:
        async def async_generate(self, **_):
            return result(text, reason)

    if "json_schema" in grammar:
        grammar["json_schema"] = json.dumps(grammar["json_schema"])
    record = Record(0, "x", **grammar, sampling_params={"max_new_tokens": 9} | grammar, key="k")
    return asyncio.run(generate.row_of(Engine(), record, None, None, None))


UNIQUE = AN_ARRAY | {"uniqueItems": True}


@pytest.mark.parametrize(
    ("text", "end", "grammar", "reason"),
    [
        (
            "[1, 1]",
            "stop",
            {"json_schema": UNIQUE},
            "json_schema: [1, 1] has non-unique elements at $; the same",
        ),
        ('{"a": "b"}', "stop", {"json_schema": AN_OBJECT}, "'b' is not of type 'integer' at $.a"),
        ('"\x01"', "stop", {"json_schema": {}}, "the answer is not JSON: Invalid control character"),
        ('"2024-02-30"', "stop", {"json_schema": {"format": "date"}}, "'2024-02-30' is not a 'date'"),
        (
            "1",
            "stop",
            {"json_schema": {"$ref": "https://example.org/a"}},
            "cannot be checked against json_schema: ",
        ),
        ("[" * 10**5, "stop", {"json_schema": {}}, "the answer is not JSON"),
        ('{"a": 1', "length", {"json_schema": AN_OBJECT}, "cut at 9 new tokens before its JSON ended: raise"),
        ("12", "stop", {"regex": "[0-9]{3}"}, "the answer does not match regex: '12'"),
        ("12", "length", {"regex": "[0-9]{3}"}, "cut at 9 new tokens before its match ended"),
    ],
)
def test_an_answer_that_disobeys_is_a_failure_and_tried_again(text, end, grammar, reason, tmp_path):
    found = row(text, end, **grammar)
    assert reason in found["error"]
    assert "output" not in found
    partial = PartialFile(tmp_path, {}, {})
    partial.append([found])
    assert not partial.done(Record(0, "x", key="k"))


@pytest.mark.parametrize(
    ("text", "reason", "grammar"),
    [
        ('{"a": 1}', "stop", {"json_schema": AN_OBJECT}),
        ('{"a": 1}', "length", {"json_schema": AN_OBJECT}),  # the cap came behind its last bracket
        ("é\n", "stop", {"regex": r"\w."}),
        ("ab", "stop", {"regex": r"\p{L}+"}),  # llguidance's, unknown to re
        ("anything", "length", {}),
    ],
)
def test_other_answers_count(text, reason, grammar):
    assert row(text, reason, **grammar)["output"] == text


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
def test_a_tokenizer_that_fits_is_read_as_it_is_written(runtime, tokenizer, tiny_qwen2, backend):
    from transformers import AutoTokenizer

    for fitting in (tokenizer, AutoTokenizer.from_pretrained(tiny_qwen2)):
        assert grammars.misread(fitting, len(fitting), backend) is None


def test_a_decoder_that_xgrammar_takes_for_another_kind_is_named(runtime, tiny_qwen2):
    """As transformers converts a GGUF file: ByteFallback before ByteLevel."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(tiny_qwen2)
    order = [decoders.ByteFallback(), decoders.Fuse(), decoders.ByteLevel()]
    converted.backend_tokenizer.decoder = decoders.Sequence(order)
    assert "\u0120" in grammars.misread(converted, len(converted), "xgrammar")
