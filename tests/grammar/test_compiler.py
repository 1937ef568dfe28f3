"""Compiling what clients send: once and from the cache, refused with the field's name, killed when it explodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from house import EOS, TOKENIZER, VOCAB_SIZE

from setpoint.engine.constraint import Constraint
from setpoint.engine.json_schemas import MAX_OPTIONAL_PROPERTIES
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import RequestError
from setpoint.grammar import compiler as compiling
from setpoint.grammar.compiler import GrammarCompiler
from setpoint.text.processes import WorkerProcess


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    yield compiler
    compiler.close()


def nested_parentheses(count: int) -> str:
    return "(" * count + "a" + ")" * count


def exploding_any_of() -> dict[str, Any]:
    """Twelve times the product of two alternatives that overlap."""
    parts = [
        {"anyOf": [{"properties": {f"k{i}": {"type": "string"}}}, {"properties": {f"k{i}": {"type": "integer"}}}]}
        for i in range(24)
    ]
    return {"type": "object", "allOf": parts}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"regex": "["}, "bad_constraint"),
    ({"regex": "(?=a)b"}, "bad_constraint"),
    ({"regex": r"(a)\1"}, "bad_constraint"),
    ({"regex": nested_parentheses(100)}, "compile_limit"),
    ({"grammar": "start: undefined"}, "bad_constraint"),
    ({"grammar": "nothing here"}, "bad_constraint"),
    ({"grammar": '{"grammars": [{"json_schema": {}}]}'}, "bad_constraint"),
    ({"grammar": "start: <|nope|>"}, "bad_constraint"),
    ({"grammar": "start: " + nested_parentheses(30_000)}, "compile_limit"),
    ({"json": {"type": "stsring"}}, "bad_constraint"),
    ({"json": {"not": {"type": "string"}}}, "bad_constraint"),
    ({"json": {"type": "string", "pattern": "["}}, "bad_constraint"),
    ({"json": {"type": "string", "format": "no-such-format"}}, "bad_constraint"),
    ({"json": {"type": "object", "uniqueItems": True, "if": {}}}, "bad_constraint"),
    ({"json": {"$ref": "#/$defs/none"}}, "bad_constraint"),
    ({"json": {"$ref": "http://127.0.0.1/schema.json"}}, "bad_constraint"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 2}}, "bad_constraint"),
    ({"json_object": True, "whitespace_pattern": "["}, "bad_constraint"),
    ({"json": exploding_any_of()}, "compile_limit"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_honoured_is_refused(grammars: GrammarCompiler, fields: dict[str, Any], reason: str) -> None:
    for _ in range(2):  # found out, and remembered
        with pytest.raises(RequestError) as caught:
            grammars.compile(StructuredOutputs(**fields))
        assert caught.value.reason == reason
        assert str(caught.value.param).startswith("structured_outputs.")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def many_tags(content: dict[str, Any]) -> dict[str, Any]:
    tags = [{"begin": f"<{number}>", "content": content, "end": "</>"} for number in range(128)]
    return {"format": {"type": "triggered_tags", "triggers": ["<"], "tags": tags}}


BOMBS: list[dict[str, Any]] = [
    {"regex": "((((a{1,999}){1,999}){1,999}){1,999}){1,999}"},
    {"regex": "(a{1,1000000})"},
    {"regex": "(a|b)*a(a|b){500}(a|b){500}(a|b){500}"},
    {"json": exploding_any_of()},
    {"structural_tag": many_tags({"type": "regex", "pattern": "(a|b)*a(a|b){500}(a|b){500}"})},
    {"structural_tag": many_tags({"type": "json_schema", "json_schema": {"type": "array", "minItems": 10**9}})},
    {"json": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}}},
    {"grammar": 'start: r0\nr300: "a"\n' + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(300))},
]


def tried(grammars: GrammarCompiler, fields: dict[str, Any]) -> str:
    try:
        constraint = grammars.compile(StructuredOutputs(**fields)).start([EOS])
    except RequestError as error:
        return error.reason
    return "built" if any(constraint.mask()) else "nothing"


@pytest.mark.parametrize("fields", BOMBS, ids=lambda fields: str(fields)[:60])
def test_bombs_end_in_a_process_of_their_own(grammars: GrammarCompiler, fields: dict[str, Any]) -> None:
    """Refused, or built within the limits after all; the next request is served either way."""
    assert tried(grammars, fields) in ("built", "bad_constraint", "compile_limit")
    assert grammars.compile(StructuredOutputs(choice=["fine"])).start([]).forced() is not None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the processes were asked."""
    requests: list[object] = []
    ask = WorkerProcess.ask

    def counting(self: WorkerProcess, request: Any, **options: Any) -> Any:
        requests.append(request)
        return ask(self, request, **options)

    monkeypatch.setattr(WorkerProcess, "ask", counting)
    return requests


