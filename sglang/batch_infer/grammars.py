"""A record's `regex` or `json_schema`: refused where the engine would not enforce it; its answer is checked against it.

xgrammar drops what it does not know without a word, and has no switch against that; llguidance names it. What xgrammar
0.2.1 enforces was found by random walks through its grammars (tests/test_grammars.py).
"""

import functools
import graphlib
import json
import re
from collections.abc import Iterator

DEEPEST = 64  # levels of JSON in a schema: 32 nested objects take 0.1 s, 200 take minutes
LLGUIDANCE = """--engine_args '{"grammar_backend": "llguidance"}'"""
ROUND_TRIP = '{"naïve": "日 42"}\n'  # bytes of one, two and three, digits, spaces before and between words

# xgrammar reads the first of these that a schema holds, and nothing beside it.
ALONE = ("$ref", "anyOf", "oneOf", "allOf")
GIVE_A_TYPE = {"type", "properties", "additionalProperties", "unevaluatedProperties"}
GIVE_A_TYPE |= {"items", "prefixItems", "unevaluatedItems"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
ENFORCED = GIVE_A_TYPE | BOUNDS | {"pattern", "format", "minLength", "maxLength", "minItems", "maxItems"}
ENFORCED |= {"required", "patternProperties", "minProperties", "maxProperties"}
NOT_BESIDE = {  # xgrammar drops one of the two
    "patternProperties": {"properties"},
    "pattern": {"minLength", "maxLength"},
    "format": {"pattern", "minLength", "maxLength"},
}
FORMATS = {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"}
FORMATS |= {"uri-reference", "uri-template"}


# --- before the run -----------------------------------------------------------------------------------


@functools.cache
def refused(regex: str | None, json_schema: str | None, backend: str) -> str | None:
    """Why the engine's grammar `backend` cannot or would not enforce this regex or schema."""
    if regex is None and json_schema is None:
        return None
    what = "json_schema" if regex is None else "regex"
    try:
        error = _of_regex(regex, backend) if regex is not None else _of_schema(json_schema, backend)
        if error is None:
            _compile(regex, json_schema, backend)
    except Exception as found:  # whatever it is, it is this record's
        last_line = (str(found).strip() or repr(found)).splitlines()[-1]
        without_place = re.sub(r"^(.[0-9:]+. )?/project/[^ ]+ ", "", last_line)  # xgrammar's clock and file
        return f"invalid {what}: {without_place[:200]}"
    return error and f"{what}: {error}"


def misread(tokenizer, vocab_size: int, backend: str) -> str | None:
    """What `backend` takes for the text of `tokenizer`'s tokens, if it is not what they stand for: it would forbid what
    the model writes. Backends guess the kind of a vocabulary from the tokenizer's decoder."""
    ids = tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"]
    if backend == "llguidance":
        from llguidance.hf import from_tokenizer

        read = from_tokenizer(tokenizer, n_vocab=vocab_size).decode_bytes(ids)
    else:
        import xgrammar

        vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size).decoded_vocab
        read = b"".join(vocabulary[i] for i in ids)
    text = read.decode(errors="replace")
    same = text.removeprefix(" ") == ROUND_TRIP  # SentencePiece puts a space before the first word
    return None if same else text


def _compile(regex: str | None, json_schema: str | None, backend: str) -> None:
    """Raises RuntimeError or ValueError with the backend's reason."""
    if backend == "llguidance":
        from llguidance import LLMatcher

        of = LLMatcher.grammar_from_json_schema if regex is None else LLMatcher.grammar_from_regex
        if error := LLMatcher.validate_grammar(of(json_schema if regex is None else regex)):
            raise ValueError(" ".join(error.split()))
        return
    import xgrammar

    if regex is None:
        xgrammar.Grammar.from_json_schema(json_schema)
    else:
        xgrammar.Grammar.from_regex(regex)


def _of_regex(regex: str, backend: str) -> str | None:
    """Raises ValueError for what is no regex."""
    if not regex:
        return "is empty; leave it out"
    if "\0" in regex:
        return r"holds a NUL character, at which it would end; write \x00"
    if backend == "llguidance":
        return None
    try:
        re.compile(regex)  # xgrammar takes escapes that it does not know as letters
    except re.error as error:
        raise ValueError(str(error)) from error
    if found := re.search(r"\\[AZ]|(?<=[^(|:])\^|\$(?=[^)|])", _without_classes(regex)):
        return f"xgrammar does not know {found[0]} there; leave it out (the whole answer must match anyway)"
    return None


def _without_classes(regex: str) -> str:
    """With an x for each escape (but \\A and \\Z) and [class]."""
    return re.sub(r"\\[^AZ]|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", regex)


def _of_schema(json_schema: str, backend: str) -> str | None:
    """Raises ValueError for what is no schema."""
    import jsonschema

    try:
        schema = json.loads(json_schema)
        depth, level = 0, [schema]
        while level:
            depth, level = depth + 1, [inner for value in level for inner in _inside(value)]
    except RecursionError:
        depth = DEEPEST + 1
    if depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST} levels of JSON; make it flatter")
    if not isinstance(schema, (dict, bool)):
        raise ValueError("a schema is a JSON object")
    validator = _validator(json_schema)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{error.message} at {error.json_path}") from error
    if error := next(_bad_references(validator), None):
        return error
    dropped = None if backend == "llguidance" else next(_dropped(validator), None)
    if dropped and refused(None, json_schema, "llguidance") is None:
        return f"xgrammar does not enforce {dropped}; leave it out, or use {LLGUIDANCE}"
    return dropped and f"xgrammar does not enforce {dropped}; leave it out"


