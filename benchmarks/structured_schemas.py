"""The schemas of `structured.py`: name -> JSON schema. Plain, nested, recursive, with enums, patterns, formats; large.

Texts and lists are bounded where a model that has lost the thread would otherwise never end them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def record(**properties: Schema) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text(most: int = 24, least: int = 1) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float) -> Schema:
    """With two decimals at most: a model that has lost the thread never ends a number."""
    return {"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.01}


def some(items: Schema, most: int = 3, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def matching(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def formatted(name: str) -> Schema:
    return {"type": "string", "format": name}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def deep(levels: int) -> Schema:
    schema = record(value=whole(0, 9))
    for level in range(levels):
        schema = record(name=text(8), **{f"level{level}": schema})
    return schema


BOOLEAN: Schema = {"type": "boolean"}
ONSETS, CODAS = "bcdfgklmpt", "bdfgklmnprstvwxyzj"
NODE: Schema = {"$ref": "#/$defs/node"}

PLAIN: dict[str, Schema] = {
    "person": record(name=text(), age=whole(0, 120), is_student=BOOLEAN),
    "movie review": record(title=text(), stars=whole(1, 5), verdict=one_of("watch", "skip", "maybe")),
    "weather": record(city=text(16), celsius=number(-60, 60), sky=one_of("clear", "clouds", "rain", "snow")),
    "recipe": record(title=text(), minutes=whole(1, 240), ingredients=some(text(16), 5), vegan=BOOLEAN),
    "book": record(title=text(), authors=some(text(16)), year=whole(1450, 2030), pages=whole(1, 3000)),
    "sentiment": record(label=one_of("positive", "neutral", "negative"), score=number(0, 1)),
    "translation": record(source=text(30), target=text(30), language=one_of("de", "fr", "es", "it")),
    "coordinates": record(latitude=number(-90, 90), longitude=number(-180, 180)),
    "question": record(question=text(40), choices=some(text(16), 4, 4), answer=whole(0, 3)),
    "todo": record(task=text(30), done=BOOLEAN, priority=one_of(1, 2, 3), due=nullable(formatted("date"))),
    "measurement": record(value=number(0, 1000), unit=one_of("kg", "m", "s", "A", "K", "mol", "cd")),
    "only constants": record(kind={"const": "ping"}, version={"const": 2}, flag={"const": True}),
    "any of three": {"anyOf": [record(a=whole(0, 9)), record(b=text(8)), record(c=BOOLEAN)]},
    "list of numbers": some(whole(-99, 99), 6, 2),
    "pair": {"type": "array", "prefixItems": [text(10), whole(0, 99)], "items": False, "minItems": 2},
}

NESTED: dict[str, Schema] = {
    "invoice": record(
        number=matching(r"^INV-[0-9]{4}$"),
        customer=record(name=text(20), country=one_of("DE", "FR", "US", "JP")),
        lines=some(record(item=text(16), quantity=whole(1, 99), price=number(0, 999)), 3),
        paid=BOOLEAN,
    ),
    "address book": some(record(name=text(16), phones=some(matching(r"^\+[0-9]{6,11}$"), 2)), 2),
    "geo feature": record(
        type={"const": "Feature"},
        geometry=record(type={"const": "Point"}, coordinates=some(number(-180, 180), 2, 2)),
        properties=record(name=text(16)),
    ),
    "pod": record(
        apiVersion={"const": "v1"},
        kind={"const": "Pod"},
        metadata=record(name=matching(r"^[a-z][a-z0-9-]{0,14}[a-z0-9]$")),
        spec=record(
            containers=some(record(name=text(10), image=text(16), ports=some(record(port=whole(1, 65535)), 2)), 2)
        ),
    ),
    "tool call": record(
        name=one_of("get_weather", "send_mail", "search"), arguments=record(query=text(24), limit=whole(1, 20))
    ),
    "deep 4": deep(4),
    "deep 8": deep(8),
    "matrix": some(some(whole(0, 9), 3, 3), 3, 3),
    "quiz": record(topic=text(16), questions=some(record(text=text(24), options=some(text(8), 3, 3)), 2)),
    "company": record(
        name=text(16),
        offices=some(record(city=text(12), staff=whole(1, 999)), 2),
        ceo=record(name=text(16), since=whole(1990, 2030)),
    ),
    "optional parts": {
        "type": "object",
        "properties": {"id": whole(1, 9999), "note": text(16), "tags": some(text(8), 2)},
        "required": ["id"],
        "additionalProperties": False,
    },
    "merged": {"allOf": [record(a=whole(0, 9)), {"properties": {"a": whole(3, 20)}}]},
    "discriminated": {
        "oneOf": [
            record(kind={"const": "circle"}, radius=number(0, 100)),
            record(kind={"const": "square"}, side=number(0, 100)),
            record(kind={"const": "label"}, text=text(12)),
        ]
    },
}

RECURSIVE: dict[str, Schema] = {
    "linked list": {
        "$defs": {"node": record(value=whole(0, 9), next={"anyOf": [{"type": "null"}, NODE]})},
        **NODE,
    },
    "tree": {"$defs": {"node": record(name=text(8), children=some(NODE, 2, 0))}, **NODE},
    "expression": {
        "$defs": {
            "node": {"anyOf": [whole(0, 99), record(op=one_of("+", "-", "*"), left=NODE, right=NODE)]},
        },
        **record(result=NODE),
    },
    "menu": {
        "$defs": {"node": {"anyOf": [one_of("File", "Edit", "View", "Help"), some(NODE, 2)]}},
        **record(menu=NODE),
    },
    "folders": {
        "$defs": {"node": record(folder=matching("^[a-z]{1,8}$"), files=some(text(8), 2, 0), inside=some(NODE, 1, 0))},
        **NODE,
    },
    "nested lists": {"$defs": {"node": {"anyOf": [whole(0, 9), some(NODE, 2, 0)]}}, **record(value=NODE)},
}

PATTERNS: dict[str, Schema] = {
    "phone": record(phone=matching(r"^\([0-9]{3}\) [0-9]{3}-[0-9]{4}$")),
    "colour": record(hex=matching("^#[0-9a-f]{6}$")),
    "version": record(version=matching(r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}(-(alpha|beta|rc)\.[0-9])?$")),
    "plate": record(plate=matching("^[A-Z]{1,3}-[A-Z]{1,2} [1-9][0-9]{0,3}$")),
    "slug": record(slug=matching("^[a-z0-9]{1,10}(-[a-z0-9]{1,10}){0,3}$")),
    "iban": record(iban=matching("^DE[0-9]{20}$")),
    "time span": record(
        begin=matching("^([01][0-9]|2[0-3]):[0-5][0-9]$"), end=matching("^([01][0-9]|2[0-3]):[0-5][0-9]$")
    ),
    "words": record(words=some(matching("^[A-Z][a-z]{2,8}$"), 4, 2)),
    "date": record(on=formatted("date")),
    "moment": record(at=formatted("date-time") | {"maxLength": 30}),
    "uuid": record(id=formatted("uuid")),
    "host": record(ip=formatted("ipv4"), name=matching("^[a-z]{1,10}(\\.[a-z]{2,6}){1,2}$")),
    "map of numbers": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,6}$": whole(0, 9)},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 3,
    },
    "multiples": record(fives={"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": 5}),
}

LARGE: dict[str, Schema] = {
    "40 properties": record(**{f"field_{i}": whole(0, 9) for i in range(40)}),
    "60 flags": record(**{f"is_{i}": BOOLEAN for i in range(60)}),
    "enum of 500": record(code=one_of(*(f"code-{i * 7919 % 10007:05d}" for i in range(500)))),
    "enum of 900 words": record(word=one_of(*(a + b + c for a in ONSETS for b in "aeiou" for c in CODAS))),
    "30 definitions": {
        "$defs": {f"d{i}": record(value=whole(0, 9), name=one_of(f"n{i}", f"m{i}")) for i in range(30)},
        **record(**{f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(12)}),
    },
    "any of 40": {"anyOf": [record(**{f"kind_{i}": {"const": i}, "value": whole(0, 9)}) for i in range(40)]},
}

SCHEMAS: dict[str, Schema] = PLAIN | NESTED | RECURSIVE | PATTERNS | LARGE

# What the prompt shows of the recursive ones: without an example, a small model goes ever deeper.
EXAMPLES: dict[str, str] = {
    "linked list": '{"value": 4, "next": {"value": 7, "next": null}}',
    "tree": '{"name": "oak", "children": [{"name": "leaf", "children": []}]}',
    "expression": '{"result": {"op": "+", "left": 2, "right": 5}}',
    "menu": '{"menu": ["File", ["Edit", "View"]]}',
    "folders": '{"folder": "home", "files": ["a.txt"], "inside": []}',
    "nested lists": '{"value": [1, [2, 3]]}',
}
