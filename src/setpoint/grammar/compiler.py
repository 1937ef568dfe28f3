"""From what a client asked for to a grammar that the engine can follow; errors name the client's field.

Every new grammar is first built in a process that can be killed (`worker.py`), within 2 s of processor time and
256 MiB. What that proves is built again here, for every request; what it refutes is remembered too, so that the same
bomb does not go off twice. llguidance is loaded, and the model's vocabulary put into its form, with the first request.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import EngineError, RequestError
from setpoint.grammar.matcher import CompiledGrammar
from setpoint.grammar.source import grammar_source
from setpoint.grammar.vocabulary import GrammarVocabulary
from setpoint.text.processes import CLOCK_FACTOR, SandboxDiedError, SandboxStartError, WorkerPool, frame
from setpoint.text.tokenizer import Tokenizer

COMPILE_LIMIT_S: Final = 2.0  # of processor time
MAX_COMPILED: Final = 64
MAX_REFUSED: Final = 1024
REFUSED_FOR_S: Final = 600.0
_LIMIT: Final = re.compile(r"too (large|many|complex|deep|big)|limit|fuel|; max is", re.IGNORECASE)
_WORKER: Final = Path(__file__).with_name("worker.py")

Value = TypeVar("Value")


class _Recent(Generic[Value]):
    """The last few values by key."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> Value | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: bytes, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._capacity:
                self._values.popitem(last=False)
                self.num_evicted += 1


@dataclass(frozen=True, slots=True)
class _Refusal:
    message: str
    reason: str
    until: float

    def error(self, wanted: StructuredOutputs) -> RequestError:
        return wanted.error(self.message, self.reason)


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Of one of the two caches: what it holds now, and what it gave up for newer ones."""

    num_entries: int
    num_evicted: int


class GrammarCompiler:
    """Of one model; `vocab_size` is the width of its logits. Safe to use from several threads; each call may block
    for seconds."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._model_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._pool = WorkerPool(_WORKER, greeting=self._greeting)
        self._compiled: _Recent[tuple[str, str]] = _Recent(MAX_COMPILED)
        self._refused: _Recent[_Refusal] = _Recent(MAX_REFUSED)
        self._stripes = [threading.Lock() for _ in range(16)]  # the same grammar is built once, by whoever comes first
        self._loading = threading.Lock()
        self._vocabulary: GrammarVocabulary | None = None
        self._tokenizer: Any = None

    def compile(self, wanted: StructuredOutputs) -> CompiledGrammar:
        """For one request. Raises RequestError naming the field: bad_constraint, compile_limit.

        What a matcher has learnt of its grammar it shares with its copies, limits reached included: so no two requests
        get the same one.
        """
        form, text = self._proved(wanted)
        vocabulary, tokenizer = self._load()
        from setpoint.grammar.guidance import make_matcher

        try:
            matcher = make_matcher(tokenizer, form, text)
        except ValueError as error:
            raise wanted.error(f"cannot be honoured: {error}") from None
        return CompiledGrammar(matcher, vocabulary, wanted.param, may_name_tokens=form == "grammar")

    def cache_counts(self) -> Mapping[str, CacheCounts]:
        """By cache: grammars proved to build, and grammars refused."""
        caches: dict[str, _Recent[Any]] = {"proved": self._compiled, "refused": self._refused}
        return {name: CacheCounts(len(cache), cache.num_evicted) for name, cache in caches.items()}

    def close(self) -> None:
        """End the processes; they also end with this object or the program."""
        self._pool.close()

    def _proved(self, wanted: StructuredOutputs) -> tuple[str, str]:
        """The form and text of a grammar that was built once within the limits."""
        key = sha256(repr(wanted.key).encode()).digest()
        found = self._known(key, wanted)
        if found is not None:
            return found
        with self._stripes[key[0] % len(self._stripes)]:
            found = self._known(key, wanted)
            if found is not None:
                return found
            try:
                proved = self._prove(wanted)
            except RequestError as error:
                until = time.monotonic() + REFUSED_FOR_S
                self._refused.put(key, _Refusal(_without_param(str(error), error.param), error.reason, until))
                raise
            self._compiled.put(key, proved)
            return proved

    def _known(self, key: bytes, wanted: StructuredOutputs) -> tuple[str, str] | None:
        found = self._compiled.get(key)
        if found is not None:
            return found
        refusal = self._refused.get(key)
        if refusal is not None and time.monotonic() < refusal.until:
            raise refusal.error(wanted)
        return None

    def _prove(self, wanted: StructuredOutputs) -> tuple[str, str]:
        form, source = grammar_source(wanted)
        answer = self._try_out({"form": form, "source": source, "limit_s": COMPILE_LIMIT_S}, wanted)
        match answer.get("error"):
            case None:
                return form, str(answer["grammar"])
            case "memory":
                raise wanted.error("takes too much memory to compile", "compile_limit")
            case _:
                message = answer["message"].rstrip(".")
                reason = "compile_limit" if _LIMIT.search(message) else "bad_constraint"
                raise wanted.error(f"cannot be honoured: {message}", reason)

    def _try_out(self, request: Mapping[str, Any], wanted: StructuredOutputs) -> dict[str, Any]:
        try:
            with self._pool.process() as process:
                return process.ask(request, within_s=COMPILE_LIMIT_S * CLOCK_FACTOR)
        except SandboxDiedError:
            raise wanted.error("takes too long or too much memory to compile", "compile_limit") from None
        except SandboxStartError:
            raise EngineError("the process that compiles grammars cannot start") from None

    def _load(self) -> tuple[GrammarVocabulary, Any]:
        from setpoint.grammar.guidance import make_tokenizer

        with self._loading:
            vocabulary = self._read_vocabulary()
            if self._tokenizer is None:
                greedy = make_tokenizer(vocabulary.texts).greedy_tokenize
                self._tokenizer = make_tokenizer(vocabulary.texts, vocabulary.encoder(greedy))
            return vocabulary, self._tokenizer

    def _read_vocabulary(self) -> GrammarVocabulary:
        if self._vocabulary is None:
            self._vocabulary = GrammarVocabulary(self._model_tokenizer, self._vocab_size)
        return self._vocabulary

    def _greeting(self) -> bytes:
        with self._loading:
            return frame({"tokens": [text.decode("latin-1") for text in self._read_vocabulary().texts]})


def _without_param(message: str, param: str | None) -> str:
    return message.removeprefix(param or "").strip().removesuffix(".")