def _inside(value: object) -> list:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _schemas(validator) -> Iterator[tuple[str, dict, str | None]]:
    """(place as #/properties/a, schema, reference whose value it describes too) of each schema that is used."""
    todo, seen = [("#", validator.schema, "#")], {"#"}
    while todo:
        place, node, owner = todo.pop()
        if isinstance(node, bool):
            continue
        yield place, node, owner
        target = node.get("$ref", "#")
        if target not in seen:
            found = validator.schema
            for name in target.split("/")[1:]:  # the backend refuses what names nothing
                found = found.get(name, True) if isinstance(found, dict) else True
            todo.append((target, found, target))
        seen.add(target)
        for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            same = None if name == "prefixItems" else owner
            todo += [(f"{place}/{name}/{i}", inner, same) for i, inner in enumerate(node.get(name, []))]
        for name in ("properties", "patternProperties"):
            todo += [(f"{place}/{name}/{key}", inner, None) for key, inner in node.get(name, {}).items()]
        for name in ("additionalProperties", "unevaluatedProperties", "items", "unevaluatedItems"):
            if isinstance(node.get(name), dict):
                todo.append((f"{place}/{name}", node[name], None))


def _bad_references(validator) -> Iterator[str]:
    leads_to: dict[str | None, set[str]] = {}
    for place, node, owner in _schemas(validator):
        if "$ref" in node:
            if not f"{node['$ref']}/".startswith("#/"):
                yield f"$ref {node['$ref']!r} at {place} is not of this schema; copy what it names to #/$defs"
            leads_to.setdefault(owner, set()).add(node["$ref"])
    leads_to.pop(None, None)
    try:
        graphlib.TopologicalSorter(leads_to).prepare()
    except graphlib.CycleError as error:
        yield f"$ref {error.args[1][0]!r} refers to itself, with nothing between: no answer has an end"


def _dropped(validator) -> Iterator[str]:
    """What xgrammar does not enforce, with its place. A keyword of another type than the schema's is harmless."""
    for place, node, _ in _schemas(validator):
        yield from (f"{what} at {place}" for what in _dropped_of(validator, node))


