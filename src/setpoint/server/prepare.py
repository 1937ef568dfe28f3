"""From a typed request to a job: names checked, templates rendered, text tokenised, parameters resolved.

Runs in a worker thread, off the event loop; everything here may take long for a long prompt. Length limits are
enforced before full tokenisation: no token covers more bytes than the longest of the vocabulary.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from setpoint.engine.sampling import SamplingParams
from setpoint.errors import ContextLengthError, RequestError
from setpoint.server.context import ServerContext
from setpoint.server.errors import ApiError
from setpoint.server.generation import Job, Prompt
from setpoint.server.openai import ChatRequest, CompletionRequest, GenerationFields, Message, TemplateFields
from setpoint.server.structure import wanted_structure
from setpoint.text.spellings import spellings

_SAMPLING: Final = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "allowed_token_ids",
    "bad_words",
)


def check_model(context: ServerContext, name: str | None) -> None:
    if name is not None and name not in context.model_names:
        raise ApiError("model_not_found", f"The model '{name[:64]}' is not served here.", param="model")


def prepare_chat(context: ServerContext, body: ChatRequest, tenant: str) -> Job:
    check_model(context, body.model)
    limits = [value for value in (body.max_completion_tokens, body.max_tokens) if value is not None]
    if len(set(limits)) > 1:
        raise _conflict("max_tokens", "'max_tokens' and 'max_completion_tokens' differ; send one.")
    if body.top_logprobs and not body.logprobs:
        raise _conflict("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    text = render(context, body, body.messages)
    prompt = _tokenise(context, body, text, add_special_tokens=bool(body.add_special_tokens), param="messages")
    params = _sampling(context, body, max_tokens=limits[0] if limits else None, logprobs=logprobs)
    job = _job(context, body, "chatcmpl", [(None, prompt)], params, tenant, param="messages")
    if context.settings.keeps_messages:
        job = replace(job, messages=tuple(message.model_dump(exclude_none=True) for message in body.messages))
    return job


def prepare_completion(context: ServerContext, body: CompletionRequest, tenant: str) -> Job:
    check_model(context, body.model)
    if body.echo and body.logprobs is not None and body.prompt_logprobs is not None:
        raise _conflict("prompt_logprobs", "'echo' with 'logprobs' already returns those of the prompt.")
    params = _sampling(context, body, max_tokens=body.max_tokens or 16, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=body.logprobs)
    special = body.add_special_tokens is not False
    prompts: list[tuple[str | None, list[int]]] = []
    for value in _separate(body.prompt):
        if isinstance(value, str):
            prompts.append((value, _tokenise(context, body, value, add_special_tokens=special, param="prompt")))
        else:
            prompts.append((None, _truncated(context, body, value)))
    job = _job(context, body, "cmpl", prompts, params, tenant, param="prompt")
    return replace(job, echo=bool(body.echo), continues_text=True)


def _separate(prompt: Any) -> Sequence[str | list[int]]:
    """Each prompt of the four forms: text, token ids, and lists of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("'prompt' is empty; send at least one token.", param="prompt")
    return prompt if isinstance(prompt[0], (str, list)) else [prompt]


def render(context: ServerContext, body: TemplateFields, messages: Sequence[Message]) -> str:
    """The chat template applied to the messages. Raises RequestError, ApiError."""
    template = context.chat_template
    if template is None or not template.is_available:
        raise ApiError("not_supported", "This model has no chat template; use completions.", status=400)
    continues = bool(body.continue_final_message)
    documents = [document.model_dump(exclude_none=True) for document in body.documents or ()]
    return template.render(
        [_message(index, message) for index, message in enumerate(messages)],
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        documents=documents or None,
        kwargs=body.chat_template_kwargs,
    )


