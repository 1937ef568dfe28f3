"""The rows of logits a sequence asks for in a step, and what their results mean for it."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from setpoint.engine.events import FinishReason, TokenLogprob
from setpoint.engine.late_masks import LateMasks
from setpoint.engine.plan import LogitsRow, PlanEntry, RowResult
from setpoint.engine.sequence import Sequence
from setpoint.errors import EngineError


@dataclass(slots=True)
class Outcome:
    """What happened to one sequence: new tokens, its end, or both."""

    token_ids: tuple[int, ...] = ()
    num_drawn: int = 0  # of them, by the runner; the others were the only ones possible
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: Exception | None = None


Rows = tuple[LogitsRow, ...]


def build_rows(
    seq: Sequence, num_new: int, drafts: list[int], *, late: bool = False
) -> tuple[Rows, int, LateMasks | None]:
    """Rows for the next `num_new` tokens, of which the last are `drafts`; and how many of the drafts are worth a try.

    Prompt tokens not scored yet are scored; where the entry reaches the end of the known tokens, one token is drawn
    there and one after each draft, as if the drafts before it were accepted. With `late`, masks are yet to be computed.
    """
    start, params, scored = seq.num_computed, seq.params, seq.prompt_logprobs
    first = len(seq.token_ids) - 1 - start
    late = late and seq.row_state.constraint is not None
    if not drafts and scored is None and not late:  # nearly every entry
        if num_new <= first:
            return (), 0, None
        sampling = seq.row_state.row(seq.token_ids, seq.num_prompt)
        return (LogitsRow(first, sampling, None, params.logprobs),), 0, None
    rows: list[LogitsRow] = []
    if scored is not None and len(scored) < seq.num_prompt:
        for position in range(max(start, len(scored) - 1), min(start + num_new, seq.num_prompt - 1)):
            target = seq.token_ids[position + 1]
            rows.append(LogitsRow(position - start, target=target, num_logprobs=params.prompt_logprobs))
    if num_new <= first:
        return tuple(rows), 0, None
    masks: LateMasks | None = None
    if late:
        draws, masks = seq.row_state.late_rows(seq.token_ids, seq.num_prompt, drafts)
    else:
        draws = seq.row_state.rows(seq.token_ids, seq.num_prompt, drafts)
    rows += [LogitsRow(first + count, sampling, None, params.logprobs) for count, sampling in enumerate(draws)]
    return tuple(rows), len(draws) - 1, masks


def take_rows(
    seq: Sequence, entry: PlanEntry, results: abc.Sequence[RowResult], vocab_size: int, *, jump: bool = False
) -> Outcome:
    """Advance the sequence by an executed entry. Drafts count as far as they equal what was drawn.

    With `jump`, tokens that are the only ones possible follow at once. Raises EngineError when the results do not fit
    the rows.
    """
    if len(results) != len(entry.rows):
        raise EngineError("the runner returned a wrong number of rows")
    num_known = len(entry.token_ids) - entry.num_drafts
    guesses = entry.token_ids[num_known:] if entry.num_drafts else ()
    if entry.late_masks is not None:
        guesses = guesses[: entry.late_masks.num_usable - 1]
    drawn: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish: tuple[FinishReason, int | None] | None = None
    for row, result in zip(entry.rows, results, strict=True):
        if row.sampling is None:
            assert seq.prompt_logprobs is not None
            seq.prompt_logprobs.append(_logprob(result))
            continue
        if not 0 <= result.token_id < vocab_size:
            raise EngineError("the runner drew a token outside the vocabulary")
        drawn.append(result.token_id)
        if row.num_logprobs is not None:
            logprobs.append(_logprob(result))
        finish = seq.append(result.token_id)
        accepted = len(drawn) <= len(guesses) and guesses[len(drawn) - 1] == result.token_id
        if finish is not None or not accepted:
            break
    scored = None
    if drawn and seq.prompt_logprobs is not None and seq.num_output == len(drawn):  # the first output
        scored = tuple(seq.prompt_logprobs)
    # The KV of accepted drafts stays; that of rejected ones is overwritten by the tokens drawn instead.
    seq.num_computed = entry.start + num_known + max(0, len(drawn) - 1)
    if drawn and jump and finish is None and seq.row_state.constraint is not None:
        finish = seq.jump()
    return Outcome(
        seq.take_unreported() if drawn else (),
        len(drawn),
        tuple(logprobs) if logprobs else None,
        scored,
        finish[0] if finish else None,
        finish[1] if finish else None,
    )


def _logprob(result: RowResult) -> TokenLogprob:
    if result.logprob is None or result.rank is None:
        raise EngineError("the runner returned no log-probability where one was asked for")
    return TokenLogprob(result.token_id, result.logprob, result.rank, tuple(result.top_ids), tuple(result.top_logprobs))