def _dropped_of(validator, node: dict) -> Iterator[str]:
    keywords = set(node) & set(validator.VALIDATORS)
    if "$ref" not in node and (values := node.get("enum", [node["const"]] if "const" in node else None)):
        if not all(validator.evolve(schema=node).is_valid(value) for value in values):
            yield "what stands beside 'enum' or 'const' and forbids some of its values"
        return
    if alone := next((name for name in ALONE if name in node), None):
        yield from (f"{name!r} beside {alone!r}" for name in sorted(keywords - {alone}))
        if alone == "allOf" and len(node["allOf"]) > 1:
            yield "'allOf' of several schemas"
        return
    if not keywords & GIVE_A_TYPE:
        yield from (f"{name!r} without 'type'" for name in sorted(keywords))
        return
    yield from (f"{name!r}" for name in sorted(keywords - ENFORCED))
    for name in sorted(keywords & set(NOT_BESIDE)):
        yield from (f"{name!r} beside {other!r}" for other in sorted(NOT_BESIDE[name] & keywords))
    for name in node.get("required", []):
        if name not in node.get("properties", {}):
            yield f"'required' of {name!r}, which is not in 'properties',"
    types = {node["type"]} if isinstance(node.get("type"), str) else set(node.get("type", ()))
    bounds = {name: node[name] for name in sorted(BOUNDS & keywords)}
    for kind in sorted({"integer", "number"} & types if bounds else ()):
        if wrong := _beyond(json.dumps({"type": kind} | bounds)):
            yield f"{' and '.join(map(repr, bounds))} of this {kind} (it would let {wrong} through)"
    if "string" in types and node.get("format", "date") not in FORMATS:
        yield f"'format' {node['format']!r}"
    for pattern in (node.get("pattern"), *node.get("patternProperties", {})):
        if pattern and (error := _of_regex(pattern, "xgrammar") or _of_pattern(pattern)):
            yield f"the pattern {pattern!r} ({error})"


def _of_pattern(pattern: str) -> str | None:
    """xgrammar puts the quotes of the text before the first and behind the last alternative."""
    inner, bare = "", _without_classes(pattern)
    while inner != bare:
        inner, bare = bare, re.sub(r"\([^()]*\)", "", bare)
    return "put its alternatives in brackets: ^(a|b)$" if "|" in bare else None


@functools.cache
def _beyond(json_schema: str) -> str | None:
    """A number that xgrammar lets through and a schema of bounds does not: its ranges are often wrong."""
    import xgrammar

    compiled = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([]), max_threads=1).compile_json_schema(
        json_schema
    )
    bounded = json.loads(json_schema)
    centres = [0, *(value for name, value in bounded.items() if name != "type")]
    steps = [step / 10 for step in range(-12, 13)] if bounded["type"] == "number" else []
    for number in (centre + step for centre in centres for step in (*range(-12, 13), *steps)):
        for text in {str(number), str(number).replace(".", "x")}:
            matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
            if matcher.accept_string(text) and matcher.is_terminated() and _disobeys_schema(json_schema, text):
                return text
    return None


# --- after the run ------------------------------------------------------------------------------------


def failed(params: dict, result: dict) -> str | None:
    """Why the engine's `result` is no answer to a record with these sampling parameters: it was cut, or disobeys."""
    if "json_schema" in params:
        what, bounds, error = (
            "JSON",
            "maxLength, maxItems",
            _disobeys_schema(params["json_schema"], result["text"]),
        )
    elif "regex" in params:
        what, bounds, error = "match", "{0,50}", _disobeys_regex(params["regex"], result["text"])
    else:
        return None
    if error and result["meta_info"]["finish_reason"]["type"] == "length":
        return (
            f"cut at {params['max_new_tokens']} new tokens before its {what} ended: raise max_new_tokens (or shorten "
            f"the prompt, where the context is full), or bound what may repeat ({bounds})"
        )
    return (
        error
        and f"{error}; the same seed gives it again: change it, or try grammar_backend llguidance in --engine_args"
    )


@functools.cache
def _validator(json_schema: str):
    """Of the draft that the schema names, else of 2020-12. It fetches nothing."""
    import jsonschema
    import referencing

    schema = json.loads(json_schema)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, registry=referencing.Registry(), format_checker=kind.FORMAT_CHECKER)


def _disobeys_schema(json_schema: str, text: str) -> str | None:
    from jsonschema.exceptions import best_match

    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the answer is not JSON: {error}"
    try:
        error = best_match(_validator(json_schema).iter_errors(answer))
    except Exception as found:  # nested too deeply, say: what is not checked does not obey
        return f"the answer cannot be checked against json_schema: {found!r:.200}"
    return error and f"the answer does not obey json_schema: {error.message[:200]} at {error.json_path}"


def _disobeys_regex(regex: str, text: str) -> str | None:
    """As Python's re sees it. Backends differ on whether \\w is ASCII, and their dot matches a line's end."""
    try:
        if any(re.fullmatch(regex, text, re.DOTALL | flag) for flag in (re.NOFLAG, re.ASCII)):
            return None
    except re.error:  # llguidance knows more
        return None
    return f"the answer does not match regex: {text[:100]!r}"
