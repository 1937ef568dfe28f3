"""Chat templates: what Hugging Face renders, and every limit on what a template may do (LD-7)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import setpoint
from setpoint.errors import ModelFileError, RequestError
from setpoint.text.chat_template import ChatTemplate
from setpoint.text.sandbox import TemplateSandbox

Message = dict[str, Any]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HI: list[Message] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    sandbox = TemplateSandbox()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[TemplateSandbox]:
    sandbox = TemplateSandbox(render_limit_s=0.05)
    yield sandbox
    sandbox.close()


def template(source: str, sandbox: TemplateSandbox) -> ChatTemplate:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", sandbox=sandbox)
    template.compile()
    return template


def render(source: str, sandbox: TemplateSandbox, messages: list[Message] = HI, **options: Any) -> str:
    return template(source, sandbox).render(messages, **options)


def test_messages_become_a_prompt(sandbox: TemplateSandbox) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert render(CHATML, sandbox, messages) == text + "<|im_start|>assistant\n"
    assert render(CHATML, sandbox, messages, add_generation_prompt=False) == text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),  # blocks leave no lines, as transformers sets it
        ("{% for m in messages %}{% break %}{% endfor %}", ""),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ {'a': 'é<&', 'b': [1, none, true]} | tojson }}", '{"a": "é<&", "b": [1, null, true]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].role) }}", "[user]"),
        ("{{ messages[0]['content'].strip().upper() | replace('H', 'h') }}", "hI"),
        ("{{ '' if missing is defined else 'undefined' }}{{ missing }}", "undefined"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
    ],
)
def test_templates_mean_what_they_mean_to_transformers(source: str, expected: str, sandbox: TemplateSandbox) -> None:
    assert render(source, sandbox) == expected


def test_dates_are_written_as_asked(sandbox: TemplateSandbox) -> None:
    assert re.fullmatch(r"\d\d \w{3} 20\d\d", render("{{ strftime_now('%d %b %Y') }}", sandbox))


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (CHATML.replace("\\n", ""), "plain", "plain"),
        (CHATML.replace("\\n", ""), ["one", "two"], "one\ntwo"),  # a template that takes strings gets one string
        ("{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}", "plain", "[plain]"),
        ("{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}", ["a", "b"], "[a][b]"),
        (
            "{% for m in messages %}{% set content = m['content'] %}{% for p in content | selectattr('type', 'eq', "
            "'text') %}[{{ p['text'] }}]{% endfor %}{% endfor %}",
            "plain",
            "[plain]",
        ),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}",
            "plain",
            "plain",
        ),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}",
            ["a"],
            "[a]",
        ),
        ("{% for line in messages[0].content.split() %}{{ line }};{% endfor %}", "a b", "a;b;"),
        ("{{ messages[0].content }}.", None, "."),
    ],
)
def test_content_comes_as_the_template_takes_it(
    source: str, content: str | list[str] | None, expected: str, sandbox: TemplateSandbox
) -> None:
    given = [{"type": "text", "text": text} for text in content] if isinstance(content, list) else content
    text = render(source, sandbox, [{"role": "user", "content": given}], add_generation_prompt=False)
    assert text.removeprefix("<|im_start|>user").removesuffix("<|im_end|>") == expected


def test_parts_that_are_not_text_are_refused(sandbox: TemplateSandbox) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(RequestError, match="text only"):
        render(CHATML, sandbox, [{"role": "user", "content": [image]}])


def test_tool_calls_come_as_objects(sandbox: TemplateSandbox) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    source = "{{ messages[0].tool_calls[0].function.arguments.x + 1 }}{{ tools | length }}"
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(source, sandbox, [message], tools=[{}]) == "21"
    call["function"] = {"name": "f", "arguments": "{"}
    with pytest.raises(RequestError, match="not JSON"):
        render(source, sandbox, [message], tools=[{}])


@pytest.mark.parametrize("words", ["Once upon", "Once  \n", "", "user", "<|im_end|>\n"])
@pytest.mark.parametrize("as_parts", [False, True])
def test_a_final_message_is_continued_exactly_where_it_ends(
    words: str, as_parts: bool, sandbox: TemplateSandbox
) -> None:
    content = [{"type": "text", "text": words}] if as_parts else words
    messages = [*HI, {"role": "assistant", "content": content}]
    text = render(CHATML, sandbox, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{words}"
    assert messages[1]["content"] == content  # the caller's list is not touched


@pytest.mark.parametrize(("words", "expected"), [("Once  \n", "Once"), ("Once", "Once"), ("\n", ""), ("", "")])
def test_a_template_that_strips_also_strips_what_is_continued(
    words: str, expected: str, sandbox: TemplateSandbox
) -> None:
    source = "{% for m in messages %}{{ m.role + '\\n' + m.content | trim + '<end>' }}{% endfor %}"
    messages = [{"role": "assistant", "content": words}]
    text = render(source, sandbox, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"assistant\n{expected}"


def test_what_cannot_be_continued_is_refused(sandbox: TemplateSandbox) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match="no final message"):
        render(CHATML, sandbox, [], **options)
    with pytest.raises(RequestError, match="drops the final message"):
        render("x", sandbox, **options)
    with pytest.raises(RequestError, match="exclude"):
        render(CHATML, sandbox, add_generation_prompt=True, continue_final_message=True)


def test_a_model_without_a_template_says_so() -> None:
    missing = ChatTemplate(None, bos_token="", eos_token="")
    assert not missing.is_available
    with pytest.raises(RequestError, match="no chat template; use completions"):
        missing.render(HI)


def test_only_what_the_template_reads_can_be_set(sandbox: TemplateSandbox) -> None:
    source = "{{ enable_thinking }}{{ messages[0].content }}{{ bos_token }}{% set own = 1 %}{{ range(own) | length }}"
    assert template(source, sandbox).allowed_kwargs == {"enable_thinking"}
    assert render(source, sandbox, kwargs={"enable_thinking": False}) == "Falsehi<s>1"
    for name in ("messages", "bos_token", "own", "range", "other", "__class__", "raise_exception", "a\nb"):
        with pytest.raises(RequestError, match="does not read") as raised:
            render(source, sandbox, kwargs={name: 1})
        assert raised.value.reason == "unknown_field"
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_are_refused_where_the_template_ignores_them(name: str, sandbox: TemplateSandbox) -> None:
    assert render(f"{{{{ {name} | length }}}}", sandbox, **{name: [{}, {}]}) == "2"
    with pytest.raises(RequestError, match="does not use") as raised:
        render(CHATML, sandbox, **{name: []})
    assert raised.value.param == name


def test_a_template_may_refuse_the_messages(sandbox: TemplateSandbox) -> None:
    source = "{{ raise_exception('Roles must\\nalternate' + 'x' * 1000) }}"
    with pytest.raises(RequestError, match="Roles must alternate") as raised:
        render(source, sandbox)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ unclosed",
        "{% endfor %}",
        "{{ x | no_such_filter }}",
        "{% include 'other' %}",
        "{% import '/etc/passwd' as x %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% if a %}" * 2000 + "{% endif %}" * 2000,
        "x" * (2**20 + 1),
        "\ud800",
    ],
    ids=lambda source: source[:20].encode("ascii", "replace").decode(),
)
def test_a_template_that_does_not_compile_is_a_model_error(source: str, sandbox: TemplateSandbox) -> None:
    with pytest.raises(ModelFileError):
        template(source, sandbox)


LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("source", [LONG_LOOP, "{{ (10 ** messages[0].n) ** messages[0].n }}"])
def test_a_template_that_runs_on_is_ended(source: str, impatient: TemplateSandbox) -> None:
    """The second spends its time inside one call, where no check in Python would reach."""
    with pytest.raises(RequestError, match="too long") as raised:
        render(source, impatient, [{"role": "user", "content": "", "n": 10**6}])
    assert raised.value.reason == "compile_limit"
    assert render(CHATML, impatient).endswith("assistant\n")  # the next one has a process again


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * messages[0].n }}",
        "{{ 'a' | center(messages[0].n) }}",
        "{{ '%*d' % (messages[0].n, 1) }}",
        "{{ '{:>999999999}'.format('a') }}",
        "{{ [0] * messages[0].n }}",
        "{% for i in range(9999) %}{{ 'abcdefghijklmnop' * 9 }}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ messages[0].content * 5 * 10 ** 5 }}",
    ],
)
def test_a_template_that_makes_too_much_is_refused(source: str, sandbox: TemplateSandbox) -> None:
    with pytest.raises(RequestError, match=r"too much text|does not accept"):
        render(source, sandbox, [{"role": "user", "content": "hi", "n": 10**10}])


def test_output_may_be_four_times_the_input(sandbox: TemplateSandbox) -> None:
    long = [{"role": "user", "content": "x" * 300_000}]
    assert len(render("{{ messages[0].content * 4 }}", sandbox, long)) == 1_200_000
    with pytest.raises(RequestError, match="too much text"):
        render("{{ messages[0].content * 5 }}", sandbox, long)


@pytest.mark.parametrize(
    "value", ["\ud800", float("nan"), float("inf"), {1, 2}, object(), b"x"], ids=lambda value: type(value).__name__
)
def test_what_is_not_json_is_refused(value: Any, sandbox: TemplateSandbox) -> None:
    with pytest.raises(RequestError, match="plain JSON"):
        render(CHATML, sandbox, [{"role": "user", "content": "", "extra": value}])


def test_a_template_pushed_out_by_others_is_compiled_again(sandbox: TemplateSandbox) -> None:
    first = template("first{{ messages | length }}", sandbox)
    for i in range(10):
        assert render(f"{i}", sandbox) == str(i)
    assert first.render(HI) == "first1"


def test_a_process_that_dies_while_idle_is_replaced() -> None:
    sandbox = TemplateSandbox()
    chat = template(CHATML, sandbox)
    expected = chat.render(HI)
    for process in sandbox._pool.idle:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert chat.render(HI) == expected
    sandbox.close()


def test_threads_get_their_own_answers(sandbox: TemplateSandbox) -> None:
    chat = template("{{ messages[0].content }}", sandbox)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: chat.render([{"role": "user", "content": str(i)}]), range(64)))
    assert texts == [str(i) for i in range(64)]


def test_the_process_has_nothing_to_reach_for() -> None:
    """Were the sandbox to have a hole, behind it: no environment, no files, little memory."""
    program = """if True:
        import os, sys
        from setpoint.text import template_worker as worker
        worker.warm_up(worker.Renderer())
        worker.confine()
        for attempt in (lambda: open("/etc/passwd"), os.pipe, lambda: bytes(1 << 30)):
            try:
                attempt()
            except (OSError, MemoryError):
                continue
            sys.exit(1)
        """
    package = Path(setpoint.__file__).parents[1]
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env={"PYTHONPATH": os.pathsep.join([str(package), *sys.path])}).returncode == 0


def test_one_environment_is_made_in_the_source() -> None:
    sources = [path.read_text() for path in Path(setpoint.__file__).parent.rglob("*.py")]
    sites = [found for text in sources for found in re.findall(r"\b\w*Environment\(", text)]
    assert sites == ["ImmutableSandboxedEnvironment("]


# Every one of these would show something of Python's or of this machine if the sandbox let it.
PAYLOADS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__cla' + 'ss__') }}",
    "{{ ''[messages[0].dunder] }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ {}.__class__.__init__.__globals__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__class__ }}",
    "{{ range.__class__.__mro__ }}",
    "{{ dict.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ strftime_now.__closure__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ cycler('a').__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ lipsum | attr('__globals__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format(x='') }}",
    "{{ '{x[__class__]}'.format_map({'x': ''}) }}",
    "{{ '{0.__class__}' | format('') | attr('__class__') }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ ['{0.__class__}'] | map('format', '') | first }}{{ ''.__class__ }}",
    "{{ ['{0.__class__.__init__.__globals__}'.format] | map('call') | list }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ [''] | groupby('__class__') | list }}",
    "{{ [''] | sum(attribute='__class__') }}",
    "{{ [''] | selectattr('__class__') | list | length }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for i in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{% for i in [1] %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ (messages | map('upper')).gi_code }}",
    "{{ messages.append({'role': 'x'}) }}{{ messages | length }}",
    "{{ messages.clear() }}{{ messages | length }}",
    "{{ messages[0].update({'content': 'Traceback'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('x', 'Traceback') }}",
    "{{ import('os') }}",
    "{{ __import__('os') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1+1') }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ config }}{{ request }}{{ environ }}{{ os }}{{ sys }}",
    "{{ 1.0.__class__ }}{{ none.__class__ }}{{ true.__class__ }}",
    "{{ missing.__class__ }}{{ missing._undefined_exception }}",
    "{{ missing._fail_with_undefined_error.__globals__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ 'x'.encode().__reduce_ex__(2) }}",
    "{{ [].sort.__self__ }}",
    "{{ varargs.__class__ }}{{ kwargs.__class__ }}",
    "{{ environment }}{{ context }}{{ eval_ctx }}",
]
LEAKS = re.compile(r"class|object at 0x|function|module|root:|globals|<built-in|Traceback|uid=|frame|code|Environment")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_injections_show_nothing(payload: str, sandbox: TemplateSandbox) -> None:
    messages = [{"role": "user", "content": "hi", "dunder": "__class__"}]
    before = json.dumps(messages)
    try:
        text = render(payload, sandbox, messages)
    except (RequestError, ModelFileError) as error:
        text = str(error).replace("chat template does not compile", "")
    assert not LEAKS.search(text), text
    assert json.dumps(messages) == before
