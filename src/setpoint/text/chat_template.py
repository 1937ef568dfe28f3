"""Chat messages to the text a model was trained on, through the template of its files.

The template runs in a process of its own (`sandbox.py`) under limits on time, memory and output. Which names it reads
and how it takes a message's content is found in its syntax tree, once.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from setpoint.errors import EngineError, ModelError, ModelFileError, RequestError
from setpoint.text.processes import SandboxDiedError, SandboxStartError
from setpoint.text.sandbox import TemplateSandbox

MAX_TEMPLATE_CHARS = 1 << 20
OUTPUT_PER_INPUT = 4
OUTPUT_EXTRA_CHARS = 64 << 10

# What the engine sets; a request cannot.
_OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token")
)


class ChatTemplate:
    """The chat template of one model; `source` is None for a model that has none, and then nothing can be rendered.

    It is compiled by `compile`, or else when it is first used: either raises ModelFileError when that cannot be done.
    """

    def __init__(
        self, source: str | None, *, bos_token: str, eos_token: str, sandbox: TemplateSandbox | None = None
    ) -> None:
        self._source = source
        self._special_tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._sandbox = sandbox if sandbox is not None else TemplateSandbox()
        self._compiling = Lock()
        self._compiled = source is None
        self._reads: frozenset[str] = frozenset()
        self._content_form = "string"

    @property
    def is_available(self) -> bool:
        return self._source is not None

    @property
    def variables(self) -> frozenset[str]:
        """Every name that the template reads and does not set itself."""
        self.compile()
        return self._reads

    @property
    def allowed_kwargs(self) -> frozenset[str]:
        """The names that a request may set: those the template reads and the engine does not set."""
        return self.variables - _OWN_VARIABLES

    def close(self) -> None:
        """End the template's processes; they also end with this object or the program."""
        self._sandbox.close()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Blocks for up to a second: call it from a worker thread.

        `continue_final_message` ends the prompt inside the last message, at the end of its text: without its last
        spaces where the template strips them.
        Raises RequestError when the template refuses the messages, cannot use what is given, or reaches a limit.
        """
        if self._source is None:
            raise RequestError("this model has no chat template; use completions", param="messages")
        self.compile()
        self._check(tools, documents, kwargs)
        shaped = [_shape(message, self._content_form) for message in messages]
        mark, last_spaces = "", ""
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "add_generation_prompt and continue_final_message exclude each other",
                    param="continue_final_message",
                    reason="conflict",
                )
            mark = secrets.token_hex(16)
            last_spaces = _mark_end(shaped, mark + " ")
        variables = {
            **self._special_tokens,
            **(kwargs or {}),
            "messages": shaped,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(self._source, variables)
        if not mark:
            return text
        before, found, after = text.rpartition(mark)
        if not found:
            raise RequestError("the chat template drops the final message", param="continue_final_message")
        return before if after.startswith(" ") else before.removesuffix(last_spaces)

    def compile(self) -> None:
        """Once; a template that failed is tried again."""
        with self._compiling:
            if not self._compiled:
                assert self._source is not None
                self._compile(self._source)
                self._compiled = True

    def _compile(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFileError(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
        try:
            answer = self._sandbox.compile(source)
        except UnicodeEncodeError:
            raise ModelFileError("the chat template is not valid Unicode") from None
        except SandboxDiedError:
            raise ModelFileError("the chat template takes too long or too much memory to compile") from None
        except SandboxStartError as error:
            raise ModelError(f"the process that renders chat templates cannot start: {error}") from None
        if "error" in answer:
            raise ModelFileError(f"the chat template does not compile: {_one_line(answer['message'])}")
        self._reads = frozenset(answer["variables"])
        self._content_form = answer["content"]

    def _check(self, tools: object, documents: object, kwargs: Mapping[str, Any] | None) -> None:
        for name, value in (("tools", tools), ("documents", documents)):
            if value is not None and name not in self._reads:
                raise RequestError(
                    f"this model's chat template does not use {name}", param=name, reason="not_supported"
                )
        for name in kwargs or {}:
            if name not in self.allowed_kwargs:
                known = ", ".join(sorted(self.allowed_kwargs)) or "none"
                raise RequestError(
                    f"chat_template_kwargs: the template does not read {_one_line(str(name))!r}; it reads: {known}",
                    param="chat_template_kwargs",
                    reason="unknown_field",
                )

    def _render(self, source: str, variables: Mapping[str, Any]) -> str:
        try:
            content = json.dumps(variables, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
            raise RequestError("the messages are not plain JSON in valid Unicode", param="messages") from None
        try:
            answer = self._sandbox.render(
                source, variables, max_chars=OUTPUT_PER_INPUT * len(content) + OUTPUT_EXTRA_CHARS
            )
        except SandboxStartError:
            raise EngineError("the process that renders chat templates cannot start") from None
        except SandboxDiedError:
            raise RequestError(
                "the chat template takes too long on these messages", param="messages", reason="compile_limit"
            ) from None
        error = answer.get("error")
        if error is None:
            return str(answer["text"])
        if error in ("length", "memory"):
            raise RequestError(
                "the chat template makes too much text of these messages", param="messages", reason="compile_limit"
            )
        cause = f": {_one_line(answer['message'])}" if error == "refused" else ""
        raise RequestError(f"the chat template does not accept these messages{cause}", param="messages")


def _one_line(message: str) -> str:
    """A message that came out of a template: printable, and short."""
    return "".join(c if c.isprintable() else " " for c in message[:200])


def _shape(message: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The message as the template takes it: its content a string or a list of parts, its tool arguments objects."""
    shaped = dict(message)
    content = message.get("content")
    if content is None:
        shaped["content"] = [] if form == "parts" else ""
    elif isinstance(content, str):
        shaped["content"] = [{"type": "text", "text": content}] if form == "parts" else content
    else:
        texts = [_part_text(part) for part in content]
        as_string = form == "string"
        shaped["content"] = "\n".join(texts) if as_string else [{"type": "text", "text": text} for text in texts]
    if message.get("tool_calls"):
        shaped["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return shaped


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError("this model takes text only: each content part must be text", param="messages")


def _with_arguments(call: Any) -> Any:
    """OpenAI's wire has a tool call's arguments as JSON text; templates want the object."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        raise RequestError("a tool call's arguments are not JSON", param="messages") from None
    return {**call, "function": {**call["function"], "arguments": parsed}}


def _mark_end(messages: list[dict[str, Any]], mark: str) -> str:
    """Put `mark` behind the text of the last message; returns the spaces that this text ends with."""
    content = messages[-1]["content"] if messages else None
    if isinstance(content, str):
        text = content
        messages[-1]["content"] = text + mark
    elif content:
        text = content[-1]["text"]
        content[-1]["text"] = text + mark
    else:
        raise RequestError("there is no final message to continue", param="continue_final_message")
    return text[len(text.rstrip()) :] if text.strip() else ""