def test_a_bomb_is_remembered(asked: list[object]) -> None:
    """The second and third time no process is asked."""
    grammars = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    messages = set()
    for param in ("structured_outputs", "structured_outputs", "guided_regex"):
        with pytest.raises(RequestError) as caught:
            grammars.compile(StructuredOutputs(regex="(", param=param))
        messages.add(str(caught.value).removeprefix(str(caught.value.param)))
    assert len(asked) == 1
    assert len(messages) == 1
    grammars.close()


def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILE_LIMIT_S", 1e-6)
    grammars = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    with pytest.raises(RequestError) as caught:
        grammars.compile(StructuredOutputs(json=exploding_any_of()))
    assert caught.value.reason == "compile_limit"
    monkeypatch.undo()
    assert grammars.compile(StructuredOutputs(regex="a|b")).start([]).mask()
    grammars.close()


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_COMPILED", 3)
    monkeypatch.setattr(compiling, "MAX_REFUSED", 3)
    grammars = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    for number in range(8):
        grammars.compile(StructuredOutputs(choice=[f"c{number}"]))
        with pytest.raises(RequestError):
            grammars.compile(StructuredOutputs(regex=f"[{number}"))
    assert {name: (cache.num_entries, cache.num_evicted) for name, cache in grammars.cache_counts().items()} == {
        "proved": (3, 5),
        "refused": (3, 5),
    }
    grammars.close()


def test_threads_wait_for_what_one_of_them_tries_out(grammars: GrammarCompiler, asked: list[object]) -> None:
    found: list[object] = []
    wanted = StructuredOutputs(regex="shared [0-9]+")
    threads = [threading.Thread(target=lambda: found.append(grammars.compile(wanted))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(asked) == 1


def test_a_limit_that_one_request_reaches_is_not_there_for_the_next(grammars: GrammarCompiler) -> None:
    """A matcher and its copies share what they learn of a grammar; two requests must not."""
    wanted = StructuredOutputs(grammar='start: s\ns: s s s | s s | "a" | "" | s "a" s')
    first, second = (steps_to_the_limit(grammars.compile(wanted).start([])) for _ in range(2))
    assert first == second > 10


def steps_to_the_limit(constraint: Constraint) -> int:
    for count in range(3000):
        try:
            constraint.mask()
            constraint.advance(ord("a"))
        except RequestError:
            return count
    raise AssertionError("no limit was reached")


def test_what_a_tag_holds_is_refused_with_its_place(grammars: GrammarCompiler) -> None:
    tag = {"begin": "<f>", "schema": {"type": "stsring"}, "end": ""}
    with pytest.raises(RequestError) as caught:
        grammars.compile(StructuredOutputs(structural_tag={"triggers": ["<f"], "structures": [tag]}))
    assert (caught.value.param, caught.value.reason) == ("structured_outputs.structural_tag", "bad_constraint")
    assert "stsring" in str(caught.value)


def test_additional_properties_can_be_turned_off(grammars: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"const": 1}}}}}
    for closed in (False, True):
        wanted = StructuredOutputs(json=schema, disable_additional_properties=closed, disable_any_whitespace=True)
        constraint = grammars.compile(wanted).start([])
        for byte in b'{"a":{"':
            constraint.advance(byte)
        mask = constraint.mask()
        assert bool(mask[ord("z") >> 3] >> (ord("z") & 7) & 1) is not closed


@pytest.mark.parametrize("more", [{}, {"additionalProperties": False}, {"patternProperties": {"^x": True}}])
def test_as_many_optional_properties_as_are_allowed(grammars: GrammarCompiler, more: dict[str, Any]) -> None:
    """The bound that is stated holds: what passes it can be built, and begun with any of them."""
    properties = {f"property_{number}": {"type": "string"} for number in range(MAX_OPTIONAL_PROPERTIES)}
    wanted = StructuredOutputs(json={"type": "object", "properties": properties, **more})
    constraint = grammars.compile(wanted).start([EOS])
    for byte in b'{"property_1": "a", "property_999": "':
        assert constraint.mask()[byte >> 3] >> (byte & 7) & 1
        constraint.advance(byte)


def test_a_thousand_long_choices(grammars: GrammarCompiler) -> None:
    """They share all but their ends: the limits of a token's work hold for them too."""
    choices = ["x" * 50 + f"{number * 7919 % 10007:05d}" for number in range(1024)]
    constraint = grammars.compile(StructuredOutputs(choice=choices)).start([EOS])
    text = b""
    while not constraint.is_finished:
        mask = constraint.mask()
        token = max(token for token in range(256) if mask[token >> 3] >> (token & 7) & 1)
        constraint.advance(token)
        text += bytes([token])
    assert text.decode() in choices