def _message(index: int, message: Message) -> Mapping[str, Any]:
    if message.content is None and message.role != "assistant":
        raise RequestError("'content' is required.", param=f"messages.{index}.content")
    role = "system" if message.role == "developer" else message.role  # the newer name of the same role
    rendered: dict[str, Any] = {"role": role, "content": message.content}
    if isinstance(message.content, list):
        rendered["content"] = [part.model_dump() for part in message.content]
    if message.name is not None:
        rendered["name"] = message.name
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if reasoning is not None:
        rendered["reasoning_content"] = reasoning
    return rendered


def tokenise_text(context: ServerContext, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of a text that may be refused before it is tokenised: `len(text) / longest token` is a lower bound."""
    least = len(text) // context.tokenizer.longest_token
    if least > context.max_model_len:
        limit = f"This model's maximum context length is {context.max_model_len} tokens"
        raise ContextLengthError(f"{limit}, but the prompt has at least {least}. Shorten it.", param=param)
    return context.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _tokenise(
    context: ServerContext, body: GenerationFields, text: str, *, add_special_tokens: bool, param: str
) -> list[int]:
    if body.truncate_prompt_tokens is None:
        return tokenise_text(context, text, add_special_tokens=add_special_tokens, param=param)
    return _truncated(context, body, context.tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _truncated(context: ServerContext, body: GenerationFields, token_ids: list[int]) -> list[int]:
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == -1:
        output = getattr(body, "max_completion_tokens", None) or getattr(body, "max_tokens", None)
        default = 16 if isinstance(body, CompletionRequest) else 1
        limit = max(context.max_model_len - (output or default), 0)
    if limit > context.max_model_len:
        raise RequestError(
            f"'truncate_prompt_tokens' must be at most {context.max_model_len}.", param="truncate_prompt_tokens"
        )
    if len(token_ids) <= limit:
        return token_ids
    return token_ids[:limit] if body.truncation_side == "right" else token_ids[len(token_ids) - limit :]


def _sampling(
    context: ServerContext, body: GenerationFields, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise _conflict("best_of", "'best_of' must equal 'n'.")
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {int(token_id): value for token_id, value in body.logit_bias.items()}
    given["bad_words_token_ids"] = spellings(context.tokenizer, body.bad_words or ())
    given["structured_outputs"] = wanted_structure(body)
    params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)
    vocab_size = context.engine.limits.vocab_size
    if len(body.allowed_token_ids or ()) > vocab_size:
        raise RequestError(f"'allowed_token_ids' holds more than {vocab_size} entries.", param="allowed_token_ids")
    params.check_vocabulary(vocab_size)
    return params


def _job(
    context: ServerContext,
    body: GenerationFields,
    prefix: str,
    prompts: Sequence[tuple[str | None, list[int]]],
    params: SamplingParams,
    tenant: str,
    *,
    param: str,
) -> Job:
    if (body.stream_options is not None or body.stream_interval is not None) and not body.stream:
        name = "stream_interval" if body.stream_options is None else "stream_options"
        raise _conflict(name, f"'{name}' needs 'stream': true.")
    if body.stream and body.prompt_logprobs is not None:
        raise _conflict("prompt_logprobs", "'prompt_logprobs' is not available in a stream.")
    options = body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    return Job(
        id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        prompts=[Prompt(ids, _resolve(context, params, ids, param), text) for text, ids in prompts],
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        session_id=body.session_id or "",
        tenant=tenant,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=continuous,
        stream_interval=body.stream_interval or 1,
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
    )


def _resolve(context: ServerContext, params: SamplingParams, token_ids: list[int], param: str) -> SamplingParams:
    if not token_ids:
        raise RequestError("The prompt is empty; send at least one token.", param=param)
    vocab_size = context.engine.limits.vocab_size
    if max(token_ids) >= vocab_size:
        raise RequestError(f"Token ids must be below {vocab_size}.", param=param)
    try:
        return params.resolve(context.max_model_len, len(token_ids))
    except ContextLengthError as error:
        raise ContextLengthError(str(error), param=param if error.param == "messages" else error.param) from None


def _conflict(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, reason="conflict")
