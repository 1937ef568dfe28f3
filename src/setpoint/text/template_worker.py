"""The program that renders chat templates, in a process of its own: `sandbox.py` starts it as a script.

A template comes from a model file, so it is not trusted. Jinja's sandbox keeps it from Python's objects; being a
process bounds the rest, which no sandbox inside an interpreter can: processor time (also inside one long C call),
memory, and, should the sandbox have a hole, what it could reach: no environment, no files, no child processes.

Requests (`worker.py` says how they come):
    {"compile": key, "source": text, "limit_s": seconds}
    {"render": key, "variables": {...}, "max_chars": count, "limit_s": seconds}
Answers: {"variables": [names], "content": form}, {"text": text} or {"error": kind, "message": text}.
Only the standard library, `worker.py` and jinja2 are imported here.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2.debug  # loaded now: once confined, no file can be opened
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import Template, TemplateError, nodes
from jinja2.parser import Parser

from setpoint.text.worker import confine, serve, with_limit

MAX_TEMPLATES = 8
GLOBALS = ("range", "dict", "namespace")  # of Jinja's own; `lipsum`, `cycler` and `joiner` serve web pages
OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Refused(TemplateError):
    """The template called `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it just shows them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The one place where a template environment is made; its settings are those of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals = {name: environment.globals[name] for name in GLOBALS}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def content_form(tree: nodes.Template) -> str:
    """What the template takes a message's content for.

    "string": it never loops over the content. "parts": it does, and never asks whether the content is a string.
    "either": it does both.
    """
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return "string"
    asks = ("string", "iterable", "sequence", "mapping")
    tests = (test for test in tree.find_all(nodes.Test) if test.name in asks)
    return "either" if any(_is_content(test.node, names) for test in tests) else "parts"


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names


class Renderer:
    """Answers requests; keeps the last few compiled templates."""

    def __init__(self) -> None:
        self._environment = make_environment()
        self._templates: dict[str, Template] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with_limit(request["limit_s"])
            return self._compile(request) if "compile" in request else self._render(request)
        except Refused as error:
            return {"error": "refused", "message": str(error)}
        except MemoryError:
            return {"error": "memory", "message": ""}
        except TemplateError as error:
            return {"error": "template", "message": str(error.message)}
        except Exception as error:  # whatever a template provokes; the text may quote the prompt, so only the type
            return {"error": "failed", "message": type(error).__name__}
        finally:
            with_limit(0.0)

    def _compile(self, request: dict[str, Any]) -> dict[str, Any]:
        tree = self._environment.parse(request["source"])
        if any(True for _ in tree.find_all(OTHER_FILES)):
            return {"error": "template", "message": "it includes another template"}
        template = self._environment.from_string(tree)
        while len(self._templates) >= MAX_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        self._templates[request["compile"]] = template
        variables = jinja2.meta.find_undeclared_variables(tree) - self._environment.globals.keys()
        return {"variables": sorted(variables), "content": content_form(tree)}

    def _render(self, request: dict[str, Any]) -> dict[str, Any]:
        template = self._templates.get(request["render"])
        if template is None:
            return {"error": "unknown", "message": ""}
        left = request["max_chars"]
        chunks = []
        for chunk in template.generate(request["variables"]):
            left -= len(chunk)
            if left < 0:
                return {"error": "length", "message": ""}
            chunks.append(chunk)
        return {"text": "".join(chunks)}


def warm_up(renderer: Renderer) -> None:
    """Make Python load what it loads at first use; afterwards it cannot open files."""
    source = "{% for m in messages %}{{ 'a\\n' + m.content | tojson }}{% break %}{% endfor %}{{ strftime_now('%b') }}"
    for text in (source, "{{ unclosed", "{{ raise_exception('x') }}", "{{ none.a.b }}", "{{ 1 // 0 }}"):
        renderer.answer({"compile": "", "source": text, "limit_s": 0.0})
        renderer.answer({"render": "", "variables": {"messages": [{"content": "é"}]}, "max_chars": 99, "limit_s": 0.0})


def main() -> None:
    renderer = Renderer()
    warm_up(renderer)
    confine()
    serve(renderer.answer)


if __name__ == "__main__":
    main()
