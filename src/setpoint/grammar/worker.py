"""The program that tries grammars out, in a process of its own: `compiler.py` starts it as a script.

A grammar comes from a client. That building it takes seconds, or gigabytes, or overflows the stack, is found out here,
where it ends this process only. The first frame is {"tokens": [texts in latin-1]}; then come requests
    {"form": one of FORMS, "source": text, "limit_s": seconds}
with answers {"grammar": text for llguidance} or {"error": kind, "message": text}.
"""

from __future__ import annotations

import sys
from typing import Any

from setpoint.grammar.guidance import grammar_text, make_matcher, make_tokenizer, one_line
from setpoint.text.worker import confine, frames, serve, with_limit


class Trial:
    """Builds a grammar over the model's vocabulary, up to its first mask: what the server will do again."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokenizer = make_tokenizer(tokens)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with_limit(request["limit_s"])
            text = grammar_text(request["form"], request["source"])
            matcher = make_matcher(self._tokenizer, request["form"], text)
            matcher.compute_bitmask()
            if matcher.is_error():
                return {"error": "grammar", "message": one_line(matcher.get_error())}
            return {"grammar": text}
        except MemoryError:
            return {"error": "memory", "message": ""}
        except RecursionError:
            return {"error": "grammar", "message": "it is nested too deep"}
        except Exception as error:  # whatever a grammar provokes
            return {"error": "grammar", "message": one_line(str(error))}
        finally:
            with_limit(0.0)


def main() -> None:
    vocabulary = next(frames(sys.stdin.buffer))
    trial = Trial([token.encode("latin-1") for token in vocabulary["tokens"]])
    del vocabulary
    for form, source in (
        ("grammar", 'start: "a"'),
        ("regex", "["),
        ("json", '{"type":"object"}'),
    ):  # loads what is used
        trial.answer({"form": form, "source": source, "limit_s": 0.0})
    confine()
    serve(trial.answer)


if __name__ == "__main__":
    main()
