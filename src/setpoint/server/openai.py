"""Wire types of the OpenAI endpoints: every field with its bounds, nothing else accepted.

A field that is not here is either in the tables of `fields.py` (ignored by name, or refused with a reason) or unknown,
which is a 400. Types are strict: no booleans for numbers, no numbers for strings. Bounds of the sampling fields come
from `setpoint.engine.sampling.BOUNDS`, so that every front end has the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from setpoint.engine.json_schemas import MAX_SCHEMA_BYTES, MAX_SCHEMA_PROPERTIES
from setpoint.engine.sampling import BOUNDS
from setpoint.engine.slo import LEAST_S, MOST_S
from setpoint.engine.structural_tags import MAX_TAG_CHARS, MAX_TAGS, MAX_TRIGGERS
from setpoint.engine.structured_outputs import (
    MAX_CHOICE_CHARS,
    MAX_CHOICES,
    MAX_GRAMMAR_CHARS,
    MAX_REGEX_CHARS,
    MAX_WHITESPACE_CHARS,
)

MAX_TEXT: Final = 16 << 20  # characters; the body limit in bytes is the tighter one
MAX_TOKENS: Final = 1 << 25  # static end of every list of tokens; the model's context is checked later
MAX_SLO_CHARS: Final = 256
NAME: Final = r"^[A-Za-z0-9._:-]{1,128}$"


def _bounded(name: str) -> Any:
    bound = BOUNDS[name]
    if bound.kind == "str":
        return Field(min_length=int(bound.minimum), max_length=int(bound.maximum))
    if bound.exclusive_minimum:
        return Field(gt=bound.minimum, le=bound.maximum)
    return Field(ge=bound.minimum, le=bound.maximum)


def _items(name: str) -> Any:
    return Field(min_length=BOUNDS[name].min_items, max_length=BOUNDS[name].max_items)


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(pattern=NAME, max_length=128)]
TokenId = Annotated[int, _bounded("stop_token_ids")]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
TokenCount = Annotated[int, _bounded("max_tokens")]
StopString = Annotated[str, _bounded("stop")]
LogprobCount = Annotated[int, _bounded("logprobs")]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Schema = Annotated[dict[str, Any], Field(max_length=MAX_SCHEMA_PROPERTIES)]
SchemaText = Annotated[str, Field(max_length=MAX_SCHEMA_BYTES)]
Regex = Annotated[str, Field(max_length=MAX_REGEX_CHARS)]
Grammar = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)]
Whitespace = Annotated[str, Field(max_length=MAX_WHITESPACE_CHARS)]
Choices = Annotated[list[Annotated[str, Field(max_length=MAX_CHOICE_CHARS)]], Field(max_length=MAX_CHOICES)]


class JsonSchemaFormat(Wire):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=MAX_SCHEMA_BYTES)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None  # it is, either way


TagText = Annotated[str, Field(max_length=MAX_TAG_CHARS)]
TagFormat = Annotated[dict[str, Any], Field(max_length=8)]  # one of those of `engine.structural_tags`


class Structure(Wire):
    begin: TagText
    schema_: Schema | SchemaText | bool = Field(alias="schema")
    end: TagText


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: Annotated[list[Structure], Field(max_length=MAX_TAGS)] | None = None
    triggers: Annotated[list[TagText], Field(max_length=MAX_TRIGGERS)] | None = None
    format: TagFormat | None = None


class StructuredOutputsFields(Wire):
    json_: Schema | SchemaText | None = Field(None, alias="json")
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None
    structural_tag: TagFormat | SchemaText | None = None
    whitespace_pattern: Whitespace | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


SloBound = Annotated[float, Field(ge=LEAST_S * 1e3, le=MOST_S * 1e3)]


class SloFields(Wire):
    ttft_ms: SloBound | None = None
    tpot_ms: SloBound | None = None


class ModelField(Wire):
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class GenerationFields(ModelField):
    """What chat and completions share."""

    min_tokens: Annotated[int, _bounded("min_tokens")] | None = None
    n: Annotated[int, _bounded("n")] | None = None
    best_of: Annotated[int, _bounded("n")] | None = None
    temperature: Annotated[float, _bounded("temperature")] | None = None
    top_p: Annotated[float, _bounded("top_p")] | None = None
    min_p: Annotated[float, _bounded("min_p")] | None = None
    top_k: Annotated[int, _bounded("top_k")] | None = None
    presence_penalty: Annotated[float, _bounded("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _bounded("frequency_penalty")] | None = None
    repetition_penalty: Annotated[float, _bounded("repetition_penalty")] | None = None
    seed: Annotated[int, _bounded("seed")] | None = None
    stop: StopString | Annotated[list[StopString], _items("stop")] | None = None
    stop_token_ids: Annotated[list[TokenId], _items("stop_token_ids")] | None = None
    allowed_token_ids: Annotated[list[TokenId], _items("allowed_token_ids")] | None = None
    bad_words: Annotated[list[Annotated[str, _bounded("bad_words")]], _items("bad_words")] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, _bounded("logit_bias")]],
            _items("logit_bias"),
        ]
        | None
    ) = None
    prompt_logprobs: Annotated[int, _bounded("prompt_logprobs")] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsFields | None = None
    guided_json: Schema | SchemaText | None = None  # names of the same in other servers, from here
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    guided_whitespace_pattern: Whitespace | None = None
    regex: Regex | None = None
    ebnf: Grammar | None = None
    json_schema: SchemaText | None = None  # to here
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1, le=64)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Annotated[int, Field(ge=-128, le=127)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[ -~]+$")] | None = None
    request_id: Name | None = None
    session_id: Name | None = None
    slo: SloFields | Annotated[str, Field(min_length=1, max_length=MAX_SLO_CHARS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(GenerationFields):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=256)]
    )
    max_tokens: TokenCount | None = None
    logprobs: LogprobCount | None = None
    echo: bool | None = None


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Name | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None


class Document(Wire):
    title: Text | None = None
    text: Text


TemplateKey = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
TemplateValue = (
    bool
    | Annotated[int, Field(ge=-(1 << 31), le=(1 << 31) - 1)]
    | Annotated[float, Field(ge=-1e9, le=1e9)]
    | Annotated[str, Field(max_length=4096)]
    | None
)


class TemplateFields(Wire):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[TemplateKey, TemplateValue], Field(max_length=16)] | None = None
    documents: Annotated[list[Document], Field(max_length=256)] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(GenerationFields, TemplateFields):
    messages: Messages
    max_completion_tokens: TokenCount | None = None
    max_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: Literal[True] | None = None
    reasoning_effort: Literal["none"] | None = None


class TokenizeRequest(ModelField, TemplateFields):
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ModelField):
    tokens: TokenIds


class ErrorBody(BaseModel):
    """Documentation only: the shape of every error."""

    class Detail(BaseModel):
        message: str
        type: str
        param: str | None
        code: int
        reason: str

    error: Detail
